"""Your own text, in and out: files, and lists in Python. Both become `Examples` with labels and groups as written.

Files are CSV, TSV and JSON lines, in UTF-8, or in UTF-16 with a byte-order mark.
"""

import csv
import json
import re
import sys
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from minisweet.base.files import InputError, preview, regular_file, written_beside
from minisweet.texts import Examples

SUFFIXES = (".csv", ".tsv", ".jsonl")
TEXT_COLUMNS = ("text", "sentence")  # by default, in this order
ONE_TEXT = "join the two texts into one, or train on pairs with train.py"
HALF = re.compile("[\ud800-\udfff]")  # half of a character (a surrogate), which UTF-8 cannot encode
LabelType = Literal["str", "int", "float", "bool"]  # of labels in Python
to_json = partial(json.dumps, ensure_ascii=False)


# --- Files


def read_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """Stream a file's rows: the line on which each ends, and its cells by column.

    Cells are strings, or None at the end of a short row; in JSON lines they are any JSON value. The header shows what
    separates cells: commas, semicolons or tabs. Raises InputError, naming the line, if a row cannot be read.
    """
    suffix = _suffix(regular_file(path))
    number = 0

    def lines() -> Iterator[str]:
        nonlocal number
        with path.open("rb") as file:
            is_utf16 = file.read(2) in (BOM_UTF16_LE, BOM_UTF16_BE)
        # Only "\n" ends a line: Unicode's other line breaks may occur in a text. Bytes that are not UTF-8 are refused
        # below, with their line.
        encoding = "utf-16" if is_utf16 else "utf-8-sig"
        with path.open(encoding=encoding, errors="surrogateescape", newline="\n") as texts:
            for number, line in enumerate(texts, 1):  # noqa: B007 (it is read outside)
                yield line

    try:
        rows = map(json.loads, filter(str.strip, lines())) if suffix == ".jsonl" else _table(lines(), suffix)
        for row in rows:
            if not isinstance(row, dict):
                raise ValueError("not an object")
            to_json(row).encode()  # raises for half of an emoji, which JSON can hold, and for bytes that are not UTF-8
            if None in row:
                raise ValueError("it has more cells than the header")
            yield number, row
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (csv.Error, ValueError, TypeError, RecursionError) as error:  # of UTF-8 and of JSON too
        kind = "a JSON object in UTF-8" if suffix == ".jsonl" else "cells in UTF-8"
        raise InputError(f"{path}, line {number}: not readable as {kind} ({error})") from None


def _table(lines: Iterator[str], suffix: str) -> Iterator[dict]:
    """Rows of a table, with cells beyond the header under None. In a table of one column an empty line is a row."""
    csv.field_size_limit(2**31 - 1)  # characters of a cell; by default 131,072
    first = next(lines, "")
    delimiters = ",;\t" if suffix == ".csv" else "\t,;"
    delimiter = max(delimiters, key=lambda sign: len(next(csv.reader([first], delimiter=sign), [])))
    table = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
    header = next(table, [])
    if len(set(header)) < len(header):
        raise ValueError("two columns have the same name")
    empty = [""] if len(header) == 1 else []
    yield from (dict(zip_longest(header, cells or empty)) for cells in table if cells or empty)


def all_columns(path: Path) -> list[str]:
    """A file's columns: those of its header; of JSON lines the keys of all rows, so that the whole file is read."""
    rows = read_rows(path) if _suffix(path) == ".jsonl" else islice(read_rows(path), 1)
    return list(dict.fromkeys(chain.from_iterable(row for _, row in rows)))


@contextmanager
def row_writer(path: Path | None, columns: Sequence[str]) -> Iterator[Callable[[dict], object]]:
    """Yield a function that writes a row to a file in the format of its suffix, or without one to stdout, as CSV.

    The output is UTF-8, and the file appears at the end, whole. CSV and TSV have these `columns`, and an empty cell
    where a row lacks one. Raises InputError for another suffix.
    """
    suffix = _suffix(path) if path else ".csv"
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


def _suffix(path: Path) -> str:
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
    advice += f", or {ONE_TEXT}" * (option == "--text-columns")
    raise InputError(f"{path}: no column {lacking}; it has {preview(columns)}; {advice}")


def text_column(path: Path, named: str | None, trained: Sequence[str] = ()) -> str:
    """The column of a file's texts: the one `named`, else the `trained` one, else a usual one."""
    return find_column("--text-columns", path, *([named] if named else [*trained, *TEXT_COLUMNS]))


def cell(path: Path, line: int, row: dict, column: str) -> str:
    """The text in a column, "" where there is none. Raises InputError if it is not text."""
    if not isinstance(value := row.get(column), str | None):
        raise InputError(f"{path}, line {line}: {column!r:.60} is {value!r:.60}, should be text")
    return value or ""


