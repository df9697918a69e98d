"""The cascade: a bag of words answers the easy texts; the model answers the rest, with the bag's logits added.

The two err on different texts, and the bag's logits are already there, so they are added with a weight:

    at exit 0         bag / T_0
    at full depth     model / T_1 + w bag / T_0

The two temperatures and the weight are fitted here. A text leaves at exit 0 if its highest probability there reaches
the threshold. That costs no layer, and full depth costs all of them.

Dimension letters: B batch, T tokens, N texts, n some of them, C classes, M thresholds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from minisweet.base.commands import progress
from minisweet.base.devices import tokens_at_once
from minisweet.base.files import InputError
from minisweet.classifier.bag_of_words import NgramExit, minimize
from minisweet.classifier.probe import FullModel
from minisweet.classifier.rows import texts_of
from minisweet.confidence import fit_temperature
from minisweet.texts import Texts

BATCH_SIZE = 64  # for inference, by default
PRIOR_OF_WEIGHT = 3.0  # pulls the weight towards 0, so that a few rows decide little
Rule = tuple[float, float, float]  # the two temperatures, and the weight of the bag of words at full depth


class Answer(NamedTuple):
    """The answer to one text, by the exit that was taken."""

    label: Any  # of the same type as the training labels
    confidence: float  # the label's probability; for a run without labels, the probability that full depth agrees
    exit_layer: int  # counted from 1; 0 for exit 0, the bag of words
    probabilities: dict  # of all labels, after temperature scaling
    words: tuple[dict[str, float], dict[str, float]] | None = None  # at exit 0, set by `explain` alone


@dataclass(frozen=True)
class Cascade:
    """The deployed classifier. It is immutable: it is replaced, never changed, so threads may share it."""

    tokenizer: Tokenizer
    labels: list  # (C,), of the same type as the training labels
    bag: NgramExit  # on `device`, like the model
    model: FullModel  # in evaluation mode
    rule: Rule
    threshold: float  # a text leaves at the bag of words if its confidence reaches it
    device: torch.device = torch.device("cpu")
    precision: torch.dtype | None = None  # that the model autocasts to; None means float32
    batch_size: int = 32  # the most texts that run at once

    def tokenize(self, texts: Any) -> Texts:
        """Tokenize texts. Raises InputError, naming the item, for anything else."""
        return Texts(self.tokenizer, texts_of(texts))

    def answer(self, texts: Texts) -> list[Answer]:
        """Answer N texts, in their order."""
        logits, layers = self.decide(texts)
        return self.as_answers(logits, layers.tolist())

    def decide(self, texts: Texts) -> tuple[Tensor, Tensor]:
        """The calibrated logits (N, C) of the exits that N texts take, and the layers (N,) of these exits."""
        if not len(texts):
            return torch.zeros(0, len(self.labels)), torch.zeros(0)
        bag = self.ask_bag(texts, self.batch_size)
        logits = at_exit_0(bag, self.rule)
        stay = ~leaves(logits.softmax(-1).amax(-1), self.threshold, 1 / len(self.labels))  # (N,)
        if stay.any():
            model = self.ask_model(texts.take(np.flatnonzero(stay.numpy())), self.batch_size)
            logits[stay] = at_full_depth(bag[stay], model, self.rule)
        return logits, stay * self.model.encoder.depth

    def as_answers(self, logits: Tensor, layers: Sequence[int]) -> list[Answer]:
        """Turn calibrated logits (N, C) into answers; `layers` (N,) are those of the exits that gave them."""
        probabilities = logits.softmax(-1)
        columns = logits.argmax(-1).tolist(), probabilities.amax(-1).tolist(), layers, probabilities.tolist()
        return [
            Answer(self.labels[label], sure, layer, dict(zip(self.labels, each, strict=True)))
            for label, sure, layer, each in zip(*columns, strict=True)
        ]

    def ask_bag(self, texts: Texts, batch_size: int = BATCH_SIZE) -> Tensor:
        """The bag's logits (N, C) for N texts, always in float32."""
        return run_all(lambda ids, mask, _: self.bag(ids, mask), texts, self.device, None, batch_size, "exit 0")

    def ask_model(self, texts: Texts, batch_size: int = BATCH_SIZE) -> Tensor:
        """The model's logits (N, C) for N texts."""
        return run_all(self.model, texts, self.device, self.precision, batch_size, "model")

    def ask_both(self, texts: Texts, batch_size: int = BATCH_SIZE) -> Tensor:
        """The logits (2, N, C) of the bag and of the model for N texts."""
        return torch.stack([self.ask_bag(texts, batch_size), self.ask_model(texts, batch_size)])


@torch.no_grad()  # inference_mode would make autocast cast the weights anew for each product
def run_all(
    step: Callable[..., Tensor],
    texts: Texts,
    device: torch.device,
    precision: torch.dtype | None = None,
    batch_size: int = BATCH_SIZE,
    title: str = "",
) -> Tensor:
    """Run a step on N texts. Returns its outputs (N, ...) in the order of the texts, in float32 and on the CPU.

    The step maps input_ids, attention_mask and token_type_ids, (B, T) each on the device, to an output (B, ...).
    `precision` is the type to autocast to; None means float32. Raises InputError if an output is infinite or NaN.
    """
    rows, found = [], []
    with (
        torch.autocast(device.type, precision, enabled=precision is not None),
        progress(total=len(texts), unit="text", desc=title, leave=False) as bar,
    ):
        for batch in texts.by_length(batch_size, tokens_at_once(device)):
            rows.append(batch.rows)
            found.append(step(*batch.to(device).inputs).float().cpu())
            bar.update(len(batch.rows))
    whole = torch.cat(found)[torch.cat(rows).argsort()]
    if not whole.isfinite().all():
        raise InputError("the exits give infinite numbers or NaN; try --amp off, or train at a lower --lr")
    return whole


