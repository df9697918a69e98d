"""Exit decisions, costs and the curve."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minisweet import MultiExitModel, build_multi_model, load_encoder
from minisweet.adaptive import (
    area_under_curve,
    certainty_ranges,
    confidences,
    exit_costs,
    exits_taken,
    learned_confidences,
    leaves,
    spaced_thresholds,
)
from minisweet.exits import EXIT_STRATEGIES
from tests.conftest import random_batch, write_model


def test_exit_costs_are_those_of_equation_1():
    assert exit_costs((1, 4, 6, 12), 12, "sweet") == [1 / 12, 4 / 12, 6 / 12, 1.0]
    assert exit_costs((1, 4, 6, 12), 12, "mm") == pytest.approx([1 / 12, 5 / 12, 11 / 12, 23 / 12])
    assert exit_costs((1, 3), 6, "ee") == [1 / 6, 0.5]  # of the backbone's depth, not of the last exit's


def test_thresholds_span_chance_to_certainty():
    assert spaced_thresholds(11, 1 / 2)[::5] == pytest.approx([0.5, 0.75, 1.0])
    assert spaced_thresholds(3, 1 / 3) == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_the_first_confident_exit_is_taken():
    logits = torch.tensor([[0.60, 0.40], [0.20, 0.80], [0.99, 0.01]]).log()[:, None]  # (K=3, N=1, C=2)
    exits = [exits_taken(confidences(logits), t, 0.5).item() for t in (0.5, 0.55, 0.601, 0.79, 0.9, 0.98, 0.999, 1.0)]
    assert exits == [0, 0, 1, 1, 2, 2, 2, 2]


@given(st.integers(2, 5), st.integers(0, 10**6))
def test_the_ends_hold_whatever_rounding_does(num_labels, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 6, num_labels, generator=generator)
    logits[:, 0] = 7.3  # all equal: a confidence that may round below 1/C
    logits[:, 1] *= 1e4  # certain: a confidence that rounds to 1
    lowest, *_, highest = spaced_thresholds(11, 1 / num_labels)
    assert exits_taken(confidences(logits), 1 / num_labels, lowest).tolist() == [0] * 6
    assert exits_taken(confidences(logits), lowest, lowest).tolist() == [0] * 6
    assert exits_taken(confidences(logits), highest, lowest).tolist() == [2] * 6
    assert confidences(logits)[:, 1].eq(1).any()


def test_a_confidence_that_equals_the_threshold_leaves():
    assert leaves(torch.tensor([0.7499999, 0.75, 0.7500001]), 0.75, 0.5).tolist() == [False, True, True]


def test_area_is_the_mean_score_over_the_ratios():
    assert area_under_curve([0.25, 1.0], [60, 80]) == pytest.approx(70)
    assert area_under_curve([0.25, 0.5, 1.0], [60, 80, 80]) == pytest.approx((70 * 0.25 + 80 * 0.5) / 0.75)
    assert area_under_curve([0.5, 1.5], [60, 80]) == pytest.approx(65)  # MM: cut at 1, where the score is 70
    assert area_under_curve([0.25, 0.5], [60, 80]) == pytest.approx(70)  # ends early: as far as it goes
    assert area_under_curve([0.25, 0.25, 1.0], [60, 60, 80]) == pytest.approx(70)
    assert area_under_curve([1.0, 1.0], [50, 50]) == 50


def one_at_a_time(model, batch, threshold, ranges=None):
    """Early exit as the paper tells it: one instance, one exit after the other, until one is confident."""
    decisions = []
    for row in range(len(batch[0])):
        length = int(batch[1][row].sum())
        instance = tuple(x[row : row + 1, :length] for x in batch)
        for k, (logits, certainty) in enumerate(model.segments(*instance)):  # noqa: B007, k is read after the loop
            if ranges is None:
                if leaves(logits.softmax(-1).max(-1).values, threshold, 1 / logits.shape[-1]):
                    break
            else:
                low, high = ranges[k].tolist()
                if threshold == 0 or (threshold < 1 and (certainty.item() - low) / (high - low) >= threshold):
                    break
        decisions.append((k, logits.argmax(-1).item()))
    return decisions


@settings(max_examples=12, deadline=None)
@given(
    model_type=st.sampled_from(["bert", "deberta"]),
    method=st.sampled_from(["sweet", "ee", "mm"]),
    num_labels=st.integers(2, 3),
    seed=st.integers(0, 10**6),
    strategy=st.sampled_from(EXIT_STRATEGIES),
)
def test_the_sweep_decides_as_one_instance_at_a_time(tmp_path_factory, model_type, method, num_labels, seed, strategy):
    folder = write_model(tmp_path_factory.mktemp("sweep"), model_type)
    torch.manual_seed(seed)
    if method == "mm":
        model = build_multi_model(folder, (1, 2, 4), num_labels, strategy).eval()
    else:
        model = MultiExitModel(load_encoder(folder), (1, 2, 4), num_labels, method, strategy).eval()
    for name, parameter in model.named_parameters():
        if "classifier" in name or "lte" in name:
            torch.nn.init.normal_(parameter)
    batch = random_batch(seed, batch=12)
    ranges, lowest = None, 1 / num_labels
    with torch.no_grad():
        logits = model(*batch)
        confidence = confidences(logits)
        if strategy == "lte":
            certainty = torch.stack([certainty for _, certainty in model.segments(*batch)])
            ranges, lowest = certainty_ranges(certainty), 0.0
            confidence = learned_confidences(certainty, ranges)
        for threshold in spaced_thresholds(11, lowest):
            taken = exits_taken(confidence, threshold, lowest)
            labels = logits.argmax(-1).gather(0, taken[None])[0]
            expected = one_at_a_time(model, batch, threshold, ranges)
            assert list(zip(taken.tolist(), labels.tolist(), strict=True)) == expected
    if num_labels == 2:
        taken = [exits_taken(confidences(logits), t, 0.5).numpy() for t in spaced_thresholds(11, 1 / 2)]
        assert len(np.unique(taken)) > 1


def test_learned_confidences_fill_their_range_and_are_clamped_beyond_it():
    certainty = torch.tensor([[0.2, 0.3, 0.6], [0.5, 0.5, 0.5]])
    ranges = certainty_ranges(certainty)
    torch.testing.assert_close(ranges, torch.tensor([[0.2, 0.6], [0.5, 0.5]]))
    torch.testing.assert_close(learned_confidences(certainty, ranges)[0], torch.tensor([0.0, 0.25, 1.0]))
    torch.testing.assert_close(
        learned_confidences(torch.tensor([0.1, 0.4, 0.9]), ranges[0]), torch.tensor([0.0, 0.5, 1.0])
    )
    confidence = learned_confidences(certainty, ranges)
    assert confidence.isfinite().all()  # also of an exit that is equally certain of all
    assert exits_taken(confidence, 0.0, 0.0).tolist() == [0, 0, 0]
    assert exits_taken(confidence, 0.25, 0.0).tolist() == [1, 0, 0]
    assert exits_taken(confidence, 1.0, 0.0).tolist() == [1, 1, 1]
