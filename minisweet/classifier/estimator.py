"""Early exit by scikit-learn's conventions: texts in, labels out."""

import copy
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from inspect import Parameter, Signature
from pathlib import Path

import numpy as np
import torch

from minisweet.adaptive import in_float32
from minisweet.base.commands import BARS, Kind, Notices, whole_number
from minisweet.base.files import LOG, InputError
from minisweet.classifier import deployed as runs
from minisweet.classifier.choose import given_labels
from minisweet.classifier.deployed import Answer, Deployed, deploy, fitted_of, sides_of
from minisweet.classifier.explain import explain
from minisweet.classifier.export import export_file, export_folder
from minisweet.classifier.fit import FitOptions, fit_texts
from minisweet.classifier.label import rows_to_label
from minisweet.classifier.operating_point import OperatingPoint, measure
from minisweet.classifier.promise import Goal
from minisweet.classifier.rows import Columns, label_name, labelled_texts, names_of, texts_of, with_text
from minisweet.classifier.summary import summary
from minisweet.classifier.test import new_outputs
from minisweet.run import Record

PARAMETERS = vars(FitOptions()) | vars(Goal()) | {"verbose": 0}
VERBOSE = Kind("a whole number from 0", int, lambda value: isinstance(value, int) and value >= 0)  # True is 1


