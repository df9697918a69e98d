"""Early exit as a user calls it: texts in, labels out, with a run that train.py and evaluate.py made.

Dimension letters: B texts, K exits, C classes.
"""

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import NamedTuple

import torch

from minisweet.adaptive import ExitRule
from minisweet.base.commands import Parser, number, whole_number
from minisweet.base.devices import AMP_CHOICES, add_device_options, autocast, choose_device, choose_precision
from minisweet.base.files import LOG, InputError
from minisweet.data.rows import Examples
from minisweet.data.text import TokenizedExamples, load_tokenizer
from minisweet.evaluation import goals
from minisweet.evaluation.answers import load_answers
from minisweet.evaluation.operating import deal, operating_point
from minisweet.live import Answers, early_exit
from minisweet.runs.folders import load_run, read_evaluation

RANGES = goals.RANGES | {"threshold": (0, 1), "batch_size": (1, 2**31)}  # from the lowest to the highest value
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
            first. None for the operating point.
        max_loss, speed, max_change: a goal chooses the threshold instead: the fastest that loses at most so many points
            to full depth; the slowest that runs at most this share of the layers; or the fastest that changes at most
            so many percent of full depth's answers.
        sure: how sure, from 50 to 99.9 percent, it must be that `max_loss` (default 70) or `max_change` (default 90)
            holds on new text. Alone it goes with evaluate.py's default goal.
        device, amp: as the commands' --device and --amp.
        batch_size: how many texts run at once.

    Raises InputError, a ValueError, where there is no evaluated run, and for arguments outside their ranges.
    """

    def __init__(
        self,
        run: str | Path,
        threshold: float | None = None,
        *,
        max_loss: float | None = None,
        speed: float | None = None,
        max_change: float | None = None,
        sure: float | None = None,
        device: str = "auto",
        amp: str = "auto",
        batch_size: int = 32,
    ) -> None:
        goal = {"max_loss": max_loss, "speed": speed, "max_change": max_change}
        for name, value in {"threshold": threshold, **goal, "sure": sure, "batch_size": batch_size}.items():
            low, high = RANGES[name]
            kind = Integral if name == "batch_size" else Real | None
            if not isinstance(value, kind) or (value is not None and not low <= value <= high):
                raise InputError(f"{name}: {value!r:.80}, should be a number from {low} to {high}")
        if sum(value is not None for value in (threshold, *goal.values())) > 1:
            raise InputError(f"threshold, {', '.join(goal)}: more than one is given, and each chooses the threshold")
        if sure is not None and (threshold, speed) != (None, None):
            raise InputError(f"sure: {sure:g} needs max_loss or max_change; threshold and speed promise nothing")
        if amp not in AMP_CHOICES:
            raise InputError(f"amp: {amp!r:.80}, should be one of {', '.join(AMP_CHOICES)}")
        run, self.batch_size, self.device = Path(run), int(batch_size), choose_device(str(device))
        self.precision = choose_precision(amp, self.device)
        model, self.record = load_run(run)
        self.evaluation = evaluation = read_evaluation(run)
        if evaluation.run_digest is None:
            LOG.warning("%s: an older evaluation; whether it is of this model cannot be checked: evaluate again", run)
        self.labels, self.pairs = self.record.labels, len(self.record.columns) == 2
        self.certainty_name = "agreement" if self.record.metric == "agreement" else "confidence"  # where it is printed
        rule, point = ExitRule.from_evaluation(evaluation, len(self.labels)), vars(evaluation.operating_point)
        layers = evaluation.exit_layers
        if any(value is not None for value in (*goal.values(), sure)):
            validation = load_answers(run, evaluation, self.record)
            asked = None if layers == self.record.exit_layers else layers  # evaluate.py --use-exits chose them
            goal = goals.goal_of(validation.metric != "agreement", **goal, sure=sure)
            rule, point = operating_point(validation, goal, deal(validation, self.record.train_texts), asked)
            if line := goals.shortfall(point, self.record):
                LOG.warning("%s", line)
        if threshold is None:
            threshold = point["threshold"]
            was, now = evaluation.precision, str(self.precision or torch.float32)
            if "sure" in point["wish"] and threshold < 1 and was != now:  # at 1 nothing can change
                LOG.warning("evaluate.py promised for %s, and not for %s: evaluate again in this precision", was, now)
        self.threshold, self.exit_layers = threshold, point["asked_exits"]
        self.rule = rule.kept([layers.index(n) for n in self.exit_layers])
        self.model = model.keep_exits(self.exit_layers).to(self.device)
        self.tokenizer = load_tokenizer(run, self.record.vocab_size, self.record.max_length)

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


def add_classifier_options(parser: Parser) -> None:
    """Add the options that `classifier_of` reads."""
    option = goals.add_goal_options(parser, "threshold (default: the operating point of evaluation.json)")
    option("--threshold", type=number(0, 1), help="leave at this confidence; at 1 all run to the last exit")
    parser.add_argument("--batch-size", type=whole_number(1), default=32, help="texts that run at once (default: 32)")
    add_device_options(parser)


def classifier_of(args: argparse.Namespace) -> EarlyExitClassifier:
    """The classifier that a command's options ask for."""
    return EarlyExitClassifier(**{name: getattr(args, name) for name in ("run", "device", "amp", *RANGES)})
