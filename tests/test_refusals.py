"""Bad input: one line on standard error that names the option or the file, status 2, and nothing is written.

One table for all commands. Each row is a command, its words, and what its line says. A row belongs to the room that
raises the error, and stands in that room's section. `place` makes the files that the words name.
"""

import importlib
import os
import shlex
import shutil
from pathlib import Path

import pytest

from minisweet.__main__ import COMMANDS
from tests.conftest import in_folder, opinions, run, write_model, write_rows

MODULES = COMMANDS | {"train": "train", "evaluate": "evaluate", "minisweet": "minisweet.__main__"}
TRAIN = "--model tiny --out new --train-size 48 --epochs 1 --max-length 32"  # and then the bad words
FIT = "--model tiny --out new --epochs 1 --max-length 32"
LTE = "--out new --method branch --exit-strategy lte --exit-layers 2,4"

REFUSALS = [
    # base: what argparse and the types of options refuse
    ("minisweet", "", "the following arguments are required: command"),
    ("minisweet", "predikt run", "argument command: invalid choice: 'predikt'"),
    ("train", f"{TRAIN} --train-siz 5", "unrecognized arguments: --train-siz 5"),
    ("train", f"{TRAIN} --method sweeet", "argument --method: invalid choice: 'sweeet'"),
    ("train", f"{TRAIN} --train-size 0", "--train-size: '0' is not a whole number from 1 to"),
    ("train", f"{TRAIN} --lr inf", "--lr: 'inf' is not a positive number"),
    ("train", f"{TRAIN} --exit-layers 1,x", "--exit-layers: 'x' is not a whole number"),
    ("train", f"{TRAIN} --device tpu", "--device: 'tpu' is not here; should be auto, cpu"),
    ("train", f"{TRAIN} --data own.csv", "unrecognized arguments: --data own.csv"),
    # runs: hub, start, resume, folders
    ("train", "--model no-such --out new", "model 'no-such': neither a folder, nor owner/name on the hub, nor one of"),
    ("train", "--model tiny/vocab.txt --out new", "model 'tiny/vocab.txt': neither a folder"),
    ("train", f"{TRAIN} --exit-layers 4,1", "--exit-layers: 4,1, should increase and end at one of the layers 1 to 4"),
    ("train", f"{TRAIN} --exit-layers 0,0,4", "--exit-layers: '0,0,4' names one twice"),
    ("train", f"{TRAIN} --exit-layers 0,4 --exit-strategy lte", "--exit-strategy: lte, and exit 0 learns no such"),
    ("train", f"{TRAIN} --max-length 41", "--max-length: 41, should be at most 40, the positions of tiny"),
    ("train", f"{TRAIN} --out run", "--out: run holds a run already; name another folder, or pass --overwrite"),
    ("train", f"{TRAIN} --out tiny --overwrite", "--out: tiny holds 'config.json', which no run made; name"),
    ("train", f"{TRAIN} --out {'x' * 250}", "x cannot be written (File name too long)"),
    ("train", f"{TRAIN} --out tiny/vocab.txt/x", "--out: tiny/vocab.txt/x cannot be written (Not a directory)"),
    ("train", f"{TRAIN} --out run --resume --overwrite", "not allowed with argument"),
    # own text
    ("fit", FIT, "FILE: is missing; without labels, --trunk FOLDER --unlabelled FILE will do"),
    ("fit", f"{FIT} --unlabelled own.csv", "FILE: is missing"),
    ("fit", f"absent.csv {FIT}", "absent.csv: cannot be read (No such file or directory)"),
    ("fit", f"tiny/vocab.txt {FIT}", "tiny/vocab.txt: should end in .csv, .tsv, .jsonl"),
    ("fit", f"empty.csv {FIT}", "empty.csv: it has no rows"),
    ("fit", f"header.csv {FIT}", "header.csv: it has no rows"),
    ("fit", f"latin.csv {FIT}", "latin.csv, line 3: not readable as cells in UTF-8"),
    ("fit", f"pipe.csv {FIT}", "pipe.csv: cannot be read (it is no file)"),
    ("fit", f"late.jsonl {FIT}", "late: no row can be set aside"),
    ("fit", f"half.jsonl {FIT} --label-column id", "half.jsonl, line 2: 'text' is None, should be text"),
    ("fit", f"own.csv {FIT} --text-columns body", "own.csv: no column body; it has text, label; name it with --text"),
    ("fit", f"own.csv {FIT} --text-columns text,label", "text,label, should be one or two, and not the label column"),
    ("fit", f"own.csv {FIT} --label-column team", "own.csv: no column team; it has text, label; name it with --label"),
    ("fit", f"same.csv {FIT}", "same: no row can be set aside: no label has two different texts"),
    ("fit", f"one.csv {FIT}", "one: all rows have the label 'x', needs two or more"),
    ("fit", f"none.csv {FIT}", "none: no row has a label"),
    ("fit", f"two.csv --model one-type {FIT[13:]}", "one-type: its type_vocab_size is 1, and"),
    ("fit", f"own.csv {FIT} --exit-layers 0,2,4", "--exit-layers: 0,2,4, and the method plain has exits 0 and 4 alone"),
    ("fit", f"own.csv {FIT} --exit-strategy lte", "--exit-strategy: lte, and exit 0 learns no such thing; add --meth"),
    ("fit", f"own.csv {FIT} --dev-data two.csv", "two.csv: no column text or sentence; it has sentence1,"),
    ("fit", f"own.csv {FIT} --dev-data own.csv --dev-size 0.3", "--dev-size: needs rows of FILE, and --dev-data is"),
    ("fit", f"own.csv {FIT} --max-lost 0", "max_lost: 0.0, should be a number from 0.01 to 99.99"),
    ("fit", f"own.csv {FIT} --max-lost x", "argument --max-lost: invalid float value: 'x'"),
    ("fit", f"own.csv {FIT} --max-lost 1 --max-share 0.5", "--max-share: not allowed with argument --max-lost"),
    ("fit", f"own.csv {FIT} --max-share 0.5 --sure 95", "--sure: needs --max-lost"),
    ("fit", f"own.csv {FIT} --unlabelled two.csv", "two.csv: no column text or sentence; it has sentence1,"),
    ("fit", f"own.csv {FIT} --unlabelled header.csv", "header.csv: it has no rows"),
    ("fit", f"own.csv {FIT} --unlabelled own.csv", "--unlabelled: no text is left: all of them are also labelled"),
    ("fit", f"own.csv {FIT} --unlabelled none.csv --exit-layers 4", "--unlabelled: exit 0 learns from it, and --exit"),
    ("fit", "own.csv --trunk own.csv --out new", "--trunk: own.csv is no folder; should be a run, or a classifier in"),
    ("fit", "own.csv --trunk run --out new", "--trunk: run does not know the label 'a'; its labels: "),
    (
        "fit",
        "none.csv --trunk run --out new --exit-layers 0,2",
        "--exit-layers: 0,2, should increase and end at",
    ),
    ("fit", f"none.csv --trunk run {LTE}", "--exit-strategy: lte, and run stays as it is and has not learned when it"),
    ("choose", "tiny", "tiny: no run here"),
    ("choose", "run --max-share 1.5", "max_share: 1.5, should be a number from 0 to 1"),
    ("choose", "run --sure 100", "sure: 100.0, should be a number from 50 to 99.9"),
    ("choose", "bare --max-share 0.5 --sure 95", "--sure: needs --max-lost"),
    ("test", "run own.csv", "own.csv: no row has a label of the model's: "),
    (
        "test",
        "pairs own.csv",
        "own.csv: no column first,second or sentence1,sentence2; it has text, label; name",
    ),
    ("test", "bare own.csv", "bare: has no operating.json; first: minisweet choose bare"),
    ("test", "run run/validation.jsonl", "run/validation.jsonl: no row is left to test on; name other rows"),
    ("predict", "bare own.csv", "bare: has no operating.json; first: minisweet choose bare"),
    ("predict", "run own.csv --threshold 1.5", "argument --threshold: '1.5' is not a number from 0 to 1"),
    ("predict", "run own.csv --out own.csv", "--out: own.csv is the input"),
    ("predict", "run own.csv --out new.txt", "new.txt: should end in .csv, .tsv, .jsonl"),
    ("predict", "run own.csv --out new.csv --text-columns text,label", "--text-columns: text,label, should be 1"),
    ("predict", "pairs own.csv --out new.csv --text-columns text", "--text-columns: text, should be 2"),
    ("predict", "run half.jsonl --out new.csv", "half.jsonl, line 2: 'text' is None, should be text"),
    # evaluation
    ("evaluate", "run run", "run: a second run, and only --plot takes several"),
    ("evaluate", "tiny", "tiny: no run here"),
    ("evaluate", "run --thresholds 1", "argument --thresholds: '1' is not a whole number from 2"),
    ("evaluate", "run --plot own.csv", "--plot: 'own.csv' is no name that ends in .png"),
    ("evaluate", "run pairs ee run/../run pairs/../ee run/../ee --plot new.png", "--plot: 6 runs, should be at most 5"),
    ("evaluate", "run pairs --plot new.png", "pairs: it was evaluated on other rows, or by another metric"),
    ("evaluate", "bare --plot new.png", "bare: has no evaluation.json; first: python evaluate.py bare"),
    # use: explain
    ("explain", "bare a", "bare: has no operating.json; first: minisweet choose bare"),
    ("explain", "run", "TEXT: should be a text, or the two of a pair"),
    ("explain", "run a --html new.html", "TEXT: should be a text, or the two of a pair"),
    ("explain", "pairs a", "item 0: ['a'], should be a pair of texts"),
    ("explain", "run --html tiny", "--html: 'tiny' is no name that ends in .html"),
    ("explain", "run --html new.html --threshold 0.5", "--threshold: needs TEXT"),
    # use: export and ONNX
    ("export", "run", "one of the arguments --onnx --out is required"),
    ("export", "run --out new --onnx new.onnx", "not allowed with argument"),
    ("export", "run --onnx new.onnx --exit-layer 2", "--exit-layer: needs --out"),
    ("export", "run --out new --int8", "--int8: needs --onnx"),
    ("export", "run --onnx new.pt", "--onnx: 'new.pt' is no name that ends in .onnx"),
    ("export", "tiny --onnx new.onnx", "tiny: no run here"),
    ("export", "bare --onnx new.onnx", "bare: has no operating.json; first: minisweet choose bare"),
    ("export", "run --out tiny", "tiny: is there already"),
    ("export", "run --out new --exit-layer 0", "--exit-layer: 0, should be the layer of an exit: 1, 2, 4"),
    # paper
    ("reproduce", "--tasks sst3", "--tasks: 'sst3' is none of rte, mrpc"),
    ("reproduce", "--lrs 1e-3,x", "--lrs: 'x' is not a positive number"),
    ("reproduce", "--methods ee,bert", "--methods: 'bert' is none of sweet, ee, mm, branch"),
    ("reproduce", "--model tiny --max-length 32 --lrs 1e-3 --exit-layers 1,9", "--exit-layers: 1,9, should increase"),
    ("reproduce", "--report-only --out none", "--report-only: no run is in none/runs; name another --runs, or --out"),
    ("gradients", "run", "run: a run of branch on toy, exits after layers 1,2,4; should be of ee on a task, with two"),
    ("gradients", "ee fast", "RUN: toy, exits [1, 4], should be as ee's for one mean"),
    ("gradients", "ee --batches 9999", "--batches: 9999 of 16 rows, and toy has 200 other rows"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory, run_of) -> Path:
    """A folder with what a command line may name: models, evaluated runs, and files of rows."""
    folder = tmp_path_factory.mktemp("place")
    write_model(folder / "tiny", "bert")
    write_model(folder / "one-type", "bert", type_vocab_size=1)
    (folder / "two.csv").write_text("sentence1,sentence2,label\n" + "a,b,x\nb,c,y\nc,d,x\nd,e,y\n")
    (folder / "same.csv").write_text("text,label\n" + "a,x\n" * 3 + "a,y\n" * 6)
    (folder / "one.csv").write_text("text,label\n" + "a,x\nb,x\n" * 3)
    (folder / "none.csv").write_text("text,label\n" + "the film,\nis it,\n" * 3)
    (folder / "late.jsonl").write_text('{"text": "a"}\n{"text": "b", "label": "x"}\n{"text": "c", "label": "y"}\n')
    (folder / "latin.csv").write_bytes(b"text,label\na,x\ncaf\xe9,y\n")
    for name, text in {"empty": "", "header": "text,label\n"}.items():
        (folder / f"{name}.csv").write_text(text)
    (folder / "half.jsonl").write_text('{"text": "a"}\n{"id": 1}\n')
    os.mkfifo(folder / "pipe.csv")
    for name, called in {"branch": "run", "pairs": "pairs", "ee": "ee"}.items():
        shutil.copytree(run_of(name), folder / called)
    record = shutil.copytree(run_of("ee"), folder / "fast") / "run.json"
    record.write_text(record.read_text().replace('"exit_layers": [1, 2, 4],\n', '"exit_layers": [1, 4],\n'))
    ignored = shutil.ignore_patterns("operating.json", "evaluation.json")
    shutil.copytree(run_of("ee"), folder / "bare", ignore=ignored)
    write_rows(folder / "own.csv", [(text, "ab"[label == "up"]) for text, label in opinions(32)], "text", "label")
    return folder


@pytest.mark.parametrize(("command", "words", "expected"), REFUSALS, ids=[f"{row[0]}: {row[2]}" for row in REFUSALS])
def test_bad_input_is_one_line_and_status_2(place, capsys, command, words, expected):
    before = sorted(place.rglob("*"))
    with in_folder(place):
        status = run(importlib.import_module(MODULES[command]), *shlex.split(words))
    err = capsys.readouterr().err
    assert (status, "Traceback" in err) == (2, False), err
    *told, line = err.splitlines()  # what is told before is of the files
    if "pip install" in err:
        pytest.skip(err)
    assert expected in line
    assert len(told) <= 3 * (command == "fit")
    assert sorted(place.rglob("*")) == before
