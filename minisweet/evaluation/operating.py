"""The operating point: the threshold to deploy, chosen for a wish of speed or of quality.

Dimension letters: K exits, N instances, C classes, M candidate thresholds.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from minisweet.adaptive import ExitRule, exit_costs, exits_taken
from minisweet.calibration import fit_rule
from minisweet.data.tasks import matthews, score
from minisweet.evaluation.sweep import Validation


class Candidates(NamedTuple):
    """Every threshold worth a look, in increasing order, and what it gives."""

    thresholds: np.ndarray  # (M,)
    scores: np.ndarray  # (M,), in percent
    ratios: np.ndarray  # (M,), speedup ratios: mean shares of the layers


def operating_point(
    validation: Validation,
    metric: str,
    calibration: str,
    exit_layers: Sequence[int],
    depth: int,
    method: str,
    max_loss: float | None = None,
    speed: float | None = None,
) -> dict:
    """Choose the threshold for a wish, and say honestly what it gives.

    The wish is `max_loss`, the fastest threshold whose score is at most so many points below full depth's, or `speed`,
    the best score at no more than this share of the layers. `metric` is as in `score`, `calibration` as in `fit_rule`,
    and `exit_layers`, `depth` and `method` as in `exit_costs`.

    Returns `threshold`, chosen on all rows, for new text. `score` and `speedup_ratio` are estimates for new text: each
    half of the rows (even and odd ones) is scored at the threshold, and with the temperatures, that the other half
    would choose. `full_depth_score` is the last exit's on all rows. `wish` repeats the wish, and `reached` is False
    where no threshold grants it, so that the nearest one was taken.
    """
    wish = {"max_loss": max_loss} if speed is None else {"speed": speed}

    def chosen_on(rows: Validation) -> tuple[ExitRule, float, bool]:
        rule = fit_rule(*rows, calibration)
        return rule, *choose(candidates(rule, rows, metric, exit_layers, depth, method), **wish)

    labels, everything = validation.labels.numpy(), torch.arange(len(validation.labels))
    halves = [everything[::2], everything[1::2]] if len(everything) > 1 else [everything, everything]
    predictions, costs = np.zeros_like(labels), np.zeros(len(labels))
    for other, scored in (halves, halves[::-1]):
        rule, threshold, _ = chosen_on(validation.rows(other))
        half = validation.rows(scored)
        taken = exits_taken(rule.confidences(half.logits, half.certainty), threshold, rule.lowest)  # (n,)
        predictions[scored] = half.logits.argmax(-1).gather(0, taken[None])[0]
        costs[scored] = np.array(exit_costs(exit_layers, depth, method, threshold))[taken]
    _, threshold, reached = chosen_on(validation)
    return {
        "threshold": threshold,
        "score": score(predictions, labels, metric),
        "full_depth_score": score(validation.logits[-1].argmax(-1).numpy(), labels, metric),
        "speedup_ratio": float(costs.mean()),
        "wish": wish,
        "reached": reached,
    }


def candidates(
    rule: ExitRule, validation: Validation, metric: str, exit_layers: Sequence[int], depth: int, method: str
) -> Candidates:
    """The thresholds at which a decision changes (the confidences that occur, and 1), with their scores and ratios.

    As the threshold rises past a row's confidence at the exit that it takes, the row moves to the next exit that is
    more confident than all before it. So a sum over rows changes by a step at each such confidence, and all M sums
    take one pass over the sorted steps, where a sweep would take M times N decisions.
    """
    confidence = rule.confidences(validation.logits, validation.certainty).double().numpy()  # (K, N)
    confidence = confidence.clip(min=rule.lowest)  # at the lowest threshold all leave at the first exit
    confidence[-1] = np.inf
    highest = np.maximum.accumulate(confidence, axis=0)
    thresholds = np.unique(confidence[:-1][confidence[:-1] < 1])  # those that occur

    labels, predictions = validation.labels.numpy(), validation.logits.argmax(-1).numpy()
    cost = np.array(exit_costs(exit_layers, depth, method))
    # Of each row at each exit, what a score and a ratio are made of: (K, N, 4)
    kinds = (predictions == labels, (predictions == 1) & (labels == 1), predictions == 1)
    at_exit = np.stack([*kinds, np.broadcast_to(cost[:, None], predictions.shape)], axis=-1).astype(np.float64)
    # A row leaves at exit k for the thresholds in (highest of the exits before, highest up to k].
    sums = np.zeros((len(thresholds) + 1, 4))  # (M + 1, 4), as differences at first
    sums[0] = at_exit[0].sum(0)
    reached = at_exit[0]
    for k in range(1, len(confidence)):
        moves = highest[k] > highest[k - 1]  # (N,); who is as confident as before never takes exit k
        first = np.searchsorted(thresholds, highest[k - 1][moves], side="right")  # the first threshold above
        np.add.at(sums, first, at_exit[k][moves] - reached[moves])
        reached = np.where(moves[:, None], at_exit[k], reached)
    sums = sums.cumsum(0)
    sums[-1] = at_exit[-1].sum(0)
    sums[-1, 3] = exit_costs(exit_layers, depth, method, 1.0)[-1] * len(labels)  # at 1 all reach the last exit
    right, both, predicted, layers = sums.T
    if metric == "matthews":
        scores = matthews(both, predicted, (labels == 1).sum(), len(labels))
    else:
        scores = 100 * right / len(labels)
    return Candidates(np.append(thresholds, 1.0), scores, layers / len(labels))


def choose(there: Candidates, max_loss: float | None = None, speed: float | None = None) -> tuple[float, bool]:
    """The threshold that grants the wish best, and whether it grants it. See `operating_point`."""
    slack = 1e-9  # of rounding
    if speed is None:
        granted = there.scores >= there.scores[-1] - max_loss - slack  # the last one, full depth, always does
        order = np.lexsort((-there.scores, there.ratios))  # fastest first, of equals the best
    else:
        granted = there.ratios <= speed + slack
        order = np.lexsort((there.ratios, -there.scores)) if granted.any() else np.argsort(there.ratios, kind="stable")
    best = next((i for i in order if granted[i]), order[0])
    return float(there.thresholds[best]), bool(granted[best])
