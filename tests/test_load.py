"""The user's own files: read, refused with file and line, split, found again; rows in and out."""

import csv
import gzip
import io
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisweet.base.commands import Parser
from minisweet.base.safe import InputError
from minisweet.data.load import (
    add_data_options,
    class_weights,
    data_name,
    digest,
    load_data,
    load_dev,
    stratified_split,
)
from minisweet.data.rows import TEXT_COLUMNS, Examples, RowWriter, examples_of, find_columns, read_rows
from minisweet.data.tasks import load_examples
from minisweet.data.text import load_tokenizer

TEXTS = ['He said "no",\nthen "yes"', "a\tb, c", "caf\u00e9 \u2028 \\", " "]  # the last is empty
LABELS = ["refund, please", "login", "login", "login"]
LINES = {".csv": [2, 4, 5], ".tsv": [2, 4, 5], ".jsonl": [1, 2, 3]}


def write(path: Path, rows: list[dict], start: bytes = b"") -> Path:
    """Write rows with the standard library alone."""
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if suffix == ".jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if suffix == ".tsv" else ",", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        text = file.getvalue()
    content = start + text.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def table(texts=TEXTS, labels=LABELS, **columns) -> list[dict]:
    return [{"id": "7", "text": text, "label": label} | columns for text, label in zip(texts, labels, strict=True)]


def arguments(*options):
    parser = Parser()
    add_data_options(parser)
    return parser.parse_args([str(option) for option in options])


def load(*options, **more):
    return load_data(arguments(*options), **more)


def read(path, text_columns=None, label_column="label", labels=None):
    """The examples of a file, and its classes."""
    columns = find_columns("--text-columns", path, text_columns, TEXT_COLUMNS)
    (column,) = find_columns("--label-column", path, [label_column], ())
    return examples_of(path, read_rows(path), columns, column, labels)


def outcome(call, *arguments):
    """What a call returns, or None where it refuses its input in one line of at most 400 characters."""
    message = ""
    try:
        return call(*arguments)
    except InputError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) <= 400
    return None


def refused(call, *arguments, **more) -> str:
    """The message of an InputError, which must be one line of at most 400 characters."""
    with pytest.raises(InputError) as error:
        call(*arguments, **more)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) <= 400
    return message


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["", "byte order mark"])
@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("suffix", LINES)
def test_reads_each_kind_of_file(tmp_path, suffix, packed, start):
    path = write(tmp_path / f"tickets.v2{suffix}{packed}", table(), start)
    assert read(path) == (Examples(TEXTS[:3], None, [1, 0, 0], None, LINES[suffix], 1), ["login", "refund, please"])
    assert data_name(arguments("--data", path)) == "tickets"


def test_windows_line_ends_and_empty_lines(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'text,label\r\n"a\r\nb",x\r\n\r\nc,y\r\n')
    assert read(tmp_path / "a.csv")[0] == Examples(["a\r\nb", "c"], None, [0, 1], None, [2, 5])


def test_columns_by_name_and_by_default(tmp_path):
    rows = [{"sentence2": "b", "sentence1": "a", "team": "x", "label": "1"}]
    path = write(tmp_path / "a.jsonl", rows)
    assert read(path)[0][:2] == (["a"], ["b"])
    examples, labels = read(path, ["sentence2", "sentence1"], "team")
    assert (examples[:2], labels) == ((["b"], ["a"]), ["x"])
    path = write(tmp_path / "b.csv", [{"sentence": "a", "label": "1"}])
    assert find_columns("--text-columns", path, None, TEXT_COLUMNS) == ["sentence"]


def test_labels_are_texts_sorted_or_in_a_given_order(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "t", "label": {label}}}\n' for label in ("10", "9", "1.5", "true", '" x "')))
    assert read(path)[1] == ["1.5", "10", "9", "true", "x"]
    given = ["x", "true", "no", "9", "10", "1.5"]
    assert read(path, labels=given)[1] == given
    assert read(path, labels=given)[0].labels == [4, 3, 5, 1, 0]
    assert refused(read, path, labels=["10", "1.5"]).endswith("a.jsonl, line 2: label '9', should be one of 10, 1.5")


