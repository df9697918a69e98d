"""Own text as users have it: files, in and out, and Python lists. Files are CSV, TSV and JSON lines, in UTF-8, or in
UTF-16 with a mark.
"""

import csv
import json
import re
import sys
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minisweet.base.files import InputError, preview, regular_file, written_beside
from minisweet.texts import Examples

SUFFIXES = (".csv", ".tsv", ".jsonl")
TEXT_COLUMNS = (["text"], ["sentence"], ["sentence1", "sentence2"])  # the usual ones
HALF = re.compile("[\ud800-\udfff]")  # half of a character, which UTF-8 cannot hold
to_json = partial(json.dumps, ensure_ascii=False)


class Rows(NamedTuple):
    """Texts as users have them, and what each row's label is called."""

    examples: Examples  # N, without labels
    names: list[str | None]  # (N,), None where a row has no label
    columns: list[str]  # of the texts, in their file
    label_column: str | None = None
    group_column: str | None = None
    label_type: str = "str"  # of labels that came from Python


def read_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """Stream a file's rows: the line where each ends, and its cells by column.

    Cells are strings, or None at the end of a short row; in JSON lines, whatever stands there. The header shows what
    separates cells: commas, semicolons or tabs. An empty line is a row where there is one column. Raises InputError,
    with the line, for a broken row.
    """
    is_json, number = _suffix(path) == ".jsonl", 0

    def lines() -> Iterator[str]:
        nonlocal number
        with regular_file(path).open("rb") as file:
            is_utf16 = file.read(2) in (BOM_UTF16_LE, BOM_UTF16_BE)
        # Only "\n" ends a line: what else may end one can stand in a text. What is no UTF-8 is refused below.
        form = {"encoding": "utf-16" if is_utf16 else "utf-8-sig", "errors": "surrogateescape"}
        with path.open(newline="\n", **form) as file:
            for number, line in enumerate(file, 1):  # noqa: B007 (it is read outside)
                yield line

    try:
        if is_json:
            rows = (json.loads(line) for line in lines() if line.strip())
        else:
            csv.field_size_limit(2**31 - 1)  # characters of a cell; by default 131,072
            text = lines()
            first = next(text, "")
            others = ",;\t" if path.suffix.lower() == ".csv" else "\t,;"
            delimiter = max(others, key=lambda sign: len(next(csv.reader([first], delimiter=sign), [])))
            table = csv.reader(chain([first], text), delimiter=delimiter, strict=True)
            header = next(table, [])
            if len(set(header)) < len(header):
                raise ValueError("two columns have the same name")
            empty = [""] if len(header) == 1 else []
            rows = (dict(zip_longest(header, cells or empty)) for cells in table if cells or empty)
        for row in rows:
            if not isinstance(row, dict):
                raise ValueError("it is something else")
            to_json(row).encode()  # raises for half of an emoji, which JSON can hold, and for bytes that are no UTF-8
            if None in row:
                raise ValueError("it has more cells than the header")
            yield number, row
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (csv.Error, ValueError, TypeError, RecursionError) as error:  # of UTF-8 and of JSON too
        kind = "a JSON object in UTF-8" if is_json else "cells in UTF-8"
        raise InputError(f"{path}, line {number}: not readable as {kind} ({error})") from None


def all_columns(path: Path) -> list[str]:
    """A file's columns: those of the header; in JSON lines those of any row, for which all of them are read."""
    rows = read_rows(path) if _suffix(path) == ".jsonl" else islice(read_rows(path), 1)
    return list(dict.fromkeys(chain.from_iterable(row for _, row in rows)))


@contextmanager
def row_writer(path: Path | None, columns: Sequence[str]) -> Iterator[Callable[[dict], None]]:
    """Give a function that writes a row to a file, by its suffix; without a path to standard output, as CSV.

    It is in UTF-8 wherever it goes, and the file appears at the end, whole. CSV and TSV have these `columns`, and an
    empty cell where a row has none. Raises InputError for another suffix.
    """
    suffix, file = _suffix(path) if path else ".csv", sys.stdout
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


def text_columns(
    path: Path, named: Sequence[str] | None, trained: Sequence[str] | None = None, option: str = "--text-columns"
) -> list[str]:
    """The columns of a file's texts: those `named`, or else those `trained` on, or else the usual ones, as many."""
    counts = (1, 2) if trained is None else (max(1, len(trained)),)  # the toy task has no columns
    if named and len(named) not in counts:
        right = "one or two" if trained is None else f"{counts[0]}, as in training"
        raise InputError(f"--text-columns: {','.join(named)}, should be {right}")
    usual = [columns for columns in (trained or (), *TEXT_COLUMNS) if len(columns) in counts]
    return find_columns(option, path, *([named] if named else usual))


def cell(path: Path, line: int, row: dict, column: str) -> str:
    """The text in a column. Raises InputError where there is none."""
    if not isinstance(value := row.get(column), str):
        raise InputError(f"{path}, line {line}: {column!r:.60} is {value!r:.60}, should be text")
    return value


