"""Temperature scaling of each exit (Guo et al. 2017, https://arxiv.org/abs/1706.04599; App. A of the paper).

An exit's logits are divided by one temperature, which makes its confidence more truthful and changes no prediction.
The temperature is the one of least negative log-likelihood (NLL), plus a weak prior that keeps it near 1: log(T)^2 / N.
Without the prior, an exit that is right on every row would get a temperature near 0, and always be certain.

The authors fit the temperatures on the very set that they then score. We do not: a fold of the validation set is
decided by temperatures that were fitted on the other folds (evaluation/sweep.py). One rule is kept for new text. All
rows fit it, or a quarter if the other rows certify a promise (evaluation/operating.py).

Dimension letters: K exits, N instances, C classes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from minisweet.adaptive import ExitRule, certainty_ranges

BINS = 15  # of the expected calibration error


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature of least NLL and prior: logits (N, C) and labels (N,) to a number above 0; without rows 1.

    Where the slope of their sum changes its sign is found by bisection, of log(T) between -7 and 7.
    """
    logits, low, high = logits.double(), -7.0, 7.0
    gold = float(logits.gather(1, labels[:, None]).sum())
    for _ in range(40):
        middle = (low + high) / 2
        scaled = logits * math.exp(-middle)
        slope = gold * math.exp(-middle) - float((scaled.softmax(-1) * scaled).sum()) + 2 * middle
        low, high = (low, middle) if slope > 0 else (middle, high)
    return math.exp(middle)


def fit_rule(logits: Tensor, certainty: Tensor | None, labels: Tensor, labelled: bool = True) -> ExitRule:
    """The rule that some validation rows suggest, for other text. Here alone a rule is made of data.

    Args:
        logits: (K, N, C).
        certainty: (K or K-1, N) of learning-to-exit, whose ranges are taken; None where temperatures are fitted.
        labels: (N,).
        labelled: False where the labels are the last exit's own answers. They tell nothing of its temperature: it is 1.
    """
    K, _, C = logits.shape
    if certainty is not None:
        return ExitRule(C, ranges=certainty_ranges(certainty, K))
    temperatures = [fit_temperature(exit_logits, labels) for exit_logits in logits[: K if labelled else K - 1]]
    return ExitRule(C, torch.tensor(temperatures + [1.0] * (not labelled), dtype=torch.float32))


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
