"""Choosing what to deploy: the threshold at which a text leaves.

The units of the validation rows, which are texts or groups of texts, are split by a hash. A quarter *chooses*: it fits
the rule of the exits, picks the thresholds to try, and decides whether unlabelled texts join the judges. Three quarters
*judge* the thresholds (promise.py). One text of each group judges.
"""

import math
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from minisweet.adaptive import in_float32
from minisweet.classifier.combined_rule import CombinedRule, fit_combined_rule
from minisweet.classifier.operating_point import CHOOSING, OperatingPoint, measure
from minisweet.classifier.promise import (
    BOTH,
    Goal,
    filled,
    fixed_sequence,
    labelled,
    lost_rows,
    most_lost,
)
from minisweet.classifier.split import dealt, one_of_each
from minisweet.outputs import Outputs

ENOUGH = 30  # labelled answers that early exit changes; with fewer, full depth counts as right in half of them


def choosers_and_judges(outputs: Outputs, known: Collection[int] = ()) -> tuple[np.ndarray, np.ndarray, int]:
    """The rows that choose, the rows that judge, and how many do neither, since a text of their unit is `known`.

    Units with a label and units without are split separately.
    """
    keys, labels = outputs.keys.numpy(), outputs.labels.numpy()
    units = keys if outputs.units is None else outputs.units.numpy()
    is_known = np.isin(units, units[np.isin(keys, np.array([*known], dtype=np.int64))])
    has_label = np.isin(units, units[labels >= 0])
    chooses = np.zeros(len(units), dtype=bool)
    for kind in (has_label & ~is_known, ~has_label & ~is_known):
        chooses[kind] = dealt(units[kind], math.ceil(len(np.unique(units[kind])) / CHOOSING), "choose")
    judging = np.flatnonzero(~chooses & ~is_known)
    return np.flatnonzero(chooses), judging[one_of_each(units[judging], keys[judging])], int(is_known.sum())


class Trial(NamedTuple):
    """What the choosing texts decide before anyone looks at a judging text."""

    rule: CombinedRule  # it has calibrated the logits of choosers and judges
    thresholds: np.ndarray  # (M,), to be tried
    choosers: Outputs
    judges: Outputs  # with -1 for missing labels
    has_judges: bool  # if not, all rows choose and judge
    left_out: int  # rows that do neither, see `choosers_and_judges`


def prepare(outputs: Outputs, goal: Goal, known: Collection[int], combines: bool = False) -> Trial:
    """Choose everything that the judges try. For the arguments see `choose`."""
    choosing, judging, left_out = choosers_and_judges(outputs, known)
    has_judges = min(len(choosing), len(judging)) > 0
    if not has_judges:
        choosing = judging = np.arange(len(outputs.labels))
    rule = fit_combined_rule(outputs.take(choosing), combines)
    calibrated = outputs.by(rule)
    choosers, judges = calibrated.take(choosing), calibrated.take(judging)
    if not unlabelled_judge(choosers, judges, goal):
        choosers, judges = labelled(choosers), labelled(judges)
    return Trial(rule, thresholds_to_try(choosers), choosers, judges, has_judges, left_out)


def choose(outputs: Outputs, goal: Goal, known: Collection[int] = (), combines: bool = False) -> OperatingPoint:
    """Choose what to deploy, from the outputs of the validation rows.

    `known` are keys of texts that were trained on. `combines` says whether the bag of words contributes to full depth.
    If no text judges, the threshold is 1, and what is stated is that of all rows, without intervals.
    """
    rule, thresholds, choosers, judges, has_judges, _ = prepare(outputs, goal, known, combines)
    judged = filled(judges)
    threshold = fixed_sequence(judged, goal, thresholds) if has_judges else 1.0
    point = measure(threshold, judges)
    point["choosing_texts"] = len(choosers.keys.unique())
    point["labelled_judges"] = len(judges.keys[judges.labels >= 0].unique())
    _, answers, _ = judged.decide_at(BOTH, [threshold])  # (1, N)
    if (lost_rows(judged, answers) & (judges.labels < 0).numpy()).any():
        point["lost_interval"][0] = 0.0  # full depth may be wrong there
    if not has_judges:
        point |= dict.fromkeys(("choosing_texts", "judging_texts", "labelled_judges"), 0)
        point |= {name: None for name in point if name.endswith("_interval")}
    point |= {"temperatures": rule.temperatures.tolist(), "weights": rule.weights.tolist()}
    return OperatingPoint(threshold=threshold, goal=goal, precision=outputs.precision, **point)


def thresholds_to_try(choosers: Outputs) -> np.ndarray:
    """About a hundred thresholds in increasing order, (M,). The last one is 1.

    They lie halfway between confidences of the choosing rows, so that rounding seldom changes an answer. At the first,
    just above the lowest confidence, all texts leave at the bag of words, except those without a word that it knows.
    """
    bag_logits = choosers.logits[0]  # (N, C)
    confidences = np.unique(bag_logits.softmax(-1).amax(-1).double().numpy())
    least = in_float32(1 / bag_logits.shape[1] + 1e-6)
    between = np.float32((confidences[1:] + confidences[:-1]) / 2)
    between = between[(between > least) & (between < 1)]
    return np.concatenate([[least], between[:: max(1, len(between) // 100)], [1.0]])


def unlabelled_judge(choosers: Outputs, judges: Outputs, goal: Goal) -> bool:
    """Whether unlabelled texts judge too, because more texts can leave early then.

    Let full depth be right in a share r of the answers that early exit changes. Early exit may change k / (r `a`) of
    all answers if `a` labelled texts judge, of which k may be lost; and k' / (r `a` + `b`) if `b` unlabelled ones judge
    too. Only the choosing texts, `a` and `b` decide.
    """
    a, b = (len(judges.keys[there].unique()) for there in (judges.labels >= 0, judges.labels < 0))
    if not a:
        return True
    right = share_right(choosers) * a
    return most_lost(a + b, goal) * right > most_lost(a, goal) * (right + b)


def share_right(choosers: Outputs) -> float:
    """How often full depth is right where the bag's answer differs from it."""
    rows = labelled(choosers)
    early, full = rows.logits.argmax(-1)  # (N,) each
    differ = early != full
    count = int(differ.sum())
    return 0.5 if count < ENOUGH else float((differ & (full == rows.labels)).sum()) / count
