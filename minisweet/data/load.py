"""The one door to the data of any run: a task's, or the user's own files. Rows count from 0, lines from 1."""

import argparse
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minisweet.base.commands import Parser, list_of, number, whole_number
from minisweet.base.safe import LOG, InputError, home
from minisweet.data.rows import LOOK, TEXT_COLUMNS, Examples, Names, examples_of, find_columns, plain, read_rows, some
from minisweet.data.tasks import TASKS, load_examples

OF_OWN_DATA = ("dev_data", "text_columns", "label_column", "labels", "dev_size", "dev_seed")  # options
MANY, NUMBER = 100, re.compile(r"[-+]?\d*[.,]?\d+(e[-+]?\d+)?", re.I)  # so many numbers are measurements, not classes


class ChangedRows(InputError):
    """A run's validation rows are there, and are not those that it was trained with. An export to ONNX must know it."""


class Data(NamedTuple):
    """What `load_data` found."""

    train: Examples
    dev: Examples
    notes: list[str]  # what the user should know, a line each
    record: dict  # for run.json: what `load_dev` needs, `metric`, and train's `label_counts` (C) or None


def add_data_options(parser: Parser) -> None:
    """Add the options that `load_data` reads."""
    group = parser.add_argument_group("data")
    option, either = group.add_argument, group.add_mutually_exclusive_group().add_argument
    either("--task", choices=list(TASKS), help="of GLUE, or toy (default: toy)")
    either("--data", type=Path, metavar="FILE", help="your own text instead: .csv, .tsv or .jsonl, or one in .gz")
    option("--dev-data", type=Path, metavar="FILE", help="to validate on (default: rows of --data set aside)")
    option("--text-columns", type=list_of(str), help="one or two (default: text, sentence or sentence1,sentence2)")
    option("--label-column", metavar="NAME", help="(default: label)")
    option("--labels", type=list_of(str.strip), help="the classes in their order, as a,b,c (default: as in --data)")
    option("--dev-size", type=number(0.0001, 0.9999), default=0.2, help="share of --data set aside (default: 0.2)")
    option("--dev-seed", type=whole_number(0), default=0, help="of which rows are set aside (default: 0)")
    option("--data-dir", type=Path, default=home() / "data", help="the GLUE tasks' folders (default: %(default)s)")


def data_name(args: argparse.Namespace) -> str:
    """What the data is called: the task, or the name of --data without its suffix."""
    return (args.task or "toy") if args.data is None else args.data.name.split(".")[0] or "own"


def load_data(args: argparse.Namespace, labels: Names = None, need_labels: bool = True) -> Data:
    """Read what the options of `add_data_options` name.

    `labels` are the classes of a finished trunk, in its order: the data's must be among them. Without `need_labels` a
    task's labels are read for dev alone, and own data may lack the label column. Raises InputError for a file or a row
    that is wrong (with the line), and for options that do not go together.
    """
    labels = _class_order(args, labels)
    if args.data is None:
        name = data_name(args)
        labels, metric = labels or TASKS[name].labels, TASKS[name].metric
        train = load_examples(name, "train", args.data_dir, labels, need_labels)
        record = {"task": name, "data_dir": os.path.realpath(args.data_dir), "labels": list(labels)}
    else:
        train, record = _own_train(args, labels, need_labels)
        labels, metric = record["labels"], "accuracy"
    dev, _ = _read_dev(record)  # as evaluate.py will, so that what cannot be read again is found now
    record |= {"dev_digest": digest(dev), "metric": metric if dev.labels else "agreement"}
    record["label_counts"] = train.labels and np.bincount(train.labels, minlength=len(labels)).tolist()
    notes = _notes("train", train, labels) + _notes("validation", dev, labels)
    if both := len(set(train.texts()) & set(dev.texts())):
        notes.append(f"texts that are in both train and validation: {both:,}")
    if dev.labels and (lacking := sorted(set(train.labels or ()) - set(dev.labels))):
        notes.append(f"validation: labels without a row: {some([labels[label] for label in lacking])}")
    counts = Counter(map(plain, labels))
    if alike := [label for label in labels if counts[plain(label)] > 1]:
        notes.append(f"labels that look alike, each a class of its own: {some(alike)} ({LOOK})")
    return Data(train, dev, notes, record)


