"""When to exit where a bag of words stands in front: temperatures, and the bag's part in the answers of later exits.

A bag of words and the model err on different texts, and the bag's logits are known by then. So a later exit can answer
together with the bag: their calibrated logits are added up with a weight. Full depth is then the last exit and the bag.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minisweet.adaptive import ExitRule
from minisweet.calibration import fit_temperature
from minisweet.classifier.promise import labelled
from minisweet.outputs import Outputs

PRIOR_OF_WEIGHT = 3.0  # pulls a weight towards 0, so that a few rows decide little


class CombinedRule(ExitRule):
    """Exit k's calibrated logits are logits_k / T_k + w_k logits_0 / T_0, with temperatures T and weights w (K,) each.

    The weight of the bag itself is 0. `bag_logits` (N, C) are logits_0 / T_0 of all instances; `calibrated` needs them.
    """

    def __init__(self, num_labels: int, temperatures: Tensor, weights: Tensor) -> None:
        super().__init__(num_labels, temperatures)
        self.weights = weights
        self.bag_logits = None

    @property
    def needs_bag(self) -> bool:
        """Whether the bag of words contributes to later exits, and so is always asked."""
        return bool(self.weights.any())

    def calibrated(self, k: int, logits: Tensor, rows: Tensor | None = None) -> Tensor:
        calibrated = super().calibrated(k, logits)
        if not self.weights[k]:
            return calibrated
        return calibrated + self.weights[k] * (self.bag_logits if rows is None else self.bag_logits[rows])

    def all_calibrated(self, logits: Tensor) -> Tensor:
        rule = copy.copy(self)
        rule.bag_logits = self.calibrated(0, logits[0])
        return torch.stack([rule.calibrated(k, of_exit) for k, of_exit in enumerate(logits)])

    def keep_exits(self, places: Sequence[int]) -> "CombinedRule":
        rule = copy.copy(self)
        rule.temperatures, rule.weights = self.temperatures[list(places)], self.weights[list(places)]
        return rule


def fit_combined_rule(outputs: Outputs, combines: bool = False) -> CombinedRule:
    """Fit the temperatures of all exits and, if it `combines`, the weights of the bag of words."""
    K, _, C = outputs.logits.shape
    bag, last, with_label = outputs.logits[0], outputs.logits[-1], labelled(outputs)
    temperatures, weights = torch.ones(K), torch.zeros(K)

    # 1. The last exit is fitted to labels; without any its temperature stays 1. The bag's temperature on the labelled
    # rows is for this fit alone.
    bag_temperature = 1.0
    if len(with_label.labels) and combines:
        bag_temperature = fit_temperature(with_label.logits[0], with_label.labels)
        bag_logits = with_label.logits[0] / bag_temperature
        temperatures[-1], weights[-1] = fit_answer(with_label.logits[-1], bag_logits, with_label.labels)
        last = last / temperatures[-1] + weights[-1] * bag / bag_temperature
    elif len(with_label.labels):
        temperatures[-1] = fit_temperature(with_label.logits[-1], with_label.labels)

    # 2. The other exits are fitted to all rows. The last exit's answers replace missing labels.
    targets = outputs.labels.where(outputs.labels >= 0, last.argmax(-1))
    for k in range(K - 1):
        if combines and k > 0:
            temperatures[k], weights[k] = fit_answer(outputs.logits[k], bag / temperatures[0], targets)
        else:
            temperatures[k] = fit_temperature(outputs.logits[k], targets)

    # 3. The rule divides the bag's logits by temperatures[0]; the last weight was fitted with another temperature.
    weights[-1] *= temperatures[0] / bag_temperature
    return CombinedRule(C, temperatures, weights)


def fit_answer(logits: Tensor, bag_logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Fit the temperature T and the weight w in logits / T + w bag_logits, (N, C) each, to labels (N,).

    Minimizes the mean negative log-likelihood plus ((1/T - 1)^2 + PRIOR_OF_WEIGHT w^2) / N, convex in 1/T and w.
    """
    parameters = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)  # 1/T, w
    optimizer = torch.optim.LBFGS([parameters], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(parameters[0] * logits.double() + parameters[1] * bag_logits.double(), labels)
        value = value + ((parameters[0] - 1) ** 2 + PRIOR_OF_WEIGHT * parameters[1] ** 2) / len(labels)
        value.backward()
        return value

    optimizer.step(loss)
    inverse, weight = parameters.tolist()
    return 1 / max(inverse, 1e-3), weight
