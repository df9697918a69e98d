"""The state of a classifier, which is immutable and replaced as a whole.

The bag of words scores all texts, the model those that stay.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from minisweet.base.files import InputError, preview
from minisweet.classifier.bag_of_words import NgramExit
from minisweet.classifier.cascade import Answers, Logits
from minisweet.classifier.operating_point import OperatingPoint, choose, choosers_and_judges
from minisweet.classifier.promise import Goal
from minisweet.classifier.rows import LabelType, texts_of
from minisweet.classifier.run import Record
from minisweet.classifier.split import one_of_each, units_of
from minisweet.classifier.training import BATCH_SIZE, leaves, run_all
from minisweet.exits import MultiExitModel
from minisweet.texts import Examples, Texts

TYPES: dict[LabelType, Any] = {"str": str, "int": int, "float": float, "bool": "True".__eq__}  # names back to labels


@dataclass(frozen=True, kw_only=True)
class FitRecord:
    """What `minisweet fit` adds to the record of a run: `fit` in run.json."""

    head: Literal["linear", "pooler"]  # the model's exit: that of probe.py, or a trunk's
    label_type: LabelType = "str"  # of the labels that Python's `fit` got, or a trunk's
    label_column: str | None = None
    group_column: str | None = None
    set_aside: float = 1.0  # the share of the labelled rows that validates; 1 if they come from a file of their own
    trunk: str | None = None  # the run or classifier started from, whose layers stay as they are
    dev_size: float = 0.2
    training_groups: list[str]  # the groups that were learned from
    validation_groups: list[str]  # the groups that validate


class Trained(NamedTuple):
    """What a training makes."""

    record: Record
    about: FitRecord  # the same as `record.fit`
    model: MultiExitModel  # with one exit, at its end; in evaluation mode
    bag: NgramExit  # exit 0
    tokenizer: Tokenizer
    validation: Examples  # with -1 for a missing label

    def ask_bag(self, texts: Texts, device: torch.device, batch_size: int = BATCH_SIZE) -> Tensor:
        """The bag's logits (N, C) for N texts, always in float32."""
        return run_all(lambda ids, mask, _: self.bag(ids, mask), texts, device, None, batch_size, "exit 0")

    def ask_model(
        self, texts: Texts, device: torch.device, precision: torch.dtype | None, batch_size: int = BATCH_SIZE
    ) -> Tensor:
        """The model's logits (N, C) for N texts."""
        return run_all(lambda *inputs: self.model(*inputs)[0].logits, texts, device, precision, batch_size, "model")

    def ask(
        self, texts: Texts, device: torch.device, precision: torch.dtype | None, batch_size: int = BATCH_SIZE
    ) -> Logits:
        """Run both exits on N texts."""
        bag, model = self.ask_bag(texts, device, batch_size), self.ask_model(texts, device, precision, batch_size)
        return Logits(bag, model, texts.labels, texts.keys, units_of(texts), str(precision or torch.float32))

    def choose(self, logits: Logits, goal: Goal) -> OperatingPoint:
        """Choose what to deploy."""
        return replace(choose(logits, goal, self.record.trained_keys, not self.about.trunk), id=self.record.id)


class Answer(NamedTuple):
    """The answer to one text, by the exit that was taken."""

    label: Any  # of the type that was trained on
    confidence: float  # that the exit is right, or, if a run was made without labels, agrees with full depth
    exit_layer: int  # counted from 1; 0 for exit 0, the bag of words
    probabilities: dict  # of all labels, after temperature scaling
    words: tuple[dict[str, float], dict[str, float]] | None = None  # at exit 0, set by `explain` alone


