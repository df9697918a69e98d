"""Early exit as a user calls it: texts in, labels out, with a run that train.py and evaluate.py made."""

import argparse
from collections.abc import Iterable, Sequence
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from minisweet.adaptive import ExitRule
from minisweet.base.commands import Parser, number, whole_number
from minisweet.base.devices import AMP_CHOICES, add_device_options, autocast, choose_device, choose_precision
from minisweet.base.safe import LOG, InputError, as_written, is_text
from minisweet.data.rows import Examples
from minisweet.data.text import TokenizedExamples, load_tokenizer
from minisweet.evaluation.operating import add_wish_options, not_certified, operating_point, shortfall, wish_of
from minisweet.evaluation.sweep import load_validation
from minisweet.live import GATHERED, Answers, early_exit
from minisweet.runs.folders import load_run, read_evaluation
from minisweet.runs.records import Record

WINDOW = 1024  # texts that are tokenised, and sorted by length, at once
ROUNDING = 1e-6  # below the lowest threshold: 0.333333 is meant for 1/3
ARGUMENTS = {  # of the classifier: what is right, and whether a value is
    "run": ("the path of a run folder", lambda run: isinstance(run, str | Path) and run != "" and is_text(str(run))),
    "max_loss": ("a number, 0 or more", lambda points: points is None or (is_number(points) and points >= 0)),
    "speed": ("a number above 0, to 1", lambda share: share is None or (is_number(share) and 0 < share <= 1)),
    "max_change": ("a number from 0.01 to 99.99", lambda p: p is None or (is_number(p) and 0.01 <= p <= 99.99)),
    "sure": ("a number from 50 to 99.9", lambda percent: is_number(percent) and 50 <= percent <= 99.9),
    "device": ("auto, cpu, cuda or cuda:N", lambda device: isinstance(device, str)),
    "amp": (f"one of {', '.join(AMP_CHOICES)}", lambda amp: isinstance(amp, str) and amp in AMP_CHOICES),
    "batch_size": ("a whole number, 1 or more", lambda size: type(size) is int and 0 < size < 2**31),
}


class Answer(NamedTuple):
    """What the exit that was taken says of one text."""

    label: str
    confidence: float  # what was compared with the threshold: of learning-to-exit not one of the probabilities
    exit_layer: int  # counted from 1
    probabilities: dict[str, float]  # of all labels, after temperature scaling


class EarlyExitClassifier:
    """Classifies texts, or pairs of them, each at the first exit whose confidence reaches the threshold.

    Exits, calibration and the operating point are those of evaluation.json. Several threads may share one classifier.
    On a CPU, `minisweet.tune_cpu()` before the first model, once per process, makes it as fast as the commands are.

    Args:
        run: a run folder. One without evaluation.json needs a `threshold`; confidences stay uncalibrated then.
        threshold: from 1/C of C classes (learning-to-exit: 0; all leave at the first exit) to 1 (all run to the last).
            None for the operating point.
        max_loss, speed, max_change: choose the threshold instead: the fastest that loses at most so many points to full
            depth, the best that runs at most this share of the layers, or the fastest that changes at most so many
            percent of full depth's answers, certified with the confidence `sure`, 50 to 99.9 percent.
        device, amp: as the commands' --device and --amp.
        batch_size: texts that run at once.

    Raises InputError (a ValueError) for no run, a broken one, an argument outside its range, a threshold that lacks.
    """

    def __init__(
        self,
        run: str | Path,
        threshold: float | None = None,
        *,
        max_loss: float | None = None,
        speed: float | None = None,
        max_change: float | None = None,
        sure: float = 90.0,
        device: str = "auto",
        amp: str = "auto",
        batch_size: int = 32,
    ) -> None:
        wishes = {"max_loss": max_loss, "speed": speed, "max_change": max_change}
        given = {"run": run, "device": device, "amp": amp, "batch_size": batch_size, "sure": sure}
        check_arguments(given, wishes, threshold)
        try:
            self.device, self.batch_size = choose_device(device), batch_size
        except InputError as error:  # names the option
            raise InputError(str(error).removeprefix("--")) from None
        self.precision, run = choose_precision(amp, self.device), Path(run)
        model, self.record = load_run(run)
        self.evaluation, self.labels = read_evaluation(run, self.record), self.record.labels
        if self.evaluation is not None:
            model = model.keep_exits(self.evaluation.exit_layers)  # evaluate.py --use-exits may have left some out
            self.rule = ExitRule.from_evaluation(self.evaluation, len(self.labels))
        elif threshold is None:
            raise InputError(f"{run}: has no evaluation.json, so it needs a threshold (or first: evaluate.py {run})")
        else:
            self.rule = uncalibrated(self.record, len(model.exit_layers))
        self.threshold = self._chosen(run, threshold, wishes, sure)
        self.model, self.exit_layers = model.to(self.device), model.exit_layers
        self.tokenizer = load_tokenizer(run, self.record.vocab_size, self.record.max_length)

    def __call__(self, texts: Iterable[str | Sequence[str]]) -> list[Answer]:
        """Classify texts and pairs, in their order. Raises InputError, with the index from 0, for what is neither."""
        checked, answers = check_texts(texts), []
        for start in range(0, len(checked), WINDOW):
            answers += self.classify(self.tokenize(checked[start : start + WINDOW]))
        return answers

    def classify(self, examples: TokenizedExamples) -> list[Answer]:
        """Classify what `tokenize` made, in its order."""
        rows, answers = [], []
        if self.model.training:
            self.model.eval()
        for pool in examples.by_length(GATHERED * self.batch_size):
            inputs = pool.to(self.device).inputs
            with autocast(self.device, self.precision):
                found = early_exit(self.model, *inputs, self.threshold, self.rule, self.batch_size)
            rows += pool.rows.tolist()
            answers += self.answers(found)
        return [answers[place] for place in np.argsort(rows)]

    def tokenize(self, texts: list) -> TokenizedExamples:
        """Texts and pairs, mixed, as `check_texts` gives them."""
        return TokenizedExamples(self.tokenizer, Examples(texts, None, None))  # the tokenizer takes a pair for a text

    def answers(self, found: Answers) -> list[Answer]:
        """What exits said of B texts, each text by one of them, as users read it."""
        logits = found.logits
        if self.rule.temperatures is not None:
            logits = logits / self.rule.temperatures.to(logits.device)[found.exits, None]  # (K,) to (B, 1)
        columns = (found.labels, found.confidence, found.exits, logits.softmax(-1))
        return [
            Answer(self.labels[label], confidence, self.exit_layers[k], dict(zip(self.labels, row, strict=True)))
            for label, confidence, k, row in zip(*(column.tolist() for column in columns), strict=True)
        ]

    def _chosen(self, run: Path, threshold: object, wishes: dict, sure: float) -> float:
        """The threshold that is given, or that of evaluation.json, or the one for a wish, whose rule is then taken."""
        name = "threshold" if threshold is not None else f"{run / 'evaluation.json'}: threshold"
        wish, said = {}, ""
        if any(value is not None for value in wishes.values()):
            with torch.device("cpu"):  # whatever the user's default is
                validation = load_validation(run, self.evaluation, self.record)
                wish = wish_of(validation.metric != "agreement", **wishes, sure=sure)
                self.rule, point = operating_point(validation, self.evaluation.calibration, wish)
            said, threshold = shortfall(point, len(validation.logits)), point["threshold"]
        elif threshold is None:
            wish, threshold = self.evaluation.operating_point.wish, self.evaluation.operating_point.threshold
        if wish:
            for line in filter(None, [said, not_certified(wish, threshold, self.evaluation, self.precision)]):
                LOG.warning("%s", line)
        if not is_number(threshold) or not self.rule.lowest - ROUNDING <= threshold <= 1:
            right = f"a number from {self.rule.lowest:.6g} (all leave at the first exit) to 1 (all run to the last)"
            raise InputError(f"{name}: {as_written(threshold)}, should be {right}")
        return float(threshold)


