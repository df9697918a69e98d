"""The speed-accuracy curve: what every threshold makes of all exits' answers (Sec. 3.3).

In an evaluation's curve no rule decides rows that it was fitted on: five folds take turns, each decided by the rule of
the other four.

Dimension letters: K exits, N instances, n some of them, C classes, P thresholds.
"""

from collections.abc import Sequence

import numpy as np

from minisweet.adaptive import ExitRule
from minisweet.evaluation.answers import AnsweredRows
from minisweet.evaluation.calibration import expected_calibration_error, negative_log_likelihood
from minisweet.evaluation.metrics import area_under_curve, classification_report, score

FOLDS = 5
Folds = list[tuple[ExitRule, np.ndarray]]  # rules, and which rows (n,) each decides


def crossfit(answered: AnsweredRows) -> Folds:
    """The rules of the curve: each fold's rows are decided by the rule of the others. A single text decides itself."""
    parts = answered.parts(FOLDS)
    folds = [(np.flatnonzero(parts != part), np.flatnonzero(parts == part)) for part in np.unique(parts)]
    return [(answered.take(others if len(others) else rows).fit_rule(), rows) for others, rows in folds]


def sweep(
    folds: Folds, answered: AnsweredRows, thresholds: list[float], asked: Sequence[int] | None = None
) -> tuple[dict, np.ndarray]:
    """Score all exits, and at each threshold those that rows take, where only the exits `asked` are (default: all).

    Returns exit_scores (K), scores, speedup_ratios, exit_counts (P, K) and area, scores in percent; then the exits
    taken (P, N). Exits go by their numbers among all K, from 0.
    """
    (K, N, _), labels, metric = answered.logits.shape, answered.labels.numpy(), answered.metric
    taken, costs = np.empty((len(thresholds), N), dtype=np.int64), np.empty((len(thresholds), N))
    for rule, rows in folds:
        some = answered.take(rows)
        taken[:, rows], _, costs[:, rows] = some.decide_at(rule, range(K) if asked is None else asked, thresholds)
    predictions = answered.logits.argmax(-1).numpy()  # (K, N)
    ratios = costs.mean(1).tolist()  # Eq. 1
    scores = score(predictions[taken, np.arange(N)], labels, metric).tolist()
    curve = {"exit_scores": score(predictions, labels, metric).tolist(), "scores": scores, "speedup_ratios": ratios}
    curve["exit_counts"] = [np.bincount(row, minlength=K).tolist() for row in taken]
    return curve | {"area": area_under_curve(ratios, scores, 1 / answered.exits.depth)}, taken


def curve_of(answered: AnsweredRows, folds: Folds, thresholds: list[float]) -> dict:
    """What evaluation.json holds of the exits, alone and at each threshold."""
    curve, _ = sweep(folds, answered, thresholds)
    predictions, labels, C = answered.logits.argmax(-1), answered.labels, answered.logits.shape[-1]
    curve["per_class"] = [classification_report(row.numpy(), labels.numpy(), C) for row in predictions]
    scaled = {"before": answered.logits, "after": answered.logits.clone()}
    for rule, rows in folds:
        scaled["after"][:, rows] /= rule.temperatures[:, None, None]
    for name, measure in (("ece", expected_calibration_error), ("nll", negative_log_likelihood)):
        curve[name] = {when: [measure(one, labels) for one in logits] for when, logits in scaled.items()}  # (K,) each
    return curve
