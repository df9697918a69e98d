"""The operating point: the threshold to deploy, chosen for a wish of speed or of quality.

Dimension letters: K exits, N instances, M candidate thresholds.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from minisweet.adaptive import ExitRule, exit_costs, exits_taken
from minisweet.calibration import fit_rule
from minisweet.data.tasks import matthews, score
from minisweet.evaluation.sweep import Validation

SLACK = 1e-9  # of rounding


class Candidates(NamedTuple):
    """Every threshold worth a look, in increasing order, and what it gives: (M,) each."""

    thresholds: np.ndarray
    scores: np.ndarray  # in percent
    ratios: np.ndarray  # speedup ratios: mean shares of the layers


def operating_point(validation: Validation, metric: str, calibration: str, of_model: tuple, wish: dict) -> dict:
    """Choose the threshold for a wish, and say honestly what it gives.

    `metric` is as in `score`, `calibration` as in `fit_rule`, `of_model` are the exit layers, depth and method of
    `exit_costs`. The wish is {"max_loss": points} or {"speed": share}, see `choose`.

    Returns `threshold`, chosen on all rows, for new text. `score` and `speedup_ratio` are estimates for new text: each
    half of the rows (even and odd ones) is scored at the threshold, and with the temperatures, that the other half
    would choose. `full_depth_score` is the last exit's on all rows. `wish` repeats the wish, and `reached` is False
    where no threshold grants it, so that the nearest one was taken.
    """

    def chosen_on(rows: Validation) -> tuple[ExitRule, float, bool]:
        rule = fit_rule(*rows, calibration)
        return rule, *choose(candidates(rule, rows, metric, *of_model), **wish)

    labels, everything = validation.labels.numpy(), torch.arange(len(validation.labels))
    halves = [everything[::2], everything[1::2]] if len(everything) > 1 else [everything, everything]
    predictions, costs = np.zeros_like(labels), np.zeros(len(labels))
    for other, scored in (halves, halves[::-1]):
        rule, threshold, _ = chosen_on(validation.rows(other))
        half = validation.rows(scored)
        taken = exits_taken(rule.confidences(half.logits, half.certainty), threshold, rule.lowest)  # (n,)
        predictions[scored] = half.logits.argmax(-1).gather(0, taken[None])[0]
        costs[scored] = np.array(exit_costs(*of_model, threshold))[taken]
    _, threshold, reached = chosen_on(validation)
    full_depth = score(validation.logits[-1].argmax(-1).numpy(), labels, metric)
    point = {"threshold": threshold, "score": score(predictions, labels, metric), "full_depth_score": full_depth}
    return point | {"speedup_ratio": float(costs.mean()), "wish": wish, "reached": reached}


def candidates(
    rule: ExitRule, validation: Validation, metric: str, exit_layers: Sequence[int], depth: int, method: str
) -> Candidates:
    """The thresholds at which a decision changes (the confidences that occur, and 1), with their scores and ratios.

    As the threshold rises past all of a row's confidences up to an exit, the row moves on to the next exit. So a sum
    over rows changes by a step there, and all M sums take one pass over the sorted steps, where a sweep would take M
    times N decisions.
    """
    confidence = rule.confidences(validation.logits, validation.certainty)[:-1].double().numpy()  # (K-1, N)
    confidence = confidence.clip(min=rule.lowest)  # at the lowest threshold all leave at the first exit
    thresholds = np.unique(confidence[confidence < 1])
    # The first threshold above all confidences up to an exit, at which a row is still there after it; M-1 is that of 1.
    moves = np.searchsorted(thresholds, np.maximum.accumulate(confidence), side="right")  # (K-1, N)

    labels, predictions = validation.labels.numpy(), validation.logits.argmax(-1).numpy()
    cost = np.array(exit_costs(exit_layers, depth, method))[:, None]
    # Of each row at each exit, what a score and a ratio are made of: 4 of (K, N).
    parts = np.broadcast_arrays(predictions == labels, (predictions == 1) & (labels == 1), predictions == 1, cost)
    at_exit = np.stack(parts, axis=-1).astype(np.float64)  # (K, N, 4)
    sums = np.zeros((len(thresholds) + 1, 4))  # (M, 4), as steps at first
    sums[0] = at_exit[0].sum(0)
    for first, step in zip(moves, np.diff(at_exit, axis=0), strict=True):
        np.add.at(sums, first, step)
    right, both, predicted, layers = sums.cumsum(0).T
    layers[-1] = exit_costs(exit_layers, depth, method, 1.0)[-1] * len(labels)  # at 1 all reach the last exit
    if metric == "matthews":
        scores = matthews(both, predicted, (labels == 1).sum(), len(labels))
    else:
        scores = 100 * right / len(labels)
    return Candidates(np.append(thresholds, 1.0), scores, layers / len(labels))


def choose(there: Candidates, max_loss: float | None = None, speed: float | None = None) -> tuple[float, bool]:
    """The threshold that grants the wish best, and whether it grants it; if none does, the fastest.

    The wish is `max_loss`, the fastest whose score is at most so many points below full depth's, or, where it is given,
    `speed`, the best score at no more than this share of the layers.
    """
    if speed is None:
        granted = there.scores >= there.scores[-1] - max_loss - SLACK  # the last one, full depth, always does
        order = np.lexsort((-there.scores, there.ratios))  # fastest first, of equals the best
    else:
        granted = there.ratios <= speed + SLACK
        order = np.lexsort((there.ratios, -there.scores))
    best = order[granted[order]][0] if granted.any() else there.ratios.argmin()
    return float(there.thresholds[best]), bool(granted.any())
