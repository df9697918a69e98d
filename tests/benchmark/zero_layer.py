"""The study of exits: branches, EE, SWEET and MM, with and without exit 0, on tasks of GLUE and on own text.

    python -m tests.benchmark.zero_layer --data-dir DIR --out FOLDER
    python -m tests.benchmark.zero_layer --data-dir DIR --out FOLDER/base --model mpnet-base --dev-rows 2000
        --tasks sst2,mrpc,rte,qnli,own --own TRAIN.csv TEST.csv

A run of branches with exit 0 in front holds all that is made of exit 0, of branches and of full depth, since its exits
are trained apart. Its exit 0 is also put in front of EE, SWEET and MM, whose training it does not touch. Of the small
model there are also slices of one to three layers, which learn from the trunk (`--method mm --targets trunk`), and the
two models of linear.py, without early exit. FOLDER/records keeps run.json, evaluation.json and the validation logits of
each run. What is there is not made again. Processes with one FOLDER share the work: each takes what no other has taken.
Then zero_tables.py makes the tables.
"""

import argparse
import shutil
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from minisweet.base.commands import Parser, list_of, one_of, positive_float, whole_number
from minisweet.base.files import InputError, home, write_json, written_beside
from minisweet.checkpoint import read_config
from minisweet.data.tasks import TASKS as GLUE
from minisweet.data.tasks import load_examples
from minisweet.paper.reproduce import claimed, run_script
from minisweet.runs.folders import LOGITS
from minisweet.runs.hub import model_folder
from minisweet.runs.start import exit_layers_for
from tests.benchmark import TASKS, keep_record, run_study
from tests.benchmark.linear import LINEAR, fit_linear

SMALL, RATE = "minilm-l6", 5e-5  # the model that RATES are of, and the rate of others
RATES = {  # of 5e-5, 1e-4, 2e-4, 4e-4: the best area on seed 0's validation rows, by TASKS; own was not searched
    "branch": (1e-4, 5e-5, 1e-4, 1e-4, 1e-4, 2e-4, 2e-4),
    "ee": (4e-4, 1e-4, 2e-4, 1e-4, 5e-5, 1e-4, 2e-4),
    "sweet": (1e-4, 1e-4, 5e-5, 1e-4, 5e-5, 2e-4, 2e-4),
    "mm": (1e-4, 1e-4, 1e-4, 1e-4, 1e-4, 5e-5, 2e-4),
    "slices": (1e-4, 1e-4, 2e-4, 1e-4, 2e-4, 4e-4, 2e-4),
}
ROWS = 6000  # to train on, drawn by the seed, or all where there are fewer


def train_and_evaluate(run: Path, *options: object) -> None:
    """Make a run, or go on with it."""
    for script, words in (("train.py", [*options, "--out", run, "--resume"]), ("evaluate.py", [run])):
        if run_script(script, [*map(str, words)]):
            raise InputError(f"{run}: {script} failed, see above")


def make(args: argparse.Namespace, record: Path, task: str, *options: object) -> None:
    """Train and evaluate a run on a task, in `runs` beside the records, and keep its record."""
    run = record.parents[1] / "runs" / record.name
    words = ["--task", task, "--train-size", ROWS, "--data-dir", args.data_dir]
    if task == "own":
        words = ["--data", args.own[0], "--dev-data", args.own[1]]
    train_and_evaluate(run, "--model", args.model, *words, *options)
    with written_beside(record) as folder:
        keep_record(run, folder)
        tensors = load_file(run / LOGITS)
        save_file(tensors | {"logits": tensors["logits"].half()}, folder / LOGITS)  # half the size; three digits do


def make_linear(args: argparse.Namespace, record: Path, task: str, seed: int, method: str) -> None:
    """Keep the record of a model of linear.py, which learns from the rows that the seed draws for the others too."""
    train, dev = (load_examples(task, split, args.data_dir) for split in ("train", "dev"))
    subset = np.sort(np.random.default_rng(seed).permutation(len(train.first))[:ROWS])
    predict, facts = fit_linear(method, train.take(subset))
    with written_beside(record) as folder:
        folder.mkdir()
        save_file({"logits": torch.tensor(predict(dev), dtype=torch.float32)[None]}, folder / LOGITS)
        write_json(folder / "run.json", facts)