def test_a_whole_number_is_one_label_however_json_lines_write_it(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(f'{{"text": "t", "label": {label}}}\n' for label in ("1", "1.0", '"1"', "2.0", "2", "-0.5"))
    )
    assert read(path) == (Examples(["t"] * 6, None, [1, 1, 1, 2, 2, 0], None, list(range(1, 7))), ["-0.5", "1", "2"])


REFUSED = [
    ("a.csv", b"text,label\na\n", "line 2: 1 cells, and the header has 2"),
    ("a.csv", b"text,label\na,x\n\nb,y,z\n", "line 4: 3 cells, and the header has 2"),
    ("a.csv", b'text,label\na,x\n"b,y\nc,y\n', "line 3: no row of cells (unexpected end of data)"),
    ("a.tsv", b'text\tlabel\n"a"b\tx\n', "line 2: no row of cells ("),
    ("a.csv", b"text,label\ncaf\xe9,x\n", "line 2: not readable as UTF-8 text"),
    ("a.csv", b"text,label\na,x\nb\0,y\n", "line 3: a NUL character"),
    ("a.csv", b"text,label\na,x\nb, \n", "line 3: 'label' is ' ', should be a label"),
    ("a.csv", b"text,text,label\na,b,x\n", "line 1: 2 columns are named 'text'"),
    (
        "a.csv",
        b"body,team\na,x\n",
        "line 1: no column text or sentence or sentence1, sentence2; it has body, team; name",
    ),
    ("a.csv", b"text,team\na,x\n", "line 1: no column label; it has text, team; name one with --label-column"),
    ("a.csv", b",".join(b"c%d" % i for i in range(99)) + b"\n" + b"," * 98, "it has c0, c1, c2, c3, c4 and 94 more"),
    ("a.csv", b"text,label\n", "no rows"),
    ("a.csv", b"", "no rows"),
    ("a.csv", b"text,label\n ,x\n", "no rows with text in text"),
    ("a.jsonl", b'{"text": "a", "label": "x"}\n{"text": "b"\n', "line 2: not readable as a JSON object"),
    ("a.jsonl", b"[1]\n", "line 1: not readable as a JSON object ('[1]' has no columns)"),
    ("a.jsonl", b"[" * 100_000 + b"\n", "line 1: not readable as a JSON object"),
    ("a.jsonl", b'{"text": "a", "label": "x"}\n{"text": 5, "label": "x"}\n', "line 2: 'text' is 5, should be text"),
    ("a.jsonl", b'{"text": "a", "label": "x"}\n{"label": "x"}\n', "line 2: 'text' is None, should be text"),
    ("a.jsonl", b'{"text": "a", "label": null}\n', "line 1: 'label' is None, should be a label"),
    ("a.jsonl", b'{"text": "a", "label": ["x"]}\n', "line 1: 'label' is ['x'], should be a label"),
    ("a.jsonl", b'{"text": "a\\ud800", "label": "x"}\n', "line 1: not readable as a JSON object"),
    ("a.jsonl", b'{"text": "a\\u0000", "label": "x"}\n', "line 1: 'text' is 'a\\x00', should be text"),
    ("a.jsonl", b'{"text": "a", "label": "x"}\n{}\n', "line 2: not readable as a JSON object"),
    ("a.jsonl", b'{"text": "a", "label": NaN}\n', "line 1: 'label' is nan, should be a label"),
    ("a.csv.gz", b"text,label\na,x\n", "cannot be read (Not a gzipped file"),
    ("a.csv.gz", gzip.compress(b"text,label\na,x\n")[:-9], "cannot be read ("),
    ("a.csv", "text,label\na,x\n".encode("utf-16"), "a.csv: UTF-16, should be text in UTF-8"),
    ("a.tsv", "\ufefftext\tlabel\n\u6f22\tx\n".encode("utf-16-be"), "a.tsv: UTF-16, should be text in UTF-8"),
    ("a.jsonl", '{"text": "a"}\n'.encode("utf-16-le"), "a.jsonl: UTF-16, should be text in UTF-8"),
    ("a.csv.gz", gzip.compress("text\na\n".encode("utf-16-be")), "a.csv.gz: UTF-16, should be text in UTF-8"),
    ("a.csv", b"PK\3\4\x14\0\6\0", "a.csv: a zip or an Excel file, should be text in UTF-8"),
    ("a.csv", gzip.compress(b"text\na\n"), "a.csv: packed by gzip without .gz in its name, should be text in UTF-8"),
    ("a.csv", b"text,label\ra,x\rb,y\r", "line 1: no row of cells (a carriage return alone, and lines should end in"),
    ("a.csv", b'"text","label"\r"a","x"', "line 1: no row of cells (a carriage return alone, and lines should end in"),
    ("a.tsv", b"text\tlabel\na\rb\tx\n", "line 2: no row of cells (a carriage return alone, and lines should end in"),
    (
        "a.jsonl",
        b'{"text": "a"}\r{"text": "b"}\r',
        "line 1: not readable as a JSON object (a carriage return alone, and",
    ),
    ("a.xlsx", b"", "should end in .csv, .tsv, .jsonl, or one of these and .gz"),
]


