"""Temperature scaling, which makes confidences more truthful.

It (Guo et al. 2017, https://arxiv.org/abs/1706.04599; App. A of the paper) divides an exit's logits by one number,
which changes no prediction. The authors fit the temperatures on the very set that they then score. Here no row is
scored by a temperature that it fitted: the curve is cross-fitted (sweep.py), and other rows judge (operating.py).

Dimension letters: K exits, N instances, C classes.
"""

import math

import torch
from torch import Tensor

from minisweet.adaptive import ExitRule
from minisweet.outputs import Outputs


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T that fits best: logits (N, C) and labels (N,) to a number above 0; without rows 1.

    What is to be small is the negative log-likelihood plus log(T)^2 / N, a weak prior that keeps T near 1. Without it
    an exit that is right on every row would get a temperature near 0, and always be certain. Bisection of log(T) from
    -7 to 7 finds a place where the slope of the sum is zero. The prior is not convex in 1/T, so there might be others.
    """
    logits, low, high = logits.double().T.contiguous(), -7.0, 7.0  # (C, N): few classes are added up faster so
    gold = float(logits.gather(0, labels[None]).sum())
    for _ in range(40):
        middle = (low + high) / 2
        scaled = logits * math.exp(-middle)
        slope = gold * math.exp(-middle) - float((scaled.softmax(0) * scaled).sum()) + 2 * middle
        low, high = (low, middle) if slope > 0 else (middle, high)
    return math.exp(middle)


def fit_rule(outputs: Outputs) -> ExitRule:
    """The rule that some rows suggest for others, for all K exits: temperatures, or ranges of learning-to-exit.

    Where the labels are the last exit's own answers, they tell nothing of its temperature: it is 1.
    """
    K, _, C = outputs.logits.shape
    if outputs.certainty is not None:
        return ExitRule(C, torch.ones(K), ranges=torch.stack(outputs.certainty.aminmax(dim=1), dim=1))
    temperatures = [fit_temperature(exit_logits, outputs.labels) for exit_logits in outputs.logits]
    if outputs.metric == "agreement":
        temperatures[-1] = 1.0
    return ExitRule(C, torch.tensor(temperatures, dtype=torch.float32))
