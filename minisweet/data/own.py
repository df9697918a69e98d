"""The user's own text: files of it into the same `Examples` as a task's, and the one door to the data of any run.

Files are CSV (quotes, and line breaks within them), TSV (as CSV, with tabs) or JSON lines, by their suffix, and may be
packed by gzip (.gz). Rows are numbered from 0, without those whose text is empty; lines from 1.
"""

import argparse
import csv
import gzip
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from minisweet.data.tasks import LONGEST_LINE, TASKS, Examples, load_examples, read_lines
from minisweet.files.commands import Parser, list_of, number, whole_number
from minisweet.files.hub import home
from minisweet.files.safe import InputError, written_beside

DATA_DIR = home() / "data"
DELIMITERS = {".csv": ",", ".tsv": "\t", ".jsonl": None}
TEXT_COLUMNS = (["text"], ["sentence"], ["sentence1", "sentence2"])  # taken where none are named
Names = Sequence[str] | None  # of columns or classes
MANY, NUMBER = 100, re.compile(r"[-+]?\d*[.,]?\d+(e[-+]?\d+)?", re.I)  # so many numbers are measurements, not classes


class OwnData(NamedTuple):
    """What `read_own` found."""

    examples: Examples
    labels: tuple[str, ...] | None  # index = class; None where there is no label column
    text_columns: list[str]
    label_column: str | None
    empty: int  # rows without text, which were skipped


class Data(NamedTuple):
    """What `load_data` found."""

    train: Examples
    dev: Examples
    labels: tuple[str, ...]  # index = class
    metric: str  # "accuracy", "matthews", or "agreement" (with full depth) where dev has no labels
    label_counts: list[int] | None  # (C,) rows of train; None where it has no labels
    notes: list[str]  # what the user should know, a line each
    record: dict  # what run.json must hold for `load_dev`; its `task` is the data's name


def add_data_options(parser: Parser) -> None:
    """Add the options that `load_data` reads."""
    group = parser.add_argument_group("data")
    option, either = group.add_argument, group.add_mutually_exclusive_group().add_argument
    either("--task", choices=list(TASKS), help="of GLUE, or toy (default: toy)")
    either("--data", type=Path, metavar="FILE", help="your own text instead: .csv, .tsv or .jsonl, or one in .gz")
    option("--dev-data", type=Path, metavar="FILE", help="to validate on (default: rows of --data set aside)")
    option("--text-columns", type=list_of(str), help="one or two (default: text, sentence or sentence1,sentence2)")
    option("--label-column", metavar="NAME", help="(default: label)")
    option("--labels", type=list_of(str), help="the classes in their order, such as a,b,c (default: as in --data)")
    option("--dev-size", type=number(0.0001, 0.9999), default=0.2, help="share of --data set aside (default: 0.2)")
    option("--dev-seed", type=whole_number(0), default=0, help="of which rows are set aside (default: 0)")
    option("--data-dir", type=Path, default=DATA_DIR, help="holds the GLUE tasks' folders (default: %(default)s)")


def data_name(args: argparse.Namespace) -> str:
    """What the data is called: the task, or the name of --data without its suffix."""
    return (args.task or "toy") if args.data is None else args.data.name.split(".")[0] or "own"


