"""Scores of predictions, and of speed-accuracy curves. Dimension letters: N instances, P points of a curve."""

from collections.abc import Sequence

import numpy as np

METRICS = {"accuracy": "accuracy", "matthews": "Matthews correlation"}


def score(predictions: np.ndarray, labels: np.ndarray, metric: str):
    """Accuracy or Matthews correlation, in percent.

    Args:
        predictions: class indices, (N,) for one score (a float) or (..., N) for an array of scores (...).
        labels: class indices (N,).
        metric: "matthews", which is for classes 0 and 1; anything else means accuracy.

    Matthews correlation is 0 where it is undefined: if predictions or labels are all of one class.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if metric != "matthews":
        return 100 - 100 * (predictions != labels).sum(-1) / len(labels)
    x, y = predictions - predictions.mean(-1, keepdims=True), labels - labels.mean()  # the correlation of 0s and 1s
    spread = np.sqrt((x**2).sum(-1) * (y**2).sum())
    return 100 * (x * y).sum(-1) / np.where(spread > 0, spread, np.inf)


def area_under_curve(ratios: Sequence[float], scores: Sequence[float], start: float = 0.0) -> float:
    """The mean score over speedup ratios from `start` to 1: the area under the curve, divided by its width.

    Args:
        ratios, scores: (P,), one point per threshold, in increasing order of the ratios.
        start: the lower limit, or the first exit's ratio if that is larger. A curve that ends before 1 is integrated to
            its end. Scores are interpolated at both limits.
    """
    x, y = np.array(ratios), np.array(scores)
    low, high = np.clip([start, 1.0], x[0], x[-1])
    inside = (low < x) & (x < high)
    ends = np.interp([low, high], x, y)
    x, y = np.r_[low, x[inside], high], np.r_[ends[0], y[inside], ends[1]]
    mean = np.trapezoid(y, x) / (high - low) if high > low else ends[1]
    return float(np.clip(mean, y.min(), y.max()))  # rounding must not turn 100 into 100.00000000000001
