"""Files of rows: read, refused with file and line, and written."""

import csv
import json
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisweet.classifier.rows import (
    find_column,
    labels_of,
    name_of,
    read_rows,
    read_texts,
    row_writer,
    text_column,
    texts_of,
)
from minisweet.classifier.split import class_numbers, classes_of
from minisweet.texts import Examples
from tests.conftest import refused

TEXTS = ['He said "no",\nthen "yes"', "a\tb, c\rd", "caf\u00e9 \u2028 \\", " "]
BETWEEN = {".csv": ",", ".tsv": "\t", ".jsonl": None}


def write(path: Path, rows: list[dict], encoding: str = "utf-8") -> Path:
    """Write rows with the standard library alone."""
    with path.open("w", encoding=encoding, newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            style = {"delimiter": BETWEEN[path.suffix], "quoting": csv.QUOTE_ALL, "lineterminator": "\n"}
            writer = csv.DictWriter(file, list(rows[0]), **style)
            writer.writeheader()
            writer.writerows(rows)
    return path


def read(path):
    """The rows of a file, with their labels."""
    return read_texts(path, text_column(path, None), find_column("--label-column", path, "label"))


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5) | st.sampled_from(TEXTS)


@given(
    rows=st.lists(st.fixed_dictionaries(dict.fromkeys(["id", "text", "label"], CELLS)), min_size=1, max_size=9),
    suffix=st.sampled_from(list(BETWEEN)),
    encoding=st.sampled_from(["utf-8", "utf-8-sig"]),
)
def test_rows_are_read_as_they_were_written_by_us_and_by_others(tmp_path_factory, rows, suffix, encoding):
    path = write(tmp_path_factory.mktemp("t") / f"a{suffix}", rows, encoding)
    found = list(read_rows(path))
    assert [row for _, row in found] == rows
    is_json = suffix == ".jsonl"
    sizes = [1 if is_json else 1 + "".join(row.values()).count("\n") for row in rows]
    assert [line for line, _ in found] == list(accumulate(sizes, initial=1 - is_json))[1:]
    with row_writer(path, list(rows[0])) as write_row:
        for row in rows:
            write_row(row)
    assert list(read_rows(path)) == found
    with path.open(encoding="utf-8", newline="") as file:
        theirs = map(json.loads, file) if is_json else csv.DictReader(file, delimiter=BETWEEN[suffix])
        assert list(theirs) == rows


def test_lines_that_are_empty_and_ends_of_lines(tmp_path):
    """An empty line is a row where there is one column."""
    (tmp_path / "a.csv").write_text('text\n\na\n"b\n"\n')
    assert [row["text"] for _, row in read_rows(tmp_path / "a.csv")] == ["", "a", "b\n"]
    (tmp_path / "a.csv").write_bytes(b',text,label\r\n0,"a\r\nb",y\r\n\r\n1,c,x\r\n2, ,x\r\n')
    assert read(tmp_path / "a.csv") == Examples(["a\r\nb", "c"], None, None, names=["y", "x"], empty=1)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("between", ",;\t")
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_files_as_people_have_them(tmp_path, encoding, between, suffix):
    """The header shows what separates cells."""
    text = f'id{between}text{between}label\n1{between}"ein, zwei; \u00fc\t\u0d0a"{between}x\n'
    (tmp_path / f"a{suffix}").write_bytes(text.encode(encoding))
    assert read(tmp_path / f"a{suffix}") == Examples(["ein, zwei; \u00fc\t\u0d0a"], None, None, names=["x"])


def test_columns_as_in_training_and_two_are_refused(tmp_path):
    path = write(tmp_path / "a.csv", [dict.fromkeys(["text", "a", "b"], "t")])
    for named, trained, found in (
        (None, (), "text"),
        ("b", ["text"], "b"),
        (None, ["a"], "a"),
        (None, ["c"], "text"),
    ):
        assert text_column(path, named, *trained) == found
    advice = "name one with --text-columns, or join the two texts into one, or train on pairs with train.py"
    assert refused(text_column, path, "a,b") == f"{path}: no column a,b; it has text, a, b; {advice}"


