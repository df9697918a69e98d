"""The operating point: the threshold to deploy for a wish, and what may be expected of it on new text.

A certified threshold keeps what it promises by fixed-sequence testing (Learn then Test: Angelopoulos et al. 2021,
https://arxiv.org/abs/2110.01052; for early exits: Jazbec et al. 2024, https://arxiv.org/abs/2405.20915).

Dimension letters: K exits, N instances, C classes, M candidate thresholds.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minisweet.adaptive import ExitRule, exits_taken
from minisweet.base.commands import Parser, number
from minisweet.evaluation.metrics import classification_report, matthews
from minisweet.evaluation.sweep import SEED, Validation
from minisweet.runs.records import Evaluation

SLACK = 1e-9  # of rounding
NORMAL = 1.959964  # 97.5% quantile: of 95% intervals


def add_wish_options(parser: Parser, title: str):
    """Add the options that `wish_of` reads, of which one is given; returns what adds another one of them."""
    group = parser.add_argument_group(title)
    wish = group.add_mutually_exclusive_group().add_argument
    wish("--max-loss", type=number(0, 200), metavar="P", help="the fastest that loses at most so many points")
    wish("--speed", type=number(0, 1), metavar="S", help="the best score at no more than this share of the layers")
    change = "the fastest that changes at most so many percent of full depth's answers, certified"
    wish("--max-change", type=number(0.01, 99.99), metavar="P", help=change)
    sure = "with --max-change: certified with this confidence, in percent (default: 90)"
    group.add_argument("--sure", type=number(50, 99.9), metavar="S", help=sure)
    return wish


def wish_of(
    labelled: bool, max_loss: float | None, speed: float | None, max_change: float | None, sure: float | None
) -> dict[str, float]:
    """The wish that is given; by default a loss of one point, and without labels 3% of answers changed, at 90%."""
    if speed is not None:
        return {"speed": speed}
    if max_change is None and (labelled or max_loss is not None):
        return {"max_loss": 1.0 if max_loss is None else max_loss}
    return {"max_change": 3.0 if max_change is None else max_change, "sure": 90.0 if sure is None else sure}


class Candidates(NamedTuple):
    """Every threshold worth a look, in increasing order, and what it gives."""

    thresholds: np.ndarray  # (M,), the last is 1
    ratios: np.ndarray  # (M,), speedup ratios: mean shares of the layers
    cells: np.ndarray  # (8, M), how many rows have which outcome, see `outcomes`
    changes: np.ndarray  # (M,), how many of the rows that certify get another answer than at full depth


def operating_point(validation: Validation, calibration: str, wish: dict[str, float]) -> tuple[ExitRule, dict]:
    """The rule for new text, and what evaluation.json says of the threshold that grants a wish (see `choose`) at it.

    The rule is fitted on all rows; for a certificate on a quarter of them, and the others certify. Where nothing is
    fitted (`calibration` "none"), all certify. To what is `stated` come `wish`; `reached`, False where no threshold
    grants the wish, so that the nearest was taken; of a certified one `certified_rows`, and how many of these changed,
    `certified_changes`.
    """
    fitted = certifying = torch.arange(len(validation.labels))
    if "max_change" in wish and (calibration != "none" or validation.certainty is not None):
        fitted, certifying = validation.drawn(4)
    rule = validation.fit_rule(fitted, calibration)
    there = candidates(rule, validation, certifying)
    place, reached = choose(there, validation.metric, wish, len(certifying))
    point = stated(rule, validation, between(there.thresholds, place, rule.lowest))
    point |= {"reached": reached, "wish": wish}
    if "max_change" in wish:
        point |= {"certified_rows": len(certifying), "certified_changes": int(there.changes[place])}
    return rule, point


def candidates(rule: ExitRule, validation: Validation, certifying: Tensor) -> Candidates:
    """The thresholds at which a decision changes: the confidences that occur, and 1. `certifying` are rows (n,).

    At 1 all run to the last exit, even a row whose confidence is 1, as float32 rounds it. Just below 1 it leaves.

    As the threshold rises past all of a row's confidences up to an exit, the row moves on to the next exit, and a sum
    over rows changes by a step. So all M sums take one pass over the steps; a sweep would take M times N decisions.
    All are over all rows, but `changes`, which counts the certifying ones alone.
    """
    confidence = rule.confidences(validation.logits, validation.certainty)[:-1].double().numpy()  # (K-1, N)
    confidence = confidence.clip(min=rule.lowest)  # at the lowest threshold all leave at the first exit
    thresholds = np.unique(confidence.clip(max=np.nextafter(np.float32(1), np.float32(0))))
    # Of each row and exit: which is the first threshold at which the row goes on past the exit; M-1 stands for 1.
    moves = np.searchsorted(thresholds, np.maximum.accumulate(confidence), side="right")  # (K-1, N)

    def summed(values: np.ndarray) -> np.ndarray:
        """What each row has at each exit, (K, N), summed over the rows at each threshold: (M,)."""
        steps = np.diff(values.astype(np.float64), axis=0)
        return values[0].sum() + np.bincount(moves.ravel(), steps.ravel(), minlength=len(thresholds) + 1).cumsum()

    predictions, codes = validation.logits.argmax(-1).numpy(), outcomes(validation)  # (K, N) each
    costs, N = np.array(validation.exits.costs()), codes.shape[1]
    ratios = summed(np.broadcast_to(costs[:, None], codes.shape)) / N
    ratios[-1] = validation.exits.costs(1.0)[-1]  # at 1 all reach the last exit
    cells = np.stack([summed(codes == code) for code in range(8)]).round()
    changes = summed((predictions != predictions[-1]) & np.isin(np.arange(N), certifying)).round()
    return Candidates(np.append(thresholds, 1.0), ratios, cells, changes)


def choose(there: Candidates, metric: str, wish: dict[str, float], certifying: int) -> tuple[int, bool]:
    """Which candidate grants the wish best, and whether it grants it; if none does, the fastest.

    speed: the best score at no more than this share of the layers.
    max_loss, max_change: thresholds are tried from 1 downward, up to the first that fails; what passes after a failure
    would be luck. Of those passed the fastest is taken. One fails where the loss and half its standard error exceed
    so many points; or where it cannot be said of `certifying` rows that, with the confidence `sure`, at most so many
    percent of new texts change.
    """
    _, scores = scores_of(there.cells, metric)
    if "speed" in wish:
        granted, order = there.ratios <= wish["speed"] + SLACK, np.lexsort((there.ratios, -scores))
    else:
        order = np.lexsort((-scores, there.ratios))  # fastest first, of equals the best
        if "max_loss" in wish:
            fails = loss_of(there.cells, metric) + standard_error(there.cells, metric) / 2 > wish["max_loss"] + SLACK
        else:
            fails = there.changes > most_changes(certifying, wish["max_change"] / 100, (100 - wish["sure"]) / 100)
        fails[-1] = False  # full depth loses nothing and changes nothing
        granted = np.arange(len(fails)) > np.flatnonzero(fails).max(initial=-1)
    best = order[granted[order]][0] if granted.any() else there.ratios.argmin()
    return int(best), bool(granted.any())


def most_changes(rows: int, share: float, error: float) -> int:
    """The largest k with P(X <= k) <= `error` for a binomial X of `rows` draws with probability `share`; else -1.

    Where at most k of the rows are changed, no more than that share of new texts is, but for that chance of error.
    """
    k = np.arange(rows)
    steps = np.log((rows - k) / (k + 1)) + math.log(share / (1 - share))  # from the logarithm of P(X = k) to the next
    probabilities = np.exp(rows * math.log1p(-share) + np.append(0, steps.cumsum()))
    return int(np.searchsorted(probabilities.cumsum(), error * (1 + SLACK), side="right")) - 1


def rows_to_certify(share: float, error: float) -> int:
    """The fewest rows of which `most_changes` allows none to be changed, and not -1."""
    return math.ceil((math.log(error) + SLACK) / math.log1p(-share))


def between(thresholds: np.ndarray, place: int, lowest: float) -> float:
    """What is deployed for a candidate: midway to the next lower one, so that rounding elsewhere turns no row."""
    threshold, below = thresholds[place], thresholds[place - 1] if place else lowest
    middle = (threshold + below) / 2
    is_apart = np.float32(below) < np.float32(middle)  # in float32, in which it is compared
    return float(middle if is_apart and threshold < 1 else threshold)


def stated(rule: ExitRule, validation: Validation, threshold: float) -> dict:
    """What a threshold gives on these rows: scores in percent, loss in points; 95% intervals for new text."""
    exits, metric, codes = validation.exits, validation.metric, outcomes(validation)
    taken = exits_taken(rule.confidences(validation.logits, validation.certainty), threshold, rule.lowest)  # (N,)
    costs, possible, rows = np.array(exits.costs(threshold))[taken], exits.costs(), np.arange(len(taken))
    cells = np.bincount(codes[taken, rows], minlength=8).astype(np.float64)
    full_depth, score = map(float, scores_of(cells, metric))
    logits = validation.logits[taken, rows]  # (N, C)
    report = classification_report(logits.argmax(-1).numpy(), validation.labels.numpy(), logits.shape[-1])
    spread = NORMAL * costs.std() / math.sqrt(len(rows))
    return {
        "threshold": threshold,
        "score": score,
        "macro_f1": report["macro_f1"],
        "full_depth_score": full_depth,
        "loss": full_depth - score,
        "loss_interval": loss_interval(cells, metric) if threshold < 1 else [0.0, 0.0],
        "speedup_ratio": float(costs.mean()),
        "speedup_interval": (costs.mean() + np.array([-spread, spread])).clip(min(possible), max(possible)).tolist(),
    }


def outcomes(validation: Validation) -> np.ndarray:
    """What a score counts of each exit and row, (K, N): 4 for class 1, 2 if full depth says so, 1 if the exit does.

    For Matthews correlation. For accuracy and agreement every row's class is 1, and who is right says so.
    """
    predictions, labels = validation.logits.argmax(-1).numpy(), validation.labels.numpy()
    is_plain = validation.metric != "matthews"
    said = predictions == (labels if is_plain else 1)
    return 4 * (is_plain | (labels == 1)) + 2 * said[-1] + said


def scores_of(cells: np.ndarray, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Full depth's and early exit's score in percent, (...) each, of how many rows have which outcome, (8, ...)."""
    rows, cells = cells.sum(0), cells.reshape(2, 2, 2, *cells.shape[1:])  # by class, full depth, early exit
    full_depth, early = cells[1, 1].sum(0), cells[1, :, 1].sum(0)  # of class 1, said rightly
    if metric != "matthews":
        return 100 * full_depth / rows, 100 * early / rows
    said, ones = (cells[:, 1].sum((0, 1)), cells[:, :, 1].sum((0, 1))), cells[1].sum((0, 1))
    return matthews(full_depth, said[0], ones, rows), matthews(early, said[1], ones, rows)


