"""When to leave, and what it costs: exit decisions and Eq. 1 (Sec. 3.3).

An instance leaves at the first exit whose confidence reaches the threshold, and at the last one in any case. The sweep
needs the logits of all exits once, and is exact: an exit's logits do not depend on who left before it.

Dimension letters: K exits, N instances, n some of them, C classes, L layers.
"""

from collections.abc import Sequence
from itertools import accumulate, repeat
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class ExitRule:
    """What an exit answers, and how confident it is: its highest probability, or what it learned of itself (Sec. 5).

    With `weights` exit 0, which was asked anyway, has a say in the answer: exit k's calibrated logits are
    logits_k / T_k + w_k logits_0 / T_0. The paper has no such weights.

    Args:
        num_labels: C.
        temperatures: (K,), what each exit's logits are divided by; None for ones.
        weights: (K,), how much exit 0, the first of the exits, counts at each; 0 at itself. None for zeros.
        ranges: (K, 2), the lowest and the highest certainty of each exit on validation data. This makes it the rule
            of learning-to-exit.
    """

    def __init__(
        self,
        num_labels: int,
        temperatures: Tensor | None = None,
        weights: Tensor | None = None,
        ranges: Tensor | None = None,
    ) -> None:
        self.num_labels, self.temperatures, self.weights, self.ranges = num_labels, temperatures, weights, ranges
        # The lowest possible confidence; at this threshold all leave at the first exit.
        self.lowest = 1 / num_labels if ranges is None else 0.0

    @property
    def needs_exit_0(self) -> bool:
        """Whether exit 0 has a say at later exits, and so is always asked."""
        return self.weights is not None and bool(self.weights.any())

    def calibrated(self, k: int, logits: Tensor, first: Tensor) -> Tensor:
        """Exit k's calibrated logits, k from 0, by its own and the first exit's, which are calibrated: (n, C) each."""
        logits = logits.float() if self.temperatures is None else logits.float() / self.temperatures[k]
        return logits if self.weights is None or not self.weights[k] else logits + self.weights[k] * first

    def confidence(self, k: int, calibrated: Tensor, certainty: Tensor | None) -> Tensor:
        """Exit k's confidence: calibrated logits (n, C) and, of learning-to-exit, certainty (n,) to (n,) in float32."""
        if certainty is None:
            return calibrated.softmax(-1).amax(-1)
        low, high = self.ranges[k]
        return ((certainty.float() - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)

    def all_calibrated(self, logits: Tensor) -> Tensor:
        """The calibrated logits of all exits, of their logits: (K, N, C)."""
        first = self.calibrated(0, logits[0], logits[0])
        return torch.stack([first, *(self.calibrated(k, logits[k], first) for k in range(1, len(logits)))])

    def confidences(self, logits: Tensor, certainty: Tensor | None = None) -> Tensor:
        """All exits' confidences in all instances: logits (K, N, C) and certainties (K, N) to (K, N)."""
        of_exit = [None] * len(logits) if certainty is None else certainty
        return torch.stack([self.confidence(k, its, of_exit[k]) for k, its in enumerate(self.all_calibrated(logits))])

    def kept(self, places: Sequence[int]) -> "ExitRule":
        """The rule of some of its exits, counted from 0; the first must be among them if it has a say."""
        its = (self.temperatures, self.weights, self.ranges)
        return ExitRule(self.num_labels, *(None if values is None else values[list(places)] for values in its))


def in_float32(threshold: float) -> float:
    """A threshold as confidences are, so that 0.99999998 is 1 wherever it is asked."""
    return float(np.float32(threshold))


def leaves(confidence: Tensor, threshold: float, lowest: float) -> Tensor:
    """Whether an instance leaves at an exit that is not the last: confidence (...) to bool (...).

    At threshold 1 nobody leaves, even with a confidence of 1.0, and at `lowest` (1/C, or 0) everybody does, as in the
    paper. A probability can round to 1, or to just below 1/C, in float32.
    """
    threshold, lowest = in_float32(threshold), in_float32(lowest)
    if threshold <= lowest:
        return torch.ones_like(confidence, dtype=torch.bool)
    if threshold >= 1:
        return torch.zeros_like(confidence, dtype=torch.bool)
    return confidence >= threshold


def exits_taken(confidence: Tensor, threshold: float, lowest: float) -> Tensor:
    """Which exit each instance takes: the confidences (K, N) of all exits to exits (N,), counted from 0."""
    leave = leaves(confidence, threshold, lowest)  # (K, N)
    leave[-1] = True
    return (leave.cumsum(0) == 0).sum(0)  # how many exits are before the first True; faster than argmax


class Exits(NamedTuple):
    """Which exits a model has, and what each costs, in layers.

    | | leaving there | asked in vain |
    |---|---|---|
    | EE, SWEET, plain: exit after layer n | n | 0 |
    | MM: each model starts from the words | n | n |
    | branch: its layer runs for [CLS] alone, for two of twelve products per token | n | 1/6 |
    | exit 0: no layer runs | 0 | 0 |

    (DeBERTa's branch takes a quarter, and is charged a sixth too.) Eq. 1 leaves out the exits' heads, exit 0's sum over
    tokens, and that EE's and SWEET's exits, too, run their layer for [CLS] before it runs for all tokens.
    """

    layers: list[int]  # (K,), counted from 1; 0 is exit 0: what an exit's own answer takes
    in_vain: list[float]  # (K,), what an exit adds to the later ones where it was asked and not taken
    depth: int  # L, of the whole encoder
    asks_at_1: bool  # whether earlier exits are asked at threshold 1 too, as MM's are: its curve ends at their sum

    def costs(self, threshold: float = 0.0) -> list[float]:
        """What leaving at each exit costs, as a share of the encoder's layers: (K,) (Eq. 1 for one instance)."""
        is_asked = self.asks_at_1 or in_float32(threshold) < 1
        before = accumulate(self.in_vain, initial=0.0) if is_asked else repeat(0.0)
        return [(own + others) / self.depth for own, others in zip(self.layers, before, strict=False)]

    def take(self, places: Sequence[int]) -> "Exits":
        """Some of the exits alone, by their numbers from 0."""
        layers, in_vain = ([values[k] for k in places] for values in self[:2])
        return Exits(layers, in_vain, self.depth, self.asks_at_1)