def check_arguments(given: dict, wishes: dict, threshold: object) -> None:
    """Raise InputError for an argument of the classifier outside its range, and for those that do not go together."""
    for name, value in (given | wishes).items():
        right, fits = ARGUMENTS[name]
        if not fits(value):
            raise InputError(f"{name}: {as_written(value)}, should be {right}")
    if sum(value is not None for value in (threshold, *wishes.values())) > 1:
        raise InputError(f"threshold, {', '.join(wishes)}: more than one is given, and each chooses the threshold")
    if given["sure"] != 90.0 and wishes["max_change"] is None:
        raise InputError(f"sure: {given['sure']:g} needs max_change")


def uncalibrated(record: Record, K: int) -> ExitRule:
    """The rule of a run that was not evaluated: each exit's confidence, or certainty, as it is."""
    ranges = torch.tensor([[0.0, 1.0]] * K, dtype=torch.float32, device="cpu")
    return ExitRule(record.num_labels, ranges=ranges if record.exit_strategy == "lte" else None)


def add_classifier_options(parser: Parser) -> None:
    """Add the options that `classifier_of` reads."""
    option = add_wish_options(parser, "threshold (default: the operating point of evaluation.json)")
    option("--threshold", type=number(0, 1), help="leave at this confidence; at 1 all run to the last exit")
    parser.add_argument("--batch-size", type=whole_number(1), default=32, help="texts that run at once (default: 32)")
    add_device_options(parser)


def classifier_of(args: argparse.Namespace) -> EarlyExitClassifier:
    """The classifier that a command's options ask for. Its errors name these."""
    names = ("run", "threshold", "max_loss", "speed", "max_change", "sure", "device", "amp", "batch_size")
    try:
        return EarlyExitClassifier(**{name: value for name in names if (value := getattr(args, name)) is not None})
    except InputError as error:
        name, colon, rest = str(error).partition(": ")
        option = f"--{name.replace('_', '-')}" if name in names[1:] else name
        raise InputError(f"{option}{colon}{rest}") from None


def is_number(value: object) -> bool:
    """Whether `value` is a number that is finite."""
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) < 1e300


def check_texts(texts: Iterable) -> list[str | Sequence[str]]:
    """The texts and pairs, in a list. Raises InputError for another thing, with its index from 0."""
    if isinstance(texts, str | bytes | dict) or not isinstance(texts, Iterable):
        right = "a list of texts or pairs; for one text: classify([text])"
        raise InputError(f"texts: {as_written(texts)}, should be {right}")
    checked = list(texts)
    for i, text in enumerate(checked):
        try:
            for part in text if isinstance(text, tuple | list) and len(text) == 2 else (text,):
                str.encode(part)
        except (TypeError, UnicodeEncodeError):  # no string, or one with half a character
            right = "a text or a pair of texts, without lone surrogates"
            raise InputError(f"item {i}: {as_written(text)}, should be {right}") from None
    return checked
