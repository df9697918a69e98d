"""What to deploy: the exits to ask, the confidence at which a text leaves, and what is promised of new text.

A text is *lost* where full depth is right and early exit is wrong. Where there are no labels, a text is *changed* where
early exit does not answer as full depth does. The goal is that at most P of 100 texts are lost, S% sure, or else that
at most a share of the layers runs. The distinct validation texts are dealt out, class by class. A quarter *chooses*:
it fits the temperatures, picks the exits that are worth asking, and names the thresholds to try. Three quarters *judge*
these thresholds, from 1, which is full depth, downwards: the lower, the faster. A text counts once.

Theorem. Model, goal and precision are fixed before a judge is looked at. If judging and new texts are independent draws
of different texts from one source, none trained on, then at most 100 - S of 100 validation samples give a promise that
is broken: a threshold at which more than P of 100 new texts are lost in the long run. (Why: on the way down there is a
first threshold that is too low. The exact binomial test passes it in at most 100 - S of 100 samples. In all others the
judges stop before it, and so take none that is too low.)

This is Learn then Test (Angelopoulos et al. 2021, https://arxiv.org/abs/2110.01052) with fixed-sequence testing, which
MAPIE calls `control_fwer` by "fixed_sequence". For early exits: Jazbec et al. 2024, https://arxiv.org/abs/2405.20915.

Dimension letters: N rows, T distinct texts, M thresholds.
"""

import math
from collections.abc import Collection, Sequence
from statistics import NormalDist

import numpy as np

from minisweet.adaptive import ExitRule, in_float32
from minisweet.data.own import ENOUGH_JUDGES
from minisweet.evaluation.calibration import fit_rule, fit_temperature
from minisweet.evaluation.metrics import classification_report, score
from minisweet.outputs import Outputs
from minisweet.runs.deployed import CHOOSING, ROUNDING, OperatingPoint, how_sure

Z = NormalDist().inv_cdf(0.975)  # of a 95% interval


def split(outputs: Outputs, known: Collection[int] = ()) -> tuple[np.ndarray, np.ndarray, int]:
    """The rows that choose, those that judge, and how many do neither, since their texts are `known`."""
    is_known = np.isin(outputs.keys.numpy(), np.array([*known], dtype=np.int64))
    rows = np.flatnonzero(~is_known)
    fold = outputs.take(rows).folds(CHOOSING)
    return rows[fold == 0], rows[fold > 0], int(is_known.sum())


def choose(
    outputs: Outputs,
    goal: dict,
    known: Collection[int] = (),
    exits: Sequence[int] | None = None,
    run_id: str | None = None,
) -> OperatingPoint:
    """What to deploy.

    Args:
        outputs: of the validation rows. Where fewer than 300 labelled texts would judge, and there are more without a
            label, these judge: at most P of 100 answers are changed.
        goal: {"max_lost": P, "sure": S}, both in percent, or {"max_share": share of the layers}.
        known: keys of texts that were trained on.
        exits: layers of the exits to ask, the last one's among them; None to choose those that reach the goal best.
        run_id: of the run.

    Where nobody judges, the threshold is 1, and all rows choose and state, without intervals.
    """
    sides = split(outputs, known)[:2]
    labelled, unlabelled = ([outputs.take(rows).labelled(there) for rows in sides] for there in (True, False))
    is_changed = labelled[1].texts < min(ENOUGH_JUDGES, unlabelled[1].texts)
    somebody_judges = min(rows.texts for rows in (unlabelled if is_changed else labelled)) > 0
    if not somebody_judges:
        labelled, unlabelled = ([outputs.labelled(there)] * 2 for there in (True, False))
        is_changed = labelled[0].texts == 0
    choosers, judges = [rows.against_full_depth() for rows in unlabelled] if is_changed else labelled
    rule = fit_rule(choosers)
    if is_changed:  # full depth's answers tell nothing of its own temperature
        rule.temperatures[-1] = fit_temperature(labelled[0].logits[-1], labelled[0].labels)
    layers = list(outputs.exits.layers)
    asked = choose_exits(rule, choosers, goal) if exits is None else [layers.index(n) for n in exits]
    threshold = 1.0
    if somebody_judges:
        threshold, share, _ = fixed_sequence(rule, judges, goal, asked, thresholds_of(rule, choosers, asked))
        if exits is None and "max_lost" in goal and share > layers[-1] / outputs.exits.depth + ROUNDING:
            threshold, asked = 1.0, [len(layers) - 1]  # what is asked in vain costs more than leaving early saves
    found = stated(rule, asked, threshold, judges, labelled[1] if labelled[1].texts else judges)
    found |= {"choosing_texts": choosers.texts}
    if not somebody_judges:
        found |= {"choosing_texts": 0, "judging_texts": 0} | {key: None for key in found if "_interval" in key}
    return OperatingPoint(
        id=run_id,
        threshold=threshold,
        exits=[layers[k] for k in asked],
        goal=goal,
        lost_means="changed" if is_changed else "lost",
        temperatures=rule.kept(asked).temperatures.tolist(),
        precision=outputs.precision,
        **found,
    )


