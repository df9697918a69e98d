"""The study of exits: branches, EE, SWEET and MM, with and without exit 0, on tasks of GLUE and on own text.

    python -m tests.benchmark.zero_layer --data-dir DIR --out FOLDER
    python -m tests.benchmark.zero_layer --data-dir DIR --out FOLDER/base --model mpnet-base --dev-rows 2000
        --tasks sst2,cola,own --own TRAIN.csv TEST.csv

A run of branches with exit 0 in front holds all that is made of exit 0, of branches and of full depth, since its exits
are trained apart. Its exit 0 is also put in front of EE, SWEET and MM, whose training it does not touch. Of the small
model there are also slices of one to three layers, which learn from the trunk (`--method mm --targets trunk`), and the
two models of linear.py, without early exit. FOLDER/records keeps run.json, evaluation.json and the validation logits of
each run. What is there is not made again. Processes with one FOLDER share the work: each takes what no other has taken.
Then zero_tables.py makes the tables.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from minisweet.base.commands import Parser, positive_float, whole_number
from minisweet.base.files import write_json, written_beside
from minisweet.checkpoint import read_config
from minisweet.data.tasks import TASKS as GLUE
from minisweet.data.tasks import load_examples
from minisweet.runs.folders import LOGITS
from minisweet.runs.hub import model_folder
from minisweet.runs.start import exit_layers_for
from tests.benchmark import TASKS, run_study, training
from tests.benchmark.linear import LINEAR, fit_linear

RATE = 5e-5  # of all models but the small one
RATES = {  # of 5e-5, 1e-4, 2e-4, 4e-4: the best area on seed 0's validation rows, by TASKS; own was not searched
    "branch": (1e-4, 5e-5, 1e-4, 1e-4, 1e-4, 2e-4, 2e-4),
    "ee": (4e-4, 1e-4, 2e-4, 1e-4, 5e-5, 1e-4, 2e-4),
    "sweet": (1e-4, 1e-4, 5e-5, 1e-4, 5e-5, 2e-4, 2e-4),
    "mm": (1e-4, 1e-4, 1e-4, 1e-4, 1e-4, 5e-5, 2e-4),
    "slices": (1e-4, 1e-4, 2e-4, 1e-4, 2e-4, 4e-4, 2e-4),
}


def jobs_of(args: argparse.Namespace) -> Iterator[training.Job]:
    """What the study makes, seed by seed, and last the models of linear.py.

    The trunk of the branches teaches the slices, so that one job makes both.
    """
    layers = exit_layers_for(read_config(model_folder(args.model)).num_hidden_layers)
    is_searched = args.model == training.SMALL and args.lr is None
    usual = None if args.model == training.SMALL else RATE
    suffix = "" if args.lr in (None, usual) else f"-lr{args.lr:g}".replace("e-0", "e-")
    for seed, task, method in product(args.seeds, args.tasks, ["branch", "ee", "sweet", "mm"]):
        ways = {method: {"method": method}}
        if method == "branch" and is_searched:
            trunk = training.run_of(args.out / "records" / f"{task}-{seed}-branch")
            ways["slices"] = {"method": "mm", "targets": "trunk", "trunk": trunk}
        job = {}
        for name, way in ways.items():
            rate = RATES[name][TASKS.index(task)] if is_searched else args.lr or RATE
            way |= {"model": args.model, "seed": seed, "epochs": 2, "lr": rate}
            way["exit_layers"] = [0, *layers] if name == "branch" else list(layers)
            record = args.out / "records" / f"{task}-{seed}-{name}{suffix}"
            job[record] = partial(training.train_record, args=args, task=task, **way)
        yield job
    for seed, task, kind in product(args.seeds, args.tasks, LINEAR):
        if is_searched and task in GLUE:
            record = args.out / "records" / f"{task}-{seed}-{kind}"
            yield {record: partial(make_linear, args=args, task=task, seed=seed, kind=kind)}


def make_linear(record: Path, args: argparse.Namespace, task: str, seed: int, kind: str) -> None:
    """Keep the record of a model of linear.py, which learns from the rows that the seed draws for the others too."""
    train, dev = (load_examples(task, split, args.data_dir) for split in ("train", "dev"))
    subset = np.sort(np.random.default_rng(seed).permutation(len(train.first))[: training.ROWS])
    predict, facts = fit_linear(kind, train.take(subset))
    with written_beside(record) as folder:
        folder.mkdir()
        save_file({"logits": torch.tensor(predict(dev), dtype=torch.float32)[None]}, folder / LOGITS)
        write_json(folder / "run.json", facts)


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


def main() -> None:
    """Make what is missing."""
    parser = Parser(__doc__)
    parser.add_argument("--model", default=training.SMALL)
    rates = f"one rate (default: {training.SMALL} the best of a search, else {RATE:g})"
    parser.add_argument("--lr", type=positive_float, help=rates)
    parser.add_argument("--dev-rows", type=whole_number(1), help="validation rows of a task of GLUE, at most")
    args = training.options_of(parser, TASKS[:-1])  # all but own text
    (args.out / "records").mkdir(parents=True, exist_ok=True)
    if args.dev_rows:
        args.data_dir = cut_validation(args.data_dir, args.dev_rows, args.out / "data", args.tasks)
    training.make_missing(jobs_of(args))
    print(f"next: python -m tests.benchmark.zero_tables {args.out}")


if __name__ == "__main__":
    run_study(main)
