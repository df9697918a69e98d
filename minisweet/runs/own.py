"""What own text adds to a training: a trunk to start from, rows that are set aside, and texts without a label.

Dimension letters: N instances, C classes.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from tokenizers import Tokenizer

from minisweet.base import devices
from minisweet.base.files import LOG, InputError, preview
from minisweet.data.own import stratified_split
from minisweet.data.text import Examples, TokenizedExamples
from minisweet.evaluation.operating import ENOUGH_JUDGES
from minisweet.evaluation.outputs import all_logits
from minisweet.exits import ExitModel
from minisweet.methods import METHODS
from minisweet.runs.folders import is_run
from minisweet.runs.hub import REPOSITORIES
from minisweet.runs.load import load_trunk, read_record
from minisweet.runs.resume import SavedTraining
from minisweet.runs.start import Data, Setup

MOST_JUDGES, JUDGES = 2000, 5  # at most so many unlabelled texts judge, and one of so many
TIMED = 64  # unlabelled texts, to tell how long all of them will take


@dataclass(frozen=True, kw_only=True)
class OwnData(Data):
    """Own text. A row whose label is -1 is unlabelled."""

    dev: Examples | None = None  # None: a share of `train` is set aside
    unlabelled: Examples | None = None

    def begin(self, args: argparse.Namespace) -> "OwnData":
        """Load --trunk, and take its labels and its length of texts. InputError where it does not fit."""
        if not args.trunk:
            return self
        trunk, labels = load_trunk(args.trunk)
        if METHODS[args.method].keeps_trunk and args.exit_strategy == "lte" and trunk.heads[0].lte is None:
            why = f"{args.trunk} stays as it is and has not learned when it is right"
            raise InputError(f"--exit-strategy: lte, and {why}")
        before = read_record(args.trunk) if is_run(args.trunk) else None
        data = replace(self.with_labels_of(labels, args.trunk), trunk=trunk)
        if len(self.labels) < len(labels):  # the others are of the trunk's type
            data = replace(data, label_type=before.label_type if before else "str")
        args.model = f"./{args.trunk}" if str(args.trunk) in REPOSITORIES else str(args.trunk)  # a folder, not a preset
        if before:
            args.max_length = args.max_length or before.max_length
            data = replace(data, known_keys=before.trained_keys)
        return data

    def with_labels_of(self, labels: Sequence[str], trunk: object) -> "OwnData":
        """The data with a trunk's classes, in its order. Raises InputError for a label that the trunk does not know."""
        if others := [name for name in self.labels if name not in labels]:
            known = f"{trunk} does not know the label {others[0]!r:.60}; its labels: {preview(labels)}"
            raise InputError(f"--trunk: {known}")
        numbers = [labels.index(name) for name in self.labels] + [-1]  # the last is that of -1
        train, dev = (
            rows and rows._replace(labels=[numbers[label] for label in rows.labels]) for rows in (self.train, self.dev)
        )
        return replace(self, labels=list(labels), train=train, dev=dev)

    def split(
        self, args: argparse.Namespace, tokenizer: Tokenizer, may_learn: bool
    ) -> tuple[Examples, Examples, TokenizedExamples | None]:
        """As `Data.split`: labelled rows, those that are set aside, and the tokens of unlabelled texts, if any.

        Texts of the same tokens are one text, and stay on one side. Raises InputError where nothing is left for one.
        """
        is_labelled = np.array(self.train.labels, dtype=int) >= 0
        rows, texts = (self.train.take(np.flatnonzero(there)) for there in (is_labelled, ~is_labelled))
        texts = texts.joined(self.unlabelled) if self.unlabelled else texts
        if not rows.first and not (args.trunk and texts.first):
            raise InputError(f"{self.task}: no row has a label")
        may_learn = may_learn or not rows.first  # without labels all exits learn what the trunk says
        if self.unlabelled and not may_learn:
            raise InputError("--unlabelled: exit 0 and branches alone learn from it; add 0 to --exit-layers")
        keys = TokenizedExamples(tokenizer, rows).keys()
        train, dev = rows, self.dev or rows
        if self.dev is None and rows.first:
            train, dev = self.set_aside(rows, args.dev_size, keys)
        if lacking := [self.labels[n] for n in sorted(set(rows.labels) - set(dev.labels))]:
            LOG.warning("no row to validate on has the label %s", preview(lacking))
        if not texts.first:
            return train, dev, None
        tokens, of_dev = TokenizedExamples(tokenizer, texts), TokenizedExamples(tokenizer, dev).keys()
        judges, others = judges_and_others(tokens.keys(), np.concatenate([keys, of_dev]), len(np.unique(of_dev)))
        new = len(judges) + len(others)
        if self.unlabelled and not new:
            raise InputError("--unlabelled: no text is left: all of them are also labelled, or set aside")
        dev = dev.joined(texts.take(judges))
        if not dev.first:
            raise InputError(f"{self.task}: too few texts to choose and to judge on: one in {JUDGES} of {new}")
        counts = [f"{n:,}" for n in (len(others) * may_learn, len(judges), len(texts.first) - new)]
        LOG.info("unlabelled texts: %s to learn from, %s to judge; left out, labelled too or there twice: %s", *counts)
        return train, dev, tokens.take(others) if may_learn else None

    def set_aside(self, rows: Examples, dev_size: float, keys: np.ndarray) -> tuple[Examples, Examples]:
        """Labelled rows, with keys (N,) of their texts, to those to train on and a share to validate on."""
        if len(set(rows.labels)) < 2:
            only = self.labels[rows.labels[0]]
            raise InputError(f"{self.task}: all rows have the label {only!r:.60}, needs two or more")
        kept, aside = stratified_split(rows.labels, dev_size, 0, keys.tolist())
        if not aside:
            raise InputError(f"{self.task}: no row can be set aside: no label has two different texts")
        return rows.take(kept), rows.take(aside)

    def answers(self, setup: Setup, checkpoint: SavedTraining, model: ExitModel, stage: str) -> np.ndarray:
        """What a model's last exit says of the unlabelled texts: probabilities (N, C). They are a `stage`."""
        if stage not in checkpoint.stages:
            alone = model.models_alone[-1]
            alone = alone.keep_exits(alone.head_layers[-1:]).eval().to(setup.device)
            precision = devices.choose_precision(setup.args.amp, setup.device)  # as in evaluation: on a CPU float32
            started, some = time.perf_counter(), setup.unlabelled.take(np.arange(len(setup.unlabelled))[:TIMED])
            all_logits(alone, some, precision)
            minutes = (time.perf_counter() - started) / len(some) * len(setup.unlabelled) / 60
            LOG.info("the model answers %s unlabelled texts: some %.1f minutes", f"{len(setup.unlabelled):,}", minutes)
            with checkpoint.timed(stage) as state:
                logits, _ = all_logits(alone, setup.unlabelled, precision, "unlabelled texts")
                state["answers"] = logits[-1].softmax(-1)
            alone.cpu()
        return checkpoint.stages[stage]["answers"].numpy()


def judges_and_others(keys: np.ndarray, known: np.ndarray, labelled: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of N unlabelled texts judge, and which do not, by their keys (N,): none that is `known`, and each once.

    A fifth judges where fewer labelled texts would, and fewer than enough; three quarters of both judge in the end.
    """
    distinct, first = np.unique(keys, return_index=True)
    new = np.random.default_rng(0).permutation(np.sort(first[~np.isin(distinct, known)]))
    judges = min(MOST_JUDGES, len(new) // JUDGES)
    if labelled >= min(judges, ENOUGH_JUDGES * 4 // 3):
        judges = 0
    return new[:judges], np.sort(new[judges:])
