"""The paper's protocol by command: a grid of runs, and the tables and figures that it gives.

    python -m minisweet.reproduce --model minilm-l6 --tasks sst2,mrpc --seeds 0,1,2 --lrs 5e-5,1e-4,2e-4,4e-4

For each task and method the learning rate is searched on the first seed (and the first training size): the one with the
largest area under the speed-accuracy curve (App. A). All seeds and training sizes then run at that rate. Each run is a
folder made by train.py and evaluate.py; what is complete is skipped, so that a stopped grid goes on where it was.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

from minisweet.cli import InputError, Parser, read_json, run_command, whole_number, write_json, written_beside
from minisweet.defaults import default_batch_size, search_rates
from minisweet.exits import EXIT_STRATEGIES, METHODS
from minisweet.report import did_not_converge, draw_curves, markdown, one_class_layers, results_of
from minisweet.runs import read_record
from minisweet.tasks import TASKS
from train import add_training_options, find_model, positive_float

SCRIPTS = Path(__file__).parent.parent  # where train.py and evaluate.py are
EVALUATION = ("exit_scores", "class_counts", "thresholds", "speedup_ratios", "scores", "area")  # what reports use of it
RETRIES, RETRY_STEP = 3, 1000  # a run that did not converge is repeated with its seed + 1000, + 2000, + 3000


class Run(NamedTuple):
    """One training: what tells the runs of a grid apart."""

    task: str
    method: str
    train_size: int
    lr: float
    seed: int


class Grid:
    """The runs that the command line asks for, and what is there of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.records: dict[Run, dict] = {}  # of the complete runs that were read

    def folder(self, run: Run) -> Path:
        """The run's folder."""
        strategy = "-lte" if self.args.exit_strategy == "lte" else ""
        name = f"{Path(self.args.model).resolve().name}-{run.method}-{run.task}-lr{run.lr:g}-n{run.train_size}"
        return self.args.runs / f"{name}-seed{run.seed}{strategy}"

    def record(self, run: Run) -> dict | None:
        """run.json and evaluation.json in one, or None for a run that is not complete.

        Raises InputError for a folder that holds a run of other settings.
        """
        if run in self.records:
            return self.records[run]
        folder, args = self.folder(run), self.args
        if not (folder / "run.json").exists():
            return None
        record = read_record(folder)
        settings = {"epochs": args.epochs, "max_length": args.max_length} | run._asdict()
        settings["batch_size"] = args.batch_size or default_batch_size(args.model)
        for name, value in settings.items():
            if record["arguments"].get(name) != value:
                raise InputError(
                    f"{folder}: a run with {name} {record['arguments'].get(name)}, not {value}; name another --out"
                )
        if args.exit_layers and record["exit_layers"] != list(args.exit_layers):
            raise InputError(f"{folder}: a run with exits after {record['exit_layers']}; name another --out")
        evaluation = read_json(folder / "evaluation.json") if (folder / "evaluation.json").exists() else {}
        if not set(EVALUATION) <= set(evaluation):
            return None  # not evaluated, or before there were all of these
        self.records[run] = record | evaluation
        return self.records[run]

    def search(self, task: str, method: str) -> list[Run]:
        """The runs of the learning-rate search; one, if there is one rate."""
        return [Run(task, method, self.args.train_sizes[0], lr, self.args.seeds[0]) for lr in self.args.lrs]

    def learning_rate(self, task: str, method: str) -> float | None:
        """The rate with the largest area under the curve; None before the search is complete."""
        runs = self.search(task, method)
        if len(runs) == 1:
            return runs[0].lr
        if any(self.record(run) is None for run in runs):
            return None
        return max(runs, key=lambda run: self.record(run)["area"]).lr

    def attempts(self, task: str, method: str, train_size: int, seed: int) -> list[Run]:
        """The run of a seed at the rate found, and with --retry-diverged those that replace it: the last one counts.

        Empty before the search is complete.
        """
        lr = self.learning_rate(task, method)
        if lr is None:
            return []
        runs = [Run(task, method, train_size, lr, seed)]
        while self.args.retry_diverged and len(runs) <= RETRIES:
            record = self.record(runs[-1])
            if record is None or not did_not_converge(record):
                break
            runs.append(runs[0]._replace(seed=seed + RETRY_STEP * len(runs)))
        return runs

    def wanted(self) -> Iterator[Run]:
        """Every run whose settings are known by now, some of them twice."""
        for task, method in product(self.args.tasks, self.args.methods):
            yield from self.search(task, method)
        for train_size, task, method, seed in self.slots():
            yield from self.attempts(task, method, train_size, seed)

    def slots(self) -> Iterator[tuple[int, str, str, int]]:
        """What the tables average over: (training size, task, method, seed)."""
        yield from product(self.args.train_sizes, self.args.tasks, self.args.methods, self.args.seeds)

    def missing(self) -> list[Run]:
        """The runs that are known and not complete."""
        return [run for run in dict.fromkeys(self.wanted()) if self.record(run) is None]

    def commands(self, run: Run) -> list[list[str]]:
        """The command lines that complete a run, from the folder of train.py."""
        args, folder = self.args, str(self.folder(run))
        device = ["--device", args.device, "--amp", args.amp]
        evaluate = ["evaluate.py", folder, "--data-dir", str(args.data_dir), *device]
        if (self.folder(run) / "run.json").exists():
            return [evaluate]
        train = ["train.py", "--model", args.model, "--out", folder, "--exit-strategy", args.exit_strategy, *device]
        options = run._asdict() | {"data_dir": args.data_dir, "epochs": args.epochs, "max_length": args.max_length}
        options["batch_size"] = args.batch_size
        options["exit_layers"] = args.exit_layers and ",".join(map(str, args.exit_layers))
        for name, value in options.items():
            if value is not None:
                train += [f"--{name.replace('_', '-')}", str(value)]
        return [train, evaluate]


