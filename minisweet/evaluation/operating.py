"""The operating point: the exits to ask, the confidence at which a text leaves, and what to expect on new text.

The best of many is a lucky one: it looks better than it is, on the rows that picked it. So some rows choose, and others
judge. The distinct validation texts are dealt out, class by class. A quarter of them *chooses*: it fits the
temperatures, and picks the exits that are worth asking. Three quarters *judge*: they walk to the threshold, and all
that is stated of new text is computed from them alone. A text that the model was trained on does neither.

The judges walk down the thresholds from 1, which is full depth: all texts run to the last exit. The lower, the faster.
With --speed S they stop at the first threshold at which no more than a share S of the layers runs. For a promise ("at
most P points are lost, 70% sure") they stop before the first at which they are not sure, even if a lower one would be
sure again: fixed-sequence testing (Learn then Test: Angelopoulos et al. 2021, https://arxiv.org/abs/2110.01052; for
early exits: Jazbec et al. 2024, https://arxiv.org/abs/2405.20915). So they never pick the best of several thresholds.

How sure are they? Other texts could have been drawn. The Bayesian bootstrap (Rubin 1981) imitates that: it gives each
judging text a random weight, 2,000 times, and computes the loss anew each time. 70% sure means that the loss is at
most P in 70% of these reweightings. Over many sets of validation texts, about 30% of such promises are broken at most
(.github/results/promises.md). The middle 95% of a number's values are its interval.

All rows of a text share its weight. And what happened to none of the judges may still happen: so texts are made up, one
where it is asked how sure the judges are, and two in the intervals.

Dimension letters: K exits, k of them that are asked, N rows, M thresholds, R reweightings.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from minisweet.adaptive import ExitRule, in_float32
from minisweet.evaluation.answers import AnsweredRows
from minisweet.evaluation.metrics import classification_report, has_labels, score

PARTS = 4  # one part of so many chooses
R = 2000
ROUNDING = 1e-4  # of float32, in points
# Made-up rows: the label, full depth's answer and early exit's.
LOST, WON = (1, 1, 0), (0, 1, 0)  # by early exit, to full depth
RIGHT, WRONG = (1, 1, 1), (0, 1, 1)  # by both


class Sides(NamedTuple):
    """Numbers of the validation rows that choose, and of those that judge. Without new texts both are empty."""

    choosing: np.ndarray  # (n,)
    judging: np.ndarray  # (m,)
    trained_rows: int | None  # how many do neither, since they were trained on; None where that is not known


def trained_on(answered: AnsweredRows, trained: list[int] | None) -> np.ndarray:
    """Whether each row's text was trained on: (N,). `trained` are the keys of such texts, as far as they are known."""
    return np.isin(answered.keys.numpy(), trained or [])


def deal(answered: AnsweredRows, trained: list[int] | None = None) -> Sides:
    """Deal out the rows; those of one text go to one side. `trained` is that of `trained_on`."""
    is_known = trained_on(answered, trained)
    rows = np.flatnonzero(~is_known)
    part = answered.take(rows).parts(PARTS)
    return Sides(rows[part == 0], rows[part > 0], trained_rows=None if trained is None else int(is_known.sum()))


def operating_point(
    answered: AnsweredRows, goal: dict[str, float], sides: Sides, asked: list[int] | None = None
) -> tuple[ExitRule, dict]:
    """The rule for new text, of all K exits, and what evaluation.json's `operating_point` (see `OperatingPoint`) holds.

    Args:
        answered: what the exits said of the validation rows.
        goal: of `goal_of`.
        sides: of `deal`. Where nobody judges, all rows choose and state, and the threshold of a promise is 1.
        asked: layers of the exits to ask, the last one's among them; None to choose those that reach the goal fastest.
    """
    layers, somebody_judges = list(answered.exits.layers), len(sides.judging) > 0
    choosers, judges = (answered.take(rows) if somebody_judges else answered for rows in sides[:2])
    rule = choosers.fit_rule()
    # what changes is what disagrees with full depth
    of_goal = [rows.against_full_depth() if "max_change" in goal else rows for rows in (choosers, judges)]
    exits = choose_exits(rule, of_goal[0], goal) if asked is None else [layers.index(n) for n in asked]
    threshold, share = 1.0, answered.exits_at(exits).costs(1.0)[-1]
    if somebody_judges or "speed" in goal:
        threshold, share, _ = walk(rule, of_goal[1], goal, exits, thresholds_of(rule, choosers, exits))
    if "speed" not in goal and asked is None and share > layers[-1] / answered.exits.depth + 1e-9:
        threshold, exits = 1.0, [len(layers) - 1]  # what is asked in vain costs more than leaving early saves
    point = {"threshold": threshold, "asked_exits": [layers[k] for k in exits], "goal": goal}
    point |= stated(rule, judges, exits, threshold)
    point["reached"] = point["speedup_ratio"] <= goal.get("speed", math.inf) + 1e-9
    texts = (len(answered.take(rows).keys.unique()) for rows in sides[:2])
    point |= dict(zip(("choosing_texts", "judging_texts"), texts, strict=True))
    return rule, point | {"trained_rows": sides.trained_rows}