def _own_train(args: argparse.Namespace, labels: Names, need_labels: bool) -> tuple[Examples, dict]:
    """The rows of --data that are trained on, and what the record tells of it; `labels` where they are prescribed."""
    columns, column = _columns(args.data, args.text_columns, args.label_column, need_labels)
    try:
        train, found = examples_of(args.data, read_rows(args.data), columns, column, labels)
    except InputError as error:
        if need_labels or args.label_column or column is None:
            raise
        column = None  # a column of this name, which is empty or of something else, is no reason to have labels
        train, found = examples_of(args.data, read_rows(args.data), columns, column, labels)
        LOG.warning("labels are left out: %s", error)
    if need_labels:
        _check_classes(args, train, found, is_named=labels is not None)
    dev_rows = None
    if args.dev_data is None:
        classes = train.labels or [0] * len(train.first)  # without labels all rows are drawn alike
        rows, dev_rows = stratified_split(classes, args.dev_size, args.dev_seed, train.texts())
        if not dev_rows:
            what = "no label has two different texts" if train.labels else "all texts are the same"
            raise InputError(f"{args.data}: no row can be set aside: {what}; see --dev-data")
        train = train.take(rows)._replace(empty=train.empty)
    else:
        columns, column = _columns(args.dev_data, columns, column, need_labels=False)
    record = {"task": data_name(args), "data": os.path.realpath(args.data), "labels": list(labels or found)}
    record |= {"dev_data": args.dev_data and os.path.realpath(args.dev_data), "dev_rows": dev_rows}
    return train, record | {"text_columns": columns, "label_column": column}


def load_dev(record: dict, data: Path | None = None, data_dir: Path | None = None) -> Examples:
    """Read the validation rows of a run's record again; `data` is the own file, if it moved, `data_dir` GLUE's folder.

    Raises InputError where the rows cannot be read, or their texts or labels have changed.
    """
    try:
        dev, path = _read_dev(record, data, data_dir)
        is_same = digest(dev) == record["dev_digest"]
    except (AttributeError, IndexError, KeyError, TypeError):
        raise InputError("run.json: what it tells of the data is nothing that train.py writes") from None
    if not is_same:
        raise ChangedRows(f"{path}: the validation rows' texts or labels have changed since the run was trained")
    return dev


def _read_dev(record: dict, data: Path | None = None, data_dir: Path | None = None) -> tuple[Examples, Path]:
    """The validation rows, and where they were read. Raises what a broken record raises, and InputError."""
    if record.get("data") is None:
        if data is not None:
            raise InputError(f"--data: {data}, but the run's data is the task {record['task']}; see --data-dir")
        path = data_dir or Path(record["data_dir"])
        return load_examples(record["task"], "dev", path, record["labels"]), path
    if data_dir is not None:
        raise InputError(f"--data-dir: {data_dir}, but the run's data is a file of its own; see --data")
    path, rows = data or Path(record["dev_data"] or record["data"]), record["dev_rows"]
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; if it moved, name it with --data")
    dev, _ = examples_of(path, read_rows(path), record["text_columns"], record["label_column"], record["labels"])
    if rows is not None:  # of a file that has fewer by now, those that are left have another digest
        dev = dev.take([row for row in rows if row < len(dev.first)])
    return dev, path


def stratified_split(labels: Sequence[int], dev_size: float, seed: int, texts: Sequence) -> tuple[list[int], list[int]]:
    """Labels (N,) to the sorted rows of train and dev: of each class a share `dev_size`.

    Equal `texts` (N,) are on one side. So dev's share of a class with few and frequent texts may be another. Each class
    has a row on either side, unless it has one text alone, which goes to train, or shares all with rarer classes.
    """
    rng, labels, numbers = np.random.default_rng(seed), np.asarray(labels), {}
    which = np.array([numbers.setdefault(text, len(numbers)) for text in texts])  # (N,)
    side = np.full(len(numbers), -1)  # of each text: 1 dev, 0 train, -1 not decided
    classes = [np.unique(which[labels == label], return_counts=True) for label in np.unique(labels)]
    for own, counts in sorted(classes, key=lambda part: len(part[0])):  # rarest first: others may share its texts
        in_dev, free = counts[side[own] == 1].sum(), rng.permutation(np.flatnonzero(side[own] < 0))
        wanted, chosen = min(max(1, round(dev_size * counts.sum())), counts.sum() - 1), []
        room = wanted - in_dev
        for i in free:
            if counts[i] <= room:
                room -= counts[i]
                chosen.append(i)
        if not (in_dev or chosen) and len(own) > 1:
            chosen = free[counts[free].argsort()[:1]]
        side[own[free]] = 0
        side[own[chosen]] = 1
    return np.flatnonzero(side[which] == 0).tolist(), np.flatnonzero(side[which] == 1).tolist()