@pytest.mark.parametrize(("name", "content", "message"), REFUSED)
def test_what_cannot_be_read_is_refused_with_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert message in refused(read, tmp_path / name)
    assert refused(read, tmp_path / name).startswith(str(tmp_path / name))


def test_a_line_that_does_not_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("minisweet.data.rows.LONGEST_LINE", 50)
    (tmp_path / "a.csv").write_text("text,label\n" + "a" * 60)
    assert "line 2: longer than 50 bytes" in refused(read, tmp_path / "a.csv")


def test_a_missing_file_a_folder_and_too_many_columns(tmp_path):
    assert "a.csv: cannot be read ([Errno 2] No such file" in refused(read, tmp_path / "a.csv")
    (tmp_path / "b.csv").mkdir()
    assert "b.csv: cannot be read (" in refused(read, tmp_path / "b.csv")
    path = write(tmp_path / "c.csv", [{"a": "1", "b": "2", "c": "3", "label": "x"}])
    assert "one or two" in refused(read, path, ["a", "b", "c"])
    assert refused(read, path, ["a", "b", "c"]) == "--text-columns: a,b,c, should be one or two"
    assert "line 1: no column d; it has a, b, c, label; name one or two with --text-columns" in refused(
        read, path, ["a", "d"]
    )


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["x"] * 5, "line 2: label 'x' is the only one, should be two or more"),
        (["x", "y", "y"], "line 2: label 'x' has one row, should have two or more"),
        ([str(i / 8) for i in range(150)] * 2, "line 2: label '0.0' is one of 150 numbers; if they are classes, name"),
    ],
)
def test_labels_that_cannot_be_learned(tmp_path, labels, message):
    path = write(tmp_path / "a.csv", table([f"t{i}" for i in range(len(labels))], labels))
    assert message in refused(load, "--data", path)


def test_hundreds_of_numbers_may_be_classes_where_they_are_named(tmp_path):
    labels = [str(i) for i in range(150)]
    path = write(tmp_path / "a.csv", table([f"t{i}" for i in range(300)], labels * 2))
    assert load("--data", path, "--labels", ",".join(labels)).record["label_counts"] == [1] * 150


@given(st.lists(st.integers(0, 3), min_size=8, max_size=60), st.floats(0.01, 0.99), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_the_split_is_stratified(labels, dev_size, seed):
    labels = np.array(labels + [0, 1, 2, 3] * 2)
    rows = range(len(labels))
    train, dev = stratified_split(labels, dev_size, seed, rows)
    assert sorted([*train, *dev]) == list(range(len(labels)))
    assert (np.diff(train) > 0).all()
    assert (np.diff(dev) > 0).all()
    for label in range(4):
        count, chosen = (labels == label).sum(), (labels[dev] == label).sum()
        assert 1 <= chosen <= count - 1
        assert chosen in (1, count - 1) or abs(chosen - dev_size * count) <= 0.5
    assert stratified_split(labels, dev_size, seed, rows)[1] == dev


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 12)), min_size=1, max_size=60),
    st.floats(0.01, 0.99),
    st.integers(0, 9),
)
@settings(max_examples=200, deadline=None)
def test_equal_texts_are_on_one_side(rows, dev_size, seed):
    """Whatever their labels, and each class that has texts of its own is on both sides."""
    labels, texts = zip(*rows, strict=True)
    train, dev = stratified_split(labels, dev_size, seed, texts)
    assert sorted([*train, *dev]) == list(range(len(labels)))
    assert not {texts[row] for row in train} & {texts[row] for row in dev}
    for label in set(labels):
        own = {text for of, text in rows if of == label}
        others = {text for of, text in rows if of != label}
        if len(own - others) > 1:
            assert label in {labels[row] for row in train}
            assert label in {labels[row] for row in dev}
    assert stratified_split(labels, dev_size, seed, texts)[1] == dev