def load_data(args: argparse.Namespace, labels: Names = None, need_labels: bool = True) -> Data:
    """Read what the options of `add_data_options` name.

    `labels` are the classes of a finished trunk, in its order: the data's must be among them, and LABEL_0, LABEL_1 and
    so on are no names and take those of the task or of --labels. Without `need_labels` a task's labels are read for
    dev alone, and own data may lack the label column.
    Raises InputError for a file or a row that is wrong (with the line), and for options that do not go together.
    """
    for option in ("dev_data", "text_columns", "label_column", "labels"):
        if args.data is None and getattr(args, option) is not None:
            raise InputError(f"--{option.replace('_', '-')}: needs --data")
    labels, name, empty = _class_order(args, labels), data_name(args), [0, 0]
    if args.data is None:
        labels, metric = labels or TASKS[name].labels, TASKS[name].metric
        train = load_examples(name, "train", args.data_dir, labels, need_labels)
        dev = load_examples(name, "dev", args.data_dir, labels)
        record = {"task": name, "data_dir": str(args.data_dir.resolve())}
    else:
        own = read_own(args.data, args.text_columns, args.label_column, labels, need_labels)
        train, found, columns, column, empty[0] = own
        if need_labels:
            _check_classes(args, train, found, is_named=labels is not None)
        labels, dev_rows = labels or found or (), None
        if args.dev_data is None:
            classes = train.labels or [0] * len(train.first)
            rows, dev_rows = (part.tolist() for part in stratified_split(classes, args.dev_size, args.dev_seed))
            if not dev_rows:
                raise InputError(f"{args.data}: no row of it can be set aside, it should have two or more")
            train, dev = train.take(rows), train.take(dev_rows)
        else:
            dev, _, _, column, empty[1] = read_own(args.dev_data, columns, column, labels, need_labels=False)
        metric = "agreement" if dev.labels is None else "accuracy"
        record = {"task": name, "data": str(args.data.resolve()), "text_columns": columns, "label_column": column}
        record |= {"dev_data": args.dev_data and str(args.dev_data.resolve()), "dev_rows": dev_rows}
    record |= {"labels": list(labels), "dev_digest": digest(dev)}
    counts = None if train.labels is None else np.bincount(train.labels, minlength=len(labels)).tolist()
    notes = _notes("train", train, labels, empty[0]) + _notes("validation", dev, labels, empty[1])
    if both := len(set(train.texts()) & set(dev.texts())):
        notes.append(f"texts that are in both train and validation: {both:,}")
    return Data(train, dev, tuple(labels), metric, counts, notes, record)


def load_dev(record: dict, data: Path | None = None, data_dir: Path | None = None) -> Examples:
    """Read a run's validation rows again.

    `record` is `Data.record`; of a run from before there were digests, its `task` and `data_dir` alone. `data` is the
    own file that holds the rows, if it moved, `data_dir` the folder of GLUE's.
    Raises InputError where the rows cannot be read, or their texts or labels have changed.
    """
    try:
        if record.get("data") is None:
            if data is not None:
                raise InputError(f"--data: {data}, but the run's data is the task {record['task']}; see --data-dir")
            path = data_dir or Path(record["data_dir"])
            dev = load_examples(record["task"], "dev", path, record.get("labels"))
        else:
            path, column = data or Path(record["dev_data"] or record["data"]), record["label_column"]
            if not path.is_file():
                raise InputError(f"{path}: no such file; if it moved, name it with --data")
            dev = read_own(path, record["text_columns"], column, record["labels"], need_labels=False).examples
            rows = range(len(dev.first)) if record["dev_rows"] is None else record["dev_rows"]
            if rows[-1] >= len(dev.first):
                raise InputError(f"{path}: has {len(dev.first)} rows with text, fewer than when the run was trained")
            dev = dev.take(rows)._replace(**({} if column else {"labels": None}))
    except (AttributeError, IndexError, KeyError, TypeError):
        raise InputError("run.json: what it tells of the data is nothing that train.py writes") from None
    if (found := digest(dev)) != record.get("dev_digest", found):
        raise InputError(f"{path}: the validation rows' texts or labels have changed since the run was trained")
    return dev


