"""Early exit as a user calls it, by scikit-learn's conventions: texts in, labels out.

Dimension letters: N texts, K exits, C classes.
"""

import argparse
import copy
import logging
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from inspect import Parameter, Signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch

from minisweet.adaptive import ExitRule, in_float32
from minisweet.base.commands import Kind, Parser, number, telling, whole_number
from minisweet.base.devices import choose_device, choose_precision
from minisweet.base.files import LOG, InputError
from minisweet.classifier.rows import Rows, label_name, labelled_texts, names_of, texts_of, with_groups, with_text
from minisweet.texts import Texts
from minisweet.exits import ExitModel
from minisweet.live import Decisions, early_exit
from minisweet.classifier.operating_point import Goal, OperatingPoint
from minisweet.options import OWN_TEXT, TrainingOptions
from minisweet.recipe import train_own
from minisweet.record import Record
from minisweet.resume import SavedTraining
from minisweet.run import Run
from minisweet.classifier.choose import choose_for, labels_of, summary
from minisweet.classifier.label import to_ask

AT_ONCE = 1024  # texts of which exit 0 is asked, so that those who stay fill batches
TYPES = {"str": str, "int": int, "float": float, "bool": "True".__eq__}  # labels' names back to labels
PARAMETERS = {name: getattr(TrainingOptions, name) for name in OWN_TEXT} | vars(Goal()) | {"verbose": 0}
THRESHOLD, BATCH_SIZE, MOST_TO_LABEL = number(0, 1), whole_number(1), whole_number(1)
OF_LABELS = ("score", "score_interval", "full_depth", "full_depth_interval", "per_class")  # of an operating point
VERBOSE = Kind("a whole number from 0", int, lambda value: isinstance(value, int) and value >= 0)  # True is 1


class Answer(NamedTuple):
    """What the exit that was taken says of one text.

    `confidence` is what was compared with the threshold. Where a run was made without labels, it estimates how often
    the exit agrees with full depth, not how often it is right.
    """

    label: object  # of the type that was trained on
    confidence: float
    exit_layer: int  # counted from 1; 0 for exit 0, a bag of words before the first layer
    probabilities: dict  # of all labels, after temperature scaling
    words: tuple[dict[str, float], dict[str, float]] | None = None  # at exit 0, by `explain` alone


class Deployed(NamedTuple):
    """What answers. It is replaced as a whole, so that several threads may share a classifier."""

    run: Run
    point: OperatingPoint
    threshold: float  # the point's, or another one
    rule: ExitRule
    model: ExitModel  # with the exits that are asked, on the device
    device: torch.device
    amp: str  # as it was asked for
    precision: torch.dtype | None  # to autocast to
    batch_size: int  # texts that run at once
    labels: list  # (C,), as they were trained on


