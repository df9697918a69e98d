"""How right predictions are, and what rows tell of new text: scores, 95% intervals, and one-sided bounds for promises.

Intervals and bounds take counts of *effective* rows. Where a text stands m times, its rows are one witness, so that all
rows tell as much as (sum of m)^2 / (sum of m^2) independent ones, the sums over texts.

`counts` has three axes of two, before any others: `counts[actual, full, early]`. For Matthews correlation they say
whether a row is of class 1, whether full depth says so, and whether early exit does. For accuracy and agreement every
row counts as actual, and the others say whether full depth and early exit are right.

Dimension letters: N instances, C classes.
"""

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np

METRICS = {"accuracy": "accuracy", "matthews": "Matthews correlation", "agreement": "agreement with full depth"}
Z = NormalDist().inv_cdf(0.975)  # of 95% intervals
SLACK = 1e-9  # of rounding
STEP = 1e-5  # of a row, in derivatives


def score(predictions: np.ndarray, labels: np.ndarray, metric: str) -> float | np.ndarray:
    """Accuracy, agreement (the same, with the last exit's answers as labels) or Matthews correlation, all x100.

    `labels` is (N,), `predictions` (N,) for one float or (..., N) for an array (...). Matthews is of classes 0 and 1,
    and 0 where it is undefined, that is where the predictions or the labels are all of one class.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if metric != "matthews":
        return 100 * (predictions == labels).mean(-1)
    # float64: the product of four counts of a large dev set does not fit into 64-bit integers
    counted = ((predictions == 1) & (labels == 1), predictions == 1, labels == 1)
    return matthews(*(rows.sum(-1, dtype=np.float64) for rows in counted), labels.size)


def matthews(both: np.ndarray, predicted: np.ndarray, actual: np.ndarray, rows: int) -> np.ndarray:
    """Matthews correlation x100 from counts: of class 1 predicted rightly, predicted, and actual; of how many rows."""
    covariance = both * rows - predicted * actual
    spread = np.sqrt(predicted * (rows - predicted) * actual * (rows - actual))
    return 100 * covariance / np.where(spread > 0, spread, np.inf)


def classification_report(predictions: np.ndarray, labels: np.ndarray, num_labels: int) -> dict:
    """How each class fares: predictions (N,) and labels (N,), both class indices, to what JSON can hold.

    Returns `precision`, `recall` and `f1` (C), x100 and 0 where undefined; `macro_f1`, the mean over the classes that
    occur or are predicted; `support` (C), how often each occurs; `confusion_matrix` (C, C), rows by label.
    """
    confusion = np.bincount(labels * num_labels + predictions, minlength=num_labels**2).reshape(num_labels, num_labels)
    right, support, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)  # each (C,)
    precision, recall = 100 * right / np.maximum(predicted, 1), 100 * right / np.maximum(support, 1)
    f1 = 200 * right / np.maximum(support + predicted, 1)
    per_class = {"precision": precision, "recall": recall, "f1": f1, "support": support, "confusion_matrix": confusion}
    of_all = {"macro_f1": float(f1[support + predicted > 0].mean())}
    return of_all | {name: values.tolist() for name, values in per_class.items()}


def scores_of(counts: np.ndarray, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Full depth's and early exit's score in percent: counts (2, 2, 2, ...) to (...) each."""
    rows, actual = counts.sum((0, 1, 2)), counts[1].sum((0, 1))
    full_hits, early_hits = counts[1, 1].sum(0), counts[1, :, 1].sum(0)
    if metric != "matthews":
        return 100 * full_hits / rows, 100 * early_hits / rows
    full_said, early_said = counts[:, 1].sum((0, 1)), counts[:, :, 1].sum((0, 1))
    return matthews(full_hits, full_said, actual, rows), matthews(early_hits, early_said, actual, rows)


def loss_of(counts: np.ndarray, metric: str) -> np.ndarray:
    """Points below full depth: counts (2, 2, 2, ...) to (...)."""
    full_depth, early = scores_of(counts, metric)
    return full_depth - early