def thresholds_of(rule: ExitRule, choosers: AnsweredRows, exits: Sequence[int]) -> np.ndarray:
    """The thresholds that are tried, some hundred, in increasing order: (M,). The last is 1.

    They lie halfway between confidences of the choosing rows, so that rounding seldom flips a row. The first is
    just above the lowest confidence: all leave at the first exit, but texts without a word that exit 0 knows.
    """
    if len(exits) == 1:  # nobody can leave early
        return np.ones(1)
    occur = np.unique(rule.confidences(choosers.logits, choosers.certainty)[list(exits[:-1])].double().numpy())
    least = in_float32(rule.lowest + (1e-6 if rule.ranges is None else 0.0))
    between = np.float32((occur[1:] + occur[:-1]) / 2)
    between = between[(between > least) & (between < 1)]
    return np.concatenate([[least], between[:: max(1, len(between) // 100)], [1.0]])


def choose_exits(rule: ExitRule, choosers: AnsweredRows, goal: dict) -> list[int]:
    """The exits (k,), from 0, with which the choosing rows reach a goal best, without asking how sure they are.

    To the last exit it adds the one that helps most, as long as one helps: an exit may cost more than it gives.
    """
    goal = {name: value for name, value in goal.items() if name != "sure"}

    def ranked(exits: list[int]) -> tuple[tuple[float, float], list[int]]:
        """The exits, after what compares them: the smaller the better."""
        _, share, value = walk(rule, choosers, goal, exits, thresholds_of(rule, choosers, exits))
        return (max(0.0, share - goal["speed"]) if "speed" in goal else share, -value), exits

    last = len(choosers.logits) - 1
    best = ranked([last])
    while larger := [sorted([*best[1], k]) for k in range(last) if k not in best[1]]:
        better = min(map(ranked, larger))
        if better[0] >= best[0]:
            break
        best = better
    return best[1]


def walk(
    rule: ExitRule, rows: AnsweredRows, goal: dict, exits: list[int], thresholds: np.ndarray
) -> tuple[float, float, float]:
    """Where rows stop on their way down the thresholds (M,): the threshold, the share of the layers, and the score.

    Where a goal does not say how sure they must be, it is enough that these rows lose no more than its limit.
    """
    _, answers, costs = rows.decide_at(rule, exits, thresholds)
    shares, scores = costs.mean(1), score(answers, rows.labels.numpy(), rows.metric)  # (M,) each
    if "speed" in goal:
        fast = np.flatnonzero(shares <= goal["speed"] + 1e-9)
        m = fast[-1] if len(fast) else 0  # the slowest that is fast enough, or the fastest that there is
    else:
        is_kept = scores >= scores[-1] - limit_of(goal) - ROUNDING
        if "sure" in goal:
            is_kept = how_sure(rows, answers, limit_of(goal)) >= goal["sure"]
        lost = np.flatnonzero(~is_kept[:-1])  # the last threshold is full depth
        m = lost[-1] + 1 if len(lost) else 0  # from 1 down, the last one before the first that loses too much
    return float(thresholds[m]), float(shares[m]), float(scores[m])


def limit_of(goal: dict[str, float]) -> float:
    """How many points may be lost, or percent of the answers changed."""
    return goal["max_loss"] if "max_loss" in goal else goal["max_change"]


def how_sure(judges: AnsweredRows, answers: np.ndarray, limit: float) -> np.ndarray:
    """How sure the judges are that early exit loses at most `limit` points, in percent: its answers (M, N) to (M,).

    One made-up text is lost. Where texts are lost and none is won, they are then as sure as the exact binomial test.
    """
    label, full_depth, early = LOST
    labels, full = np.append(judges.labels, label), np.append(judges.logits[-1].argmax(-1), full_depth)
    answers, lost = np.pad(answers, [(0, 0), (0, 1)], constant_values=early), []
    for weights in reweighted(judges, 1):
        given = score(answers, labels, judges.metric, weights)  # (M, r)
        lost.append(score(full, labels, judges.metric, weights) - given)
    sure = 100 * (np.hstack(lost) <= limit + ROUNDING).mean(1)
    if judges.metric != "matthews":  # where no answer changes, the exact test itself: draws may miss it by a percent
        exact = 100 - 100 * (1 - min(limit, 100) / 100) ** len(judges.keys.unique())
        sure[(answers == full)[:, :-1].all(1)] = exact
    return sure


def reweighted(judges: AnsweredRows, made_up: int) -> Iterator[np.ndarray]:
    """Random weights of the rows and of some made-up texts, which have as many rows as others: (R, N + made_up).

    Rows of one text have one weight. The same texts get the same weights, in any order of the rows. They come in 20
    parts, since a file to test may have a million rows.
    """
    texts, text = np.unique(judges.keys.numpy(), return_inverse=True)
    of_row = np.append(text, len(texts) + np.arange(made_up))  # whose weight a row gets
    rows = np.append(np.ones(len(text)), np.full(made_up, len(text) / len(texts))).astype(np.float32)
    rng = np.random.default_rng(0)
    for _ in range(20):
        yield rng.standard_exponential((R // 20, len(texts) + made_up), np.float32)[:, of_row] * rows


def stated(rule: ExitRule, judges: AnsweredRows, exits: Sequence[int], threshold: float) -> dict:
    """What decisions give: scores in percent, loss in points, share of the layers; with `intervals` for new text.

    Macro F1 and the classes' own scores have none: with rare classes no kind that was tried holds often enough.
    """
    threshold = in_float32(threshold)
    _, (answers,), (costs,) = judges.decide_at(rule, exits, [threshold])
    labels, full = judges.labels.numpy(), judges.logits[-1].argmax(-1).numpy()
    early, full_depth = (float(score(given, labels, judges.metric)) for given in (answers, full))
    point = {"score": early, "full_depth_score": full_depth, "loss": full_depth - early}
    report = classification_report(answers, labels, judges.logits.shape[-1])
    point |= {"speedup_ratio": float(costs.mean()), "macro_f1": report["macro_f1"]}
    point["per_class"] = {key: report[key] for key in ("precision", "recall", "f1", "support")}
    all_costs = judges.exits_at(exits).costs(threshold)
    ends = all_costs[0], all_costs[-1]  # of the cheapest exit, and of the most expensive
    if threshold == 1 or threshold <= in_float32(rule.lowest):  # all take one exit
        ends = (all_costs[-1 if threshold == 1 else 0],) * 2
    found = intervals(judges, answers, np.append(costs, ends), may_differ=threshold < 1)
    names = ("score_interval", "full_depth_interval", "loss_interval", "speedup_interval")
    for name, (key, (low, high)) in zip(names, found.items(), strict=True):
        point[name] = [min(low, point[key]), max(high, point[key])]
    return point


def intervals(judges: AnsweredRows, answers: np.ndarray, costs: np.ndarray, may_differ: bool) -> dict:
    """The two ends of the 95% intervals of what `stated` tells: early exit's answers (N,) and costs (N + 2,).

    Two made-up texts join in: early exit loses one and wins the other, where its answers may differ from full depth's.
    For the share of the layers, one takes the cheapest exit and the other the most expensive: the last two costs.
    """
    labels, full, metric = judges.labels.numpy(), judges.logits[-1].argmax(-1).numpy(), judges.metric
    made_up = [LOST, WON] if may_differ else [RIGHT, WRONG]
    if not has_labels(metric):  # full depth is always right there
        made_up[1] = RIGHT
    gold, late, early = np.hstack([[labels, full, answers], np.transpose(made_up)])  # (N + 2,) each
    costs, found = costs.astype(np.float32), []
    for weights in reweighted(judges, 2):
        share = costs.min() + weights @ (costs - costs.min()) / weights.sum(1)
        found.append((score(early, gold, metric, weights), score(late, gold, metric, weights), share))
    scores, full_scores, shares = np.hstack(found)  # (R,) each
    drawn = {"score": scores, "full_depth_score": full_scores, "loss": full_scores - scores, "speedup_ratio": shares}
    return {key: np.quantile(values, [0.025, 0.975]).tolist() for key, values in drawn.items()}
