"""What a study's records say, as numbers. Its depth, exits, tasks, seeds and rates are read from them.

A record is a folder TASK-SEED-METHOD with run.json and the validation logits of a run. A name that ends in -lrRATE is
of another rate than the usual one; -lr5e-5 is of the usual one and other rows, to stand beside such a record. A seed of
a task counts where all four methods are there. An MM without its last model has that of the branches' trunk, which is
trained alike. Temperatures and decisions are cross-fitted over five folds of the validation rows, as evaluate.py does.
Letters: S seeds, E exits, N rows.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from minisweet.adaptive import Exits
from minisweet.base.files import LOG, read_json
from minisweet.calibration import fit_rule
from minisweet.metrics import score
from minisweet.sweep import crossfit, sweep
from minisweet.outputs import Outputs
from minisweet.paper.report import Records, curve_of
from tests.benchmark import TASKS, USUAL
from tests.benchmark.linear import LINEAR

LOGITS = "logits.safetensors"
NAME = re.compile(r"([a-z0-9]+)-(\d+)-(branch|ee|sweet|mm)(?:-lr(.+))?")
METHODS = {"branches": "branch", "EE": "ee", "SWEET": "sweet", "MM": "mm"}
OURS, ONE_BRANCH = "plain model with exit 0", "exit 0 and one branch"
SHARES = {"1/6": 1 / 6, "1/3": 1 / 3, "1/2": 1 / 2, "1": 1.0}
GRID = np.linspace(0, 1, 61)  # shares of the layers, for the figures
MARGIN = 5.0  # a task is learnt where full depth is right so much more often than the most frequent class, in points
OF_GRID = re.compile(r"minilm-l6-(\w+)-(\w+)-lr([\d.e-]+)-n(\d+)-seed(\d)(-lte)?")  # the runs of `reproduce`


@dataclass
class Study:
    """The records of one model."""

    depth: int
    layers: list[int]  # (E,), where exits stand, without exit 0
    runs: dict[str, dict[int, dict]]  # of `measure`, by task and seed
    rates: dict[tuple[str, str], dict[int, dict]]  # of `exits_of`, by task and rate, seed and method
    missing: list[str]  # the names of records

    @property
    def learnt(self) -> list[str]:
        """The tasks that full depth learns; all where it learns none."""
        gains = {task: np.mean([run["gain"] for run in its.values()]) for task, its in self.runs.items()}
        return [task for task, gain in gains.items() if gain >= MARGIN] or list(self.runs)

    @property
    def has_mean(self) -> bool:
        """Whether a mean over the learnt tasks says anything: of four or more, all of accuracy."""
        one_seed = [next(iter(self.runs[task].values())) for task in self.learnt]
        return len(one_seed) > 3 and all(run["record"]["ee"]["metric"] == "accuracy" for run in one_seed)

    def values(self, key: str, name: str, task: str) -> np.ndarray:
        """What `measure` found of a task: (S, ...)."""
        return np.array([run[key][name] for run in self.runs[task].values()])

    def mean(self, key: str, name: str) -> np.ndarray:
        """The mean over the learnt tasks, and the seeds of each: (...)."""
        return np.mean([self.values(key, name, task).mean(0) for task in self.learnt], axis=0)

    def grid(self, tasks: list[str], methods: tuple[str, ...] = ("ee", "mm", "sweet")) -> dict[str, Records]:
        """The evaluations of tasks by method, task and seed, as reports take them."""
        its = {task: self.runs[task].items() for task in tasks}
        return {m: {task: {seed: run["record"][m] for seed, run in its[task]} for task in tasks} for m in methods}


def curves_of(layers: list[int]) -> dict[str, tuple[str, list[int]]]:
    """The curves of exits after these layers: which run each is of, and which exits it asks."""
    last = layers[-1]
    found = {OURS: ("branch", [0, last]), ONE_BRANCH: ("branch", [0, last // 2, last])}
    for name, method in METHODS.items():
        found |= {name: (method, layers), f"exit 0 and {name}": (method, [0, *layers])}
    return found


def exits_after(layers: list[int], depth: int, method: str) -> Exits:
    """The exits of a method's model after these layers, and what they cost."""
    in_vain = {"branch": [1 / 6 if n else 0 for n in layers], "mm": layers}.get(method, [0] * len(layers))
    return Exits(layers, in_vain, depth, asks_at_1=method == "mm")


def read_outputs(record: Path) -> Outputs:
    """What the exits of a record's run say of its validation rows."""
    told, tensors = read_json(record / "run.json"), load_file(record / LOGITS)
    exits = exits_after(told["exit_layers"], told["depth"], told["arguments"]["method"])
    return Outputs(tensors["logits"], None, tensors["labels"], tensors["keys"], told["metric"], exits)


def exits_of(run: Outputs) -> tuple[np.ndarray, np.ndarray]:
    """The score of each exit (E,), and how often it gives each answer (E, C)."""
    answers = run.logits.argmax(-1).numpy()  # (E, N)
    counts = [np.bincount(row, minlength=run.logits.shape[-1]) for row in answers]
    return score(answers, run.labels.numpy(), run.metric), np.array(counts)