def loss_of(cells: np.ndarray, metric: str) -> np.ndarray:
    """Points below full depth: (8, ...) to (...)."""
    full_depth, early = scores_of(cells, metric)
    return full_depth - early


def standard_error(cells: np.ndarray, metric: str) -> np.ndarray:
    """Of the loss, paired, by the jackknife: (8, M) to (M,). Rows of one outcome are the same one left out.

    One row alone tells nothing of it: infinity.
    """
    rows = cells.sum(0)
    if rows[0] < 2:
        return np.full_like(rows, np.inf)
    left_out = np.stack([loss_of((cells - one[:, None]).clip(min=0), metric) for one in np.eye(8)])  # (8, M)
    mean = (cells * left_out).sum(0) / rows
    return np.sqrt((rows - 1) / rows * (cells * (left_out - mean) ** 2).sum(0))


def loss_interval(cells: np.ndarray, metric: str) -> list[float]:
    """The 95% interval of the loss on new text, in points, from how many rows have which outcome: (8,).

    Bonett and Price's for paired proportions (2012): a row is added to those that full depth alone has right, and one
    to those of early exit, so that it holds where there are none. For Matthews a bootstrap, with the same two rows.
    """
    cells = cells + np.array([0, 0.5, 0.5, 0, 0, 0.5, 0.5, 0] if metric == "matthews" else [0, 0, 0, 0, 0, 1, 1, 0])
    rows = cells.sum()
    if metric == "matthews":
        draws = np.random.default_rng(SEED).multinomial(round(rows), cells / rows, 10_000).T.astype(np.float64)
        return np.percentile(loss_of(draws, metric), (2.5, 97.5)).tolist()
    lost, won = cells[6] / rows, cells[5] / rows
    spread = NORMAL * math.sqrt((lost + won - (lost - won) ** 2) / rows)
    least = 0 if metric == "agreement" else -1  # full depth agrees with itself
    return [100 * float(max(least, lost - won - spread)), 100 * float(min(1, lost - won + spread))]


