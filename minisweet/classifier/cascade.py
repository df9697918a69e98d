"""The cascade: a bag of words answers the easy texts, and the model the rest, together with the bag.

The two err on different texts, and the bag's logits are already there, so they are added with a weight:

    at exit 0         bag / T_0
    at full depth     model / T_1 + w bag / T_0

The two temperatures and the weight are fitted here. A text leaves at exit 0 if its highest probability there reaches
the threshold. That costs no layer, and full depth costs all of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minisweet.classifier.bag_of_words import minimize
from minisweet.classifier.training import leaves
from minisweet.confidence import fit_temperature

PRIOR_OF_WEIGHT = 3.0  # pulls the weight towards 0, so that a few rows decide little


class Logits(NamedTuple):
    """The logits of the bag of words and of the model for N texts, and what is known of the texts."""

    bag: Tensor  # (N, C), in float32 like the next one
    model: Tensor  # (N, C)
    labels: np.ndarray  # (N,), -1 for a text without one
    keys: np.ndarray  # (N,), int64: equal for texts of the same tokens
    units: np.ndarray  # (N,), int64: equal for texts of one group
    precision: str = "torch.float32"  # that the model ran in

    def take(self, rows: np.ndarray) -> "Logits":
        """The logits for some texts (n,)."""
        known = self.labels[rows], self.keys[rows], self.units[rows]
        return Logits(self.bag[rows], self.model[rows], *known, self.precision)


class Answers(NamedTuple):
    """The answers of both exits to N texts. The decision at any threshold follows from these."""

    confidence: Tensor  # (N,), of exit 0, in float32
    early: np.ndarray  # (N,), the class at exit 0
    full: np.ndarray  # (N,), the class at full depth
    labels: np.ndarray  # (N,), -1 for a text without one
    keys: np.ndarray  # (N,), as in `Logits`
    num_labels: int  # C

    @property
    def is_labelled(self) -> np.ndarray:
        """Whether each text (N,) has a label."""
        return self.labels >= 0

    def take(self, rows: np.ndarray) -> "Answers":
        """The answers to some texts, selected by indices (n,) or by a boolean mask (N,)."""
        return self._replace(**{name: part[rows] for name, part in self._asdict().items() if name != "num_labels"})

    def filled(self) -> "Answers":
        """The same, a missing label replaced by full depth's answer."""
        return self._replace(labels=np.where(self.is_labelled, self.labels, self.full))

    def scored(self) -> "Answers":
        """The texts that are scored: those with a label or, if there are none, all against full depth's answers."""
        return self.take(self.is_labelled) if self.is_labelled.any() else self.filled()

    def stay_at(self, thresholds: Sequence[float] | np.ndarray) -> np.ndarray:
        """Whether each text runs the model at each threshold, (M, N); as 0 or 1, the share of the layers it runs."""
        lowest = 1 / self.num_labels
        return np.stack([~leaves(self.confidence, threshold, lowest).numpy() for threshold in thresholds])

    def decide_at(self, thresholds: Sequence[float] | np.ndarray) -> np.ndarray:
        """The answers (M, N) of early exit at each threshold."""
        return np.where(self.stay_at(thresholds), self.full, self.early)


class CascadeRule(NamedTuple):
    """The three numbers that are fitted: two temperatures, and the weight of the bag of words at full depth."""

    bag_temperature: float
    temperature: float
    weight: float

    def at_exit_0(self, bag: Tensor) -> Tensor:
        """The calibrated logits of exit 0, from the bag's: (n, C) each."""
        return bag.float() / self.bag_temperature

    def at_full_depth(self, bag: Tensor, model: Tensor) -> Tensor:
        """The calibrated logits of full depth, from the bag's and the model's: (n, C) each."""
        return model.float() / self.temperature + self.weight * self.at_exit_0(bag)

    def answers(self, logits: Logits) -> Answers:
        """The answers of both exits."""
        first, last = self.at_exit_0(logits.bag), self.at_full_depth(logits.bag, logits.model)
        classes = first.argmax(-1).numpy(), last.argmax(-1).numpy()
        return Answers(first.softmax(-1).amax(-1), *classes, logits.labels, logits.keys, first.shape[1])


def fit_cascade(logits: Logits, combines: bool) -> CascadeRule:
    """Fit both temperatures and, if `combines`, the weight of the bag of words at full depth."""
    labels = torch.from_numpy(logits.labels)
    known = labels >= 0

    # 1. Full depth is fitted to labels; without any its temperature stays 1. The bag's temperature on the labelled
    # rows is for this fit alone.
    bag_temperature, temperature, weight = 1.0, 1.0, 0.0
    if known.any() and combines:
        bag_temperature = fit_temperature(logits.bag[known], labels[known])
        temperature, weight = fit_answer(logits.model[known], logits.bag[known] / bag_temperature, labels[known])
    elif known.any():
        temperature = fit_temperature(logits.model[known], labels[known])

    # 2. The bag of words is fitted to all rows. The answers of full depth replace missing labels.
    full = CascadeRule(bag_temperature, temperature, weight).at_full_depth(logits.bag, logits.model)
    fitted = fit_temperature(logits.bag, labels.where(known, full.argmax(-1)))

    # 3. The weight was fitted to the bag's logits over `bag_temperature`; the rule divides them by `fitted`.
    return CascadeRule(fitted, temperature, weight * fitted / bag_temperature)


def fit_answer(logits: Tensor, bag_logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Fit the temperature T and the weight w in logits / T + w bag_logits, (N, C) each, to labels (N,).

    Minimizes the mean negative log-likelihood plus ((1/T - 1)^2 + PRIOR_OF_WEIGHT w^2) / N, convex in 1/T and w.
    """
    parameters = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)  # 1/T, w

    def loss() -> Tensor:
        value = F.cross_entropy(parameters[0] * logits.double() + parameters[1] * bag_logits.double(), labels)
        return value + ((parameters[0] - 1) ** 2 + PRIOR_OF_WEIGHT * parameters[1] ** 2) / len(labels)

    minimize(loss, [parameters], 50, history=100)
    inverse, weight = parameters.tolist()
    return 1 / max(inverse, 1e-3), weight
