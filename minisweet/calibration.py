"""Temperature scaling, which makes confidences more reliable (App. A of the paper).

It divides the logits of an exit by one number (Guo et al. 2017, https://arxiv.org/abs/1706.04599), which does not
change the exit's predictions. The authors fit the temperatures on the very set that they then score. Here no row is
scored with a temperature that was fitted on it: each of five folds uses temperatures of the other four (sweep.py).

Dimension letters: K exits, N instances, C classes.
"""

import math

import torch
from torch import Tensor

from minisweet.adaptive import ExitRule
from minisweet.outputs import Outputs


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Fit the temperature T > 0 of logits (N, C) to labels (N,). It is 1 if there are no rows.

    Minimizes the mean negative log-likelihood plus log(T)^2 / N, a weak prior that keeps T near 1. Without it, an exit
    that is right on every row would get a temperature near 0 and always be certain. The zero of the derivative by
    log(T) is found by bisection from -7 to 7. The prior is not convex in 1/T, so there might be other zeros.
    """
    logits = logits.double().T.contiguous()  # (C, N): sums over few classes are faster this way
    low, high = -7.0, 7.0
    gold = float(logits.gather(0, labels[None]).sum())  # the logits of the right classes
    for _ in range(40):
        log_T = (low + high) / 2
        scaled = logits * math.exp(-log_T)
        slope = gold * math.exp(-log_T) - float((scaled.softmax(0) * scaled).sum()) + 2 * log_T  # N times the slope
        low, high = (low, log_T) if slope > 0 else (log_T, high)
    return math.exp(log_T)


def fit_rule(outputs: Outputs) -> ExitRule:
    """Fit the rule of K exits: their temperatures, or for learning-to-exit the ranges of their certainties."""
    C = outputs.logits.shape[-1]
    if outputs.certainty is not None:
        return ExitRule(C, ranges=torch.stack(outputs.certainty.aminmax(dim=1), dim=1))
    return ExitRule(C, torch.tensor([fit_temperature(logits, outputs.labels) for logits in outputs.logits]))
