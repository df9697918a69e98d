"""Early exit as a user calls it, by scikit-learn's conventions: texts in, labels out.

Dimension letters: N texts, K exits, C classes.
"""

import argparse
import inspect
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from minisweet.adaptive import ExitRule, in_float32
from minisweet.base.commands import Parser, number, whole_number
from minisweet.base.devices import AMP_CHOICES, add_device_options, choose_device, choose_precision
from minisweet.base.files import LOG, InputError, write_json, written_beside
from minisweet.data.own import classes_of, with_labels
from minisweet.data.rows import OwnText, label_name
from minisweet.data.text import Examples, TokenizedExamples, load_tokenizer
from minisweet.exits import EXIT_STRATEGIES
from minisweet.live import Decisions, early_exit
from minisweet.methods import METHODS
from minisweet.runs.folders import OPERATING
from minisweet.runs.load import load_run, read_operating_point
from minisweet.runs.own import OwnData
from minisweet.runs.train import train
from minisweet.use.choose import choose_for, goal_of, in_words

AT_ONCE = 1024  # texts of which exit 0 is asked, so that those who stay fill batches
TYPES = {"str": str, "int": int, "float": float, "bool": "True".__eq__}  # labels' names back to labels


class Answer(NamedTuple):
    """What the exit that was taken says of one text.

    `confidence` is what was compared with the threshold: with learning-to-exit it is none of the probabilities. Where a
    run was made without labels, it estimates how often the exit agrees with full depth, not how often it is right.
    """

    label: object  # of the type that was trained on
    confidence: float
    exit_layer: int  # counted from 1; 0 for exit 0, a bag of words before the first layer
    probabilities: dict  # of all labels, after temperature scaling
    words: tuple[dict[str, float], dict[str, float]] | None = None  # at exit 0, by `explain` alone; see `spoke` there