def test_labels_are_names_sorted_by_number_where_all_are_numbers(tmp_path):
    path = tmp_path / "a.jsonl"
    written = ("1", "1.0", '"1"', "2.0", "-0.5", "0", "-0.0", "-10", "false", '" x "', "null", '" "', "NaN")
    path.write_text("".join(f'{{"text": "t", "label": {label}}}\n' for label in written))
    names = read(path).names
    assert names == ["1", "1", "1", "2", "-0.5", "0", "0", "-10", "False", "x", None, None, None]
    assert read_texts(path, "text", group_column="label").groups == names  # as groups too
    assert classes_of(names) == ["-0.5", "-10", "0", "1", "2", "False", "x"]
    assert classes_of(["10", None, "2", "1e1", "0", "-0.5"]) == ["-0.5", "0", "2", "10", "1e1"]
    assert class_numbers(names, classes_of(names)).tolist() == [3, 3, 3, 4, 0, 2, 2, 1, 5, 6, -1, -1, -1]
    error = refused(class_numbers, names, ["x", "y"])
    assert error == "no row to learn from has the label '1' of a row; should be one of x, y"


def test_what_is_no_list_of_texts_is_refused():
    advice = "join the two texts into one, or train on pairs with train.py"
    message = f"texts: has 2 columns, should have one, such as df['text']; {advice}"
    assert refused(texts_of, np.array([["a", "x"], ["b", "y"]])) == message
    for wrong in ({"a": 1}, "a text", 1):
        assert refused(texts_of, wrong) == f"texts: {wrong!r}, should be a list, such as [text] for one text"
    for wrong in ("\ud800", 5, None, b"a"):  # half of an emoji is no text
        assert refused(texts_of, ["a", wrong]) == f"item 1: {wrong!r}, should be one text"
    assert texts_of(text for text in "ab").first == texts_of(np.array([["a"], ["b"]])).first == ["a", "b"]


def test_labels_are_text_numbers_or_bools_or_none():
    given = [" x ", "", np.int64(1), 2.5, True, None, float("nan")]
    assert labels_of(given, 7, "labels") == ["x", None, 1, 2.5, True, None, None]
    for wrong in (float("inf"), "\ud800"):  # which no file of a run can hold
        assert refused(labels_of, ["a", wrong], 2, "labels").startswith("item 1: ")
    assert [name_of(label) for label in ("1", 1, 1.0, True, 2.5)] == ["1", "1", "1", "True", "2.5"]


LATIN_1 = "line 2: byte 0xe9 is not UTF-8; save the file as UTF-8 (Latin-1 is not read)"
LONG = "3 cells, and the header has 2; a text that contains ',' must be in double quotes"
REFUSED = [
    ("a.csv", b"text,label\na,x\n\nb,y,z\n", f"line 4: not readable as cells ({LONG})"),
    ("a.csv", b"text,label\ncaf\xe9,x\n", LATIN_1),
    ("a.csv", b"text,label,text\na,x,b\n", "line 1: not readable as cells (two columns have the same name)"),
    ("a.jsonl", b'{"text": "a", "label": "x"}\n{"text": "b"\n', "line 2: not readable as a JSON object"),
    ("a.jsonl", b'{"text": "a", "label": "x"}\n{"text": 5, "label": "x"}\n', "line 2: 'text' is 5, should be text"),
    ("a.jsonl", b'{"text": "a\\ud83d", "label": "x"}\n', "line 1: not readable as a JSON object"),
    ("a.jsonl", b'{"text": "a", "label": [1]}\n', "line 1: 'label': [1] is not a label, should be text or a number"),
    ("a.jsonl", b'{"text": "a", "label": 1e999}\n', "line 1: 'label': inf is not a label, should be text or a number"),
    ("a.jsonl", b'[["text", "a"], ["label", "x"]]\n', "line 1: not readable as a JSON object"),
    ("a.jsonl", b'{"text": ' + b"[" * 10**5, "line 1: not readable as a JSON object"),
]


@pytest.mark.parametrize(("name", "content", "message"), REFUSED)
def test_what_cannot_be_read_is_refused_with_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    error = refused(read, tmp_path / name)
    assert error.startswith(str(tmp_path / name))
    assert message in error
