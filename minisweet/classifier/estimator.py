"""Early exit by scikit-learn's conventions: texts in, labels out."""

import copy
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch

from minisweet.adaptive import in_float32
from minisweet.base.commands import BARS, Kind, Notices
from minisweet.base.files import LOG, InputError
from minisweet.classifier import deployed as runs
from minisweet.classifier.deployed import Answer, Deployed, deploy, fitted_of
from minisweet.classifier.explain import explain
from minisweet.classifier.export import export_file
from minisweet.classifier.fit import FitOptions, fit_texts
from minisweet.classifier.operating_point import OperatingPoint, measure
from minisweet.classifier.promise import Goal
from minisweet.classifier.rows import Columns, label_name, labelled_texts, names_of, texts_of, with_text
from minisweet.classifier.summary import summary
from minisweet.classifier.test import new_outputs
from minisweet.run import Record

PARAMETERS = vars(FitOptions()) | vars(Goal()) | {"verbose": 0}
VERBOSE = Kind("a whole number from 0", int, lambda value: isinstance(value, int) and value >= 0)  # True is 1


@contextmanager
def telling(verbose: int) -> Iterator[None]:
    """Write notices and progress bars to standard error if `verbose`, and otherwise no progress bar."""
    handler = Notices()
    level = LOG.level
    bars = BARS.set({"mininterval": 0.1 if sys.stderr.isatty() else 10} if verbose else {"disable": True})  # seconds
    if verbose:
        LOG.addHandler(handler)
        LOG.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOG.removeHandler(handler)
        LOG.setLevel(level)
        BARS.reset(bars)


