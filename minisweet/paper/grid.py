"""The runs of the paper's grid, by their folders: what is wanted, what is there, what is missing, who makes it.

A learning rate is searched for each task and method on the first seed (and the first training size): the one with the
largest area under the speed-accuracy curve (App. A). All seeds and training sizes then run at that rate. Nothing is
kept but the run folders that train.py and evaluate.py make, so that a stopped grid goes on where it was.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from minisweet.data.own import digest
from minisweet.data.tasks import TASKS, load_examples
from minisweet.files.runs import method_name, read_diverged, read_evaluation, read_record, run_name
from minisweet.files.safe import InputError, lock
from minisweet.paper.report import did_not_converge, one_class_layers
from minisweet.training.devices import choose_device, choose_precision
from minisweet.training.options import default_batch_size, exit_layers_for

SCRIPTS = Path(__file__).parents[2]  # where train.py and evaluate.py are
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


class Grid:
    """The runs that the command line asks for, and what is there of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.records: dict[Run, dict] = {}  # of the complete runs that were read
        self.rows: dict[tuple, tuple[str, Path]] = {}  # which rows to their digest, and the folder that has them
        self.load = lru_cache(maxsize=2)(load_examples)
        self.precision = None  # any, where runs are only reported or their commands printed, perhaps not for here
        if args.amp != "auto" or not (args.report_only or args.print_commands):
            device = choose_device(args.device if args.amp == "auto" else "cpu")
            self.precision = str(choose_precision(args.amp, device) or torch.float32)

    def name(self, run: Run) -> str:
        """The name of the run's folder."""
        return run_name(vars(self.args) | run._asdict(), in_grid=True)

    def folder(self, run: Run) -> Path:
        """The run's folder."""
        return self.args.runs / self.name(run)

    def record(self, run: Run) -> dict | None:
        """run.json and what reports use of evaluation.json, or None for a run that is not complete.

        Raises InputError for a folder that holds a run of other settings, or a broken one.
        """
        folder, args = self.folder(run), self.args
        if run in self.records or not (folder / "run.json").exists():
            return self.records.get(run)
        record = read_record(folder)
        layers = list(args.exit_layers or exit_layers_for(record["depth"]))
        has = record["arguments"] | {"exit_strategy": record["exit_strategy"], "exits after": record["exit_layers"]}
        has["precision (--amp)"] = record["precision"]
        wanted = {"exits after": layers, "precision (--amp)": self.precision or record["precision"]}
        self.check_settings(run, has, wanted)
        evaluation = read_evaluation(folder, record, whole=False) or {}
        as_here = {"calibration": "crossfit", "exit_layers": layers, "precision": self.precision}
        differs = any(value not in (None, evaluation.get(key, value)) for key, value in as_here.items())
        if differs or not set(EVALUATION) <= set(evaluation) or len(evaluation["thresholds"]) != THRESHOLDS:
            return None  # not evaluated, or by hand in another way, or before there were all of these
        self.check_rows(run, record)
        self.records[run] = record | {key: evaluation[key] for key in EVALUATION}
        return self.records[run]

    def check_settings(self, run: Run, has: dict, wanted: dict) -> None:
        """Raise InputError unless a run was trained with the command line's arguments and what else is wanted."""
        wanted = run._asdict() | {"batch_size": self.args.batch_size or default_batch_size(self.args.model)} | wanted
        wanted |= {key: getattr(self.args, key) for key in ("model", "epochs", "max_length", "exit_strategy")}
        has = has | {"method": method_name(has)}
        for key, value in wanted.items():
            if has.get(key) != value:
                raise InputError(f"{self.folder(run)}: a run with {key} {has.get(key)}, not {value}; {ELSEWHERE}")

    def check_rows(self, run: Run, record: dict) -> None:
        """Raise InputError for a run on other rows than those of --data-dir, or for a report than another run's."""
        there = run.task == "toy" or (self.args.data_dir / TASKS[run.task].folder).is_dir()
        for split, drawn_by in (("train", (run.train_size, run.seed)), ("dev", ())):
            rows, told = (run.task, split, *drawn_by), record.get(f"{split}_digest")
            if told is None:
                continue  # a run from before there were digests
            if there and rows not in self.rows and not self.args.report_only:
                data, drawn = self.load(run.task, split, self.args.data_dir), None
                if split == "train":  # as train.py draws them
                    drawn = np.sort(np.random.default_rng(run.seed).permutation(len(data.first))[: run.train_size])
                self.rows[rows] = (digest(data, drawn), self.args.data_dir)
            known, where = self.rows.setdefault(rows, (told, self.folder(run)))
            if known != told:
                raise InputError(f"{self.folder(run)}: a run on other {split} rows than {where}; {ELSEWHERE}")

    def is_lost(self, run: Run) -> bool:
        """Whether the run's loss became infinite or NaN, so that train.py saved no model."""
        if lost := read_diverged(self.folder(run)):
            self.check_settings(run, lost["arguments"], {})
        return lost is not None

    def search(self, task: str, method: str) -> list[Run]:
        """The runs of the learning-rate search; one, if there is one rate."""
        return [Run(task, method, self.args.train_sizes[0], lr, self.args.seeds[0]) for lr in self.args.lrs]

    def learning_rate(self, task: str, method: str) -> float | None:
        """The rate with the largest area under the curve; None before the search is complete."""
        runs = self.search(task, method)
        if len(runs) > 1:
            runs = [run for run in runs if not self.is_lost(run)]
            if not all(map(self.record, runs)):
                return None
            runs.sort(key=lambda run: -self.record(run)["area"])
        return runs[0].lr if runs else None

    def early_exits_failed(self, method: str) -> list[tuple[int, int]]:
        """For each rate of the search, how many exits before the last predict one class, and of how many."""
        failed = []
        for searched in zip(*(self.search(task, method) for task in self.args.tasks), strict=True):
            records = [record for run in searched if (record := self.record(run))]
            stuck = [n in one_class_layers(record) for record in records for n in record["exit_layers"][:-1]]
            failed.append((sum(stuck), len(stuck)))
        return failed

    def attempts(self, task: str, method: str, train_size: int, seed: int) -> list[Run]:
        """The run of a seed, and with --retry-diverged those that repeat it; none before the search is complete."""
        lr = self.learning_rate(task, method)
        if lr is None:
            return []
        runs = [Run(task, method, train_size, lr, seed)]
        while self.args.retry_diverged and len(runs) <= RETRIES:
            record = self.record(runs[-1])
            if not self.is_lost(runs[-1]) and not (record and did_not_converge(record)):
                break
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
        """Those of them that are neither complete nor lost."""
        return [run for run in self.wanted() if self.is_missing(run)]

    def is_missing(self, run: Run) -> bool:
        """Whether a run is neither complete nor lost."""
        return self.record(run) is None and not self.is_lost(run)

    def commands(self, run: Run) -> list[list[str]]:
        """The command lines that complete a run, from the folder of train.py."""
        folder, evaluated = self.folder(run), ("data_dir", "device", "amp")
        trained = ("model", "exit_strategy", "epochs", "max_length", "batch_size", "exit_layers", *evaluated)
        train, evaluate = ({name: getattr(self.args, name) for name in names} for names in (trained, evaluated))
        commands = [["train.py", *as_options({"out": folder} | run._asdict() | train), "--resume"]]
        commands.append(["evaluate.py", str(folder), *as_options(evaluate)])
        return commands[(folder / "run.json").exists() :]


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Claim a run while the context lasts, by a locked file beside its folder. Gives False where it is claimed already.

    The lock passes on to the script that makes the run: if this process is killed, the claim lasts until that has
    ended. Who has claimed a run must look whether it is still missing.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.maker")
    if (held := lock(path)) is None:
        yield False
        return
    try:
        os.set_inheritable(held, True)
        os.truncate(held, 0)
        os.write(held, f"{platform.node()} {os.getpid()} {time.ctime()}\n".encode())  # for people
        yield True
    finally:
        path.unlink(missing_ok=True)
        os.close(held)


def as_options(values: dict[str, object]) -> list[str]:
    """The command-line options of these names and values; those that are None are left out."""
    texts = {
        k: ",".join(map(str, v)) if isinstance(v, (list, tuple)) else v for k, v in values.items() if v is not None
    }
    return [part for name, text in texts.items() for part in (f"--{name.replace('_', '-')}", str(text))]


def run_script(script: str, arguments: list[str]) -> int:
    """Run train.py or evaluate.py as a process, which ends when this one is told to. Returns its exit status."""
    process = subprocess.Popen([sys.executable, str(SCRIPTS / script), *arguments], close_fds=False)  # see `claimed`
    try:
        return process.wait()
    except SystemExit:  # SIGTERM reached this process alone; Ctrl-C reaches both
        process.terminate()
        raise
    finally:
        process.wait()