class EarlyExitClassifier:
    """A text classifier whose easy texts leave after a few layers, or before the first one.

        from minisweet import EarlyExitClassifier

        classify = EarlyExitClassifier(model="minilm-l6", max_lost=3, sure=90).fit(texts, labels)
        classify.predict(["The printer is on fire"])          # array of labels; predict_proba (N, C), classes_, score
        print(classify.promise, classify.operating_point)     # what to expect on new text
        classify.save("runs/tickets")                         # a run folder, as that of `minisweet fit`
        classify = EarlyExitClassifier.load("runs/tickets")   # threshold=, device=, amp=, batch_size=
        classify.classify(texts)                              # per text: label, confidence, exit layer, probabilities
        classify.choose(max_lost=2)                           # another goal, or max_share=0.3

    Texts are a list of strings, or of pairs of strings. Labels are strings or numbers; None is a row without a label.
    Several threads may share one classifier. On a CPU `minisweet.tune_cpu()`, before a process's first model, makes it
    faster.

    Args:
        model: a preset, a folder in Hugging Face's layout, or an id of its hub.
        method: "plain", or "branch", "sweet", "ee", "mm". exit_layers: counted from 1; 0 is exit 0, a bag of words.
        exit_strategy: "confidence", or "lte", learning-to-exit.
        trunk: the folder of a run or a finished classifier to start from; "plain" and "branch" keep its answers.
        class_weights: "balanced" counts rare classes as much as frequent ones.
        dev_size: the share of the rows that is set aside to choose and to judge.
        seed, lr, epochs, batch_size, max_length: of the training; None for what the size of model and data suggests.
        device, amp: as the commands' --device and --amp.
        max_lost, sure: deploy the fastest that loses at most so many of 100 texts, so sure in percent.
        max_share: in their place, the slowest that runs at most this share of the layers.
    """

    def __init__(
        self,
        *,
        model="minilm-l6",
        method="plain",
        exit_layers=None,
        exit_strategy="confidence",
        trunk=None,
        class_weights=None,
        dev_size=0.2,
        seed=0,
        lr=None,
        epochs=None,
        batch_size=None,
        max_length=None,
        device="auto",
        amp="auto",
        max_lost=3.0,
        sure=90.0,
        max_share=None,
    ) -> None:
        for name, value in locals().copy().items():
            if name != "self":
                setattr(self, name, value)

    # --- scikit-learn's conventions

    @classmethod
    def _names(cls) -> list[str]:
        return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]

    def get_params(self, deep: bool = True) -> dict:
        """The constructor's arguments by name."""
        return {name: getattr(self, name) for name in self._names()}

    def set_params(self, **params) -> "EarlyExitClassifier":
        """Change arguments of the constructor, by name. Returns itself."""
        for name, value in params.items():
            if name not in self._names():
                raise InputError(f"{name}: no parameter, should be one of {', '.join(self._names())}")
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        defaults = inspect.signature(type(self).__init__).parameters
        changed = [f"{key}={value!r}" for key, value in self.get_params().items() if value != defaults[key].default]
        return f"EarlyExitClassifier({', '.join(changed)})"

    def __sklearn_tags__(self):
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags

        kind = {"estimator_type": "classifier", "classifier_tags": ClassifierTags()}
        return Tags(**kind, target_tags=TargetTags(required=True), input_tags=InputTags(string=True))

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "classes_")

    # --- training

    def fit(self, X, y, *, unlabelled=None, validation=None) -> "EarlyExitClassifier":
        """Train on texts X (N) and labels y (N), choose what to deploy, and return itself.

        `unlabelled` are more texts: exit 0 and branches learn what the trained model says of them; so does a new plain
        model itself where few texts are labelled. `validation` is (texts, labels) to choose and judge on, in place of
        rows of X. With a `trunk`, X and y may be None.
        Raises InputError, with the item, for what cannot be trained on.
        """
        known = {"method": METHODS, "amp": AMP_CHOICES, "exit_strategy": EXIT_STRATEGIES}
        known["class_weights"] = (None, "balanced")
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise InputError(f"{name}: {getattr(self, name)!r:.80}, should be one of {', '.join(map(str, values))}")
        goal = goal_of(self)
        more = None if unlabelled is None else texts_of(unlabelled)
        sides = more and 1 + (more.second is not None)
        rows, kind = own_text([], [], sides) if X is None and self.trunk else own_text(X, y, sides)
        dev, dev_kind = own_text(*validation, 1 + (rows.rows.second is not None)) if validation else (None, kind)
        labels = classes_of(rows.names + (dev.names if dev else []))
        data = OwnData(
            task="texts",
            labels=labels,
            train=with_labels(rows, labels, "labels"),
            dev=with_labels(dev, labels, "labels") if dev else None,
            unlabelled=more,
            text_columns=["text"] if rows.rows.second is None else ["sentence1", "sentence2"],
            label_type=kind if kind == dev_kind else "str",
        )
        self._folder = tempfile.TemporaryDirectory(prefix="minisweet-")  # it goes with this object
        run = Path(self._folder.name) / "run"
        options = self.get_params() | {"out": run, "train_size": None, "resume": False, "overwrite": False}
        options["trunk"] = self.trunk and Path(self.trunk)
        for name in ("max_lost", "sure", "max_share"):
            del options[name]
        train(argparse.Namespace(**options), data)
        choose_for(run, goal, self.device, self.amp)
        return self._deploy(run, None, self.device, self.amp, 32)

    def choose(self, max_lost: float = 3.0, sure: float = 90.0, max_share: float | None = None):
        """Choose what to deploy by another goal, from the answers that are saved. Returns itself."""
        self._check_fitted()
        asked = argparse.Namespace(max_lost=max_lost, sure=sure, max_share=max_share)
        self.operating_point = choose_for(self._run, goal_of(asked), write=False)
        return self._take_point(None)

    @property
    def promise(self) -> str:
        """What is promised of new text, in words; or why nothing is."""
        return in_words(self.operating_point, self.record)

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
        classify = cls()._deploy(Path(run), threshold, device, amp, batch_size)
        facts = vars(classify.record)
        trained = {name: facts[name] for name in cls._names() if facts.get(name) is not None}
        return classify.set_params(**trained | classify.operating_point.goal | {"device": device, "amp": amp})

    def save(self, run: str | Path) -> None:
        """Write a run folder, which must not exist."""
        self._check_fitted()
        with written_beside(Path(run), overwrite=False) as new:
            shutil.copytree(self._run, new)
            write_json(new / OPERATING, vars(self.operating_point))

    def _deploy(self, run: Path, threshold: float | None, device: str, amp: str, at_once: int) -> "EarlyExitClassifier":
        if amp not in AMP_CHOICES:
            raise InputError(f"amp: {amp!r:.80}, should be one of {', '.join(AMP_CHOICES)}")
        if threshold is not None and not 0 <= threshold <= 1:
            raise InputError(f"threshold: {threshold!r:.80}, should be a number from 0 to 1")
        self._run, self._at_once = run, at_once
        self.operating_point = read_operating_point(run)
        self.device_ = choose_device(str(device), "device")
        self.precision_ = choose_precision(amp, self.device_)
        was, now = self.operating_point.precision, str(self.precision_ or torch.float32)
        if threshold is None and was != now and self.operating_point.threshold < 1:
            LOG.warning("what was promised is of %s, and this is %s: choose again with the same --amp", was, now)
        self._whole_model, self.record = load_run(run)
        self._tokenizer = load_tokenizer(run, self.record.vocab_size, self.record.max_length)
        self.labels = [TYPES[self.record.label_type](name) for name in self.record.labels]
        self.classes_ = np.array(self.labels)
        return self._take_point(threshold)

    def _take_point(self, threshold: float | None) -> "EarlyExitClassifier":
        point, plain = self.operating_point, {"dtype": torch.float32, "device": "cpu"}
        ranges = point.certainty_ranges and torch.tensor(point.certainty_ranges, **plain)
        self.rule = ExitRule(len(self.labels), torch.tensor(point.temperatures, **plain), ranges)
        self.threshold = in_float32(point.threshold if threshold is None else threshold)
        self.model_ = self._whole_model.keep_exits(point.exits).to(self.device_)
        return self

    def _check_fitted(self) -> None:
        if not self.__sklearn_is_fitted__():
            raise InputError("EarlyExitClassifier: not trained yet; call fit, or EarlyExitClassifier.load")

    # --- answers

    def predict(self, X) -> np.ndarray:
        """The labels (N,) of texts."""
        return np.array([answer.label for answer in self.classify(X)], dtype=self.classes_.dtype)

    def predict_proba(self, X) -> np.ndarray:
        """The probabilities (N, C) of `classes_`, as the exit that is taken gives them."""
        rows = [[*answer.probabilities.values()] for answer in self.classify(X)]
        return np.array(rows).reshape(-1, len(self.labels))

    def score(self, X, y) -> float:
        """The accuracy, from 0 to 1."""
        return float(np.mean(self.predict(X) == np.asarray(y)))

    def classify(self, texts: Iterable[str | Sequence[str]]) -> list[Answer]:
        """Classify texts, or pairs of them where the run was trained on pairs, in their order.

        Raises InputError, with the item's index from 0, for what is something else.
        """
        return self.classify_tokens(self.tokenize(texts))

    def tokenize(self, texts: Iterable[str | Sequence[str]]) -> TokenizedExamples:
        """The tokens of what `classify` takes."""
        self._check_fitted()
        return TokenizedExamples(self._tokenizer, texts_of(texts, max(1, len(self.record.columns))))

    def classify_tokens(self, examples: TokenizedExamples) -> list[Answer]:
        """Classify what `tokenize` made, in its order."""
        answers: dict[int, Answer] = {}
        for pool in examples.by_length(max(AT_ONCE, self._at_once)):
            inputs = pool.to(self.device_).inputs
            with torch.autocast(self.device_.type, self.precision_, enabled=self.precision_ is not None):
                found = early_exit(self.model_, *inputs, self.threshold, self.rule, self._at_once)
            answers.update(zip(pool.rows.tolist(), self.answers(found), strict=True))
        return [answers[row] for row in range(len(examples))]

    def answers(self, found: Decisions) -> list[Answer]:
        """What exits said of N texts, each text by one of them, as users read it."""
        labels, exits, logits, confidence = (tensor.cpu() for tensor in found)
        logits = logits / self.rule.temperatures[exits, None]  # (N, C) by (N, 1)
        columns = map(torch.Tensor.tolist, (labels, confidence, exits, logits.softmax(-1)))
        layers = self.model_.exit_layers
        return [
            Answer(self.labels[label], sure, layers[k], dict(zip(self.labels, row, strict=True)))
            for label, sure, k, row in zip(*columns, strict=True)
        ]


