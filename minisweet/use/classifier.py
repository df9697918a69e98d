"""Early exit as a user calls it: texts in, labels out, with a run that train.py and evaluate.py made.

Dimension letters: B texts, K exits, C classes.
"""

import argparse
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch

from minisweet.adaptive import ExitRule, in_float32
from minisweet.base.commands import Parser, number, whole_number
from minisweet.base.devices import AMP_CHOICES, add_device_options, autocast, choose_device, choose_precision
from minisweet.base.files import LOG, InputError
from minisweet.data.rows import Examples
from minisweet.data.text import TokenizedExamples, load_tokenizer
from minisweet.evaluation.metrics import has_labels
from minisweet.exits import ExitModel
from minisweet.live import Answers, early_exit
from minisweet.runs.folders import load_run, read_evaluation
from minisweet.runs.records import GOALS, Evaluation, Record

CHOOSER = "evaluate.py alone chooses the operating point: give it --max-loss, --max-change or --speed"
AT_ONCE = 1024  # texts of which exit 0 is asked, so that those who stay fill batches


class Answer(NamedTuple):
    """What the exit that was taken says of one text.

    `confidence` is what was compared with the threshold: with learning-to-exit it is none of the probabilities. Where a
    run was made without labels, it estimates how often the exit agrees with full depth, not how often it is right.
    """

    label: str
    confidence: float
    exit_layer: int  # counted from 1; 0 for exit 0, a bag of words before the first layer
    probabilities: dict[str, float]  # of all labels, after temperature scaling