def two_of(value: object, name: str) -> Sequence:
    """The texts and labels of the argument `name`. Raises InputError for anything else."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise InputError("should be (texts, labels)", name)
    return value


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
    """A text classifier whose easy texts leave after a few layers, or before the first one.

        classify = EarlyExitClassifier(model="minilm-l6", max_lost=3, sure=90).fit(texts, labels)
        classify.predict(["The printer is on fire"])          # array of labels; predict_proba (N, C), classes_, score
        classify.classify(texts)                              # per text: label, confidence, exit layer, probabilities
        print(classify.promise, classify.operating_point)     # what to expect on new text
        classify.choose(max_lost=2)                           # another goal, or max_share=0.3
        classify.save("runs/tickets")                         # a run folder; EarlyExitClassifier.load reads it

    Texts are a list of strings, or of pairs of strings, or a pandas Series or a DataFrame with one or two columns.
    Labels are strings or numbers; None is a row without a label. `fit` skips and counts empty texts. Several threads
    may share one classifier. On a CPU `minisweet.tune_cpu()`, before a process's first model, makes it faster.

    Args:
        model: a preset, a folder in Hugging Face's layout, or an id of its hub.
        method: "plain" or "branch".
        exit_layers: counted from 1; 0 is exit 0, a bag of words.
        trunk: the folder of a run or a finished classifier to start from, whose answers stay as they are.
        dev_size: the share of the distinct labelled texts that is set aside for validation.
        seed: of new weights, order and dropout.
        lr, epochs, batch_size, max_length: None for what suits model and data.
        device, amp: as the commands' --device and --amp.
        max_lost, sure: deploy the lowest threshold that loses at most `max_lost` of 100 texts, with `sure` percent
            confidence.
        max_share: instead, the highest threshold that runs at most this share of the layers.
        verbose: 1 writes notices and progress to standard error; at 0 `fit` is silent except for warnings.
    """

    __signature__ = Signature(
        [Parameter(name, Parameter.KEYWORD_ONLY, default=value) for name, value in PARAMETERS.items()]
    )

    def __init__(self, **parameters) -> None:
        self.set_params(**PARAMETERS | parameters)

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

        `unlabelled` are more texts. Exit 0 and branches learn from them, and so does the model if they outnumber the
        labelled ones. `validation` is (texts, labels) to validate on, instead of rows of X; each text counts by itself.
        `groups` (N) says what a row belongs to, such as a thread or a document, whose rows stay together; None is a row
        by itself. `unlabelled_groups` does so for `unlabelled`. With a `trunk`, X and y may be None. Until the new
        model is ready, the previous one answers. Raises InputError, naming the item, for what cannot be trained on.
        """
        verbose = VERBOSE.check("verbose", self.verbose)
        goal = self._options(Goal)
        sides = None
        options = self._options(FitOptions)
        if unlabelled is None and unlabelled_groups is not None:
            raise InputError("needs unlabelled", "unlabelled_groups")
        if unlabelled is not None:
            unlabelled = with_text(texts_of(unlabelled), unlabelled_groups, "unlabelled_groups")
            sides = (1 if unlabelled.second is None else 2) if unlabelled.first else None
        X, y = ([], []) if X is None and options.trunk else (X, y)
        rows, label_type = labelled_texts(X, y, sides)
        rows = with_text(rows, groups)
        columns = ["text"] if rows.second is None else ["sentence1", "sentence2"]
        if validation is not None:
            validation, type_there = labelled_texts(*two_of(validation, "validation"), len(columns))
            validation = with_text(validation)
            if not validation.first:
                raise InputError("has no rows", "validation")
            label_type = label_type if type_there == label_type or not any(validation.names) else "str"
        with telling(verbose), torch.random.fork_rng(range(torch.cuda.device_count())):  # the global random state stays
            run = fit_texts(options, "texts", rows, validation, unlabelled, Columns(columns), label_type)
            run = runs.choose_for(run, goal, options.device, options.amp)
        self._deployed = deploy(run, None, options.device, options.amp)
        return self

    def _options(self, kind: type):
        return kind(**{name: getattr(self, name) for name in vars(kind())})

    def choose(
        self,
        max_lost: float | None = None,
        sure: float | None = None,
        max_share: float | None = None,
        labels: tuple[Sequence, Sequence] | None = None,
    ) -> "EarlyExitClassifier":
        """Choose what to deploy for another goal, from the saved logits. Returns the classifier itself.

        Omitted arguments are the constructor's. `labels` is (texts, labels) of texts that `to_label` gave; alone they
        keep the current goal. Raises InputError if max_lost and max_share are given together.
        """
        deployed, run = self.deployed, self.deployed.run
        goal = self._options(Goal)
        if labels is not None:
            labels = two_of(labels, "labels")
            if max_lost is sure is max_share is None:
                goal = run.point.goal
            rows, _ = labelled_texts(*labels, sides_of(run.record))
            run = run._replace(given=run.given | given_labels(run, rows))
        device, amp = str(deployed.device), deployed.amp
        run = runs.choose_for(run, goal.changed(max_lost, sure, max_share), device, amp)
        self._deployed = deploy(run, None, device, amp, deployed.batch_size)
        return self

    def to_label(self, most: int = 50) -> list:
        """Texts whose labels would let more texts leave early, the most useful first; see `minisweet label`."""
        run = self.deployed.run
        rows, message = rows_to_label(run, whole_number(1).check("most", most))
        LOG.log(logging.WARNING if len(rows) < most else logging.INFO, "%s", message)
        return run.texts.examples.take(rows).texts()

    @property
    def promise(self) -> str:
        """The promise about new text, in words, or why there is none."""
        deployed, point, fitted = self.deployed, self.operating_point, fitted_of(self.record)
        if point.precision != str(deployed.precision or torch.float32):
            return f"the promise was made in {point.precision}: choose again in this precision"
        if deployed.threshold != in_float32(point.threshold):
            return f"threshold {deployed.threshold:g} is not the one that was chosen, so nothing is promised"
        return point.in_words(len(fitted.exit_layers), fitted.set_aside)

    def summary(self) -> str:
        """The scores of the bag of words, early exit and full depth on new texts, and what is promised: some lines."""
        return summary(self.deployed.run, self.deployed.threshold, self.promise)

    def test(self, X, y, *, groups=None) -> dict:
        """Measure early exit on texts X (N) with labels y (N), None where one is missing; see `minisweet test`.

        Texts that were trained on or set the threshold do not count. With `groups` (N), as in `fit`, one text of each
        new group counts. The keys are those of `operating_point`: score, full_depth and per_class of the labelled texts
        (None without any), lost and share of all `judging_texts`.
        """
        rows = with_text(labelled_texts(X, y, sides_of(self.record))[0], groups)
        outputs = new_outputs(self.deployed, rows, "X", LOG.warning)
        of_labels = ("score", "score_interval", "full_depth", "full_depth_interval", "per_class")
        has_labels = (outputs.labels >= 0).any()
        measured = measure(range(len(outputs.logits)), self.deployed.threshold, outputs)
        return measured | ({} if has_labels else dict.fromkeys(of_labels))

    def explain(self, texts: Iterable[str | Sequence[str]]) -> list[list[tuple[Answer, bool]]]:
        """Each exit's answer to each text, with exit 0's main words, and whether the text may leave."""
        rows = texts_of(texts, sides_of(self.record))
        return [explain(self.deployed, text) for text in rows.texts()]

    def export(self, path: str | Path, *, int8: bool = False) -> list[str]:
        """Write one ONNX file with early exit as it was chosen, if the name ends in .onnx.

        Any other name is a folder for transformers, with the last exit alone: without exit 0 and the threshold. Returns
        the lines that `minisweet export` prints. Raises InputError for a path that exists, for int8 with a folder, or
        if the packages for ONNX are missing.
        """
        is_file = Path(path).suffix.lower() == ".onnx"
        run = self.deployed.run
        if int8 and not is_file:
            raise InputError(f"is for one file, and {path} should end in .onnx", "int8")
        model, bag = copy.deepcopy((run.model, run.bag))  # to export from the CPU, while they answer on their device
        run = run._replace(model=model.cpu(), bag=bag)
        return export_file(Path(path), run, int8) if is_file else [export_folder(Path(path), run)]

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
        loaded = runs.load_run(Path(run), *runs.ANSWERING, "texts", "outputs", "given")
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

    def classify(self, texts: Iterable[str | Sequence[str]]) -> list[Answer]:
        """Classify N texts in their order. Raises InputError, naming the item's index from 0, for anything but text."""
        deployed = self.deployed  # once, since another thread may replace it
        return runs.classify(deployed, runs.tokenize(deployed, texts))