def read_own(
    path: Path, text_columns: Names = None, column: str | None = None, labels: Names = None, need_labels: bool = True
) -> OwnData:
    """Read texts, or pairs of texts, and their labels.

    `text_columns` are one or two, by default the first of `TEXT_COLUMNS` that the file has. `column` is the labels',
    by default "label", which may be missing without `need_labels`. `labels` are the classes in their order, by default
    those that occur, sorted. Raises InputError, with file and line, for a missing column, a row that cannot be read,
    and a label that is not in `labels`.
    """
    columns = list(next(_rows(path), (1, {}))[1])
    chosen = text_columns or next((names for names in TEXT_COLUMNS if set(names) <= set(columns)), TEXT_COLUMNS[0])
    column = column or ("label" if need_labels or "label" in columns else None)
    if missing := [name for name in (*chosen, column) if name is not None and name not in columns]:
        option = "--label-column" if missing == [column] else "--text-columns"
        there = f"it has {_some(columns)}; name yours with {option}" if columns else "it has no rows"
        raise InputError(f"{path}, line 1: no column {missing[0]!r:.60}; {there}")
    if len(chosen) > 2 or column in chosen:
        raise InputError(f"--text-columns: {_some(chosen)}, should be one or two, and not the label column")
    texts, names, lines, empty = [], [], [], 0
    for line, row in _rows(path):
        text = [_cell(path, line, row, name) for name in chosen]
        if not any(part.strip() for part in text):
            empty += 1
            continue
        if column:
            names.append(_cell(path, line, row, column, is_label=True))
            if labels and names[-1] not in labels:
                raise InputError(f"{path}, line {line}: label {names[-1]!r:.60}, should be one of {_some(labels)}")
        texts.append(text)
        lines.append(line)
    if not texts:
        raise InputError(f"{path}: no text in any row of {_some(chosen)}")
    labels = tuple(labels or sorted(set(names))) if column else None
    numbers = {label: index for index, label in enumerate(labels or ())}
    first, second = [list(part) for part in zip(*texts, strict=True)] + [None] * (2 - len(chosen))
    examples = Examples(first, second, [numbers[name] for name in names] if column else None, lines=lines)
    return OwnData(examples, labels, list(chosen), column, empty)


