"""The speed-accuracy curve: what every threshold makes of all exits' answers (Sec. 3.3).

In an evaluation's curve no rule decides rows that it was fitted on: five folds take turns, each decided by the rule of
the other four.

Dimension letters: K exits, N instances, n some of them, C classes, P thresholds.
"""

from collections.abc import Sequence

import numpy as np

from minisweet.adaptive import ExitRule
from minisweet.calibration import fit_rule
from minisweet.metrics import area_under_curve, score
from minisweet.outputs import Outputs

FOLDS = 5
Folds = list[tuple[ExitRule, np.ndarray]]  # rules, and which rows (n,) each decides


def spaced_thresholds(count: int, lowest: float) -> list[float]:
    """`count` thresholds, evenly spaced from `lowest` (1/C, or 0; all leave at the first exit) to 1."""
    return np.linspace(lowest, 1, count).tolist()


def crossfit(outputs: Outputs, combine: bool = False) -> Folds:
    """The rules of the curve: each fold's rows are decided by the rule of the others. A single text decides itself.

    With `combine` exit 0 has a say at later exits.
    """
    fold = outputs.folds(FOLDS)
    folds = [(np.flatnonzero(fold != n), np.flatnonzero(fold == n)) for n in np.unique(fold)]
    return [(fit_rule(outputs.take(others if len(others) else rows), combine), rows) for others, rows in folds]


def sweep(
    folds: Folds, outputs: Outputs, thresholds: list[float], asked: Sequence[int] | None = None
) -> tuple[dict, np.ndarray]:
    """Score all exits, and at each threshold those that rows take, where only the exits `asked` are (default: all).

    Returns exit_scores (K), in percent; exit_answers (K), in how many classes each exit answers; scores, speedup_ratios
    (P), exit_counts (P, K) and area; then the exits taken (P, N). Exits go by their numbers among all K, from 0.
    """
    (K, N, _), labels, metric = outputs.logits.shape, outputs.labels.numpy(), outputs.metric
    taken, costs = np.empty((len(thresholds), N), dtype=np.int64), np.empty((len(thresholds), N))
    predictions = np.empty((K, N), dtype=np.int64)
    for rule, rows in folds:
        some = outputs.take(rows)
        taken[:, rows], _, costs[:, rows] = some.decide_at(range(K) if asked is None else asked, thresholds, rule)
        predictions[:, rows] = some.by(rule).logits.argmax(-1).numpy()
    ratios = costs.mean(1).tolist()  # Eq. 1
    scores = score(predictions[taken, np.arange(N)], labels, metric).tolist()
    curve = {"exit_scores": score(predictions, labels, metric).tolist(), "scores": scores, "speedup_ratios": ratios}
    curve["exit_answers"] = [len(np.unique(answers)) for answers in predictions]
    curve["exit_counts"] = [np.bincount(row, minlength=K).tolist() for row in taken]
    return curve | {"area": area_under_curve(ratios, scores, 1 / outputs.exits.depth)}, taken
