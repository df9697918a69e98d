"""Bad input: one line on standard error that names the option or the file, status 2, and nothing is written.

One table for all commands. Each row is a command, its words, and what its line says. A row belongs to the room that
raises the error, and stands in that room's section. `place` makes the files that the words name.
"""

import importlib
import json
import os
import shlex
import shutil
from pathlib import Path

import pytest

from minisweet.__main__ import COMMANDS
from tests.conftest import in_folder, run, write_model

MODULES = COMMANDS | {"train": "train", "evaluate": "evaluate", "minisweet": "minisweet.__main__"}
TRAIN = "--model tiny --out new --train-size 48 --epochs 1 --max-length 32"  # and then the bad words

REFUSALS = [
    # base: what argparse and the types of options refuse
    ("minisweet", "predikt run", "argument command: invalid choice: 'predikt'"),
    ("train", f"{TRAIN} --train-siz 5", "unrecognized arguments: --train-siz 5"),
    ("train", f"{TRAIN} --method sweeet", "argument --method: invalid choice: 'sweeet'"),
    ("train", f"{TRAIN} --train-size 0", "--train-size: '0' is not a whole number from 1 to"),
    ("train", f"{TRAIN} --lr inf", "--lr: 'inf' is not a positive number"),
    ("train", f"{TRAIN} --exit-layers 1,x", "--exit-layers: 'x' is not a whole number"),
    ("train", f"{TRAIN} --data own.csv --labels a,b,", "--labels: 'a,b,' names one twice, or has an empty name"),
    ("train", f"{TRAIN} --device tpu", "--device: 'tpu' is not here; should be auto, cpu"),
    # runs: hub, start, resume, folders
    ("train", "--model no-such --out new", "model 'no-such': neither a folder, nor owner/name on the hub, nor one of"),
    ("train", "--model a/b/c --out new", "model 'a/b/c': neither a folder"),
    ("train", "--model tiny/vocab.txt --out new", "model 'tiny/vocab.txt': neither a folder"),
    ("train", f"{TRAIN} --exit-layers 4,1", "--exit-layers: 4,1, should increase and end at one of the layers 1 to 4"),
    ("train", f"{TRAIN} --exit-layers 0,0,4", "--exit-layers: '0,0,4' names one twice"),
    ("train", f"{TRAIN} --exit-layers 0,4 --exit-strategy lte", "--exit-strategy: lte, and exit 0 learns no such"),
    ("train", f"{TRAIN} --method plain --exit-strategy lte", "--exit-strategy: lte, and exit 0 learns no such"),
    ("train", f"{TRAIN} --data own.csv --exit-layers 0,2,4", "--exit-layers: 0,2,4, and the method plain has exits 0"),
    ("train", "--model tiny --trunk run", "--model: needs a training without --trunk"),
    ("train", "--trunk own.csv --out new", "--trunk: own.csv is no folder; should be a run, or a classifier in the"),
    ("train", "--trunk run --data own.csv --labels a,c --out new", "--labels: a,c, and the trunk's are "),
    ("train", "--trunk run --out new --exit-layers 1,2", "--exit-layers: 1,2, should increase and end at layer 4, as"),
    ("train", "--trunk run --method branch --exit-strategy lte --out new", "--exit-strategy: lte, and run has not"),
    ("train", f"{TRAIN} --targets trunk", "--targets: needs --trunk or --method branch"),
    ("train", f"{TRAIN} --dev-data own.csv", "--dev-data: needs --data"),
    ("train", f"{TRAIN} --data own.csv --dev-data own.csv --dev-size 0.3", "--dev-size: needs rows of --data, and"),
    ("train", f"{TRAIN} --out run", "--out: run holds a run already; name another folder, or pass --overwrite"),
    ("train", f"{TRAIN} --out tiny --overwrite", "--out: tiny holds 'config.json', which no run made; name"),
    ("train", f"{TRAIN} --out /", "--out: / holds "),
    ("train", f"{TRAIN} --out {'x' * 240}", "x cannot be written (File name too long)"),
    ("train", f"{TRAIN} --out tiny/vocab.txt/x", "--out: tiny/vocab.txt/x cannot be written (Not a directory)"),
    ("train", f"{TRAIN} --out run --resume --overwrite", "not allowed with argument"),
    # config, checkpoint, data
    ("train", f"{TRAIN} --task rte --data own.csv", "argument --data: not allowed with argument --task"),
    ("train", f"{TRAIN} --data absent.csv", "absent.csv: cannot be read (No such file or directory)"),
    ("train", f"{TRAIN} --data tiny/vocab.txt", "tiny/vocab.txt: should end in .csv, .tsv, .jsonl"),
    ("train", f"{TRAIN} --data own.csv --text-columns body", "own.csv: no column body; it has text, label; name"),
    ("train", f"{TRAIN} --data own.csv --text-columns text,label", "text,label, should be one or two, and not the"),
    ("train", f"{TRAIN} --data own.csv --label-column team", "own.csv: no column team; it has text, label; name"),
    ("train", f"{TRAIN} --data pipe.csv", "pipe.csv: cannot be read (it is no file)"),
    ("train", "--model one-type --data two.csv --max-length 32 --out new", "one-type: its type_vocab_size is 1, and"),
    ("train", f"{TRAIN} --max-length 41", "--max-length: 41, should be at most 40, the positions of tiny"),
    ("train", f"{TRAIN} --data own.csv --labels a,c", "own.csv, line 3: label 'b', should be one of a, c"),
    ("train", f"{TRAIN} --data same.csv", "same.csv: no row can be set aside: no label has two different texts"),
    ("train", f"{TRAIN} --data one.csv", "one.csv: all rows have the label 'x', needs two or more"),
    # evaluation
    ("evaluate", "run run", "run: a second run, and only --plot takes several"),
    ("evaluate", "tiny", "tiny: no run here"),
    ("evaluate", "run --use-exits 1,2", "--use-exits: "),
    ("evaluate", "run --use-exits 3,4", "--use-exits: "),
    ("evaluate", "run --max-loss 1 --speed 0.5", "argument --speed: not allowed with argument --max-loss"),
    ("evaluate", "run --speed 1.5", "argument --speed: '1.5' is not a number from 0 to 1"),
    ("evaluate", "run --max-change 0", "argument --max-change: '0' is not a number from 0.01 to 99.99"),
    ("evaluate", "run --max-loss 1 --sure 100", "argument --sure: '100' is not a number from 50 to 99.9"),
    ("evaluate", "run --speed 0.5 --sure 90", "--sure: needs --max-loss or --max-change"),
    ("evaluate", "run --thresholds 1", "argument --thresholds: '1' is not a whole number from 2"),
    ("evaluate", "run --test own.csv --speed 0.5", "--speed: needs an evaluation, and --test takes the one that"),
    ("evaluate", "run --test late.jsonl", "late.jsonl, line 1: 'label' is None, should be a label"),
    ("evaluate", "run --test own.csv", "own.csv, line 2: label 'a', should be one of "),
    ("evaluate", "pairs --test own.csv", "own.csv: no column first,second or sentence1,sentence2; it has text, label"),
    ("evaluate", "run --plot own.csv", "--plot: 'own.csv' is no name that ends in .png"),
    ("evaluate", "run --plot new.png --amp bf16", "--amp: needs an evaluation, and --plot draws those that are there"),
    ("evaluate", "run pairs ee run/../run pairs/../ee run/../ee --plot new.png", "--plot: 6 runs, should be at most 5"),
    ("evaluate", "run pairs --plot new.png", "pairs: it was evaluated on other rows, or by another metric"),
    # use: predict, explain, classifier, page
    ("predict", "run own.csv --out own.csv", "--out: own.csv is the input"),
    ("predict", "run own.csv --out new.txt", "new.txt: should end in .csv, .tsv, .jsonl"),
    ("predict", "run own.csv --out new.csv --text-columns text,label", "--text-columns: text,label, should be 1"),
    ("predict", "pairs own.csv --out new.csv --text-columns text", "--text-columns: text, should be 2"),
    ("predict", "run half.jsonl --out new.csv", "half.jsonl, line 2: 'text' is None, should be text"),
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
    ("export", "run --out new --recertify", "--recertify: needs --onnx"),
    ("export", "run --onnx new.pt", "--onnx: 'new.pt' is no name that ends in .onnx"),
    ("export", "tiny --onnx new.onnx", "tiny: no run here"),
    ("export", "run --out tiny", "tiny: is there already"),
    ("export", "run --out new --exit-layer 0", "--exit-layer: 0, should be the layer of an exit: 1, 2, 4"),
    # paper
    ("reproduce", "--tasks sst3", "--tasks: 'sst3' is none of rte, mrpc"),
    ("reproduce", "--lrs 1e-3,x", "--lrs: 'x' is not a positive number"),
    ("reproduce", "--methods ee,bert", "--methods: 'bert' is none of sweet, ee, mm, branch"),
    ("reproduce", "--model tiny --max-length 32 --lrs 1e-3 --exit-layers 1,9", "--exit-layers: 1,9, should increase"),
    ("reproduce", "--report-only --out none", "--report-only: no run is in none/runs; name another --runs, or --out"),
    ("reproduce", "--print-commands --report-only", "--report-only: not allowed with argument --print-commands"),
    ("gradients", "run", "run: a run of branch on toy, exits after layers 1,2,4; should be of ee on a task, with two"),
    ("gradients", "mnli", "mnli: a run of ee on mnli (own text), exits after"),
    ("gradients", "ee fast", "fast: its lr is 0.1, should be 0.003 as ee's"),
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
    (folder / "late.jsonl").write_text('{"text": "a"}\n{"text": "b", "label": "positive"}\n')
    (folder / "half.jsonl").write_text('{"text": "a"}\n{"id": 1}\n')
    os.mkfifo(folder / "pipe.csv")
    for name, called in {"branch": "run", "pairs": "pairs", "ee": "ee"}.items():
        shutil.copytree(run_of(name), folder / called)
    for name, changes in {"mnli": {"task": "mnli", "text_columns": ["a", "b"]}, "fast": {"lr": 0.1}}.items():
        record = shutil.copytree(run_of("ee"), folder / name) / "run.json"
        record.write_text(json.dumps(json.loads(record.read_text()) | changes))
    (folder / "own.csv").write_text("text,label\n" + "the good film,a\nthe bad film,b\n" * 16)
    return folder


@pytest.mark.parametrize(("command", "words", "expected"), REFUSALS, ids=[f"{row[0]}: {row[2]}" for row in REFUSALS])
def test_bad_input_is_one_line_and_status_2(place, capsys, command, words, expected):
    before = sorted(place.rglob("*"))
    with in_folder(place):
        status = run(importlib.import_module(MODULES[command]), *shlex.split(words))
    err = capsys.readouterr().err
    assert (status, err.count("\n")) == (2, 1), err
    if "pip install" in err and "pip" not in expected:
        pytest.skip(err)
    assert expected in err
    assert sorted(place.rglob("*")) == before
