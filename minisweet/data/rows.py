"""Files of rows, in and out: CSV (quotes, line breaks in them), TSV (as CSV, with tabs), JSON lines; also in gzip.

`read_rows` gives the rows, `cell` a row's text or label, and `examples_of` makes examples of them.
"""

import csv
import gzip
import json
import re
import statistics
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unicodedata import normalize

from minisweet.base.safe import InputError, check_regular, written_beside

DELIMITERS = {".csv": ",", ".tsv": "\t", ".jsonl": None}
LONGEST_LINE = 2**24  # bytes, so that a file without line breaks cannot fill the memory
FOREIGN = {  # how the first line of a file begins that is no UTF-8 text
    "UTF-16": rb"\xff\xfe|\xfe\xff|.\0.\0|\0.\0.",
    "a zip or an Excel file": rb"PK\x03\x04",
    "packed by gzip without .gz in its name": rb"\x1f\x8b",
}
LONE_CR = "a carriage return alone, and lines should end in \\n or \\r\\n"
TEXT_COLUMNS = (["text"], ["sentence"], ["sentence1", "sentence2"])  # taken where none are named
LOOK = "they differ by case, Unicode form or a final .0 alone"
Names = Sequence[str] | None  # of classes, index = class


class Examples(NamedTuple):
    """N rows: each list has N."""

    first: list[str]
    second: list[str] | None  # None where there are single sentences
    labels: list[int] | None  # indices of classes; None where there are no labels
    difficulties: list[str] | None = None  # of the toy task only
    lines: list[int] | None = None  # of a file: the line where each row begins, from 1
    empty: int = 0  # rows without text, which were skipped

    def take(self, rows: Sequence[int]) -> "Examples":
        """These rows alone."""
        return Examples(*(None if values is None else [values[row] for row in rows] for values in self[:-1]))

    def texts(self) -> list:
        """Each row's sentence, or pair of sentences."""
        return self.first if self.second is None else list(zip(self.first, self.second, strict=True))


def decoded(line: bytes, number: int, source: object) -> str:
    """A line as text, the first without a byte order mark. Raises InputError, with the line, for what is not text."""
    for name, start in FOREIGN.items() if number == 1 else ():
        if re.match(start, line):
            raise InputError(f"{source}: {name}, should be text in UTF-8")
    wrong = f"longer than {LONGEST_LINE} bytes" if len(line) >= LONGEST_LINE else "a NUL character"
    try:
        if len(line) < LONGEST_LINE and b"\0" not in line:
            return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        wrong = f"not readable as UTF-8 text ({error.reason})"
    raise InputError(f"{source}, line {number}: {wrong}, should be a line of text in UTF-8")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the numbers and the lines, with their ends, of a file in UTF-8, or of one in gzip (.gz).

    A line ends at "\\n" alone: sentences hold other characters that Python takes for line ends. Raises InputError for a
    file that cannot be read, and, with the line, where it is not text.
    """
    number = 0
    try:
        check_regular(path)
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            while line := file.readline(LONGEST_LINE):
                number += 1
                yield number, decoded(line, number, path)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


def table(path: Path, records: Iterable[tuple[int, list[str]]]) -> Iterator[tuple[int, dict]]:
    """Yield the lines of records and their cells by column, which the first record names. Raises InputError."""
    records = iter(records)
    line, header = next(records, (1, []))
    if len(set(header)) < len(header):
        name = statistics.mode(header)
        raise InputError(f"{path}, line {line}: {header.count(name)} columns are named {name!r:.60}")
    for line, cells in records:
        if len(cells) != len(header):
            raise InputError(f"{path}, line {line}: {len(cells)} cells, and the header has {len(header)}")
        yield line, dict(zip(header, cells, strict=True))


def read_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """Stream a file's rows: the line where each begins, and its cells by column.

    Cells are strings or, in JSON lines, whatever stands there. Raises InputError, with the line, for a broken row.
    """
    if delimiter := _delimiter(path):
        yield from table(path, _records(path, delimiter))
        return
    for line, text in read_lines(path):
        if text.isspace():
            continue
        try:
            row = json.loads(text, object_pairs_hook=_object)
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair cannot be
            if not row or not isinstance(row, dict):
                raise ValueError(f"{text.strip()!r:.60} has no columns")
        except (ValueError, RecursionError) as error:
            reason = LONE_CR if "\r" in text.strip() else str(error)[:100]
            raise InputError(f"{path}, line {line}: not readable as a JSON object ({reason})") from None
        yield line, row


def _records(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The records of CSV or TSV that are not empty, each with the line where it begins."""
    csv.field_size_limit(LONGEST_LINE)
    reader, line = csv.reader((text for _, text in read_lines(path)), delimiter=delimiter, strict=True), 1
    try:
        for cells in reader:
            if cells:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        reason = f"({LONE_CR})" if "new-line" in str(error) else f"({error}); are its quotes right?"
        raise InputError(f"{path}, line {line}: no row of cells {reason}") from None