def lost_texts(outputs: Outputs, answers: np.ndarray) -> np.ndarray:
    """Whether a text is lost, that is any of its rows, by early exit's answers: (..., N) to (..., T)."""
    labels, full_depth = outputs.labels.numpy(), outputs.logits[-1].argmax(-1).numpy()
    return outputs.of_texts((full_depth == labels) & (answers != labels)) > 0


def thresholds_of(rule: ExitRule, choosers: Outputs, asked: Sequence[int]) -> np.ndarray:
    """The thresholds that are tried, some hundred, in increasing order: (M,). The last is 1.

    They lie halfway between confidences of the choosing rows, so that rounding seldom flips a row. The first is
    just above the lowest confidence: all leave at the first exit, but texts without a word that exit 0 knows.
    """
    if len(asked) == 1:  # nobody can leave early
        return np.ones(1)
    occur = np.unique(rule.confidences(choosers.logits)[list(asked[:-1])].double().numpy())
    least = in_float32(rule.lowest + 1e-6)
    between = np.float32((occur[1:] + occur[:-1]) / 2)
    between = between[(between > least) & (between < 1)]
    return np.concatenate([[least], between[:: max(1, len(between) // 100)], [1.0]])


def choose_exits(rule: ExitRule, choosers: Outputs, goal: dict[str, float]) -> list[int]:
    """The exits, from 0, with which the choosing rows reach a goal best, without asking how sure they are.

    To the last exit it adds the one that helps most, as long as one helps: an exit may cost more than it gives.
    """

    def rank(asked: list[int]) -> tuple[float, float]:  # the smaller the better
        thresholds = thresholds_of(rule, choosers, asked)
        _, share, value = fixed_sequence(rule, choosers, goal | {"sure": 0}, asked, thresholds)
        return max(0.0, share - goal.get("max_share", 0.0)), -value

    last = len(choosers.logits) - 1
    asked = [last]
    while larger := [sorted([*asked, k]) for k in range(last) if k not in asked]:
        better = min(larger, key=rank)
        if rank(better) >= rank(asked):
            break
        asked = better
    return asked


def fixed_sequence(
    rule: ExitRule, rows: Outputs, goal: dict, asked: Sequence[int], thresholds: np.ndarray
) -> tuple[float, ...]:
    """Where rows stop on their way down the thresholds (M,): the threshold, the share of the layers, and the score.

    Where they must be 0% sure, it is enough that no more than P of 100 of these very texts are lost.
    """
    _, answers, costs = rows.decide_at(rule, asked, thresholds)
    shares, scores = rows.of_texts(costs).mean(1), score(answers, rows.labels.numpy(), rows.metric)  # (M,) each
    if "max_share" in goal:
        # the slowest that is fast enough, or the fastest that there is
        m = max(np.flatnonzero(shares <= goal["max_share"] + ROUNDING), default=0)
    else:
        lost, limit = lost_texts(rows, answers), goal["max_lost"] / 100  # (M, T)
        passes = lost.mean(1) <= limit + ROUNDING
        if goal["sure"]:
            passes = how_sure(lost.shape[1], lost.sum(1), limit) >= goal["sure"] / 100
        m = max(np.flatnonzero(~passes[:-1]), default=-1) + 1  # from 1 down, the last before the first that fails
    return float(thresholds[m]), float(shares[m]), float(scores[m])


def stated(rule: ExitRule, asked: Sequence[int], threshold: float, judges: Outputs, scored: Outputs) -> dict:
    """What early exit gives on some rows, each number with its 95% interval for new text.

    `lost` (percent of texts) and `share` (of the layers) are the judges', whose labels are full depth's answers where a
    changed text is lost. `score`, `full_depth` (percent) and `per_class` are of rows with labels, else of the judges.
    """
    _, (answers,), (costs,) = judges.decide_at(rule, asked, [threshold])
    lost, costs, ends = lost_texts(judges, answers), judges.of_texts(costs), judges.exits.take(asked).costs(threshold)
    point = {"judging_texts": len(lost), "lost": 100 * float(lost.mean()), "share": float(costs.mean())}
    point |= {"lost_interval": wilson(lost), "share_interval": around_mean(costs, ends[0], ends[-1])}
    if threshold == 1:  # all answers are full depth's, at one cost
        point |= {"lost_interval": [0.0, 0.0], "share_interval": [ends[-1], ends[-1]]}
    _, (answers,), _ = scored.decide_at(rule, asked, [threshold])
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
