"""Are the exits only undertrained? EE, SWEET and branches after eight epochs, on three tasks of GLUE and on own text.

    python -m tests.benchmark.eight_epochs --data-dir DIR --own TRAIN.csv TEST.csv --out FOLDER [--tasks sst2,own]

The model, the exits and the rates are those of two epochs: of FOLDER/records, which zero_layer.py makes. Seed 0 trains
at that rate and at half of it. The rate with the higher mean score of the exits after layers trains the other seeds.
Branches start from a trunk that is trained for eight epochs as well: their last exit is full depth. The records are
kept in FOLDER/eight/records, and what is there is not made again. zero_tables.py makes the table; it names the rates.
"""

from functools import partial
from itertools import product
from pathlib import Path

import numpy as np

from minisweet.base.commands import Parser
from minisweet.evaluation.plots import COLOURS, label_axes, mean_and_spread, new_figure, save_figure
from minisweet.paper.report import cells, table
from minisweet.runs.folders import read_record
from tests.benchmark import run_study, training
from tests.benchmark.records import read_rates

METHODS = {"branch": "branches", "ee": "EE", "sweet": "SWEET"}
DATA = {"sst2": "SST-2", "mrpc": "MRPC", "qnli": "QNLI", "own": "own text, twelve classes"}


def read(records: Path) -> dict[str, dict[str, dict]]:
    """By task and method, branches first: `scores` of exits (seeds, exits) at the better `rate` of seed 0, all `rates`
    of seed 0, and what `layers` the exits stand after.
    """
    found, rates = {}, read_rates(records.glob("*"))
    for task, method in product(DATA, METHODS):
        first = {rate: seeds[0] for rate, seeds in rates[method, task].items() if 0 in seeds}
        if first and (method == "branch" or task in found):
            one = next(iter(first.values()))
            layers = [n for n in one["exit_layers"] if n > 0]
            best = max(first, key=lambda rate: np.mean(first[rate]["exit_scores"][-len(layers) :]))
            scores = np.array([run["exit_scores"] for run in rates[method, task][best].values()])
            its = {"scores": scores, "rate": best, "rates": sorted(first), "layers": layers, "depth": one["depth"]}
            found.setdefault(task, {})[method] = its
    return found


def tables(found: dict[str, dict[str, dict]]) -> dict[str, str]:
    """The table of what `read` finds."""
    rows, layers = [], []
    for task, methods in found.items():
        zero, full = methods["branch"]["scores"][:, 0], methods["branch"]["scores"][:, -1]
        for method, its in methods.items():
            scores, layers = its["scores"][:, -len(its["layers"]) :], its["layers"]
            numbers = [f"{value:.1f}" for value in (*scores.mean(0), zero.mean(), full.mean())]
            less = cells(scores - zero[: len(scores), None], sign="+")  # bold: told apart
            passed = [f"{n}/{its['depth']}: {cell}" for n, cell in zip(layers, less, strict=True) if "**+" in cell]
            rates = f"{its['rate']:g} of {', '.join(f'{rate:g}' for rate in its['rates'])}"
            rows.append([DATA[task], METHODS[method], rates, len(scores), *numbers, (passed or ["none"])[0]])
    head = ["texts", "method", "rate", "seeds", *(f"after layer {n}" for n in layers), "exit 0", "full depth"]
    head += ["first exit above exit 0 (95%, over seeds)"]
    text = table("Accuracy of each exit alone after eight epochs, mean over seeds", head, rows)
    return {"eight epochs": text + "\n![Exits after eight epochs](eight-epochs.png)\n"} if rows else {}


def draw(path: Path, found: dict[str, dict[str, dict]]) -> None:
    """Draw a panel for each kind of texts: exits over the share of the layers, with 95% intervals over the seeds."""
    figure = new_figure(7.5, 6)
    for place, (task, methods) in enumerate(found.items(), start=1):
        axis = figure.add_subplot(2, 2, place)
        for name, k in (("exit 0", 0), ("full depth", -1)):
            axis.axhline(methods["branch"]["scores"][:, k].mean(), color=COLOURS[name], label=f"{name}, a plain model")
        for method, its in methods.items():
            shares = np.divide(its["layers"], its["depth"])
            mean, _, half = mean_and_spread(its["scores"][:, -len(shares) :])
            axis.errorbar(shares, mean, half, fmt=".-", capsize=2, color=COLOURS[method], label=METHODS[method])
        label_axes(axis, DATA[task], "accuracy")
    save_figure(figure, path)


def main() -> None:
    """Make what is missing: seed 0 of all tasks, and then the others."""
    args = training.options_of(Parser(__doc__), list(DATA))
    records, pairs = args.out / "eight" / "records", list(product(args.tasks, METHODS))
    records.mkdir(parents=True, exist_ok=True)
    two_epochs = {pair: read_record(args.out / "records" / "{}-0-{}".format(*pair)) for pair in pairs}

    def job(pair: tuple[str, str], seed: int, rate: float) -> training.Job:
        """One run."""
        (task, method), before = pair, two_epochs[pair]
        way = {"model": before.model, "method": method, "exit_layers": before.exit_layers}
        train = partial(training.train_record, args=args, task=task, **way, epochs=8, lr=rate, seed=seed)
        return {records / f"{task}-{seed}-{method}-{rate:g}": train}

    training.make_missing(job(pair, 0, lr) for pair in pairs for lr in (two_epochs[pair].lr, two_epochs[pair].lr / 2))
    found, others = read(records), [seed for seed in args.seeds if seed > 0]
    better = {(task, method): found[task][method]["rate"] for task, method in pairs}
    training.make_missing(job(pair, seed, better[pair]) for seed, pair in product(others, pairs))
    print(f"next: python -m tests.benchmark.zero_tables {args.out}")


if __name__ == "__main__":
    run_study(main)
