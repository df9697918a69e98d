"""When to leave, and what it costs: exit decisions, the threshold sweep and the speed-accuracy curve (Sec. 3.3).

An instance leaves at the first exit whose confidence reaches the threshold, and at the last one in any case. An
exit's confidence is its highest softmax probability, or what it has learned of itself: learning-to-exit (Sec. 5).

The sweep needs the logits of all exits once, and is exact: an exit's logits do not depend on who left before it.
Dimension letters: K exits, N instances, n some of them, C classes.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

ASKING_A_BRANCH = 1 / 6  # of a layer, see `exit_costs`


class ExitRule:
    """How confident an exit is, by the softmax or by learning-to-exit. The sweep, live early exit and users share it.

    Args:
        num_labels: C.
        temperatures: what each exit's logits are divided by, (K, 1), or (K, N) where it differs by instance; None for
            1. Not for learning-to-exit.
        ranges: (K, 2), the lowest and the highest certainty of each exit on validation data. This makes it the rule
            of learning-to-exit.

    Raises:
        ValueError: both are given, or ranges are not (K, 2).
    """

    def __init__(self, num_labels: int, temperatures: Tensor | None = None, ranges: Tensor | None = None) -> None:
        if temperatures is not None and ranges is not None:
            raise ValueError("temperatures and ranges: learning-to-exit has no temperatures")
        if ranges is not None and (ranges.ndim != 2 or ranges.shape[1] != 2):
            raise ValueError(f"ranges are {tuple(ranges.shape)}, and must be (K, 2)")
        self.temperatures, self.ranges = temperatures, ranges
        # The confidence that nobody falls below: at this threshold all leave at the first exit.
        self.lowest = 1 / num_labels if ranges is None else 0.0

    @classmethod
    def from_evaluation(cls, evaluation, num_labels: int) -> "ExitRule":
        """The rule for new text: what evaluation.json keeps for it, which was fitted on all of its rows."""
        if evaluation.exit_strategy == "lte":
            return cls(num_labels, ranges=torch.tensor(evaluation.certainty_ranges))
        if evaluation.calibration == "none":  # temperatures stand there all the same, and were not used
            return cls(num_labels)
        return cls(num_labels, torch.tensor(evaluation.temperatures)[:, None])

    def confidence(self, k: int, logits: Tensor, certainty: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """Exit k's confidence in some instances: (n,), in float32.

        Args:
            k: counted from 0.
            logits: (n, C).
            certainty: (n,), or None where the exit has none, as the last of a branch model: it is never asked.
            rows: (n,), which of the N instances that `temperatures` knows; None for all in order.
        """
        if self.ranges is None:
            logits = logits.float()
            if self.temperatures is not None:
                of_exit = self.temperatures[k].to(logits.device)  # (1,) or (N,)
                logits = logits / (of_exit if rows is None or len(of_exit) == 1 else of_exit[rows])[:, None]
            return logits.softmax(-1).amax(-1)
        if certainty is None:
            return logits.new_ones(len(logits), dtype=torch.float32)
        low, high = self.ranges[k].to(certainty.device)
        return ((certainty.float() - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)

    def confidences(self, logits: Tensor, certainty: Tensor | None = None) -> Tensor:
        """All exits' confidences in all instances: logits (K, N, C) and certainties (K or K-1, N) to (K, N)."""
        of_exit = [None] * len(logits) if certainty is None else [*certainty, None]
        return torch.stack([self.confidence(k, exit_logits, of_exit[k]) for k, exit_logits in enumerate(logits)])

    def for_rows(self, rows: Tensor) -> "ExitRule":
        """The rule for the instances `rows` (B,) alone, which count from 0 then."""
        rule = ExitRule.__new__(ExitRule)
        rule.__dict__ |= self.__dict__
        if self.temperatures is not None and self.temperatures.shape[1] > 1:
            rule.temperatures = self.temperatures[:, rows]
        return rule

    def check(self, K: int, B: int) -> None:
        """Raise ValueError unless the rule is one for K exits and B instances."""
        if self.temperatures is not None and self.temperatures.shape not in ((K, 1), (K, B)):
            raise ValueError(f"temperatures are {tuple(self.temperatures.shape)}, and must be ({K}, 1) or ({K}, {B})")
        if self.ranges is not None and len(self.ranges) != K:
            raise ValueError(f"ranges are {tuple(self.ranges.shape)}, and must be ({K}, 2)")


def certainty_ranges(certainty: Tensor, K: int) -> Tensor:
    """The lowest and highest certainty of each exit: certainties (K or K-1, N) to ranges (K, 2).

    An exit without certainty, the last of a branch model, has the range 0 to 1.
    """
    ranges = torch.tensor([[0.0, 1.0]]).repeat(K, 1)
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


def exit_costs(exit_layers: Sequence[int], depth: int, method: str, threshold: float = 0.0) -> list[float]:
    """What leaving at each exit costs, as a share of the encoder's `depth` layers (Eq. 1 for one instance).

    EE and SWEET have run the exit's n layers: n / depth. MM has run all the models up to and including the exit's own.

    Branches have run the exit's layers too, and have asked the k exits before it in vain: (n + k/6) / depth. Each of
    them has run its private layer for [CLS] alone. For that we count the keys and values of all tokens, 2 of the 12
    D x D matrices of a layer (query, key, value, output, and a feed-forward block of 2 x 4): a sixth. `forward_cls`
    does without them: BERT's takes about 1/T of a layer, DeBERTa's also projects T positions, once per batch. The layer
    of the exit taken counts as a whole one, though it too ran for [CLS] alone: that is Eq. 1. At threshold 1 nobody is
    asked but the last exit, which costs the plain model.
    """
    if method == "mm":
        return [n / depth for n in accumulate(exit_layers)]
    asked = ASKING_A_BRANCH if method == "branch" and threshold < 1 else 0
    return [(n + k * asked) / depth for k, n in enumerate(exit_layers)]


def area_under_curve(ratios: Sequence[float], scores: Sequence[float]) -> float:
    """Mean score over the speedup ratios from the first exit's to 1: the trapezoid's area, divided by its width.

    `ratios` and `scores` hold a point per threshold from 1/C on, where all take the first exit. They are sorted by
    ratio here: branches cost more than 1 just below threshold 1, and 1 at it. The curve is cut at 1, and one that ends
    before 1 is taken as far as it goes, never extrapolated.
    """
    order = np.argsort(ratios, kind="stable")
    x, y = np.array(ratios)[order], np.array(scores)[order]
    end = min(1.0, x[-1])
    x, y = np.append(x[x <= end], end), np.append(y[x <= end], np.interp(end, x, y))
    return float(np.trapezoid(y, x) / (end - x[0])) if end > x[0] else float(y[-1])