def test_the_share_of_dev_holds_with_duplicates():
    texts = [f"a{i // 3}" for i in range(300)] + [f"b{i}" for i in range(100)] + ["c"] * 30 + ["d"] * 9 + ["e"]
    labels = [0] * 300 + [1] * 100 + [2] * 30 + [3] * 10
    _, dev = stratified_split(labels, 0.2, 0, texts)
    assert np.bincount(np.array(labels)[dev]).tolist() == [60, 20, 0, 1]


def test_a_class_of_one_text_is_trained_on_and_named(tmp_path):
    texts = [f"t{i}" for i in range(20)] + ["same"] * 10
    path = write(tmp_path / "a.csv", table(texts, ["x", "y"] * 10 + ["z"] * 10))
    data = load("--data", path)
    assert (data.record["label_counts"], Counter(data.dev.labels)) == ([8, 8, 10], {0: 2, 1: 2})
    assert "validation: labels without a row: z" in data.notes
    assert not any("both" in note for note in data.notes)
    write(path, table(["same"] * 9, ["x", "y", "y"] * 3))
    assert "no row can be set aside: no label has two different texts; see --dev-data" in refused(load, "--data", path)


def test_labels_that_differ_by_case_or_unicode_form_are_named(tmp_path):
    labels = ["caf\u00e9", "cafe\u0301", "Login", "login", "x", "1", "1.0"]
    path = write(tmp_path / "a.csv", table([f"t{i}" for i in range(28)], labels * 4))
    (note,) = (note for note in load("--data", path).notes if "Unicode" in note)
    assert note.startswith(
        "labels that look alike, each a class of its own: 1, 1.0, Login, cafe\u0301, caf\u00e9 and 1"
    )
    dev = write(tmp_path / "dev.csv", table(["t"], ["X"]))
    assert "label 'X', should be one of" in refused(load, "--data", path, "--dev-data", dev)
    assert "differ by case, Unicode form" in refused(load, "--data", path, "--dev-data", dev)
    assert not any("Unicode" in note for note in load().notes)


def test_class_weights_are_balanced():
    assert class_weights([30, 10, 0]) == [40 / (2 * 30), 40 / (2 * 10), 0.0]
    counts = [7, 1, 92]
    assert sum(n * weight for n, weight in zip(counts, class_weights(counts), strict=True)) == pytest.approx(100)
    assert class_weights([5, 5]) == [1.0, 1.0]


def test_another_seed_sets_other_rows_aside():
    assert stratified_split([0] * 50, 0.2, 0, range(50)) != stratified_split([0] * 50, 0.2, 1, range(50))


@pytest.fixture
def tickets(tmp_path) -> Path:
    texts = [f"text {i}" for i in range(50)] + [" ", "text 3", "text 3"]
    return write(tmp_path / "tickets.csv", table(texts, ["login", "refund"] * 25 + ["login"] * 3))


def test_one_file_makes_train_and_dev_which_are_found_again(tickets, tmp_path):
    data = load("--data", tickets)
    assert (data.record["labels"], data.record["metric"]) == (["login", "refund"], "accuracy")
    assert len(data.train.first) == 42
    assert len(data.dev.first) == 10
    assert data.record["label_counts"] == [22, 20]
    assert data.notes[0] == "train: 42 rows: login 22, refund 20"
    assert "train: empty texts, skipped: 1" in data.notes
    assert "validation: 10 rows: login 5, refund 5" in data.notes
    counted = {what: int(count) for what, _, count in (note.rpartition(": ") for note in data.notes) if count.isdigit()}
    copies = sum(text == "text 3" for text in data.train.first)
    assert counted.get("train: duplicate texts", 0) == max(copies - 1, 0)
    assert copies in (0, 3)
    assert "texts that are in both train and validation" not in counted
    record = json.loads(json.dumps(data.record))
    assert record["task"] == "tickets"
    assert record["data"] == str(tickets)
    assert load_dev(record) == data.dev
    moved = tickets.rename(tmp_path / "moved.csv")
    assert "tickets.csv: no such file; if it moved, name it with --data" in refused(load_dev, record)
    assert load_dev(record, data=moved) == data.dev


