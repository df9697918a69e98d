"""Files of rows, in and out: CSV, TSV (CSV with tabs) and JSON lines, all in UTF-8, with or without a mark."""

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import chain, islice, zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from minisweet.base.files import InputError, preview, regular_file, written_beside

DELIMITERS = {".csv": ",", ".tsv": "\t", ".jsonl": None}
TEXT_COLUMNS = (["text"], ["sentence"], ["sentence1", "sentence2"])  # the usual ones
to_json = partial(json.dumps, ensure_ascii=False)
Names = Sequence[str] | None  # of classes, index = class; or of columns


class Examples(NamedTuple):
    """N rows: each list has N."""

    first: list[str]
    second: list[str] | None  # None where there are single sentences
    labels: list[int] | None  # indices of classes; None where there are no labels
    difficulties: list[str] | None = None  # of the toy task only
    empty: int = 0  # rows without text, which were skipped

    def take(self, rows: Sequence[int]) -> "Examples":
        """These rows alone."""
        return Examples(*(None if values is None else [values[row] for row in rows] for values in self[:-1]))

    def texts(self) -> list:
        """Each row's sentence, or pair of sentences."""
        return self.first if self.second is None else list(zip(self.first, self.second, strict=True))


def read_rows(path: Path, header: Names = None, **options) -> Iterator[tuple[int, dict]]:
    """Stream a file's rows: the line where each ends, and its cells by column. `options` are csv.reader's.

    The `header` is the first row, unless it is given. Cells are strings, or None at the end of a short row; in JSON
    lines, whatever stands there. An empty line is a row where there is one column. Raises InputError, with the line,
    for a broken row.
    """
    delimiter, number = _delimiter(path), 0

    def lines() -> Iterator[str]:
        nonlocal number
        with regular_file(path).open("rb") as file:  # in text mode, other characters than "\n" would end lines
            for number, line in enumerate(file, 1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")

    try:
        if delimiter is None:
            rows = (json.loads(line, object_pairs_hook=_object) for line in lines() if line.strip())
        else:
            csv.field_size_limit(2**31 - 1)  # characters of a cell; by default 131,072
            table = csv.reader(lines(), delimiter=delimiter, strict=True, **options)
            header = header or next(table, [])
            if other := [sign for sign in ";\t,|" if len(header) == 1 and sign in header[0]]:
                raise ValueError(f"its cells are separated by {other[0]!r}, should be by {delimiter!r}")
            if len(set(header)) < len(header):
                raise ValueError("two columns have the same name")
            empty = [""] if len(header) == 1 else []
            rows = (dict(zip_longest(header, cells or empty)) for cells in table if cells or empty)
        for row in rows:
            if not isinstance(row, dict):
                raise ValueError("it is something else")
            to_json(row).encode()  # raises for half of an emoji, which JSON can hold
            if None in row:
                raise ValueError("it has more cells than the header")
            yield number, row
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (csv.Error, ValueError, TypeError, RecursionError) as error:  # of UTF-8 and of JSON too
        kind = "cells" if delimiter else "a JSON object"
        raise InputError(f"{path}, line {number}: not readable as {kind} ({error})") from None


def _object(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object. Raises ValueError for a key that stands there twice, of which json would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"it has the key {next(key for key in keys if keys.count(key) > 1)!r:.60} twice")
    return found


def all_columns(path: Path) -> list[str]:
    """A file's columns: those of the header; in JSON lines those of any row, for which all of them are read."""
    rows = read_rows(path) if _delimiter(path) is None else islice(read_rows(path), 1)
    return list(dict.fromkeys(chain.from_iterable(row for _, row in rows)))


@contextmanager
def row_writer(path: Path | None, columns: Sequence[str]) -> Iterator[Callable[[dict], None]]:
    """Give a function that writes a row to a file, by its suffix; without a path to standard output, as CSV.

    It is in UTF-8 wherever it goes, and the file appears at the end, whole. CSV and TSV have these `columns`, and an
    empty cell where a row has none. Raises InputError for another suffix.
    """
    delimiter, file = _delimiter(path) if path else ",", sys.stdout
    with ExitStack() as stack:
        if path:
            new = stack.enter_context(written_beside(path))
            file = stack.enter_context(new.open("w", encoding="utf-8", newline=""))
        else:
            file.reconfigure(encoding="utf-8", newline="")
        if delimiter is None:
            yield lambda row: file.write(to_json(row) + "\n")
            return
        # csv quotes a carriage return only where lines end in one, so it is told that they do.
        without_return = SimpleNamespace(write=lambda line: file.write(line.removesuffix("\r\n") + "\n"))
        table = csv.DictWriter(without_return, columns, delimiter=delimiter, lineterminator="\r\n")
        table.writeheader()
        is_json = (bool, list, dict)
        yield lambda row: table.writerow({k: to_json(v) if isinstance(v, is_json) else v for k, v in row.items()})


def _delimiter(path: Path) -> str | None:
    if path.suffix.lower() not in DELIMITERS:
        raise InputError(f"{path}: should end in {', '.join(DELIMITERS)}")
    return DELIMITERS[path.suffix.lower()]


def find_columns(option: str, path: Path, *choices: Sequence[str]) -> list[str]:
    """The first of the `choices` whose columns the file all has. Raises InputError, which names the option, if any."""
    first = next(read_rows(path), (0, {}))[1]
    there = list(first) if first.keys() >= set(choices[0]) else all_columns(path)  # not all rows need all columns
    for columns in choices:
        if set(columns) <= set(there):
            return list(columns)
    if not there:
        raise InputError(f"{path}: it has no rows")
    lacking = " or ".join(dict.fromkeys(map(",".join, choices)))
    advice = f"name it with {option}" if option else "name it so in the file"
    raise InputError(f"{path}: no column {lacking}; it has {preview(there)}; {advice}")


def text_columns(path: Path, named: Names, trained: Names = None, option: str = "--text-columns") -> list[str]:
    """The columns of a file's texts: those `named`, or else those `trained` on, or else the usual ones, as many."""
    counts = (1, 2) if trained is None else (max(1, len(trained)),)  # the toy task has no columns
    if named and len(named) not in counts:
        right = "one or two" if trained is None else f"{counts[0]}, as in training"
        raise InputError(f"--text-columns: {','.join(named)}, should be {right}")
    usual = [columns for columns in (trained or (), *TEXT_COLUMNS) if len(columns) in counts]
    return find_columns(option, path, *([named] if named else usual))


def cell(path: Path, line: int, row: dict, column: str, is_label: bool = False) -> str:
    """The text in a column, or the label: JSON's 1 and 1.0 are the label "1". Raises InputError where there is none."""
    value = row.get(column)
    if is_label and isinstance(value, int | float) and value - value == 0:  # not so for NaN and infinity
        value = json.dumps(value + 0.0 if isinstance(value, float) else value).removesuffix(".0")
    if not isinstance(value, str) or (is_label and not value.strip()):
        right = "a label" if is_label else "text"
        raise InputError(f"{path}, line {line}: {column!r:.60} is {value!r:.60}, should be {right}")
    return value.strip() if is_label else value


def examples_of(
    path: Path, rows: Iterable[tuple[int, dict]], columns: Sequence[str], label_column: str | None, labels: Names
) -> tuple[Examples, list[str]]:
    """Make examples of a file's rows, which come with their lines; those without text are skipped.

    `labels` are the classes in their order, by default those that occur, sorted, by number where all are numbers; they
    are returned too. Raises InputError, with the line, for a cell that holds no text or another label.
    """
    texts, found, empty = [], [], 0
    for line, row in rows:
        text = [cell(path, line, row, column) for column in columns]
        if not any(part.strip() for part in text):
            empty += 1
            continue
        texts.append(text)
        if label_column:
            found.append(cell(path, line, row, label_column, is_label=True))
            if labels and found[-1] not in labels:
                raise InputError(f"{path}, line {line}: label {found[-1]!r:.60}, should be one of {preview(labels)}")
    if not texts:
        raise InputError(f"{path}: no rows with text in {', '.join(columns)}")
    first, second = [list(part) for part in zip(*texts, strict=True)] + [None] * (2 - len(columns))
    if not labels:
        labels = sorted(set(found))
        with suppress(ValueError):
            labels = sorted(labels, key=float)
    numbers = {label: number for number, label in enumerate(labels)}
    classes = [numbers[label] for label in found] if label_column else None
    return Examples(first, second, classes, empty=empty), list(numbers)


def write_examples(path: Path, examples: Examples, labels: Sequence[str]) -> None:
    """Write JSON lines: `text`, or `sentence1` and `sentence2`; the `label`, its name; the `difficulty` of toy rows."""
    first = "text" if examples.second is None else "sentence1"
    columns = {first: examples.first, "sentence2": examples.second, "difficulty": examples.difficulties}
    columns["label"] = examples.labels and [labels[label] for label in examples.labels]
    columns = {name: values for name, values in columns.items() if values is not None}
    with row_writer(path, list(columns)) as write:
        for values in zip(*columns.values(), strict=True):
            write(dict(zip(columns, values, strict=True)))


def read_examples(path: Path, labels: Sequence[str]) -> Examples:
    """Read what `write_examples` wrote; `labels` are the classes in their order. Raises InputError for other files."""
    columns, rows = text_columns(path, None), list(read_rows(path))
    first = rows[0][1]
    examples, _ = examples_of(path, rows, columns, "label" if "label" in first else None, labels)
    difficulties = [row["difficulty"] for _, row in rows] if "difficulty" in first else None
    return examples._replace(difficulties=difficulties)
