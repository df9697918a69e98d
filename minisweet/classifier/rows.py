"""Your own text, in and out: files, and lists in Python. Both become `Examples`, with labels and groups as written.

Files are CSV, TSV and JSON lines, in UTF-8.
"""

import csv
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from minisweet.base.files import InputError, preview, regular_file, written_beside
from minisweet.texts import Examples

SUFFIXES = (".csv", ".tsv", ".jsonl")
TEXT_COLUMNS = ("text", "sentence")  # by default, in this order
ONE_TEXT = "join the two texts into one, or train on pairs with train.py"
to_json = partial(json.dumps, ensure_ascii=False)


def read_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """Stream a file's rows: the line on which each ends, and its cells by column.

    Cells are strings, or None at the end of a short row; in JSON lines they are any JSON value. The header shows what
    separates cells: commas, semicolons or tabs. Raises InputError, naming the line, if a row cannot be read.
    """
    suffix = check_suffix(regular_file(path))
    number = 0

    def lines() -> Iterator[str]:
        nonlocal number
        with path.open("rb") as file:  # only "\n" ends a line: Unicode's other line breaks may occur in a text
            for number, line in enumerate(file, 1):  # noqa: B007 (it is read outside)
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")

    try:
        for row in map(json.loads, filter(str.strip, lines())) if suffix == ".jsonl" else read_table(lines(), suffix):
            if not isinstance(row, dict):
                raise ValueError('should be a JSON object, such as {"text": "...", "label": "..."}')
            to_json(row).encode()  # fails for a lone surrogate, which JSON can hold and UTF-8 cannot
            yield number, row
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        wrong = f"byte {error.object[error.start]:#x} is not UTF-8"
        raise InputError(f"{path}, line {number}: {wrong}; save the file as UTF-8 (Latin-1 is not read)") from None
    except (csv.Error, ValueError, TypeError, RecursionError) as error:
        kind = "a JSON object" if suffix == ".jsonl" else "cells"
        raise InputError(f"{path}, line {number}: not readable as {kind} ({error})") from None


def read_table(lines: Iterator[str], suffix: str) -> Iterator[dict]:
    """Rows of a table. In a table of one column an empty line is a row."""
    csv.field_size_limit(2**31 - 1)  # characters of a cell; by default 131,072
    first = next(lines, "")
    delimiters = ",;\t" if suffix == ".csv" else "\t,;"
    delimiter = max(delimiters, key=lambda sign: len(next(csv.reader([first], delimiter=sign), [])))
    table = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
    header = next(table, [])
    if len(set(header)) < len(header):
        raise ValueError("two columns have the same name")
    for cells in table:
        if len(cells) > len(header):
            advice = f"a text that contains {delimiter!r} must be in double quotes"
            raise ValueError(f"{len(cells)} cells, and the header has {len(header)}; {advice}")
        if cells or len(header) == 1:
            yield dict(zip_longest(header, cells or [""]))


def all_columns(path: Path) -> list[str]:
    """A file's columns: those of its header; of JSON lines the keys of all rows, so that the whole file is read."""
    rows = read_rows(path) if check_suffix(path) == ".jsonl" else islice(read_rows(path), 1)
    return list(dict.fromkeys(chain.from_iterable(row for _, row in rows)))


@contextmanager
def row_writer(path: Path | None, columns: Sequence[str]) -> Iterator[Callable[[dict], object]]:
    """Yield a function that writes a row to a file in the format of its suffix, or without one to stdout, as CSV.

    The output is UTF-8, and the file appears at the end, whole. CSV and TSV have these `columns`, and an empty cell
    where a row lacks one. Raises InputError for another suffix.
    """
    suffix = check_suffix(path) if path else ".csv"
    file: Any = sys.stdout
    with ExitStack() as stack:
        if path:
            new = stack.enter_context(written_beside(path))
            file = stack.enter_context(new.open("w", encoding="utf-8", newline=""))
        else:
            file.reconfigure(encoding="utf-8", newline="")
        if suffix == ".jsonl":
            yield lambda row: file.write(to_json(row) + "\n")
            return
        table = csv.DictWriter(file, columns, delimiter="\t" if suffix == ".tsv" else ",")
        table.writeheader()
        is_json = (bool, list, dict)
        yield lambda row: table.writerow({k: to_json(v) if isinstance(v, is_json) else v for k, v in row.items()})


def check_suffix(path: Path) -> str:
    """The suffix of a file of rows. Raises InputError for another one."""
    if (suffix := path.suffix.lower()) not in SUFFIXES:
        raise InputError(f"{path}: should end in {', '.join(SUFFIXES)}")
    return suffix


def find_column(option: str, path: Path, *choices: str) -> str:
    """The first of the `choices` that is a column of the file. Errors name the option."""
    columns = all_columns(path)
    for choice in choices:
        if choice in columns:
            return choice
    if not columns:
        raise InputError(f"{path}: it has no rows")
    lacking, advice = " or ".join(dict.fromkeys(choices)), f"name one with {option}"
    if option == "--text-columns":
        advice += f", or {ONE_TEXT}"
    raise InputError(f"{path}: no column {lacking}; it has {preview(columns)}; {advice}")


