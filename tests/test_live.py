"""Live early exit decides as the sweep does, for both encoders and all methods."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minisweet.adaptive import ExitRule, Exits, certainty_ranges, exits_taken, spaced_thresholds
from minisweet.branches import METHODS
from minisweet.data.tasks import load_examples
from minisweet.data.text import TokenizedExamples, load_tokenizer
from minisweet.evaluation import timing
from minisweet.evaluation.timing import measure_live
from minisweet.exits import EXIT_STRATEGIES
from minisweet.live import Answers, early_exit, full_depth
from tests.conftest import all_exits, random_batch, undecided_model, write_model


@settings(max_examples=12, deadline=None)
@given(
    model_type=st.sampled_from(["bert", "deberta"]),
    method=st.sampled_from(METHODS),
    strategy=st.sampled_from(EXIT_STRATEGIES),
    num_labels=st.integers(2, 3),
    batch_size=st.sampled_from([3, 16]),
    seed=st.integers(0, 10**6),
)
def test_live_decides_as_the_sweep(tmp_path_factory, model_type, method, strategy, num_labels, batch_size, seed):
    folder = write_model(tmp_path_factory.mktemp("live"), model_type)
    model, batch = undecided_model(folder, method, num_labels, seed, strategy), random_batch(seed, batch=16)
    with torch.no_grad():
        logits, certainty = all_exits(model, batch)
    if strategy == "lte":
        rule = ExitRule(num_labels, ranges=certainty_ranges(certainty, 3))
    else:
        rule = ExitRule(num_labels, torch.rand(3) + 0.5)
    confidence = rule.confidences(logits, certainty)
    for threshold in spaced_thresholds(11, rule.lowest):
        answers = early_exit(model, *batch, threshold, rule, batch_size)
        swept = exits_taken(confidence, threshold, rule.lowest)
        assert answers.exits.tolist() == swept.tolist()
        assert answers.labels.tolist() == logits.argmax(-1).gather(0, swept[None])[0].tolist()
        of_the_exit = logits[swept, torch.arange(16)]
        torch.testing.assert_close(answers.logits, of_the_exit, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(answers.confidence, confidence[swept, torch.arange(16)], atol=1e-4, rtol=1e-4)
        assert answers.labels.tolist() == answers.logits.argmax(-1).tolist()
    assert swept.tolist() == [2] * 16
    assert full_depth(model, *batch).tolist() == logits[-1].argmax(-1).tolist()


@pytest.mark.parametrize("strategy", EXIT_STRATEGIES)
@pytest.mark.parametrize("method", ["ee", "mm", "branch"])
def test_bfloat16_differs_only_where_the_decision_is_close(tmp_path, model_type, method, strategy):
    model = undecided_model(write_model(tmp_path, model_type), method, strategy=strategy)
    batch = random_batch(7, batch=64)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits, certainty = all_exits(model, batch)
        logits = logits.float()
        rule = ExitRule(2, ranges=None if certainty is None else torch.tensor([[0.0, 1.0]] * 3))
        confidence = rule.confidences(logits, certainty)
        for threshold in spaced_thresholds(11, rule.lowest):
            labels, exits, *_ = early_exit(model, *batch, threshold, rule)
            swept = exits_taken(confidence, threshold, rule.lowest)
            for row in range(64):
                k = min(int(exits[row]), int(swept[row]))
                p = logits[:, row].softmax(-1)
                if exits[row] != swept[row]:
                    assert abs(float(confidence[k, row]) - threshold) < 0.01
                elif labels[row] != logits[k, row].argmax():
                    assert abs(p[k, 0] - p[k, 1]) < 0.01


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch_size", [4, 16])
def test_who_leaves_is_not_computed_further_and_the_rest_fills_batches(tmp_path, model_type, method, batch_size):
    model = undecided_model(write_model(tmp_path, model_type), method)
    batch = random_batch(3, batch=16)
    seen = []  # how many instances, and how many tokens of each, go through which layer's feed-forward block
    for name, module in model.named_modules():
        if name.endswith(".output"):
            kind = "branch" if name.startswith("branches") else "trunk"
            module.register_forward_pre_hook(lambda _, x, kind=kind: seen.append((kind, *x[0].shape[:2])))
    exits = early_exit(model, *batch, 0.75, batch_size=batch_size).exits
    order = batch[1].sum(1).argsort(descending=True, stable=True)
    expected = []
    for k, layers in enumerate((1, 2, 4) if method == "mm" else (1, 1, 2)):
        left = order[exits[order] >= k]
        reader = "branch" if method == "branch" and k < 2 else "trunk"
        go_on = []
        for group in left.split(batch_size) if len(left) else ():
            T = int(batch[1][group[0]].sum())
            expected += [("trunk", len(group), T)] * (layers - 1)
            expected += [(reader, len(group), 1)]  # the exit reads the first token
            stay = int((exits[group] > k).sum())
            if method != "mm" and k < 2 and stay:
                go_on.append(("trunk", stay, T))
        expected += go_on  # once all groups have decided
    assert len(exits.unique()) > 1
    assert seen == expected
    seen.clear()
    early_exit(model, *batch, 0.5, batch_size=16)
    assert [call[1:] for call in seen] == [(16, 1)]  # all left after layer 1
    seen.clear()
    early_exit(model, *batch, 1.0, batch_size=16)
    assert len(seen) == (7 if method == "mm" else 4)  # nothing but the last exit is asked, and MM's models
    assert ("branch", 16, 1) not in seen


def test_nothing_in_nothing_out(tmp_path):
    batch = tuple(tensor[:0] for tensor in random_batch())
    answers = early_exit(undecided_model(write_model(tmp_path, "bert"), "sweet"), *batch, 0.75)
    assert [tuple(part.shape) for part in answers] == [(0,), (0,), (0, 2), (0,)]


@pytest.mark.parametrize("wrong", [{"temperatures": torch.ones(2)}, {"ranges": torch.ones(2, 2)}])
@pytest.mark.parametrize("threshold", [0.75, 1.0])
def test_a_rule_of_another_model_is_refused(tmp_path, wrong, threshold):
    model = undecided_model(write_model(tmp_path, "bert"), "sweet")
    with pytest.raises(ValueError, match=r"(temperatures|ranges) are of 2 exits, and must be of 3"):
        early_exit(model, *random_batch(), threshold, ExitRule(2, **wrong))


def test_the_wall_clock_is_that_of_all_batches_and_latency_that_of_all_lengths(tmp_path, monkeypatch):
    folder, clock, calls = write_model(tmp_path, "bert"), [0.0], []
    examples = TokenizedExamples(load_tokenizer(folder, 60, 32), load_examples("toy", "dev", Path()), np.arange(40))
    examples.ids = [np.full_like(ids, row) for row, ids in enumerate(examples.ids)]  # tell which row they are of

    def fake_early_exit(model, input_ids, mask, types, threshold, rule, batch_size):
        clock[0] += 3 * len(input_ids)
        calls.append((len(input_ids), batch_size, input_ids[:, 0].tolist()))
        return Answers(*torch.zeros(2, len(input_ids), dtype=torch.int64), None, None)

    def fake_full_depth(model, input_ids, mask, types):
        clock[0] += 4 * len(input_ids)

    monkeypatch.setattr(timing, "early_exit", fake_early_exit)
    monkeypatch.setattr(timing, "full_depth", fake_full_depth)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(timing, "LATENCY_INSTANCES", 10)
    model = undecided_model(folder, "sweet")
    (row,), _, _ = measure_live(model, examples, [0.7], Exits((1, 2, 4), 4, "sweet"), 8, ExitRule(2))
    assert row["wall_share"] == pytest.approx(3 / 4)
    assert row["instances_per_second"] == pytest.approx(1 / 3)
    assert row["latency_ms"]["50"] == pytest.approx(3000)
    pools = [call for call in calls if call[0] > 1]
    assert [(size, batch_size) for size, batch_size, _ in pools] == [(32, 8), (8, 8)] * 2  # four batches, then the rest
    by_length = np.argsort(-examples.lengths, kind="stable").tolist()
    assert pools[0][2] + pools[1][2] == by_length
    alone = [int(call[2][0]) for call in calls if call[0] == 1]
    assert alone[:10] == alone[10:]  # each once to warm up, and once timed
    assert examples.lengths[alone[:10]].tolist() == np.sort(examples.lengths)[::4].tolist()


def test_the_report_agrees_with_equation_1(tmp_path):
    folder = write_model(tmp_path, "bert")
    rows = np.arange(70)
    examples = TokenizedExamples(load_tokenizer(folder, 60, 32), load_examples("toy", "dev", Path()), rows)
    for method in ("ee", "mm", "branch"):
        model = undecided_model(folder, method)
        costed = Exits((1, 2, 4), 4, method)
        report, labels, exits = measure_live(model, examples, [0.5, 0.7, 1.0], costed, 16, ExitRule(2))
        for n, row in enumerate(report):
            assert row["layer_share"] == pytest.approx(
                np.array(costed.costs(row["threshold"]))[exits[n].numpy()].mean()
            )
            assert row["wall_share"] > 0
            assert row["instances_per_second"] > 0
            assert 0 < row["latency_ms"]["50"] <= row["latency_ms"]["90"] <= row["latency_ms"]["99"]
        with torch.no_grad():
            logits = torch.cat([model(*examples.batch(rows[i : i + 1]).inputs) for i in rows], dim=1)
        assert labels[-1].tolist() == logits[-1].argmax(-1).tolist()  # in the order of the examples
        assert exits[1].tolist() == exits_taken(ExitRule(2).confidences(logits), 0.7, 0.5).tolist()
    assert report[-1]["layer_share"] == 1  # branches cost nothing where they are not asked