def _object(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object. Raises ValueError where a key stands in it twice."""
    if len(row := dict(pairs)) < len(pairs):
        raise ValueError("a key stands there twice")
    return row


def _delimiter(path: Path) -> str | None:
    if (suffix := Path(path.name.lower().removesuffix(".gz")).suffix) not in DELIMITERS:
        raise InputError(f"{path}: should end in {', '.join(DELIMITERS)}, or one of these and .gz")
    return DELIMITERS[suffix]


def find_columns(
    option: str, path: Path, named: str | Sequence[str] | None, usual: Sequence[Sequence[str]]
) -> list[str]:
    """The columns `named` by the option, at most two, or the first of the `usual` that are there. Raises InputError."""
    right = "one" if option == "--label-column" else "one or two"
    named = [named] if isinstance(named, str) else named
    if named and len(named) > 2:
        raise InputError(f"{option}: {','.join(named)}, should be {right}")
    _, row = next(read_rows(path), (1, {}))
    if not row:
        raise InputError(f"{path}: no rows, should have a row or more, in CSV and TSV below a header")
    for columns in [named] if named else usual:
        if row.keys() >= set(columns):
            return list(columns)
    lacking = " or ".join(dict.fromkeys(map(some, [[name for name in named if name not in row]] if named else usual)))
    raise InputError(f"{path}, line 1: no column {lacking}; it has {some(list(row))}; name {right} with {option}")


def columns_as_trained(path: Path, named: Sequence[str] | None, trained: Sequence[str]) -> list[str]:
    """The text columns of a file for a run that was trained on such ones, or on the toy task, which has none: those
    `named`, or the same, or as many of the usual. Raises InputError, for another number too.
    """
    usual = [names for names in TEXT_COLUMNS if len(names) == max(1, len(trained))]
    columns = find_columns("--text-columns", path, named, [trained] * bool(trained) + usual)
    if trained and len(columns) != len(trained):
        raise InputError(f"--text-columns: {','.join(columns)}, should be {len(trained)}, as in training")
    return columns


def cell(path: Path, line: int, row: dict, column: str, is_label: bool = False) -> str:
    """The text in a column, or the label: JSON's 1 and 1.0 are the label "1". Raises InputError where there is none."""
    value = row.get(column)
    if is_label and isinstance(value, int | float) and value - value == 0:  # not so for NaN and infinity
        value = json.dumps(value).removesuffix(".0")
    if not isinstance(value, str) or "\0" in value or (is_label and not value.strip()):
        right = "a label" if is_label else "text"
        raise InputError(f"{path}, line {line}: {column!r:.60} is {value!r:.60}, should be {right}")
    return value.strip() if is_label else value


def some(names: Sequence[str], most: int = 5) -> str:
    """Names for a message: the first few of many, then the count."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"{name!r:.40}"[1:-1] for name in names[:most]) + more


def examples_of(
    path: Path, rows: Iterable[tuple[int, dict]], text_columns: Sequence[str], label_column: str | None, labels: Names
) -> tuple[Examples, list[str]]:
    """Make examples of a file's rows, which come with their lines; those without text are skipped.

    `labels` are the classes in their order, by default those that occur, sorted; they are returned too. Raises
    InputError, with the line, for a cell that holds no text or another label.
    """
    texts, found, lines, empty = [], [], [], 0
    for line, row in rows:
        text = [cell(path, line, row, column) for column in text_columns]
        if not any(part.strip() for part in text):
            empty += 1
            continue
        if label_column:
            found.append(cell(path, line, row, label_column, is_label=True))
            if labels and found[-1] not in labels:
                like = f" ({LOOK})" if plain(found[-1]) in map(plain, labels) else ""
                raise InputError(f"{path}, line {line}: label {found[-1]!r:.60}, should be one of {some(labels)}{like}")
        texts.append(text)
        lines.append(line)
    if not texts:
        raise InputError(f"{path}: no rows with text in {some(text_columns)}")
    first, second = [list(part) for part in zip(*texts, strict=True)] + [None] * (2 - len(text_columns))
    numbers = {label: number for number, label in enumerate(labels or sorted(set(found)))}
    classes = [numbers[label] for label in found] if label_column else None
    return Examples(first, second, classes, None, lines, empty), list(numbers)


def plain(label: str) -> str:
    """A label without what is easily overlooked."""
    return normalize("NFKC", label.casefold()).removesuffix(".0")


class RowWriter(ExitStack):
    """`with RowWriter(path) as writer:` a file of rows, by its suffix, which appears at the end of the block, whole.

    Path("-") is standard output, as CSV. Raises InputError for another suffix.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.table, self.file = path, None, sys.stdout
        self.delimiter = "," if str(path) == "-" else _delimiter(path)

    def __enter__(self) -> "RowWriter":
        if str(self.path) != "-":
            opened = gzip.open if self.path.suffix.lower() == ".gz" else open
            partial = self.enter_context(written_beside(self.path))
            self.file = self.enter_context(opened(partial, "wt", encoding="utf-8", newline=""))
        elif hasattr(self.file, "reconfigure"):  # whatever the locale, as all files here
            self.file.reconfigure(encoding="utf-8")
        return self

    def write(self, row: dict) -> None:
        """Write a row. The first names the columns of CSV and TSV; later ones may have fewer. ValueError for others."""
        if self.delimiter is None:
            self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
            return
        if self.table is None:
            # Lines end with "\n"; the csv module is left to think of "\r\n", so that it quotes cells that hold either.
            lines = SimpleNamespace(write=lambda line: self.file.write(line.removesuffix("\r\n") + "\n"))
            self.table = csv.DictWriter(lines, list(row), delimiter=self.delimiter)
            self.table.writeheader()
        self.table.writerow({name: cell if isinstance(cell, str) else json.dumps(cell) for name, cell in row.items()})
        if self.file is sys.stdout:
            self.file.flush()
