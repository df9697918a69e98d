"""When an instance exits, and what that costs: exit decisions and Eq. 1 of the paper (Sec. 3.3).

An instance takes the first exit whose confidence reaches the threshold, or else the last exit. The logits of all exits
are computed once; decisions can then be made for any threshold. They are exact, because an exit's logits do not depend
on which other instances have exited.

Dimension letters: K exits, N instances, n some of them, C classes, L layers.
"""

from collections.abc import Sequence
from itertools import accumulate, repeat
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class ExitRule:
    """How confident each exit is: its highest probability, or the certainty that it has learned (Sec. 5).

    Args:
        num_labels: C.
        temperatures: (K,), by which each exit's logits are divided. None means ones.
        ranges: (K, 2), the lowest and the highest certainty of each exit on validation data. If given, this is the rule
            of learning-to-exit.
    """

    def __init__(self, num_labels: int, temperatures: Tensor | None = None, ranges: Tensor | None = None) -> None:
        self.num_labels, self.temperatures, self.ranges = num_labels, temperatures, ranges
        # The lowest possible confidence. At this threshold every instance takes the first exit.
        self.lowest = 1 / num_labels if ranges is None else 0.0

    def calibrated(self, k: int, logits: Tensor, rows: Tensor | None = None) -> Tensor:
        """Exit k's calibrated logits (n, C), from its logits (n, C), with k counted from 0.

        `rows` (n,) are the instances' numbers among all N, None for all of them in order. A rule that combines
        classifiers needs them (a subclass in classifier/); this one does not.
        """
        return logits.float() if self.temperatures is None else logits.float() / self.temperatures[k]

    def confidence(self, k: int, calibrated: Tensor, certainty: Tensor | None) -> Tensor:
        """Exit k's confidence (n,) in float32, from calibrated logits (n, C) or, if there is one, certainty (n,)."""
        if certainty is None:
            return calibrated.softmax(-1).amax(-1)
        low, high = self.ranges[k]
        return ((certainty.float() - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)

    def all_calibrated(self, logits: Tensor) -> Tensor:
        """The calibrated logits (K, N, C) of all exits, from their logits (K, N, C)."""
        return torch.stack([self.calibrated(k, of_exit) for k, of_exit in enumerate(logits)])

    def confidences(self, logits: Tensor, certainty: Tensor | None = None) -> Tensor:
        """The confidences (K, N) of all exits, from logits (K, N, C) and certainties (K, N)."""
        certainties = [None] * len(logits) if certainty is None else certainty
        rows = zip(self.all_calibrated(logits), certainties, strict=True)
        return torch.stack([self.confidence(k, *of_exit) for k, of_exit in enumerate(rows)])

    def keep_exits(self, places: Sequence[int]) -> "ExitRule":
        """The rule of some of the exits, which are counted from 0."""
        parts = (None if part is None else part[list(places)] for part in (self.temperatures, self.ranges))
        return ExitRule(self.num_labels, *parts)


def in_float32(threshold: float) -> float:
    """Round a threshold to float32, the type of confidences, so that 0.99999998 is 1 everywhere."""
    return float(np.float32(threshold))


def leaves(confidence: Tensor, threshold: float, lowest: float) -> Tensor:
    """Whether an instance exits, at any exit but the last: confidence (...) to bool (...).

    At threshold 1 no instance exits, not even with a confidence of 1.0; at `lowest` (1/C, or 0) every instance does, as
    in the paper. Both cases are explicit, because in float32 a probability can round to 1, or to just below 1/C.
    """
    threshold, lowest = in_float32(threshold), in_float32(lowest)
    if threshold <= lowest:
        return torch.ones_like(confidence, dtype=torch.bool)
    if threshold >= 1:
        return torch.zeros_like(confidence, dtype=torch.bool)
    return confidence >= threshold


def exits_taken(confidence: Tensor, threshold: float, lowest: float) -> Tensor:
    """The exit that each instance takes (N,), counted from 0, from the confidences (K, N) of all exits."""
    leave = leaves(confidence, threshold, lowest)  # (K, N)
    leave[-1] = True
    return (leave.cumsum(0) == 0).sum(0)  # the number of exits before the first True; faster than argmax


class Exits(NamedTuple):
    """The exits of a model, and what each one costs, in layers.

    | exit after layer n of | cost of its answer | cost if tried and not taken |
    |---|---|---|
    | EE, SWEET, plain | n | 0 |
    | MM, whose models each start from the embeddings | n | n |
    | branch: its layer runs for [CLS] alone, but with keys and values of all tokens (2 of 12 products) | n | 1/6 |

    (In DeBERTa a branch costs a quarter of a layer; a sixth is charged there too.) Eq. 1 counts neither the heads nor,
    in EE and SWEET, the extra run of the exit's layer for [CLS].
    """

    layers: list[int]  # (K,), counted from 1: the cost of an exit's own answer
    in_vain: list[float]  # (K,), what an exit adds to the cost of later ones if it was tried and not taken
    depth: int  # L, of the whole encoder
    asks_at_1: bool  # whether earlier exits run at threshold 1 too, as in MM, whose curve ends at the sum of `layers`

    def costs(self, threshold: float = 0.0) -> list[float]:
        """The cost of taking each exit, as a share of the encoder's layers: (K,) (Eq. 1 for one instance)."""
        are_tried = self.asks_at_1 or in_float32(threshold) < 1
        before = accumulate(self.in_vain, initial=0.0) if are_tried else repeat(0.0)
        return [(own + earlier) / self.depth for own, earlier in zip(self.layers, before, strict=False)]

    def keep_exits(self, places: Sequence[int]) -> "Exits":
        """Some of the exits, which are counted from 0."""
        layers, in_vain = ([values[k] for k in places] for values in (self.layers, self.in_vain))
        return Exits(layers, in_vain, self.depth, self.asks_at_1)


def exits_of(model) -> Exits:
    """The exits of an `ExitModel`."""
    in_vain = [{"mm": float(n), "branch": 1 / 6}.get(model.method, 0.0) for n in model.exit_layers]
    return Exits(list(model.exit_layers), in_vain, model.models_alone[-1].encoder.depth, model.method == "mm")
