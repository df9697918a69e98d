"""When to leave, and what it costs: exit decisions, the threshold sweep and the speed-accuracy curve (Sec. 3.3).

An instance leaves at the first exit whose confidence reaches the threshold, and at the last one in any case. An
exit's confidence is its highest softmax probability, or what it has learned of itself: learning-to-exit (Sec. 5).

The sweep needs the logits of all exits once, and is exact: an exit's logits do not depend on who left before it.
Dimension letters: K exits, N instances, C classes.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor


def confidences(logits: Tensor, temperatures: Tensor | float = 1.0) -> Tensor:
    """Logits (..., C) and temperatures (...) to confidences (...), in float32."""
    scaled = logits.float() / torch.as_tensor(temperatures, device=logits.device)[..., None]
    return scaled.softmax(-1).amax(-1)


def certainty_ranges(certainty: Tensor) -> Tensor:
    """The lowest and highest certainty of each exit: certainties (K, N) to ranges (K, 2)."""
    return torch.stack(certainty.aminmax(dim=1), dim=1)


def learned_confidences(certainty: Tensor, ranges: Tensor) -> Tensor:
    """Learning-to-exit: certainties (..., N) in their ranges (..., 2) on validation data, clamped to 0 to 1."""
    low, high = ranges[..., :1], ranges[..., 1:]
    return ((certainty.float() - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)


def spaced_thresholds(count: int, lowest: float) -> list[float]:
    """`count` thresholds, evenly spaced from `lowest` (all leave at the first exit) to 1 (all reach the last).

    `lowest` is 1/C for softmax confidence and 0 for learning-to-exit.
    """
    return np.linspace(lowest, 1, count).tolist()


def leaves(confidence: Tensor, threshold: float, lowest: float) -> Tensor:
    """Whether an instance leaves at an exit that is not the last: confidence (...) to bool (...).

    The two ends, `lowest` (1/C, or 0) and 1, are decided by the threshold alone. A probability can round to 1 or to
    just below 1/C in float32, and the paper has t = 1 run the last classifier on every instance, and t = 1/C the first.
    """
    if threshold <= lowest:
        return torch.ones_like(confidence, dtype=torch.bool)
    if threshold >= 1:
        return torch.zeros_like(confidence, dtype=torch.bool)
    return confidence >= threshold


def exits_taken(confidence: Tensor, threshold: float, lowest: float) -> Tensor:
    """Which exit each instance takes: the confidences (K, N) of all exits to exits (N,), counted from 0."""
    leave = leaves(confidence, threshold, lowest)  # (K, N)
    leave[-1] = True
    return leave.int().argmax(0)  # the first True of each column


def exit_costs(exit_layers: Sequence[int], depth: int, method: str) -> list[float]:
    """What leaving at each exit costs, as a share of the backbone's `depth` layers (Eq. 1 for one instance).

    EE and SWEET have run the exit's layers, MM all the models up to and including the exit's own.
    """
    layers = accumulate(exit_layers) if method == "mm" else exit_layers
    return [n / depth for n in layers]


def area_under_curve(ratios: Sequence[float], scores: Sequence[float]) -> float:
    """Mean score over the speedup ratios from the first exit's to 1: the trapezoid's area, divided by its width.

    `ratios` and `scores` hold a point per threshold, in increasing order, from 1/C on, where all take the first exit.
    MM's curve is cut at 1. A curve that ends before 1 is taken as far as it goes, never extrapolated.
    """
    x, y = np.array(ratios), np.array(scores)
    end = min(1.0, x[-1])
    x, y = np.append(x[x <= end], end), np.append(y[x <= end], np.interp(end, x, y))
    return float(np.trapezoid(y, x) / (end - x[0])) if end > x[0] else float(y[-1])
