"""How many steps own text needs: full depth and area on held-out rows, by the number of training rows and of steps.

    apt-cache dumpavail > packages.txt
    python -m tests.benchmark.epochs --data-dir DIR --packages packages.txt --out FOLDER [--amp bf16]

Four tasks of own text, as train.py's --data reads them: SST-2 (single texts), QQP and MNLI (pairs, two and three
classes), and Debian's package descriptions with their section (twelve uneven classes). Of each, 1,000 rows of the
training file are held out, and 300, 1,200 and 5,000 others are trained on, at train.py's defaults but for the epochs:
here as many as make so many steps, at least two. `--on-trunk` trains branches alone, from texts without labels, on a
trunk that 5,000 further rows made (`--tasks sst2,qqp`). A run that is there is not made again, and several processes
may share FOLDER. The table is of the runs that are there; ° says that not all seeds are.
"""

import argparse
import csv
import re
import shutil
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np

from minisweet.base.commands import Parser, list_of, run_command, whole_number
from minisweet.base.safe import hold, read_json, written_beside
from minisweet.data.tasks import TASKS as GLUE
from minisweet.data.tasks import load_examples
from minisweet.runs.options import epochs_of

TASKS = ("sst2", "qqp", "mnli", "packages")
HELD, MOST, CLASSES, BATCH_SIZE = 1000, 5000, 12, 16


def packages(path: Path) -> list[list[str]]:
    """Descriptions of one line and their sections, of the twelve largest sections; a description counts once."""
    found = {}
    for paragraph in path.read_text().split("\n\n"):
        fields = dict(re.findall(r"^(Description(?:-en)?|Section): (.*)$", paragraph, re.MULTILINE))
        text = fields.get("Description-en", fields.get("Description"))
        if text and "Section" in fields:
            found.setdefault(text, fields["Section"])
    largest = [section for section, _ in Counter(found.values()).most_common(CLASSES)]
    return [[text, section] for text, section in found.items() if section in largest]


def write_rows(args: argparse.Namespace, task: str) -> None:
    """Draw the rows of a task and write them: held.csv, and for each seed what is trained on. What is there stays."""
    if task == "packages":
        rows = packages(args.packages)
    else:
        examples = load_examples(task, "train", args.data_dir)
        labels = [GLUE[task].labels[label] for label in examples.labels]
        texts = [[text] if isinstance(text, str) else list(text) for text in examples.texts()]
        rows = [[*text, label] for text, label in zip(texts, labels, strict=True)]
    head = ["text", "label"] if len(rows[0]) == 2 else ["sentence1", "sentence2", "label"]
    held = np.random.default_rng(0).permutation(len(rows))
    write_csv(args.out / f"{task}-held.csv", head, [rows[n] for n in held[:HELD]])
    for seed in args.seeds:
        order = np.random.default_rng(1 + seed).permutation(held[HELD:])
        for size in args.sizes:
            write_csv(args.out / f"{task}-{size}-{seed}.csv", head, [rows[n] for n in order[:size]])
        write_csv(args.out / f"{task}-trunk-{seed}.csv", head, [rows[n] for n in order[MOST : 2 * MOST]])


def write_csv(path: Path, head: list[str], rows: list[list[str]]) -> None:
    """A CSV file with a header, unless it is there."""
    if not path.exists():
        with written_beside(path) as partial, partial.open("w", newline="") as file:
            csv.writer(file).writerows([head, *rows])


def make(args: argparse.Namespace, name: str, *options: str) -> None:
    """Train and evaluate a run of this name, unless it is there or another process makes it."""
    folder = args.out / name
    with hold(args.out / f".{name}.maker") as is_ours:
        if not is_ours or (folder / "evaluation.json").exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        common = ["--amp", args.amp]
        for command in (["train.py", *options, "--out", str(folder)], ["evaluate.py", str(folder)]):
            subprocess.run([sys.executable, *command, *common], check=True)


def main() -> None:
    """Make what is missing and print the table."""
    parser = Parser(__doc__)
    option = parser.add_argument
    option("--data-dir", type=Path, default=Path("data"))
    option("--packages", type=Path, default=Path("packages.txt"), help="what apt-cache dumpavail prints")
    option("--out", type=Path, required=True)
    option("--tasks", type=list_of(str), default=TASKS)
    option("--sizes", type=list_of(whole_number(2)), default=[300, 1200, 5000], help="rows to train on")
    option("--steps", type=list_of(whole_number(1)), default=[100, 300, 1000, 3000])
    option("--seeds", type=list_of(whole_number(0)), default=[0, 1])
    option("--amp", default="auto")
    option("--on-trunk", action="store_true", help="branches on a trunk that is there")
    option("--report-only", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for task in () if args.report_only else args.tasks:
        write_rows(args, task)
    print("| rows | steps | " + " | ".join(f"{task}: full depth, area" for task in args.tasks) + " | mean |")
    print("|---" * (3 + len(args.tasks)) + "|")
    for size, steps in product(args.sizes, args.steps):
        scores = {}
        epochs = epochs_of(steps, size, BATCH_SIZE, least=2)
        for task, seed in product(args.tasks, args.seeds):
            own = ["--dev-data", str(args.out / f"{task}-held.csv"), "--seed", str(seed)]
            name, options = f"{task}-{size}-e{epochs}-{seed}", own
            if args.on_trunk:
                trunk = f"{task}-trunk-{seed}"
                if not args.report_only:
                    make(args, trunk, "--data", str(args.out / f"{trunk}.csv"), *own, "--exit-layers", "6")
                name, options = f"on-trunk-{name}", [*own, "--trunk", str(args.out / trunk), "--targets", "trunk"]
            if not args.report_only:
                data = str(args.out / f"{task}-{size}-{seed}.csv")
                make(args, name, "--data", data, *options, "--epochs", str(epochs))
            if (path := args.out / name / "evaluation.json").exists():
                evaluation = read_json(path)
                scores.setdefault(task, []).append([evaluation["exit_scores"][-1], evaluation["area"]])
        found = [scores.get(task, []) for task in args.tasks]
        means = [np.mean(runs, axis=0) if runs else None for runs in found]
        is_part = [len(runs) < len(args.seeds) for runs in found]
        whole = np.mean(means, axis=0) if all(found) else None
        pairs = zip([*means, whole], [*is_part, any(is_part)], strict=True)
        cells = ["" if mean is None else "{:.1f}, {:.1f}".format(*mean) + "°" * part for mean, part in pairs]
        print(f"| {size:,} | {steps:,} ({epochs} epochs) | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    run_command(main)
