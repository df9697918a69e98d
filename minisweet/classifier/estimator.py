"""Early exit by scikit-learn's conventions: texts in, labels out."""

import copy
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minisweet.base.commands import BARS, Notices
from minisweet.base.devices import choose_device, choose_precision
from minisweet.base.files import LOG, InputError
from minisweet.classifier.explain import explain
from minisweet.classifier.fit import FitOptions, Given, train
from minisweet.classifier.folder import load_state, save_state
from minisweet.classifier.operating_point import OperatingPoint, measure
from minisweet.classifier.options import Made, number, whole_number
from minisweet.classifier.promise import Goal
from minisweet.classifier.rows import label_name, labelled_texts, names_of, texts_of, with_text
from minisweet.classifier.state import Answer, State, choose_state

PARAMETERS = vars(FitOptions()) | vars(Goal()) | {"verbose": 0}
THRESHOLD = number(0, 1)
TEXTS_AT_ONCE = whole_number(1)


@contextmanager
def telling(verbose: bool) -> Iterator[None]:
    """Write notices and progress bars to standard error if `verbose`, and otherwise no progress bar."""
    handler = Notices()
    level = LOG.level
    bars = BARS.set({"mininterval": 0.1 if sys.stderr.isatty() else 10} if verbose else None)  # seconds
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
    """A text classifier that answers easy texts before the first layer.

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
        trunk: the folder of a run or a finished classifier to start from, whose layers stay as they are.
        dev_size: the share of the distinct labelled texts that is set aside for validation.
        seed: of order and dropout.
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
        self.model, self.trunk, self.dev_size, self.seed = model, trunk, dev_size, seed
        self.lr, self.epochs, self.batch_size, self.max_length = lr, epochs, batch_size, max_length
        self.device, self.amp, self.verbose = device, amp, verbose
        self.max_lost, self.sure = max_lost, sure
        self._state: State | None = None  # immutable and replaced as a whole, so that threads share a classifier

    def get_params(self, deep: bool = True) -> dict:
        """The constructor's arguments by name."""
        return {name: getattr(self, name) for name in PARAMETERS}

    def set_params(self, **params) -> "EarlyExitClassifier":
        """Change arguments of the constructor, by name. Returns the classifier itself."""
        if unknown := sorted(params.keys() - PARAMETERS.keys()):
            raise InputError(f"unknown parameter, should be one of {', '.join(PARAMETERS)}", unknown[0])
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        shown = {name: repr(value) for name, value in self.get_params().items()}  # arrays have no single truth value
        changed = [f"{name}={text}" for name, text in shown.items() if text != repr(PARAMETERS[name])]
        return f"EarlyExitClassifier({', '.join(changed)})"

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags

        kind = {"estimator_type": "classifier", "classifier_tags": ClassifierTags()}
        return Tags(**kind, target_tags=TargetTags(required=True), input_tags=InputTags(string=True))

    def __sklearn_is_fitted__(self) -> bool:
        return self._state is not None

    def fit(
        self,
        X: Any,
        y: Any,
        *,
        unlabelled: Any = None,
        validation: Any = None,
        groups: Any = None,
        unlabelled_groups: Any = None,
    ) -> "EarlyExitClassifier":
        """Train on texts X (N) and labels y (N), and choose what to deploy. Returns the classifier itself.

        `unlabelled` are more texts. Exit 0 learns from them, and so does the model if they outnumber the labelled ones.
        `validation` is (texts, labels) to validate on, instead of rows of X; each text counts by itself.
        `groups` (N) says what a row belongs to, such as a thread or a document, whose rows stay together; None is a row
        by itself. `unlabelled_groups` does so for `unlabelled`. With a `trunk`, X and y may be None. Until the new
        model is ready, the previous one answers. Raises InputError, naming the item, for what cannot be trained on.
        """
        if unlabelled is None and unlabelled_groups is not None:
            raise InputError("needs unlabelled", "unlabelled_groups")
        if groups is not None and unlabelled is not None and unlabelled_groups is None:
            LOG.warning("unlabelled_groups is missing, so each unlabelled text counts as a group by itself")
        texts = None if unlabelled is None else texts_of(unlabelled, "unlabelled")
        more = texts and with_text(texts, unlabelled_groups, "unlabelled_groups")
        rows, label_type = labelled_texts(*(([], []) if X is None and self.trunk else (X, y)))
        rows = with_text(rows, groups)
        others = None
        if validation is not None:
            if not isinstance(validation, tuple | list) or len(validation) != 2:
                raise InputError("should be (texts, labels)", "validation")
            others, label_type = labelled_texts(validation[0], validation[1], [label_type] * any(rows.names or ()))
            others = with_text(others)
            if not others.first:
                raise InputError("has no rows", "validation")
        starts_cuda = torch.cuda.is_initialized() or self.device != "cpu"
        gpus = range(torch.cuda.device_count()) if starts_cuda else ()
        with telling(bool(self.verbose)), torch.random.fork_rng(gpus):
            self.train_on(Given("texts", rows, others, more, label_type))
        return self

    def train_on(self, given: Given) -> None:
        """Train, choose, and replace the state."""
        options, goal = self._options(FitOptions), self._options(Goal)
        device = choose_device(options.device)
        self._state = choose_state(train(options, given), goal, device, choose_precision(options.amp, device))

    def _options(self, kind: type[Made]) -> Made:
        return kind(**{name: getattr(self, name) for name in vars(kind())})

    def choose(self, max_lost: float | None = None, sure: float | None = None) -> "EarlyExitClassifier":
        """Choose what to deploy for another goal, from the saved logits. Returns the classifier itself.

        Omitted arguments are the constructor's.
        """
        given = {name: value for name, value in (("max_lost", max_lost), ("sure", sure)) if value is not None}
        goal, state = replace(self._options(Goal), **given), self.state
        self._state = choose_state(state.trained, goal, state.device, state.precision, state.logits, state.batch_size)
        return self

    @property
    def promise(self) -> str:
        """The promise about new text, in words, or why there is none."""
        return self.state.promise

    def summary(self) -> str:
        """The scores of the bag of words, early exit and full depth on new texts, and what is promised: some lines."""
        return self.state.summary()

    def test(self, X: Any, y: Any, *, groups: Any = None) -> dict[str, Any]:
        """Measure early exit on texts X (N) with labels y (N), None where one is missing; see `minisweet test`.

        Training and validation texts do not count; with `groups` (N), as in `fit`, one text of each new group does.
        Returns fields of `operating_point`: score, full_depth, macro_f1 and per_class of the labelled texts (None
        without any), lost and share of all `judging_texts`.
        """
        state = self.state
        texts, told = state.new_texts(with_text(labelled_texts(X, y)[0], groups), "X")
        if "left out" in told:
            LOG.warning(told)
        of_labels = ("score", "score_interval", "full_depth", "full_depth_interval", "macro_f1", "per_class")
        answers = state.ask(texts)
        measured = measure(state.threshold, answers)
        return measured | ({} if answers.is_labelled.any() else dict.fromkeys(of_labels))

    def explain(self, texts: Iterable[str]) -> list[list[tuple[Answer, bool]]]:
        """Each exit's answer to each text, with exit 0's main words, and whether the text may leave."""
        state = self.state
        return [explain(state, text) for text in texts_of(texts).first]

    def export(self, path: str | Path, *, int8: bool = False) -> list[str]:
        """Write one ONNX file with early exit as it was chosen. Its name must end in .onnx.

        Returns the lines that `minisweet export` prints. Raises InputError for another name, for a file that exists, or
        if the packages for ONNX are missing.
        """
        if Path(path).suffix.lower() != ".onnx":
            raise InputError(f"{path}: should end in .onnx")
        try:
            from minisweet.classifier.onnx import export_onnx
        except ImportError as error:
            raise InputError(f"needs the package {error.name} (pip install '.[onnx]')", "onnx") from None
        state = self.state
        model, bag = copy.deepcopy((state.trained.model, state.trained.bag))  # which go on answering on their device
        trained = state.trained._replace(model=model.cpu(), bag=bag.cpu())
        alone = replace(state, trained=trained, device=torch.device("cpu"), precision=None)
        return export_onnx(Path(path), replace(alone, threshold=state.point.threshold), int8)

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
        """Load a run folder with its operating point. Raises InputError if either is missing.

        `threshold` is from 0 to 1, None for the one that was chosen. At most `batch_size` texts run at once.
        """
        options = FitOptions(device=device, amp=amp)
        TEXTS_AT_ONCE.check("batch_size", batch_size)
        if threshold is not None:
            THRESHOLD.check("threshold", threshold)
        classifier = cls()
        classifier._state = state = load_state(Path(run), threshold, options.device, options.amp, int(batch_size))
        params = vars(state.trained.record.arguments) | vars(state.trained.about) | vars(state.point.goal)
        params |= {"device": options.device, "amp": options.amp}
        return classifier.set_params(**{name: params[name] for name in PARAMETERS if name in params})

    def save(self, run: str | Path) -> None:
        """Write a run folder, which must not exist."""
        save_state(Path(run), self.state, overwrite=False)

    @property
    def state(self) -> State:
        """The state. Raises InputError before anything was trained or loaded."""
        if self._state is None:
            raise InputError("EarlyExitClassifier: not trained yet; call fit, or EarlyExitClassifier.load")
        return self._state

    @property
    def operating_point(self) -> OperatingPoint:
        """What was chosen, and what to expect of it on new text."""
        return self.state.point

    @property
    def classes_(self) -> np.ndarray:
        """The labels (C,), sorted, in the order of `predict_proba`'s columns."""
        if not self.__sklearn_is_fitted__():
            raise AttributeError("classes_: not trained yet")
        return np.unique(self.state.labels)

    def predict(self, X: Any) -> np.ndarray:
        """The labels (N,) of texts."""
        state = self.state  # once, since another thread may replace it
        return np.array(state.labels)[state.decide(state.tokenize(X))[0].argmax(-1).numpy()]

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probabilities (N, C) of `classes_`, from the exit that is taken."""
        state = self.state
        logits, _ = state.decide(state.tokenize(X))
        return logits.double().softmax(-1).numpy()[:, np.argsort(state.labels)]  # as sorted by NumPy

    def score(self, X: Any, y: Any) -> float:
        """The accuracy on texts X (N) with labels y (N), from 0 to 1. Raises InputError, naming the item."""
        answers = self.classify(X)
        names, _ = names_of(y, len(answers), "labels")
        if None in names or not names:
            raise InputError(f"item {names.index(None)}: has no label" if names else "texts: there are none")
        return float(np.mean([label_name(answer.label) == name for answer, name in zip(answers, names, strict=True)]))

    def classify(self, texts: Iterable[str]) -> list[Answer]:
        """Classify N texts in their order. Raises InputError, naming the item's index from 0, for anything but text."""
        state = self.state
        return state.classify(state.tokenize(texts))
