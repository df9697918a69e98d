"""What to deploy: the exits to ask, the confidence at which a text leaves, and what is promised of new text.

A text is *lost* where full depth is right and early exit is wrong. Only texts whose two answers differ need a label.
Counted as lost is each text whose answer early exit changes, unless a label says that full depth was wrong there: never
fewer than are lost. The goal is that at most P of 100 texts are lost, S% sure, or else that at most a share of the
layers runs. The units of the validation rows, which are texts or groups of texts, are dealt out by a hash. A quarter
*chooses*: it fits the temperatures, picks the exits that are worth asking, names the thresholds to try, and says
whether texts without labels judge, too. Three quarters *judge* these thresholds, from 1, which is full depth,
downwards: the lower, the faster. Of a group one text judges.

Theorem. Model, goal and precision are fixed before a judge is looked at. If judging and new texts are independent draws
of different texts from one source, none trained on, then at most 100 - S of 100 validation samples give a promise that
is broken: a threshold at which more than P of 100 new texts are lost in the long run. (Why: on the way down there is a
first threshold that is too low. The exact binomial test passes it in at most 100 - S of 100 samples. In all others the
judges stop before it, and so take none that is too low. A label that is missing only adds to the count: whoever chose
which texts got one, in whatever order, and whenever they stopped, the judges stop no later.)

This is Learn then Test (Angelopoulos et al. 2021, https://arxiv.org/abs/2110.01052) with fixed-sequence testing, which
MAPIE calls `control_fwer` by "fixed_sequence". For early exits: Jazbec et al. 2024, https://arxiv.org/abs/2405.20915.

Dimension letters: N rows, T distinct texts, M thresholds.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from minisweet.adaptive import ExitRule, in_float32
from minisweet.texts import dealt, one_of_each
from minisweet.calibration import fit_rule
from minisweet.metrics import classification_report, score
from minisweet.outputs import Outputs
from minisweet.classifier.operating_point import CHOOSING, ROUNDING, OperatingPoint, how_sure

ENOUGH = 30  # labelled answers that differ, to say how often full depth is right there; with fewer, half count as right
Z = NormalDist().inv_cdf(0.975)  # of a 95% interval


def split(outputs: Outputs, known: Collection[int] = ()) -> tuple[np.ndarray, np.ndarray, int]:
    """The rows that choose, those that judge, and how many do neither, since a text of their unit is `known`.

    Units with a label and those without are dealt out by themselves.
    """
    keys, labels = outputs.keys.numpy(), outputs.labels.numpy()
    units = keys if outputs.units is None else outputs.units.numpy()
    is_known = np.isin(units, units[np.isin(keys, np.array([*known], dtype=np.int64))])
    has_label, chooses = np.isin(units, units[labels >= 0]), np.zeros(len(units), dtype=bool)
    for kind in (has_label & ~is_known, ~has_label & ~is_known):
        chooses[kind] = dealt(units[kind], math.ceil(len(np.unique(units[kind])) / CHOOSING), "choose")
    judging = np.flatnonzero(~chooses & ~is_known)
    return (np.flatnonzero(chooses), judging[one_of_each(units[judging], keys[judging])], int(is_known.sum()))


class Trial(NamedTuple):
    """What the choosing texts have chosen, before a judge is looked at."""

    rule: ExitRule  # of all exits; it has calibrated all logits
    asked: list[int]  # the exits to ask, from 0
    thresholds: np.ndarray  # (M,), to be tried
    choosers: Outputs
    judges: Outputs  # without a label where they had none
    somebody_judges: bool


def prepare(
    outputs: Outputs, goal: dict, known: Collection[int], exits: Sequence[int] | None = None, combine: bool = False
) -> Trial:
    """Choose all that the judges try; for the arguments see `choose`."""
    choosing, judging, _ = split(outputs, known)
    somebody_judges = min(len(choosing), len(judging)) > 0
    rule, layers = fit_rule(outputs.take(choosing) if somebody_judges else outputs, combine), list(outputs.exits.layers)
    choosers = judges = outputs.by(rule)
    if somebody_judges:
        choosers, judges = choosers.take(choosing), judges.take(judging)
    if not all_judge(choosers, judges, goal):
        choosers, judges = choosers.labelled(), judges.labelled()
    always = [0, len(layers) - 1] if rule.needs_exit_0 else [len(layers) - 1]
    asked = choose_exits(choosers.filled(), goal, always) if exits is None else [layers.index(n) for n in exits]
    return Trial(rule, asked, thresholds_of(choosers, asked), choosers, judges, somebody_judges)


def choose(
    outputs: Outputs,
    goal: dict,
    known: Collection[int] = (),
    exits: Sequence[int] | None = None,
    labels: Mapping[int, int] | None = None,
    combine: bool = False,
) -> OperatingPoint:
    """What to deploy.

    Args:
        outputs: of the validation rows.
        goal: {"max_lost": P, "sure": S}, both in percent, or {"max_share": share of the layers}.
        known: keys of texts that were trained on.
        exits: layers of the exits to ask, the last one's among them; None to choose those that reach the goal best.
        labels: classes of judging texts that had none, by their keys.
        combine: whether exit 0 has a say at later exits.

    Where nobody judges, the threshold is 1, and all rows choose and state, without intervals.
    """
    rule, asked, thresholds, choosers, judges, somebody_judges = prepare(outputs, goal, known, exits, combine)
    layers, judged = list(outputs.exits.layers), judges.filled(labels)
    threshold = 1.0
    if somebody_judges:
        threshold, share, _ = fixed_sequence(judged, goal, asked, thresholds)
        if exits is None and "max_lost" in goal and share > layers[-1] / outputs.exits.depth + ROUNDING:
            threshold = 1.0  # what is asked in vain costs more than leaving early saves
            asked = [0, len(layers) - 1] if rule.needs_exit_0 else [len(layers) - 1]
    found = stated(asked, threshold, judged, judges.scored())
    found |= {"choosing_texts": choosers.texts, "labelled_judges": judges.labelled().texts}
    is_open = (judges.labels < 0).numpy() & ~np.isin(judges.keys.numpy(), [*(labels or {})])
    if (lost_rows(judged, judged.decide_at(asked, [threshold])[1]) & is_open).any():
        found["lost_interval"][0] = 0.0  # full depth may be wrong there
    if not somebody_judges:
        none = dict.fromkeys(("choosing_texts", "judging_texts", "labelled_judges"), 0)
        found |= none | {key: None for key in found if "_interval" in key}
    its = rule.kept(asked)
    return OperatingPoint(
        threshold=threshold,
        exits=[layers[k] for k in asked],
        goal=goal,
        temperatures=its.temperatures.tolist(),
        weights=[0.0] * len(asked) if its.weights is None else its.weights.tolist(),
        precision=outputs.precision,
        **found,
    )


def all_judge(choosers: Outputs, judges: Outputs, goal: dict) -> bool:
    """Whether texts without labels judge, too: where that lets more texts leave, by what the choosing texts say.

    Let full depth be right in a share r of the answers that early exit changes. Then early exit may change k / (r a) of
    all answers where a labelled texts judge, of which k may be lost; and k' / (r a + b) where b others judge, too. The
    choosers and the two numbers alone decide it, so that labels which come later never change it.
    """
    a, b = judges.labelled().texts, judges.labelled(False).texts
    if "max_share" in goal or not a:
        return True
    k, more = (most_lost(texts, goal) for texts in (a, a + b))
    right = share_right(choosers) * a
    return more * right > k * (right + b)


def share_right(choosers: Outputs) -> float:
    """How often full depth is right where an earlier exit's answer is another one."""
    rows = choosers.labelled()
    answers = rows.logits.argmax(-1)  # (K, N)
    differ = answers[:-1] != answers[-1]
    count = int(differ.sum())
    return 0.5 if count < ENOUGH else float((differ & (answers[-1] == rows.labels)).sum()) / count