class EarlyExitClassifier:
    """A text classifier whose easy texts leave after a few layers, or before the first one.

        from minisweet import EarlyExitClassifier

        classify = EarlyExitClassifier(model="minilm-l6", max_lost=3, sure=90).fit(texts, labels)
        classify.predict(["The printer is on fire"])          # array of labels; predict_proba (N, C), classes_, score
        print(classify.promise, classify.operating_point)     # what to expect on new text
        classify.save("runs/tickets")                         # a run folder, as that of `minisweet fit`
        classify = EarlyExitClassifier.load("runs/tickets")   # threshold=, device=, amp=, batch_size=
        classify.classify(texts)                              # per text: label, confidence, exit layer, probabilities
        print(classify.summary(), classify.test(texts, labels), classify.explain(texts))
        classify.export("tickets.onnx", int8=True)
        classify.choose(max_lost=2)                           # another goal, or max_share=0.3
        texts = classify.to_label(most=50)                    # whose labels let more texts leave early
        classify.choose(labels=(texts, labels_of_texts))

    Texts are a list of strings, or of pairs of strings; a series or a frame of pandas with one or two columns will do.
    Labels are strings or numbers; None is a row without a label. Empty texts are skipped by `fit`, and counted. Several
    threads may share one classifier. On a CPU `minisweet.tune_cpu()`, before a process's first model, makes it faster.

    Args:
        model: a preset, a folder in Hugging Face's layout, or an id of its hub.
        method: "plain", or "branch", "sweet", "ee", "mm". exit_layers: counted from 1; 0 is exit 0, a bag of words.
        trunk: the folder of a run or a finished classifier to start from; "plain" and "branch" keep its answers.
        class_weights: "balanced" counts rare classes as much as frequent ones; or {label: weight}, else 1.
        dev_size: the share of the distinct labelled texts that is set aside to choose and to judge.
        seed: of new weights, order and dropout. lr, epochs, batch_size, max_length: None for what suits model and data.
        device, amp: as the commands' --device and --amp.
        max_lost, sure: deploy the fastest that loses at most so many of 100 texts, so sure in percent.
        max_share: in their place, the slowest that runs at most this share of the layers.
        verbose: 1 writes notices and progress to standard error; at 0 `fit` is silent but for warnings.
    """

    __signature__ = Signature(
        [Parameter(name, Parameter.KEYWORD_ONLY, default=value) for name, value in PARAMETERS.items()]
    )

    def __init__(self, **parameters) -> None:
        self.set_params(**PARAMETERS | parameters)

    # --- scikit-learn's conventions

    def get_params(self, deep: bool = True) -> dict:
        """The constructor's arguments by name."""
        return {name: getattr(self, name) for name in PARAMETERS}

    def set_params(self, **params) -> "EarlyExitClassifier":
        """Change arguments of the constructor, by name. Returns itself."""
        if unknown := sorted(params.keys() - PARAMETERS.keys()):
            names = get_close_matches(unknown[0], PARAMETERS, 1) or PARAMETERS
            raise InputError(f"no parameter, should be one of {', '.join(names)}", unknown[0])
        vars(self).update(params)
        return self

    def __repr__(self) -> str:
        changed = [f"{name}={value!r}" for name, value in self.get_params().items() if value != PARAMETERS[name]]
        return f"EarlyExitClassifier({', '.join(changed)})"

    def __sklearn_tags__(self):
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags

        kind = {"estimator_type": "classifier", "classifier_tags": ClassifierTags()}
        return Tags(**kind, target_tags=TargetTags(required=True), input_tags=InputTags(string=True))

    def __sklearn_is_fitted__(self) -> bool:
        return "_deployed" in vars(self)

    # --- training

    def fit(
        self, X, y, *, unlabelled=None, validation=None, groups=None, unlabelled_groups=None
    ) -> "EarlyExitClassifier":
        """Train on texts X (N) and labels y (N), choose what to deploy, and return itself.

        `unlabelled` are more texts: exit 0 and branches learn what the trained model says of them. A new plain model
        learns what it and its first embeddings say, where more texts have no label. `validation` is (texts, labels) to
        choose and judge on, in place of rows of X. `groups` (N) says what a row belongs to, such as a thread or a
        document, whose rows stay together; None is a row by itself. `unlabelled_groups` does so of `unlabelled`. With a
        `trunk`, X and y may be None. A model that was fitted before answers until the new one is there. Raises
        InputError, with the item, for what cannot be trained on.
        """
        given, verbose = {name: getattr(self, name) for name in OWN_TEXT}, VERBOSE.check("verbose", self.verbose)
        if isinstance(weights := self.class_weights, dict):
            names, _ = names_of(weights, len(weights), "class_weights")
            given["class_weights"] = dict(zip(names, np.array([*weights.values()]).tolist(), strict=True))
        options, more, dev = TrainingOptions(**given), None, None
        if unlabelled is None and unlabelled_groups is not None:
            raise InputError("needs unlabelled", "unlabelled_groups")
        if unlabelled is not None:
            more = with_groups(texts_of(unlabelled), unlabelled_groups, "unlabelled_groups")
            more = with_text(Rows(more, [None] * len(more.first), [])).examples
        sides = more and 1 + (more.second is not None)
        rows = labelled_texts([], [], sides) if X is None and options.trunk else labelled_texts(X, y, sides)
        rows = with_text(rows._replace(examples=with_groups(rows.examples, groups, "groups")))
        if validation is not None:
            if not isinstance(validation, tuple | list) or len(validation) != 2:
                raise InputError("should be (texts, labels)", "validation")
            dev = with_text(labelled_texts(*validation, 1 + (rows.examples.second is not None)))
            if not dev.examples.first:
                raise InputError("has no rows", "validation")
            rows = rows._replace(label_type=rows.label_type if rows.label_type == dev.label_type else "str")
        goal = self._goal()
        with telling(verbose):
            run = train_own(options, "texts", rows, dev, more, SavedTraining())
            choose_for(run, goal, options.device, options.amp)
        return self._deploy(run, None, options.device, options.amp)

    def _goal(self) -> Goal:
        return Goal(max_lost=self.max_lost, sure=self.sure, max_share=self.max_share)

    def choose(
        self,
        max_lost: float | None = None,
        sure: float | None = None,
        max_share: float | None = None,
        labels: tuple[Sequence, Sequence] | None = None,
    ) -> "EarlyExitClassifier":
        """Choose what to deploy by another goal, from the answers that are saved. Returns itself.

        What is not given is the constructor's. `labels` is (texts, labels) of texts that `to_label` gave; alone they
        leave the goal as it is. Raises InputError where max_lost and max_share are given together.
        """
        its, run = self.deployed, copy.copy(self.deployed.run)
        run.folder = None  # in memory alone: the folder that it was loaded from stays as it is
        goal = self._goal()
        if labels is not None:
            if max_lost is sure is max_share is None:
                goal = Goal(**its.point.goal)
            rows = labelled_texts(*labels, max(1, len(run.record.columns)))
            run.labels = run.labels | labels_of(run, rows)
        choose_for(run, goal.changed(max_lost, sure, max_share), str(its.device), its.amp)
        return self._deploy(run, None, str(its.device), its.amp, its.batch_size)

    def to_label(self, most: int = 50) -> list:
        """Texts whose labels let more texts leave early, the most useful first; see `minisweet label`."""
        its = self.deployed
        run = copy.copy(its.run)
        run.point = its.point
        rows, said = to_ask(run, MOST_TO_LABEL.check("most", most))
        LOG.log(logging.INFO if rows else logging.WARNING, "%s", said)
        return run.examples.take(rows).texts()

    @property
    def promise(self) -> str:
        """What is promised of new text, in words; or why nothing is."""
        its, record = self.deployed, self.deployed.run.record
        if its.point.precision != str(its.precision or torch.float32):
            return f"what was promised is of {its.point.precision}: choose again in this precision"
        if its.threshold != in_float32(its.point.threshold):
            return f"threshold {its.threshold:g} is not the one that was chosen, and nothing is promised of it"
        return its.point.in_words(len(record.exit_layers), record.set_aside)

    def summary(self) -> str:
        """What the bag of words, early exit and the whole model give on new texts, and what is promised: some lines."""
        its, run = self.deployed, copy.copy(self.deployed.run)
        run.point = its.point
        is_other = its.threshold != in_float32(its.point.threshold)
        return summary(run, its.threshold if is_other else None, self.promise)

    def test(self, X, y) -> dict:
        """What comes out on texts X (N) with labels y (N), None where one is missing; see `minisweet test`.

        Texts that were trained on or set the threshold do not count. The names are those of `operating_point`, to
        compare: score, full_depth and per_class, of the labelled texts; lost and share of all `judging_texts`; their
        intervals. Without any label there is no score.
        """
        from minisweet.classifier.test import found_on, outputs_of

        its = self.deployed
        rows = labelled_texts(X, y, max(1, len(its.run.record.columns)))
        outputs = outputs_of(its, rows, "X", LOG.warning)
        found = found_on(its, outputs)
        of_labels = {} if (outputs.labels >= 0).any() else dict.fromkeys(OF_LABELS)
        return found | of_labels

    def explain(self, texts: Iterable[str | Sequence[str]]) -> list[list[tuple[Answer, bool]]]:
        """Of each text what each exit says, with the words that spoke at exit 0, and whether it is enough to leave."""
        from minisweet.classifier.explain import explain

        its = self.deployed
        return [explain(its, text) for text in texts_of(texts, max(1, len(its.run.record.columns))).texts()]

    def export(self, path: str | Path, *, int8: bool = False) -> list[str]:
        """Write one ONNX file, which leaves early as was chosen, where the name ends in .onnx.

        Else it is a folder for transformers, of the last exit alone: without exit 0, its say and the threshold. It is
        written whole or not at all. Returns what came out, in lines; see `minisweet export`. Raises InputError for a
        path that exists, int8 for a folder, or where the packages for ONNX are missing.
        """
        from minisweet.classifier.export import export_file, export_folder

        if int8 and Path(path).suffix.lower() != ".onnx":
            raise InputError(f"is for one file, and {path} should end in .onnx", "int8")
        with TemporaryDirectory() as place:
            self.save(run := Path(place, "run"))
            if Path(path).suffix.lower() == ".onnx":
                return export_file(run, Path(path), int8)
            return [export_folder(run, Path(path))]

    # --- runs

    @classmethod
    def load(
        cls,
        run: str | Path,
        *,
        threshold: float | None = None,
        device: str = "auto",
        amp: str = "auto",
        batch_size: int = 32,
    ) -> "EarlyExitClassifier":
        """The classifier of a run folder for which something was chosen, by `minisweet fit`, `choose` or `save`.

        `threshold` is from 0 to 1; at 1 all texts run to the last exit; None for the one that was chosen. `batch_size`
        is how many texts run at once. Raises InputError where there is no such run.
        """
        options = TrainingOptions(device=device, amp=amp)
        batch_size = BATCH_SIZE.check("batch_size", batch_size)
        threshold = None if threshold is None else THRESHOLD.check("threshold", threshold)
        run = Run.read(Path(run))
        trained, goal = run.record.arguments, run.point.goal
        classify = cls()._deploy(run, threshold, options.device, options.amp, batch_size)
        its = {name: getattr(trained, name) for name in OWN_TEXT}
        return classify.set_params(**its | goal | {"device": options.device, "amp": options.amp})

    def save(self, run: str | Path) -> None:
        """Write a run folder, which must not exist."""
        copy.copy(self.deployed.run).save(Path(run), overwrite=False)

    def _deploy(
        self, run: Run, threshold: float | None, device: str, amp: str, batch_size: int = 32
    ) -> "EarlyExitClassifier":
        """Take over a run, with all that is needed of it in memory."""
        point, where = run.point, choose_device(device)
        precision, _ = choose_precision(amp, where), (run.tokenizer, run.examples, run.outputs, run.labels)
        was, now = point.precision, str(precision or torch.float32)
        if threshold is None and was != now and point.threshold < 1:
            LOG.warning("what was promised is of %s, and this is %s: choose again with the same --amp", was, now)
        threshold = in_float32(point.threshold if threshold is None else threshold)
        labels = [TYPES[run.record.label_type](name) for name in run.record.labels]
        model = run.model.keep_exits(point.exits).to(where)
        self._deployed = Deployed(run, point, threshold, point.rule, model, where, amp, precision, batch_size, labels)
        return self

    @property
    def deployed(self) -> Deployed:
        """What answers. Raises InputError before anything was trained or loaded."""
        if not self.__sklearn_is_fitted__():
            raise InputError("EarlyExitClassifier: not trained yet; call fit, or EarlyExitClassifier.load")
        return self._deployed

    @property
    def operating_point(self) -> OperatingPoint:
        """What was chosen, and what may be expected of it on new text."""
        return self.deployed.point

    @property
    def record(self) -> Record:
        """The record of the training."""
        return self.deployed.run.record

    @property
    def classes_(self) -> np.ndarray:
        """The labels (C,), in the order of the probabilities."""
        if not self.__sklearn_is_fitted__():
            raise AttributeError("classes_: not trained yet")
        return np.array(self._deployed.labels)

    # --- answers

    def predict(self, X) -> np.ndarray:
        """The labels (N,) of texts."""
        return np.array([answer.label for answer in self.classify(X)], dtype=self.classes_.dtype)

    def predict_proba(self, X) -> np.ndarray:
        """The probabilities (N, C) of `classes_`, as the exit that is taken gives them."""
        rows = np.array([[*answer.probabilities.values()] for answer in self.classify(X)])
        rows = rows.reshape(-1, len(self.classes_))
        return rows / rows.sum(1, keepdims=True)  # what adds up to 1 in float32 does so in float64, too

    def score(self, X, y) -> float:
        """The accuracy on texts X (N) with labels y (N), from 0 to 1. Raises InputError, with the item."""
        its = self.deployed
        texts = tokenize(its, X)
        names, _ = names_of(y, len(texts), "labels")
        if None in names or not names:
            raise InputError(f"item {names.index(None)}: has no label" if names else "texts: there are none")
        said = [label_name(answer.label) for answer in classify_tokens(its, texts)]
        return float(np.mean([one == right for one, right in zip(said, names, strict=True)]))

    def classify(self, texts: Iterable[str | Sequence[str]]) -> list[Answer]:
        """Classify texts, or pairs of them where the run was trained on pairs, in their order.

        Raises InputError, with the item's index from 0, for what is something else.
        """
        its = self.deployed
        return classify_tokens(its, tokenize(its, texts))


