"""The operating point: what is deployed, what to expect of it on new text, and the promise in words."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch

from minisweet.classifier.combined_rule import CombinedRule
from minisweet.classifier.promise import BOTH, Goal, by_text, filled, lost_texts, scored, texts_needed
from minisweet.classifier.split import MOST_JUDGES, UNLABELLED_PER_JUDGE
from minisweet.metrics import score
from minisweet.outputs import Outputs

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
    lost: float  # of the judging texts: early exit changed the answer, and no label says that full depth was wrong
    lost_interval: list[float] | None
    share: float  # of the layers that run
    share_interval: list[float] | None
    temperatures: list[float]  # (2,), of the bag of words and of the model
    weights: list[float]  # (2,), how much the bag's answer counts: 0, and at full depth
    per_class: dict  # of the labelled judges: lists (C,), see `classification_report`
    precision: str  # of the logits

    @property
    def rule(self) -> CombinedRule:
        """The rule of both exits."""
        numbers = torch.tensor([self.temperatures, self.weights], dtype=torch.float32, device="cpu")
        return CombinedRule(len(self.per_class["support"]), *numbers)

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
        if self.labelled_judges and self.score_interval:  # the score is accuracy
            words += f" Of {self.labelled_judges:,} labelled ones the full model had {self.full_depth:.1f} of 100"
            words += f" right, early exit {self.score:.1f}."
        return words

    def shortfall(self, set_aside: float) -> str:
        """A line if only full depth can be promised, with the rows that it takes; or "".

        `set_aside` is the share of labelled rows that validates.
        """
        if self.threshold < 1:
            return ""
        problem = "nothing faster than full depth can be promised"
        needed = texts_needed(self.goal)
        if self.judging_texts >= needed[-1]:
            return f"{problem}: too many of {self.judging_texts:,} texts are lost; allow more"
        kind, share, judges = "labelled rows", set_aside, 0
        unlabelled_would_do = needed[-1] <= MOST_JUDGES * (CHOOSING - 1) // CHOOSING
        if self.judging_texts > self.labelled_judges and unlabelled_would_do:  # more of those that are cheap
            kind, share, judges = "more rows without a label", 1 / UNLABELLED_PER_JUDGE, self.judging_texts
        rows = [math.ceil(math.ceil(max(1, n - judges) * CHOOSING / (CHOOSING - 1)) / share) for n in needed]
        enough = f"{rows[0]:,} {kind} if none is lost, {rows[1]:,} if one is, and {rows[2]:,} if two are"
        return f"{problem}: only {self.judging_texts:,} texts judged. It takes about {enough}"

    def in_words(self, set_aside: float) -> str:
        """The promise, or why nothing faster than full depth can be promised."""
        return self.promise or self.shortfall(set_aside) or "all texts run to the last exit, and none is lost"


def measure(threshold: float, judges: Outputs) -> dict:
    """Measure early exit. Returns values of an `OperatingPoint`.

    The `judges` have calibrated logits.
    """
    judged = filled(judges)
    labelled = scored(judges)
    _, (answers,), (costs,) = judged.decide_at(BOTH, [threshold])
    lost, costs = lost_texts(judged, answers), by_text(judged, costs)  # (T,) each
    ends = judged.exits.costs()
    point = {
        "judging_texts": len(lost),
        "lost": 100 * float(lost.mean()),
        "lost_interval": wilson(lost),
        "share": float(costs.mean()),
        "share_interval": around_mean(costs, ends[0], ends[-1]),
    }
    if threshold == 1:  # all answers are full depth's, at one cost
        point |= {"lost_interval": [0.0, 0.0], "share_interval": [ends[-1], ends[-1]]}
    _, (answers,), _ = labelled.decide_at(BOTH, [threshold])
    labels, full_depth = labelled.labels.numpy(), labelled.logits[-1].argmax(-1).numpy()
    for name, predictions in (("score", answers), ("full_depth", full_depth)):
        if labelled.metric == "accuracy":
            right = by_text(labelled, predictions == labels)  # half, if one of a text's two labels is right
            point |= {name: 100 * float(right.mean()), f"{name}_interval": wilson(right)}
        else:
            point |= {name: float(score(predictions, labels, labelled.metric)), f"{name}_interval": None}
    return point | {"per_class": classification_report(answers, labels, labelled.logits.shape[-1])}


def classification_report(predictions: np.ndarray, labels: np.ndarray, num_labels: int) -> dict[str, list]:
    """`precision`, `recall` and `f1` of each class in percent, 0 where undefined, and `support`: lists (C,)."""
    right, support, predicted = (
        np.bincount(values, minlength=num_labels) for values in (labels[predictions == labels], labels, predictions)
    )  # (C,) each
    precision, recall = 100 * right / np.maximum(predicted, 1), 100 * right / np.maximum(support, 1)
    per_class = {"precision": precision, "recall": recall, "f1": 200 * right / np.maximum(support + predicted, 1)}
    return {name: values.tolist() for name, values in (per_class | {"support": support}).items()}


def wilson(values: np.ndarray) -> list[float]:
    """The 95% interval of a proportion, in percent: Wilson's with continuity correction, of values (T,) from 0 to 1."""
    count, n = values.sum(), len(values)
    k = np.array([count - 0.5, count + 0.5])
    low, high = (k + Z**2 / 2 + np.array([-Z, Z]) * np.sqrt(k * (n - k) / n + Z**2 / 4)) / (n + Z**2)
    return [100 * float(min(low, count / n)), 100 * float(max(high, count / n))]


def around_mean(values: np.ndarray, least: float, most: float) -> list[float]:
    """The 95% interval of a mean: the normal one, of values (T,) and of one made-up value at either end."""
    widened = np.append(values, [least, most])
    mean = values.mean()
    half = Z * widened.std() / math.sqrt(len(widened))
    return [float(min(mean, max(least, widened.mean() - half))), float(max(mean, min(most, widened.mean() + half)))]