def make_all(args: argparse.Namespace) -> None:
    """Make what is missing, seed by seed."""
    records, layers = args.out / "records", ",".join(map(str, args.exit_layers))
    is_searched = args.model == SMALL and args.lr is None
    is_usual = args.lr in (None, None if args.model == SMALL else RATE)
    suffix = "" if is_usual else f"-lr{args.lr:g}".replace("e-0", "e-")
    jobs = product(args.seeds, args.tasks, ["branch", "ee", "sweet", "mm", *(LINEAR if is_searched else [])])
    jobs = [job for job in jobs if job[1] in GLUE or job[2] not in LINEAR]

    def records_of(seed: int, task: str, method: str) -> list[Path]:
        """The records that a job makes. The trunk of the branches teaches the slices, so that one job makes both."""
        methods = ["branch", "slices"] if method == "branch" and is_searched else [method]
        return [records / f"{task}-{seed}-{each}{suffix}" for each in methods]

    def is_missing(job: tuple[int, str, str]) -> bool:
        return not all(record.exists() for record in records_of(*job))

    while todo := list(filter(is_missing, jobs)):
        with claimed([records_of(*job)[0] for job in todo]) as place:
            seed, task, method = job = todo[place]
            if not is_missing(job):  # another process has just made it
                continue
            first, *taught = records_of(*job)
            if method in LINEAR:
                make_linear(args, first, task, seed, method)
                continue
            for record in (first, *taught):
                rate = RATES[record.name.split("-")[2]][TASKS.index(task)] if is_searched else args.lr or RATE
                exits = f"0,{layers}" if record.name.endswith(f"branch{suffix}") else layers
                words = ["--method", method]
                if record in taught:
                    words = ["--method", "mm", "--targets", "trunk", "--trunk", args.out / "runs" / first.name]
                options = ["--seed", seed, "--epochs", 2, "--lr", rate, "--exit-layers", exits, *words]
                make(args, record, task, *options)
            for record in (first, *taught):
                shutil.rmtree(args.out / "runs" / record.name)


def cut_validation(data_dir: Path, rows: int, folder: Path, tasks: list[str]) -> Path:
    """Copy tasks of GLUE to `folder`, with at most so many of their validation rows. Returns `folder`."""
    for task in (GLUE[name] for name in tasks if name in GLUE):
        for file in task.files:
            lines = (data_dir / task.folder / file).open(encoding="utf-8").readlines()
            first = int(task.header is None)  # after the names of the columns
            if file == task.files[1]:
                kept = np.sort(np.random.default_rng(0).permutation(len(lines) - first)[:rows])
                lines = lines[:first] + [lines[first + n] for n in kept]
            with written_beside(folder / task.folder / file) as new:
                new.write_text("".join(lines), encoding="utf-8")
    return folder


def add_options(parser: Parser, tasks: Sequence[str]) -> None:
    """Add what studies that train take; `tasks` are the default."""
    parser.add_argument("--data-dir", type=Path, default=home() / "data")
    parser.add_argument("--own", type=Path, nargs=2, metavar=("TRAIN", "TEST"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", type=list_of(one_of(TASKS)), default=list(tasks))
    parser.add_argument("--seeds", type=list_of(whole_number(0)), default=[0, 1, 2])


def main() -> None:
    """Make what is missing."""
    parser = Parser(__doc__)
    add_options(parser, TASKS[:-1])  # all but own text
    parser.add_argument("--model", default=SMALL)
    parser.add_argument(
        "--lr", type=positive_float, help=f"one rate (default: {SMALL} the best of a search, else {RATE:g})"
    )
    parser.add_argument("--dev-rows", type=whole_number(1), help="validation rows of a task of GLUE, at most")
    args = parser.parse_args()
    if "own" in args.tasks and not args.own:
        raise InputError("--tasks: own needs --own TRAIN.csv TEST.csv")
    args.exit_layers = exit_layers_for(read_config(model_folder(args.model)).num_hidden_layers)
    (args.out / "records").mkdir(parents=True, exist_ok=True)
    if args.dev_rows:
        args.data_dir = cut_validation(args.data_dir, args.dev_rows, args.out / "data", args.tasks)
    make_all(args)
    print(f"next: python -m tests.benchmark.zero_tables {args.out}")


if __name__ == "__main__":
    run_study(main)
