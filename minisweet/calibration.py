"""Temperature scaling, which makes confidences more truthful.

It (Guo et al. 2017, https://arxiv.org/abs/1706.04599; App. A of the paper) divides an exit's logits by one number,
which changes no exit's own answer. The authors fit the temperatures on the very set that they then score. Here no row
is scored by a temperature that it fitted: the curve is cross-fitted (sweep.py), and other rows judge (operating.py).

Dimension letters: K exits, N instances, C classes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from minisweet.adaptive import ExitRule
from minisweet.outputs import Outputs

PULL = 3.0  # of a weight towards 0, so that a few rows choose little


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T that fits best: logits (N, C) and labels (N,) to a number above 0; without rows 1.

    What is to be small is the mean negative log-likelihood plus log(T)^2 / N, a weak prior that keeps T near 1. Without
    it an exit that is right on every row would get a temperature near 0, and always be certain. Bisection of log(T)
    from -7 to 7 finds where the slope of the sum is zero. The prior is not convex in 1/T, so there might be others.
    """
    logits, low, high = logits.double().T.contiguous(), -7.0, 7.0  # (C, N): few classes are added up faster so
    gold = float(logits.gather(0, labels[None]).sum())
    for _ in range(40):
        middle = (low + high) / 2
        scaled = logits * math.exp(-middle)
        slope = gold * math.exp(-middle) - float((scaled.softmax(0) * scaled).sum()) + 2 * middle
        low, high = (low, middle) if slope > 0 else (middle, high)
    return math.exp(middle)


def fit_answer(logits: Tensor, first: Tensor, labels: Tensor) -> tuple[float, float]:
    """The temperature T and the weight w with which logits / T + w first fit best: (N, C) twice, (N,) to two numbers.

    What is to be small is the mean negative log-likelihood plus ((1/T - 1)^2 + PULL w^2) / N, which is convex in 1/T
    and w. So a few rows leave w near 0.
    """
    found = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)  # 1/T, w
    optimizer = torch.optim.LBFGS([found], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(found[0] * logits.double() + found[1] * first.double(), labels)
        value = value + ((found[0] - 1) ** 2 + PULL * found[1] ** 2) / len(labels)
        value.backward()
        return value

    optimizer.step(loss)
    inverse, weight = found.tolist()
    return 1 / max(inverse, 1e-3), weight


def fit_rule(outputs: Outputs, combine: bool = False) -> ExitRule:
    """The rule that some rows suggest for others, for all K exits: temperatures, or ranges of learning-to-exit.

    An exit learns the labels, and where there are none full depth's answers. These tell nothing of the last exit: it is
    fitted first, to labels, and has a temperature of 1 without any. With `combine` exit 0 has a say at later exits.
    """
    K, _, C = outputs.logits.shape
    if outputs.certainty is not None:
        return ExitRule(C, torch.ones(K), ranges=torch.stack(outputs.certainty.aminmax(dim=1), dim=1))
    labelled, first, last = outputs.labelled(), outputs.logits[0], outputs.logits[-1]
    temperatures, weights = torch.ones(K), torch.zeros(K)
    if outputs.metric != "agreement" and len(labelled.labels):
        if combine:
            of_first = fit_temperature(labelled.logits[0], labelled.labels)
            its = labelled.logits[-1], labelled.logits[0] / of_first, labelled.labels
            temperatures[-1], weights[-1] = fit_answer(*its)
            last = last / temperatures[-1] + weights[-1] * first / of_first
        else:
            temperatures[-1] = fit_temperature(labelled.logits[-1], labelled.labels)
    targets = outputs.labels.where(outputs.labels >= 0, last.argmax(-1))
    for k in range(K - 1):
        if combine and k:
            temperatures[k], weights[k] = fit_answer(outputs.logits[k], first / temperatures[0], targets)
        else:
            temperatures[k] = fit_temperature(outputs.logits[k], targets)
    if weights[-1]:
        weights[-1] *= temperatures[0] / of_first
    return ExitRule(C, temperatures, weights if combine else None)