def test_a_relative_path_is_found_from_elsewhere(tickets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = load("--data", tickets.name)
    monkeypatch.chdir("/")
    assert load_dev(data.record) == data.dev


@pytest.mark.parametrize("change", ["a text", "a label", "fewer rows"])
def test_changed_validation_rows_are_refused(tickets, change):
    data = load("--data", tickets)
    line = data.dev.lines[0]
    lines = tickets.read_text().splitlines(keepends=True)
    if change == "fewer rows":
        lines = lines[:30]
    elif change == "a text":
        lines[line - 1] = lines[line - 1].replace("text", "txt")
    else:
        lines[line - 1] = lines[line - 1].replace("login", "?").replace("refund", "login").replace("?", "refund")
    tickets.write_text("".join(lines))
    assert "changed since" in refused(load_dev, data.record)


def test_a_train_row_may_change(tickets):
    data = load("--data", tickets)
    lines = tickets.read_text().splitlines(keepends=True)
    lines[data.train.lines[0] - 1] = "7,other,login\n"
    tickets.write_text("".join(lines))
    assert load_dev(data.record) == data.dev
    rows = np.arange(3)
    assert digest(load("--data", tickets).train, rows) != digest(data.train, rows)
    assert digest(data.train, [1, 2]) == digest(data.train.take([1, 2]))


def test_a_second_file_to_validate_on(tickets, tmp_path):
    dev = write(tmp_path / "dev.jsonl", table(["text 3", "b", "", "b"], ["refund"] * 4))
    data = load("--data", tickets, "--dev-data", dev)
    assert len(data.train.first) == 52
    assert data.dev.labels == [1, 1, 1]
    assert {
        "train: duplicate texts: 2",
        "validation: empty texts, skipped: 1",
        "validation: duplicate texts: 1",
        "texts that are in both train and validation: 1",
    } <= set(data.notes)
    assert load_dev(data.record) == data.dev
    moved = dev.rename(tmp_path / "moved.jsonl")
    assert load_dev(data.record, data=moved) == data.dev
    write(moved, table(["a"], ["other"]))
    assert refused(load, "--data", tickets, "--dev-data", moved).endswith(
        "moved.jsonl, line 1: label 'other', should be one of login, refund"
    )


def test_data_without_labels(tmp_path):
    path = write(tmp_path / "a.csv", [{"text": f"t{i}"} for i in range(20)])
    said = refused(load, "--data", path)
    assert "no column label" in said
    assert said.endswith("or learn from a --trunk with --targets trunk")
    for label in ("", "z"):  # a column of this name that holds no label, or another's
        other = write(tmp_path / "b.csv", [{"text": f"t{i}", "label": label} for i in range(20)])
        data = load("--data", other, labels=["x", "y"], need_labels=False)
        assert (data.train.labels, data.record["label_column"], data.record["metric"]) == (None, None, "agreement")
        assert "label" in refused(
            load, "--data", other, "--label-column", "label", labels=["x", "y"], need_labels=False
        )
    data = load("--data", path, labels=["x", "y"], need_labels=False)
    assert (data.record["labels"], data.record["metric"], data.record["label_counts"]) == (
        ["x", "y"],
        "agreement",
        None,
    )
    assert data.train.labels is data.dev.labels is None
    assert (len(data.train.first), len(data.dev.first)) == (16, 4)
    assert data.notes[0] == "train: 16 rows without labels"
    assert load_dev(data.record) == data.dev
    # A label column that is added later changes nothing; one that was asked for must be there.
    write(path, [{"text": f"t{i}", "label": "x"} for i in range(20)])
    assert load_dev(data.record) == data.dev
    assert load("--data", path, labels=["x", "y"], need_labels=False).record["metric"] == "accuracy"
    assert "no column team" in refused(
        load, "--data", path, "--label-column", "team", labels=["x", "y"], need_labels=False
    )
    write(path, [{"text": "a"}])
    assert "no row can be set aside" in refused(load, "--data", path, labels=["x", "y"], need_labels=False)


def test_the_classes_of_a_trunk(tickets):
    trunk = ["refund", "other", "login"]
    data = load("--data", tickets, labels=trunk)
    assert (data.record["labels"], data.record["label_counts"]) == (trunk, [20, 0, 22])
    assert load_dev(data.record) == data.dev
    assert "label 'login', should be one of refund, b" in refused(load, "--data", tickets, labels=["refund", "b"])
    assert "--labels: not given, should name the trunk's 2" in refused(
        load, "--data", tickets, labels=["LABEL_0", "LABEL_1"]
    )
    named = load("--data", tickets, "--labels", "refund,login", labels=["LABEL_0", "LABEL_1"])
    assert named.record["labels"] == ["refund", "login"]
    assert "--labels: a, and the trunk's are refund, other, login" in refused(
        load, "--data", tickets, "--labels", "a", labels=trunk
    )
    toy = load(labels=["POSITIVE", "NEGATIVE"])
    assert toy.record["labels"] == ["positive", "negative"]
    assert [1 - label for label in toy.train.labels] == load().train.labels
    assert load_dev(toy.record) == toy.dev
    assert load(labels=["LABEL_0", "LABEL_1"]).record["labels"] == ["negative", "positive"]
    assert "trunk's 3 classes" in refused(load, labels=["LABEL_0", "LABEL_1", "LABEL_2"])


def test_a_task_goes_through_the_same_door(tmp_path):
    data = load()
    assert data.dev == load_examples("toy", "dev", tmp_path)
    assert data.notes == ["train: 4,000 rows: negative 2,000, positive 2,000"] + [
        "validation: 1,000 rows: negative 500, positive 500"
    ]
    assert load_dev(data.record) == data.dev
    assert load_dev(data.record | {"data": None}) == data.dev  # as a run's arguments have it
    unlabelled = load("--task", "toy", need_labels=False)
    assert unlabelled.train.labels is None
    assert unlabelled.dev == data.dev
    (tmp_path / "CoLA").mkdir()
    for split in ("train", "dev"):
        (tmp_path / "CoLA" / f"{split}.tsv").write_text("x\t1\t\tgood\nx\t0\t*\tbad\n")
    cola = load("--task", "cola", "--data-dir", tmp_path)
    assert cola.record["metric"] == "matthews"
    assert load_dev(cola.record, data_dir=tmp_path) == cola.dev
    (tmp_path / "CoLA" / "dev.tsv").write_text("x\t1\t\tgood\nx\t1\t*\tbad\n")
    assert "changed since" in refused(load_dev, cola.record)
    assert "--data: x.csv, but the run's data is the task cola" in refused(load_dev, cola.record, data=Path("x.csv"))


@pytest.mark.parametrize(
    ("key", "value"), [("data", 5), ("dev_rows", "all"), ("dev_rows", []), ("text_columns", 3), ("dev_data", 5)]
)
def test_a_record_that_is_nothing_of_ours(tickets, key, value):
    record = load("--data", tickets).record
    assert ("changed since" if value == [] else "run.json") in refused(load_dev, record | {key: value})
    record.pop(key)
    assert refused(load_dev, record)


def test_own_data_or_a_task():
    with pytest.raises(SystemExit):
        arguments("--task", "toy", "--data", "a.csv")


def write_all(path: Path, rows: list[dict]) -> None:
    with RowWriter(path) as writer:
        for row in rows:
            writer.write(row)


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("suffix", LINES)
def test_rows_are_written_as_they_were_read(tmp_path, suffix, packed):
    rows = table([*TEXTS, "a\rb", ""], [*LABELS, "x", "y"])
    path = tmp_path / f"out{suffix}{packed}"
    write_all(path, rows)
    assert [row for _, row in read_rows(path)] == rows
    assert (b"\r\n" in path.read_bytes()) is False


def test_json_values_in_cells_and_rows_that_differ(tmp_path):
    path = tmp_path / "out.csv"
    with RowWriter(path) as writer:
        writer.write({"text": "a", "n": 1.5, "tags": ["x"], "none": None})
        writer.write({"text": "b"})
    assert path.read_text() == 'text,n,tags,none\na,1.5,"[""x""]",null\nb,,,\n'
    with pytest.raises(ValueError, match="'other'"):  # predict refuses such rows before
        write_all(path, [{"text": "a"}, {"text": "b", "other": "c"}])
    assert path.read_text().startswith("text,n,tags"), "what was there should stay"
    assert [file.name for file in tmp_path.iterdir()] == ["out.csv"]
    assert ".csv" in refused(RowWriter, tmp_path / "out.xlsx")


def test_standard_output_is_csv_as_it_comes(monkeypatch):
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="utf-8", newline=""))
    with RowWriter(Path("-")) as writer:
        writer.write({"text": "a, b", "label": "x"})
        assert output.getvalue() == b'text,label\n"a, b",x\n'
    assert not sys.stdout.closed


