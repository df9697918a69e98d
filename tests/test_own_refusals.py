"""Bad input to the commands of own text: see test_refusals.py."""

import os
import shutil
from pathlib import Path

import pytest

from tests.conftest import opinions, write_model, write_rows
from tests.test_refusals import check_refusal, ids

FIT = "--model tiny --out new --epochs 1 --max-length 32"  # and then the bad words

REFUSALS = [
    ("fit", FIT, "FILE: is missing; it may be left out with --trunk FOLDER --unlabelled FILE"),
    ("fit", f"empty.csv {FIT}", "empty.csv: it has no rows"),
    ("fit", f"pipe.csv {FIT}", "pipe.csv: cannot be read (not a file)"),
    ("fit", f"one.csv {FIT}", "one: all rows have the label 'x', needs two or more"),
    ("fit", f"one.csv {FIT} --dev-data one.csv", "one: all rows have the label 'x', needs two or more"),
    ("fit", f"none.csv {FIT}", "none: no row has a text and a label"),
    ("fit", "none.csv --trunk bag --dev-data none.csv --out new", "none: no text is left to learn from: all of"),
    ("fit", f"own.csv {FIT} --group-column=", "own.csv: no column ; it has text, label; name one with --group-column"),
    ("fit", f"own.csv {FIT} --max-lost 200", "argument --max-lost: '200', should be a number from 0.01 to 99.99"),
    (
        "fit",
        f"latin.csv {FIT}",
        "latin.csv, line 2: byte 0xe9 is not UTF-8; save the file as UTF-8 (Latin-1 is not read)",
    ),
    ("fit", f"cells.csv {FIT}", "cells.csv, line 2: not readable as cells (3 cells, and the header has 2; a text that"),
    ("fit", "own.csv --trunk bag --out new --epochs 1", "--epochs: cannot stand beside a trunk: nothing but the bag"),
    ("fit", f"two.csv {FIT} --text-columns sentence1 --dev-size 0.1", "two: too few rows: no text can be set aside"),
    ("fit", f"own.csv {FIT} --dev-data own.csv --dev-size 0.3", "--dev-size: needs a split of FILE, not --dev-data"),
    ("fit", "--trunk bag --unlabelled own.csv --out new --dev-size 0.3", "--dev-size: needs a split of FILE, not -"),
    ("fit", f"own.csv {FIT} --text-columns label", "--text-columns: label, should not be the label column"),
    ("fit", f"own.csv {FIT} --unlabelled own.csv", "--unlabelled: no text is left: all of them are also labelled, or"),
    ("fit", f"own.csv {FIT} --unlabelled two.csv", "two.csv: no column text or sentence; it has sentence1,"),
    ("fit", "own.csv --trunk ee --out new", "or a run of train.py, which is evaluated by: python evaluate.py ee"),
    ("fit", "own.csv --trunk own.csv --out new", "--trunk: own.csv is not a folder; should be a run, or a classif"),
    ("fit", "own.csv --trunk bag --out new --max-length 30", "--max-length: 30, should be 32, as of the trunk bag"),
    ("predict", "ee own.csv", "or a run of train.py, which is evaluated by: python evaluate.py ee"),
    ("predict", "no-point own.csv", "no-point/operating.json: not readable as JSON"),
    ("test", "bag own.csv", "own.csv: no row is left to test on: 32 with a label that the model does not know (a, b)"),
    ("test", "bag bag/validation.jsonl", "bag/validation.jsonl: no row is left to test on: "),
    ("predict", "bag own.csv --out own.csv", "--out: own.csv is the input"),
    ("predict", "bag own.csv --out two", "--out: two is a folder"),
    ("predict", "bag bad.jsonl --out new.csv", "bad.jsonl, line 2: 'text' is 5, should be text"),
    ("predict", "bag own.csv --out new.txt", "new.txt: should end in .csv, .tsv, .jsonl"),
    ("explain", "bag", "TEXT: should be a text; or --html FILE and no text"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory, run_of) -> Path:
    """A folder with what a command line may name: a model, runs, and files of rows."""
    folder = tmp_path_factory.mktemp("place")
    write_model(folder / "tiny", "bert")
    (folder / "two").mkdir()
    (folder / "two.csv").write_text("sentence1,sentence2,label\n" + "a,it,x\na,to,y\na,of,x\na,in,y\n")
    (folder / "one.csv").write_text("text,label\n" + "a,x\nb,x\n" * 3)
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"text": 5}\n')
    (folder / "none.csv").write_text("text,label\nthe film,\nis it,\n")
    (folder / "empty.csv").write_text("")
    (folder / "latin.csv").write_bytes(b"text,label\ncaf\xe9,x\n")
    (folder / "cells.csv").write_text("text,label\na,b,x\n")
    os.mkfifo(folder / "pipe.csv")
    for name in ("bag", "ee"):
        shutil.copytree(run_of(name), folder / name)
    shutil.copytree(run_of("bag"), folder / "no-point", ignore=shutil.ignore_patterns("operating.json"))
    write_rows(folder / "own.csv", [(text, "ab"[label == "up"]) for text, label in opinions(32)], "text", "label")
    return folder


@pytest.mark.parametrize("row", REFUSALS, ids=ids(REFUSALS))
def test_bad_input_is_one_line_and_status_2(place, capsys, row):
    check_refusal(place, capsys, *row)
