"""The paper's protocol by command: a grid of runs, and the tables and figures that it gives.

    python -m minisweet.reproduce --model minilm-l6 --tasks sst2,mrpc --seeds 0,1,2 --lrs 5e-5,1e-4,2e-4,4e-4

A learning rate is searched for each task and method on the first seed (and the first training size): the one with the
largest area under the speed-accuracy curve (App. A). All seeds and training sizes then run at that rate. Nothing is
kept but the run folders of train.py and evaluate.py, so that a stopped grid goes on where it was. Several processes may
make one grid, on several machines too if their file system shares its locks (flock): each run is made once.
"""

import argparse
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections import namedtuple
from functools import lru_cache
from itertools import product
from pathlib import Path

from minisweet.base import devices
from minisweet.base.commands import Parser, list_of, one_of, positive_float, run_command, whole_number
from minisweet.base.safe import LOG, InputError, clone, hold, home, read_json, write_json, written_beside
from minisweet.branches import METHODS
from minisweet.data.load import digest, drawn_rows
from minisweet.data.tasks import TASKS, load_examples
from minisweet.exits import EXIT_STRATEGIES
from minisweet.paper import report
from minisweet.paper.report import Records, did_not_converge, one_class_layers
from minisweet.runs import options
from minisweet.runs.folders import method_name, read_diverged, read_evaluation, read_record, run_name
from minisweet.runs.records import Arguments, Curve, Record
from minisweet.use.plots import new_figure

Run = namedtuple("Run", ("task", "method", "train_size", "lr", "seed"))  # one training: what tells runs apart
SCRIPTS = Path(__file__).parents[2]  # where train.py and evaluate.py are
ELSEWHERE = "name another --out or --runs"
THRESHOLDS = 11  # Sec. 3.3
# What reports use of evaluation.json.
EVALUATION = ("exit_scores", "class_counts", "thresholds", "speedup_ratios", "scores", "area", "calibration")
RETRIES, RETRY_STEP = 3, 1000  # a run that did not converge is repeated with its seed + 1000, + 2000, + 3000
FILES = ("results.md", "curves.png", "tasks.png", "sizes.png")  # beside results.json, which names those it wrote
SHARED = ("data_dir", "device", "amp")  # options of train.py and evaluate.py
TRAINING = ("out", *Run._fields, "model", "epochs", "max_length", "batch_size", "exit_layers", "exit_strategy", *SHARED)


