"""Run the paper's protocol: a grid of runs, and the tables and figures that are made from them.

    python -m minisweet reproduce --model minilm-l6 --tasks sst2,mrpc --seeds 0,1,2 --lrs 5e-5,1e-4,2e-4,4e-4

The learning rate of each task and method is searched on the first seed: the rate with the largest area under the
speed-accuracy curve wins (App. A). All seeds then run at that rate. As in the paper (Sec. 4.2), a run that did not
converge (its last exit is no better than the majority class) is repeated with other seeds, here up to three.

Each run is made by train.py and evaluate.py of the clone, with the options that you would type. Finished runs are
skipped, so an interrupted grid resumes at the next call. Writes results.csv after each run, and results.md and
curves.png at the end. For a scheduler, --print prints the commands of missing runs that can start now, one per line.
"""

import argparse
import shlex
import subprocess
import sys
from collections import namedtuple
from itertools import product
from pathlib import Path

from minisweet.base.commands import Parser, list_of, one_of, positive_number, whole_number
from minisweet.base.devices import choose_device, choose_precision
from minisweet.base.files import LOG, InputError, read_json, written_beside
from minisweet.checkpoint import read_config
from minisweet.defaults import resolve, search_rates
from minisweet.hub import CLONE, home, model_folder
from minisweet.methods import METHODS
from minisweet.options import TrainingOptions
from minisweet.paper import report
from minisweet.run import EVALUATION, RECORD, is_run
from minisweet.tasks import TASKS

THRESHOLDS = 11  # of evaluate.py by default; an evaluation at others is made again
FURTHER = 3  # seeds that are tried in place of those that did not converge
SHARED = ["pooling", "exit_strategy", "train_size", "epochs", "max_length", "batch_size", "exit_layers"]  # by all runs
Slot = namedtuple("Slot", ("task", "method", "lr", "seed"))  # one training
NOTES = """
Each rate has the largest area on the first seed, measured on the rows that are scored. A run that did not converge (its
last exit is no better than the majority class) stays in results.csv; in the tables the next seed that converged takes
its place. Failed runs, as at too high a rate, have no rows.
"""


def typed(script: str, *words: object, **options: object) -> list[str]:
    """The command that runs a script of the clone. Options that are None are left out."""
    for name, value in options.items():
        if value is not None:
            words += f"--{name.replace('_', '-')}", ",".join(map(str, value)) if isinstance(value, list) else value
    return [str(word) for word in (sys.executable, CLONE / script, *words)]


class Grid:
    """The runs that the command line asks for."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.pairs = list(product(args.tasks, args.methods))
        self.complete: dict[Slot, report.Run] = {}
        self.failed: set[Slot] = set()

    def folder(self, slot: Slot) -> Path:
        """The run's folder, whose name tells the runs of a grid apart."""
        name = f"{Path(self.args.model).resolve().name}-{self.args.pooling}-{slot.method}-{slot.task}-lr{slot.lr:g}"
        name += f"-n{self.args.train_size}-seed{slot.seed}" + "-lte" * (self.args.exit_strategy == "lte")
        return self.args.runs / name

    def finished(self, slot: Slot) -> report.Run | None:
        """A run that is evaluated; None if there is none. Raises InputError if it has other options."""
        folder = self.folder(slot)
        if slot not in self.complete and is_run(folder):
            record = read_json(folder / RECORD)
            for name in ("model", *SHARED):
                if (wanted := getattr(self.args, name)) not in (None, trained := record["arguments"].get(name, wanted)):
                    raise InputError(f"{folder} was trained with {trained}, not {wanted}; name another --out", name)
            found = read_json(folder / EVALUATION) if (folder / EVALUATION).exists() else {}
            if found.get("id") == record.get("id") and len(found.get("thresholds", ())) == THRESHOLDS:
                self.complete[slot] = report.run_of(folder)
        return self.complete.get(slot)

    def search(self, pair: tuple[str, str]) -> list[Slot]:
        """The runs of the search of a task and method."""
        return [Slot(*pair, lr, self.args.seeds[0]) for lr in self.args.lrs]

    def at_best_rate(self, pair: tuple[str, str]) -> list[Slot]:
        """The runs at the best rate, and further seeds, one at a time, for those that did not converge.

        Empty until the search is complete.
        """
        search, seeds = self.search(pair), self.args.seeds
        rate = report.best_rate([run for slot in search if (run := self.finished(slot))], seeds[0])
        if rate is None or not self.are_tried(search):
            return []
        slots = [Slot(*pair, rate, seed) for seed in [*seeds, *range(max(seeds) + 1, max(seeds) + 1 + FURTHER)]]
        for count in range(len(seeds), len(slots)):
            runs = [run for slot in slots[:count] if (run := self.finished(slot))]
            if not self.are_tried(slots[:count]) or sum(run.converged for run in runs) >= len(seeds):
                return slots[:count]
        return slots

    def are_tried(self, slots: list[Slot]) -> bool:
        """Whether all of some runs are complete, or have failed."""
        return all(self.finished(slot) or slot in self.failed for slot in slots)

    def missing(self) -> list[Slot]:
        """The runs that are not complete, the search first."""
        slots = [slot for of in (self.search, self.at_best_rate) for pair in self.pairs for slot in of(pair)]
        return [slot for slot in dict.fromkeys(slots) if self.finished(slot) is None]

    def commands(self, slot: Slot) -> list[list[str]]:
        """The commands that are still needed to train and evaluate a run."""
        args = self.args
        folder = self.folder(slot)
        options = {name: getattr(args, name) for name in (*SHARED, "model", "data_dir", "device", "amp")}
        train = [] if is_run(folder) else [typed("train.py", **slot._asdict(), **options, out=folder)]
        return [*train, typed("evaluate.py", folder, device=args.device, amp=args.amp)]

    def make(self, slot: Slot) -> None:
        """Train and evaluate a run, and write results.csv, or note that it failed."""
        for command in self.commands(slot):
            if not self.finished(slot) and subprocess.run(command).returncode:
                break
        if self.finished(slot):
            report.write_runs(self.args.out / "results.csv", list(self.complete.values()))
        else:
            self.failed.add(slot)  # the others go on

    def write(self) -> None:
        """Write results.csv, and what is made of it."""
        args = self.args
        runs = list(self.complete.values())
        chosen = {}
        report.write_runs(args.out / "results.csv", runs)
        for pair in self.pairs:
            found = [run for slot in self.at_best_rate(pair) if (run := self.finished(slot))]
            chosen[pair] = report.counted(found, args.seeds)
        missing = [self.folder(slot).name for slot in self.missing()]
        unlike = [f"{run.task} {run.method} {run.rate:g} seed {run.seed}" for run in runs if not run.converged]
        text = f"# {args.model}, exit strategy {args.exit_strategy}\n\nSeeds {', '.join(map(str, args.seeds))}; up to "
        text += f"{args.train_size} examples, {args.epochs} epochs; trained in "
        text += f"{' and '.join({run.precision: 0 for run in runs})}.\n"
        text += report.tables(chosen, args.tasks, args.methods) + NOTES
        for what, names in (("Runs that did not converge", unlike), ("Missing runs", missing)):
            text += f"\n{what}: {', '.join(names) or 'none'}\n"
        with written_beside(args.out / "results.md") as new:
            new.write_text(text, encoding="utf-8")
        groups = report.with_mean(args.tasks, f"mean over {len(args.tasks)} tasks")
        panels = {title: (chosen, tasks) for title, tasks in groups.items()}
        report.draw_panels(args.out / "curves.png", panels, args.methods)
        print(f"{args.out}: results.csv, results.md, curves.png, of {len(runs)} runs; {len(missing)} missing")


