"""The study of exit 0: n-grams, then full depth, beside other ways to spend a share of the layers, on six tasks.

    python -m tests.benchmark.zero_layer --data-dir DIR --out FOLDER [--tasks sst2,qnli] [--seeds 0] [--write]

A run of branches with exits 0,1,2,3,6 holds all that is made of exit 0, of branches and of full depth, since its exits
are trained apart. Its exit 0 is also put in front of EE, SWEET and MM, whose training it does not touch. Slices of one
to three layers learn from the trunk (`--method mm --targets trunk`). tests/benchmark/linear.py makes two models without
early exit. FOLDER/records keeps run.json, evaluation.json and the validation logits of each run. What is there is not
made again, and --tasks lets several processes share the work. At the end zero_tables.py prints the tables.
"""

import argparse
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from minisweet.base.commands import Parser, run_command
from minisweet.base.files import home, read_json, write_json, written_beside
from minisweet.data.tasks import load_examples
from minisweet.runs.folders import LOGITS
from tests.benchmark import keep_record
from tests.benchmark.linear import LINEAR, fit_linear
from tests.benchmark.zero_tables import TASKS, add_report_options, report

RATES = {  # of 5e-5, 1e-4, 2e-4, 4e-4: the best area on seed 0's validation rows
    "branch": (1e-4, 5e-5, 1e-4, 1e-4, 1e-4, 2e-4),
    "ee": (4e-4, 1e-4, 2e-4, 1e-4, 5e-5, 1e-4),
    "sweet": (1e-4, 1e-4, 5e-5, 1e-4, 5e-5, 2e-4),
    "mm": (1e-4, 1e-4, 1e-4, 1e-4, 1e-4, 5e-5),
    "slices": (1e-4, 1e-4, 2e-4, 1e-4, 2e-4, 4e-4),
}
ROWS = 6000  # to train on, drawn by the seed, or all where there are fewer


def make(args: argparse.Namespace, name: str, *options: str) -> None:
    """Train and evaluate a run, and keep its record."""
    run, common = args.out / "runs" / name, ["--amp", "auto"]
    train = ["train.py", *options, "--data-dir", str(args.data_dir), "--out", str(run), "--overwrite"]
    for command in (train, ["evaluate.py", str(run)]):
        subprocess.run([sys.executable, *command, *common], check=True)
    with written_beside(args.out / "records" / name) as folder:
        keep_record(run, folder)
        tensors = load_file(run / LOGITS)
        save_file(tensors | {"logits": tensors["logits"].half()}, folder / LOGITS)  # half the size; three digits do


def make_seed(args: argparse.Namespace, task: str, seed: int) -> None:
    """Make what is missing of a task and a seed, and then remove the weights."""
    records, trunk = args.out / "records", args.out / "runs" / f"{task}-{seed}-branch"
    for method, rates in RATES.items():  # the branches come first: their trunk teaches the slices
        if (records / f"{task}-{seed}-{method}").exists():
            continue
        if method == "slices" and not trunk.exists():  # the study was stopped after its weights had been removed
            shutil.rmtree(records / trunk.name)
            return make_seed(args, task, seed)
        rate, layers = rates[TASKS.index(task)], "0,1,2,3,6" if method == "branch" else "1,2,3,6"
        options = ["--task", task, "--seed", str(seed), "--train-size", str(ROWS)]
        options += ["--lr", str(rate), "--exit-layers", layers]
        taught = ["--method", "mm", "--targets", "trunk", "--trunk", str(trunk)]
        make(args, f"{task}-{seed}-{method}", *options, *(taught if method == "slices" else ["--method", method]))
    for name in LINEAR:
        if not (record := records / f"{task}-{seed}-{name}").exists():
            train, dev = (load_examples(task, split, args.data_dir) for split in ("train", "dev"))
            subset = read_json(records / trunk.name / "run.json")["subset"]  # the same rows
            predict, facts = fit_linear(name, train.take(subset))
            with written_beside(record) as folder:
                folder.mkdir()
                save_file({"logits": torch.tensor(predict(dev), dtype=torch.float32)[None]}, folder / LOGITS)
                write_json(folder / "run.json", facts)
    for run in trunk.parent.glob(f"{task}-{seed}-*"):
        shutil.rmtree(run)


def main() -> None:
    """Make what is missing, and print the tables."""
    parser = Parser(__doc__)
    parser.add_argument("--data-dir", type=Path, default=home() / "data")
    parser.add_argument("--out", type=Path, required=True)
    add_report_options(parser)
    args = parser.parse_args()
    (args.out / "records").mkdir(parents=True, exist_ok=True)
    for seed, task in product(args.seeds, args.tasks):
        make_seed(args, task, seed)
    report(args.out / "records", args.tasks, args.seeds, args.write)


if __name__ == "__main__":
    run_command(main)
