"""The runs of the paper's grid, by their folders: what is wanted, what is there, what is missing, who makes it.

A learning rate is searched for each task and method on the first seed (and the first training size): the one with the
largest area under the speed-accuracy curve (App. A). All seeds and training sizes then run at that rate. Nothing is
kept but the run folders that train.py and evaluate.py make, so that a stopped grid goes on where it was.
"""

import argparse
import ctypes
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from minisweet.data.own import digest
from minisweet.data.tasks import TASKS, load_examples
from minisweet.files.runs import method_name, read_diverged, read_evaluation, read_record, run_name
from minisweet.files.safe import InputError
from minisweet.paper.report import did_not_converge, one_class_layers
from minisweet.training.devices import choose_device, choose_precision
from minisweet.training.options import default_batch_size, exit_layers_for

SCRIPTS = Path(__file__).parents[2]  # where train.py and evaluate.py are
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1  # from prctl.h
RENEWAL, STALE = 5.0, 30.0  # seconds: a claim is renewed so often; one that was not renewed for so long is taken over

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

    def folder(self, run: Run) -> Path:
        """The run's folder."""
        model = {"model": self.args.model, "exit_strategy": self.args.exit_strategy}
        return self.args.runs / run_name(run._asdict() | model, in_grid=True)

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
        layers = list(args.exit_layers or exit_layers_for(record["depth"]))
        precision = (record["precision"], self.precision or record["precision"])
        for what, has, wanted in (("exits after", record["exit_layers"], layers), ("precision (--amp)", *precision)):
            if has != wanted:
                raise InputError(f"{folder}: a run with {what} {has}, not {wanted}; {ELSEWHERE}")
        evaluation = read_evaluation(folder, record) or {}
        if not set(EVALUATION) <= set(evaluation):
            return None  # not evaluated, or before there were all of these
        as_here = {"calibration": "crossfit", "exit_layers": layers, "precision": self.precision}
        differs = any(value not in (None, evaluation.get(key, value)) for key, value in as_here.items())
        if differs or len(evaluation["thresholds"]) != THRESHOLDS:
            return None  # evaluated by hand in another way
        self.check_rows(run, record)
        self.records[run] = record | {key: evaluation[key] for key in EVALUATION}
        return self.records[run]

    def check_settings(self, run: Run, arguments: dict) -> None:
        """Raise InputError unless a run was trained with these arguments as the command line has them."""
        arguments = arguments | {"method": method_name(arguments)}
        expected = run._asdict() | {"batch_size": self.args.batch_size or default_batch_size(self.args.model)}
        expected |= {key: getattr(self.args, key) for key in ("model", "epochs", "max_length", "exit_strategy")}
        for key, value in expected.items():
            if arguments.get(key) != value:
                raise InputError(f"{self.folder(run)}: a run with {key} {arguments.get(key)}, not {value}; {ELSEWHERE}")

    def check_rows(self, run: Run, record: dict) -> None:
        """Raise InputError for a run on other rows than those of --data-dir, or for a report than another run's."""
        there = run.task == "toy" or (self.args.data_dir / TASKS[run.task].folder).is_dir()
        for split, told in (("train", record.get("train_digest")), ("dev", record.get("dev_digest"))):
            rows = (run.task, split, *((run.train_size, run.seed) if split == "train" else ()))
            if told and there and rows not in self.rows and not self.args.report_only:
                data, drawn = self.load(run.task, split, self.args.data_dir), None
                if split == "train":  # as train.py draws them
                    drawn = np.sort(np.random.default_rng(run.seed).permutation(len(data.first))[: run.train_size])
                self.rows[rows] = (digest(data, drawn), self.args.data_dir)
            if told and (first := self.rows.setdefault(rows, (told, self.folder(run))))[0] != told:
                raise InputError(f"{self.folder(run)}: a run on other {split} rows than {first[1]}; {ELSEWHERE}")

    def is_lost(self, run: Run) -> bool:
        """Whether the run's loss became infinite or NaN, so that train.py saved no model."""
        if lost := read_diverged(self.folder(run)):
            self.check_settings(run, lost["arguments"])
        return lost is not None

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
            stuck = [n in one_class_layers(record) for record in records for n in record["exit_layers"][:-1]]
            failed.append((sum(stuck), len(stuck)))
        return failed

    def attempts(self, task: str, method: str, train_size: int, seed: int) -> list[Run]:
        """The run of a seed at the rate found, and with --retry-diverged those that repeat it.

        Empty before the search is complete.
        """
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
        """The runs that are known and not complete."""
        return [run for run in self.wanted() if self.is_missing(run)]

    def is_missing(self, run: Run) -> bool:
        """Whether the run is neither complete nor lost."""
        return self.record(run) is None and not self.is_lost(run)

    def commands(self, run: Run) -> list[list[str]]:
        """The command lines that complete a run, from the folder of train.py."""
        args, folder = self.args, str(self.folder(run))
        device = ["--device", args.device, "--amp", args.amp]
        evaluate = ["evaluate.py", folder, "--data-dir", str(args.data_dir), *device]
        if (self.folder(run) / "run.json").exists():
            return [evaluate]
        train = [
            "train.py",
            "--resume",
            "--model",
            args.model,
            "--out",
            folder,
            "--exit-strategy",
            args.exit_strategy,
            *device,
        ]
        options = run._asdict() | {"data_dir": args.data_dir, "epochs": args.epochs, "max_length": args.max_length}
        options["batch_size"] = args.batch_size
        options["exit_layers"] = args.exit_layers and ",".join(map(str, args.exit_layers))
        for name, value in options.items():
            if value is not None:
                train += [f"--{name.replace('_', '-')}", str(value)]
        return [train, evaluate]