def tokenize(its: Deployed, texts: Iterable[str | Sequence[str]]) -> Texts:
    """The tokens of what `EarlyExitClassifier.classify` takes."""
    return Texts(its.run.tokenizer, texts_of(texts, max(1, len(its.run.record.columns))))


def classify_tokens(its: Deployed, texts: Texts) -> list[Answer]:
    """Classify texts, in their order."""
    answers: dict[int, Answer] = {}
    for pool in texts.by_length(max(AT_ONCE, its.batch_size)):
        inputs = pool.to(its.device).inputs
        with torch.autocast(its.device.type, its.precision, enabled=its.precision is not None):
            found = early_exit(its.model, *inputs, its.threshold, its.rule, its.batch_size)
        answers.update(zip(pool.rows.tolist(), answers_of(its, found), strict=True))
    return [answers[row] for row in range(len(texts))]


def answers_of(its: Deployed, found: Decisions) -> list[Answer]:
    """What exits said of N texts, each text by one of them, as users read it."""
    labels, exits, logits, confidence = (tensor.cpu() for tensor in found)
    columns = map(torch.Tensor.tolist, (labels, confidence, exits, logits.softmax(-1)))
    return [
        Answer(its.labels[label], sure, its.model.exit_layers[k], dict(zip(its.labels, row, strict=True)))
        for label, sure, k, row in zip(*columns, strict=True)
    ]


def add_classifier_options(parser: Parser) -> None:
    """Add the options that `classifier_of` reads."""
    option = parser.add_argument
    option("run", type=Path, metavar="RUN", help="run folder")
    about = "leave at this confidence; at 1 all run to the last exit (default: the one that was chosen)"
    option("--threshold", type=THRESHOLD, help=about)
    option("--batch-size", type=BATCH_SIZE, default=32, help="texts that run at once (default: 32)")
    parser.add_options(TrainingOptions, "device", "amp")


def classifier_of(args: argparse.Namespace) -> EarlyExitClassifier:
    """The classifier that a command's options ask for."""
    options = {name: getattr(args, name) for name in ("threshold", "device", "amp", "batch_size")}
    return EarlyExitClassifier.load(args.run, **options)
