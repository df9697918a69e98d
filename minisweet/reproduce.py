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
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minisweet.cli import (
    InputError,
    Parser,
    list_of,
    one_of,
    positive_float,
    read_json,
    run_command,
    whole_number,
    write_json,
    written_beside,
)
from minisweet.defaults import EXIT_LAYERS, default_batch_size, search_rates
from minisweet.exits import EXIT_STRATEGIES, METHODS
from minisweet.report import did_not_converge, document, draw_curves, load_pyplot, one_class_layers, results_of
from minisweet.runs import DIVERGED, method_arguments, method_name, read_record
from minisweet.tasks import TASKS
from train import add_training_options, find_model

SCRIPTS = Path(__file__).parent.parent  # where train.py and evaluate.py are
ELSEWHERE = "name another --out or --runs"
THRESHOLDS = 11  # Sec. 3.3
# What reports use of evaluation.json.
EVALUATION = ("exit_scores", "class_counts", "thresholds", "speedup_ratios", "scores", "area", "calibration")
RETRIES, RETRY_STEP = 3, 1000  # a run that did not converge is repeated with its seed + 1000, + 2000, + 3000


class Run(NamedTuple):
    """One training: what tells the runs of a grid apart."""

    task: str
    method: str
    train_size: int
    lr: float
    seed: int

    def options(self) -> dict:
        """The options of train.py that make it, None for those not given."""
        return self._asdict() | method_arguments(self.method)


def method_setting(text: str) -> str:
    """An argparse type: a method, or SWEET with gradient over its boundaries, as `method_name` writes it."""
    try:
        return method_name(method_arguments(text))
    except ValueError:
        names = f"{', '.join(METHODS)}, sweet-flow0.5 (0 to 1), sweet-cap1, sweet-owner1"
        raise argparse.ArgumentTypeError(f"{text!r} is none of {names}") from None


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
        """run.json and what reports use of evaluation.json, or None for a run that is not complete.

        Raises InputError for a folder that holds a run of other settings, or a broken one.
        """
        if run in self.records:
            return self.records[run]
        folder, args = self.folder(run), self.args
        if not (folder / "run.json").exists():
            return None
        record = read_record(folder)
        self.check_settings(run, record["arguments"] | {"exit_strategy": record["exit_strategy"]})
        layers = list(args.exit_layers or EXIT_LAYERS.get(record["depth"], record["exit_layers"]))
        if record["exit_layers"] != layers:
            raise InputError(f"{folder}: a run with exits after {record['exit_layers']}, not {layers}; {ELSEWHERE}")
        evaluation = read_json(folder / "evaluation.json") if (folder / "evaluation.json").exists() else {}
        if not set(EVALUATION) <= set(evaluation):
            return None  # not evaluated, or before there were all of these
        if evaluation["calibration"] != "crossfit" or len(evaluation["thresholds"]) != THRESHOLDS:
            return None  # evaluated by hand in another way
        record |= {key: evaluation[key] for key in EVALUATION}
        if not is_whole(record):
            raise InputError(f"{folder}: not a whole run; delete it, and it will be made again")
        self.records[run] = record
        return record

    def check_settings(self, run: Run, arguments: dict) -> None:
        """Raise InputError unless a run was trained with these arguments as the command line has them."""
        expected = run.options() | {"batch_size": self.args.batch_size or default_batch_size(self.args.model)}
        expected |= {key: getattr(self.args, key) for key in ("model", "epochs", "max_length", "exit_strategy")}
        for key, value in expected.items():
            if arguments.get(key) != value:
                raise InputError(f"{self.folder(run)}: a run with {key} {arguments.get(key)}, not {value}; {ELSEWHERE}")

    def is_lost(self, run: Run) -> bool:
        """Whether the run's loss became infinite or NaN, so that train.py saved no model."""
        path = self.folder(run) / DIVERGED
        if path.exists():
            self.check_settings(run, read_json(path)["arguments"])
        return path.exists()

    def failed_to_learn(self, run: Run) -> bool:
        """Whether the run is over and did not converge."""
        record = self.record(run)
        return self.is_lost(run) or (record is not None and did_not_converge(record))

    def search(self, task: str, method: str) -> list[Run]:
        """The runs of the learning-rate search; one, if there is one rate."""
        return [Run(task, method, self.args.train_sizes[0], lr, self.args.seeds[0]) for lr in self.args.lrs]

    def learning_rate(self, task: str, method: str) -> float | None:
        """The rate with the largest area under the curve; None before the search is complete."""
        runs = self.search(task, method)
        if len(runs) == 1:
            return runs[0].lr
        runs = [run for run in runs if not self.is_lost(run)]
        if not runs or any(self.record(run) is None for run in runs):
            return None
        return max(runs, key=lambda run: self.record(run)["area"]).lr

    def early_exits_failed(self, method: str) -> list[tuple[int, int]]:
        """For each rate of the search, how many exits before the last predict one class, and of how many."""
        failed = []
        for searched in zip(*(self.search(task, method) for task in self.args.tasks), strict=True):
            records = [record for run in searched if (record := self.record(run))]
            early = [set(record["exit_layers"][:-1]) for record in records]
            stuck = [len(layers & set(one_class_layers(record))) for layers, record in zip(early, records, strict=True)]
            failed.append((sum(stuck), sum(map(len, early))))
        return failed

    def attempts(self, task: str, method: str, train_size: int, seed: int) -> list[Run]:
        """The run of a seed at the rate found, and with --retry-diverged those that repeat it.

        Empty before the search is complete.
        """
        lr = self.learning_rate(task, method)
        if lr is None:
            return []
        runs = [Run(task, method, train_size, lr, seed)]
        while self.args.retry_diverged and len(runs) <= RETRIES and self.failed_to_learn(runs[-1]):
            runs.append(runs[0]._replace(seed=seed + RETRY_STEP * len(runs)))
        return runs

    def wanted(self) -> list[Run]:
        """Every run whose settings are known by now, the search first."""
        runs = [run for pair in product(self.args.tasks, self.args.methods) for run in self.search(*pair)]
        for train_size, task, method, seed in self.slots():
            runs += self.attempts(task, method, train_size, seed)
        return list(dict.fromkeys(runs))  # the search's runs are some of the others too

    def slots(self) -> Iterator[tuple[int, str, str, int]]:
        """What the tables average over: (training size, task, method, seed)."""
        yield from product(self.args.train_sizes, self.args.tasks, self.args.methods, self.args.seeds)

    def missing(self) -> list[Run]:
        """The runs that are known and not complete."""
        return [run for run in self.wanted() if self.record(run) is None and not self.is_lost(run)]

    def commands(self, run: Run) -> list[list[str]]:
        """The command lines that complete a run, from the folder of train.py."""
        args, folder = self.args, str(self.folder(run))
        device = ["--device", args.device, "--amp", args.amp]
        evaluate = ["evaluate.py", folder, "--data-dir", str(args.data_dir), *device]
        if (self.folder(run) / "run.json").exists():
            return [evaluate]
        train = ["train.py", "--model", args.model, "--out", folder, "--exit-strategy", args.exit_strategy, *device]
        options = run.options() | {"data_dir": args.data_dir, "epochs": args.epochs, "max_length": args.max_length}
        options["batch_size"] = args.batch_size
        options["exit_layers"] = args.exit_layers and ",".join(map(str, args.exit_layers))
        for name, value in options.items():
            if value is not None:
                train += [f"--{name.replace('_', '-')}", str(value)]
        return [train, evaluate]


