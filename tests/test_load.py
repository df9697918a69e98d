"""The user's own files: read, refused with file and line, split; rows in and out."""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisweet.base.commands import Parser
from minisweet.base.files import InputError
from minisweet.data.rows import (
    DELIMITERS,
    Examples,
    examples_of,
    find_columns,
    read_examples,
    read_rows,
    row_writer,
    text_columns,
    write_examples,
)
from minisweet.data.tasks import add_data_options, digest, load_data, load_examples, stratified_split, text_digest

TEXTS = ['He said "no",\nthen "yes"', "a\tb, c", "caf\u00e9 \u2028 \\", " "]  # the last is empty
LABELS = ["refund, please", "login", "login", "login"]
LINES = {".csv": [3, 4, 5], ".tsv": [3, 4, 5], ".jsonl": [1, 2, 3]}


def write(path: Path, rows: list[dict], encoding: str = "utf-8") -> Path:
    """Write rows with the standard library alone."""
    with path.open("w", encoding=encoding, newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=DELIMITERS[path.suffix], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return path


def table(texts=TEXTS, labels=LABELS) -> list[dict]:
    return [{"id": "7", "text": text, "label": label} for text, label in zip(texts, labels, strict=True)]


def load(*options, **more):
    parser = Parser()
    add_data_options(parser)
    args = parser.parse_args([str(option) for option in options])
    args.task = args.task or ("tickets" if args.data else "toy")
    return load_data(args, **more)


def read(path, labels=None):
    """The examples of a file, and its classes."""
    columns = text_columns(path, None)
    (column,) = find_columns("--label-column", path, ["label"])
    return examples_of(path, read_rows(path), columns, column, labels)


def refused(call, *arguments, **more) -> str:
    """The message of an InputError."""
    with pytest.raises(InputError) as error:
        call(*arguments, **more)
    return str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("suffix", LINES)
def test_reads_each_kind_of_file(tmp_path, suffix, encoding):
    path = write(tmp_path / f"tickets{suffix}", table(), encoding)
    assert read(path) == (Examples(TEXTS[:3], None, [1, 0, 0], empty=1), ["login", "refund, please"])
    assert [line for line, _ in read_rows(path)][:3] == LINES[suffix]


def test_windows_line_ends_empty_lines_and_unnamed_columns(tmp_path):
    (tmp_path / "a.csv").write_bytes(b',text,label\r\n0,"a\r\nb",x\r\n\r\n1,c,y\r\n')
    assert read(tmp_path / "a.csv")[0] == Examples(["a\r\nb", "c"], None, [0, 1])


@pytest.mark.parametrize(
    ("named", "trained", "found"),
    [
        (None, None, ["text"]),
        (["a", "b"], None, ["a", "b"]),
        (None, [], ["text"]),  # of the toy task
        (None, ["b"], ["b"]),
        (["b"], ["text"], ["b"]),
        (None, ["a", "b"], ["a", "b"]),
        (None, ["left", "right"], ["sentence1", "sentence2"]),
        (["text"], ["left", "right"], "--text-columns: text, should be 2, as in training"),
        (["text", "a", "b"], None, "--text-columns: text,a,b, should be one or two"),
        (["c"], None, "no column c; it has text, sentence1, sentence2, a, b; name it with --text-columns"),
    ],
)
def test_columns_as_in_training_or_as_many(tmp_path, named, trained, found):
    path = write(tmp_path / "a.csv", [dict.fromkeys(["text", "sentence1", "sentence2", "a", "b"], "t")])
    if isinstance(found, str):
        assert found in refused(text_columns, path, named, trained)
    else:
        assert text_columns(path, named, trained) == found


def test_labels_are_texts_sorted_or_in_a_given_order(tmp_path):
    path = tmp_path / "a.jsonl"
    written = ("1", "1.0", '"1"', "2.0", "-0.5", "0", "-0.0", "0.0", "-10", "10", "false", '" x "')
    path.write_text("".join(f'{{"text": "t", "label": {label}}}\n' for label in written))
    examples, labels = read(path)
    assert labels == ["-0.5", "-10", "0", "1", "10", "2", "false", "x"]
    assert examples.labels == [3, 3, 3, 5, 0, 2, 2, 2, 1, 4, 6, 7]
    again = read(path, labels[::-1])
    assert (again[0].labels, again[1]) == ([7 - label for label in examples.labels], labels[::-1])
    assert refused(read, path, labels=["2", "1"]).endswith("a.jsonl, line 5: label '-0.5', should be one of 2, 1")


REFUSED = [
    ("a.csv", b"text,label\na\n", "line 2: 'label' is None, should be a label"),
    ("a.csv", b"text,label\na,x\n\nb,y,z\n", "line 4: not readable as cells (it has more cells than the header)"),
    ("a.csv", b"text,label\ncaf\xe9,x\n", "line 2: not readable as cells ('utf-8' codec can't decode byte 0xe9"),
    ("a.csv", b"text;label\na;x\n", "line 1: not readable as cells (its cells are separated by ';', should be by ',')"),
    ("a.csv", b"text,label,text\na,x,b\n", "line 1: not readable as cells (two columns have the same name)"),
    ("a.csv", b"body,team\na,x\n", "a.csv: no column text or sentence or sentence1,sentence2; it has body, team;"),
    ("a.csv", b"text,team\na,x\n", "a.csv: no column label; it has text, team; name it with --label-column"),
    ("a.csv", b"", "no rows"),
    ("a.csv", b"text,label\n ,x\n", "no rows with text in text"),
    ("a.jsonl", b'{"text": "a", "label": "x"}\n{"text": "b"\n', "line 2: not readable as a JSON object"),
    ("a.jsonl", b'{"text": "a", "label": "x"}\n{"text": 5, "label": "x"}\n', "line 2: 'text' is 5, should be text"),
    ("a.jsonl", b'{"text": "a", "label": null}\n', "line 1: 'label' is None, should be a label"),
    ("a.jsonl", b'{"text": "a", "label": NaN}\n', "line 1: 'label' is nan, should be a label"),
    ("a.jsonl", b'{"text": "a\\ud83d", "label": "x"}\n', "line 1: not readable as a JSON object"),
    ("a.xlsx", b"", "should end in .csv, .tsv, .jsonl"),
]


@pytest.mark.parametrize(("name", "content", "message"), REFUSED)
def test_what_cannot_be_read_is_refused_with_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    error = refused(read, tmp_path / name)
    assert error.startswith(str(tmp_path / name))
    assert message in error


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


def test_the_share_of_dev_holds_with_duplicates_and_the_seed_draws_it():
    texts = [f"a{i // 3}" for i in range(300)] + [f"b{i}" for i in range(100)] + ["c"] * 30 + ["d"] * 9 + ["e"]
    labels = [0] * 300 + [1] * 100 + [2] * 30 + [3] * 10
    _, dev = stratified_split(labels, 0.2, 0, texts)
    assert np.bincount(np.array(labels)[dev]).tolist() == [60, 20, 0, 1]
    assert stratified_split(labels, 0.2, 1, texts)[1] != dev


def test_a_class_of_one_text_is_trained_on_and_one_class_is_too_few(tmp_path):
    texts = [f"t{i}" for i in range(20)] + ["same"] * 10
    path = write(tmp_path / "a.csv", table(texts, ["x", "y"] * 10 + ["z"] * 10))
    data = load("--data", path)
    assert (Counter(data.train.labels), Counter(data.dev.labels)) == ({0: 8, 1: 8, 2: 10}, {0: 2, 1: 2})
    write(path, table(["same"] * 9, ["x", "y", "y"] * 3))
    assert "no row can be set aside: no label has two different texts; see --dev-data" in refused(load, "--data", path)
    write(path, table(texts, ["x"] * 30))
    assert "all rows have the label 'x', needs two or more" in refused(load, "--data", path)


def test_digests_tell_rows_and_texts_apart():
    examples = Examples(["a", "a", "b"], ["x", "y", "x"], [0, 1, 0])
    others = [examples.take([1, 0, 2]), examples._replace(labels=None), examples._replace(second=["x", "y", "z"])]
    assert len({digest(rows) for rows in (examples, *others)}) == 4
    digests = {text_digest(text) for text in examples.texts() * 2}
    assert [len(bytes.fromhex(one)) for one in digests] == [8, 8, 8]


@pytest.fixture
def tickets(tmp_path) -> Path:
    texts = [f"text {i}" for i in range(50)] + [" ", "text 3", "text 3"]
    return write(tmp_path / "tickets.csv", table(texts, ["login", "refund"] * 25 + ["login"] * 3))


def test_one_file_makes_train_and_dev(tickets):
    data = load("--data", tickets)
    record = json.loads(json.dumps(data.record))
    assert (record["task"], record["labels"], record["metric"]) == ("tickets", ["login", "refund"], "accuracy")
    assert (record["text_columns"], record["label_column"]) == (["text"], "label")
    assert record["dev_digest"] == digest(data.dev)
    assert (len(data.train.first), len(data.dev.first)) == (42, 10)
    assert (Counter(data.train.labels), Counter(data.dev.labels)) == ({0: 22, 1: 20}, {0: 5, 1: 5})
    assert (data.train.empty, data.dev.empty) == (1, 0)
    assert data.train.first.count("text 3") in (0, 3)
    assert load("--data", tickets, "--dev-seed", 1).dev != data.dev == load("--data", tickets).dev


def test_a_second_file_to_validate_on(tickets, tmp_path):
    dev = write(tmp_path / "dev.jsonl", table(["text 3", "b", "", "b"], ["refund"] * 4))
    data = load("--data", tickets, "--dev-data", dev)
    assert len(data.train.first) == 52
    assert (data.dev.labels, data.dev.empty) == ([1, 1, 1], 1)
    write(dev, table(["a"], ["other"]))
    message = refused(load, "--data", tickets, "--dev-data", dev)
    assert message.endswith("dev.jsonl, line 1: label 'other', should be one of login, refund")


def test_data_without_labels(tmp_path):
    path = write(tmp_path / "a.csv", [{"text": f"t{i}"} for i in range(20)])
    assert "no column label" in refused(load, "--data", path)
    data = load("--data", path, labels=["x", "y"], need_labels=False)
    assert [data.record[key] for key in ("labels", "metric")] == [["x", "y"], "agreement"]
    assert data.train.labels is data.dev.labels is data.record["label_column"] is None
    assert (len(data.train.first), len(data.dev.first)) == (16, 4)
    lacking = refused(load, "--data", path, "--label-column", "team", labels=["x", "y"], need_labels=False)
    assert "no column team" in lacking
    dev = write(tmp_path / "dev.csv", table(["a", "b"], ["y", "x"]))
    data = load("--data", path, "--dev-data", dev, labels=["x", "y"], need_labels=False)
    assert (data.train.labels, data.dev.labels, data.record["metric"]) == (None, [1, 0], "accuracy")
    write(path, [{"text": "a"}])
    assert "no row can be set aside" in refused(load, "--data", path, labels=["x", "y"], need_labels=False)


def test_the_classes_of_a_trunk(tickets):
    trunk, unnamed = ["refund", "other", "login"], ["LABEL_0", "LABEL_1"]
    data = load("--data", tickets, labels=trunk)
    assert (data.record["labels"], Counter(data.train.labels)) == (trunk, {0: 20, 2: 22})
    assert "label 'login', should be one of refund, b" in refused(load, "--data", tickets, labels=["refund", "b"])
    assert "label 'login', should be one of LABEL_0" in refused(load, "--data", tickets, labels=unnamed)
    assert load("--data", tickets, "--labels", "refund,login", labels=unnamed).record["labels"] == ["refund", "login"]
    toy = load(labels=["POSITIVE", "NEGATIVE"])
    assert toy.record["labels"] == ["positive", "negative"]
    assert [1 - label for label in toy.train.labels] == load().train.labels
    assert load(labels=unnamed).record["labels"] == ["negative", "positive"]
    assert "task toy: its labels are negative, positive, which" in refused(load, labels=[*unnamed, "LABEL_2"])


def test_a_task_goes_through_the_same_door(tmp_path):
    data = load()
    assert data.dev == load_examples("toy", "dev", tmp_path)
    unlabelled = load("--task", "toy", need_labels=False)
    assert unlabelled.train.labels is None
    assert unlabelled.dev == data.dev
    (tmp_path / "CoLA").mkdir()
    for split in ("train", "dev"):
        (tmp_path / "CoLA" / f"{split}.tsv").write_text("x\t1\t\tgood\nx\t0\t*\tbad\n")
    assert load("--task", "cola", "--data-dir", tmp_path).record["metric"] == "matthews"


@pytest.mark.parametrize("suffix", LINES)
def test_rows_are_written_as_they_were_read(tmp_path, suffix):
    rows, path = table([*TEXTS, ""], [*LABELS, "x"]), tmp_path / f"out{suffix}"
    with row_writer(path) as write_row:
        for row in rows:
            write_row(row)
    assert [row for _, row in read_rows(path)] == rows
    assert b"\r" not in path.read_bytes()


def test_rows_that_differ_and_a_block_that_fails(tmp_path):
    path = tmp_path / "out.csv"
    with row_writer(path) as write_row:
        write_row({"text": "a", "n": 1.5, "none": None})
        write_row({"text": "b"})
    assert path.read_text() == "text,n,none\na,1.5,\nb,,\n"
    with pytest.raises(ValueError, match="'other'"), row_writer(path) as write_row:  # noqa: PT012 (the block fails)
        write_row({"text": "a"})
        write_row({"other": "c"})
    assert path.read_text().startswith("text,n"), "what was there should stay"
    assert [file.name for file in tmp_path.iterdir()] == ["out.csv"]


def test_rows_are_streamed(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "a,x\n" * 50_000 + "broken, row, here\n")
    rows = read_rows(path)
    assert next(rows) == (2, {"text": "a", "label": "x"})
    assert "line 50002: not readable as cells (it has more" in refused(list, rows)


@pytest.mark.parametrize(
    "examples",
    [
        Examples(TEXTS[:3], None, [1, 0, 1], ["one", "two", "one"]),
        Examples(TEXTS[:3], ["", "b", "c"], [1, 0, 1]),
        Examples(TEXTS[:3], None, None),
    ],
    ids=["toy", "pairs", "no labels"],
)
def test_validation_rows_are_read_back(tmp_path, examples):
    path = tmp_path / "validation.jsonl"
    write_examples(path, examples, LABELS[:2])
    assert read_examples(path, LABELS[:2]) == examples
    first = json.loads(path.read_text().split("\n")[0])
    assert first.get("label") == (LABELS[1] if examples.labels else None)