def read_texts(path: Path, column: str, label_column: str | None = None, group_column: str | None = None) -> Examples:
    """Read a file's texts, labels and groups. Rows without text are skipped and counted. Errors name the line."""
    texts, names, groups, empty = [], [], [], 0

    def name_in(column: str | None) -> str | None:
        try:
            return label_name(row.get(column)) if column else None
        except ValueError as error:
            raise InputError(f"{path}, line {line}: {column!r:.60}: {error}") from None

    for option, named in (("--label-column", label_column), ("--group-column", group_column)):
        if named:
            find_column(option, path, named)
    for line, row in read_rows(path):
        text = cell(path, line, row, column)
        name, group = name_in(label_column), name_in(group_column)
        if text.strip():
            texts.append(text)
            names.append(name)
            groups.append(group)
        else:
            empty += 1
    if not texts:
        raise InputError(f"{path}: no rows with text in {column}")
    return Examples(texts, None, None, groups=groups if group_column else None, names=names, empty=empty)


def joined(*parts: Examples) -> Examples:
    """The rows of several files or lists, one after the other, without class indices."""

    def values(field: str) -> list:
        return sum((getattr(part, field) or [None] * len(part.first) for part in parts), [])

    groups, empty = values("groups"), sum(part.empty for part in parts)
    rows = Examples(values("first"), None, None, names=values("names"), empty=empty)
    return rows._replace(groups=groups) if any(groups) else rows


# --- Lists in Python


def label_name(value: object) -> str | None:
    """A label or a group as text: 1 and 1.0 are both "1", and an empty cell is None. Raises ValueError for others."""
    if value is None or type(value).__name__ == "NAType":  # pandas' NA, which has no truth value
        return None
    if type(value) not in (str, int, float, bool):  # an enumeration's member has another text than its value
        raise ValueError(f"{value!r:.60} is not a label, should be text or a number")
    if value != value or not str(value).strip():  # NaN is empty too
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if HALF.search(str(value)):
        raise ValueError(f"{value!r:.60} holds half of a character, should be valid Unicode")
    return str(value).strip()


def as_list(values: Any, title: str) -> list:
    """A list, an array, or a Series or a frame of one column, as a list of plain values. Errors name the `title`."""
    values = values.tolist() if isinstance(values, np.ma.MaskedArray) else values  # None where it is masked
    if isinstance(values, Iterable) and not (hasattr(values, "__getitem__") or isinstance(values, set | frozenset)):
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
    """A list of texts as unlabelled rows. Raises InputError, naming the item."""
    values = as_list(texts, option or "texts")
    for i, text in enumerate(values):
        if not isinstance(text, str):
            raise InputError(f"item {i}: {text!r:.80}, should be one text", option)
        if half := HALF.search(text):
            raise InputError(f"item {i}: it holds {half[0]!r}, half of a character; should be valid Unicode", option)
    return Examples(values, None, None)


def with_text(examples: Examples, groups: Iterable | None = None, option: str = "groups") -> Examples:
    """The rows that have text, with their groups; the others are counted. Raises InputError, naming the item."""
    if groups is not None:
        examples = examples._replace(groups=names_of(groups, len(examples.first), option)[0])
    kept = [row for row, text in enumerate(examples.first) if text.strip()]
    if examples.first and not kept:
        raise InputError("texts: all of them are empty")
    return examples.take(kept)._replace(empty=len(examples.first) - len(kept))


def labelled_texts(X: Any, y: Any, others: Collection[LabelType] = ()) -> tuple[Examples, LabelType]:
    """Texts and labels as rows, and their type together with that of `others`. Raises InputError, naming the item."""
    examples = texts_of(X)
    names, types = names_of(y, len(examples.first), "labels")
    types |= {*others}
    if len(types) > 1 and types != {"int", "float"}:
        raise InputError(f"labels: {' and '.join(sorted(types))} are mixed, should be of one type")
    return examples._replace(names=names), "float" if "float" in types else cast(LabelType, next(iter(types), "str"))


def names_of(values: Any, count: int, title: str) -> tuple[list[str | None], set[str]]:
    """`count` labels or groups as text (None if empty), and the types of the others. Errors name the item."""
    values = as_list(values, title)
    if len(values) != count:
        raise InputError(f"{title}: {len(values):,}, should be as many as the texts, {count:,}")
    names = []
    for i, value in enumerate(values):
        try:
            names.append(label_name(value))
        except ValueError as error:
            raise InputError(f"item {i}: {error}") from None
    return names, {type(value).__name__ for value, name in zip(values, names, strict=True) if name is not None}