def is_whole(record: dict) -> bool:
    """Whether the numbers that reports use are there, in the right shapes."""
    K = len(record["exit_layers"])
    try:
        shapes = {key: np.array(record[key], dtype=float).shape for key in (*EVALUATION[:-1], "losses")}
    except (TypeError, ValueError):
        return False
    curve = {shapes[key] for key in ("thresholds", "speedup_ratios", "scores")}
    return (
        curve == {(THRESHOLDS,)}
        and (shapes["exit_scores"], shapes["area"]) == ((K,), ())
        and (len(shapes["class_counts"]), len(shapes["losses"])) == (2, 2)
        and (shapes["class_counts"][0], shapes["losses"][1]) == (K, K)
    )


def run_all(grid: Grid) -> list[str]:
    """Run what is missing, the search first. Returns the names of the runs that failed."""
    failed: list[str] = []
    while todo := [run for run in grid.missing() if grid.folder(run).name not in failed]:
        name = grid.folder(todo[0]).name
        print(f"{name} ({len(todo)} to go)", flush=True)
        for script, *arguments in grid.commands(todo[0]):
            if subprocess.run([sys.executable, str(SCRIPTS / script), *arguments]).returncode:
                break
        if todo[0] in grid.missing():  # not made by another process either
            failed.append(name)
    return failed