def run_all(grid: Grid) -> list[str]:
    """Run what is missing, the search first. Returns the names of the runs that failed."""
    failed: list[str] = []
    while todo := [run for run in grid.missing() if grid.folder(run).name not in failed]:
        name = grid.folder(todo[0]).name
        print(f"{name} ({len(todo)} to go)", flush=True)
        for script, *arguments in grid.commands(todo[0]):
            if subprocess.run([sys.executable, str(SCRIPTS / script), *arguments]).returncode:
                failed.append(name)
                break
    return failed


def write_report(grid: Grid) -> None:
    """Write results.md, results.json and the figures from the runs that are there."""
    args = grid.args
    tables: dict[int, dict] = {n: {m: {t: {} for t in args.tasks} for m in args.methods} for n in args.train_sizes}
    missing, used, repeated = [], {}, {}
    for train_size, task, method, seed in grid.slots():
        attempts = grid.attempts(task, method, train_size, seed)
        record = grid.record(attempts[-1]) if attempts else None
        if record is None:
            rate = f" lr{attempts[-1].lr:g}" if attempts else ", learning rate not known yet"
            missing.append(f"{method} {task} n{train_size} seed{attempts[-1].seed if attempts else seed}{rate}")
            continue
        tables[train_size][method][task][seed] = record
        used[grid.folder(attempts[-1]).name] = record
        if len(attempts) > 1:
            repeated[grid.folder(attempts[0]).name] = grid.folder(attempts[-1]).name
    for task, method in product(args.tasks, args.methods):
        if grid.learning_rate(task, method) is None:
            searched = [run for run in grid.search(task, method) if grid.record(run) is None]
            missing += [f"{method} {task} lr{run.lr:g} (search)" for run in searched]

    size = args.train_sizes[0]
    results = {
        "model": args.model,
        "exit_strategy": args.exit_strategy,
        "seeds": args.seeds,
        "train_size": size,
        "epochs": args.epochs,
        "learning_rates": {
            method: {task: grid.learning_rate(task, method) for task in args.tasks} for method in args.methods
        },
        **results_of(tables[size]),
        "missing": missing,
        "did_not_converge": [name for name, record in used.items() if did_not_converge(record)],
        "one_class": {name: layers for name, record in used.items() if (layers := one_class_layers(record))},
        "repeated": repeated,
        "computed_on": sorted({f"{record['device']}, {record['precision']}" for record in used.values()}),
        "by_train_size": {str(n): results_of(tables[n]) for n in args.train_sizes[1:]},
        "runs": {
            grid.folder(run).name: {key: grid.record(run)[key] for key in EVALUATION}
            for run in dict.fromkeys(grid.wanted())
            if grid.record(run)
        },
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "results.json", results)
    with written_beside(args.out / "results.md") as partial:
        partial.write_text(document(results, args), encoding="utf-8")
    title = f"{Path(args.model).name}, mean over {len(args.tasks)} tasks" if len(args.tasks) > 1 else args.tasks[0]
    draw_curves(args.out / "curves.png", [(title, tables[size], args.tasks)])
    if len(args.tasks) > 1:
        draw_curves(args.out / "tasks.png", [(task, tables[size], [task]) for task in args.tasks])
    if len(args.train_sizes) > 1:
        panels = [(f"{n} training examples", tables[n], args.tasks) for n in sorted(args.train_sizes)]
        draw_curves(args.out / "sizes.png", panels)
    print(f"{args.out}: results.md, results.json and figures, of {len(used)} runs; {len(missing)} missing")


