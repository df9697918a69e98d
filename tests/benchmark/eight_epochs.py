"""Are the exits only undertrained? EE, SWEET and branches after eight epochs, on three tasks of GLUE and on own text.

    python -m tests.benchmark.eight_epochs --data-dir DIR --own TRAIN.csv TEST.csv --out FOLDER [--tasks sst2,own]
    python -m tests.benchmark.eight_epochs --out FOLDER --report-only [--write]

Seed 0 trains at the rate that is best for two epochs, and at half of it. The rate with the higher mean score of exits
1, 2, 3 and 6 trains seeds 1 and 2. Branches start from a trunk that is trained for eight epochs as well: their last
exit is full depth. FOLDER/records keeps each run's records, and what is there is not made again.
"""

import argparse
from itertools import product
from pathlib import Path

import numpy as np

from minisweet.base.commands import Parser, list_of, one_of, run_command
from minisweet.base.files import read_json
from minisweet.evaluation.plots import COLOURS, label_axes, new_figure, save_figure
from minisweet.paper.report import cells, table
from minisweet.runs.folders import EVALUATION
from tests.benchmark import RESULTS, show, zero_layer
from tests.benchmark.zero_layer import RATES
from tests.benchmark.zero_tables import LAYERS, TASKS

METHODS = {"branch": "branches", "ee": "EE", "sweet": "SWEET"}
DATA, OWN_RATE = {"sst2": "SST-2", "mrpc": "MRPC", "qnli": "QNLI", "own": "own text, twelve classes"}, 2e-4


def make(args: argparse.Namespace, task: str, method: str, seed: int, rate: float) -> float:
    """Make a record where it is missing. Returns the mean score of exits 1, 2, 3 and 6."""
    name = f"{task}-{seed}-{method}-{rate:g}"
    if not (args.out / "records" / name).exists():
        rows = ["--task", task, "--train-size", "6000", "--data-dir", args.data_dir]
        if task == "own":
            rows = ["--data", args.own[0], "--dev-data", args.own[1]]
        layers = "0,1,2,3,6" if method == "branch" else "1,2,3,6"
        options = ["--method", method, "--exit-layers", layers, "--epochs", 8, "--lr", rate, "--seed", seed]
        zero_layer.make(args, name, *map(str, rows + options))
    return float(np.mean(scores_of(args.out / "records" / name)[-len(LAYERS) :]))


def scores_of(record: Path) -> list[float]:
    """The scores of a run's exits."""
    return read_json(record / EVALUATION)["exit_scores"]


def read(records: Path) -> dict[str, dict[str, np.ndarray]]:
    """Scores of exits by task and method, (seeds, exits), at the better rate of seed 0; branches first."""
    found = {}
    for task, method in product(DATA, METHODS):
        runs = {tuple(path.name.split("-", 3)[1:]): scores_of(path) for path in records.glob(f"{task}-*-{method}-*")}
        first = {rate: np.mean(scores[-4:]) for (seed, _, rate), scores in runs.items() if seed == "0"}
        if first and (method == "branch" or task in found):
            best = [scores for (_, _, rate), scores in sorted(runs.items()) if rate == max(first, key=first.get)]
            found.setdefault(task, {})[method] = np.array(best)
    return found


def tables(found: dict[str, dict[str, np.ndarray]]) -> dict[str, str]:
    """The table of what `read` finds."""
    rows = []
    for task, methods in found.items():
        zero, full = methods["branch"][:, 0], methods["branch"][:, -1]
        for method, scores in methods.items():
            numbers = [f"{value:.1f}" for value in (*scores[:, -4:].mean(0), zero.mean(), full.mean())]
            less = cells(scores[:, -4:] - zero[: len(scores), None], sign="+")  # bold: told apart
            passed = [f"{n}/6: {cell}" for n, cell in zip(LAYERS, less, strict=True) if cell.startswith("**+")]
            rows.append([DATA[task], METHODS[method], len(scores), *numbers, (passed or ["none"])[0]])
    head = ["texts", "method", "seeds", *(f"after layer {n}" for n in LAYERS), "exit 0", "full depth"]
    head += ["first exit above exit 0 (95%, over seeds)"]
    text = table("Accuracy of each exit alone after eight epochs, mean over seeds", head, rows)
    return {"eight epochs": text + ("\n![Exits after eight epochs](eight-epochs.png)\n" if rows else "")}


def draw(path: Path, found: dict[str, dict[str, np.ndarray]]) -> None:
    """Draw a panel for each kind of texts: exits over the share of the layers, with bars over the seeds."""
    figure = new_figure(7.5, 6)
    for place, (task, methods) in enumerate(found.items(), start=1):
        axis = figure.add_subplot(2, 2, place)
        for name, k in (("exit 0", 0), ("full depth", -1)):
            axis.axhline(methods["branch"][:, k].mean(), color=COLOURS[name], label=f"{name}, a plain model")
        for method, scores in methods.items():
            mean, name = scores[:, -4:].mean(0), METHODS[method]
            reach = np.abs([scores[:, -4:].min(0), scores[:, -4:].max(0)] - mean)
            axis.errorbar(np.divide(LAYERS, 6), mean, reach, fmt=".-", color=COLOURS[method], label=name)
        label_axes(axis, DATA[task], "accuracy")
    save_figure(figure, path)


def main() -> None:
    """Make what is missing, and report it."""
    parser = Parser(__doc__)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--own", type=Path, nargs=2)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", type=list_of(one_of(DATA)), default=list(DATA))
    parser.add_argument("--report-only", action="store_true")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    (args.out / "records").mkdir(parents=True, exist_ok=True)
    runs = [] if args.report_only else list(product(args.tasks, METHODS))
    rates = {(task, method): OWN_RATE if task == "own" else RATES[method][TASKS.index(task)] for task, method in runs}
    better = {}
    for run, rate in rates.items():
        scores = {one: make(args, *run, 0, one) for one in (rate, rate / 2)}
        better[run] = max(scores, key=scores.get)
    for seed, (run, rate) in product((1, 2), better.items()):  # a study that is stopped has all tasks at seed 0
        make(args, *run, seed, rate)
    found = read(args.out / "records")
    show(tables(found), args.write)
    if args.write and found:
        draw(RESULTS / "eight-epochs.png", found)


if __name__ == "__main__":
    run_command(main)