class EarlyExitClassifier:
    """Classifies texts, or pairs of texts, each at the first exit whose confidence reaches the threshold.

    The exits that are asked, their calibration and the operating point come from the run's evaluation.json. Several
    threads may share one classifier. On a CPU, `minisweet.tune_cpu()` before a process's first model makes it faster.

    Args:
        run: the folder of an evaluated run.
        threshold: from 0 to 1, where all texts run to the last exit; up to 1/C (learning-to-exit: 0) all leave at the
            first. None for the operating point, which evaluate.py alone chooses.
        device, amp: as the commands' --device and --amp.
        batch_size: how many texts run at once.

    Raises InputError, a ValueError, where there is no evaluated run, and for arguments outside their ranges.
    """

    def __init__(
        self,
        run: str | Path,
        threshold: float | None = None,
        *,
        device: str = "auto",
        amp: str = "auto",
        batch_size: int = 32,
        **others: object,
    ) -> None:
        for name in others:
            raise TypeError(f"{name} is no argument" + f": {CHOOSER}, or pass threshold" * (name in GOALS))
        is_number = isinstance(threshold, Real) and not isinstance(threshold, bool)
        is_whole = isinstance(batch_size, Integral) and not isinstance(batch_size, bool)
        for name, value, is_right, wanted in (
            ("threshold", threshold, threshold is None or (is_number and 0 <= threshold <= 1), "a number from 0 to 1"),
            ("batch_size", batch_size, is_whole and 1 <= batch_size < 2**31, f"a whole number from 1 to {2**31 - 1}"),
            ("amp", amp, amp in AMP_CHOICES, f"one of {', '.join(AMP_CHOICES)}"),
            ("run", run, isinstance(run, str | os.PathLike) and run != "", "the path of a run folder"),
        ):
            if not is_right:
                raise InputError(f"{name}: {value!r:.80}, should be {wanted}")
        self.device, run = choose_device(str(device), "device"), Path(run)
        self.precision = choose_precision(amp, self.device)
        (model, record), evaluation = load_run(run), read_evaluation(run)
        self._deploy(run, model, record, evaluation)
        point, was, now = evaluation.operating_point, evaluation.precision, str(self.precision or torch.float32)
        if evaluation.run_digest is None:
            LOG.warning("%s: an older evaluation; whether it is of this model cannot be checked: evaluate again", run)
        if threshold is not None:
            self.threshold = in_float32(threshold)
        elif "sure" in point.goal and point.threshold < 1 and was != now:  # at 1 nothing can change
            LOG.warning("evaluate.py promised for %s, and not for %s: evaluate again in this precision", was, now)
        self.batch_size = int(batch_size)

    @classmethod
    def of(cls, run: Path, device: torch.device, precision: torch.dtype | None, *loaded) -> "EarlyExitClassifier":
        """The same of what is loaded already: model, record and evaluation."""
        classify = cls.__new__(cls)
        classify.device, classify.precision = device, precision
        classify._deploy(run, *loaded)
        return classify

    def _deploy(self, run: Path, model: ExitModel, record: Record, evaluation: Evaluation) -> None:
        self.record, self.evaluation, self.batch_size = record, evaluation, 32
        self.labels, self.pairs = record.labels, len(record.columns) == 2
        self.certainty_name = "confidence" if has_labels(record.metric) else "agreement"  # where it is printed
        point, layers = evaluation.operating_point, evaluation.exit_layers
        self.threshold = in_float32(point.threshold)
        self.exit_layers, rule = point.asked_exits, ExitRule.from_evaluation(evaluation, len(self.labels))
        self.rule = rule.kept([layers.index(n) for n in self.exit_layers])
        self.model = model.keep_exits(self.exit_layers).to(self.device)
        self.tokenizer = load_tokenizer(run, record.vocab_size, record.max_length)

    def __call__(self, texts: Iterable[str | Sequence[str]]) -> list[Answer]:
        """Classify texts, or pairs of them where the run was trained on pairs, in their order.

        Raises InputError, with the item's index from 0, for what is something else.
        """
        return self.classify(self.tokenize(texts))

    def tokenize(self, texts: Iterable[str | Sequence[str]]) -> TokenizedExamples:
        """The tokens of what `__call__` takes."""
        if isinstance(texts, str | bytes | Mapping) or not isinstance(texts, Iterable):
            raise InputError(f"texts: {texts!r:.80}, should be a list; for one text: classify([text])")
        rows = []
        for i, text in enumerate(texts):
            rows.append(text if isinstance(text, tuple | list) else [text])
            if len(rows[i]) != 1 + self.pairs or not all(isinstance(part, str) for part in rows[i]):
                wanted = "a pair of texts" if self.pairs else "one text"
                raise InputError(f"item {i}: {text!r:.80}, should be {wanted}, as in training")
            if half := re.search("[\ud800-\udfff]", "".join(rows[i])):
                raise InputError(f"item {i}: it holds {half[0]!r}, half of a character; should be valid Unicode")
        second = [parts[1] for parts in rows] if self.pairs else None
        return TokenizedExamples(self.tokenizer, Examples([parts[0] for parts in rows], second, None))

    def classify(self, examples: TokenizedExamples) -> list[Answer]:
        """Classify what `tokenize` made, in its order."""
        answers: dict[int, Answer] = {}
        for pool in examples.by_length(max(AT_ONCE, self.batch_size)):
            inputs = pool.to(self.device).inputs
            with autocast(self.device, self.precision):
                found = early_exit(self.model, *inputs, self.threshold, self.rule, self.batch_size)
            answers.update(zip(pool.rows.tolist(), self.answers(found), strict=True))
        return [answers[row] for row in range(len(examples))]

    def answers(self, found: Answers) -> list[Answer]:
        """What exits said of B texts, each text by one of them, as users read it."""
        labels, exits, logits, confidence = (tensor.cpu() for tensor in found)
        logits = logits / self.rule.temperatures[exits, None]  # (B, C) by (B, 1)
        columns = map(torch.Tensor.tolist, (labels, confidence, exits, logits.softmax(-1)))
        return [
            Answer(self.labels[label], sure, self.exit_layers[k], dict(zip(self.labels, row, strict=True)))
            for label, sure, k, row in zip(*columns, strict=True)
        ]


def _chosen_elsewhere(value: str) -> NoReturn:
    raise argparse.ArgumentTypeError(f"{CHOOSER}, or name a --threshold")


def add_classifier_options(parser: Parser) -> None:
    """Add the options that `classifier_of` reads."""
    option = parser.add_argument
    threshold = "leave at this confidence; at 1 all run to the last exit (default: the operating point)"
    option("--threshold", type=number(0, 1), help=threshold)
    option("--batch-size", type=whole_number(1), default=32, help="texts that run at once (default: 32)")
    add_device_options(parser)
    for name in GOALS:  # which once were options here
        option(f"--{name.replace('_', '-')}", type=_chosen_elsewhere, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def classifier_of(args: argparse.Namespace) -> EarlyExitClassifier:
    """The classifier that a command's options ask for."""
    return EarlyExitClassifier(args.run, args.threshold, device=args.device, amp=args.amp, batch_size=args.batch_size)
