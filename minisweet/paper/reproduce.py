"""Run the paper's protocol: a grid of runs, and the tables and figures that are made from them.

    python -m minisweet reproduce --model minilm-l6 --tasks sst2,mrpc --seeds 0,1,2 --lrs 5e-5,1e-4,2e-4,4e-4

The learning rate of each task and method is searched on the first seed: the rate with the largest area under the
speed-accuracy curve wins (App. A). All seeds then run at that rate. As in the paper (Sec. 4.2), a run that did not
converge (its last exit is no better than the majority class) is repeated with other seeds, here up to three.

Each run is made by train.py and evaluate.py of the clone. Finished runs are skipped, so an interrupted grid resumes at
the next call. Writes results.csv after each task and method, and results.md and curves.png at the end. For a scheduler,
--print prints the commands of missing runs that can start now, one per line.
"""

import subprocess
import sys
from argparse import Namespace
from itertools import product
from pathlib import Path
from shlex import join

from minisweet.base.commands import Parser, list_of, number, positive_number
from minisweet.base.devices import choose_device, choose_precision
from minisweet.base.files import LOG, InputError, read_json, written_beside
from minisweet.defaults import check_exit_layers, search_rates
from minisweet.exits import METHODS
from minisweet.hub import CLONE, model_folder
from minisweet.loading import read_config
from minisweet.options import WHAT, WHERE, add_training_options
from minisweet.paper import report
from minisweet.run import EVALUATION, RECORD, read_run
from minisweet.tasks import TASKS

THRESHOLDS = 11  # of evaluate.py by default
FURTHER = 3  # seeds that are tried in place of those that did not converge
NOTES = """
Each rate has the largest area on the first seed, measured on the rows that are scored. A run that did not converge (its
last exit is no better than the majority class) stays in results.csv; in the tables the next seed that converged takes
its place. Failed runs, as at too high a rate, have no rows.
"""


def words_of(args: Namespace, names: tuple[str, ...]) -> list[str]:
    """The options that the grid's runs share, as they are typed; those at their defaults are left out."""
    given = {name: getattr(args, name) for name in names if getattr(args, name) != args.defaults[name]}
    typed = {name: ",".join(map(str, value)) if isinstance(value, list) else value for name, value in given.items()}
    return [f"--{name.replace('_', '-')}={value}" for name, value in typed.items()]


def make_run(args: Namespace, task: str, method: str, lr: float, seed: int) -> report.Run | None:
    """Train and evaluate a run, or with --print print the commands, unless that has been done.

    None if it is only printed, or fails, as at too high a rate.
    """
    what = [word.strip("-").replace("/", "_") for word in words_of(args, WHAT[1:])]
    name = [Path(args.model).resolve().name, method, task, f"lr{lr:g}", f"seed{seed}", *what]
    folder = args.runs / "-".join(name)
    options = {"model": args.model, "task": task, "method": method, "lr": lr, "seed": seed, "out": folder}
    train = [sys.executable, str(CLONE / "train.py"), *(f"--{name}={value}" for name, value in options.items())]
    train += words_of(args, WHAT[1:] + WHERE)
    evaluate = [sys.executable, str(CLONE / "evaluate.py"), str(folder), *words_of(args, ("amp", *WHERE))]
    todo = [train] * (not (folder / RECORD).exists()) + [evaluate] * (not is_evaluated(folder))
    if args.print and todo:
        print(" && ".join(map(join, todo)))
    for command in () if args.print else todo:
        LOG.info("%s: %s", folder.name, Path(command[1]).name)
        if subprocess.run(command).returncode:
            args.failed.append(folder.name)
            break
    return report.run_of(folder) if is_evaluated(folder) else None


def is_evaluated(folder: Path) -> bool:
    """Whether a run's evaluation is there, is of its weights, and is the paper's, at eleven thresholds."""
    found = read_json(folder / EVALUATION) if (folder / EVALUATION).exists() else {}
    return bool(found) and found["id"] == read_run(folder).id and len(found["thresholds"]) == THRESHOLDS