class Grid:
    """The runs that the command line asks for, by their folders: what is wanted, what is there, what is missing."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        slots = product(args.train_sizes, args.tasks, args.methods, args.seeds)
        self.slots = [Run(task, method, n, None, seed) for n, task, method, seed in slots]  # what tables average over
        self.records: dict[Run, dict] = {}  # of the runs that are made
        self.rows: dict[tuple, tuple[str, Path]] = {}  # which rows to their digest, and the folder that has them
        self.load = lru_cache(maxsize=2)(load_examples)
        self.precision = {}  # any, where runs are only reported or their commands printed, perhaps not for here
        if args.amp != "auto" or not (args.report_only or args.print_commands):
            device = devices.choose_device(args.device if args.amp == "auto" else "cpu")
            self.precision = {"precision": str(devices.choose_precision(args.amp, device) or "torch.float32")}

    def folder(self, run: Run) -> Path:
        return self.args.runs / run_name(vars(self.args) | run._asdict(), in_grid=True)

    def record(self, run: Run) -> dict | None:
        """What reports use of a run; None for one that is not complete, {} for one whose loss became infinite or NaN.

        Raises InputError for a folder that holds a run of other settings or rows, or a broken one.
        """
        if run in self.records:
            return self.records[run]
        folder = self.folder(run)
        if lost := read_diverged(folder):
            self.check_settings(run, lost, {})
            self.records[run] = {}
        elif (folder / "run.json").exists():
            record = read_record(folder)
            layers = self.args.exit_layers or options.exit_layers_for(record.depth)
            wanted = {"exit_layers": list(layers), **self.precision}
            self.check_settings(run, record, wanted)
            wanted["calibration"], curve = "crossfit", read_evaluation(folder, record, Curve)
            # Else not evaluated, or by hand in another way.
            if curve and wanted.items() <= vars(curve).items() and len(curve.thresholds) == THRESHOLDS:
                self.check_rows(run, record)
                self.records[run] = vars(record) | {key: getattr(curve, key) for key in EVALUATION}
        return self.records.get(run)

    def check_settings(self, run: Run, arguments: Arguments, wanted: dict) -> None:
        """Raise InputError unless a run was trained with the command line's arguments and what else is wanted."""
        has = vars(arguments) | {"method": method_name(vars(arguments))}
        keys = ("epochs", "max_length", "batch_size", "exit_strategy") + ("model",) * (arguments.trunk is None)
        for key, value in (run._asdict() | {key: getattr(self.args, key) for key in keys} | wanted).items():
            if has[key] != value and not (key == "batch_size" and value is None):  # of a report
                raise InputError(f"{self.folder(run)}: a run with {key} {has[key]}, not {value}; {ELSEWHERE}")

    def check_rows(self, run: Run, record: Record) -> None:
        """Raise InputError for a run on other rows than those of --data-dir, or for a report than another run's."""
        read = run.task == "toy" or (self.args.data_dir / TASKS[run.task].folder).is_dir()
        for split, *drawn_by in (("train", run.train_size, run.seed), ("dev",)):
            unlabelled = split == "train" and record.targets == "trunk"
            rows = (run.task, split, *drawn_by, unlabelled)
            if (told := getattr(record, f"{split}_digest")) is None:
                continue  # a record of the archives
            if read and rows not in self.rows and not self.args.report_only:
                data = self.load(run.task, split, self.args.data_dir)
                drawn = drawn_rows(data, *drawn_by) if drawn_by else None
                self.rows[rows] = (digest(data, drawn), self.args.data_dir)
            known, where = self.rows.setdefault(rows, (told, self.folder(run)))
            if known != told:
                raise InputError(f"{self.folder(run)}: a run on other {split} rows than {where}; {ELSEWHERE}")

    def search(self, task: str, method: str) -> list[Run]:
        """The runs of the learning-rate search; one, if there is one rate."""
        return [Run(task, method, self.args.train_sizes[0], lr, self.args.seeds[0]) for lr in self.args.lrs]

    def learning_rate(self, task: str, method: str) -> float | None:
        """The rate with the largest area under the curve; None before the search is complete, or if all are lost."""
        if len(self.args.lrs) == 1:
            return self.args.lrs[0]
        found = {run.lr: self.record(run) for run in self.search(task, method)}
        areas = {lr: record["area"] for lr, record in found.items() if record}
        return None if None in found.values() else max(areas, key=areas.get, default=None)

    def early_exits_failed(self, method: str, lr: float) -> tuple[int, int]:
        """How many exits before the last predict one class at this rate of the search, and of how many."""
        runs = [run for task in self.args.tasks for run in self.search(task, method) if run.lr == lr]
        records = [record for run in runs if (record := self.record(run))]
        stuck = [n in one_class_layers(record) for record in records for n in record["exit_layers"][:-1]]
        return sum(stuck), len(stuck)

    def attempts(self, slot: Run) -> list[Run]:
        """The run of a slot, and with --retry-diverged those that repeat it; none before the search is complete."""
        lr = self.learning_rate(slot.task, slot.method)
        runs = [] if lr is None else [slot._replace(lr=lr)]
        while runs and self.args.retry_diverged and len(runs) <= RETRIES:
            if (record := self.record(runs[-1])) is None or not did_not_converge(record):
                break
            runs.append(runs[0]._replace(seed=slot.seed + RETRY_STEP * len(runs)))
        return runs

    def wanted(self) -> list[Run]:
        """Every run whose settings are known by now, the search first."""
        runs = [run for pair in product(self.args.tasks, self.args.methods) for run in self.search(*pair)]
        runs += [run for slot in self.slots for run in self.attempts(slot)]
        return list(dict.fromkeys(runs))  # the search's runs are some of the others too

    def missing(self) -> list[Run]:
        """Those of them that are not made."""
        return [run for run in self.wanted() if self.record(run) is None]

    def commands(self, run: Run) -> list[list[str]]:
        """The command lines that complete a run, from the folder of train.py."""
        values = vars(self.args) | run._asdict() | {"out": self.folder(run)}
        train = ["train.py", *as_options(values, TRAINING), "--resume"]
        evaluate = ["evaluate.py", str(self.folder(run)), *as_options(values, SHARED)]
        return [evaluate] if (self.folder(run) / "run.json").exists() else [train, evaluate]


