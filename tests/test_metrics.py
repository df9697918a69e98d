"""The numbers of an evaluation, against plain loops: area under the curve, temperatures, certainties and scores."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from minisweet.base.files import InputError
from minisweet.confidence import CRITERIA, confidence, fit_temperature
from minisweet.exits import Answer
from minisweet.metrics import area_under_curve, score

POINTS = st.lists(st.tuples(st.integers(0, 48), st.floats(0, 100)), min_size=1, max_size=9, unique_by=lambda p: p[0])


@given(POINTS, st.integers(0, 9))
def test_area_is_the_mean_score_over_the_ratios(points, start):
    """From `start`, or where the curve begins, to 1, or where it ends: the mean over a fine grid."""
    ratios, scores = np.array(sorted(points)).T
    low, high = np.clip([start, 24], ratios[0], ratios[-1])
    grid = np.linspace(low, high, 1 + 100 * int(high - low))  # every ratio is on it
    heights = np.interp(grid, ratios, scores)
    expected = np.trapezoid(heights, grid) / (high - low) if high > low else heights[-1]
    area = area_under_curve((ratios / 24).tolist(), scores.tolist(), start / 24)
    assert area == pytest.approx(expected, abs=1e-6)
    assert area_under_curve((ratios / 24).tolist(), [100.0] * len(ratios), start / 24) == 100.0  # whatever is rounded


def test_learned_confidences_fill_their_range_and_are_clamped_beyond_it():
    logits, labels, fit = torch.randn(3, 2), torch.zeros(3, dtype=torch.int64), CRITERIA["lte"].fit
    answer, equal = (Answer(logits, torch.tensor(own)) for own in ([0.2, 0.3, 0.6], [0.5, 0.5, 0.5]))
    assert fit(answer, labels) == pytest.approx([0.2, 0.6])
    fitted, just_below_1 = fit(answer, labels), 1 - 2**-24  # at threshold 1 no text leaves early
    torch.testing.assert_close(confidence("lte", answer, fitted), torch.tensor([0.0, 0.25, just_below_1]))
    of_new_text = confidence("lte", Answer(logits, torch.tensor([0.1, 0.4, 0.9])), fitted)
    assert of_new_text.tolist() == pytest.approx([0.0, 0.5, just_below_1])
    assert of_new_text.max() < 1
    assert confidence("lte", equal, fit(equal, labels)).isfinite().all()  # an exit that is equally certain of all
    with pytest.raises(InputError, match="criterion: lte needs a run of train.py --exit-strategy lte"):
        fit(Answer(logits), labels)


def nll_and_prior(logits: torch.Tensor, labels: torch.Tensor, temperature: float) -> float:
    return float(F.cross_entropy(logits / temperature, labels)) + math.log(temperature) ** 2 / len(labels)


@given(st.integers(1, 60), st.integers(2, 4), st.floats(0.1, 100), st.integers(0, 10**6))
def test_no_temperature_near_the_fitted_one_is_better(N, C, scale, seed):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(scale * rng.standard_normal((N, C)))
    drawn = torch.from_numpy(rng.integers(C, size=N))
    fitted = {}
    for kind, labels in {"drawn": drawn, "right": logits.argmax(-1), "wrong": logits.argmin(-1)}.items():
        fitted[kind] = fit_temperature(logits, labels)
        best = nll_and_prior(logits, labels, fitted[kind])
        assert all(best <= nll_and_prior(logits, labels, fitted[kind] * times) for times in (0.97, 1.03))
    assert 1e-3 < fitted["right"] < 1 + 1e-9 < fitted["wrong"] < 1e3  # the prior holds both
    assert CRITERIA["confidence"].fit(Answer(logits), drawn) == [fitted["drawn"]]


def test_a_temperature_of_nothing_is_one():
    assert fit_temperature(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)) == pytest.approx(1)
    assert fit_temperature(torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])) == pytest.approx(1)  # logits that say nothing
    assert math.isfinite(fit_temperature(torch.tensor([[1e4, -1e4]] * 3), torch.ones(3, dtype=torch.int64)))


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30))
def test_matthews_correlation_follows_from_the_confusion_matrix(pairs):
    predictions, labels = np.array(pairs).T
    counts = np.array([[pairs.count((p, label)) for label in (0, 1)] for p in (0, 1)])
    spread = np.prod([*counts.sum(0), *counts.sum(1)]) ** 0.5
    expected = 100 * np.linalg.det(counts) / spread if spread else 0
    assert score(predictions, labels, "matthews") == pytest.approx(expected, abs=1e-9)
    accuracies = score(np.stack([predictions, labels]), labels, "accuracy")
    assert accuracies == pytest.approx([100 * np.mean(predictions == labels), 100])
