"""Live early exit: it decides as the sweep does, and computes nothing in vain."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minisweet.adaptive import ExitRule, exits_taken, spaced_thresholds
from minisweet.evaluation.answers import AnsweredRows
from minisweet.exits import EXIT_STRATEGIES
from minisweet.live import early_exit
from minisweet.methods import METHODS
from tests.conftest import CONFIGS, random_batch, undecided_model, write_model
from tests.test_exits import with_exit_0


@settings(max_examples=16)
@given(
    model_type=st.sampled_from([*CONFIGS]),
    method=st.sampled_from([*METHODS]),
    strategy=st.sampled_from((*EXIT_STRATEGIES, "exit 0")),
    num_labels=st.integers(2, 3),
    batch_size=st.sampled_from([3, 16]),
    seed=st.integers(0, 10**6),
)
def test_live_decides_as_the_sweep(tmp_path_factory, model_type, method, strategy, num_labels, batch_size, seed):
    folder = write_model(tmp_path_factory.mktemp("live"), model_type)
    has_exit_0, batch = strategy == "exit 0", random_batch(seed, batch=16)
    model = undecided_model(folder, method, num_labels, seed, "confidence" if has_exit_0 else strategy)
    model = with_exit_0(model) if has_exit_0 else model
    K = len(model.exit_layers)
    with torch.no_grad():
        logits, certainty = zip(*model.exit_by_exit(*batch), strict=True)
    logits, certainty = torch.stack(logits), torch.stack(certainty) if strategy == "lte" else None
    temperatures, ranges = torch.rand(K) + 0.5, None
    if strategy == "lte":
        temperatures, ranges = None, AnsweredRows(logits, certainty, *[None] * 4).fit_rule().ranges
    rule = ExitRule(num_labels, temperatures, ranges)

    confidence = rule.confidences(logits, certainty)
    for threshold in spaced_thresholds(11, rule.lowest):
        answers = early_exit(model, *batch, threshold, rule, batch_size)
        swept = exits_taken(confidence, threshold, rule.lowest)
        assert answers.exits.tolist() == swept.tolist()
        assert answers.labels.tolist() == answers.logits.argmax(-1).tolist()
        torch.testing.assert_close(answers.logits, logits[swept, torch.arange(16)], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(answers.confidence, confidence[swept, torch.arange(16)], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch_size", [4, 16])
def test_who_leaves_is_not_computed_further(tmp_path, model_type, method, batch_size):
    model, batch = undecided_model(write_model(tmp_path, model_type), method, seed=1), random_batch(3, batch=16)
    seen = Counter()  # how often which layers' feed-forward block runs for so many instances, of so many tokens each
    for name, module in model.named_modules():
        if name.endswith(".output"):
            kind = "branch" if name.startswith("branches") else "trunk"
            module.register_forward_pre_hook(lambda _, x, kind=kind: seen.update([(kind, *x[0].shape[:2])]))
    exits, lengths, expected = early_exit(model, *batch, 0.75, batch_size=batch_size).exits, batch[1].sum(1), Counter()
    steps = {"mm": (1, 2, 4), "plain": (4,)}.get(method, (1, 1, 2))  # layers that end at each exit
    for rows in lengths.argsort(descending=True, stable=True).split(batch_size):
        for k, layers in enumerate(steps):
            rows = rows[exits[rows] >= k]
            if len(rows):  # the exit's layer runs for [CLS], the others between two exits for all tokens
                expected["trunk", len(rows), int(lengths[rows].max())] += layers - 1 + (method != "mm" and k > 0)
                expected["branch" if method == "branch" and k < 2 else "trunk", len(rows), 1] += 1
    assert len(exits.unique()) > 1 or method == "plain"
    assert seen == expected
    seen.clear()
    early_exit(model, *batch, 0.5, batch_size=16)  # all leave at the first exit
    assert method == "plain" or [call[1:] for call in seen.elements()] == [(16, 1)]
    seen.clear()
    early_exit(model, *batch, 1.0, batch_size=16)  # no exit but the last is asked, and MM's models
    assert (seen.total(), seen["branch", 16, 1]) == (7 if method == "mm" else 4, 0)


def test_who_leaves_at_exit_0_is_never_embedded_and_the_others_fill_batches(tmp_path, model_type):
    model, batch = with_exit_0(undecided_model(write_model(tmp_path, model_type), "branch")), random_batch(3, batch=16)
    embedded = []
    model.encoder.word_embeddings.register_forward_pre_hook(lambda _, ids: embedded.append(len(ids[0])))
    for threshold in (0.5, 0.9, 1.0):
        embedded.clear()
        exits = early_exit(model, *batch, threshold, batch_size=5).exits
        stay = 16 if threshold == 1 else int((exits > 0).sum())
        assert embedded == [*[5] * (stay // 5), *[stay % 5] * (stay % 5 > 0)]
    assert len(early_exit(model, *(x[:0] for x in batch), 0.9).exits) == 0
    ids, filled = batch[0], (torch.ones_like(batch[0]), torch.zeros_like(batch[0]))
    assert torch.equal(early_exit(model, ids, None, None, 0.9).logits, early_exit(model, ids, *filled, 0.9).logits)
