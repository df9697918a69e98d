"""Of an evaluation: the area under the curve, temperatures, ranges of certainty and scores, against plain loops."""

import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from minisweet.calibration import PULL, fit_answer, fit_rule, fit_temperature
from minisweet.metrics import area_under_curve, classification_report, score
from minisweet.outputs import Outputs

POINTS = st.lists(st.tuples(st.integers(0, 48), st.floats(0, 100)), min_size=1, max_size=9, unique_by=lambda p: p[0])


@given(POINTS, st.integers(0, 9), st.randoms())
def test_area_is_the_mean_score_over_the_ratios(points, start, random):
    """From `start`, or where the curve begins, to 1, or where it ends: the mean over a fine grid; in any order."""
    ratios, scores = np.array(sorted(points)).T
    low, high = np.clip([start, 24], ratios[0], ratios[-1])
    grid = np.linspace(low, high, 1 + 100 * int(high - low))  # every ratio is on it
    heights = np.interp(grid, ratios, scores)
    expected = np.trapezoid(heights, grid) / (high - low) if high > low else heights[-1]
    random.shuffle(points)  # branches: just below threshold 1 it costs more than at it
    ratios, scores = np.array(points).T
    area = area_under_curve((ratios / 24).tolist(), scores.tolist(), start / 24)
    assert area == pytest.approx(expected, abs=1e-6)
    assert area_under_curve((ratios / 24).tolist(), [100.0] * len(ratios), start / 24) == 100.0  # whatever is rounded


def test_learned_confidences_fill_their_range_and_are_clamped_beyond_it():
    certainty = torch.tensor([[0.2, 0.3, 0.6], [0.5, 0.5, 0.5]])
    logits = torch.zeros(2, 3, 2)
    rule = fit_rule(Outputs(logits, certainty, *[None] * 4))
    torch.testing.assert_close(rule.ranges, torch.tensor([[0.2, 0.6], [0.5, 0.5]]))
    assert rule.temperatures.tolist() == [1, 1]
    confidence = rule.confidences(logits, certainty)
    torch.testing.assert_close(confidence[0], torch.tensor([0.0, 0.25, 1.0]))
    of_new_text = rule.confidence(0, logits[0], torch.tensor([0.1, 0.4, 0.9]))
    torch.testing.assert_close(of_new_text, torch.tensor([0.0, 0.5, 1.0]))
    assert confidence.isfinite().all()  # also of an exit that is equally certain of all


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


def test_a_temperature_of_nothing_is_one():
    assert fit_temperature(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)) == pytest.approx(1)
    assert fit_temperature(torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])) == pytest.approx(1)  # logits that say nothing
    assert math.isfinite(fit_temperature(torch.tensor([[1e4, -1e4]] * 3), torch.ones(3, dtype=torch.int64)))


def drawn_labels(logits: torch.Tensor, seed: int) -> torch.Tensor:
    """Labels (N,) that are drawn by the probabilities of logits (N, C)."""
    return (logits + torch.from_numpy(np.random.default_rng(seed).gumbel(size=logits.shape))).argmax(-1)


def random_logits(*shape: int) -> torch.Tensor:
    return 3 * torch.from_numpy(np.random.default_rng(0).standard_normal(shape)).float()  # the same in every version


def test_a_rule_has_the_right_temperature_for_each_exit():
    logits = random_logits(4000, 3)
    labels, logits = drawn_labels(logits / 2, 0), torch.stack([logits * 0.3, logits])  # so that 2 is the right one
    outputs = Outputs(logits, None, labels, torch.arange(4000), "accuracy", None)
    assert fit_rule(outputs).temperatures.tolist() == pytest.approx([0.6, 2.0], rel=0.1)
    rule = fit_rule(outputs._replace(labels=labels * 0 - 1, metric="agreement"))  # which tells nothing of the last exit
    assert rule.temperatures.tolist() == [pytest.approx(fit_temperature(logits[0], logits[1].argmax(-1))), 1.0]