def standard_error(counts: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The standard error of a statistic, by the infinitesimal jackknife: counts (2, 2, 2, ...) to (...).

    It sums up how far the statistic moves if the rows of one cell count a little more.
    """
    cells = np.eye(8).reshape(8, 2, 2, 2, *[1] * (counts.ndim - 3))
    moves = np.stack([statistic(counts + STEP * cell) - statistic(counts) for cell in cells]) / STEP  # (8, ...)
    return np.sqrt((counts.reshape(moves.shape) * moves**2).sum(0))


def padded(counts: np.ndarray, metric: str, lost: float, won: float) -> np.ndarray:
    """The counts, and so many rows more that early exit loses and wins; for Matthews half of them are of class 1."""
    counts, share = counts.astype(np.float64), 0.5 if metric == "matthews" else 1.0
    counts[1, 1, 0] += share * lost
    counts[1, 0, 1] += share * won
    counts[0, 0, 1] += (1 - share) * lost
    counts[0, 1, 0] += (1 - share) * won
    return counts


def loss_bound(counts: np.ndarray, metric: str, sure: float) -> np.ndarray:
    """The points that new text loses at most, with the confidence `sure` in percent: counts (2, 2, 2, ...) to (...).

    It is the mean and z standard errors, after (z^2 + 2) / 3 lost rows are added. Without these, rows of which none is
    lost would promise that none ever is. So many make the bound exact where rows are lost at random and none is won
    (the Cornish-Fisher expansion of a Poisson distribution).
    """
    z = NormalDist().inv_cdf(sure / 100)
    counts = padded(counts, metric, (z**2 + 2) / 3, 0)
    return loss_of(counts, metric) + z * standard_error(counts, lambda some: loss_of(some, metric))


def interval(value: float, error: float, low: float, high: float) -> list[float]:
    """The normal 95% interval of a value with its standard error, cut to `low` and `high`."""
    return [float(max(low, value - Z * error)), float(min(high, value + Z * error))]


def widened(value: float, ends: list[float], error: float) -> list[float]:
    """Widen an interval by a second, independent standard error; the ends are cut to -100 and 100."""
    low, high = (math.hypot(end - value, Z * error) for end in ends)
    return [max(-100.0, value - low), min(100.0, value + high)]


def interval_of_a_file(value: float, ends: list[float], rows: float, file_rows: float, least: float) -> list[float]:
    """Where a file of so many rows should fall, 95% of the time, by a value and its interval from other rows.

    The ends are cut to `least` and 100.
    """
    scale = math.sqrt(1 + rows / file_rows)  # both have an error
    return [max(least, min(100, value + scale * (end - value))) for end in ends]


def score_interval(counts: np.ndarray, metric: str, which: int) -> list[float]:
    """The 95% interval of a score in percent, of counts (2, 2, 2): full depth's (`which` 0) or early exit's (1).

    Of accuracy and agreement it is Wilson's. Of Matthews correlation it is the jackknife's, after a row that early
    exit loses and one that it wins are added.
    """
    if metric == "matthews":
        counts = padded(counts, metric, 1, 1)
        error = standard_error(counts, lambda some: scores_of(some, metric)[which])
        return interval(float(scores_of(counts, metric)[which]), error, -100, 100)
    rows, share = float(counts.sum()), float(scores_of(counts, metric)[which]) / 100
    middle = (share + Z**2 / rows / 2) / (1 + Z**2 / rows)
    spread = math.sqrt(share * (1 - share) / rows + (Z / rows / 2) ** 2) / (1 + Z**2 / rows)
    return interval(100 * middle, 100 * spread, 0, 100)


def loss_interval(counts: np.ndarray, metric: str) -> list[float]:
    """The 95% interval of the loss in points: of counts (2, 2, 2).

    It is Bonett and Price's of paired proportions (2012): the normal one, after a row that early exit loses and one
    that it wins are added. Agreement is a single share, and its interval Wilson's.
    """
    if metric == "agreement":
        low, high = score_interval(counts, metric, 1)
        return [100 - high, 100 - low]
    counts = padded(counts, metric, 1, 1)
    error = standard_error(counts, lambda some: loss_of(some, metric))
    return interval(float(loss_of(counts, metric)), error, -200, 200)


def macro_f1_interval(confusion: np.ndarray, rows: float) -> list[float]:
    """The 95% interval of macro F1 in percent: of the confusion matrix (C, C), which `rows` effective rows make.

    It is the jackknife's, after a quarter of a right, a missed and a wrongly predicted row is added to each class: else
    a class of few rows would seem to be known exactly.
    """
    C, one = len(confusion), np.eye(len(confusion))
    padded_rows = confusion + (one + (1 - one) / (C - 1)) / 4
    right, total = padded_rows.diagonal(), padded_rows.sum(0) + padded_rows.sum(1)  # (C,): F1 is 2 right / total
    falls = 2 * right / total**2
    moves = (np.diag(2 / total) - falls[:, None] - falls) / C  # (C, C): of macro F1, as a row of a kind counts more
    error = math.sqrt((padded_rows * moves**2).sum() * confusion.sum() / rows)
    return interval(200 * float((right / total).mean()), 100 * error, 0, 100)


def most_changes(rows: int, share: float, error: float) -> float:
    """The largest k with P(X <= k) <= `error` for a binomial X of `rows` draws with probability `share`; else below 0.

    If at most k of the rows change, then at most that share of new texts does; this is false with probability at most
    `error`. P is interpolated between whole numbers, since repeated texts make fractions of effective rows.
    """
    k = np.arange(rows)
    steps = np.log((rows - k) / (k + 1)) + math.log(share / (1 - share))  # from the logarithm of P(X = k) to the next
    each = np.exp(rows * math.log1p(-share) + np.append(0, steps.cumsum()))  # P(X = k)
    up_to = np.append(0, each.cumsum())  # P(X < k)
    k = int(np.searchsorted(up_to, error * (1 + SLACK), side="right")) - 1
    return k - 1 + (error - up_to[k]) / each[k] if k <= rows else rows


def rows_needed(metric: str, limit: float, sure: float) -> int | None:
    """The fewest rows that promise "at most `limit`" if early exit changes none of them; None for 100,000 and more."""
    if metric == "agreement":
        return math.ceil((math.log1p(-sure / 100) + SLACK) / math.log1p(-limit / 100)) if limit else None
    rows = np.geomspace(1, 1e5, 5000).round()
    counts = np.zeros((2, 2, 2, len(rows)))
    counts[1, 1, 1], counts[0, 0, 0] = (rows / 2, rows / 2) if metric == "matthews" else (rows, 0)
    enough = loss_bound(counts, metric, sure) <= limit
    return int(rows[enough.argmax()]) if enough.any() else None
