"""How right predictions are. Dimension letters: N instances, C classes."""

from collections.abc import Sequence

import numpy as np

METRICS = {"accuracy": "accuracy", "matthews": "Matthews correlation", "agreement": "agreement with full depth"}


def score(predictions: np.ndarray, labels: np.ndarray, metric: str):
    """Accuracy, agreement (the same, with the last exit's answers as labels) or Matthews correlation, all x100.

    `labels` is (N,), `predictions` (N,) for one float or (..., N) for an array (...). Matthews correlation is of
    classes 0 and 1, and 0 where it is undefined, that is where the predictions or the labels are all of one class.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    rows = labels.shape[-1]
    if metric != "matthews":
        return 100 - 100 * (predictions != labels).sum(-1) / rows
    are_1 = ((predictions == 1) & (labels == 1), predictions == 1, labels == 1)
    # float64: the product of four counts of a large dev set does not fit into 64-bit integers
    both, predicted, actual = (values.sum(-1, dtype=np.float64) for values in are_1)
    spread = np.sqrt(np.maximum(predicted * (rows - predicted) * actual * (rows - actual), 0))
    return 100 * (both * rows - predicted * actual) / np.where(spread > 0, spread, np.inf)


def classification_report(predictions: np.ndarray, labels: np.ndarray, num_labels: int) -> dict[str, list]:
    """How each class fares: predictions (N,) and labels (N,), both class indices, to lists (C,) for JSON.

    They are `precision`, `recall` and `f1`, x100 and 0 where undefined, and `support`, how often each class occurs.
    """
    right, support, predicted = (
        np.bincount(values, minlength=num_labels) for values in (labels[predictions == labels], labels, predictions)
    )  # each (C,)
    precision, recall = 100 * right / np.maximum(predicted, 1), 100 * right / np.maximum(support, 1)
    per_class = {"precision": precision, "recall": recall, "f1": 200 * right / np.maximum(support + predicted, 1)}
    return {name: values.tolist() for name, values in (per_class | {"support": support}).items()}


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
