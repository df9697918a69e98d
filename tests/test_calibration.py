"""Temperatures, ECE and NLL."""

import math

import pytest
import torch

from minisweet.adaptive import ExitRule, exits_taken
from minisweet.calibration import (
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    row_temperatures,
)


def sampled(temperature: float, size: int = 4000, num_labels: int = 3, seed: int = 0):
    """Labels drawn from softmax(logits / temperature), so that `temperature` is the right one."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(size, num_labels, generator=generator)
    return logits, torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("temperature", [0.05, 0.3, 1.0, 4.0])
def test_the_right_temperature_is_found_and_lowers_nll_and_ece(temperature):
    logits, labels = sampled(temperature)
    fitted = fit_temperature(logits, labels)
    assert fitted == pytest.approx(temperature, rel=0.1)
    best = negative_log_likelihood(logits / fitted, labels)
    for other in (fitted * 0.97, fitted * 1.03):
        assert best < negative_log_likelihood(logits / other, labels)
    if temperature != 1:
        assert expected_calibration_error(logits / fitted, labels) < expected_calibration_error(logits, labels) / 2


def test_ends_are_finite():
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    assert 0.01 <= fit_temperature(logits, torch.tensor([0, 1])) < 0.2
    assert fit_temperature(logits, torch.tensor([1, 0])) == 100
    assert fit_temperature(logits / 1000, torch.tensor([0, 1])) == 0.01
    assert math.isfinite(fit_temperature(torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])))


def test_each_half_is_scaled_by_what_the_other_half_says():
    logits, labels = sampled(2.0, size=200)
    logits = torch.stack([logits, logits.flip(-1) * 0.5])
    crossfit = row_temperatures(logits, labels, "crossfit")
    for k in range(2):
        assert crossfit[k, 0::2].unique().item() == pytest.approx(fit_temperature(logits[k, 1::2], labels[1::2]))
        assert crossfit[k, 1::2].unique().item() == pytest.approx(fit_temperature(logits[k, 0::2], labels[0::2]))
    changed = labels.clone()
    changed[0::2] = 2 - changed[0::2]  # labels of even rows must not reach the temperatures of even rows
    assert torch.equal(row_temperatures(logits, changed, "crossfit")[:, 0::2], crossfit[:, 0::2])
    dev = row_temperatures(logits, labels, "dev")
    assert [row.unique().item() for row in dev] == pytest.approx([fit_temperature(x, labels) for x in logits])
    assert row_temperatures(logits, labels, "none").eq(1).all()
    assert row_temperatures(logits[:, :1], labels[:1], "crossfit").eq(1).all()  # there is no other half
    with pytest.raises(ValueError, match="cross-fit"):
        row_temperatures(logits, labels, "cross-fit")


def test_a_temperature_changes_confidence_and_exits_but_no_prediction():
    logits, labels = sampled(4.0, size=300)
    logits = logits[None]
    temperatures = row_temperatures(logits, labels, "crossfit")
    scaled = logits / temperatures[..., None]
    assert torch.equal(scaled.argmax(-1), logits.argmax(-1))
    before, after = ExitRule(3).confidences(logits), ExitRule(3, temperatures).confidences(logits)
    assert torch.equal(after, ExitRule(3).confidences(scaled))
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
