"""Run the paper's protocol: a grid of runs, and the tables and figures that are made from them.

    python -m minisweet reproduce --model minilm-l6 --tasks sst2,mrpc --seeds 0,1,2 --lrs 5e-5,1e-4,2e-4,4e-4

The learning rate of each task and method is searched on the first seed: the rate with the largest area under the
speed-accuracy curve wins (App. A). All seeds then run at that rate. Nothing is kept but the run folders, as train.py
and evaluate.py make them, so a stopped grid goes on where it was. Several processes may share a grid: a run belongs to
the process that trains it.
"""

import argparse
import time
from collections import namedtuple
from itertools import product
from pathlib import Path

from minisweet.base.commands import Parser, list_of, positive_float, told, whole_number
from minisweet.base.files import LOG, InputError, written_beside
from minisweet.data.tasks import TASKS, search_rates
from minisweet.evaluation.evaluate import evaluate
from minisweet.methods import METHODS
from minisweet.paper import report
from minisweet.runs import start
from minisweet.runs.folders import EVALUATION, is_run, run_name
from minisweet.runs.hub import home
from minisweet.runs.load import read_evaluation, read_record
from minisweet.runs.resume import is_claimed
from minisweet.runs.train import train

Run = namedtuple("Run", ("task", "method", "lr", "seed"))  # one training: what tells runs apart
WAIT = 20  # seconds, until a run of another process is looked at again
# Options of a training. --resume compares them, so that a grid's own, such as --seeds, are not among them.
TRAINING = ("out", "resume", *Run._fields, "train_size", "model", "epochs", "max_length", "batch_size", "exit_layers")
TRAINING += ("exit_strategy", "data_dir", "device", "amp", "class_weights", "dev_size")


class Grid:
    """The runs that the command line asks for."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.pairs = list(product(args.tasks, args.methods))
        self.records: dict[Run, dict] = {}  # of the complete runs; {} of one that diverged

    def folder(self, run: Run) -> Path:
        """The run's folder, whose name holds all that tells the runs of a grid apart."""
        return self.args.runs / run_name(vars(self.args) | run._asdict(), in_grid=True)

    def record(self, run: Run) -> dict | None:
        """What reports use of a run: {} if it diverged, None if it is not complete."""
        folder = self.folder(run)
        if run not in self.records and is_run(folder):
            record = read_record(folder)
            if record.diverged is not None:
                self.records[run] = {}
            elif (folder / EVALUATION).exists():
                self.records[run] = vars(read_evaluation(folder)) | vars(record)
        return self.records.get(run)

    def search(self, task: str, method: str) -> list[Run]:
        """The runs of the learning-rate search: one, if there is one rate."""
        return [Run(task, method, lr, self.args.seeds[0]) for lr in self.args.lrs]

    def learning_rate(self, task: str, method: str) -> float | None:
        """The rate with the largest area; None while the search is incomplete, or if all its runs diverged."""
        if len(self.args.lrs) == 1:
            return self.args.lrs[0]
        found = {run.lr: self.record(run) for run in self.search(task, method)}
        areas = {lr: record["area"] for lr, record in found.items() if record}
        return None if None in found.values() else max(areas, key=areas.get, default=None)

    def averaged(self) -> list[Run]:
        """The runs that the tables average over, where their learning rate is known."""
        rates = {pair: self.learning_rate(*pair) for pair in self.pairs}
        slots = product(self.pairs, self.args.seeds)
        return [Run(*pair, rates[pair], seed) for pair, seed in slots if rates[pair] is not None]

    def missing(self) -> list[Run]:
        """The runs that are not complete, the search first. The others follow once their rate is known."""
        runs = [run for pair in self.pairs for run in self.search(*pair)] + self.averaged()
        return [run for run in dict.fromkeys(runs) if self.record(run) is None]

    def complete(self, run: Run) -> None:
        """Train and evaluate a run, as far as that is not done."""
        if not is_run(folder := self.folder(run)):
            given = vars(self.args) | run._asdict() | {"out": folder, "resume": True}
            options = argparse.Namespace(**{name: given[name] for name in TRAINING}, overwrite=False)
            train(options, start.task_data(run.task, self.args.data_dir))
        evaluate(folder, device=self.args.device, amp=self.args.amp)


