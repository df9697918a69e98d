"""Temperature scaling of each exit (Guo et al. 2017, https://arxiv.org/abs/1706.04599; App. A of the paper).

An exit's logits are divided by one temperature, which makes its confidence more truthful and changes no prediction.
The temperature is the one of least negative log-likelihood (NLL).

The authors fit the temperatures on the very set that they then score. By default we do not: each half of the
validation set, even and odd rows, is scaled by the temperatures that were fitted on the other half. So it is with the
curve (`row_temperatures`) and with the operating point (evaluation/sweep.py). For new text the temperatures of all
rows are kept (`fit_rule`).

Dimension letters: K exits, N instances, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minisweet.adaptive import ExitRule, certainty_ranges

CALIBRATIONS = ("crossfit", "dev", "none")
BINS = 15  # of the expected calibration error
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 100.0  # an exit that is always right, or at chance, has no finite best


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature of least NLL: logits (N, C) and labels (N,) to a number between 0.01 and 100."""
    logits = logits.double()
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

    def nll() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits * (-log_temperature).exp(), labels)
        loss.backward()
        return loss

    optimizer.step(nll)
    return float(log_temperature.detach().exp().nan_to_num(1.0).clamp(LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE))


def row_temperatures(logits: Tensor, labels: Tensor, calibration: str) -> Tensor:
    """The temperature of each exit for each row.

    Args:
        logits: (K, N, C).
        labels: (N,).
        calibration: "crossfit" scales even rows by what odd rows say and the other way round, "dev" all rows by what
            all rows say, as the authors do, and "none" nothing.

    Returns:
        Temperatures (K, N), float32.

    Raises:
        ValueError: another calibration.
    """
    if calibration not in CALIBRATIONS:
        raise ValueError(f"calibration is {calibration!r}, and must be one of {', '.join(CALIBRATIONS)}")
    temperatures = torch.ones(logits.shape[:2])
    even = torch.arange(logits.shape[1]) % 2 == 0  # (N,)
    everything = torch.ones_like(even)
    pairs = {"crossfit": [(even, ~even), (~even, even)], "dev": [(everything, everything)], "none": []}
    for fitted, scaled in pairs[calibration]:
        if fitted.any():  # of a single row there is no other half: it stays as it is
            for k, exit_logits in enumerate(logits):
                temperatures[k, scaled] = fit_temperature(exit_logits[fitted], labels[fitted])
    return temperatures


def expected_calibration_error(logits: Tensor, labels: Tensor) -> float:
    """How far confidence and accuracy part, in 15 bins of confidence of equal width, weighted by size (0 to 1).

    logits (N, C), labels (N,).
    """
    confidence, prediction = logits.double().softmax(-1).max(-1)  # (N,)
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    gap = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, confidence - (prediction == labels).double())
    return float(gap.abs().sum() / len(labels))


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> float:
    """Mean NLL in nats: logits (N, C), labels (N,)."""
    return float(F.cross_entropy(logits.double(), labels))


def fit_rule(logits: Tensor, certainty: Tensor | None, labels: Tensor, calibration: str) -> ExitRule:
    """The rule that some validation rows suggest, for other text.

    Args:
        logits: (K, N, C).
        certainty: (K or K-1, N) of learning-to-exit, whose ranges are taken; else None.
        labels: (N,).
        calibration: "none" for no temperatures, else one temperature per exit is fitted on all rows.
    """
    K, _, C = logits.shape
    if certainty is not None:
        return ExitRule(C, ranges=certainty_ranges(certainty, K))
    if calibration == "none":
        return ExitRule(C)
    return ExitRule(C, torch.tensor([[fit_temperature(exit_logits, labels)] for exit_logits in logits]))
