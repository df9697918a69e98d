"""When to exit at the bag of words: temperatures, and the bag's part in the answers of full depth.

A bag of words and the model err on different texts, and the bag's logits are known by then. So full depth can answer
together with the bag: their calibrated logits are added up with a weight.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minisweet.adaptive import ExitRule
from minisweet.calibration import fit_temperature
from minisweet.classifier.bag_of_words import minimize
from minisweet.classifier.promise import labelled
from minisweet.outputs import Outputs

PRIOR_OF_WEIGHT = 3.0  # pulls a weight towards 0, so that a few rows decide little


class CombinedRule(ExitRule):
    """The bag's calibrated logits are logits_0 / T_0, and those of full depth logits_1 / T_1 + w logits_0 / T_0.

    `temperatures` (2,) are T_0 and T_1, and `weights` (2,) are 0 and w.
    """

    def __init__(self, num_labels: int, temperatures: Tensor, weights: Tensor) -> None:
        super().__init__(num_labels, temperatures)
        self.weights = weights

    def full_depth(self, logits: Tensor, bag_logits: Tensor) -> Tensor:
        """Full depth's calibrated logits, from the model's logits and the bag's calibrated logits: (n, C) each."""
        return self.calibrated(1, logits) + self.weights[1] * bag_logits

    def all_calibrated(self, logits: Tensor) -> Tensor:
        bag_logits = self.calibrated(0, logits[0])
        return torch.stack([bag_logits, self.full_depth(logits[1], bag_logits)])


def fit_combined_rule(outputs: Outputs, combines: bool = False) -> CombinedRule:
    """Fit both temperatures and, if it `combines`, the weight of the bag of words at full depth."""
    bag, last = outputs.logits  # (N, C) each
    with_label = labelled(outputs)
    temperatures, weights = torch.ones(2), torch.zeros(2)

    # 1. Full depth is fitted to labels; without any its temperature stays 1. The bag's temperature on the labelled
    # rows is for this fit alone.
    bag_temperature = 1.0
    if len(with_label.labels) and combines:
        bag_temperature = fit_temperature(with_label.logits[0], with_label.labels)
        bag_logits = with_label.logits[0] / bag_temperature
        temperatures[-1], weights[-1] = fit_answer(with_label.logits[-1], bag_logits, with_label.labels)
        last = last / temperatures[-1] + weights[-1] * bag / bag_temperature
    elif len(with_label.labels):
        temperatures[-1] = fit_temperature(with_label.logits[-1], with_label.labels)

    # 2. The bag of words is fitted to all rows. The answers of full depth replace missing labels.
    temperatures[0] = fit_temperature(bag, outputs.labels.where(outputs.labels >= 0, last.argmax(-1)))

    # 3. The rule divides the bag's logits by temperatures[0]; the weight was fitted with another temperature.
    weights[-1] *= temperatures[0] / bag_temperature
    return CombinedRule(bag.shape[1], temperatures, weights)


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
