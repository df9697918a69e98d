"""Early exit by scikit-learn's conventions: texts in, labels out."""

import inspect
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minisweet.base.files import LOG, InputError
from minisweet.classifier import report
from minisweet.classifier.cascade import Answer, Answers, Cascade, answers_of
from minisweet.classifier.explain import explain
from minisweet.classifier.promise import Goal, OperatingPoint, choose, measure
from minisweet.classifier.rows import labels_of, name_of, rows_of, texts_of
from minisweet.classifier.run import Validation, load_cascade, load_validation, save_run
from minisweet.classifier.split import rows_to_test
from minisweet.classifier.training import check_options, train
from minisweet.run import check_output
from minisweet.texts import Examples


class EarlyExitClassifier:
    """A text classifier that answers easy texts before the first layer.

        classify = EarlyExitClassifier(model="minilm-l6", max_lost=3, sure=90).fit(texts, labels)
        classify.predict(["The printer is on fire"])          # array of labels; predict_proba (N, C), classes_, score
        classify.classify(texts)                              # per text: label, confidence, exit layer, probabilities
        print(classify.promise, classify.operating_point)     # what to expect on new text
        classify.choose(max_lost=2)                           # another goal
        classify.save("runs/tickets")                         # a run folder; EarlyExitClassifier.load reads it

    Texts are a list of strings, or a pandas Series or a DataFrame with one column. Labels are text, numbers or bools;
    None is a row without a label. `fit` skips and counts empty texts. Several threads may share one classifier. On a
    CPU `minisweet.tune_cpu()`, before a process's first model, makes it faster.

    Args:
        model: a preset, a folder in Hugging Face's layout, or an id of its hub.
        trunk: the folder of a run or a finished classifier to start from. Its layers stay frozen, so it cannot be
            combined with model, lr or epochs.
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
        self._deployed: tuple[Cascade, OperatingPoint] | None = None  # replaced as a whole, so that threads share it
        self.record: Namespace  # run.json
        self.validation: Validation

    def get_params(self, deep: bool = True) -> dict:
        """The constructor's arguments by name."""
        return {name: getattr(self, name) for name in PARAMETERS}

    def set_params(self, **params) -> "EarlyExitClassifier":
        """Change arguments of the constructor, by name. Returns the classifier itself."""
        for name, value in params.items():
            if name not in PARAMETERS:
                raise InputError(f"unknown parameter, should be one of {', '.join(PARAMETERS)}", name)
            setattr(self, name, value)
        return self

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags

        kind = {"estimator_type": "classifier", "classifier_tags": ClassifierTags()}
        return Tags(**kind, target_tags=TargetTags(required=True), input_tags=InputTags(string=True))

    def __sklearn_is_fitted__(self) -> bool:
        return self._deployed is not None

    @property
    def classes_(self) -> np.ndarray:
        """The labels (C,), sorted, in the order of `predict_proba`'s columns."""
        if self._deployed is None:
            raise AttributeError("classes_: not trained yet")
        return np.unique(self.cascade.labels)

    def predict(self, X: Any) -> np.ndarray:
        """The labels (N,) of texts."""
        cascade = self.cascade  # once, since another thread may replace it
        return np.array(cascade.labels)[cascade.decide(cascade.tokenize(X))[0].argmax(-1).numpy()]

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probabilities (N, C) of `classes_`, after temperature scaling, from the exit that is taken."""
        cascade = self.cascade
        logits, _ = cascade.decide(cascade.tokenize(X))
        return logits.double().softmax(-1).numpy()[:, np.argsort(cascade.labels)]  # as sorted by NumPy

    def score(self, X: Any, y: Any) -> float:
        """The accuracy on texts X (N) with labels y (N), from 0 to 1. Raises InputError, naming the item."""
        answers = [name_of(answer.label) for answer in self.classify(X)]
        labels = list(map(name_of, labels_of(y, len(answers), "labels")))
        if None in labels or not labels:
            raise InputError(f"item {labels.index(None)}: has no label" if labels else "texts: there are none")
        return float(np.mean([answer == label for answer, label in zip(answers, labels, strict=True)]))

    def classify(self, texts: Iterable[str]) -> list[Answer]:
        """Classify N texts in their order. Raises InputError, naming the item's index from 0, for anything but text."""
        cascade = self.cascade
        return cascade.answer(cascade.tokenize(texts))

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

        `unlabelled` are more texts. The bag of words learns from them; the model, too, if they outnumber labelled ones.
        `validation` is (texts, labels) to validate on, instead of rows of X; each text counts by itself.
        `groups` (N) says what a row belongs to, such as a thread or a document, whose rows stay together; None is a row
        by itself. `unlabelled_groups` does so for `unlabelled`. With a `trunk`, X and y may be None. Until the new
        model is ready, the previous one answers. Raises InputError, naming the item, for what cannot be trained on.
        """
        if unlabelled is None and unlabelled_groups is not None:
            raise InputError("needs unlabelled", "unlabelled_groups")
        if groups is not None and unlabelled is not None and unlabelled_groups is None:
            LOG.warning("unlabelled_groups is missing, so each unlabelled text counts as a group by itself")
        if validation is not None and (not isinstance(validation, tuple | list) or len(validation) != 2):
            raise InputError("should be (texts, labels)", "validation")
        X, y = ([], []) if X is None and self.trunk else (X, y)
        rows, given = rows_of(X, y, groups), rows_of(*(([], []) if validation is None else validation))
        if validation is not None and not given.first:
            raise InputError("has no rows", "validation")
        more = rows_of([] if unlabelled is None else unlabelled, None, unlabelled_groups, "unlabelled")
        gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() or self.device != "cpu" else ()
        columns = {f"{name}_column": name for name in ("text", "label", "group")}  # of the files of `minisweet test`
        with report.telling(bool(self.verbose)), torch.random.fork_rng(gpus):
            self.fit_rows("texts", rows, given, more, **columns)
        return self

    def fit_rows(self, name: str, rows: Examples, given: Examples, unlabelled: Examples, **columns: str | None) -> None:
        """Train, choose what to deploy, and replace the cascade. For the arguments see `train`."""
        options = check_options(**self.get_params())
        self._deploy(*train(name, rows, given, unlabelled, options, **columns), options)

    def choose(self, max_lost: float | None = None, sure: float | None = None) -> "EarlyExitClassifier":
        """Choose what to deploy for another goal, from the saved logits. Returns the classifier itself.

        Omitted arguments are the constructor's. If the precision has changed, the validation texts run again.
        """
        (cascade, point), validation = self.deployed, self.validation
        given = {name: value for name, value in (("max_lost", max_lost), ("sure", sure)) if value is not None}
        if point.precision != str(cascade.precision or torch.float32):
            validation = validation._replace(logits=cascade.ask_both(validation.texts))
        self._deploy(self.record, cascade, validation, check_options(**self.get_params() | given))
        return self

    def _deploy(self, record: Namespace, cascade: Cascade, validation: Validation, options: Namespace) -> None:
        """Choose a threshold for a goal, and replace the cascade."""
        texts, roles, logits = validation
        goal, combines = Goal(max_lost=options.max_lost, sure=options.sure), record.arguments["trunk"] is None
        point = choose(logits, texts.labels, texts.keys, roles, goal, combines)
        point = replace(point, id=record.id, precision=str(cascade.precision or torch.float32))
        cascade = replace(cascade, rule=point.rule, threshold=point.threshold)
        self._deployed, self.record, self.validation = (cascade, point), record, validation

    @property
    def deployed(self) -> tuple[Cascade, OperatingPoint]:
        """The deployed cascade and its operating point. Raises InputError if nothing has been trained or loaded."""
        if self._deployed is None:
            raise InputError("EarlyExitClassifier: not trained yet; call fit, or EarlyExitClassifier.load")
        return self._deployed

    @property
    def cascade(self) -> Cascade:
        """The deployed cascade."""
        return self.deployed[0]

    @property
    def operating_point(self) -> OperatingPoint:
        """What was chosen, and what to expect of it on new text."""
        return self.deployed[1]

    @property
    def promise(self) -> str:
        """The promise about new text, in words, or why there is none."""
        return report.promise_of(*self.deployed, self.record)

    def summary(self) -> str:
        """The scores of the bag of words, early exit and full depth on new texts, and what is promised: some lines."""
        return "\n".join(report.summary(*self.deployed, self.record))

    def test(self, X: Any, y: Any, *, groups: Any = None) -> dict[str, Any]:
        """Measure early exit on texts X (N) with labels y (N), None where one is missing; see `minisweet test`.

        Training and validation texts do not count; with `groups` (N), as in `fit`, one text of each new group does.
        Returns fields of `operating_point` (those that need labels are None without any) and the scores `per_class`.
        """
        answers, told = self.ask_new(rows_of(X, y, groups), "X")
        if "left out" in told:
            LOG.warning(told)
        measured = measure(self.cascade.threshold, answers)
        of_labels = "score score_interval full_depth full_depth_interval macro_f1 per_class".split()
        return measured if answers.is_labelled.any() else measured | dict.fromkeys(of_labels)

    def ask_new(self, rows: Examples, source: object) -> tuple[Answers, str]:
        """Both exits' answers to the rows that may test what was chosen, and a line on those left out."""
        cascade = self.cascade
        texts, told = rows_to_test(source, cascade.tokenizer, rows, self.record, self.validation.texts.keys)
        logits = cascade.ask_both(texts, cascade.batch_size)
        return answers_of(logits, cascade.rule, texts.labels, texts.keys), told

    def explain(self, texts: Iterable[str]) -> list[list[tuple[Answer, bool]]]:
        """Both answers to each text, with the bag of words' main words, and whether the text may leave."""
        cascade = self.cascade
        return [explain(cascade, text) for text in texts_of(texts).first]

    def export(self, path: str | Path, *, int8: bool = False) -> list[str]:
        """Write one ONNX file with early exit as it was chosen. Its name must end in .onnx.

        Returns the lines that `minisweet export` prints. Raises InputError for a file that exists.
        """
        if Path(path).suffix.lower() != ".onnx":
            raise InputError(f"{path}: should end in .onnx")
        try:
            from minisweet.classifier.onnx import export_onnx
        except ImportError as error:
            raise InputError(f"needs the package {error.name} (pip install '.[onnx]')", "onnx") from None
        return export_onnx(Path(path), *self.deployed, self.record, self.validation, int8)

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
        options = check_options(threshold=threshold, device=device, amp=amp, batch_size=batch_size)
        record, cascade, point = load_cascade(Path(run), options)
        classifier = cls(**record.arguments | vars(point.goal) | {"device": device, "amp": amp})
        classifier.record, classifier._deployed = record, (cascade, point)
        classifier.validation = load_validation(Path(run), record, cascade)
        return classifier

    def save(self, run: str | Path, overwrite: bool = False) -> None:
        """Write a run folder, with the last choice of `fit` or `choose` (not a `threshold` that was given to `load`).

        Raises InputError if the folder cannot be written, or holds anything but a run to `overwrite`.
        """
        if overwrite:
            check_output(Path(run), overwrite)
        save_run(Path(run), *self.deployed, self.record, self.validation, overwrite)


PARAMETERS = {name: item.default for name, item in inspect.signature(EarlyExitClassifier).parameters.items()}