def text_column(path: Path, named: str | None, *trained: str) -> str:
    """The column of a file's texts: the one `named`, else the `trained` one, else a usual one."""
    return find_column("--text-columns", path, *([*trained, *TEXT_COLUMNS] if named is None else [named]))


def cell(path: Path, line: int, row: dict, column: str) -> str:
    """The text in a column, "" where there is none. Raises InputError if it is not text."""
    if not isinstance(value := row.get(column), str | None):
        raise InputError(f"{path}, line {line}: {column!r:.60} is {value!r:.60}, should be text")
    return value or ""


def read_texts(path: Path, column: str, label_column: str | None = None, group_column: str | None = None) -> Examples:
    """Read a file's texts, labels and groups. Rows without text are skipped and counted. Errors name the line."""
    for option, named in (("--label-column", label_column), ("--group-column", group_column)):
        if named is not None:
            find_column(option, path, named)
    texts, labels, groups = [], list[str | None](), list[str | None]()
    for line, row in read_rows(path):
        texts.append(cell(path, line, row, column))
        for named, values in ((label_column, labels), (group_column, groups)):
            try:
                values.append(name_of(row.get(named)))
            except ValueError as error:
                raise InputError(f"{path}, line {line}: {named!r:.60}: {error}") from None
    rows = with_text(Examples(texts, None, None, groups=None if group_column is None else groups, names=labels))
    if not rows.first:
        raise InputError(f"{path}: no rows with text in {column}")
    return rows


def with_text(rows: Examples) -> Examples:
    """The rows that have text. The others are counted."""
    kept = [row for row, text in enumerate(rows.first) if text.strip()]
    return rows.take(kept)._replace(empty=len(rows.first) - len(kept))


def joined(*parts: Examples) -> Examples:
    """The rows of several files or lists, one after the other, without class indices."""
    texts = [text for part in parts for text in part.first]
    names = [name for part in parts for name in part.names or [None] * len(part.first)]
    groups = [group for part in parts for group in part.groups or [None] * len(part.first)]
    rows = Examples(texts, None, None, names=names, empty=sum(part.empty for part in parts))
    return rows._replace(groups=groups) if any(groups) else rows


def clean_label(value: Any) -> str | int | float | bool | None:
    """A label or a group, stripped of whitespace; None if it is empty or NaN. Raises ValueError if it cannot be one."""
    if value is None or (isinstance(value, float) and value != value):
        return None
    is_plain = type(value) in (str, int, float, bool)  # the text of an enumeration's member is not its value
    if not is_plain or value in (math.inf, -math.inf):
        raise ValueError(f"{value!r:.60} is not a label, should be text or a number")
    json.dumps(value, ensure_ascii=False).encode()  # as in the files of a run
    return (value.strip() or None) if isinstance(value, str) else value


def name_of(value: Any) -> str | None:
    """A label or a group as text: 1 and 1.0 are both "1"."""
    value = clean_label(value)
    return None if value is None else str(int(value) if isinstance(value, float) and value.is_integer() else value)


def as_list(values: Any, title: str) -> list:
    """A list, an array, or a Series or a frame of one column, as a list of plain values. Errors name the `title`."""
    if isinstance(values, Iterable) and not hasattr(values, "__getitem__"):
        values = list(values)
    array = np.asarray(values, dtype=object)
    if array.ndim == 2 and array.shape[1] != 1:
        advice = f", such as df['text']; {ONE_TEXT}" * (title == "texts")
        columns = f" ({preview(list(values.columns))})" if hasattr(values, "columns") else ""
        raise InputError(f"{title}: has {array.shape[1]} columns{columns}, should have one{advice}")
    if array.ndim not in (1, 2):
        raise InputError(f"{title}: {values!r:.80}, should be a list, such as [text] for one text")
    return [value.item() if isinstance(value, np.generic) else value for value in array.ravel()]


def texts_of(texts: Any, option: str = "") -> Examples:
    """A list of texts as rows without labels. Raises InputError, naming the item."""
    values = as_list(texts, option or "texts")
    for i, text in enumerate(values):
        try:
            text.encode()  # fails for a lone surrogate, which JSON can hold
        except (AttributeError, UnicodeEncodeError):
            raise InputError(f"item {i}: {text!r:.80}, should be one text", option) from None
    return Examples(values, None, None)


def labels_of(values: Any, count: int, title: str) -> list:
    """`count` labels or groups of any type, None for an empty one. Errors name the item."""
    values = as_list(values, title)
    if len(values) != count:
        raise InputError(f"{title}: {len(values):,}, should be as many as the texts, {count:,}")
    for i, value in enumerate(values):
        try:
            values[i] = clean_label(value)
        except ValueError as error:
            raise InputError(f"item {i}: {error}") from None
    return values


def rows_of(X: Any, y: Any = None, groups: Any = None, option: str = "") -> Examples:
    """Lists of texts, labels and groups as rows. Rows without text are skipped and counted. Errors name the item."""
    texts = texts_of(X, option).first
    names = [None] * len(texts) if y is None else labels_of(y, len(texts), "labels")
    if groups is not None:
        groups = list(map(name_of, labels_of(groups, len(texts), f"{option}_groups".lstrip("_"))))
    rows = with_text(Examples(texts, None, None, groups=groups, names=names))
    if texts and not rows.first:
        raise InputError(f"{option or 'texts'}: all of them are empty")
    return rows