def runs_of(args: Namespace, task: str, method: str) -> tuple[list[report.Run], list[report.Run]]:
    """The runs of a task and method: all of them, and those at the best rate, once the search is complete."""
    first, *others = args.seeds
    searched = [make_run(args, task, method, lr, first) for lr in args.lrs]
    found = [run for run in searched if run]
    if not found or (args.print and len(found) < len(searched)):
        return found, []
    at_best = [max(found, key=lambda run: run.area)]
    rate = at_best[0].rate
    made = [make_run(args, task, method, rate, seed) for seed in others]
    at_best += [run for run in made if run]
    for seed in range(max(args.seeds) + 1, max(args.seeds) + 1 + FURTHER):
        waits = args.print and None in made
        if not waits and sum(run.converged for run in at_best) < len(args.seeds):
            made.append(make_run(args, task, method, rate, seed))
            at_best += [run for run in made[-1:] if run]
    return found + at_best[1:], at_best


def main(words: list[str]) -> None:
    """Run what is missing of the grid, and report."""
    parser = Parser(__doc__, "minisweet reproduce")
    option = parser.add_argument
    glue = [task for task in TASKS if task != "toy"]
    option("--tasks", type=list_of(str, TASKS), default=glue, help=f"default: {','.join(glue)}")
    option("--methods", type=list_of(str, METHODS), default=["ee", "mm", "sweet"], help="default: ee,mm,sweet")
    option("--seeds", type=list_of(number(int, 0)), default=[0, 1, 2], help="the first for the search (default: 0,1,2)")
    option("--lrs", type=list_of(positive_number), help="to search (default: the paper's; small models 5e-5 to 4e-4)")
    option("--out", type=Path, default=Path("reproduced"), help="for tables and figures (default: %(default)s)")
    option("--runs", type=Path, help="for the run folders (default: OUT/runs)")
    option("--print", action="store_true", help="print the commands that can run now, one per line; run nothing")
    add_training_options(parser)
    args = parser.parse_args(words)
    args.defaults = {name: parser.get_default(name) for name in WHAT + WHERE}
    args.runs, args.failed = args.runs or args.out / "runs", []
    if not (CLONE / "train.py").exists():
        raise InputError(f"{CLONE}: not a clone of the repository; train.py and evaluate.py are needed")
    config = read_config(model_folder(args.model), args.pooling)
    check_exit_layers(args.exit_layers, config)
    choose_precision(args.amp, choose_device(args.device), training=True)
    args.lrs = args.lrs or search_rates(config)
    if not args.print:
        args.runs.mkdir(parents=True, exist_ok=True)  # an error comes now, and not after hours of training

    runs: list[report.Run] = []
    chosen: report.Chosen = {}
    for task, method in product(args.tasks, args.methods):
        found, at_best = runs_of(args, task, method)
        runs += found
        chosen[task, method] = report.counted(at_best, args.seeds)
        if not args.print:
            report.write_runs(args.out / "results.csv", runs)
    if args.print:
        return
    if not runs:
        raise InputError("all runs failed, see their messages above")
    write_results(args, runs, chosen)


def write_results(args: Namespace, runs: list[report.Run], chosen: report.Chosen) -> None:
    """Write results.md and curves.png."""
    unlike = [f"{run.task} {run.method} {run.rate:g} seed {run.seed}" for run in runs if not run.converged]
    text = f"# {args.model}, exit strategy {args.exit_strategy}\n\nSeeds {', '.join(map(str, args.seeds))}; up to "
    text += f"{args.train_size} examples; trained in {' and '.join({run.precision: 0 for run in runs})}.\n"
    text += report.tables(chosen, args.tasks, args.methods) + NOTES
    for what, names in (("Runs that did not converge", unlike), ("Failed runs", args.failed)):
        text += f"\n{what}: {', '.join(names) or 'none'}\n"
    with written_beside(args.out / "results.md") as new:
        new.write_text(text, encoding="utf-8")
    groups = report.with_mean(args.tasks, f"mean over {len(args.tasks)} tasks")
    panels = {title: (chosen, tasks) for title, tasks in groups.items()}
    report.draw_panels(args.out / "curves.png", panels, args.methods)
    print(f"{args.out}: results.csv, results.md, curves.png, of {len(runs)} runs")
