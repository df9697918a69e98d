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
from dataclasses import replace
from itertools import product
from pathlib import Path

from minisweet.base.commands import Parser, list_of, one_of, positive_number, what_to_tell, whole_number
from minisweet.base.files import LOG, InputError, written_beside
from minisweet.checkpoint import read_config
from minisweet.tasks import TASKS, search_rates
from minisweet.curve import evaluate
from minisweet.methods import METHODS
from minisweet.paper import report
from minisweet.hub import home, model_folder
from minisweet.options import TrainingOptions, resolve
from minisweet.recipe import train_task
from minisweet.record import run_name
from minisweet.resume import claim_output, is_claimed
from minisweet.run import EVALUATION, Run, is_run

Slot = namedtuple("Slot", ("task", "method", "lr", "seed"))  # one training: what tells runs apart
WAIT = 20  # seconds, until a run of another process is looked at again
SHARED = "exit_strategy train_size epochs max_length batch_size exit_layers device amp".split()  # by all runs of a grid


class Grid:
    """The runs that the command line asks for: `options` are what all have in common."""

    def __init__(self, args: argparse.Namespace, options: TrainingOptions) -> None:
        self.args, self.options = args, options
        self.pairs = list(product(args.tasks, args.methods))
        self.records: dict[Slot, dict] = {}  # of the complete runs; {} of one that diverged

    def options_of(self, run: Slot) -> TrainingOptions:
        """The options of one training."""
        return replace(self.options, method=run.method, lr=run.lr, seed=run.seed)

    def folder(self, run: Slot) -> Path:
        """The run's folder, whose name holds all that tells the runs of a grid apart."""
        return self.args.runs / run_name(self.options_of(run), run.task, in_grid=True)

    def record(self, run: Slot) -> dict | None:
        """What reports use of a run: {} if it diverged, None if it is not complete."""
        folder = self.folder(run)
        if run not in self.records and is_run(folder):
            its = Run.read(folder)
            if its.record.diverged is not None:
                self.records[run] = {}
            elif (folder / EVALUATION).exists():
                self.records[run] = vars(its.evaluation) | vars(its.record)
        return self.records.get(run)

    def search(self, task: str, method: str) -> list[Slot]:
        """The runs of the learning-rate search: one, if there is one rate."""
        return [Slot(task, method, lr, self.args.seeds[0]) for lr in self.args.lrs]

    def learning_rate(self, task: str, method: str) -> float | None:
        """The rate with the largest area; None while the search is incomplete, or if all its runs diverged."""
        if len(self.args.lrs) == 1:
            return self.args.lrs[0]
        found = {run.lr: self.record(run) for run in self.search(task, method)}
        areas = {lr: record["area"] for lr, record in found.items() if record}
        return None if None in found.values() else max(areas, key=areas.get, default=None)

    def averaged(self) -> list[Slot]:
        """The runs that the tables average over, where their learning rate is known."""
        rates = {pair: self.learning_rate(*pair) for pair in self.pairs}
        slots = product(self.pairs, self.args.seeds)
        return [Slot(*pair, rates[pair], seed) for pair, seed in slots if rates[pair] is not None]

    def missing(self) -> list[Slot]:
        """The runs that are not complete, the search first. The others follow once their rate is known."""
        runs = [run for pair in self.pairs for run in self.search(*pair)] + self.averaged()
        return [run for run in dict.fromkeys(runs) if self.record(run) is None]

    def complete(self, run: Slot) -> None:
        """Train and evaluate a run, as far as that is not done."""
        if not is_run(folder := self.folder(run)):
            with claim_output(folder, resume=True) as saved:
                train_task(self.options_of(run), run.task, self.args.data_dir, saved)
        evaluate(folder, device=self.options.device, amp=self.options.amp)


def run_all(grid: Grid) -> list[str]:
    """Run what is missing, the search first. Returns the names of the runs that failed.

    A run that another process trains is passed over, and comes again at the end.
    """
    failed: list[Slot] = []
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
            LOG.warning("%s: %s", grid.folder(run).name, what_to_tell(error))
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
    options, where = grid.options, "; ".join(trained_on) or "nothing yet"
    text = f"# {args.model}, exit strategy {options.exit_strategy}\n\nSeeds {', '.join(map(str, args.seeds))}; up to "
    text += f"{options.train_size} examples, {options.epochs} epochs; trained on: {where}.\n"
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
    option("--model", default="minilm-l6", help="a preset, a folder or a hub id (default: minilm-l6)")
    option("--tasks", type=list_of(one_of(*TASKS)), default=glue, help=f"default: {','.join(glue)}")
    known = f"of {', '.join(METHODS)} (default: ee,mm,sweet)"
    option("--methods", type=list_of(one_of(*METHODS)), default=["ee", "mm", "sweet"], help=known)
    option("--seeds", type=list_of(whole_number(0)), default=[0, 1, 2], help="the first searches (default: 0,1,2)")
    option("--lrs", type=list_of(positive_number), help="to search (default: the paper's; small models 5e-5 to 4e-4)")
    option("--out", type=Path, default=Path("reproduced"), help="for tables and figures (default: reproduced)")
    option("--runs", type=Path, help="for the run folders (default: OUT/runs)")
    option("--data-dir", type=Path, default=home() / "data", help="the GLUE tasks' folders (default: %(default)s)")
    parser.add_options(TrainingOptions, *SHARED, train_size=6000, epochs=2)
    args = parser.parse_args()
    args.runs = args.runs or args.out / "runs"
    options = parser.make(TrainingOptions, args, method="sweet")
    config = read_config(model_folder(args.model))
    options = replace(options, batch_size=resolve(options, config, args.tasks[0]).batch_size)
    args.lrs = args.lrs or search_rates(config)
    grid = Grid(args, options)
    for folder in (args.runs, args.out):
        folder.mkdir(parents=True, exist_ok=True)  # an error comes now, and not after hours of training
    failed = run_all(grid)
    write_report(grid)
    if failed:
        raise InputError(f"{len(failed)} runs failed, see their messages above: {', '.join(failed)}")