def run_all(grid: Grid) -> list[str]:
    """Run what is missing, the search first. Returns the names of the runs that failed.

    A run that another process trains is passed over, and comes again at the end.
    """
    failed: list[Run] = []
    while todo := [run for run in grid.missing() if run not in failed]:
        free = [run for run in todo if not is_claimed(grid.folder(run))]
        if not free:
            LOG.info("waiting for %s, which another process makes", grid.folder(todo[0]).name)
            time.sleep(WAIT)
            continue
        run = free[0]
        LOG.info("%s (%d to go)", grid.folder(run).name, len(todo))
        try:
            grid.complete(run)
        except Exception as error:  # the others go on
            LOG.warning("%s: %s", grid.folder(run).name, told(error))
            if grid.record(run) is None and not is_claimed(grid.folder(run)):  # else it diverged, or another has it
                failed.append(run)
    return [grid.folder(run).name for run in failed]


def write_report(grid: Grid) -> None:
    """Write results.md and the figures from the runs that are complete."""
    args, several = grid.args, len(grid.args.tasks) > 1
    missing = [grid.folder(run).name for run in grid.missing()]
    records = {method: {task: {} for task in args.tasks} for method in args.methods}
    for run in grid.averaged():
        if record := grid.record(run):  # not so of a run that diverged
            records[run.method][run.task][run.seed] = record
    with written_beside(args.out / "results.md") as new:
        new.write_text(document(grid, records, missing), encoding="utf-8")
    figures = {"curves.png": {f"mean over {', '.join(args.tasks)}": args.tasks}}
    figures |= {"tasks.png": {task: [task] for task in args.tasks}} if several else {}
    for name, panels in figures.items():
        report.draw_curves(args.out / name, records, panels)
    print(f"{args.out}: {', '.join(['results.md', *figures])}, of {len(grid.records)} runs; {len(missing)} missing")


def document(grid: Grid, records: dict[str, report.Records], missing: list[str]) -> str:
    """The text of results.md, from records by method and the names of missing runs."""
    args = grid.args
    complete = {grid.folder(run).name: record for run, record in grid.records.items()}
    trained_on = sorted({f"{record['device']}, {record['precision']}" for record in complete.values() if record})
    text = (
        f"# {args.model}, exit strategy {args.exit_strategy}\n\nSeeds {', '.join(map(str, args.seeds))}; up to "
        f"{args.train_size} examples, {args.epochs} epochs; trained on: {'; '.join(trained_on) or 'nothing yet'}.\n"
    )
    rates = {method: [grid.learning_rate(task, method) for task in args.tasks] for method in args.methods}
    rows = [[method, *("" if rate is None else f"{rate:g}" for rate in found)] for method, found in rates.items()]
    text += report.table("Learning rates: of several, that of the largest area", ["method", *args.tasks], rows)
    text += report.tables(records)
    diverged = [name for name, record in complete.items() if not record]
    text += "\n### What to know of these runs\n\n"
    for what, lines in (("Runs whose loss became infinite or NaN", diverged), ("Missing runs", missing)):
        text += f"{what}: {len(lines)}\n\n" + "".join(f"- {line}\n" for line in lines) + "\n" * bool(lines)
    return text


def main() -> None:
    """Run what is missing of the grid, and report."""
    parser = Parser(__doc__)
    option = parser.add_argument
    glue = [task for task in TASKS if task != "toy"]
    option("--tasks", type=list_of(str, TASKS), default=glue, help=f"default: {','.join(glue)}")
    known = f"of {', '.join(METHODS)} (default: ee,mm,sweet)"
    option("--methods", type=list_of(str, METHODS), default=["ee", "mm", "sweet"], help=known)
    option("--seeds", type=list_of(whole_number(0)), default=[0, 1, 2], help="the first searches (default: 0,1,2)")
    option("--lrs", type=list_of(positive_float), help="to search (default: the paper's; small models 5e-5 to 4e-4)")
    option("--train-size", type=whole_number(1), default=6000, help="examples, drawn by the seed (default: 6000)")
    option("--out", type=Path, default=Path("reproduced"), help="for tables and figures (default: reproduced)")
    option("--runs", type=Path, help="for the run folders (default: OUT/runs)")
    option("--data-dir", type=Path, default=home() / "data", help="the GLUE tasks' folders (default: %(default)s)")
    start.add_training_options(parser)
    parser.set_defaults(epochs=2, class_weights=None, dev_size=None)
    args = parser.parse_args()
    args.runs = args.runs or args.out / "runs"
    grid = Grid(args)
    _, config, _, args.batch_size = start.find_model(args, "sweet")
    args.lrs = args.lrs or search_rates(config)
    for folder in (args.runs, args.out):
        folder.mkdir(parents=True, exist_ok=True)  # an error comes now, and not after hours of training
    failed = run_all(grid)
    write_report(grid)
    if failed:
        raise InputError(f"{len(failed)} runs failed, see their messages above: {', '.join(failed)}")
