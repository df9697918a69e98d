"""The operating point: the threshold that is deployed, what to expect of it on new text, and the promise in words.

The units of the validation rows, which are texts or groups of texts, are split by a hash. A quarter *chooses*: it fits
the rule of the cascade and picks the thresholds to try. Three quarters *judge* these (promise.py). Only their numbers
and the goal decide whether unlabelled texts join. One text of each group judges.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from minisweet.classifier.cascade import Answers, CascadeRule, Logits, fit_cascade
from minisweet.classifier.promise import Goal, by_text, fixed_sequence, lost_texts, most_lost, texts_needed
from minisweet.classifier.split import UNLABELLED_PER_JUDGE, dealt, one_of_each
from minisweet.classifier.training import in_float32

CHOOSING = 4  # one in four validation texts chooses, and the rest judge
Z = NormalDist().inv_cdf(0.975)  # of a 95% interval


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """What is deployed, and what to expect of it on new text: the keys of operating.json (RUNS.md).

    Scores and `lost` are in percent, `share` is from 0 to 1. Intervals are 95% intervals, given as their two ends.
    """

    id: str | None = None  # of the run
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
    lost: float  # of the judging texts: early exit changed the answer, and no label shows full depth to be wrong
    lost_interval: list[float] | None
    share: float  # of the layers that run
    share_interval: list[float] | None
    temperatures: list[float]  # (2,), of the bag of words and of the model
    weights: list[float]  # (2,), how much the bag's answer counts: 0, and at full depth
    per_class: dict  # of the labelled judges: lists (C,), see `classification_report`
    precision: str  # of the logits

    @property
    def rule(self) -> CascadeRule:
        """The rule of the cascade."""
        return CascadeRule(self.temperatures[0], self.temperatures[1], self.weights[1])

    @property
    def promise(self) -> str:
        """What the judges saw and what is promised, in words; "" if all texts run to the last exit."""
        if self.threshold == 1:
            return ""
        count = round(self.lost * self.judging_texts / 100)
        at_most = "at most " * (self.judging_texts > self.labelled_judges)  # a missing label only adds to the count
        words = f"On {self.judging_texts:,} of your texts that the model had not seen, early exit lost {at_most}"
        words += f"{count:,} answer{'s' * (count != 1)} that the full model had right."
        words += f" In the long run at most {self.goal.max_lost:g} in 100 new texts like these are lost,"
        words += f" {self.goal.sure:g}% sure."
        if self.labelled_judges:
            words += f" Of {self.labelled_judges:,} labelled texts the full model got {self.full_depth:.1f}% right,"
            words += f" early exit {self.score:.1f}%."
        return words

    def in_words(self, set_aside: float) -> str:
        """The promise, or why nothing faster than full depth can be promised, with the rows that it takes.

        `set_aside` is the share of labelled rows that validates: 1 if all validation rows were given.
        """
        if self.threshold < 1:
            return self.promise
        problem = "nothing faster than full depth can be promised"
        needed = texts_needed(self.goal)
        if self.judging_texts >= needed[-1]:
            return f"{problem}: too many of {self.judging_texts:,} texts are lost; allow more"
        labelled = self.labelled_judges == self.judging_texts
        share = set_aside if labelled or set_aside == 1 else 1 / UNLABELLED_PER_JUDGE
        kind = "labelled rows" if labelled else "rows without a label"
        rows = [math.ceil(math.ceil(n * CHOOSING / (CHOOSING - 1)) / share) for n in needed]
        enough = f"{rows[0]:,} {kind} if none is lost, {rows[1]:,} if one is, and {rows[2]:,} if two are"
        return f"{problem}: only {self.judging_texts:,} texts judged. It takes about {enough}"


def choose(logits: Logits, goal: Goal, known: Collection[int] = (), combines: bool = False) -> OperatingPoint:
    """Choose what to deploy, from the logits of the validation rows.

    `known` are keys of texts that were trained on. `combines` says whether the bag of words contributes to full depth.
    If no text judges, the threshold is 1, and all rows are scored, without intervals.
    """
    # 1. What is decided before anyone looks at the answers to a judging text.
    choosing, judging, _ = choosers_and_judges(logits, known)
    has_judges = min(len(choosing), len(judging)) > 0
    if not has_judges:
        choosing = judging = np.arange(len(logits.labels))
    rule = fit_cascade(logits.take(choosing), combines)
    choosers, judges = (rule.answers(logits.take(rows)) for rows in (choosing, judging))
    if not unlabelled_judge(judges, goal):
        choosers, judges = choosers.take(choosers.is_labelled), judges.take(judges.is_labelled)

    # 2. What the judges say.
    threshold = fixed_sequence(judges, goal, thresholds_to_try(choosers)) if has_judges else 1.0
    point, alone = measure(threshold, judges), measure(0.0, judges)
    point |= {"exit_0": alone["score"], "exit_0_interval": alone["score_interval"]}
    point["choosing_texts"] = len(np.unique(choosers.keys))
    point["labelled_judges"] = len(np.unique(judges.keys[judges.is_labelled]))
    if (judges.decide_at([threshold])[0] != judges.full)[~judges.is_labelled].any():
        point["lost_interval"][0] = 0.0  # full depth may be wrong there
    if not has_judges:
        point |= dict.fromkeys(("choosing_texts", "judging_texts", "labelled_judges"), 0)
        point |= {name: None for name in point if name.endswith("_interval")}
    point |= {"temperatures": [rule.bag_temperature, rule.temperature], "weights": [0.0, rule.weight]}
    return OperatingPoint(threshold=threshold, goal=goal, precision=logits.precision, **point)


def choosers_and_judges(logits: Logits, known: Collection[int] = ()) -> tuple[np.ndarray, np.ndarray, int]:
    """The rows that choose, the rows that judge, and how many do neither because a text of their unit is `known`.

    Units with a label and units without are split separately.
    """
    keys, units = logits.keys, logits.units
    is_known = np.isin(units, units[np.isin(keys, np.array([*known], dtype=np.int64))])
    has_label = np.isin(units, units[logits.labels >= 0])
    chooses = np.zeros(len(units), dtype=bool)
    for kind in (has_label & ~is_known, ~has_label & ~is_known):
        chooses[kind] = dealt(units[kind], math.ceil(len(np.unique(units[kind])) / CHOOSING), "choose")
    judging = np.flatnonzero(~chooses & ~is_known)
    return np.flatnonzero(chooses), judging[one_of_each(units[judging], keys[judging])], int(is_known.sum())


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


def unlabelled_judge(judges: Answers, goal: Goal) -> bool:
    """Whether unlabelled texts judge too, because more texts can leave early then.

    Suppose that full depth is right in half of the answers that early exit changes. If `a` labelled texts judge, k may
    be lost, so that early exit may change a share k / (a/2) of all answers. If `b` unlabelled ones join, k' may be
    lost: k' / (a/2 + b). Only `a`, `b` and the goal decide.
    """
    a, b = (len(np.unique(judges.keys[there])) for there in (judges.is_labelled, ~judges.is_labelled))
    return most_lost(a + b, goal) * a / 2 > most_lost(a, goal) * (a / 2 + b) or not a


def measure(threshold: float, judges: Answers) -> dict[str, Any]:
    """Measure early exit. Returns values of an `OperatingPoint`."""
    lost = lost_texts(judges, [threshold])[0]  # (U,)
    sent = by_text(judges.keys, judges.stay_at([threshold])[0])  # (U,): the share of the layers that run
    never = threshold == 1  # all answers are full depth's, at one cost
    rows = judges.scored()
    decided = rows.decide_at([threshold])[0]
    report = classification_report(decided, rows.labels, rows.num_labels)
    there = np.union1d(decided, rows.labels)  # as scikit-learn has it
    point = {
        "judging_texts": len(lost),
        "lost": 100 * float(lost.mean()),
        "lost_interval": [0.0, 0.0] if never else wilson(lost),
        "share": float(sent.mean()),
        "share_interval": [1.0, 1.0] if never else [end / 100 for end in wilson(sent)],
        "macro_f1": float(np.mean(np.array(report["f1"])[there])),
        "per_class": report,
    }
    for name, answers in (("score", decided), ("full_depth", rows.full)):
        right = by_text(rows.keys, answers == rows.labels)  # half, if one of a text's two labels is right
        interval = wilson(right) if judges.is_labelled.any() else None
        point |= {name: 100 * float(right.mean()), f"{name}_interval": interval}
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