@dataclass(frozen=True)
class State:
    """A classifier that is ready to answer. Threads share it, and keep the one that they began with."""

    trained: Trained  # on `device`
    logits: Logits  # for the validation texts
    point: OperatingPoint
    threshold: float  # that of the operating point, or another one
    device: torch.device
    precision: torch.dtype | None  # to autocast to
    batch_size: int = 32  # the most texts that run at once

    @property
    def labels(self) -> list:
        """The labels (C,), of the type that was trained on."""
        return [TYPES[self.trained.about.label_type](name) for name in self.trained.record.labels]

    @property
    def metric(self) -> str:
        """What the scores of the operating point are."""
        labelled = self.point.labelled_judges if self.point.judging_texts else (self.logits.labels >= 0).any()
        return "accuracy" if labelled else "agreement with full depth"

    @property
    def promise(self) -> str:
        """The promise about new text, in words, or why there is none."""
        if self.point.precision != (now := str(self.precision or torch.float32)):
            amp = {None: "off", torch.bfloat16: "bf16"}.get(self.precision, "fp16")
            return f"the promise was made in {self.point.precision}, and this is {now}: choose again with --amp {amp}"
        if self.threshold != self.point.threshold:
            return f"threshold {self.threshold:g} is not the one that was chosen, so nothing is promised"
        return self.point.in_words(self.trained.about.set_aside)

    def summary(self) -> str:
        """The scores of the bag of words, early exit and full depth on new texts, and what is promised: some lines."""
        point, logits = self.point, self.logits
        title = "on new texts" if point.judging_texts else "on all validation rows, even if trained on"
        lines = [f"{title:<42}{self.metric:>12}   95% interval   share of the layers"]
        for name, score, interval, share in (
            ("a bag of words alone (exit 0)", point.exit_0, point.exit_0_interval, 0.0),
            ("deployed", point.score, point.score_interval, point.share),
            ("full depth", point.full_depth, point.full_depth_interval, 1.0),
        ):
            ends = "{:.1f} to {:.1f}".format(*interval) if interval else ""
            lines.append(f"{name:<42}{score:12.1f}{ends:>15}   {share:12.2f}")
        lines.append(f"early exit at threshold {point.threshold:.6g}")
        support = point.per_class["support"]
        most = 100 * max(support) / max(1, sum(support))
        if self.metric == "accuracy" and point.full_depth <= most:
            lines.append(f"full depth is no better than the majority class ({most:.1f}): the promise is worth nothing")
        if not point.share:
            lines.append("all texts leave at exit 0: nothing need be sent to the model")
        left_out = choosers_and_judges(logits, self.trained.record.trained_keys)[2]
        judges = f"{point.judging_texts:,} of {len(logits.labels):,} validation rows judge, one of each text and group"
        judges += "; a quarter chooses the thresholds to try" * (point.judging_texts > 0)
        only_labelled = point.judging_texts == point.labelled_judges
        judges += "; rows without a label do not" * bool(only_labelled and (logits.labels < 0).any())
        judges += f"; {left_out:,} were trained on" * bool(left_out)
        return "\n".join([*lines, judges, self.promise])

    def tokenize(self, texts: Any) -> Texts:
        """Tokenise texts. Raises InputError, naming the item, for anything else."""
        return Texts(self.trained.tokenizer, texts_of(texts))

    def decide(self, texts: Texts) -> tuple[Tensor, Tensor]:
        """The calibrated logits (N, C) of the exits that N texts take, and the layers (N,) of these exits."""
        trained, rule, size = self.trained, self.point.rule, self.batch_size
        if not len(texts):
            return torch.zeros(0, len(trained.record.labels)), torch.zeros(0)
        bag = trained.ask_bag(texts, self.device, size)
        logits = rule.at_exit_0(bag)
        stay = ~leaves(logits.softmax(-1).amax(-1), self.threshold, 1 / logits.shape[1])  # (N,)
        if stay.any():
            model = trained.ask_model(texts.take(np.flatnonzero(stay.numpy())), self.device, self.precision, size)
            logits[stay] = rule.at_full_depth(bag[stay], model)
        return logits, stay * trained.record.depth

    def classify(self, texts: Texts) -> list[Answer]:
        """Answer N texts, in their order."""
        logits, layers = self.decide(texts)
        return self.answers(logits, layers.tolist())

    def ask(self, texts: Texts) -> Answers:
        """The answers of both exits to N texts."""
        return self.point.rule.answers(self.trained.ask(texts, self.device, self.precision, self.batch_size))

    def new_texts(self, rows: Examples, source: object) -> tuple[Texts, str]:
        """The rows, tokenised, that may test what was chosen, and a line on those left out: how many, and why.

        Left out are training and validation rows, rows of their groups, and unknown labels. One text of each group is
        kept. Raises InputError, with the `source` of the rows, if no row is left.
        """
        record, about, names = self.trained.record, self.trained.about, rows.names or []
        numbers: dict[str | None, int] = {name: number for number, name in enumerate(record.labels)} | {None: -1}
        unknown = sorted({name for name in names if name is not None and name not in numbers})
        texts = Texts(self.trained.tokenizer, rows._replace(labels=[numbers.get(name, -2) for name in names]))
        left = np.ones(len(texts), dtype=bool)
        reasons = [f"{rows.empty:,} without text"] if rows.empty else []
        for is_out, reason in (
            (texts.labels == -2, f"with a label that the model does not know ({preview(unknown)})"),
            (np.isin(texts.keys, record.trained_keys), "that were trained on"),
            (np.isin(texts.keys, self.logits.keys), "that are validation rows, which set the threshold"),
            (in_groups(rows, about.training_groups), "in groups that were trained on"),
            (in_groups(rows, about.validation_groups), "in groups of validation rows"),
        ):
            if count := int((is_out & left).sum()):
                reasons.append(f"{count:,} {reason}")
            left &= ~is_out
        texts = texts.take(np.flatnonzero(left))
        represents = one_of_each(units_of(texts), texts.keys)
        if not represents.all():
            reasons.append(f"{int((~represents).sum()):,} in a group for which another row stands")
        texts = texts.take(np.flatnonzero(represents))
        if not len(texts):
            raise InputError(f"{source}: no row is left to test on: {', '.join(reasons)}")
        told = f"{len(texts):,} of {len(names) + rows.empty:,} rows count"
        return texts, f"{told}; left out: {', '.join(reasons)}" if reasons else told

    def answers(self, logits: Tensor, layers: Sequence[int]) -> list[Answer]:
        """Calibrated logits (N, C), each of the exit after a layer, as answers."""
        probabilities, names = logits.softmax(-1), self.labels
        columns = logits.argmax(-1).tolist(), probabilities.amax(-1).tolist(), layers, probabilities.tolist()
        return [
            Answer(names[label], sure, layer, dict(zip(names, each, strict=True)))
            for label, sure, layer, each in zip(*columns, strict=True)
        ]


def choose_state(
    trained: Trained,
    goal: Goal,
    device: torch.device,
    precision: torch.dtype | None,
    logits: Logits | None = None,
    batch_size: int = 32,
) -> State:
    """Choose an operating point, from the `logits` of the validation texts if these have this precision.

    Otherwise both exits run first.
    """
    if logits is None or logits.precision != str(precision or torch.float32):
        trained.bag.to(device), trained.model.to(device)
        logits = trained.ask(Texts(trained.tokenizer, trained.validation), device, precision)
    point = trained.choose(logits, goal)
    return State(trained, logits, point, point.threshold, device, precision, batch_size)


def in_groups(rows: Examples, known: Sequence[str]) -> np.ndarray:
    """Whether each row (N,) belongs to one of the `known` groups."""
    groups, names = rows.groups or [None] * len(rows.first), {*known}
    return np.array([group in names for group in groups], dtype=bool)
