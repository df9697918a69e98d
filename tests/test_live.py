"""Live early exit decides as the sweep does, for both encoders and all methods."""

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minisweet import MultiExitModel, build_multi_model, live, load_encoder
from minisweet.adaptive import (
    certainty_ranges,
    confidences,
    exit_costs,
    exits_taken,
    learned_confidences,
    spaced_thresholds,
)
from minisweet.data.tasks import load_examples
from minisweet.data.text import TokenizedExamples, load_tokenizer
from minisweet.exits import EXIT_STRATEGIES
from minisweet.live import early_exit, full_depth, measure_live
from tests.conftest import random_batch, write_model


def make_model(folder, method, num_labels=2, seed=0, strategy="confidence"):
    torch.manual_seed(seed)
    if method == "mm":
        model = build_multi_model(folder, (1, 2, 4), num_labels, strategy)
    else:
        model = MultiExitModel(load_encoder(folder), (1, 2, 4), num_labels, method, strategy)
    for name, parameter in model.named_parameters():
        if "classifier" in name or "lte" in name:
            torch.nn.init.normal_(parameter)
    return model.eval()


@settings(max_examples=12, deadline=None)
@given(
    model_type=st.sampled_from(["bert", "deberta"]),
    method=st.sampled_from(["sweet", "mm"]),
    num_labels=st.integers(2, 3),
    batch_size=st.sampled_from([3, 16]),
    per_row=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_live_decides_as_the_sweep(tmp_path_factory, model_type, method, num_labels, batch_size, per_row, seed):
    model = make_model(write_model(tmp_path_factory.mktemp("live"), model_type), method, num_labels, seed)
    batch = random_batch(seed, batch=16)
    with torch.no_grad():
        logits = model(*batch)
    temperatures = torch.rand(3, 16 if per_row else 1) + 0.5
    for threshold in spaced_thresholds(11, 1 / num_labels):
        labels, exits = early_exit(model, *batch, threshold, temperatures, batch_size=batch_size)
        swept = exits_taken(confidences(logits, temperatures), threshold, 1 / num_labels)
        assert exits.tolist() == swept.tolist()
        assert labels.tolist() == logits.argmax(-1).gather(0, swept[None])[0].tolist()
    assert full_depth(model, *batch).tolist() == logits[-1].argmax(-1).tolist()


@pytest.mark.parametrize("strategy", EXIT_STRATEGIES)
@pytest.mark.parametrize("method", ["ee", "mm"])
def test_bfloat16_differs_only_where_the_decision_is_close(tmp_path, model_type, method, strategy):
    model = make_model(write_model(tmp_path, model_type), method, strategy=strategy)
    batch = random_batch(7, batch=64)
    lowest = 1 / 2 if strategy == "confidence" else 0.0
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        exits_of_all = list(model.segments(*batch))
        logits = torch.stack([logits for logits, _ in exits_of_all]).float()
        confidence = confidences(logits)
        if strategy == "lte":
            confidence = torch.stack([certainty for _, certainty in exits_of_all])
        for threshold in spaced_thresholds(11, lowest):
            labels, exits = early_exit(model, *batch, threshold)
            swept = exits_taken(confidence, threshold, lowest)
            for row in range(64):
                k = min(int(exits[row]), int(swept[row]))
                p = logits[:, row].softmax(-1)
                if exits[row] != swept[row]:
                    assert abs(float(confidence[k, row]) - threshold) < 0.01
                elif labels[row] != logits[k, row].argmax():
                    assert abs(p[k, 0] - p[k, 1]) < 0.01


@settings(max_examples=12, deadline=None)
@given(
    model_type=st.sampled_from(["bert", "deberta"]), method=st.sampled_from(["ee", "mm"]), seed=st.integers(0, 10**6)
)
def test_live_decides_as_the_sweep_when_learning_to_exit(tmp_path_factory, model_type, method, seed):
    folder = write_model(tmp_path_factory.mktemp("live"), model_type)
    model = make_model(folder, method, 3, seed, "lte")
    batch = random_batch(seed, batch=16)
    with torch.no_grad():
        logits, certainty = (torch.stack(part) for part in zip(*model.segments(*batch), strict=True))
    ranges = certainty_ranges(certainty)
    swept = [exits_taken(learned_confidences(certainty, ranges), t, 0.0).tolist() for t in spaced_thresholds(11, 0)]
    live = [early_exit(model, *batch, t, ranges=ranges) for t in spaced_thresholds(11, 0)]
    assert [exits.tolist() for _, exits in live] == swept
    for (labels, _), taken in zip(live, swept, strict=True):
        assert labels.tolist() == logits.argmax(-1).gather(0, torch.tensor(taken)[None])[0].tolist()
    assert (swept[0], swept[-1]) == ([0] * 16, [2] * 16)


@pytest.mark.parametrize("method", ["sweet", "mm"])
@pytest.mark.parametrize("batch_size", [4, 16])
def test_who_leaves_is_not_computed_further_and_the_rest_fills_batches(tmp_path, model_type, method, batch_size):
    model = make_model(write_model(tmp_path, model_type), method)
    batch = random_batch(3, batch=16)
    seen = []  # how many instances, and how many tokens of each, go through a layer's feed-forward block
    for part in model if method == "mm" else [model]:
        for layer in part.encoder.layers:
            layer.output.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[:2])))
    _, exits = early_exit(model, *batch, 0.75, batch_size=batch_size)
    order = batch[1].sum(1).argsort(descending=True, stable=True)
    expected = []
    for k, layers in enumerate((1, 2, 4) if method == "mm" else (1, 1, 2)):
        left = order[exits[order] >= k]
        go_on = []
        for group in left.split(batch_size) if len(left) else ():
            T = int(batch[1][group[0]].sum())
            expected += [(len(group), T)] * (layers - 1) + [(len(group), 1)]  # the exit reads the first token
            stay = int((exits[group] > k).sum())
            if method == "sweet" and stay:
                go_on.append((stay, T - 1))
        expected += go_on  # once all groups have decided
    assert len(exits.unique()) > 1
    assert seen == expected
    seen.clear()
    early_exit(model, *batch, 0.5, batch_size=16)
    assert seen == [(16, 1)]  # all left after layer 1


