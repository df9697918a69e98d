"""Are the exits only undertrained? EE, SWEET and branches after eight epochs, on three tasks of GLUE and on own text.

    python -m tests.benchmark.eight_epochs --data-dir DIR --own TRAIN.csv TEST.csv --out FOLDER [--tasks sst2,own]

The model, the exits and the rates are those of two epochs: of FOLDER/records, which zero_layer.py makes. Seed 0 trains
at that rate and at half of it. The rate with the higher mean score of the exits after layers trains the other seeds.
Branches start from a trunk that is trained for eight epochs as well: their last exit is full depth. The records are
kept in FOLDER/eight/records, and what is there is not made again. zero_tables.py makes the table; it names the rates.
"""

from itertools import product
from pathlib import Path

import numpy as np

from minisweet.base.commands import Parser
from minisweet.base.files import read_json
from minisweet.evaluation.plots import COLOURS, label_axes, mean_and_spread, new_figure, save_figure
from minisweet.paper.report import cells, table
from minisweet.runs.folders import EVALUATION, read_record
from tests.benchmark import run_study
from tests.benchmark.zero_layer import add_options, make

METHODS = {"branch": "branches", "ee": "EE", "sweet": "SWEET"}
DATA = {"sst2": "SST-2", "mrpc": "MRPC", "qnli": "QNLI", "own": "own text, twelve classes"}


def scores_of(record: Path) -> list[float]:
    """The scores of a run's exits after layers; of branches exit 0's comes first."""
    return read_json(record / EVALUATION)["exit_scores"]


def read(records: Path) -> dict[str, dict[str, dict]]:
    """By task and method, branches first: `scores` of exits (seeds, exits) at the better `rate` of seed 0, all `rates`
    of seed 0, and what `layers` the exits stand after.
    """
    found: dict[str, dict[str, dict]] = {}
    for task, method in product(DATA, METHODS):
        runs = {tuple(path.name.split("-", 3)[1::2]): path for path in sorted(records.glob(f"{task}-*-{method}-*"))}
        if first := {rate: path for (seed, rate), path in runs.items() if seed == "0"}:
            record = read_record(next(iter(first.values())))
            layers = [n for n in record.exit_layers if n > 0]
            best = max(first, key=lambda rate: np.mean(scores_of(first[rate])[-len(layers) :]))
            scores = np.array([scores_of(path) for (_, rate), path in runs.items() if rate == best])
            its = {"scores": scores, "rate": best, "rates": sorted(first, key=float), "layers": layers}
            found.setdefault(task, {})[method] = its | {"depth": record.depth}
    return {task: methods for task, methods in found.items() if "branch" in methods}


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
            rates = f"{its['rate']} of {', '.join(its['rates'])}"
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
    """Make what is missing."""
    parser = Parser(__doc__)
    add_options(parser, list(DATA))
    args = parser.parse_args()
    records, better = args.out / "eight" / "records", {}
    records.mkdir(parents=True, exist_ok=True)
    for seed, task, method in product(args.seeds, args.tasks, METHODS):  # when it is stopped, all tasks have seed 0
        two_epochs = read_record(args.out / "records" / f"{task}-0-{method}")
        args.model, exits = two_epochs.model, ",".join(map(str, two_epochs.exit_layers))
        rates = [two_epochs.lr, two_epochs.lr / 2] if seed == args.seeds[0] else [better[task, method]]
        scores = {}
        for rate in rates:
            record = records / f"{task}-{seed}-{method}-{rate:g}"
            options = ["--method", method, "--exit-layers", exits, "--epochs", 8, "--lr", rate, "--seed", seed]
            if not record.exists():
                make(args, record, task, *options)
            scores[rate] = np.mean(scores_of(record)[1 if method == "branch" else 0 :])
        better.setdefault((task, method), max(scores, key=scores.get))
    print(f"next: python -m tests.benchmark.zero_tables {args.out}")


if __name__ == "__main__":
    run_study(main)
