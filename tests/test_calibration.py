"""Temperatures, ECE and NLL."""

import math

import numpy as np
import pytest
import torch

from minisweet.adaptive import (
    ExitRule,
    exits_taken,
    expected_calibration_error,
    fit_rule,
    fit_temperature,
    negative_log_likelihood,
)


def sampled(temperature: float, size: int = 4000, num_labels: int = 3, seed: int = 0):
    """Labels drawn from softmax(logits / temperature), so that `temperature` is the right one."""
    rng = np.random.default_rng(seed)  # whose draws are the same in every version
    logits = 3 * torch.from_numpy(rng.standard_normal((size, num_labels))).float()
    return logits, (logits / temperature + torch.from_numpy(rng.gumbel(size=(size, num_labels)))).argmax(-1)


def nll_and_prior(logits: torch.Tensor, labels: torch.Tensor, temperature: float) -> float:
    return negative_log_likelihood(logits / temperature, labels) + math.log(temperature) ** 2 / len(labels)


@pytest.mark.parametrize("temperature", [0.05, 0.3, 1.0, 4.0])
def test_the_right_temperature_is_found_and_lowers_nll_and_ece(temperature):
    logits, labels = sampled(temperature)
    fitted = fit_temperature(logits, labels)
    assert fitted == pytest.approx(temperature, rel=0.1)
    best = nll_and_prior(logits, labels, fitted)
    for other in (fitted * 0.97, fitted * 1.03):
        assert best < nll_and_prior(logits, labels, other)
    if temperature != 1:
        assert expected_calibration_error(logits / fitted, labels) < expected_calibration_error(logits, labels) / 2


@pytest.mark.parametrize("rows", [1, 2, 30, 3000])
def test_what_is_always_right_or_always_wrong_stays_within_the_prior(rows):
    logits, right = torch.tensor([[2.0, -1.0]]).repeat(rows, 1), torch.zeros(rows, dtype=torch.int64)
    grid = np.geomspace(1e-3, 1e3, 6001)
    for labels in (right, 1 - right):
        expected = grid[np.argmin([nll_and_prior(logits, labels, temperature) for temperature in grid])]
        assert fit_temperature(logits, labels) == pytest.approx(expected, rel=3e-3)
    assert 0.3 < fit_temperature(logits, right) < 1 < fit_temperature(logits, 1 - right)


def test_a_temperature_of_nothing_is_one():
    assert fit_temperature(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)) == pytest.approx(1)
    assert fit_temperature(torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])) == pytest.approx(1)  # logits that say nothing
    assert math.isfinite(fit_temperature(torch.tensor([[1e4, -1e4]] * 3), torch.ones(3, dtype=torch.int64)))


def test_without_labels_the_last_exit_is_left_as_it_is():
    logits, _ = sampled(2.0, size=300)
    logits = torch.stack([logits * 0.3, logits])
    own = logits[-1].argmax(-1)
    rule = fit_rule(logits, None, own, labelled=False)
    assert rule.temperatures.tolist() == [pytest.approx(fit_temperature(logits[0], own)), 1.0]
    rule = fit_rule(logits, None, own)  # gold labels that happen to be those: the prior holds it
    assert 0.01 < rule.temperatures[-1] < 1


def test_a_rule_has_a_temperature_for_each_exit_or_the_ranges_of_learning_to_exit():
    logits, labels = sampled(2.0, size=200)
    logits = torch.stack([logits, logits.flip(-1) * 0.5])
    fitted = fit_rule(logits, None, labels).temperatures.tolist()
    assert fitted == pytest.approx([fit_temperature(x, labels) for x in logits])
    certainty = torch.rand(2, 200)
    rule = fit_rule(logits, certainty, labels)
    assert rule.temperatures is None
    torch.testing.assert_close(rule.ranges, torch.stack(certainty.aminmax(dim=1), dim=1))


def test_a_temperature_changes_confidence_and_exits_but_no_prediction():
    logits, labels = sampled(4.0, size=300)
    logits = logits[None]
    rule = fit_rule(logits, None, labels)
    before, after = ExitRule(3).confidences(logits), rule.confidences(logits)
    assert torch.equal(after, ExitRule(3).confidences(logits / rule.temperatures[:, None, None]))
    assert (before > after).all()
    assert exits_taken(before.repeat(2, 1), 0.8, 1 / 3).sum() < exits_taken(after.repeat(2, 1), 0.8, 1 / 3).sum()


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
