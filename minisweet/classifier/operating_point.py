"""What is deployed of a run: which exits are asked, when a text leaves, and what is promised of new text, in words."""

import math
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import torch

from minisweet.adaptive import ExitRule
from minisweet.base.commands import Options, number, option
from minisweet.base.files import InputError
from minisweet.classifier.split import JUDGE_IN, MOST_JUDGES

CHOOSING = 4  # of so many validation texts one chooses, and the others judge
ROUNDING = 1e-9  # of shares


@dataclass(frozen=True, kw_only=True)
class Goal(Options):
    """What is wanted of what is deployed: that little is lost, or else that little is run."""

    max_lost: float = option(3.0, number(0.01, 99.99), "at most so many of 100 texts are lost (default: 3)")
    sure: float = option(90.0, number(50, 99.9), "how sure of that, in percent (default: 90)")
    max_share: float | None = option(None, number(0, 1), "in its place: at most this share of the layers, from 0 to 1")

    def changed(self, max_lost: float | None, sure: float | None, max_share: float | None) -> "Goal":
        """The goal by what is given anew; None leaves it as it is. Raises InputError where both kinds are given."""
        if max_lost is not None and max_share is not None:
            raise InputError(f"{max_share!r:.60}, and max_lost is given too; should be one of both", "max_share")
        if max_share is None and max_lost is sure is None:
            return self
        of_lost = self.max_lost if max_lost is None else max_lost
        return Goal(max_lost=of_lost, sure=self.sure if sure is None else sure, max_share=max_share)

    def as_json(self) -> dict[str, float]:
        """The goal as operating.json has it: {"max_lost": P, "sure": S}, or {"max_share": s}."""
        names = ("max_lost", "sure") if self.max_share is None else ("max_share",)
        return {name: float(getattr(self, name)) for name in names}


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """What is deployed, and what may be expected of it on new text, as operating.json has it.

    Each `..._interval` is a 95% interval, its two ends, or None.

    Attributes:
        id: of the run.
        threshold: a text leaves at the first exit whose confidence, from 0 to 1, reaches it.
        exits: the layers of those that are asked, counted from 1; 0 is exit 0, a bag of words.
        goal: {"max_lost": P, "sure": S}, in percent, or {"max_share": s}, from 0 to 1.
        choosing_texts, judging_texts: how many texts, which the model had not learnt, chose it and judged it.
        labelled_judges: how many judges were set aside with a label.
        score, full_depth: what early exit and the whole model have right of the labelled judges, in percent (for
            tasks of GLUE, their metric); without any, in how many they agree.
        lost: of 100 judging texts, those where early exit changed the whole model's answer, and no label says that
            this was wrong.
        share: of the layers that run, from 0 to 1; with exits 0 and last, the share of the texts sent to the model.
        temperatures, weights: of `exits`; a weight is how much exit 0's answer counts there.
        per_class: precision, recall and f1 in percent, and support, the rows of a class: (C,) each.
        precision: in which the logits were computed.
    """

    id: str | None = None
    threshold: float
    exits: list[int]
    goal: dict[str, float]
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
    def rule(self) -> ExitRule:
        """When a text leaves at which of the exits."""
        its = (torch.tensor(part, dtype=torch.float32, device="cpu") for part in (self.temperatures, self.weights))
        return ExitRule(len(self.per_class["support"]), *its)

    @property
    def promise(self) -> str:
        """What the judges saw and what is promised, in words; "" where all texts run to the last exit."""
        if self.threshold == 1:
            return ""
        lost = f"{(n := round(self.lost * self.judging_texts / 100)):,} answer{'s' * (n != 1)}"
        said = (
            f"On {self.judging_texts:,} of your texts that the model had not seen, early exit lost at most {lost} that "
        )
        said += "the full model had right."
        if "max_lost" in self.goal:
            said += f" In the long run at most {self.goal['max_lost']:g} in 100 new texts like these are lost, "
            said += f"{self.goal['sure']:g}% sure."
        if self.labelled_judges and self.score_interval:  # of accuracy alone
            said += (
                f" Of labelled ones the full model had {self.full_depth:.1f} of 100 right, early exit {self.score:.1f}."
            )
        return said

    def shortfall(self, set_aside: float = 1.0) -> str:
        """A line where a goal is out of reach, or only full depth can be promised; else "".

        It says how many rows would do. Of labelled rows a share is set aside: 1 where they have a file of their own.
        """
        if "max_share" in self.goal:
            wanted = f"at most {self.goal['max_share']:g} of the layers is out of reach"
            is_reached = self.share <= self.goal["max_share"] + ROUNDING
            return "" if is_reached else f"{wanted}: the fastest takes {self.share:.3g}"
        if self.threshold < 1:
            return ""
        needed, only = texts_needed(self.goal), "nothing faster than full depth can be promised"
        if self.judging_texts >= needed[-1]:
            return f"{only}: too many of {self.judging_texts:,} texts are lost"
        kind, share, there = "labelled rows", set_aside, 0
        few_enough = needed[-1] <= MOST_JUDGES * (CHOOSING - 1) // CHOOSING
        if self.judging_texts > self.labelled_judges and few_enough:  # more of those that are cheap
            kind, share, there = "more rows without a label", 1 / JUDGE_IN, self.judging_texts
        rows = [math.ceil(math.ceil(max(1, n - there) * CHOOSING / (CHOOSING - 1)) / share) for n in needed]
        would = f"{rows[0]:,} {kind} would do where none is lost, {rows[1]:,} and {rows[2]:,} where one or two are"
        return f"{only}: {self.judging_texts:,} texts judged. Some {would}"

    def in_words(self, exits: int, set_aside: float = 1.0) -> str:
        """What is promised of new text by a model of so many exits; or why nothing faster than full depth can be."""
        if exits == 1:
            return "the model has one exit alone"
        return self.promise or self.shortfall(set_aside) or "all texts run to the last exit, and none is lost"


def how_sure(texts: int, lost: np.ndarray, share: float) -> np.ndarray:
    """How sure it is, from 0 to 1, that in the long run at most a share of texts is lost, where `lost` of them were.

    This is the exact binomial test, 1 - P(Binomial(texts, share) <= lost): (M,) to (M,).
    """
    k = torch.arange(max(lost) + 1, dtype=torch.float64)
    ways = math.lgamma(texts + 1) - torch.lgamma(k + 1) - torch.lgamma(texts - k + 1)  # logarithms
    chances = (ways + torch.xlogy(k, share) + torch.special.xlog1py(texts - k, -share)).exp()
    return (1 - chances.cumsum(0)).numpy()[lost]


def texts_needed(goal: dict[str, float]) -> list[int]:
    """How many texts must judge to promise something where none, one or two of them are lost."""
    tests = [lambda n, lost=lost: how_sure(n, [lost], goal["max_lost"] / 100)[0] for lost in range(3)]
    return [bisect_left(range(10**9), goal["sure"] / 100, lost + 1, key=test) for lost, test in enumerate(tests)]