class EarlyExitClassifier:
    """A text classifier whose easy texts leave before the first layer.

        classify = EarlyExitClassifier(model="minilm-l6", max_lost=3, sure=90).fit(texts, labels)
        classify.predict(["The printer is on fire"])          # array of labels; predict_proba (N, C), classes_, score
        classify.classify(texts)                              # per text: label, confidence, exit layer, probabilities
        print(classify.promise, classify.operating_point)     # what to expect on new text
        classify.choose(max_lost=2)                           # another goal
        classify.save("runs/tickets")                         # a run folder; EarlyExitClassifier.load reads it

    Texts are a list of strings, or a pandas Series or a DataFrame with one column. Labels are strings or numbers; None
    is a row without a label. `fit` skips and counts empty texts. Several threads may share one classifier. On a CPU
    `minisweet.tune_cpu()`, before a process's first model, makes it faster.

    Args:
        model: a preset, a folder in Hugging Face's layout, or an id of its hub.
        trunk: the folder of a run or a finished classifier to start from, whose answers stay as they are.
        dev_size: the share of the distinct labelled texts that is set aside for validation.
        seed: of new weights, order and dropout.
        lr, epochs, batch_size, max_length: None for what suits model and data.
        device, amp: as the commands' --device and --amp.
        max_lost, sure: deploy the lowest threshold that loses at most `max_lost` of 100 texts, with `sure` percent
            confidence.
        verbose: 1 writes notices and progress to standard error; at 0 `fit` is silent except for warnings.
    """

    def __init__(
        self,
        *,
        model: str = "minilm-l6",
        trunk: str | None = None,
        dev_size: float = 0.2,
        seed: int = 0,
        lr: float | None = None,
        epochs: int | None = None,
        batch_size: int | None = None,
        max_length: int | None = None,
        device: str = "auto",
        amp: str = "auto",
        max_lost: float = 3.0,
        sure: float = 90.0,
        verbose: int = 0,
    ) -> None:
        vars(self).update({name: value for name, value in locals().items() if name != "self"})

    def get_params(self, deep: bool = True) -> dict:
        """The constructor's arguments by name."""
        return {name: getattr(self, name) for name in PARAMETERS}

    def set_params(self, **params) -> "EarlyExitClassifier":
        """Change arguments of the constructor, by name. Returns the classifier itself."""
        if unknown := sorted(params.keys() - PARAMETERS.keys()):
            names = get_close_matches(unknown[0], PARAMETERS, 1) or PARAMETERS
            raise InputError(f"unknown parameter, should be one of {', '.join(names)}", unknown[0])
        vars(self).update(params)
        return self

    def __repr__(self) -> str:
        shown = {name: repr(value) for name, value in self.get_params().items()}  # arrays have no single truth value
        changed = [f"{name}={text}" for name, text in shown.items() if text != repr(PARAMETERS[name])]
        return f"EarlyExitClassifier({', '.join(changed)})"

    def __sklearn_tags__(self):
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags

        kind = {"estimator_type": "classifier", "classifier_tags": ClassifierTags()}
        return Tags(**kind, target_tags=TargetTags(required=True), input_tags=InputTags(string=True))

    def __sklearn_is_fitted__(self) -> bool:
        return "_deployed" in vars(self)

    def fit(self, X, y, *, unlabelled=None, validation=None, groups=None, unlabelled_groups=None):
        """Train on texts X (N) and labels y (N), and choose what to deploy. Returns the classifier itself.

        `unlabelled` are more texts. Exit 0 learns from them, and so does the model if they outnumber the labelled ones.
        `validation` is (texts, labels) to validate on, instead of rows of X; each text counts by itself.
        `groups` (N) says what a row belongs to, such as a thread or a document, whose rows stay together; None is a row
        by itself. `unlabelled_groups` does so for `unlabelled`. With a `trunk`, X and y may be None. Until the new
        model is ready, the previous one answers. Raises InputError, naming the item, for what cannot be trained on.
        """
        verbose = VERBOSE.check("verbose", self.verbose)
        goal = self._options(Goal)
        options = self._options(FitOptions)
        if unlabelled is None and unlabelled_groups is not None:
            raise InputError("needs unlabelled", "unlabelled_groups")
        if unlabelled is not None:
            unlabelled = with_text(texts_of(unlabelled), unlabelled_groups, "unlabelled_groups")
        X, y = ([], []) if X is None and options.trunk else (X, y)
        rows, label_type = labelled_texts(X, y)
        rows = with_text(rows, groups)
        if validation is not None:
            if not isinstance(validation, tuple | list) or len(validation) != 2:
                raise InputError("should be (texts, labels)", "validation")
            validation, type_there = labelled_texts(*validation)
            validation = with_text(validation)
            if not validation.first:
                raise InputError("has no rows", "validation")
            label_type = label_type if type_there == label_type or not any(validation.names) else "str"
        with telling(verbose), torch.random.fork_rng(range(torch.cuda.device_count())):  # the global random state stays
            run = fit_texts(options, "texts", rows, validation, unlabelled, Columns("text"), label_type)
            run = runs.choose_for(run, goal, options.device, options.amp)
        self._deployed = deploy(run, None, options.device, options.amp)
        return self

    def _options(self, kind: type):
        return kind(**{name: getattr(self, name) for name in vars(kind())})

    def choose(self, max_lost: float | None = None, sure: float | None = None) -> "EarlyExitClassifier":
        """Choose what to deploy for another goal, from the saved logits. Returns the classifier itself.

        Omitted arguments are the constructor's.
        """
        deployed, run = self.deployed, self.deployed.run
        given = {name: value for name, value in (("max_lost", max_lost), ("sure", sure)) if value is not None}
        goal = replace(self._options(Goal), **given)
        device, amp = str(deployed.device), deployed.amp
        run = runs.choose_for(run, goal, device, amp)
        self._deployed = deploy(run, None, device, amp, deployed.batch_size)
        return self

    @property
    def promise(self) -> str:
        """The promise about new text, in words, or why there is none."""
        deployed, point, fitted = self.deployed, self.operating_point, fitted_of(self.record)
        if point.precision != str(deployed.precision or torch.float32):
            return f"the promise was made in {point.precision}: choose again in this precision"
        if deployed.threshold != in_float32(point.threshold):
            return f"threshold {deployed.threshold:g} is not the one that was chosen, so nothing is promised"
        return point.in_words(fitted.set_aside)

    def summary(self) -> str:
        """The scores of the bag of words, early exit and full depth on new texts, and what is promised: some lines."""
        return summary(self.deployed.run, self.deployed.threshold, self.promise)

    def test(self, X, y, *, groups=None) -> dict:
        """Measure early exit on texts X (N) with labels y (N), None where one is missing; see `minisweet test`.

        Texts that were trained on or set the threshold do not count. With `groups` (N), as in `fit`, one text of each
        new group counts. The keys are those of `operating_point`: score, full_depth and per_class of the labelled texts
        (None without any), lost and share of all `judging_texts`.
        """
        rows = with_text(labelled_texts(X, y)[0], groups)
        outputs = new_outputs(self.deployed, rows, "X", LOG.warning)
        of_labels = ("score", "score_interval", "full_depth", "full_depth_interval", "per_class")
        has_labels = (outputs.labels >= 0).any()
        measured = measure(self.deployed.threshold, outputs)
        return measured | ({} if has_labels else dict.fromkeys(of_labels))

    def explain(self, texts: Iterable[str]) -> list[list[tuple[Answer, bool]]]:
        """Each exit's answer to each text, with exit 0's main words, and whether the text may leave."""
        return [explain(self.deployed, text) for text in texts_of(texts).first]

    def export(self, path: str | Path, *, int8: bool = False) -> list[str]:
        """Write one ONNX file with early exit as it was chosen. Its name must end in .onnx.

        Returns the lines that `minisweet export` prints. Raises InputError for another name, for a file that exists, or
        if the packages for ONNX are missing.
        """
        if Path(path).suffix.lower() != ".onnx":
            raise InputError(f"{path}: should end in .onnx")
        run = self.deployed.run
        model, bag = copy.deepcopy((run.model, run.bag))  # to export from the CPU, while they answer on their device
        return export_file(Path(path), run._replace(model=model.cpu(), bag=bag), int8)

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
        """Load a run folder for which something was chosen. Raises InputError if there is none.

        `threshold` is from 0 to 1, None for the one that was chosen. `batch_size` is how many texts run at once.
        """
        options = FitOptions(device=device, amp=amp)
        batch_size = runs.AT_MOST.check("batch_size", batch_size)
        threshold = None if threshold is None else runs.THRESHOLD.check("threshold", threshold)
        loaded = runs.load_run(Path(run), *runs.ANSWERING, "texts", "outputs")
        classifier = cls()
        classifier._deployed = deploy(loaded, threshold, options.device, options.amp, batch_size)
        params = vars(loaded.record.arguments) | vars(fitted_of(loaded.record)) | vars(loaded.point.goal)
        params |= {"device": options.device, "amp": options.amp}
        return classifier.set_params(**{name: params[name] for name in PARAMETERS if name in params})

    def save(self, run: str | Path) -> None:
        """Write a run folder, which must not exist."""
        runs.save(Path(run), self.deployed.run, overwrite=False)

    @property
    def deployed(self) -> Deployed:
        """What answers. Raises InputError before anything was trained or loaded."""
        if not self.__sklearn_is_fitted__():
            raise InputError("EarlyExitClassifier: not trained yet; call fit, or EarlyExitClassifier.load")
        return self._deployed

    @property
    def operating_point(self) -> OperatingPoint:
        """What was chosen, and what to expect of it on new text."""
        return self.deployed.run.point

    @property
    def record(self) -> Record:
        """The record of the training."""
        return self.deployed.run.record

    @property
    def classes_(self) -> np.ndarray:
        """The labels (C,), sorted, in the order of `predict_proba`'s columns."""
        if not self.__sklearn_is_fitted__():
            raise AttributeError("classes_: not trained yet")
        return np.unique(self.deployed.labels)

    def predict(self, X) -> np.ndarray:
        """The labels (N,) of texts."""
        return np.array([answer.label for answer in self.classify(X)], dtype=self.classes_.dtype)

    def predict_proba(self, X) -> np.ndarray:
        """The probabilities (N, C) of `classes_`, from the exit that is taken."""
        rows = np.array([[*answer.probabilities.values()] for answer in self.classify(X)])
        rows = rows.reshape(-1, len(self.classes_))[:, np.argsort(self.deployed.labels)]  # as sorted by NumPy
        return rows / rows.sum(1, keepdims=True)  # sums of float32 that are 1 there become exactly 1 in float64

    def score(self, X, y) -> float:
        """The accuracy on texts X (N) with labels y (N), from 0 to 1. Raises InputError, naming the item."""
        answers = self.classify(X)
        names, _ = names_of(y, len(answers), "labels")
        if None in names or not names:
            raise InputError(f"item {names.index(None)}: has no label" if names else "texts: there are none")
        return float(np.mean([label_name(answer.label) == name for answer, name in zip(answers, names, strict=True)]))

    def classify(self, texts: Iterable[str]) -> list[Answer]:
        """Classify N texts in their order. Raises InputError, naming the item's index from 0, for anything but text."""
        deployed = self.deployed  # once, since another thread may replace it
        return runs.classify(deployed, runs.tokenize(deployed, texts))