def need_clone() -> None:
    """Raise InputError where the package is installed, without train.py and evaluate.py."""
    if clone() is None:
        raise InputError("train.py: not here, and it is run, so this needs a clone of the repository; call it there")


def as_options(values: dict[str, object], names: tuple[str, ...]) -> list[str]:
    """The command-line options of these names; those that have no value are left out."""
    words = []
    for name in names:
        if (value := values.get(name)) is not None:
            text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            words += [f"--{name.replace('_', '-')}", text]
    return words


def run_script(script: str, arguments: list[str]) -> int:
    """Run train.py or evaluate.py as a process, which ends when this one is told to. Returns its exit status."""
    process = subprocess.Popen([sys.executable, str(SCRIPTS / script), *arguments], close_fds=False)  # see `pass_on`
    try:
        return process.wait()
    except SystemExit:  # SIGTERM reached this process alone; Ctrl-C reaches both
        process.terminate()
        raise
    finally:
        process.wait()


def pass_on(claim: int) -> None:
    """Pass a claim on to the script that makes the run: if this process is killed, it lasts until that has ended."""
    os.set_inheritable(claim, True)
    os.write(claim, f"{platform.node()} {os.getpid()} {time.ctime()}\n".encode())  # for people


def run_all(grid: Grid) -> list[str]:
    """Run what is missing, the search first, but for what other processes make. Returns which runs failed, by name.

    Who makes a run claims it meanwhile, by a locked file beside its folder.
    """
    grid.missing()  # reads what is there
    grid.args.runs.mkdir(parents=True, exist_ok=True)
    failed, waits, start, before = [], False, time.monotonic(), len(grid.records)
    while todo := [run for run in grid.missing() if run not in failed]:
        for run in todo:
            claim = grid.args.runs / f".{grid.folder(run).name}.maker"
            with hold(claim, on_acquired=pass_on) as is_ours:
                if is_ours and grid.record(run) is None:  # no other process made it meanwhile
                    done = len(grid.records) - before  # by all processes, since this one began
                    minutes = (time.monotonic() - start) / 60 / max(done, 1) * len(todo)
                    eta = f", about {minutes:.0f} min" if done else ""
                    LOG.info("%s (%d to go%s)", grid.folder(run).name, len(todo), eta)
                    # The second is not run where the first fails.
                    any(run_script(script, words) for script, *words in grid.commands(run))
                    failed += [run] if grid.record(run) is None else []
            if is_ours:
                break  # what is missing now may have changed
        else:
            if not waits:
                LOG.info("%d runs are being made by other processes; waiting for them", len(todo))
            waits = True
            time.sleep(1)
    return [grid.folder(run).name for run in failed if grid.record(run) is None]


def check_output(args: argparse.Namespace) -> None:
    """Raise InputError where --out holds other results, or a file that a report would replace and did not write."""
    path = args.out / "results.json"
    there = read_json(path) if os.path.lexists(path) else {"files": []}
    if not isinstance(ours := there.get("files"), list):
        raise InputError(f"--out: {path} is not of this command; move it away")
    for key in ("model", "exit_strategy"):
        if ours and there.get(key) != getattr(args, key):
            raise InputError(f"--out: {args.out} holds results of {key} {there.get(key)}; name another folder")
    for path in (args.out / name for name in FILES):
        if os.path.lexists(path) and (path.name not in ours or path.is_dir()):
            raise InputError(f"--out: {path} is not of this command (results.json does not name it); move it away")


