"""The runs of the paper's grid, by their folders: what is wanted, what is there, what is missing.

A learning rate is searched for each task and method on the first seed (and the first training size): the one with the
largest area under the speed-accuracy curve (App. A). All seeds and training sizes then run at that rate. Nothing is
kept but the run folders that train.py and evaluate.py make, so that a stopped grid goes on where it was.
"""

import argparse
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minisweet.files.runs import DIVERGED, method_arguments, read_record
from minisweet.files.safe import InputError, read_json
from minisweet.paper.report import did_not_converge, one_class_layers
from minisweet.training.options import EXIT_LAYERS, default_batch_size

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
