"""When an instance exits, and what that costs: exit decisions and Eq. 1 of the paper (Sec. 3.3).

An instance takes the first exit whose confidence reaches the threshold, or else the last exit. The logits of all exits
are computed once; decisions can then be made for any threshold. They are exact, because an exit's logits do not depend
on which other instances have exited.

Dimension letters: K exits, N instances, n some of them, C classes, L layers.
"""

from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minisweet.exits import ExitModel


class ExitRule:
    """How confident each exit is: its highest probability, or the certainty that it has learned (Sec. 5).

    Args:
        num_labels: C.
        temperatures: (K,), by which each exit's logits are divided. None means ones.
        ranges: (K, 2), the lowest and the highest certainty of each exit on validation data. If given, this is the rule
            of learning-to-exit.
    """

    def __init__(self, num_labels: int, temperatures: Tensor | None = None, ranges: Tensor | None = None) -> None:
        self.temperatures, self.ranges = temperatures, ranges
        # The lowest possible confidence. At this threshold every instance takes the first exit.
        self.lowest = 1 / num_labels if ranges is None else 0.0

    def apply(self, k: int, logits: Tensor, certainty: Tensor | None) -> tuple[Tensor, Tensor]:
        """Exit k's calibrated logits (n, C) and confidence (n,), from logits (n, C) and certainty (n,) or None."""
        calibrated = logits.float() if self.temperatures is None else logits.float() / self.temperatures[k]
        if certainty is None or self.ranges is None:
            return calibrated, calibrated.softmax(-1).amax(-1)
        low, high = self.ranges[k]
        return calibrated, ((certainty.float() - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)

    def confidences(self, logits: Tensor, certainty: Tensor | None = None) -> Tensor:
        """The confidences (K, N) of all exits, from logits (K, N, C) and certainties (K, N)."""
        certainties = [None] * len(logits) if certainty is None else certainty
        exits = zip(logits, certainties, strict=True)
        return torch.stack([self.apply(k, *of_exit)[1] for k, of_exit in enumerate(exits)])


def in_float32(threshold: float) -> float:
    """Round a threshold to float32, the type of confidences, so that 0.99999998 is 1 everywhere."""
    return float(np.float32(threshold))


def leaves(confidence: Tensor, threshold: float, lowest: float) -> Tensor:
    """Whether an instance exits, at any exit but the last: confidence (...) to bool (...).

    At threshold 1 no instance exits, not even with a confidence of 1.0; at `lowest` (1/C, or 0) every instance does.
    Both cases are explicit, because in float32 a probability can round to 1, or to just below 1/C.
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

    The exit after layer n costs n layers. In MM, whose models each start from the embeddings, it also costs the layers
    of the models before. Eq. 1 does not count the heads.
    """

    layers: list[int]  # (K,), counted from 1
    depth: int  # L, of the whole encoder
    add_up: bool = False  # whether each exit is a model of its own that starts from the embeddings, as in MM

    def costs(self) -> list[float]:
        """The cost of taking each exit, as a share of the encoder's layers: (K,) (Eq. 1 for one instance)."""
        return [n / self.depth for n in (accumulate(self.layers) if self.add_up else self.layers)]


def exits_of(model: ExitModel) -> Exits:
    """The exits of an `ExitModel`."""
    return Exits(list(model.exit_layers), model.models_alone[-1].encoder.depth, add_up=model.method == "mm")
