"""Scores against plain loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisweet.evaluation.metrics import classification_report, score


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
    for c in range(5):
        right = sum(p == t == c for p, t in pairs)
        predicted, support = int((predictions == c).sum()), int((labels == c).sum())
        assert report["precision"][c] == pytest.approx(100 * right / predicted if predicted else 0)
        assert report["recall"][c] == pytest.approx(100 * right / support if support else 0)
        assert (report["support"][c], report["confusion_matrix"][c][c]) == (support, right)
        if predicted + support:
            f1.append(200 * right / (predicted + support))
    assert report["macro_f1"] == pytest.approx(np.mean(f1))
