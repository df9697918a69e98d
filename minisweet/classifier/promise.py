"""The promise about new text: the goal, the exact test, and the threshold that is deployed.

A text is *lost* if full depth, which runs all layers, is right and early exit is wrong. The goal is to lose at most P
of 100 texts, and to be S% sure of that.

*Judging* texts (split.py) test thresholds downwards from 1 (full depth); lower is faster. At each one the exact
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

Dimension letters: N texts, n some of them, U distinct texts, C classes, M thresholds.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minisweet.classifier.cascade import Answers, Rule, answers_of, fit_rule, in_float32
from minisweet.classifier.split import CHOOSES, JUDGES

Z = NormalDist().inv_cdf(0.975)  # of a 95% interval


@dataclass(frozen=True, kw_only=True)
class Goal:
    """The goal of early exit: to lose few texts."""

    max_lost: float = 3.0  # lose at most this many of 100 texts
    sure: float = 90.0  # confidence in that, in percent


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """What is deployed, and what to expect of it on new text: the keys of operating.json (RUNS.md).

    Scores and `lost` are in percent, `share` is from 0 to 1. Intervals are 95% intervals, given as their two ends.
    """

    id: str = ""  # of the run
    threshold: float  # a text leaves at the bag of words if its confidence, from 0 to 1, reaches it
    goal: Goal
    choosing_texts: int
    judging_texts: int
    labelled_judges: int  # of the judging texts, how many were set aside with a label
    score: float  # of early exit on the labelled judges; without any, how often it agrees with full depth
    score_interval: list[float] | None
    full_depth: float
    full_depth_interval: list[float] | None
    exit_0: float  # of the bag of words alone
    exit_0_interval: list[float] | None
    macro_f1: float  # of early exit
    majority: float | None  # the share of the most frequent label; None if no text has a label
    lost: float  # of the judging texts: early exit changed the answer, and no label shows full depth to be wrong
    lost_interval: list[float]
    share: float  # of the layers that run
    share_interval: list[float]
    temperatures: list[float]  # (2,), of the bag of words and of the model
    weights: list[float]  # (2,), how much the bag's answer counts: 0, and at full depth
    precision: str = "torch.float32"  # that the model ran in

    @property
    def rule(self) -> Rule:
        """The rule of the cascade."""
        return self.temperatures[0], self.temperatures[1], self.weights[1]


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


def count_judges(a: int, b: int, goal: Goal) -> int:
    """How many of `a` labelled and `b` unlabelled texts judge: all if more texts can leave early then, or else `a`.

    Suppose that full depth is right in half of the answers that early exit changes. If `a` labelled texts judge, k may
    be lost, so that early exit may change a share k / (a/2) of all answers. If `b` unlabelled ones join, k' may be
    lost: k' / (a/2 + b). Only `a`, `b` and the goal decide.
    """
    joins = most_lost(a + b, goal) * a / 2 > most_lost(a, goal) * (a / 2 + b) or not a
    return a + b if joins else a


def fixed_sequence(answers: Answers, goal: Goal, thresholds: np.ndarray) -> float:
    """Test ascending thresholds (M,) from the last, 1, downwards. Returns the one above a failure, or the lowest."""
    lost = lost_texts(answers, thresholds)  # (M, U)
    passes = how_sure(lost.shape[1], lost.sum(1), goal.max_lost / 100) >= goal.sure / 100  # (M,)
    return float(thresholds[max(np.flatnonzero(~passes[:-1]), default=-1) + 1])


def thresholds_to_try(choosers: Answers) -> np.ndarray:
    """At most two hundred thresholds in increasing order, (M,). The last one is 1.

    They lie halfway between confidences of the choosing rows, so that rounding seldom changes an answer. At the first,
    just above the lowest confidence, all texts leave at the bag of words, except those without a word that it knows.
    """
    confidences = np.unique(choosers.confidence.double().numpy())
    least = in_float32(1 / choosers.num_labels + 1e-6)
    between = ((confidences[1:] + confidences[:-1]) / 2).astype(np.float32)
    between = between[(between > least) & (between < 1)]
    return np.concatenate([[least], between[:: max(1, len(between) // 100)], [1.0]])


def lost_texts(answers: Answers, thresholds: Sequence[float] | np.ndarray) -> np.ndarray:
    """Whether any row of each of U distinct texts is lost at each of M thresholds: (M, U).

    A row without a label is lost if early exit changes full depth's answer.
    """
    lost = (answers.full == answers.labels) & (answers.decide_at(thresholds) != answers.labels)  # (M, N)
    return by_text(answers.keys, lost) > 0


def by_text(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Average values (..., N) over the rows of each distinct text, which have equal keys (N,): (..., U)."""
    order = keys.argsort(kind="stable")
    _, first, rows = np.unique(keys[order], return_index=True, return_counts=True)  # (U,) each
    return np.add.reduceat(values[..., order].astype(np.float64), first, axis=-1) / rows


