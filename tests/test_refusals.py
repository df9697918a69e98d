"""Bad input: one line on standard error that names the option or the file, status 2, and nothing is written.

Each row is a command, its words, and what its line says. `place` makes the files that the words name. The commands of
own text have a table in test_own_refusals.py.
"""

import shlex
import shutil
from pathlib import Path

import pytest

from minisweet.__main__ import COMMANDS
from minisweet.base.files import read_json, write_json
from tests.conftest import command_of, in_folder, run, write_model

MODULES = COMMANDS | {"train": "train", "evaluate": "evaluate"}
TRAIN = "--model tiny --out new --train-size 48 --epochs 1 --max-length 32"  # and then the bad words

REFUSALS = [
    # base: what argparse and the types of options refuse
    ("train", f"{TRAIN} --lr inf", "argument --lr: 'inf', should be a positive number"),
    # the paper's half: hub, options, tasks, run
    ("train", "--model no-such --out new", "model 'no-such': neither a folder, nor owner/name on the hub, nor one of"),
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
    ("evaluate", "old", "old: a run of minisweet fit (see minisweet test --help) or of an earlier version"),
    ("evaluate", "ee --criterion lte", "--criterion: lte needs a run of train.py --exit-strategy lte"),
    # paper
    ("reproduce", "--model tiny --max-length 32 --lrs 1e-3 --exit-layers 1,9", "--exit-layers: 1,9, should increase"),
    ("reproduce", "--model tiny --max-length 32 --device gpu", "--device: 'gpu' is not available; should be auto, cpu"),
    ("gradients", "run", "run: a run of sweet on toy, exits after layers 1,2,4; should be of ee, with two"),
    ("gradients", "ee --batches 9999", "--batches: 9999 of 16 rows, and toy has 200 other rows"),
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
    (folder / "own.csv").write_text("text,label\nthe film,a\nis it,b\n")
    for name, called in {"sweet": "run", "bag": "bag", "ee": "ee"}.items():
        shutil.copytree(run_of(name), folder / called)
    shutil.copytree(run_of("ee"), folder / "bare", ignore=shutil.ignore_patterns("evaluation.json"))
    for called, name, change in (("old", "run.json", {"dev_rows": ...}), ("other", "evaluation.json", {"examples": 3})):
        path = shutil.copytree(run_of("ee"), folder / called) / name
        content = read_json(path) | change
        write_json(path, {key: value for key, value in content.items() if value is not ...})
    return folder


def ids(rows: list[tuple[str, str, str]]) -> list[str]:
    """The names of rows."""
    return [f"{command}: {expected}" for command, _, expected in rows]


def check_refusal(place: Path, capsys, command: str, words: str, expected: str) -> None:
    """Run a command in a folder: status 2, one line, and no file is new."""
    before = sorted(place.rglob("*"))
    with in_folder(place):
        status = run(command_of(MODULES[command]), *shlex.split(words))
    err = capsys.readouterr().err
    assert (status, "Traceback" in err) == (2, False), err
    *told, line = err.splitlines()  # what is told before is of the files
    assert expected in line
    assert len(told) <= 3 * (command == "fit")
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("row", REFUSALS, ids=ids(REFUSALS))
def test_bad_input_is_one_line_and_status_2(place, capsys, row):
    check_refusal(place, capsys, *row)