def shortfall(point: dict, K: int) -> str:
    """A line on a wish that no threshold grants, or none but full depth; else nothing. `point` is of K exits."""
    wish = point["wish"]
    if not point["reached"]:
        return f"speed: {wish['speed']:g} is out of reach; the nearest is {point['speedup_ratio']:.3f}"
    if "max_change" not in wish or point["threshold"] < 1 or K == 1:
        return ""
    rows, here = rows_to_certify(wish["max_change"] / 100, (100 - wish["sure"]) / 100), point["certified_rows"]
    asked = f"max_change: no faster threshold can be certified for {wish['max_change']:g}% at {wish['sure']:g}%"
    found = f"too many of the {here} that certify here do" if here >= rows else f"{here} certify here"
    return f"{asked}, full depth is taken; {rows} rows would do if none changed, and {found}"


def not_certified(wish: dict, threshold: float, evaluation: Evaluation, precision: object) -> str:
    """A line where a wish is certified, by an evaluation in another precision than this one; else nothing."""
    was, now = (str(name or "float32").removeprefix("torch.") for name in (evaluation.precision, precision))
    if wish.get("max_change") is None or threshold == 1 or was == now:  # at 1 nothing can change
        return ""
    return f"max_change: it was certified in {was}, which says nothing of {now}"