def choose(
    logits: Tensor, labels: np.ndarray, keys: np.ndarray, roles: np.ndarray, goal: Goal, combines: bool = False
) -> OperatingPoint:
    """Choose what to deploy, from the logits (2, N, C) of both exits for N validation rows, some of which judge.

    `labels` (-1 for none), `keys` (of the texts) and `roles` are (N,), one of each per row. If `combines`, the bag of
    words contributes to full depth.
    """
    # 1. What is decided before anyone looks at the answers to a judging text.
    choosing, judging = np.flatnonzero(roles == CHOOSES), np.flatnonzero(roles == JUDGES)
    rule = fit_rule(logits[:, choosing], labels[choosing], combines)
    choosers, judges = (answers_of(logits[:, rows], rule, labels[rows], keys[rows]) for rows in (choosing, judging))
    a, b = (len(np.unique(judges.keys[there])) for there in (judges.is_labelled, ~judges.is_labelled))
    if count_judges(a, b, goal) < a + b:
        choosers, judges = choosers.take(choosers.is_labelled), judges.take(judges.is_labelled)

    # 2. What the judges say.
    threshold = fixed_sequence(judges, goal, thresholds_to_try(choosers))
    point, alone = measure(threshold, judges), measure(0.0, judges)
    del point["per_class"]
    point |= {"exit_0": alone["score"], "exit_0_interval": alone["score_interval"], "labelled_judges": a}
    if (judges.decide_at([threshold])[0] != judges.full)[~judges.is_labelled].any():
        point["lost_interval"][0] = 0.0  # full depth may be wrong there
    point |= {"temperatures": list(rule[:2]), "weights": [0.0, rule[2]]}
    point["choosing_texts"] = len(np.unique(choosers.keys))
    return OperatingPoint(threshold=threshold, goal=goal, **point)


def measure(threshold: float, judges: Answers) -> dict[str, Any]:
    """Measure early exit. Returns values of an `OperatingPoint`, and the scores `per_class`."""
    lost = lost_texts(judges, [threshold])[0]  # (U,)
    sent = by_text(judges.keys, judges.stay_at([threshold])[0])  # (U,): the share of the layers that run
    never = threshold == 1  # every text runs all layers, so lost and share cannot vary
    has_labels, rows = judges.is_labelled.any(), judges.scored()
    decided = rows.decide_at([threshold])[0]
    per_class = classification_report(decided, rows.labels, rows.num_labels)
    f1 = np.array(per_class["f1"])[np.union1d(decided, rows.labels)]  # as scikit-learn has it
    point = {
        "judging_texts": len(lost),
        "lost": 100 * float(lost.mean()),
        "lost_interval": [0.0, 0.0] if never else wilson(lost),
        "share": float(sent.mean()),
        "share_interval": [1.0, 1.0] if never else [end / 100 for end in wilson(sent)],
        "per_class": per_class,
        "macro_f1": float(np.mean(f1)),
        "majority": 100 * float(np.bincount(rows.labels).max()) / len(rows.labels) if has_labels else None,
    }
    for name, answers in (("score", decided), ("full_depth", rows.full)):
        right = by_text(rows.keys, answers == rows.labels)  # half, if one of a text's two labels is right
        point |= {name: 100 * float(right.mean()), f"{name}_interval": wilson(right) if has_labels else None}
    return point


def classification_report(predictions: np.ndarray, labels: np.ndarray, num_labels: int) -> dict[str, list]:
    """`precision`, `recall` and `f1` of each class in percent, 0 where undefined, and `support`: lists (C,)."""
    right, support, predicted = (
        np.bincount(values, minlength=num_labels) for values in (labels[predictions == labels], labels, predictions)
    )  # (C,) each
    precision, recall = 100 * right / np.maximum(predicted, 1), 100 * right / np.maximum(support, 1)
    per_class = {"precision": precision, "recall": recall, "f1": 200 * right / np.maximum(support + predicted, 1)}
    return {name: values.tolist() for name, values in (per_class | {"support": support}).items()}


def wilson(values: np.ndarray) -> list[float]:
    """The 95% interval of a proportion, in percent: Wilson's with continuity correction, of values (U,) from 0 to 1."""
    count, n = values.sum(), len(values)
    k = np.array([count - 0.5, count + 0.5])
    low, high = (k + Z**2 / 2 + np.array([-Z, Z]) * np.sqrt(k * (n - k) / n + Z**2 / 4)) / (n + Z**2)
    return [100 * float(min(low, count / n)), 100 * float(max(high, count / n))]