def tables_of(grid: Grid) -> tuple[dict[int, dict[str, Records]], list[str]]:
    """What is there, by training size, method, task and seed; and what is missing."""
    args, missing = grid.args, [grid.folder(run).name for run in grid.missing()]
    tables = {n: {method: {task: {} for task in args.tasks} for method in args.methods} for n in args.train_sizes}
    for slot in grid.slots:
        attempts, name = grid.attempts(slot), f"{slot.method} {slot.task} n{slot.train_size} seed{slot.seed}"
        found = [record for run in attempts if (record := grid.record(run)) is not None]
        if not attempts and all(grid.record(run) == {} for run in grid.search(slot.task, slot.method)):
            found = [{}]
            missing.append(f"{name}: no learning rate converged")
        elif not attempts and (slot.train_size, slot.seed) != (args.train_sizes[0], args.seeds[0]):
            missing.append(f"{name}, once its learning rate is known")
        if found:  # a run that is being repeated counts, marked, until its repetition is there
            tables[slot.train_size][slot.method][slot.task][slot.seed] = found[-1]
    return tables, missing


def figures_of(args: argparse.Namespace, tables: dict[int, dict[str, Records]]) -> dict[str, list[tuple]]:
    """The figures' names, and the panels of each, as `draw_curves` takes them."""
    tasks, table = args.tasks, tables[args.train_sizes[0]]
    mean = f"{Path(args.model).name}, mean over {len(tasks)} tasks"
    figures = {
        "curves.png": [(mean if len(tasks) > 1 else tasks[0], table, tasks)],
        "tasks.png": [(task, table, [task]) for task in tasks],
        "sizes.png": [(f"up to {n} training examples", tables[n], tasks) for n in sorted(tables)],
    }
    return {name: panels for name, panels in figures.items() if len(panels) > 1 or name == "curves.png"}


def write_report(grid: Grid) -> None:
    """Write results.md, results.json and the figures from the runs that are there."""
    args, tasks, methods = grid.args, grid.args.tasks, grid.args.methods
    tables, missing = tables_of(grid)
    check_output(args)
    if args.ratios:
        tables = {n: report.with_single_models(table) for n, table in tables.items()}
    of_sizes = {n: report.results_of(table, args.ratios) for n, table in tables.items()}
    made = {grid.folder(run).name: grid.records[run] for run in grid.wanted() if run in grid.records}
    done, figures = {name: record for name, record in made.items() if record}, figures_of(args, tables)
    attempts = [[grid.folder(run).name for run in grid.attempts(slot)] for slot in grid.slots]
    results = {
        **{key: getattr(args, key) for key in ("model", "exit_strategy", "seeds")},
        "train_size": args.train_sizes[0],
        "epochs": args.epochs,
        "rates_searched": args.lrs,
        "learning_rates": {method: {task: grid.learning_rate(task, method) for task in tasks} for method in methods},
        "early_exits_failed": {method: [grid.early_exits_failed(method, lr) for lr in args.lrs] for method in methods},
        **of_sizes.pop(args.train_sizes[0]),
        "missing": missing,
        "did_not_converge": [name for name, record in made.items() if did_not_converge(record)],
        "one_class": {name: layers for name, record in done.items() if (layers := one_class_layers(record))},
        "repeated": {names[0]: names[1:] for names in attempts if len(names) > 1},
        "trained_on": sorted({f"{record['device']}, {record['precision']}" for record in done.values()}),
        "by_train_size": {str(n): of_size for n, of_size in of_sizes.items()},
        "runs": {name: {key: record[key] for key in EVALUATION} for name, record in done.items()},
        "files": ["results.md", *figures],
    }
    for name in set(FILES) - set(results["files"]):
        (args.out / name).unlink(missing_ok=True)  # one of other tables would mislead
    write_json(args.out / "results.json", results)  # first, since it tells that the others are ours
    with written_beside(args.out / "results.md") as partial:
        partial.write_text(report.document(results), encoding="utf-8")
    for name, panels in figures.items():
        report.draw_curves(args.out / name, panels)
    print(f"{args.out}: results.md, results.json and figures, of {len(done)} runs; {len(missing)} missing")