def measure(records: Path, task: str, seed: int, layers: list[int]) -> dict[str, dict]:
    """Of a task and a seed, by name: a `curve` at SHARES and as `drawn` at GRID; of each method the scores of its exits
    (E,), the `counts` of their answers, and its `record` as reports take it; the scores of models `alone`; and
    what full depth gains.
    """
    found, front = defaultdict(dict), None
    for name, method in METHODS.items():  # branches first: theirs is exit 0
        run = read_outputs(records / f"{task}-{seed}-{method}")
        front = run if front is None else front
        some = len(run.logits) < len(layers)  # MM without its last model
        logits = [front.logits[:1], run.logits[-len(layers) :], *[front.logits[-1:]] * some]
        run = run._replace(logits=torch.cat(logits), exits=exits_after([0, *layers], run.exits.depth, method))
        folds, rule = crossfit(run), fit_rule(run)
        confidences = rule.confidences(run.logits).numpy()  # (1 + E, N)
        for curve, (of, exits) in curves_of(layers).items():
            if of == method:
                asked = [run.exits.layers.index(n) for n in exits]
                quantiles = np.unique(np.quantile(confidences[asked[:-1]], np.linspace(0, 1, 100)))  # they crowd near 1
                swept, _ = sweep(folds, run, [rule.lowest, *quantiles.tolist(), 1.0], asked)
                found["curve"][curve], found["drawn"][curve] = (
                    curve_of(swept, at) for at in ([*SHARES.values()], GRID)
                )
                if curve == name:
                    found["record"][method] = swept
        found["exits"][name], found["counts"][name] = (values[1:] for values in exits_of(run))
        its = {"metric": run.metric, "exit_layers": layers, "exit_scores": found["exits"][name]}
        found["record"][method] |= its | {"exit_answers": np.count_nonzero(found["counts"][name], axis=1)}
    full, labels = front.logits[-1].argmax(-1).numpy(), front.labels.numpy()
    constant = np.full_like(labels, np.bincount(labels).argmax())
    alone = {"most frequent class": constant, "exit 0": front.logits[0].argmax(-1).numpy()}
    for kind, name in LINEAR.items():
        if (path := records / f"{task}-{seed}-{kind}" / LOGITS).exists():
            alone[name] = load_file(path)["logits"][0].argmax(-1).numpy()
    for name, answers in (alone | {"full depth": full}).items():
        found["alone"][name] = score(answers, labels, front.metric)
    found["curve"]["full depth"] = np.full(len(SHARES), found["alone"]["full depth"])
    found["gain"] = score(full, labels, "accuracy") - score(constant, labels, "accuracy")
    return found


def read_study(folder: Path) -> Study | None:
    """Read what a folder's `records` hold; None where no seed of a task is complete."""
    its = [name for path in folder.glob("records/*") if (name := NAME.fullmatch(path.name)) and name[1] in TASKS]
    there = {name[0] for name in its}
    keys = sorted({(TASKS.index(name[1]), int(name[2])) for name in its if not name[4]})
    keys = [(TASKS[place], seed) for place, seed in keys]
    wanted = {key: ["{}-{}-{}".format(*key, method) for method in METHODS.values()] for key in keys}
    missing = [name for names in wanted.values() for name in names if name not in there]
    whole = [key for key, names in wanted.items() if there.issuperset(names)]
    if missing:
        LOG.warning("missing, which leaves out the seed of the task: %s (%s)", ", ".join(missing), folder)
    if not whole:
        return None
    first = read_json(folder / "records" / "{}-{}-ee".format(*whole[0]) / "run.json")
    runs, rates = defaultdict(dict), defaultdict(lambda: defaultdict(dict))
    for task, seed in whole:
        runs[task][seed] = measure(folder / "records", task, seed, first["exit_layers"])
    compared = {name[1] for name in its if name[4]}  # tasks with another rate
    of_these = [name for name in its if name[1] in compared]
    for name in sorted(of_these, key=lambda name: name[4] or ""):  # one whose name says the usual rate comes later
        run = read_outputs(folder / "records" / name[0])
        rates[name[1], name[4] or USUAL][int(name[2])][name[3]] = exits_of(run)
    return Study(first["depth"], first["exit_layers"], dict(runs), dict(rates), missing)


def read_grid(runs: Path, tasks: list[str], size: int = 6000, is_lte: bool = False) -> dict[str, Records]:
    """The evaluations of the paper's grid, at the rate with the largest area on seed 0 of 6,000 rows."""
    found = defaultdict(lambda: defaultdict(dict))
    for run in sorted(runs.iterdir()):
        method, task, rate, rows, seed, lte = OF_GRID.fullmatch(run.name).groups()
        if bool(lte) == is_lte:
            found[method, task, int(rows)][rate][int(seed)] = read_json(run / "evaluation.json")
    grid: dict[str, Records] = {"ee": {}, "mm": {}, "sweet": {}}
    for method, task in product(grid, tasks):
        searched = found[method, task, 6000]
        best = max(searched, key=lambda rate: searched[rate][0]["area"] if 0 in searched[rate] else 0)
        grid[method][task] = found[method, task, size][best]
    return grid
