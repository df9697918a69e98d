"""The speed-accuracy curve: the scores and costs of all thresholds (Sec. 3.3).

The curve is cross-fitted: the decisions in each of five folds use temperatures that were fitted on the other four.

Dimension letters: K exits, N instances, n some of them, C classes, P thresholds.
"""

from dataclasses import dataclass

import numpy as np

from minisweet.adaptive import ExitRule
from minisweet.calibration import fit_rule
from minisweet.metrics import area_under_curve, score
from minisweet.outputs import Outputs

FOLDS = 5
Folds = list[tuple[ExitRule, np.ndarray]]  # rules, and the rows (n,) that each decides


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A cross-fitted curve with all that made it, as in evaluation.json."""

    id: str  # of the run
    task: str
    method: str
    exit_strategy: str
    metric: str  # a key of METRICS
    exit_layers: list[int]  # (K,)
    thresholds: list[float]  # (P,)
    exit_scores: list[float]  # (K,), each exit alone, in percent
    exit_answers: list[int]  # (K,), how many classes each exit predicts
    scores: list[float]  # (P,), in percent
    speedup_ratios: list[float]  # (P,)
    exit_counts: list[list[int]]  # (P, K)
    area: float
    examples: int
    seconds: float
    device: str
    precision: str
    versions: dict


def spaced_thresholds(count: int, lowest: float) -> list[float]:
    """`count` thresholds, evenly spaced from `lowest` (1/C, or 0; all take the first exit) to 1."""
    return np.linspace(lowest, 1, count).tolist()


def crossfit(outputs: Outputs) -> Folds:
    """Fit the rules of the curve, one for each fold, on the rows of the other folds.

    With a single text, the rule is fitted on that text.
    """
    fold = outputs.folds(FOLDS)
    splits = [(np.flatnonzero(fold != n), np.flatnonzero(fold == n)) for n in np.unique(fold)]  # others, own
    return [(fit_rule(outputs.take(others if len(others) else own)), own) for others, own in splits]


def sweep(folds: Folds, outputs: Outputs, thresholds: list[float]) -> tuple[dict, np.ndarray]:
    """Score each exit alone, and all exits together at each threshold.

    Args:
        folds: the rules of `crossfit`.
        outputs: the outputs for the same rows.
        thresholds: P thresholds.

    Returns a dictionary of fields of `Evaluation` (exit_scores to area), and the exits taken, (P, N).
    """
    K, N, _ = outputs.logits.shape
    labels, metric = outputs.labels.numpy(), outputs.metric
    taken = np.empty((len(thresholds), N), dtype=np.int64)
    for rule, rows in folds:
        taken[:, rows] = outputs.take(rows).decide(thresholds, rule)
    counts = np.stack([np.bincount(row, minlength=K) for row in taken])  # (P, K)
    ratios = (counts @ outputs.exits.costs() / N).tolist()  # Eq. 1
    predictions = outputs.logits.argmax(-1).numpy()  # (K, N)
    scores = score(predictions[taken, np.arange(N)], labels, metric).tolist()
    curve = {
        "exit_scores": score(predictions, labels, metric).tolist(),
        "exit_answers": [len(np.unique(answers)) for answers in predictions],
        "scores": scores,
        "speedup_ratios": ratios,
        "exit_counts": counts.tolist(),
        "area": area_under_curve(ratios, scores, 1 / outputs.exits.depth),
    }
    return curve, taken