def texts_of(texts: Iterable[str | Sequence[str]], sides: int | None = None) -> Examples:
    """A list of texts, or of pairs, as rows without labels; `sides` is 1 or 2, None for those of the first item."""
    if isinstance(texts, str | bytes | Mapping) or not isinstance(texts, Iterable):
        raise InputError(f"texts: {texts!r:.80}, should be a list; for one text: [text]")
    rows = []
    for i, text in enumerate(texts):
        row = list(text) if isinstance(text, tuple | list | np.ndarray) else [text]
        sides = sides or (2 if len(row) == 2 else 1)
        if len(row) != sides or not all(isinstance(part, str) for part in row):
            wanted = "a pair of texts" if sides == 2 else "one text"
            raise InputError(f"item {i}: {text!r:.80}, should be {wanted}, as the others")
        if half := re.search("[\ud800-\udfff]", "".join(row)):
            raise InputError(f"item {i}: it holds {half[0]!r}, half of a character; should be valid Unicode")
        rows.append(row)
    return Examples([row[0] for row in rows], [row[1] for row in rows] if sides == 2 else None, None)


def own_text(X, y, sides: int | None) -> tuple[OwnText, str]:
    """Texts and labels as a file's rows would be, and the labels' type. Raises InputError, with the item."""
    rows = texts_of(X, sides)
    labels = list(y) if isinstance(y, Iterable) and not isinstance(y, str | bytes) else []
    if len(labels) != len(rows.first):
        raise InputError(f"labels: {len(labels):,}, should be as many as the texts, {len(rows.first):,}")
    labels = [label.item() if isinstance(label, np.generic) else label for label in labels]
    names = []
    for i, label in enumerate(labels):
        try:
            names.append(label_name(label))
        except ValueError as error:
            raise InputError(f"item {i}: {error}") from None
    kinds = {type(label).__name__ for label, name in zip(labels, names, strict=True) if name is not None}
    if len(kinds) > 1 and kinds != {"int", "float"}:
        raise InputError(f"labels: {' and '.join(sorted(kinds))} are mixed, should be of one type")
    return OwnText(rows, names), "float" if "float" in kinds else next(iter(kinds), "str")


def add_classifier_options(parser: Parser) -> None:
    """Add the options that `classifier_of` reads."""
    option = parser.add_argument
    option("run", type=Path, metavar="RUN", help="run folder")
    threshold = "leave at this confidence; at 1 all run to the last exit (default: the one that was chosen)"
    option("--threshold", type=number(0, 1), help=threshold)
    option("--batch-size", type=whole_number(1), default=32, help="texts that run at once (default: 32)")
    add_device_options(parser)


def classifier_of(args: argparse.Namespace) -> EarlyExitClassifier:
    """The classifier that a command's options ask for."""
    options = {name: getattr(args, name) for name in ("threshold", "device", "amp", "batch_size")}
    return EarlyExitClassifier.load(args.run, **options)