def document(results: dict, args: argparse.Namespace) -> str:
    """results.md."""
    seeds = ", ".join(map(str, args.seeds))
    lines = [
        f"# {args.model}, exit strategy {args.exit_strategy}: {args.train_sizes[0]} training examples, seeds {seeds}",
        "",
        f"Computed on: {'; '.join(results['computed_on']) or 'nothing yet'}.",
        "",
        "### Learning rates: largest area under the speed-accuracy curve on the first seed",
        "",
        f"| method | {' | '.join(args.tasks)} |",
        "|---" * (1 + len(args.tasks)) + "|",
    ]
    for method, rates in results["learning_rates"].items():
        lines.append(f"| {method} | {' | '.join(f'{r:g}' if r else '' for r in rates.values())} |")
    text = "\n".join(lines) + "\n" + markdown(results)
    for size, tables in results["by_train_size"].items():
        text += f"\n## {size} training examples\n{markdown(tables)}"
    text += "\n### What to know of these runs\n\n"
    for key, what in (
        ("did_not_converge", "Runs that did not converge"),
        ("one_class", "Runs with exits that predict one class (their layers)"),
        ("repeated", "Runs that did not converge and were repeated with another seed"),
        ("missing", "Missing runs"),
    ):
        items = results[key].items() if isinstance(results[key], dict) else [(name, "") for name in results[key]]
        text += f"{what}: {len(items)}\n\n" + "".join(f"- {name} {value}".rstrip() + "\n" for name, value in items)
        text += "\n" if items else ""
    return text


def list_of(parse: Callable[[str], object]) -> Callable[[str], list]:
    """An argparse type: values that differ, with commas between them."""

    def parse_all(text: str) -> list:
        values = [parse(part) for part in text.split(",")]
        if len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(f"{text!r} names a value twice")
        return values

    return parse_all


def one_of(names) -> Callable[[str], str]:
    """An argparse type: one of some names."""

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)}")
        return text

    return parse


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = Parser(prog="minisweet.reproduce", description="Run the paper's grid; make its tables and figures.")
    option = parser.add_argument
    glue = [task for task in TASKS if task != "toy"]
    option("--tasks", type=list_of(one_of(TASKS)), default=glue, help=f"default: {','.join(glue)}")
    option("--methods", type=list_of(one_of(METHODS)), default=["ee", "mm", "sweet"], help="default: ee,mm,sweet")
    option(
        "--seeds", type=list_of(whole_number(0)), default=[0, 1, 2], help="the first for the search (default: 0,1,2)"
    )
    option("--lrs", type=list_of(positive_float), help="learning rates to search (default: the paper's five)")
    option(
        "--train-sizes", type=list_of(whole_number(1)), default=[6000], help="the first for the search (default: 6000)"
    )
    option("--exit-strategy", choices=EXIT_STRATEGIES, default="confidence", help="or learning-to-exit, lte")
    option("--epochs", type=whole_number(1), default=2, help="passes over the training set (default: 2)")
    option("--out", type=Path, default=Path("reproduced"), help="for tables and figures (default: reproduced)")
    option("--runs", type=Path, help="for the run folders, which several reports may share (default: OUT/runs)")
    option("--print-commands", action="store_true", help="print a command line per missing run, and run nothing")
    option("--report-only", action="store_true", help="make tables and figures of what is there, and run nothing")
    option("--retry-diverged", action="store_true", help="repeat runs that did not converge with another seed")
    add_training_options(parser)
    args = parser.parse_args()
    args.runs = args.runs or args.out / "runs"
    args.lrs = args.lrs or search_rates(args.model)
    return args


def main() -> None:
    """Run the grid, or print its commands, or report what is there."""
    args = parse_arguments()
    grid = Grid(args)
    failed: list[str] = []
    if args.print_commands:
        for run in grid.missing():
            print(" && ".join(shlex.join(["python", *command]) for command in grid.commands(run)))
        return
    if not args.report_only:
        find_model(args)  # what no run could do without
        failed = run_all(grid)
    write_report(grid)
    if failed:
        raise InputError(f"{len(failed)} runs failed, see their messages above: {', '.join(failed)}")


if __name__ == "__main__":
    run_command(main)