def share(text: str) -> float:
    """An argparse type: a positive number, which may be a fraction."""
    numerator, _, denominator = text.partition("/")
    return positive_float(numerator) / positive_float(denominator or "1")


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = Parser(description="Run the paper's grid; make its tables and figures.")
    option = parser.add_argument
    glue = [task for task in TASKS if task != "toy"]
    option("--tasks", type=list_of(one_of(TASKS)), default=glue, help=f"default: {','.join(glue)}")
    option("--methods", type=list_of(str), default=["ee", "mm", "sweet"], help="or branch (default: ee,mm,sweet)")
    option("--seeds", type=list_of(whole_number(0)), default=[0, 1, 2], help="first the search's (default: 0,1,2)")
    option("--lrs", type=list_of(positive_float), help="to search (default: the paper's; small models 5e-5 to 4e-4)")
    option("--train-sizes", type=list_of(whole_number(1)), default=[6000], help="first the search's (default: 6000)")
    option("--exit-strategy", choices=EXIT_STRATEGIES, default="confidence", help="or learning-to-exit, lte")
    option("--epochs", type=whole_number(1), default=2, help="passes over the training set (default: 2)")
    option("--ratios", type=list_of(share), help="such as 1/6,1/2,1; MM's models stand alone too (default: paper's)")
    option("--out", type=Path, default=Path("reproduced"), help="for tables and figures (default: reproduced)")
    option("--runs", type=Path, help="for the run folders, which several reports may share (default: OUT/runs)")
    instead = parser.add_mutually_exclusive_group().add_argument
    instead("--print-commands", action="store_true", help="print a command line per missing run, and run nothing")
    instead("--report-only", action="store_true", help="make tables and figures of what is there, and run nothing")
    option("--retry-diverged", action="store_true", help="repeat runs that did not converge with another seed")
    option("--data-dir", type=Path, default=home() / "data", help="the GLUE tasks' folders (default: %(default)s)")
    options.add_training_options(parser)
    args = parser.parse_args()
    args.runs = args.runs or args.out / "runs"
    for name in args.methods:
        if name not in METHODS and not args.report_only:  # which reports whatever method a record names
            known = f"none of {', '.join(METHODS)}; others are only reported (--report-only)"
            raise InputError(f"--methods: {name!r} is {known}")
    if args.retry_diverged and len({seed % RETRY_STEP for seed in args.seeds}) < len(args.seeds):
        raise InputError(f"--seeds: with --retry-diverged two seeds must not differ by a multiple of {RETRY_STEP}")
    if not args.report_only:
        need_clone()
        _, config, _ = options.find_model(args)
        args.lrs = args.lrs or options.search_rates(config)
    args.lrs = args.lrs or rates_there(args)
    return args


def rates_there(args: argparse.Namespace) -> list[float]:
    """The rates of --runs on the first seed and size, which a report takes for those that were searched."""
    tail = f"-n{args.train_sizes[0]}-seed{args.seeds[0]}" + "-lte" * (args.exit_strategy == "lte")
    found = (re.fullmatch(rf".+-lr(\d+(?:\.\d+)?(?:e[-+]\d+)?){tail}", folder.name) for folder in args.runs.glob("*"))
    if not (rates := sorted({float(match[1]) for match in found if match})):
        raise InputError(f"--runs: {args.runs} holds no run whose name ends with {tail}")
    return rates


def main() -> None:
    """Run the grid, or print its commands, or report what is there."""
    args = parse_arguments()
    grid = Grid(args)
    if args.print_commands:
        for run in grid.missing():
            print(" && ".join(shlex.join(["python", *command]) for command in grid.commands(run)))
        return
    args.out.mkdir(parents=True, exist_ok=True)  # tried now, since it is needed after hours of training
    new_figure(args.out / "curves.png")
    check_output(args)
    failed = [] if args.report_only else run_all(grid)
    write_report(grid)
    if failed:
        raise InputError(f"{len(failed)} runs failed, see their messages above: {', '.join(failed)}")


if __name__ == "__main__":
    run_command(main)
