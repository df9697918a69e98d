"""When to leave, and what it costs: exit decisions, Eq. 1 and the speed-accuracy curve (Sec. 3.3).

An instance leaves at the first exit whose confidence reaches the threshold, and at the last one in any case. An
exit's confidence is its highest probability, after temperature scaling, or what it has learned of itself:
learning-to-exit (Sec. 5).

The sweep needs the logits of all exits once, and is exact: an exit's logits do not depend on who left before it.
Dimension letters: K exits, N instances, n some of them, C classes.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ASKING_A_BRANCH = 1 / 6  # of a layer, see `Exits.costs`


class ExitRule:
    """How confident an exit is, by the softmax or by learning-to-exit. The sweep, live early exit and users share it.

    Args:
        num_labels: C.
        temperatures: (K,), what each exit's logits are divided by; None for 1. Not for learning-to-exit.
        ranges: (K, 2), the lowest and the highest certainty of each exit on validation data. This makes it the rule
            of learning-to-exit.

    Raises:
        ValueError: both are given, or one has another shape.
    """

    def __init__(self, num_labels: int, temperatures: Tensor | None = None, ranges: Tensor | None = None) -> None:
        if temperatures is not None and ranges is not None:
            raise ValueError("temperatures and ranges: learning-to-exit has no temperatures")
        for name, value, shape in (("temperatures", temperatures, "(K,)"), ("ranges", ranges, "(K, 2)")):
            if value is not None and (value.ndim, *value.shape[1:]) != ((2, 2) if name == "ranges" else (1,)):
                raise ValueError(f"{name} are {tuple(value.shape)}, and must be {shape}")
        self.temperatures, self.ranges = temperatures, ranges
        # The confidence that nobody falls below: at this threshold all leave at the first exit.
        self.lowest = 1 / num_labels if ranges is None else 0.0

    @classmethod
    def from_evaluation(cls, evaluation, num_labels: int) -> "ExitRule":
        """The rule for new text, which `fit_rule` made and evaluation.json keeps."""
        plain = {"dtype": torch.float32, "device": "cpu"}  # whatever the user's defaults are
        if evaluation.exit_strategy == "lte":
            return cls(num_labels, ranges=torch.tensor(evaluation.certainty_ranges, **plain))
        return cls(num_labels, torch.tensor(evaluation.temperatures, **plain))

    def confidence(self, k: int, logits: Tensor, certainty: Tensor | None) -> Tensor:
        """Exit k's confidence in some instances: (n,), in float32.

        Args:
            k: counted from 0.
            logits: (n, C).
            certainty: (n,), or None where the exit has none, as the last of a branch model: it is never asked.
        """
        if self.ranges is None:
            temperature = 1 if self.temperatures is None else self.temperatures[k]
            return (logits.float() / temperature).softmax(-1).amax(-1)
        if certainty is None:
            return logits.new_ones(len(logits), dtype=torch.float32)
        low, high = self.ranges[k]
        return ((certainty.float() - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)

    def confidences(self, logits: Tensor, certainty: Tensor | None = None) -> Tensor:
        """All exits' confidences in all instances: logits (K, N, C) and certainties (K or K-1, N) to (K, N)."""
        of_exit = [None] * len(logits) if certainty is None else [*certainty, None]
        return torch.stack([self.confidence(k, exit_logits, of_exit[k]) for k, exit_logits in enumerate(logits)])

    def check(self, K: int) -> None:
        """Raise ValueError unless the rule is one for K exits."""
        for name, values in (("temperatures", self.temperatures), ("ranges", self.ranges)):
            if values is not None and len(values) != K:
                raise ValueError(f"{name} are of {len(values)} exits, and must be of {K}")


def certainty_ranges(certainty: Tensor, K: int) -> Tensor:
    """The lowest and highest certainty of each exit: certainties (K or K-1, N) to ranges (K, 2).

    An exit without certainty, the last of a branch model, has the range 0 to 1.
    """
    ranges = certainty.new_tensor([[0.0, 1.0]]).repeat(K, 1)
    ranges[: len(certainty)] = torch.stack(certainty.aminmax(dim=1), dim=1)
    return ranges


def spaced_thresholds(count: int, lowest: float) -> list[float]:
    """`count` thresholds, evenly spaced from `lowest` (1/C, or 0; all leave at the first exit) to 1."""
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


class Exits(NamedTuple):
    """Which exits a model has, and what leaving there costs."""

    layers: Sequence[int]  # (K,), counted from 1
    depth: int  # of the whole encoder, in layers
    method: str

    def costs(self, threshold: float = 0.0) -> list[float]:
        """What leaving at each exit costs, as a share of the encoder's layers: (K,) (Eq. 1 for one instance).

        EE and SWEET have run the exit's n layers: n / depth. MM has run all the models up to and including the exit's.

        Branches have run the exit's layers too, and have asked the k exits before it in vain: (n + k/6) / depth. Each
        of them has run its private layer for [CLS] alone. A sixth of a layer is what the keys and values of all tokens
        take: 2 of its 12 D x D matrices (query, key, value, output, and a feed-forward block of 2 x 4). That is more
        than is paid, since `forward_cls` does without them: BERT's takes about 1/T of a layer, DeBERTa's also projects
        T positions, once per batch. The layer of the exit taken counts as a whole one, though it too ran for [CLS]
        alone: that is Eq. 1.
        At threshold 1 nobody is asked but the last exit, which costs the plain model.
        """
        if self.method == "mm":
            return [n / self.depth for n in accumulate(self.layers)]
        asked = ASKING_A_BRANCH if self.method == "branch" and threshold < 1 else 0
        return [(n + k * asked) / self.depth for k, n in enumerate(self.layers)]


def area_under_curve(ratios: Sequence[float], scores: Sequence[float]) -> float:
    """Mean score over the speedup ratios from the first exit's to 1: the trapezoid's area, divided by its width.

    `ratios` and `scores` hold a point per threshold from 1/C on, where all take the first exit. Ratios may fall again,
    as branches' do from just below threshold 1 to 1, so points are sorted here. The curve is cut at 1, where its score
    is interpolated, and one that ends before 1 is taken as far as it goes, never extrapolated.
    """
    order = np.argsort(ratios, kind="stable")
    x, y = np.array(ratios)[order], np.array(scores)[order]
    end = min(1.0, x[-1])
    x, y = np.append(x[x <= end], end), np.append(y[x <= end], np.interp(end, x, y))
    mean = np.trapezoid(y, x) / (end - x[0]) if end > x[0] else y[-1]
    return float(np.clip(mean, y.min(), y.max()))  # rounding must not make 100.00000000000001 of 100