def stratified_split(labels: Sequence[int], dev_size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Set a share `dev_size` of each class aside, by chance: labels (N,) to the row numbers of train and dev, sorted.

    A class has at least one row on each side; it must have two.
    """
    rng, labels, dev = np.random.default_rng(seed), np.asarray(labels), np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        dev[rows[: min(max(1, round(dev_size * len(rows))), len(rows) - 1)]] = True
    return np.flatnonzero(~dev), np.flatnonzero(dev)


def drawn_rows(examples: Examples, size: int | None, seed: int) -> np.ndarray:
    """The numbers, sorted, of `size` rows drawn by the seed; of all rows where that is None or too many."""
    return np.sort(np.random.default_rng(seed).permutation(len(examples.first))[:size])


def digest(examples: Examples, rows: Iterable[int] | None = None) -> str:
    """The SHA-256 of the texts and labels of these rows (default: all), in hexadecimal."""
    chosen, result = examples if rows is None else examples.take(rows), hashlib.sha256()
    for text, label in zip(chosen.texts(), chosen.labels or [None] * len(chosen.first), strict=True):
        result.update(json.dumps([text, label]).encode() + b"\n")
    return result.hexdigest()


def read_rows(path: Path, columns: Sequence[str]) -> Iterator[dict]:
    """Stream a file's rows: dicts of all columns in their order, of strings or, in JSON lines, whatever stands there.

    Raises InputError, with the line, for a wrong row, and for one that has no text in `columns`.
    """
    for line, row in _rows(path):
        for column in columns:
            _cell(path, line, row, column)
        yield row


class RowWriter(ExitStack):
    """A file of rows, as CSV, TSV or JSON lines by its suffix: `with RowWriter(path) as writer: writer.write(row)`.

    The file appears at the end of the block, whole. Path("-") is standard output, as CSV. Raises InputError for another
    suffix, and for a row with a column that the first one lacks.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.columns, self.file = path, None, sys.stdout
        self.delimiter = "," if str(path) == "-" else _delimiter(path)
        # Lines end with "\n"; the csv module is left to think of "\r\n", so that it quotes cells that hold either.
        lines = SimpleNamespace(write=lambda line: self.file.write(line.removesuffix("\r\n") + "\n"))
        self.cells = csv.writer(lines, delimiter=self.delimiter or ",")

    def __enter__(self) -> "RowWriter":
        if str(self.path) != "-":
            opened = gzip.open if self.path.suffix.lower() == ".gz" else open
            partial = self.enter_context(written_beside(self.path))
            self.file = self.enter_context(opened(partial, "wt", encoding="utf-8", newline=""))
        return self

    def write(self, row: dict) -> None:
        """Write a row; in CSV and TSV the first one names the columns."""
        if self.delimiter is None:
            self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
            return
        if self.columns is None:
            self.columns = list(row)
            self.cells.writerow(self.columns)
        if extra := [column for column in row if column not in self.columns]:
            raise InputError(f"{self.path}: no column {extra[0]!r:.60} in the first row but in a later one; use .jsonl")
        values = [row.get(column, "") for column in self.columns]
        self.cells.writerow(value if isinstance(value, str) else json.dumps(value) for value in values)
        if self.file is sys.stdout:
            self.file.flush()


def _delimiter(path: Path) -> str | None:
    suffix = (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()
    if suffix not in DELIMITERS:
        raise InputError(f"{path}: should end in {', '.join(DELIMITERS)}, or one of these and .gz")
    return DELIMITERS[suffix]


def _rows(path: Path) -> Iterator[tuple[int, dict]]:
    """Yield the line where each row begins, and the row. Raises InputError for one that is broken."""
    delimiter, line, header = _delimiter(path), 1, None
    if delimiter is None:
        for line, text in read_lines(path):
            try:
                if text.isspace():
                    continue
                row = json.loads(text, object_pairs_hook=_object)
                if not isinstance(row, dict) or not row:
                    raise ValueError(f"{text.strip()!r:.60} is {'empty' if row == {} else 'none'}")
                if "\\u" in text:
                    json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair cannot be
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {line}: not readable as a JSON object ({str(error)[:100]})") from None
            yield line, row
        return
    csv.field_size_limit(LONGEST_LINE)
    reader = csv.reader((text for _, text in read_lines(path)), delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            if header is None and cells:
                header = cells
                [(name, count)] = Counter(header).most_common(1)
                if count > 1:
                    raise InputError(f"{path}, line {line}: {count} columns are named {name!r:.60}")
            elif cells:  # an empty line is no row
                if len(cells) != len(header):
                    raise InputError(f"{path}, line {line}: {len(cells)} cells, and the header has {len(header)}")
                yield line, dict(zip(header, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}, line {line}: no row of cells ({error}); are its quotes right?") from None


def _object(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object. Raises ValueError where a key stands in it twice."""
    if len(row := dict(pairs)) < len(pairs):
        raise ValueError(f"a key of {_some([key for key, _ in pairs])} stands there twice")
    return row


def _cell(path: Path, line: int, row: dict, column: str, is_label: bool = False) -> str:
    """The text in a column, or the label: JSON's 1 is the label "1". Raises InputError where there is none."""
    found = value = row.get(column, "missing")
    if is_label and isinstance(value, int | float) and value - value == 0:  # not so for NaN and infinity
        value = json.dumps(value)
    if column not in row or not isinstance(value, str) or "\0" in value or (is_label and not value.strip()):
        right = "a label" if is_label else "text"
        raise InputError(f"{path}, line {line}: {column!r:.60} is {found!r:.60}, should be {right}")
    return value.strip() if is_label else value


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
    """The classes that --labels or a trunk prescribe, in their order; None where neither does."""
    if trunk is None:
        return args.labels
    named = (TASKS[data_name(args)].labels if args.data is None else args.labels) or ()
    if list(trunk) == [f"LABEL_{i}" for i in range(len(trunk))]:
        if len(named) != len(trunk):
            given = ",".join(named) or "not given"
            raise InputError(f"--labels: {given:.80}, should name the trunk's {len(trunk)} classes, in its order")
        return named
    if args.labels and list(args.labels) != list(trunk):
        raise InputError(f"--labels: {_some(args.labels)}, and the trunk's are {_some(trunk)}")
    known = {} if args.data else {label.casefold(): label for label in named}  # POSITIVE is GLUE's positive
    return [known.get(label.casefold(), label) for label in trunk]


def _notes(split: str, examples: Examples, labels: Sequence[str], empty: int) -> list[str]:
    rows, counts = len(examples.first), Counter(examples.labels)
    listed = [f"{labels[label]} {count:,}" for label, count in sorted(counts.items())]
    notes = [f"{split}: {rows:,} rows" + (f": {_some(listed, 20)}" if listed else " without labels")]
    duplicates = rows - len(set(examples.texts()))
    counted = (("empty texts, skipped", empty), ("duplicate texts", duplicates))
    return notes + [f"{split}: {what}: {count:,}" for what, count in counted if count]


def _some(names: Sequence[str], most: int = 5) -> str:
    """Names for a message: the first few of many, then the count."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"{name!r:.40}"[1:-1] for name in names[:most]) + more