def most_lost(texts: int, goal: dict) -> int:
    """How many of so many judging texts may be lost; -1 where even none is too many."""
    return int((how_sure(texts, np.arange(texts + 1), goal["max_lost"] / 100) >= goal["sure"] / 100).sum()) - 1


def lost_rows(outputs: Outputs, answers: np.ndarray) -> np.ndarray:
    """Whether a row is lost by early exit's answers: (..., N) to (..., N)."""
    labels, full_depth = outputs.labels.numpy(), outputs.logits[-1].argmax(-1).numpy()
    return (full_depth == labels) & (answers != labels)


def lost_texts(outputs: Outputs, answers: np.ndarray) -> np.ndarray:
    """Whether a text is lost, that is any of its rows: (..., N) to (..., T)."""
    return outputs.of_texts(lost_rows(outputs, answers)) > 0


def thresholds_of(choosers: Outputs, asked: Sequence[int]) -> np.ndarray:
    """The thresholds that are tried, some hundred, in increasing order: (M,). The last is 1.

    They lie halfway between confidences of the choosing rows, so that rounding seldom flips a row. The first is
    just above the lowest confidence: all leave at the first exit, but texts without a word that exit 0 knows.
    """
    if len(asked) == 1:  # nobody can leave early
        return np.ones(1)
    rule = ExitRule(choosers.logits.shape[-1])
    occur = np.unique(rule.confidences(choosers.logits)[list(asked[:-1])].double().numpy())
    least = in_float32(rule.lowest + 1e-6)
    between = np.float32((occur[1:] + occur[:-1]) / 2)
    between = between[(between > least) & (between < 1)]
    return np.concatenate([[least], between[:: max(1, len(between) // 100)], [1.0]])


def choose_exits(choosers: Outputs, goal: dict[str, float], asked: list[int]) -> list[int]:
    """The exits, from 0, with which the choosing rows reach a goal best, without asking how sure they are.

    To those that are `asked` in any case it adds the one that helps most, as long as one helps: an exit may cost more
    than it gives.
    """

    def rank(asked: list[int]) -> tuple[float, float]:  # the smaller the better
        _, share, value = fixed_sequence(choosers, goal | {"sure": 0}, asked, thresholds_of(choosers, asked))
        return max(0.0, share - goal.get("max_share", 0.0)), -value

    while larger := [sorted([*asked, k]) for k in range(len(choosers.logits)) if k not in asked]:
        better = min(larger, key=rank)
        if rank(better) >= rank(asked):
            break
        asked = better
    return asked


def fixed_sequence(rows: Outputs, goal: dict, asked: Sequence[int], thresholds: np.ndarray) -> tuple[float, ...]:
    """Where rows stop on their way down the thresholds (M,): the threshold, the share of the layers, and the score.

    Where they must be 0% sure, it is enough that no more than P of 100 of these very texts are lost.
    """
    _, answers, costs = rows.decide_at(asked, thresholds)
    shares, scores = rows.of_texts(costs).mean(1), score(answers, rows.labels.numpy(), rows.metric)  # (M,) each
    if "max_share" in goal:
        # the slowest that is fast enough, or the fastest that there is
        m = max(np.flatnonzero(shares <= goal["max_share"] + ROUNDING), default=0)
    else:
        lost = lost_texts(rows, answers)  # (M, T)
        m = way_down(lost.sum(1), lost.shape[1], goal)
    return float(thresholds[m]), float(shares[m]), float(scores[m])


def way_down(lost: np.ndarray, texts: int, goal: dict) -> int:
    """The last threshold, from 1 downwards, before the first that fails, where `lost` (M,) are lost: from 0 to M-1."""
    limit = goal["max_lost"] / 100
    passes = how_sure(texts, lost, limit) >= goal["sure"] / 100 if goal["sure"] else lost <= texts * (limit + ROUNDING)
    return max(np.flatnonzero(~passes[:-1]), default=-1) + 1


def stated(asked: Sequence[int], threshold: float, judges: Outputs, scored: Outputs) -> dict:
    """What early exit gives on some rows of calibrated logits, each number with its 95% interval for new text.

    `lost` (percent of texts) and `share` (of the layers) are those of the judges, which all have a label, or full
    depth's answer in its place. `score`, `full_depth` (percent) and `per_class` are those of the `scored` rows.
    """
    _, (answers,), (costs,) = judges.decide_at(asked, [threshold])
    lost, costs, ends = lost_texts(judges, answers), judges.of_texts(costs), judges.exits.take(asked).costs(threshold)
    point = {"judging_texts": len(lost), "lost": 100 * float(lost.mean()), "share": float(costs.mean())}
    point |= {"lost_interval": wilson(lost), "share_interval": around_mean(costs, ends[0], ends[-1])}
    if threshold == 1:  # all answers are full depth's, at one cost
        point |= {"lost_interval": [0.0, 0.0], "share_interval": [ends[-1], ends[-1]]}
    _, (answers,), _ = scored.decide_at(asked, [threshold])
    labels, full_depth = scored.labels.numpy(), scored.logits[-1].argmax(-1).numpy()
    for name, given in (("score", answers), ("full_depth", full_depth)):
        point |= {name: float(score(given, labels, scored.metric)), f"{name}_interval": None}
        if scored.metric == "accuracy":
            right = scored.of_texts(given == labels)  # of a text with two labels, half
            point |= {name: 100 * float(right.mean()), f"{name}_interval": wilson(right)}
    return point | {"per_class": classification_report(answers, labels, scored.logits.shape[-1])}


def wilson(values: np.ndarray) -> list[float]:
    """The 95% interval of a proportion, in percent: Wilson's with continuity correction, of values (T,) from 0 to 1."""
    count, n = values.sum(), len(values)
    k = np.array([count - 0.5, count + 0.5])
    low, high = (k + Z**2 / 2 + np.array([-Z, Z]) * np.sqrt(k * (n - k) / n + Z**2 / 4)) / (n + Z**2)
    return [100 * float(min(low, count / n)), 100 * float(max(high, count / n))]


def around_mean(values: np.ndarray, least: float, most: float) -> list[float]:
    """The 95% interval of a mean: the normal one, of values (T,) and of two made-up texts at either end."""
    some, mean = np.append(values, [least, most]), values.mean()
    half = Z * some.std() / math.sqrt(len(some))
    return [float(min(mean, max(least, some.mean() - half))), float(max(mean, min(most, some.mean() + half)))]