def write_report(grid: Grid) -> None:
    """Write results.md, results.json and the figures from the runs that are there."""
    args = grid.args
    tables: dict[int, dict] = {n: {m: {t: {} for t in args.tasks} for m in args.methods} for n in args.train_sizes}
    missing = [grid.folder(run).name for run in grid.missing()]
    repeated = {}
    for train_size, task, method, seed in grid.slots():
        attempts = grid.attempts(task, method, train_size, seed)
        over = [run for run in attempts if grid.record(run) or grid.is_lost(run)]
        if over:  # a run that is being repeated counts, marked, until its repetition is there
            tables[train_size][method][task][seed] = grid.record(over[-1])
        if len(attempts) > 1:
            repeated[grid.folder(attempts[0]).name] = [grid.folder(run).name for run in attempts[1:]]
        if not attempts and all(grid.is_lost(run) for run in grid.search(task, method)):
            tables[train_size][method][task][seed] = None
            missing.append(f"{method} {task} n{train_size} seed{seed}: no learning rate converged")
        elif not attempts and (train_size, seed) != (args.train_sizes[0], args.seeds[0]):
            missing.append(f"{method} {task} n{train_size} seed{seed}, once its learning rate is known")
    wanted = grid.wanted()
    done = {grid.folder(run).name: grid.record(run) for run in wanted if grid.record(run)}
    lost = [grid.folder(run).name for run in wanted if grid.is_lost(run)]

    size = args.train_sizes[0]
    results = {
        "model": args.model,
        "exit_strategy": args.exit_strategy,
        "seeds": args.seeds,
        "train_size": size,
        "epochs": args.epochs,
        "rates_searched": args.lrs,
        "learning_rates": {
            method: {task: grid.learning_rate(task, method) for task in args.tasks} for method in args.methods
        },
        "early_exits_failed": {method: grid.early_exits_failed(method) for method in args.methods},
        **results_of(tables[size]),
        "missing": missing,
        "did_not_converge": [name for name, record in done.items() if did_not_converge(record)] + lost,
        "one_class": {name: layers for name, record in done.items() if (layers := one_class_layers(record))},
        "repeated": repeated,
        "trained_on": sorted({f"{record['device']}, {record['precision']}" for record in done.values()}),
        "by_train_size": {str(n): results_of(tables[n]) for n in args.train_sizes[1:]},
        "runs": {name: {key: record[key] for key in EVALUATION} for name, record in done.items()},
    }
    write_json(args.out / "results.json", results)
    with written_beside(args.out / "results.md") as partial:
        partial.write_text(document(results), encoding="utf-8")
    title = f"{Path(args.model).name}, mean over {len(args.tasks)} tasks" if len(args.tasks) > 1 else args.tasks[0]
    figures = {"curves.png": [(title, tables[size], args.tasks)]}
    if len(args.tasks) > 1:
        figures["tasks.png"] = [(task, tables[size], [task]) for task in args.tasks]
    if len(args.train_sizes) > 1:
        sizes = sorted(args.train_sizes)
        figures["sizes.png"] = [(f"up to {n} training examples", tables[n], args.tasks) for n in sizes]
    for name in ("curves.png", "tasks.png", "sizes.png"):
        (args.out / name).unlink(missing_ok=True)  # one of other tables would mislead
        if name in figures:
            draw_curves(args.out / name, figures[name])
    print(f"{args.out}: results.md, results.json and figures, of {len(done)} runs; {len(missing)} missing")


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = Parser(description="Run the paper's grid; make its tables and figures.")
    option = parser.add_argument
    glue = [task for task in TASKS if task != "toy"]
    option("--tasks", type=list_of(one_of(TASKS)), default=glue, help=f"default: {','.join(glue)}")
    option("--methods", type=list_of(method_setting), default=["ee", "mm", "sweet"], help="default: ee,mm,sweet")
    option(
        "--seeds", type=list_of(whole_number(0)), default=[0, 1, 2], help="the first for the search (default: 0,1,2)"
    )
    option(
        "--lrs",
        type=list_of(positive_float),
        help="to search (default: the paper's five; minilm-l6: 5e-5 to 4e-4)",
    )
    option(
        "--train-sizes", type=list_of(whole_number(1)), default=[6000], help="the first for the search (default: 6000)"
    )
    option("--exit-strategy", choices=EXIT_STRATEGIES, default="confidence", help="or learning-to-exit, lte")
    option("--epochs", type=whole_number(1), default=2, help="passes over the training set (default: 2)")
    option("--out", type=Path, default=Path("reproduced"), help="for tables and figures (default: reproduced)")
    option("--runs", type=Path, help="for the run folders, which several reports may share (default: OUT/runs)")
    instead = parser.add_mutually_exclusive_group().add_argument
    instead("--print-commands", action="store_true", help="print a command line per missing run, and run nothing")
    instead("--report-only", action="store_true", help="make tables and figures of what is there, and run nothing")
    option("--retry-diverged", action="store_true", help="repeat runs that did not converge with another seed")
    add_training_options(parser)
    args = parser.parse_args()
    args.runs = args.runs or args.out / "runs"
    args.lrs = args.lrs or search_rates(args.model)
    if args.retry_diverged and len({seed % RETRY_STEP for seed in args.seeds}) < len(args.seeds):
        raise InputError(f"--seeds: with --retry-diverged two seeds must not differ by a multiple of {RETRY_STEP}")
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
    args.out.mkdir(parents=True, exist_ok=True)  # try now what is needed after hours of training
    load_pyplot(args.out / "curves.png")
    if (args.out / "results.json").exists():
        there = read_json(args.out / "results.json")
        for key in ("model", "exit_strategy"):
            if there.get(key) != getattr(args, key):
                raise InputError(f"--out: {args.out} holds results of {key} {there.get(key)}; name another folder")
    if not args.report_only:
        find_model(args)
        failed = run_all(grid)
    write_report(grid)
    if failed:
        raise InputError(f"{len(failed)} runs failed, see their messages above: {', '.join(failed)}")


if __name__ == "__main__":
    run_command(main)
