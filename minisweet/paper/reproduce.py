"""The paper's protocol by command: a grid of runs, and the tables and figures that it gives.

    python -m minisweet.reproduce --model minilm-l6 --tasks sst2,mrpc --seeds 0,1,2 --lrs 5e-5,1e-4,2e-4,4e-4

What the grid's runs are, and which of them are missing, is worked out in grid.py. Each run is a folder made by train.py
and evaluate.py; what is complete is skipped. The command may be started several times on one folder, on several
machines too if their file system shares its locks (flock): each run is made once.
"""

import argparse
import os
import re
import shlex
import time
from pathlib import Path

from minisweet.data.own import DATA_DIR
from minisweet.data.tasks import TASKS
from minisweet.exits import EXIT_STRATEGIES, METHODS
from minisweet.files.commands import Parser, list_of, one_of, positive_float, run_command, whole_number
from minisweet.files.safe import InputError, load_pyplot, read_json, write_json, written_beside
from minisweet.paper.grid import EVALUATION, RETRY_STEP, Grid, claimed, run_script
from minisweet.paper.report import did_not_converge, document, draw_curves, one_class_layers, results_of
from minisweet.training.options import add_training_options, find_model, search_rates

FILES = ("results.md", "curves.png", "tasks.png", "sizes.png")  # beside results.json, which names those it wrote


def method_setting(text: str) -> str:
    """An argparse type: a method, or one of those that commit fc57fa9 had, such as sweet-flow0.5 or sweet-owner1."""
    if text not in METHODS and not re.fullmatch(r"sweet-(flow|cap|owner)[0-9][0-9.e+-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(METHODS)}")
    return text


def run_all(grid: Grid) -> list[str]:
    """Run what is missing, the search first, but for what other processes make. Returns which runs failed, by name."""
    failed, waits, start = set(), False, time.monotonic()
    before = len(grid.wanted()) - len(grid.missing())
    while todo := [run for run in grid.missing() if run not in failed]:
        for run in todo:
            with claimed(grid.folder(run)) as is_ours:
                if is_ours and grid.is_missing(run):  # no other process made it meanwhile
                    done = len(grid.wanted()) - len(todo) - before  # by all processes, since this one began
                    minutes = (time.monotonic() - start) / 60 / max(done, 1) * len(todo)
                    eta = f", about {minutes:.0f} min" if done > 0 else ""
                    print(f"{grid.name(run)} ({len(todo)} to go{eta})", flush=True)
                    any(
                        run_script(script, options) for script, *options in grid.commands(run)
                    )  # none after one that fails
                    if grid.is_missing(run):
                        failed.add(run)
            if is_ours:
                break  # what is missing now may have changed
        else:
            if not waits:
                print(f"{len(todo)} runs are being made by other processes; waiting for them", flush=True)
            waits = True
            time.sleep(1)
    return [grid.name(run) for run in grid.missing() if run in failed]


def check_output(args: argparse.Namespace) -> None:
    """Raise InputError where --out holds other results, or a file that a report would replace and did not write."""
    path = args.out / "results.json"
    there = read_json(path) if os.path.lexists(path) else {}
    for key in ("model", "exit_strategy"):
        if there and there.get(key) != getattr(args, key):
            raise InputError(f"--out: {args.out} holds results of {key} {there.get(key)}; name another folder")
    ours = there.get("files") if isinstance(there.get("files"), list) else []
    for path in (args.out / name for name in FILES):
        if os.path.lexists(path) and (path.name not in ours or path.is_dir()):
            raise InputError(f"--out: {path} is not of this command (results.json does not name it); move it away")