def test_rows_are_streamed(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "a,x\n" * 50_000 + "broken\n")
    rows = read_rows(path)
    assert next(rows) == (2, {"text": "a", "label": "x"})
    assert "line 50002: 1 cells" in refused(list, rows)


GOOD = {
    ".csv": b'text,label\n"a ""b"",\nc",x\nd,y\n"e f",x\n',
    ".tsv": b'text\tlabel\n"a ""b"",\nc"\tx\nd\ty\n"e f"\tx\n',
    ".jsonl": b'{"text": "a \\"b\\",\\nc", "label": "x"}\n{"text": "d", "label": "y"}\n{"text": "e f", "label": "x"}\n',
}


@given(st.sampled_from(list(GOOD)), st.data())
@settings(max_examples=60, deadline=None)
def test_a_changed_byte_is_refused_in_one_line_or_read_as_what_it_is(tmp_path_factory, suffix, draw):
    path = tmp_path_factory.mktemp("mutated") / f"a{suffix}"
    position = draw.draw(st.integers(0, len(GOOD[suffix]) - 1))
    byte = draw.draw(st.sampled_from(b'\0\n\r\t",\\{}[]x\xff\xe9 1'))
    content = bytearray(GOOD[suffix])
    content[position] = byte
    path.write_bytes(content)
    found = outcome(read, path)
    if found is None:
        return
    # What was read must stand in the file as a plain reader of the format finds it.
    text = content.decode()
    if suffix == ".jsonl":
        expected = [json.loads(line) for line in text.split("\n") if line.strip()]
    else:
        expected = list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if suffix == ".tsv" else ","))
    expected = [row for row in expected if row["text"].strip()]
    examples, labels = found
    assert [row["text"] for row in expected] == examples.first
    assert [row["label"].strip() for row in expected] == [labels[label] for label in examples.labels]


TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": {"type": "Lowercase"},
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {
        "type": "WordLevel",
        "vocab": {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "test": 5},
        "unk_token": "[UNK]",
    },
}


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_changed_value_of_a_tokenizer_is_refused_in_one_line_or_tokenises(tmp_path_factory, draw):
    content = json.loads(json.dumps(TOKENIZER))
    part = draw.draw(st.sampled_from([content, content["model"], content["model"]["vocab"], content["normalizer"]]))
    key = draw.draw(st.sampled_from(sorted(part)))
    part[key] = draw.draw(st.sampled_from([None, -1, 0, 2, 2**64, "", "Precompiled", [], {}, "[UNK]", 1.5, True]))
    folder = tmp_path_factory.mktemp("mutated")
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = outcome(load_tokenizer, folder, 6, 8)
    if tokenizer is None:
        return
    ids = tokenizer.encode("a test of \u6f22").ids
    assert len(ids) <= 8
    assert set(ids) <= set(range(6))


def test_the_default_folder_of_tasks_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MINISWEET_HOME", str(tmp_path))
    assert arguments().data_dir == tmp_path / "data"
    monkeypatch.setenv("MINISWEET_HOME", str(tmp_path / "other"))
    assert arguments().data_dir == tmp_path / "other" / "data"


def test_a_key_twice_and_a_label_column_without_a_name(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"text": "a", "text": "b", "label": "x"}\n')
    with pytest.raises(InputError, match="own.jsonl, line 1: .*a key stands there twice"):
        list(read_rows(path))
