"""Bad input: one line on standard error that names the option or the file, status 2, and nothing is written.

Each row is a command, its words, and what its line says. `place` makes the files that the words name.
"""

import os
import shlex
import shutil
from pathlib import Path

import pytest

from minisweet.__main__ import COMMANDS
from minisweet.base.files import read_json, write_json
from tests.conftest import command_of, in_folder, opinions, run, write_model, write_rows

MODULES = COMMANDS | {"train": "train", "evaluate": "evaluate"}
TRAIN = "--model tiny --out new --train-size 48 --epochs 1 --max-length 32"  # and then the bad words
FIT = "--model tiny --out new --epochs 1 --max-length 32"

REFUSALS = [
    # base: what argparse and the types of options refuse
    ("train", f"{TRAIN} --lr inf", "argument --lr: 'inf', should be a positive number"),
    # the paper's half: hub, options, tasks, run
    ("train", "--model no-such --out new", "model 'no-such': neither a folder, nor owner/name on the hub, nor one of"),
    ("train", "--model two --out new", "two/config.json: not readable as JSON (No such file or directory)"),
    ("train", "--model bag --out new", "model 'bag': a run, should be public weights"),
    ("train", f"{TRAIN} --max-length 41", "--max-length: 41, should be at most 40, the positions of tiny"),
    ("train", f"{TRAIN} --out tiny --overwrite", "--out: tiny exists and is not a run; name another folder"),
    ("train", f"{TRAIN} --out {'x' * 250}", "x cannot be written (File name too long)"),
    ("train", f"{TRAIN} --exit-layers 2,1", "--exit-layers: 2,1, should increase and end at one of the layers 1 to 4"),
    ("train", f"{TRAIN} --task two --data-dir . --model one-type", "one-type: its type_vocab_size is 1, and pairs"),
    ("evaluate", "bag", "bag: a run of minisweet fit (see minisweet test --help) or of an earlier version"),
    ("evaluate", "run other --plot new.png", "other: it was evaluated on other rows, or by another metric"),
    ("evaluate", "bare --plot new.png", "bare: has no evaluation.json; first: python evaluate.py bare"),
    ("evaluate", "run --plot a.png --thresholds 5", "--plot and --predict use an evaluation as it is"),
    ("evaluate", "bare run", "run: a second run, and only --plot takes several"),
    ("evaluate", "ee --predict own.csv", "--predict FILE.tsv and --threshold go together"),
    ("evaluate", "ee --predict own.csv --threshold 1.5", "--threshold: '1.5', should be a number from 0 to 1"),
    ("evaluate", "ee --threshold 0", "--predict FILE.tsv and --threshold go together"),
    ("evaluate", "ee --predict own.csv --threshold 1 --thresholds 3", "--plot and --predict use an evaluation"),
    ("evaluate", "ee --predict own.csv --threshold 1", "own.csv: no column sentence; its header names text,label"),
    ("evaluate", "ee --predict tiny --threshold 1", "tiny: cannot be read ("),
    ("evaluate", "ee --criterion lte", "--criterion: lte needs a run of train.py --exit-strategy lte"),
    # paper
    ("reproduce", "--model tiny --max-length 32 --lrs 1e-3 --exit-layers 1,9", "--exit-layers: 1,9, should increase"),
    ("reproduce", "--model tiny --max-length 32 --device gpu", "--device: 'gpu' is not available; should be auto, cpu"),
    ("gradients", "run", "run: a run of sweet on toy, exits after layers 1,2,4; should be of ee, with two"),
    # own text
    ("fit", FIT, "FILE: is missing; it may be left out with --trunk FOLDER --unlabelled FILE"),
    ("fit", f"empty.csv {FIT}", "empty.csv: it has no rows"),
    ("fit", f"pipe.csv {FIT}", "pipe.csv: cannot be read (not a file)"),
    ("fit", f"one.csv {FIT}", "one: all rows have the label 'x', needs two or more"),
    ("fit", f"one.csv {FIT} --dev-data one.csv", "one: all rows have the label 'x', needs two or more"),
    ("fit", f"none.csv {FIT}", "none: no row has a label"),
    ("fit", "none.csv --trunk bag --dev-data none.csv --out new", "none: no text is left to learn from: all of"),
    ("fit", f"own.csv {FIT} --group-column=", "own.csv: no column ; it has text, label; name one with --group-column"),
    ("fit", f"own.csv {FIT} --max-lost 200", "argument --max-lost: '200', should be a number from 0.01 to 99.99"),
    ("fit", f"own.csv {FIT} --out bag", "--out: bag holds a run already; name another folder, or pass --overwrite"),
    ("fit", "own.csv --trunk bag --out new --model minilm-l6", "--model: cannot be combined with a trunk: only the"),
    ("fit", f"two.csv {FIT} --text-columns sentence1 --dev-size 0.1", "two: too few rows: no text can be set aside"),
    ("fit", f"own.csv {FIT} --dev-data own.csv --dev-size 0.3", "--dev-size: needs a split of FILE, not --dev-data"),
    ("fit", "--trunk bag --unlabelled own.csv --out new --dev-size 0.3", "--dev-size: needs a split of FILE, not -"),
    ("fit", "--trunk bag --unlabelled own.csv --out new --label-column x", "--label-column: needs FILE or --dev-data"),
    ("fit", f"own.csv {FIT} --text-columns label", "--text-columns: label, should not be the label column"),
    ("fit", f"own.csv {FIT} --unlabelled own.csv", "--unlabelled: no text is left: all of them are also labelled, or"),
    ("fit", f"own.csv {FIT} --unlabelled two.csv", "two.csv: no column text or sentence; it has sentence1,"),
    ("fit", "own.csv --trunk ee --out new", "ee: a run of train.py, which is evaluated by: python evaluate.py ee"),
    ("fit", "own.csv --trunk own.csv --out new", "--trunk: own.csv is not a folder; should be a run, or a classif"),
    ("fit", "own.csv --trunk two --out new", "two/config.json: not readable as JSON (No such file or directory)"),
    ("fit", "own.csv --trunk bag --out new --max-length 30", "--max-length: 30, should be 32, as of the trunk bag"),
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
    """A folder with what a command line may name: models, evaluated runs, and files of rows."""
    folder = tmp_path_factory.mktemp("place")
    write_model(folder / "tiny", "bert")
    write_model(folder / "one-type", "bert", type_vocab_size=1)
    (folder / "two").mkdir()
    for name in ("train.tsv", "dev.tsv"):
        (folder / "two" / name).write_text("sentence1\tsentence2\tlabel\na\tit\tx\na\tto\ty\n")
    (folder / "two.csv").write_text("sentence1,sentence2,label\n" + "a,it,x\na,to,y\na,of,x\na,in,y\n")
    (folder / "one.csv").write_text("text,label\n" + "a,x\nb,x\n" * 3)
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"text": 5}\n')
    (folder / "none.csv").write_text("text,label\nthe film,\nis it,\n")
    (folder / "empty.csv").write_text("")
    os.mkfifo(folder / "pipe.csv")
    write_rows(folder / "own.csv", [(text, "ab"[label == "up"]) for text, label in opinions(32)], "text", "label")
    for name, called in {"sweet": "run", "bag": "bag", "ee": "ee"}.items():
        shutil.copytree(run_of(name), folder / called)
    shutil.copytree(run_of("ee"), folder / "bare", ignore=shutil.ignore_patterns("evaluation.json"))
    shutil.copytree(run_of("bag"), folder / "no-point", ignore=shutil.ignore_patterns("operating.json"))
    other = shutil.copytree(run_of("ee"), folder / "other") / "evaluation.json"
    write_json(other, read_json(other) | {"examples": 3})
    return folder


@pytest.mark.parametrize(("name", "words", "expected"), REFUSALS, ids=[f"{row[0]}: {row[2]}" for row in REFUSALS])
def test_bad_input_is_one_line_and_status_2(place, capsys, name, words, expected):
    before = sorted(place.rglob("*"))
    with in_folder(place):
        status = run(command_of(MODULES[name]), *shlex.split(words))
    err = capsys.readouterr().err
    assert (status, "Traceback" in err) == (2, False), err
    *told, line = err.splitlines()  # what is told before is of the files
    assert expected in line
    assert len(told) <= 3 * (name == "fit")
    assert sorted(place.rglob("*")) == before