def write_report(grid: Grid) -> None:
    """Write results.md, results.json and the figures from the runs that are there."""
    args = grid.args
    check_output(args)
    size, tasks, methods, sizes = args.train_sizes[0], args.tasks, args.methods, args.train_sizes
    tables: dict[int, dict] = {n: {method: {task: {} for task in tasks} for method in methods} for n in sizes}
    missing, repeated = [grid.name(run) for run in grid.missing()], {}
    for n, task, method, seed in grid.slots():
        attempts, of_method = grid.attempts(task, method, n, seed), tables[n][method][task]
        over = [run for run in attempts if grid.record(run) or grid.is_lost(run)]
        if over:  # a run that is being repeated counts, marked, until its repetition is there
            of_method[seed] = grid.record(over[-1])
        if len(attempts) > 1:
            repeated[grid.name(attempts[0])] = [grid.name(run) for run in attempts[1:]]
        if not attempts and all(grid.is_lost(run) for run in grid.search(task, method)):
            of_method[seed] = None
            missing.append(f"{method} {task} n{n} seed{seed}: no learning rate converged")
        elif not attempts and (n, seed) != (size, args.seeds[0]):
            missing.append(f"{method} {task} n{n} seed{seed}, once its learning rate is known")
    wanted = grid.wanted()
    done = {grid.name(run): record for run in wanted if (record := grid.record(run))}
    lost = [grid.name(run) for run in wanted if grid.is_lost(run)]

    title = f"{Path(args.model).name}, mean over {len(tasks)} tasks" if len(tasks) > 1 else tasks[0]
    figures = {"curves.png": [(title, tables[size], tasks)]}
    if len(tasks) > 1:
        figures["tasks.png"] = [(task, tables[size], [task]) for task in tasks]
    if len(sizes) > 1:
        figures["sizes.png"] = [(f"up to {n} training examples", tables[n], tasks) for n in sorted(sizes)]
    results = {
        **{key: getattr(args, key) for key in ("model", "exit_strategy", "seeds")},
        "train_size": size,
        "epochs": args.epochs,
        "rates_searched": args.lrs,
        "learning_rates": {method: {task: grid.learning_rate(task, method) for task in tasks} for method in methods},
        "early_exits_failed": {method: grid.early_exits_failed(method) for method in methods},
        **results_of(tables[size]),
        "missing": missing,
        "did_not_converge": [name for name, record in done.items() if did_not_converge(record)] + lost,
        "one_class": {name: layers for name, record in done.items() if (layers := one_class_layers(record))},
        "repeated": repeated,
        "trained_on": sorted({f"{record['device']}, {record['precision']}" for record in done.values()}),
        "by_train_size": {str(n): results_of(tables[n]) for n in sizes[1:]},
        "runs": {name: {key: record[key] for key in EVALUATION} for name, record in done.items()},
        "files": ["results.md", *figures],
    }
    for name in set(FILES) - set(results["files"]):
        (args.out / name).unlink(missing_ok=True)  # one of other tables would mislead
    write_json(args.out / "results.json", results)  # first, since it tells that the others are ours
    with written_beside(args.out / "results.md") as partial:
        partial.write_text(document(results), encoding="utf-8")
    for name, panels in figures.items():
        draw_curves(args.out / name, panels)
    print(f"{args.out}: results.md, results.json and figures, of {len(done)} runs; {len(missing)} missing")


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = Parser(description="Run the paper's grid; make its tables and figures.")
    option = parser.add_argument
    glue = [task for task in TASKS if task != "toy"]
    option("--tasks", type=list_of(one_of(TASKS)), default=glue, help=f"default: {','.join(glue)}")
    methods = ["ee", "mm", "sweet"]
    option("--methods", type=list_of(method_setting), default=methods, help="or branch (default: ee,mm,sweet)")
    option("--seeds", type=list_of(whole_number(0)), default=[0, 1, 2], help="first the search's (default: 0,1,2)")
    option("--lrs", type=list_of(positive_float), help="to search (default: the paper's five; minilm-l6: 5e-5 to 4e-4)")
    option("--train-sizes", type=list_of(whole_number(1)), default=[6000], help="first the search's (default: 6000)")
    option("--exit-strategy", choices=EXIT_STRATEGIES, default="confidence", help="or learning-to-exit, lte")
    option("--epochs", type=whole_number(1), default=2, help="passes over the training set (default: 2)")
    option("--out", type=Path, default=Path("reproduced"), help="for tables and figures (default: reproduced)")
    option("--runs", type=Path, help="for the run folders, which several reports may share (default: OUT/runs)")
    instead = parser.add_mutually_exclusive_group().add_argument
    instead("--print-commands", action="store_true", help="print a command line per missing run, and run nothing")
    instead("--report-only", action="store_true", help="make tables and figures of what is there, and run nothing")
    option("--retry-diverged", action="store_true", help="repeat runs that did not converge with another seed")
    option("--data-dir", type=Path, default=DATA_DIR, help="holds the GLUE tasks' folders (default: %(default)s)")
    add_training_options(parser)
    args = parser.parse_args()
    args.runs = args.runs or args.out / "runs"
    args.lrs = args.lrs or search_rates(args.model)
    if old := [method for method in args.methods if method not in METHODS and not args.report_only]:
        raise InputError(f"--methods: {old[0]} is of commit fc57fa9; here its runs are only reported (--report-only)")
    if args.retry_diverged and len({seed % RETRY_STEP for seed in args.seeds}) < len(args.seeds):
        raise InputError(f"--seeds: with --retry-diverged two seeds must not differ by a multiple of {RETRY_STEP}")
    return args


def main() -> None:
    """Run the grid, or print its commands, or report what is there."""
    args = parse_arguments()
    grid, failed = Grid(args), []
    if args.print_commands:
        for run in grid.missing():
            print(" && ".join(shlex.join(["python", *command]) for command in grid.commands(run)))
        return
    try:
        args.out.mkdir(parents=True, exist_ok=True)  # try now what is needed after hours of training
    except OSError as error:
        raise InputError(f"--out: {args.out} cannot be a folder ({error.strerror})") from None
    load_pyplot(args.out / "curves.png")
    check_output(args)
    if not args.report_only:
        find_model(args)
        failed = run_all(grid)
    write_report(grid)
    if failed:
        raise InputError(f"{len(failed)} runs failed, see their messages above: {', '.join(failed)}")


if __name__ == "__main__":
    run_command(main)