def main(words: list[str]) -> None:
    """Run what is missing of the grid, and report."""
    parser = Parser(__doc__, "minisweet reproduce")
    option = parser.add_argument
    glue = [task for task in TASKS if task != "toy"]
    option("--tasks", type=list_of(one_of(*TASKS)), default=glue, help=f"default: {','.join(glue)}")
    known = f"of {', '.join(METHODS)} (default: ee,mm,sweet)"
    option("--methods", type=list_of(one_of(*METHODS)), default=["ee", "mm", "sweet"], help=known)
    about = "the first for the search (default: 0,1,2)"
    option("--seeds", type=list_of(whole_number(0)), default=[0, 1, 2], help=about)
    option("--lrs", type=list_of(positive_number), help="to search (default: the paper's; small models 5e-5 to 4e-4)")
    option("--out", type=Path, default=Path("reproduced"), help="for tables and figures (default: reproduced)")
    option("--runs", type=Path, help="for the run folders (default: OUT/runs)")
    option("--data-dir", type=Path, default=home() / "data", help="the GLUE tasks' folders (default: %(default)s)")
    option("--print", action="store_true", help="print the commands that can run now, one per line; run nothing")
    parser.add_options(TrainingOptions, "model", *SHARED, "device", "amp", epochs=2)
    args = parser.parse_args(words)
    if not (CLONE / "train.py").exists():
        raise InputError(f"{CLONE}: not a clone of the repository; train.py and evaluate.py are needed")
    args.runs = args.runs or args.out / "runs"
    config = read_config(model_folder(args.model))
    options, task = parser.make(TrainingOptions, args), args.tasks[0]
    filled = resolve(options, config, task, TASKS[task], args.train_size)
    args.lrs = args.lrs or search_rates(config)
    args.exit_layers, args.batch_size, args.pooling = filled.exit_layers, filled.batch_size, filled.pooling
    grid = Grid(args)
    if args.print:
        for slot in grid.missing():
            print(" && ".join(map(shlex.join, grid.commands(slot))))
        return
    if grid.missing():
        choose_precision(args.amp, choose_device(args.device), training=True)
    for folder in (args.runs, args.out):
        folder.mkdir(parents=True, exist_ok=True)  # an error comes now, and not after hours of training
    while todo := [slot for slot in grid.missing() if slot not in grid.failed]:
        LOG.info("%s (%d to go)", grid.folder(todo[0]).name, len(todo))
        grid.make(todo[0])
    grid.write()
    if names := ", ".join(sorted(grid.folder(slot).name for slot in grid.failed)):
        raise InputError(f"{len(grid.failed)} runs failed, see their messages above: {names}")