class Answers(NamedTuple):
    """The answers of both exits to N texts. The decision at any threshold follows from these."""

    confidence: Tensor  # (N,), of exit 0, in float32
    early: np.ndarray  # (N,), the class at exit 0
    full: np.ndarray  # (N,), the class at full depth
    labels: np.ndarray  # (N,), that of full depth for a text without one
    is_labelled: np.ndarray  # (N,), whether a text has a label
    keys: np.ndarray  # (N,), int64: equal for texts of the same tokens
    num_labels: int  # C

    def take(self, rows: np.ndarray) -> "Answers":
        """The answers to some texts, selected by indices (n,) or by a boolean mask (N,)."""
        taken = {name: part[rows] for name, part in self._asdict().items() if name != "num_labels"}
        return self._replace(**taken)

    def scored(self) -> "Answers":
        """The texts that are scored: those with a label or, if there are none, all."""
        return self.take(self.is_labelled) if self.is_labelled.any() else self

    def stay_at(self, thresholds: Sequence[float] | np.ndarray) -> np.ndarray:
        """Whether each text runs the model at each threshold, (M, N); as 0 or 1, the share of the layers it runs."""
        lowest = 1 / self.num_labels
        return np.stack([~leaves(self.confidence, threshold, lowest).numpy() for threshold in thresholds])

    def decide_at(self, thresholds: Sequence[float] | np.ndarray) -> np.ndarray:
        """The answers (M, N) of early exit at each threshold."""
        return np.where(self.stay_at(thresholds), self.full, self.early)


def answers_of(logits: Tensor, rule: Rule, labels: np.ndarray, keys: np.ndarray) -> Answers:
    """The answers of both exits to N texts, from their logits (2, N, C) and labels, -1 for a text without one."""
    first, last = at_exit_0(logits[0], rule), at_full_depth(logits[0], logits[1], rule)
    early, full, has_label = first.argmax(-1).numpy(), last.argmax(-1).numpy(), labels >= 0
    filled = np.where(has_label, labels, full)
    return Answers(first.softmax(-1).amax(-1), early, full, filled, has_label, keys, first.shape[1])


def at_exit_0(bag: Tensor, rule: Rule) -> Tensor:
    """The calibrated logits of exit 0, from the bag's: (n, C) each."""
    return bag.float() / rule[0]


def at_full_depth(bag: Tensor, model: Tensor, rule: Rule) -> Tensor:
    """The calibrated logits of full depth, from the bag's and the model's: (n, C) each."""
    return model.float() / rule[1] + rule[2] * at_exit_0(bag, rule)


def in_float32(threshold: float) -> float:
    """Round a threshold to float32, the type of confidences, so that 0.99999998 is 1 everywhere."""
    return float(np.float32(threshold))


def leaves(confidence: Tensor, threshold: float, lowest: float) -> Tensor:
    """Whether a text leaves at exit 0: confidence (...) to bool (...).

    At threshold 1 no text leaves, not even with a confidence of 1.0; at `lowest`, 1/C, every text does. Both cases are
    explicit, because in float32 a probability can round to 1, or to just below 1/C.
    """
    threshold, lowest = in_float32(threshold), in_float32(lowest)
    if threshold <= lowest:
        return torch.ones_like(confidence, dtype=torch.bool)
    if threshold >= 1:
        return torch.zeros_like(confidence, dtype=torch.bool)
    return confidence >= threshold


def fit_rule(logits: Tensor, labels: np.ndarray, combines: bool) -> Rule:
    """Fit both temperatures and, if `combines`, the weight of the bag of words at full depth.

    `logits` (2, N, C) are the bag's and the model's, `labels` (N,) are -1 for a text without one.
    """
    bag, model = logits
    gold = torch.from_numpy(labels)
    known = gold >= 0

    # 1. Full depth is fitted to labels; without any its temperature stays 1. The bag's temperature on the labelled
    # rows is for this fit alone.
    bag_temperature, temperature, weight = 1.0, 1.0, 0.0
    if known.any() and combines:
        bag_temperature = fit_temperature(bag[known], gold[known])
        temperature, weight = fit_answer(model[known], bag[known] / bag_temperature, gold[known])
    elif known.any():
        temperature = fit_temperature(model[known], gold[known])

    # 2. The bag of words is fitted to all rows. The answers of full depth replace missing labels.
    full = at_full_depth(bag, model, (bag_temperature, temperature, weight))
    fitted = fit_temperature(bag, gold.where(known, full.argmax(-1)))

    # 3. The weight was fitted to the bag's logits over `bag_temperature`; the rule divides them by `fitted`.
    return fitted, temperature, weight * fitted / bag_temperature


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