def class_weights(label_counts: Sequence[int]) -> list[float]:
    """What a row of each class counts, (C,): N / (C n_c), where C classes occur, and 0 where n_c is 0."""
    occurring = sum(map(bool, label_counts))
    return [sum(label_counts) / (occurring * count) if count else 0.0 for count in label_counts]


def drawn_rows(examples: Examples, size: int | None, seed: int) -> np.ndarray:
    """The numbers, sorted, of `size` rows, or of all: by --seed alone. Of one seed, 500 rows are among its 6,000."""
    return np.sort(np.random.default_rng(seed).permutation(len(examples.first))[:size])


def digest(examples: Examples, rows: Sequence[int] | None = None) -> str:
    """The SHA-256 of the texts and labels of these rows (default: all), in hexadecimal."""
    chosen, result = examples if rows is None else examples.take(rows), hashlib.sha256()
    for text, label in zip(chosen.texts(), chosen.labels or [None] * len(chosen.first), strict=True):
        result.update(json.dumps([text, label]).encode() + b"\n")
    return result.hexdigest()


def _columns(path: Path, text: Names, label: str | None, need_labels: bool) -> tuple[list[str], str | None]:
    """The columns of the text and of the labels: named, or the usual; labels that are not needed may have none."""
    usual = [["label"]] if need_labels else [["label"], []]
    columns = find_columns("--text-columns", path, text, TEXT_COLUMNS)
    try:
        column = next(iter(find_columns("--label-column", path, label, usual)), None)
    except InputError as error:
        without = ", or learn from a --trunk with --targets trunk" if need_labels else ""
        raise InputError(f"{error}{without}") from None
    if column in columns:
        raise InputError(f"--text-columns: {some(columns)}, should not be the label column, {column!r:.60}")
    return columns, column


def _check_classes(args: argparse.Namespace, train: Examples, labels: Sequence[str], is_named: bool) -> None:
    """Refuse what cannot be learned; `is_named` where the user named the classes."""
    counts = Counter(train.labels)
    rarest = min(counts, key=counts.get)
    where = f"{args.data}, line {train.lines[train.labels.index(rarest)]}: label {labels[rarest]!r:.60}"
    if len(counts) == 1:
        raise InputError(f"{where} is the only one, should be two or more")
    if not is_named and len(counts) >= MANY and all(map(NUMBER.fullmatch, labels)):
        raise InputError(f"{where} is one of {len(counts)} numbers; if they are classes, name them with --labels")
    if args.dev_data is None and counts[rarest] == 1:
        raise InputError(f"{where} has one row, should have two or more: one to train, one to validate")


def _class_order(args: argparse.Namespace, trunk: Names) -> Names:
    """The classes that --labels or a trunk prescribe, or None. A trunk's LABEL_0, LABEL_1 and so on are no names."""
    if trunk is None:
        return args.labels
    named = (TASKS[data_name(args)].labels if args.data is None else args.labels) or ()
    if list(trunk) == [f"LABEL_{i}" for i in range(len(trunk))]:
        if len(named) != len(trunk):
            given = ",".join(named) or "not given"
            raise InputError(f"--labels: {given:.80}, should name the trunk's {len(trunk)} classes, in its order")
        return named
    if args.labels and list(args.labels) != list(trunk):
        raise InputError(f"--labels: {some(args.labels)}, and the trunk's are {some(trunk)}")
    known = {} if args.data else {label.casefold(): label for label in named}  # POSITIVE is GLUE's positive
    return [known.get(label.casefold(), label) for label in trunk]


def _notes(split: str, examples: Examples, labels: Sequence[str]) -> list[str]:
    rows, counts = len(examples.first), Counter(examples.labels)
    listed = [f"{labels[label]} {count:,}" for label, count in sorted(counts.items())]
    notes = [f"{split}: {rows:,} rows" + (f": {some(listed, 20)}" if listed else " without labels")]
    counted = {"empty texts, skipped": examples.empty, "duplicate texts": rows - len(set(examples.texts()))}
    return notes + [f"{split}: {what}: {count:,}" for what, count in counted.items() if count]
