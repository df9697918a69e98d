"""How confident an exit is, and which exit a text takes (Sec. 3.3 and App. A of the paper).

A text takes the first exit whose confidence reaches the threshold, or else the last. The criterion defines the
confidence: by default the highest probability after temperature scaling (Guo et al. 2017,
https://arxiv.org/abs/1706.04599), which divides an exit's logits by one number and changes no prediction. The authors
fit the temperatures on the very set that they then score. Here they are cross-fitted: each of five folds is scored with
temperatures fitted on the other four.

Dimension letters: K exits, N texts, n some of them, C classes.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minisweet.base.files import InputError
from minisweet.exits import Answer

BELOW_1 = 1 - 2**-24  # the largest float32 below 1


def highest_probability(answer: Answer, fitted: Tensor) -> Tensor:
    """The highest probability (n,) of an exit's answer to n texts; `fitted` holds the temperature."""
    return (answer.logits.float() / fitted[0]).softmax(-1).amax(-1)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Fit the temperature T > 0 of logits (N, C) to labels (N,). It is 1 if there are no rows.

    Minimizes the mean negative log-likelihood plus log(T)^2 / N, a weak prior that keeps T near 1. Without it, an exit
    that is right on every row would get a temperature near 0 and always be certain. The zero of the derivative in
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


def learned_certainty(answer: Answer, fitted: Tensor) -> Tensor:
    """Learning-to-exit's certainty (n,), as a share of the range in `fitted`, as in the authors' code (Sec. 5)."""
    low, high = fitted
    return (certainty_of(answer) - low) / (high - low).clamp(min=1e-12)


def certainty_of(answer: Answer) -> Tensor:
    """The certainty (n,) of an answer. Raises InputError if its exit has learned none."""
    if answer.certainty is None:
        raise InputError("lte needs a run of train.py --exit-strategy lte", "criterion")
    return answer.certainty.float()


class Criterion(NamedTuple):
    """What makes an exit confident."""

    confidence: Callable[[Answer, Tensor], Tensor]  # (n,), of an answer to n texts, given what was fitted for its exit
    fit: Callable[[Answer, Tensor], list[float]]  # fits that to an answer to N texts and their labels (N,)
    lowest: Callable[[int], float]  # the lowest confidence, given C


# A new criterion is one more line. evaluate.py --criterion takes its name.
CRITERIA = {
    "confidence": Criterion(highest_probability, lambda a, y: [fit_temperature(a.logits, y)], lambda C: 1 / C),
    "lte": Criterion(learned_certainty, lambda a, _: torch.stack(certainty_of(a).aminmax()).tolist(), lambda C: 0.0),
}


def confidence(criterion: str, answer: Answer, fitted: Sequence[float]) -> Tensor:
    """How confident an exit is in its answer to n texts, (n,), in float32: at least `lowest`, and less than 1.

    Clamped, since rounding may leave this range: at threshold 1 no text exits early, and at `lowest` all do.
    """
    entry = CRITERIA[criterion]
    lowest = entry.lowest(answer.logits.shape[-1])
    return entry.confidence(answer, torch.tensor(fitted, device=answer.logits.device)).clamp(lowest, BELOW_1)


def crossfit(criterion: str, answers: Sequence[Answer], labels: np.ndarray, keys: np.ndarray) -> Tensor:
    """The confidences (K, N) of K exits' answers to N texts, each from what was fitted on the other folds.

    `labels` and `keys` (N,) are those of `Texts`.
    """
    confidences, fold = torch.empty(len(answers), len(labels)), folds(labels, keys)
    for number in np.unique(fold):
        own, others = torch.from_numpy(fold == number), torch.from_numpy(fold != number)
        others = others if others.any() else own  # a single text has no others
        for k, answer in enumerate(answers):
            fitted = CRITERIA[criterion].fit(rows_of(answer, others), torch.from_numpy(labels)[others])
            confidences[k, own] = confidence(criterion, rows_of(answer, own), fitted)
    return confidences


def rows_of(answer: Answer, rows: Tensor) -> Answer:
    """The answer to some of the texts."""
    return Answer(answer.logits[rows], None if answer.certainty is None else answer.certainty[rows])


def folds(labels: np.ndarray, keys: np.ndarray, count: int = 5) -> np.ndarray:
    """The fold of each text, (N,), from 0 to `count` - 1.

    Folds are stratified by class, identical texts share a fold, and the order of the texts makes no difference.
    """
    distinct, text = np.unique(keys, return_inverse=True)
    lowest_label = np.full(len(distinct), np.iinfo(np.int64).max)  # of each distinct text
    np.minimum.at(lowest_label, text, labels)
    place = np.lexsort((distinct, lowest_label)).argsort()  # by label, then by key, which is as good as random
    return (place % count)[text]


def exits_taken(confidences: Tensor, threshold: float) -> Tensor:
    """The exit that each text takes (N,), counted from 0, from the confidences (K, N) of all exits."""
    leave = confidences >= threshold  # (K, N); the threshold is rounded to float32
    leave[-1] = True
    return (leave.cumsum(0) == 0).sum(0)  # the number of exits before the first True; faster than argmax
