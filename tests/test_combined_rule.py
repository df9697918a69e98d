"""The rule of exits behind a bag of words: what is fitted is the minimum, on labels first and then on answers."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minisweet.calibration import fit_temperature
from minisweet.classifier.combined_rule import PRIOR_OF_WEIGHT, fit_answer, fit_combined_rule
from minisweet.outputs import Outputs


def drawn_labels(logits: torch.Tensor, seed: int) -> torch.Tensor:
    """Labels (N,) that are drawn by the probabilities of logits (N, C)."""
    return (logits + torch.from_numpy(np.random.default_rng(seed).gumbel(size=logits.shape))).argmax(-1)


def random_logits(*shape: int) -> torch.Tensor:
    return 3 * torch.from_numpy(np.random.default_rng(0).standard_normal(shape)).float()  # the same in every version


def test_without_labels_the_last_exit_keeps_its_temperature():
    logits = random_logits(4000, 3)
    labels, logits = drawn_labels(logits / 2, 0), torch.stack([logits * 0.3, logits])  # so that 2 is the right one
    outputs = Outputs(logits, None, labels, torch.arange(4000), "accuracy", None)
    assert fit_combined_rule(outputs).temperatures.tolist() == pytest.approx([0.6, 2.0], rel=0.1)
    rule = fit_combined_rule(outputs._replace(labels=labels * 0 - 1, metric="agreement"))
    assert rule.temperatures.tolist() == [pytest.approx(fit_temperature(logits[0], logits[1].argmax(-1))), 1.0]
    assert rule.weights.tolist() == [0, 0]


@given(st.integers(10, 60), st.integers(2, 4), st.floats(0.3, 3), st.floats(-1, 1), st.integers(0, 10**6))
def test_an_answer_with_the_bag_is_fitted_to_the_minimum(N, C, scale, weight, seed):
    rng = np.random.default_rng(seed)
    logits, bag = torch.from_numpy(rng.standard_normal((2, N, C)) * np.array([scale, 2])[:, None, None])
    labels = drawn_labels(logits / scale + weight * bag, seed)
    T, w = fit_answer(logits, bag, labels)
    near, far = np.linspace(-0.02, 0.02, 9), np.linspace(0, 3, 31)
    pairs = [(1 / T, w), *product(1 / T + near, w + near), *product(far, far - 1.5)]
    inverse, weights = torch.tensor(pairs)[:, :, None, None].unbind(1)
    likelihoods = (inverse * logits + weights * bag).log_softmax(-1)[:, torch.arange(N), labels].mean(1)
    values = -likelihoods + ((inverse - 1) ** 2 + PRIOR_OF_WEIGHT * weights**2)[:, 0, 0] / N
    assert values[0] <= values.min() + 1e-7 or T > 999  # which is as far as it goes


def test_few_texts_choose_little_of_the_weight():
    logits, bag = random_logits(2, 4000, 3) * torch.tensor([1, 1 / 3])[:, None, None]
    labels, means = drawn_labels(logits / 2 + bag, 1), []
    assert fit_answer(logits, bag, labels) == pytest.approx((2, 1), rel=0.1)
    for N in (2, 10, 50, 200):
        parts = (slice(n, n + N) for n in range(0, 20 * N, N))
        means.append(np.mean([fit_answer(logits[rows], bag[rows], labels[rows])[1] for rows in parts]))
    assert 0 < means[0] < 0.15 < means[1] < 0.5 < means[2] < 0.85 < means[3] < 1


def test_full_depth_is_fitted_to_labels_first_and_the_bag_then_to_its_answers():
    logits, has_label = random_logits(2, 600, 3), torch.arange(600) < 300
    labels = drawn_labels(logits[1] / 2 + logits[0] / 2, 2).where(has_label, -1)
    outputs = Outputs(logits, None, labels, torch.arange(600), "accuracy", None)
    rule = fit_combined_rule(outputs, combines=True)
    bag = logits[0] / fit_temperature(logits[0, has_label], labels[has_label])
    T, w = fit_answer(logits[1, has_label], bag[has_label], labels[has_label])
    full = logits[1] / T + w * bag
    first, last = rule.all_calibrated(logits)
    torch.testing.assert_close(last, full)
    torch.testing.assert_close(first, logits[0] / fit_temperature(logits[0], labels.where(has_label, full.argmax(-1))))
    rows = torch.arange(600)[::7]  # as live early exit asks it
    torch.testing.assert_close(rule.full_depth(logits[1, rows], first[rows]), last[rows], rtol=0, atol=0)
    rule = fit_combined_rule(outputs._replace(labels=labels * 0 - 1, metric="agreement"), combines=True)
    assert (rule.temperatures[1], rule.weights[1]) == (1, 0)  # no label, no say there
