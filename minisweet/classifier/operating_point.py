"""The operating point: what is deployed, what to expect of it on new text, and the promise in words.

Dimension letters: K exits, N rows, T distinct texts, C classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch

from minisweet.classifier.combined_rule import CombinedRule
from minisweet.classifier.promise import ROUNDING, Goal, by_text, lost_texts, texts_needed
from minisweet.classifier.split import MOST_JUDGES, UNLABELLED_PER_JUDGE
from minisweet.metrics import score
from minisweet.outputs import Outputs

CHOOSING = 4  # one of so many validation texts chooses, and the rest judge
Z = NormalDist().inv_cdf(0.975)  # of a 95% interval


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """What is deployed, and what to expect of it on new text. operating.json holds these keys.

    Each `..._interval` is a 95% interval, given as its two ends, or None.

    Attributes:
        id: of the run.
        threshold: a text leaves at the first exit whose confidence, from 0 to 1, reaches it.
        exits: the layers of the exits that are asked, counted from 1; 0 is exit 0, the bag of words.
        goal: in operating.json {"max_lost": P, "sure": S}, in percent, or {"max_share": s}, from 0 to 1.
        choosing_texts, judging_texts: how many texts, none of them trained on, chose this point and judged it.
        labelled_judges: how many judging texts were set aside with a label.
        score, full_depth: accuracy of early exit and of full depth on the labelled judges, in percent (for tasks of
            GLUE, their metric); without any, how often the two agree.
        lost: percent of the judging texts whose answer early exit changed, unless a label says that full depth was
            wrong there.
        share: of the layers that run, from 0 to 1; with exits 0 and last, the share of the texts sent to the model.
        temperatures, weights: (K,), of `exits`; a weight is how much exit 0's answer counts there.
        per_class: precision, recall and f1 in percent, and support, the number of rows: (C,) each.
        precision: of the logits.
    """

    id: str | None = None
    threshold: float
    exits: list[int]
    goal: Goal
    choosing_texts: int
    judging_texts: int
    labelled_judges: int
    score: float
    score_interval: list[float] | None
    full_depth: float
    full_depth_interval: list[float] | None
    lost: float
    lost_interval: list[float] | None
    share: float
    share_interval: list[float] | None
    temperatures: list[float]
    weights: list[float]
    per_class: dict
    precision: str

    @property
    def rule(self) -> CombinedRule:
        """The rule of `exits`."""
        temperatures = torch.tensor(self.temperatures, dtype=torch.float32, device="cpu")
        weights = torch.tensor(self.weights, dtype=torch.float32, device="cpu")
        return CombinedRule(len(self.per_class["support"]), temperatures, weights)

    @property
    def promise(self) -> str:
        """What the judges saw and what is promised, in words; "" if all texts run to the last exit."""
        if self.threshold == 1:
            return ""
        goal, count = self.goal, round(self.lost * self.judging_texts / 100)
        at_most = "at most " * (self.judging_texts > self.labelled_judges)  # a missing label only adds to the count
        answers = f"{at_most}{count:,} answer{'s' * (count != 1)}"
        words = f"On {self.judging_texts:,} of your texts that the model had not seen, early exit lost {answers} that "
        words += "the full model had right."
        if goal.max_share is None:
            words += f" In the long run at most {goal.max_lost:g} in 100 new texts like these are lost, {goal.sure:g}%"
            words += " sure."
        if self.labelled_judges and self.score_interval:  # of accuracy alone
            words += (
                f" Of {self.labelled_judges:,} labelled ones the full model had {self.full_depth:.1f} of 100 right,"
            )
            words += f" early exit {self.score:.1f}."
        return words

    def shortfall(self, set_aside: float = 1.0) -> str:
        """A line if the goal is out of reach, or only full depth can be promised, with the rows that it takes; or "".

        `set_aside` is the share of labelled rows that validates.
        """
        if self.goal.max_share is not None:
            if self.share <= self.goal.max_share + ROUNDING:
                return ""
            return f"at most {self.goal.max_share:g} of the layers is out of reach: the fastest takes {self.share:.3g}"
        if self.threshold < 1:
            return ""
        problem, needed = "nothing faster than full depth can be promised", texts_needed(self.goal)
        if self.judging_texts >= needed[-1]:
            return f"{problem}: too many of {self.judging_texts:,} texts are lost"
        kind, share, judges = "labelled rows", set_aside, 0
        unlabelled_would_do = needed[-1] <= MOST_JUDGES * (CHOOSING - 1) // CHOOSING
        if self.judging_texts > self.labelled_judges and unlabelled_would_do:  # more of those that are cheap
            kind, share, judges = "more rows without a label", 1 / UNLABELLED_PER_JUDGE, self.judging_texts
        rows = [math.ceil(math.ceil(max(1, n - judges) * CHOOSING / (CHOOSING - 1)) / share) for n in needed]
        enough = f"{rows[0]:,} {kind} would do where none is lost, {rows[1]:,} and {rows[2]:,} where one or two are"
        return f"{problem}: {self.judging_texts:,} texts judged. Some {enough}"

    def in_words(self, num_exits: int, set_aside: float = 1.0) -> str:
        """The promise of a model with `num_exits` exits, or why nothing faster than full depth can be promised."""
        if num_exits == 1:
            return "the model has one exit alone"
        return self.promise or self.shortfall(set_aside) or "all texts run to the last exit, and none is lost"


def stated(places: Sequence[int], threshold: float, judges: Outputs, with_score: Outputs) -> dict:
    """Measure early exit with the exits at some places, counted from 0. Returns values of an `OperatingPoint`.

    `lost` and `share` are those of the `judges`, which have all labels (`filled`). `score`, `full_depth` and
    `per_class` are those of the rows `with_score`. Both have calibrated logits.
    """
    _, (answers,), (costs,) = judges.decide_at(places, [threshold])
    lost, costs = lost_texts(judges, answers), by_text(judges, costs)  # (T,) each
    ends = judges.exits.keep_exits(places).costs(threshold)
    point = {
        "judging_texts": len(lost),
        "lost": 100 * float(lost.mean()),
        "lost_interval": wilson(lost),
        "share": float(costs.mean()),
        "share_interval": around_mean(costs, ends[0], ends[-1]),
    }
    if threshold == 1:  # all answers are full depth's, at one cost
        point |= {"lost_interval": [0.0, 0.0], "share_interval": [ends[-1], ends[-1]]}
    _, (answers,), _ = with_score.decide_at(places, [threshold])
    labels, full_depth = with_score.labels.numpy(), with_score.logits[-1].argmax(-1).numpy()
    for name, predictions in (("score", answers), ("full_depth", full_depth)):
        if with_score.metric == "accuracy":
            right = by_text(with_score, predictions == labels)  # half, if one of a text's two labels is right
            point |= {name: 100 * float(right.mean()), f"{name}_interval": wilson(right)}
        else:
            point |= {name: float(score(predictions, labels, with_score.metric)), f"{name}_interval": None}
    return point | {"per_class": classification_report(answers, labels, with_score.logits.shape[-1])}


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
    widened, mean = np.append(values, [least, most]), values.mean()
    half = Z * widened.std() / math.sqrt(len(widened))
    return [float(min(mean, max(least, widened.mean() - half))), float(max(mean, min(most, widened.mean() + half)))]
