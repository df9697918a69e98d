"""Scores against plain loops, and the intervals and bounds against what they stand for."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisweet.evaluation import metrics
from minisweet.evaluation.metrics import classification_report, score


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
    report, f1 = classification_report(predictions, labels, 5), []
    for c in range(5):
        right = sum(p == t == c for p, t in pairs)
        predicted, support = int((predictions == c).sum()), int((labels == c).sum())
        assert report["precision"][c] == pytest.approx(100 * right / predicted if predicted else 0)
        assert report["recall"][c] == pytest.approx(100 * right / support if support else 0)
        assert (report["support"][c], report["confusion_matrix"][c][c]) == (support, right)
        if predicted + support:
            f1.append(200 * right / (predicted + support))
    assert report["macro_f1"] == pytest.approx(np.mean(f1))


def paired(rows: int, lost: int, won: int) -> np.ndarray:
    """Of so many rows full depth alone has `lost` right, early exit alone `won`, and both have the others."""
    counts = np.zeros((2, 2, 2))
    counts[1, 1, 1], counts[1, 1, 0], counts[1, 0, 1] = rows - lost - won, lost, won
    return counts


def test_the_standard_error_is_that_of_draws():
    rng, truth = np.random.default_rng(0), np.array([300, 20, 30, 50, 60, 30, 60, 450]).reshape(2, 2, 2) / 1000
    for metric in ("accuracy", "matthews"):
        drawn = rng.multinomial(1000, truth.ravel(), 4000).T.reshape(2, 2, 2, -1).astype(float)
        found = metrics.standard_error(1000 * truth, lambda some, metric=metric: metrics.loss_of(some, metric))
        assert found == pytest.approx(metrics.loss_of(drawn, metric).std(), rel=0.05)


def test_the_interval_of_macro_f1_is_that_of_draws():
    rng, truth = np.random.default_rng(0), np.array([[300, 40, 10], [50, 400, 20], [20, 30, 130]])
    drawn = rng.multinomial(1000, truth.ravel() / 1000, 2000)
    values = []
    for confusion in drawn.reshape(-1, 3, 3):
        values.append(np.mean([200 * confusion[c, c] / (confusion[c].sum() + confusion[:, c].sum()) for c in range(3)]))
    low, high = metrics.macro_f1_interval(truth, 1000)
    assert (low + high) / 2 == pytest.approx(np.mean(values), abs=0.1)
    assert (high - low) / 2 == pytest.approx(1.96 * np.std(values), rel=0.05)
    wider = metrics.macro_f1_interval(truth, 250)  # as if each text stood four times
    assert wider[1] - wider[0] == pytest.approx(2 * (high - low), rel=1e-3)
    low, high = metrics.macro_f1_interval(np.diag([3, 0, 2]), 5)
    assert (low < 50, high) == (True, 100)  # of few rows nothing is known


def test_intervals_of_shares_are_wilsons_and_of_losses_bonett_and_prices():
    counts, difference = paired(100, 12, 5), 7 / 102
    error = math.sqrt((19 / 102 - difference**2) / 102)
    expected = [100 * (difference + z * error) for z in (-1.96, 1.96)]
    assert metrics.loss_interval(counts, "accuracy") == pytest.approx(expected, rel=0.01)
    low, high = metrics.loss_interval(paired(90, 0, 0), "accuracy")
    assert low == pytest.approx(-high)
    assert 2 < high < 4  # nothing is lost, and yet it is no certainty
    z, share = 1.959964, 0.88  # full depth alone has 12 right, and so early exit 88
    roots = np.roots([1 + z**2 / 100, -2 * share - z**2 / 100, share**2])  # where |p - share| is z standard errors of p
    assert metrics.score_interval(counts, "accuracy", 1) == pytest.approx(sorted(100 * roots), rel=1e-5)
    low, high = metrics.loss_interval(counts, "agreement")
    assert metrics.score_interval(counts, "agreement", 1) == pytest.approx([100 - high, 100 - low])


def test_a_file_falls_in_an_interval_that_widens_as_it_shrinks():
    assert metrics.interval_of_a_file(80, [70, 86], 300, 300, 0) == pytest.approx([80 - 200**0.5, 80 + 72**0.5])
    assert metrics.interval_of_a_file(80, [70, 86], 300, 1e12, 0) == pytest.approx([70, 86])
    assert metrics.widened(80, [77, 84], 4 / 1.959964) == pytest.approx([75, 80 + 32**0.5])


@given(st.integers(1, 400), st.sampled_from([0.5, 1, 3, 10, 40, 99]), st.sampled_from([0.5, 0.1, 1e-3]))
@settings(max_examples=60, deadline=None)
def test_the_binomial_tail_is_exact(rows, percent, error):
    share, tails = Fraction(percent) / 100, [Fraction(0)]  # P(X < k)
    for k in range(rows + 1):
        tails.append(tails[-1] + math.comb(rows, k) * share**k * (1 - share) ** (rows - k))
    k = max(k for k, tail in enumerate(tails) if tail <= Fraction(error))
    expected = k - 1 + (Fraction(error) - tails[k]) / (tails[k + 1] - tails[k])
    assert metrics.most_changes(rows, percent / 100, error) == pytest.approx(float(expected), abs=1e-6)


def test_a_bound_is_near_the_exact_one_where_rows_are_only_lost():
    """P(X <= lost) is what is not sure, where X is binomial with the bound as its probability."""
    for sure in (70.0, 90.0, 95.0):
        for lost in (0, 1, 3, 10, 40):
            bound = float(metrics.loss_bound(paired(2000, lost, 0), "accuracy", sure))
            each = [math.comb(2000, k) * (bound / 100) ** k * (1 - bound / 100) ** (2000 - k) for k in range(lost + 1)]
            assert 0.5 * (100 - sure) < 100 * sum(each) < 100 - sure + 1
    bounds = [float(metrics.loss_bound(paired(1000, 30, 20), "accuracy", sure)) for sure in (50, 70, 90, 99.9)]
    assert bounds == sorted(bounds)
    assert bounds[0] > 1.0


@pytest.mark.parametrize("sure", [50, 70, 90, 99.9])
@pytest.mark.parametrize("limit", [0.5, 1, 3, 10])
def test_the_rows_that_are_named_are_the_fewest_that_promise(limit, sure):
    rows = metrics.rows_needed("agreement", limit, sure)
    allowed = [metrics.most_changes(n, limit / 100, 1 - sure / 100) >= -1e-6 for n in (rows - 1, rows)]
    assert allowed == [False, True]
    rows = metrics.rows_needed("accuracy", limit, sure)
    bounds = [float(metrics.loss_bound(paired(n, 0, 0), "accuracy", sure)) for n in (0.99 * rows - 1, rows)]
    assert bounds[0] > limit >= bounds[1]
    assert metrics.rows_needed("matthews", limit, sure) > rows
    assert metrics.rows_needed("accuracy", 0, sure) is None