@given(st.integers(10, 60), st.integers(2, 4), st.floats(0.3, 3), st.floats(-1, 1), st.integers(0, 10**6))
def test_an_answer_with_exit_0_is_fitted_to_the_minimum(N, C, scale, weight, seed):
    rng = np.random.default_rng(seed)
    logits, first = torch.from_numpy(rng.standard_normal((2, N, C)) * np.array([scale, 2])[:, None, None])
    labels = drawn_labels(logits / scale + weight * first, seed)
    T, w = fit_answer(logits, first, labels)
    near, far = np.linspace(-0.02, 0.02, 9), np.linspace(0, 3, 31)
    pairs = [(1 / T, w), *product(1 / T + near, w + near), *product(far, far - 1.5)]
    inverse, weights = torch.tensor(pairs)[:, :, None, None].unbind(1)
    said = (inverse * logits + weights * first).log_softmax(-1)[:, torch.arange(N), labels].mean(1)
    found = -said + ((inverse - 1) ** 2 + PULL * weights**2)[:, 0, 0] / N
    assert found[0] <= found.min() + 1e-7 or T > 999  # which is as far as it goes


def test_few_texts_choose_little_of_the_weight():
    logits, first = random_logits(2, 4000, 3) * torch.tensor([1, 1 / 3])[:, None, None]
    labels, means = drawn_labels(logits / 2 + first, 1), []
    assert fit_answer(logits, first, labels) == pytest.approx((2, 1), rel=0.1)
    for N in (2, 10, 50, 200):
        some = (slice(n, n + N) for n in range(0, 20 * N, N))
        means.append(np.mean([fit_answer(logits[rows], first[rows], labels[rows])[1] for rows in some]))
    assert 0 < means[0] < 0.15 < means[1] < 0.5 < means[2] < 0.85 < means[3] < 1


def test_the_last_exit_is_fitted_to_labels_first_and_earlier_ones_then_to_its_answers():
    logits, said = random_logits(3, 600, 3), torch.arange(600) < 300
    labels = drawn_labels(logits[2] / 2 + logits[0] / 2, 2).where(said, -1)
    rule = fit_rule(Outputs(logits, None, labels, torch.arange(600), "accuracy", None), combine=True)
    of_first = logits[0] / fit_temperature(logits[0, said], labels[said])
    T, w = fit_answer(logits[2, said], of_first[said], labels[said])
    full = logits[2] / T + w * of_first
    first, middle, last = rule.all_calibrated(logits)
    targets = labels.where(said, full.argmax(-1))
    torch.testing.assert_close(last, full)
    torch.testing.assert_close(first, logits[0] / fit_temperature(logits[0], targets))
    T, w = fit_answer(logits[1], first, targets)
    torch.testing.assert_close(middle, logits[1] / T + w * first)
    rule = fit_rule(Outputs(logits, None, labels * 0 - 1, None, "agreement", None), combine=True)
    assert (rule.temperatures[2], rule.weights[2], rule.weights[1] != 0) == (1, 0, True)  # no label, no say there


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30))
def test_matthews_correlation_is_the_correlation_of_two_vectors(pairs):
    predictions, labels = np.array(pairs).T
    spread = predictions.std() * labels.std()
    expected = 100 * ((predictions * labels).mean() - predictions.mean() * labels.mean()) / spread if spread else 0
    assert score(predictions, labels, "matthews") == pytest.approx(expected, abs=1e-9)
    accuracies = score(np.stack([predictions, labels]), labels, "accuracy")
    assert accuracies == pytest.approx([100 * np.mean(predictions == labels), 100])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_the_report_of_each_class_is_that_of_plain_loops(pairs):
    predictions, labels = np.array(pairs).T
    report = classification_report(predictions, labels, 5)
    for c in range(5):
        right = sum(p == t == c for p, t in pairs)
        predicted, support = int((predictions == c).sum()), int((labels == c).sum())
        assert report["support"][c] == support
        assert report["precision"][c] == pytest.approx(100 * right / predicted if predicted else 0)
        assert report["recall"][c] == pytest.approx(100 * right / support if support else 0)
        assert report["f1"][c] == pytest.approx(200 * right / (predicted + support) if predicted + support else 0)