def label_name(value: object) -> str | None:
    """What a label is called: the numbers 1 and 1.0 are "1"; None for an empty cell. Raises ValueError for no label."""
    if value is None or type(value).__name__ == "NAType":  # pandas' NA, which is neither equal to itself nor not
        return None
    if not isinstance(value, str | int | float | bool):
        raise ValueError(f"{value!r:.60} is no label, should be text or a number")
    if value != value or not str(value).strip():  # NaN is as empty
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if HALF.search(str(value)):
        raise ValueError(f"{value!r:.60} holds half of a character, should be valid Unicode")
    return str(value).strip()


def read_texts(
    path: Path, columns: Sequence[str], label_column: str | None = None, group_column: str | None = None
) -> Rows:
    """Read a file's texts, labels and groups; rows without text are skipped and counted. InputError has the line."""
    texts, names, groups, empty = [], [], [], 0
    for line, row in read_rows(path):
        text = [cell(path, line, row, column) for column in columns]
        try:
            name, group = (label_name(row.get(named := its)) if its else None for its in (label_column, group_column))
        except ValueError as error:
            raise InputError(f"{path}, line {line}: {named!r:.60}: {error}") from None
        if any(part.strip() for part in text):
            texts.append(text)
            names.append(name)
            groups.append(group)
        else:
            empty += 1
    if not texts:
        raise InputError(f"{path}: no rows with text in {', '.join(columns)}")
    first, second = [list(part) for part in zip(*texts, strict=True)] + [None] * (2 - len(columns))
    examples = Examples(first, second, None, groups=groups if group_column else None, empty=empty)
    return Rows(examples, names, list(columns), label_column, group_column)


def as_list(values: object) -> object:
    """Values of numpy, and of pandas' frames and series, as a list of items, or of rows of more than one column."""
    values = values.to_numpy() if hasattr(values, "to_numpy") else values
    if not isinstance(values, np.ndarray):
        return values
    return (values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values).tolist()


def texts_of(texts: Iterable[str | Sequence[str]], sides: int | None = None) -> Examples:
    """A list of texts, or of pairs, as rows without labels; `sides` is 1 or 2, None for those of the first item."""
    texts = as_list(texts)
    if isinstance(texts, str | bytes | Mapping) or not isinstance(texts, Iterable):
        raise InputError(f"texts: {texts!r:.80}, should be a list; for one text: [text]")
    rows = []
    for i, text in enumerate(texts):
        row = list(as_list(text)) if isinstance(text, tuple | list | np.ndarray) else [text]
        sides = sides or (2 if len(row) == 2 else 1)
        if len(row) != sides or not all(isinstance(part, str) for part in row):
            wanted = "a pair of texts" if sides == 2 else "one text"
            raise InputError(f"item {i}: {text!r:.80}, should be {wanted}, as the others")
        if half := HALF.search("".join(row)):
            raise InputError(f"item {i}: it holds {half[0]!r}, half of a character; should be valid Unicode")
        rows.append(row)
    return Examples([row[0] for row in rows], [row[1] for row in rows] if sides == 2 else None, None)


def with_groups(examples: Examples, groups: Iterable | None, name: str) -> Examples:
    """Texts from Python with the groups that belong to them. Raises InputError, with the item."""
    if groups is None:
        return examples
    return examples._replace(groups=names_of(groups, len(examples.first), name)[0])


def with_text(rows: Rows) -> Rows:
    """Those rows from Python that have text, as of a file; the others are counted."""
    sides = zip(*(part for part in rows.examples[:2] if part is not None), strict=True)
    kept = [row for row, parts in enumerate(sides) if any(part.strip() for part in parts)]
    if rows.names and not kept:
        raise InputError("texts: all of them are empty")
    examples = rows.examples.take(kept)._replace(empty=len(rows.names) - len(kept))
    return rows._replace(examples=examples, names=[rows.names[row] for row in kept])


def labelled_texts(X, y, sides: int | None = None) -> Rows:
    """Texts and labels as a file's rows would be. Raises InputError, with the item."""
    examples = texts_of(X, sides)
    names, kinds = names_of(y, len(examples.first), "labels")
    if examples.second and examples.second == names:
        raise InputError("texts: the second of each pair is its label; name the columns of texts alone")
    if len(kinds) > 1 and kinds != {"int", "float"}:
        raise InputError(f"labels: {' and '.join(sorted(kinds))} are mixed, should be of one type")
    columns = ["text"] if examples.second is None else ["sentence1", "sentence2"]
    return Rows(examples, names, columns, label_type="float" if "float" in kinds else next(iter(kinds), "str"))


def names_of(values: Iterable, count: int, what: str) -> tuple[list[str | None], set[str]]:
    """What some labels or groups from Python are called, None where one is empty; and the types of the others."""
    values = as_list(values)
    if not isinstance(values, Iterable) or isinstance(values, str | bytes):
        raise InputError(f"{what}: {values!r:.60}, should be a list")
    if len(values := list(values)) != count:
        raise InputError(f"{what}: {len(values):,}, should be as many as the texts, {count:,}")
    values = [value.item() if isinstance(value, np.generic) else value for value in values]
    names = []
    for i, value in enumerate(values):
        try:
            names.append(label_name(value))
        except ValueError as error:
            raise InputError(f"item {i}: {error}") from None
    return names, {type(value).__name__ for value, name in zip(values, names, strict=True) if name is not None}
