"""The promise about new text: the goal, the exact test, and where the search for a threshold ends.

A text is *lost* if full depth, which runs all layers, is right and early exit is wrong. The goal is to lose at most P
of 100 texts, and to be S% sure of that.

*Judging* texts test thresholds downwards from 1 (full depth); lower is faster. At each one the exact
binomial test decides whether the goal still holds, and the first failure ends the search. Only texts whose answer early
exit changes need a label. Without one such a text counts as lost, so that the count is never too low.

Theorem. Model, thresholds, goal and precision are fixed before anyone looks at a judging text. If judging and new
texts are independent draws of distinct texts from one source, and none of them was trained on, then the promise is
broken with a probability of at most 1 - S/100. Broken: in the long run more than P of 100 new texts are lost.

Proof. Take the first threshold on the way down that loses more than P of 100 in the long run, if any. The exact test
passes it with a probability of at most 1 - S/100; if it fails, the search ends above it. A missing label only adds to
the count, so the search goes no lower than with all labels.

This is Learn then Test (Angelopoulos et al. 2021, https://arxiv.org/abs/2110.01052) with fixed-sequence testing (in
MAPIE: `control_fwer`, "fixed_sequence"). For early exits see Jazbec et al. 2024, https://arxiv.org/abs/2405.20915.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from minisweet.classifier.cascade import Answers
from minisweet.classifier.options import Options, number, option


@dataclass(frozen=True, kw_only=True)
class Goal(Options):
    """The goal of early exit: to lose few texts."""

    max_lost: float = option(3.0, number(0.01, 99.99), "lose at most this many of 100 texts")
    sure: float = option(90.0, number(50, 99.9), "confidence in that, in percent")


def how_sure(texts: int, lost: Sequence[int] | np.ndarray, share: float) -> np.ndarray:
    """The confidence (M,) that at most a `share` of all texts is lost, if `lost` (M,) of `texts` are.

    The exact binomial test: 1 - P(Binomial(texts, share) <= lost).
    """
    k = torch.arange(max(lost) + 1, dtype=torch.float64)
    log_ways = math.lgamma(texts + 1) - torch.lgamma(k + 1) - torch.lgamma(texts - k + 1)
    chances = (log_ways + torch.xlogy(k, share) + torch.special.xlog1py(texts - k, -share)).exp()
    return (1 - chances.cumsum(0)).numpy()[lost]


def texts_needed(goal: Goal) -> list[int]:
    """How many texts must judge before anything can be promised, if none, one or two of them are lost."""
    tests = [lambda texts, lost=lost: how_sure(texts, [lost], goal.max_lost / 100)[0] for lost in range(3)]
    return [bisect_left(range(10**9), goal.sure / 100, lost + 1, key=test) for lost, test in enumerate(tests)]


def most_lost(texts: int, goal: Goal) -> int:
    """How many of `texts` judging texts may be lost; -1 if the test fails even where none is."""
    return int((how_sure(texts, np.arange(texts + 1), goal.max_lost / 100) >= goal.sure / 100).sum()) - 1


def fixed_sequence(answers: Answers, goal: Goal, thresholds: np.ndarray) -> float:
    """Test ascending thresholds (M,) from the last, 1, downwards. Returns the one above a failure, or the lowest."""
    lost = lost_texts(answers, thresholds)  # (M, U)
    passes = how_sure(lost.shape[1], lost.sum(1), goal.max_lost / 100) >= goal.sure / 100  # (M,)
    return float(thresholds[max(np.flatnonzero(~passes[:-1]), default=-1) + 1])


def lost_texts(answers: Answers, thresholds: Sequence[float] | np.ndarray) -> np.ndarray:
    """Whether any row of each of U distinct texts is lost at each of M thresholds: (M, U).

    A row without a label is lost if early exit changes full depth's answer.
    """
    rows = answers.filled()
    lost = (rows.full == rows.labels) & (rows.decide_at(thresholds) != rows.labels)  # (M, N)
    return by_text(answers.keys, lost) > 0


def by_text(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Average values (..., N) over the rows of each distinct text, which have equal keys (N,): (..., U)."""
    order = keys.argsort(kind="stable")
    _, first, rows = np.unique(keys[order], return_index=True, return_counts=True)  # (U,) each
    return np.add.reduceat(values[..., order].astype(np.float64), first, axis=-1) / rows
