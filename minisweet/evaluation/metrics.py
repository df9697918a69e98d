"""How right predictions are. Dimension letters: N instances, C classes, R ways to weight the instances."""

from collections.abc import Sequence

import numpy as np

METRICS = {"accuracy": "accuracy", "matthews": "Matthews correlation", "agreement": "agreement with full depth"}


def has_labels(metric: str) -> bool:
    """Whether there are labels to be right about. Else full depth's answers stand in for them."""
    return metric != "agreement"


def score(predictions: np.ndarray, labels: np.ndarray, metric: str, weights: np.ndarray | None = None):
    """Accuracy, agreement (the same, with the last exit's answers as labels) or Matthews correlation, all x100.

    `labels` is (N,), `predictions` (N,) for one float or (..., N) for an array (...). With `weights`, float32 (R, N),
    instances count as much as they weigh, and an axis R is added at the end. Matthews correlation is of classes 0 and
    1, and 0 where it is undefined, that is where the predictions or the labels are all of one class.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)

    def total(rows: np.ndarray) -> np.ndarray:
        """How many of the rows there are, or how much they weigh: bool (..., N) to (...) or (..., R)."""
        # float64: the product of four counts of a large dev set does not fit into 64-bit integers
        return (rows.sum(-1) if weights is None else rows.astype(np.float32) @ weights.T).astype(np.float64)

    rows = total(np.ones_like(labels))
    if metric != "matthews":
        return 100 - 100 * total(predictions != labels) / rows
    both, predicted, actual = total((predictions == 1) & (labels == 1)), total(predictions == 1), total(labels == 1)
    spread = np.sqrt(np.maximum(predicted * (rows - predicted) * actual * (rows - actual), 0))
    return 100 * (both * rows - predicted * actual) / np.where(spread > 0, spread, np.inf)


def classification_report(predictions: np.ndarray, labels: np.ndarray, num_labels: int) -> dict:
    """How each class fares: predictions (N,) and labels (N,), both class indices, to what JSON can hold.

    Returns `precision`, `recall` and `f1` (C), x100 and 0 where undefined; `macro_f1`, the mean over the classes that
    occur or are predicted; `support` (C), how often each occurs; `confusions`, [label, prediction, how often] of the
    pairs that occur, which are at most N.
    """
    pairs, counts = np.unique(labels * num_labels + predictions, return_counts=True)
    confusions = np.stack([*divmod(pairs, num_labels), counts], axis=1)  # (pairs, 3)
    right, support, predicted = (
        np.bincount(values, minlength=num_labels) for values in (labels[predictions == labels], labels, predictions)
    )  # each (C,)
    precision, recall = 100 * right / np.maximum(predicted, 1), 100 * right / np.maximum(support, 1)
    f1 = 200 * right / np.maximum(support + predicted, 1)
    per_class = {"precision": precision, "recall": recall, "f1": f1, "support": support, "confusions": confusions}
    of_all = {"macro_f1": float(f1[support + predicted > 0].mean())}
    return of_all | {name: values.tolist() for name, values in per_class.items()}


def area_under_curve(ratios: Sequence[float], scores: Sequence[float], start: float = 0.0) -> float:
    """The mean score over the speedup ratios from `start` to 1: the trapezoid's area, divided by its width.

    It starts at the first exit's ratio where that is larger than `start`. Evaluations start at 1/L, so that a model
    with exit 0, whose ratio is 0, compares with one without it. `ratios` and `scores` hold a point per threshold.
    Branches' ratios fall at threshold 1, so points are sorted here. At both ends the score is interpolated; a curve
    that ends before 1 is taken as far as it goes.
    """
    order = np.argsort(ratios, kind="stable")
    x, y = np.array(ratios)[order], np.array(scores)[order]
    low, high = np.clip([start, 1.0], x[0], x[-1])
    inside, ends = (low < x) & (x < high), np.interp([low, high], x, y)
    x, y = np.r_[low, x[inside], high], np.r_[ends[0], y[inside], ends[1]]
    mean = np.trapezoid(y, x) / (high - low) if high > low else ends[1]
    return float(np.clip(mean, y.min(), y.max()))  # rounding must not make 100.00000000000001 of 100