def test_nothing_in_nothing_out(tmp_path):
    batch = tuple(tensor[:0] for tensor in random_batch())
    labels, exits = early_exit(make_model(write_model(tmp_path, "bert"), "sweet"), *batch, 0.75)
    assert (labels.tolist(), exits.tolist()) == ([], [])


@pytest.mark.parametrize(
    "wrong", [{"temperatures": torch.ones(3)}, {"temperatures": torch.ones(2, 1)}, {"ranges": torch.ones(2, 2)}]
)
def test_settings_of_another_model_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="temperatures and ranges are .* and must be"):
        early_exit(make_model(write_model(tmp_path, "bert"), "sweet"), *random_batch(), 0.75, **wrong)


@pytest.mark.parametrize("method", ["sweet", "mm"])
def test_what_nothing_will_finish_is_not_held(tmp_path, monkeypatch, model_type, method):
    """MM's models, and any model's last exit, keep no group's queries, keys and values for later."""
    model = make_model(write_model(tmp_path, model_type), method)
    encoder_class = type((model[0] if method == "mm" else model).encoder)
    run, alive = encoder_class.run_exit_layer, []

    def watched(*args):
        first, finish = run(*args)
        alive.append(weakref.ref(finish))
        alive_now.append(sum(ref() is not None for ref in alive))
        return first, finish

    alive_now = []
    monkeypatch.setattr(encoder_class, "run_exit_layer", watched)
    early_exit(model, *random_batch(3, batch=16), 1.0, batch_size=4)  # four groups at each of three exits
    assert alive_now[-1] <= 2 < len(alive_now) == 12
    assert max(alive_now) <= (2 if method == "mm" else 5)


def test_the_wall_clock_is_that_of_all_batches(tmp_path, monkeypatch):
    folder, clock, calls = write_model(tmp_path, "bert"), [0.0], []
    examples = TokenizedExamples(load_tokenizer(folder, 60, 32), load_examples("toy", "dev", Path()), np.arange(40))
    temperatures = torch.arange(40.0).expand(3, 40)  # tell which row they are of

    def fake_early_exit(model, input_ids, mask, types, threshold, own, ranges, batch_size):
        clock[0] += 3 * len(input_ids)
        calls.append((len(input_ids), batch_size, own[0].tolist()))
        return torch.zeros(len(input_ids)), torch.zeros(len(input_ids), dtype=torch.int64)

    def fake_full_depth(model, input_ids, mask, types):
        clock[0] += 4 * len(input_ids)

    monkeypatch.setattr(live, "early_exit", fake_early_exit)
    monkeypatch.setattr(live, "full_depth", fake_full_depth)
    monkeypatch.setattr(live.time, "perf_counter", lambda: clock[0])
    model = make_model(folder, "sweet")
    (row,), _, _ = measure_live(model, examples, [0.7], [0.25, 0.5, 1], 8, temperatures)
    assert row["wall_share"] == pytest.approx(3 / 4)
    assert row["instances_per_second"] == pytest.approx(1 / 3)
    assert row["latency_ms"]["50"] == pytest.approx(3000)
    pools = [call for call in calls if call[0] > 1]
    assert [(size, batch_size) for size, batch_size, _ in pools] == [(32, 8), (8, 8)] * 2  # four batches, then the rest
    by_length = np.argsort(-examples.lengths, kind="stable").tolist()
    assert pools[0][2] + pools[1][2] == by_length
    assert len([call for call in calls if call[0] == 1]) == 2 * 40  # each alone, once to warm up


def test_the_report_agrees_with_equation_1(tmp_path):
    folder = write_model(tmp_path, "bert")
    rows = np.arange(70)
    examples = TokenizedExamples(load_tokenizer(folder, 60, 32), load_examples("toy", "dev", Path()), rows)
    for method in ("ee", "mm"):
        model = make_model(folder, method)
        costs = np.array(exit_costs((1, 2, 4), 4, method))
        report, labels, exits = measure_live(model, examples, [0.5, 0.7, 1.0], costs, batch_size=16)
        for n, row in enumerate(report):
            assert row["layer_share"] == pytest.approx(costs[exits[n].numpy()].mean())
            assert row["wall_share"] > 0
            assert row["instances_per_second"] > 0
            assert 0 < row["latency_ms"]["50"] <= row["latency_ms"]["90"] <= row["latency_ms"]["99"]
        with torch.no_grad():
            logits = torch.cat([model(*examples.batch(rows[i : i + 1]).inputs) for i in rows], dim=1)
        assert labels[-1].tolist() == logits[-1].argmax(-1).tolist()  # in the order of the examples
        assert exits[1].tolist() == exits_taken(confidences(logits), 0.7, 0.5).tolist()