class Claims:
    """Who makes which run, where several processes work on one grid: a hidden file beside the run's folder.

    It holds the host, the process and the time, which is renewed. If it stays the same for STALE seconds, by the clock
    of who reads it, its process has died. Another one then takes over by a file of the next number: only one can make
    it. Who has claimed a run must look whether it is still missing.
    """

    def __init__(self) -> None:
        self.seen: dict[Path, tuple[str, float]] = {}  # a claim to what it says, and since when

    @contextmanager
    def take(self, folder: Path) -> Iterator[bool]:
        """Claim a run while the context lasts. Gives False where another process has claimed it."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        paths = [folder.with_name(f".{folder.name}.claim0")]
        while paths[-1].exists():
            paths.append(folder.with_name(f".{folder.name}.claim{len(paths)}"))
        path, over = paths.pop(), threading.Event()
        try:
            if paths and not self.is_stale(paths[-1]):
                raise FileExistsError
            path.touch(exist_ok=False)
        except FileExistsError:
            yield False
            return

        def renew() -> None:
            with suppress(OSError), path.open("r+") as claim:  # which does not make it again
                claim.write(f"{platform.node()} {os.getpid()} {time.time():.3f}\n")

        def keep_renewing() -> None:
            while not over.wait(RENEWAL):
                renew()

        renew()
        thread = threading.Thread(target=keep_renewing, daemon=True)
        thread.start()
        try:
            yield True
        finally:
            over.set()
            thread.join()
            if not folder.with_name(f".{folder.name}.claim{len(paths) + 1}").exists():  # else it was taken over
                for old in (path, *reversed(paths)):
                    old.unlink(missing_ok=True)

    def is_stale(self, path: Path) -> bool:
        """Whether the claim has said the same for too long."""
        text = ""
        with suppress(OSError):
            text = path.read_text()
        said, since = self.seen.get(path, (None, 0.0))
        if said != text:
            self.seen[path] = (text, time.monotonic())
        return said == text and time.monotonic() - since > STALE


def run_script(script: str, arguments: list[str]) -> int:
    """Run train.py or evaluate.py as a process, which ends when this one does. Returns its exit status."""
    bind = LIBC and (lambda: LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM))  # on Linux even if this one is killed
    process = subprocess.Popen([sys.executable, str(SCRIPTS / script), *arguments], preexec_fn=bind)
    try:
        return process.wait()
    except SystemExit:  # SIGTERM reached this process alone; Ctrl-C reaches both
        process.terminate()
        raise
    finally:
        process.wait()
