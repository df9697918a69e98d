"""The cascade: the rule that is fitted is the minimum, on labels first and then on answers; decisions are exact."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minisweet.classifier.cascade import PRIOR_OF_WEIGHT, answers_of, at_exit_0, at_full_depth, fit_answer, fit_rule
from minisweet.confidence import fit_temperature


def drawn_labels(logits: torch.Tensor, seed: int) -> torch.Tensor:
    """Labels (N,) that are drawn by the probabilities of logits (N, C)."""
    return (logits + torch.from_numpy(np.random.default_rng(seed).gumbel(size=logits.shape))).argmax(-1)


def random_logits(*shape: int) -> torch.Tensor:
    return 3 * torch.from_numpy(np.random.default_rng(0).standard_normal(shape)).float()  # the same in every version


def test_decisions_at_a_threshold_are_those_of_a_plain_loop():
    bag, model = logits = random_logits(2, 300, 3)
    answers = answers_of(logits, (2.0, 0.5, 0.3), np.zeros(300, int), np.arange(300))
    for threshold in (0.0, 1 / 3, 0.5, float(answers.confidence[7]), 1.0):
        for n in range(300):
            sure = (bag[n] / 2).softmax(-1).max()
            stays = threshold == 1 or (threshold > 1 / 3 and sure < threshold - 1e-6)
            full = (model[n] / 0.5 + 0.3 * bag[n] / 2).argmax()
            if abs(sure - threshold) > 1e-6 or n == 7:
                assert answers.stay_at([threshold])[0, n] == stays
                assert answers.decide_at([threshold])[0, n] == (full if stays else bag[n].argmax())


def test_without_labels_full_depth_keeps_its_temperature():
    logits = random_logits(4000, 3)
    labels = drawn_labels(logits / 2, 0)  # so that 2 is the right temperature
    both, labels = torch.stack([logits * 0.3, logits]), labels.numpy()
    assert fit_rule(both, labels, False)[:2] == pytest.approx([0.6, 2.0], rel=0.1)
    for combines in (False, True):  # no label, no say
        rule = fit_rule(both, labels * 0 - 1, combines)
        assert rule == (pytest.approx(fit_temperature(logits * 0.3, logits.argmax(-1))), 1.0, 0.0)


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
    (bag, model), has_label = random_logits(2, 600, 3), torch.arange(600) < 300
    labels = drawn_labels(model / 2 + bag / 2, 2).where(has_label, -1)
    rule = fit_rule(torch.stack([bag, model]), labels.numpy(), True)
    calibrated = bag / fit_temperature(bag[has_label], labels[has_label])
    T, w = fit_answer(model[has_label], calibrated[has_label], labels[has_label])
    full = model / T + w * calibrated
    torch.testing.assert_close(at_full_depth(bag, model, rule), full)
    first = bag / fit_temperature(bag, labels.where(has_label, full.argmax(-1)))
    torch.testing.assert_close(at_exit_0(bag, rule), first)
