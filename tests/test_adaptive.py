"""Exit decisions, costs, the curve, temperatures, ECE and NLL; and scores, against plain loops."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minisweet.adaptive import ExitRule, Exits, exits_taken, spaced_thresholds
from minisweet.evaluation.answers import AnsweredRows
from minisweet.evaluation.calibration import expected_calibration_error, fit_temperature, negative_log_likelihood
from minisweet.evaluation.metrics import area_under_curve, classification_report, score
from minisweet.methods import METHODS


@given(st.sets(st.integers(0, 8)), st.integers(1, 9), st.sampled_from([*METHODS]))
def test_exit_costs_are_those_of_equation_1(others, last, method):
    """The share of the layers that have run when an exit answers. The last exit may stand before the last layer."""
    layers, depth = [*sorted(n for n in others if n < last), last], 9
    for threshold, is_asked in ((0.0, True), (0.999, True), (0.99999998, False), (1.0, False)):  # 1, in float32
        run, branches = 0.0, 0
        for n, cost in zip(layers, Exits(layers, depth, method).costs(threshold), strict=True):
            run = run + n if method == "mm" else n
            assert cost == pytest.approx((run + (branches / 6 if method == "branch" and is_asked else 0)) / depth)
            branches += n > 0  # exit 0 runs no layer, and is no branch


@given(st.integers(2, 5), st.integers(0, 10**6))
def test_the_ends_hold_whatever_rounding_does(num_labels, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 6, num_labels, generator=generator)
    logits[:, 0] = 7.3  # all equal: a confidence that may round below 1/C
    logits[:, 1] *= 1e4  # certain: a confidence that rounds to 1
    confidence = ExitRule(num_labels).confidences(logits)
    lowest, *_, highest = spaced_thresholds(11, 1 / num_labels)
    for threshold in (0.0, 1 / num_labels, lowest, float(np.float32(lowest))):
        assert exits_taken(confidence, threshold, lowest).tolist() == [0] * 6
    for threshold in (highest, 0.99999998, 1.5):
        assert exits_taken(confidence, threshold, lowest).tolist() == [2] * 6
    assert confidence[:, 1].eq(1).any()


@given(st.sampled_from([0.5, 0.625, 0.75, 0.875, 1.0]), st.integers(0, 10**6))
def test_an_instance_takes_the_first_exit_that_is_confident_or_the_last(threshold, seed):
    confidence = torch.randint(4, 9, (3, 6), generator=torch.Generator().manual_seed(seed)) / 8  # often the threshold
    for sure, k in zip(confidence.T, exits_taken(confidence, threshold, 0.5), strict=True):
        is_enough = [threshold == 0.5 or (threshold < 1 and value >= threshold) for value in sure[:2]]
        assert k == (*is_enough, True).index(True)


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
    rule = AnsweredRows(logits, certainty, *[None] * 4).fit_rule()
    torch.testing.assert_close(rule.ranges, torch.tensor([[0.2, 0.6], [0.5, 0.5]]))
    assert rule.temperatures.tolist() == [1, 1]
    confidence = rule.confidences(logits, certainty)
    torch.testing.assert_close(confidence[0], torch.tensor([0.0, 0.25, 1.0]))
    of_new_text = rule.confidence(0, logits[0], torch.tensor([0.1, 0.4, 0.9]))
    torch.testing.assert_close(of_new_text, torch.tensor([0.0, 0.5, 1.0]))
    assert confidence.isfinite().all()  # also of an exit that is equally certain of all


def test_a_rule_scales_each_exit_by_its_own_temperature():
    logits = torch.randn(3, 5, 4)
    for rule in (ExitRule(4), ExitRule(4, torch.rand(3) + 0.5)):
        scaled = logits if rule.temperatures is None else logits / rule.temperatures[:, None, None]
        expected = scaled.softmax(-1).amax(-1)
        torch.testing.assert_close(rule.confidences(logits), expected)
        torch.testing.assert_close(rule.confidence(2, logits[2, 1:3], None), expected[2, 1:3])
        assert rule.lowest == rule.kept([2]).lowest == 1 / 4
        torch.testing.assert_close(rule.kept([0, 2]).confidences(logits[[0, 2]]), expected[[0, 2]])
    assert ExitRule(2).confidences(torch.randn(1, 3, 2).half()).dtype == torch.float32
    assert ExitRule(2).confidences(torch.randn(101, 3, 2)).shape == (101, 3)  # of any number of exits


def nll_and_prior(logits: torch.Tensor, labels: torch.Tensor, temperature: float) -> float:
    return negative_log_likelihood(logits / temperature, labels) + math.log(temperature) ** 2 / len(labels)


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


def test_a_rule_has_the_right_temperature_for_each_exit_which_lowers_ece():
    rng = np.random.default_rng(0)  # whose draws are the same in every version
    logits = 3 * torch.from_numpy(rng.standard_normal((4000, 3))).float()
    labels = (logits / 2 + torch.from_numpy(rng.gumbel(size=(4000, 3)))).argmax(-1)  # so that 2 is the right one
    logits = torch.stack([logits * 0.3, logits])

    def fit_rule(labels: torch.Tensor, metric: str = "accuracy") -> ExitRule:
        return AnsweredRows(logits, None, labels, None, metric, None).fit_rule()

    fitted = fit_rule(labels).temperatures.tolist()
    assert fitted == pytest.approx([0.6, 2.0], rel=0.1)
    before, after = (expected_calibration_error(logits[1] / T, labels) for T in (1, fitted[1]))
    assert after < before / 2
    own = logits[-1].argmax(-1)  # without labels the last exit is left as it is
    rule = fit_rule(own, "agreement")
    assert rule.temperatures.tolist() == [pytest.approx(fit_temperature(logits[0], own)), 1.0]
    assert 0.001 < fit_rule(own).temperatures[-1] < 1  # labels that happen to be those: the prior holds it


def test_ece_of_a_hand_computed_case():
    # Confidence 0.9 for four, of which three are right, and 0.6 for two, of which none is.
    logits = torch.tensor([[0.9, 0.1]] * 4 + [[0.6, 0.4]] * 2).log()
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    assert expected_calibration_error(logits, labels) == pytest.approx((4 * 0.15 + 2 * 0.6) / 6)
    # 15 bins: 0.65 lies between 9/15 and 10/15, and 0.68 does not; 0.61 does.
    one_right = [torch.tensor([[p, 1 - p], [q, 1 - q]]).log() for p, q in ((0.65, 0.68), (0.61, 0.65))]
    apart, together = (expected_calibration_error(x, torch.tensor([0, 1])) for x in one_right)
    assert apart == pytest.approx((0.35 + 0.68) / 2)
    assert together == pytest.approx((0.61 + 0.65 - 1) / 2)
    expected = -(3 * math.log(0.9) + math.log(0.1) + 2 * math.log(0.4)) / 6
    assert negative_log_likelihood(logits, labels) == pytest.approx(expected)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30))
def test_matthews_correlation_is_the_correlation_of_two_vectors(pairs):
    predictions, labels = np.array(pairs).T
    spread = predictions.std() * labels.std()
    expected = 100 * ((predictions * labels).mean() - predictions.mean() * labels.mean()) / spread if spread else 0
    assert score(predictions, labels, "matthews") == pytest.approx(expected, abs=1e-9)
    accuracies = score(np.stack([predictions, labels]), labels, "accuracy")
    assert accuracies == pytest.approx([100 * np.mean(predictions == labels), 100])


@pytest.mark.parametrize("metric", ["accuracy", "matthews", "agreement"])
def test_a_weight_of_three_is_three_rows(metric):
    rng = np.random.default_rng(0)
    predictions, labels = rng.integers(2, size=(4, 50)), rng.integers(2, size=50)
    weights = rng.integers(4, size=(6, 50)).astype(np.float32)
    found = score(predictions, labels, metric, weights)
    for r, times in enumerate(weights.astype(int)):
        repeated = score(predictions.repeat(times, axis=1), labels.repeat(times), metric)
        assert found[:, r] == pytest.approx(repeated)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_the_report_of_each_class_is_that_of_plain_loops(pairs):
    predictions, labels = np.array(pairs).T
    report, f1 = classification_report(predictions, labels, 5), []
    confusions = {(label, prediction): count for label, prediction, count in report["confusions"]}
    assert confusions == Counter((t, p) for p, t in pairs)
    for c in range(5):
        right = sum(p == t == c for p, t in pairs)
        predicted, support = int((predictions == c).sum()), int((labels == c).sum())
        assert report["precision"][c] == pytest.approx(100 * right / predicted if predicted else 0)
        assert report["recall"][c] == pytest.approx(100 * right / support if support else 0)
        assert (report["support"][c], confusions.get((c, c), 0)) == (support, right)
        if predicted + support:
            f1.append(200 * right / (predicted + support))
    assert report["macro_f1"] == pytest.approx(np.mean(f1))
