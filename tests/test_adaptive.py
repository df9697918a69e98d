"""Exit decisions, costs and the curve."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minisweet.adaptive import (
    ExitRule,
    Exits,
    area_under_curve,
    certainty_ranges,
    exits_taken,
    leaves,
    spaced_thresholds,
)
from minisweet.branches import METHODS
from minisweet.exits import EXIT_STRATEGIES
from tests.conftest import all_exits, random_batch, undecided_model, write_model


def test_exit_costs_are_those_of_equation_1():
    assert Exits((1, 4, 6, 12), 12, "sweet").costs() == [1 / 12, 4 / 12, 6 / 12, 1.0]
    assert Exits((1, 4, 6, 12), 12, "mm").costs() == pytest.approx([1 / 12, 5 / 12, 11 / 12, 23 / 12])
    assert Exits((1, 3), 6, "ee").costs() == [1 / 6, 0.5]  # of the backbone's depth, not of the last exit's
    # A sixth of a layer for each branch that was asked in vain, but at threshold 1, where none is asked.
    branch = [1 / 6, (2 + 1 / 6) / 6, (3 + 2 / 6) / 6, (6 + 3 / 6) / 6]
    for threshold in (0.0, 0.5, 0.999):
        assert Exits((1, 2, 3, 6), 6, "branch").costs(threshold) == pytest.approx(branch)
    assert Exits((1, 2, 3, 6), 6, "branch").costs(1.0)[-1] == 1
    assert Exits((3, 6), 6, "branch").costs(0.9) == pytest.approx([3 / 6, (6 + 1 / 6) / 6])
    # Exit 0 runs no layer, and is no branch.
    assert Exits((0, 1, 4), 4, "sweet").costs() == [0, 1 / 4, 1]
    assert Exits((0, 1, 4), 4, "mm").costs() == [0, 1 / 4, 5 / 4]
    assert Exits((0, 1, 4), 4, "branch").costs() == pytest.approx([0, 1 / 4, (4 + 1 / 6) / 4])
    assert Exits((0, 4), 4, "branch").costs() == Exits((0, 4), 4, "branch").costs(1.0) == [0, 1]
    for method in ("sweet", "ee", "mm"):
        assert Exits((1, 4, 12), 12, method).costs(1.0) == Exits((1, 4, 12), 12, method).costs()


def test_thresholds_span_chance_to_certainty():
    assert spaced_thresholds(11, 1 / 2)[::5] == pytest.approx([0.5, 0.75, 1.0])
    assert spaced_thresholds(3, 1 / 3) == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_the_first_confident_exit_is_taken():
    logits = torch.tensor([[0.60, 0.40], [0.20, 0.80], [0.99, 0.01]]).log()[:, None]  # (K=3, N=1, C=2)
    exits = [
        exits_taken(ExitRule(2).confidences(logits), t, 0.5).item()
        for t in (0.5, 0.55, 0.601, 0.79, 0.9, 0.98, 0.999, 1.0)
    ]
    assert exits == [0, 0, 1, 1, 2, 2, 2, 2]


@given(st.integers(2, 5), st.integers(0, 10**6))
def test_the_ends_hold_whatever_rounding_does(num_labels, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 6, num_labels, generator=generator)
    logits[:, 0] = 7.3  # all equal: a confidence that may round below 1/C
    logits[:, 1] *= 1e4  # certain: a confidence that rounds to 1
    confidence = ExitRule(num_labels).confidences(logits)
    lowest, *_, highest = spaced_thresholds(11, 1 / num_labels)
    assert exits_taken(confidence, 1 / num_labels, lowest).tolist() == [0] * 6
    assert exits_taken(confidence, lowest, lowest).tolist() == [0] * 6
    assert exits_taken(confidence, highest, lowest).tolist() == [2] * 6
    assert confidence[:, 1].eq(1).any()


def test_a_confidence_that_equals_the_threshold_leaves():
    assert leaves(torch.tensor([0.7499999, 0.75, 0.7500001]), 0.75, 0.5).tolist() == [False, True, True]


def test_area_is_the_mean_score_over_the_ratios():
    assert area_under_curve([0.25, 1.0], [60, 80]) == pytest.approx(70)
    assert area_under_curve([0.25, 0.5, 1.0], [60, 80, 80]) == pytest.approx((70 * 0.25 + 80 * 0.5) / 0.75)
    assert area_under_curve([0.5, 1.5], [60, 80]) == pytest.approx(65)  # MM: cut at 1, where the score is 70
    assert area_under_curve([0.25, 0.5], [60, 80]) == pytest.approx(70)  # ends early: as far as it goes
    assert area_under_curve([0.25, 0.25, 1.0], [60, 60, 80]) == pytest.approx(70)
    assert area_under_curve([1.0, 1.0], [50, 50]) == 50
    # Branches: just below threshold 1 it costs more than at it.
    assert area_under_curve([0.25, 0.5, 1.08, 1.0], [60, 80, 82, 80]) == pytest.approx((70 * 0.25 + 80 * 0.5) / 0.75)
    assert area_under_curve([0.25, 0.8, 0.75], [60, 82, 80]) == pytest.approx((70 * 0.5 + 81 * 0.05) / 0.55)
    # From 1/L on, where the first exit's ratio is smaller, so that exit 0 at ratio 0 makes no other figure of it.
    assert area_under_curve([0.0, 0.5, 1.0], [60, 80, 80], 0.25) == pytest.approx((75 * 0.25 + 80 * 0.5) / 0.75)
    assert area_under_curve([0.5, 1.0], [60, 80], 0.25) == pytest.approx(70)


def one_at_a_time(model, batch, threshold, ranges=None):
    """Early exit as the paper tells it: one instance, one exit after the other, until one is confident."""
    decisions, last = [], len(model.exit_layers) - 1
    for row in range(len(batch[0])):
        length = int(batch[1][row].sum())
        instance = tuple(x[row : row + 1, :length] for x in batch)
        for k, (logits, certainty) in enumerate(model.exit_by_exit(*instance)):  # noqa: B007, k is read after the loop
            if ranges is None:
                if leaves(logits.softmax(-1).max(-1).values, threshold, 1 / logits.shape[-1]):
                    break
            elif k < last:
                low, high = ranges[k].tolist()
                if threshold == 0 or (threshold < 1 and (certainty.item() - low) / (high - low) >= threshold):
                    break
        decisions.append((k, logits.argmax(-1).item()))
    return decisions


@settings(max_examples=10, deadline=None)
@given(
    model_type=st.sampled_from(["bert", "deberta"]),
    method=st.sampled_from(list(METHODS)),
    num_labels=st.integers(2, 3),
    seed=st.integers(0, 10**6),
    strategy=st.sampled_from(EXIT_STRATEGIES),
)
def test_the_sweep_decides_as_one_instance_at_a_time(tmp_path_factory, model_type, method, num_labels, seed, strategy):
    folder = write_model(tmp_path_factory.mktemp("sweep"), model_type)
    model = undecided_model(folder, method, num_labels, seed, strategy)
    batch = random_batch(seed, batch=12)
    with torch.no_grad():
        logits, certainty = all_exits(model, batch)
        ranges = None if strategy == "confidence" else certainty_ranges(certainty, 3)
        rule = ExitRule(num_labels, ranges=ranges)
        confidence = rule.confidences(logits, certainty)
        thresholds = spaced_thresholds(11, rule.lowest)
        for threshold in thresholds:
            taken = exits_taken(confidence, threshold, rule.lowest)
            labels = logits.argmax(-1).gather(0, taken[None])[0]
            expected = one_at_a_time(model, batch, threshold, ranges)
            assert list(zip(taken.tolist(), labels.tolist(), strict=True)) == expected
    if num_labels == 2:
        taken = [exits_taken(confidence, threshold, rule.lowest).numpy() for threshold in thresholds]
        assert len(np.unique(taken)) > 1


def test_learned_confidences_fill_their_range_and_are_clamped_beyond_it():
    certainty = torch.tensor([[0.2, 0.3, 0.6], [0.5, 0.5, 0.5]])
    ranges = certainty_ranges(certainty, 2)
    torch.testing.assert_close(ranges, torch.tensor([[0.2, 0.6], [0.5, 0.5]]))
    logits, rule = torch.zeros(2, 3, 2), ExitRule(2, ranges=ranges)
    confidence = rule.confidences(logits, certainty)
    torch.testing.assert_close(confidence[0], torch.tensor([0.0, 0.25, 1.0]))
    of_new_text = rule.confidence(0, logits[0], torch.tensor([0.1, 0.4, 0.9]))
    torch.testing.assert_close(of_new_text, torch.tensor([0.0, 0.5, 1.0]))
    assert confidence.isfinite().all()  # also of an exit that is equally certain of all
    assert exits_taken(confidence, 0.0, 0.0).tolist() == [0, 0, 0]
    assert exits_taken(confidence, 0.25, 0.0).tolist() == [1, 0, 0]
    assert exits_taken(confidence, 1.0, 0.0).tolist() == [1, 1, 1]


def test_an_exit_without_certainty_has_its_highest_probability():
    certainty = torch.tensor([[0.2, 0.6], [0.3, 0.4]])  # of the first two exits of three
    ranges = certainty_ranges(certainty, 3)
    torch.testing.assert_close(ranges, torch.tensor([[0.2, 0.6], [0.3, 0.4], [0.0, 1.0]]))
    rule, logits = ExitRule(2, ranges=ranges), torch.randn(3, 2, 2)
    confidence = rule.confidences(logits, certainty)
    assert confidence[:2].tolist() == [[0, 1], [0, 1]]
    assert torch.equal(confidence[2], logits[2].softmax(-1).amax(-1))
    assert torch.equal(rule.kept([0, 2]).confidences(logits[[0, 2]], certainty[:1]), confidence[[0, 2]])


def test_a_rule_scales_each_exit_by_its_own_temperature():
    logits = torch.randn(3, 5, 4)
    for temperatures in (None, torch.rand(3) + 0.5):
        rule = ExitRule(4, temperatures)
        divisor = torch.ones(3) if temperatures is None else temperatures
        expected = (logits / divisor[:, None, None]).softmax(-1).amax(-1)
        torch.testing.assert_close(rule.confidences(logits), expected)
        torch.testing.assert_close(rule.confidence(2, logits[2, 1:3], None), expected[2, 1:3])
        assert rule.lowest == rule.kept([2]).lowest == 1 / 4
        torch.testing.assert_close(rule.kept([0, 2]).confidences(logits[[0, 2]]), expected[[0, 2]])
    halves = ExitRule(2).confidences(torch.randn(1, 3, 2).half())
    assert halves.dtype == torch.float32


def test_the_area_of_a_perfect_model_is_100_whatever_rounding_does():
    for n in range(2, 200):
        ratios = np.linspace(1 / 6, 1, n) ** 1.1
        assert area_under_curve(ratios.tolist(), [100.0] * n) == 100.0
