"""What a study's records say, as numbers. Its depth, exits, tasks, seeds and rates are read from them.

A seed of a task counts where EE, SWEET and branches are all there, and MM where each of these has it. Temperatures and
decisions are cross-fitted over five folds of the validation rows, as evaluate.py does. Letters: S seeds, E exits, P
points, W choices, N rows.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from minisweet.adaptive import spaced_thresholds
from minisweet.base.files import LOG, InputError, read_json
from minisweet.evaluation.answers import load_answers
from minisweet.evaluation.metrics import score
from minisweet.evaluation.sweep import crossfit, sweep
from minisweet.paper.report import Records, curve_of
from minisweet.runs.folders import EVALUATION, LOGITS, read_evaluation, read_record
from tests.benchmark import TASKS

NAME = re.compile(r"([a-z0-9]+)-(\d+)-([a-z]+)(-lr.+)?")  # of a record: task, seed, method; a rate besides the usual
METHODS = {"branches": "branch", "EE": "ee", "SWEET": "sweet", "MM": "mm"}
TRAINED = ("ee", "mm", "sweet")  # the paper's
OURS, ONE_BRANCH = "plain model with exit 0", "exit 0 and one branch"
SHARES = {"1/6": 1 / 6, "1/3": 1 / 3, "1/2": 1 / 2, "1": 1.0}
GRID = np.linspace(0, 1, 61)  # shares of the layers, for the figure
MARGIN = 5.0  # a task is learnt where full depth is right so much more often than the most frequent class, in points
Rates = dict[tuple[str, str], dict[float, Records]]  # evaluations by method and task, then by rate, then by seed
LEFT_OUT = "Missing, which leaves MM out, or of another method the seed of the task"
DEALS = (1, 3**40, 5**27, 7**22)  # odd: keys times one of them are in another order, which deals out other folds


@dataclass
class Study:
    """The records of one model."""

    depth: int
    layers: list[int]  # (E,), where exits stand, without exit 0
    methods: dict[str, str]  # of METHODS, those that each seed of each task has
    runs: dict[str, dict[int, dict]]  # of `measure`, by task and seed
    missing: list[str]  # the names of records
    rates: Rates  # what EE, SWEET, MM and branches give at each rate

    @property
    def learnt(self) -> list[str]:
        """The tasks that full depth learns; all where it learns none."""
        gains = {task: np.mean([run["gain"] for run in its.values()]) for task, its in self.runs.items()}
        return [task for task, gain in gains.items() if gain >= MARGIN] or list(self.runs)

    @property
    def curves(self) -> dict[str, tuple[str, list[int]]]:
        """The curves that the methods have, see `curves_of`."""
        return {name: of for name, of in curves_of(self.layers).items() if of[0] in self.methods.values()}

    def values(self, key: str, name: str, task: str) -> np.ndarray:
        """What `measure` found of a task: (S, ...)."""
        return np.array([run[key][name] for run in self.runs[task].values()])

    def by_task(self, key: str, name: str, tasks: list[str] | None = None) -> np.ndarray:
        """The means over seeds, of the tasks that are learnt or of these: (tasks, ...)."""
        return np.array([self.values(key, name, task).mean(0) for task in tasks or self.learnt])

    def less(self, key: str, pair: tuple[str, str], task: str | None = None) -> np.ndarray:
        """The first of a pair less the second: by the seeds of a task, (S, ...), or as `by_task`, (tasks, ...)."""
        ours, theirs = (self.by_task(key, name) if task is None else self.values(key, name, task) for name in pair)
        return ours - theirs

    def grid(self, rate_of: Callable[[dict[float, dict], float], float]) -> dict[str, Records]:
        """EE's, MM's and SWEET's evaluations of the learnt tasks, for reports.

        `rate_of` chooses a rate of those that there are, by what is usual. A task counts where all of them have it.
        """
        found: dict[str, Records] = {method: {} for method in TRAINED if method in self.methods.values()}
        for task in self.learnt:
            its = {method: self.rates[method, task] for method in found}
            usual = next(iter(self.runs[task].values()))["rate"]
            chosen = {method: its[method].get(rate_of(its[method], usual[method])) for method in found}
            if all(chosen.values()):
                for method in found:
                    found[method][task] = chosen[method]
        return found


def curves_of(layers: list[int]) -> dict[str, tuple[str, list[int]]]:
    """The curves of exits after these layers: which run each is of, and which exits it asks."""
    last = layers[-1]
    found = {OURS: ("branch", [0, last]), ONE_BRANCH: ("branch", [0, last // 2, last])}
    for name, method in METHODS.items():
        found |= {name: (method, layers), f"exit 0 and {name}": (method, [0, *layers])}
    return found


def fine_thresholds(confidences: torch.Tensor, lowest: float) -> list[float]:
    """A hundred quantiles of the confidences, which crowd near 1, and both ends."""
    return [lowest, *np.unique(np.quantile(confidences.numpy(), np.linspace(0, 1, 100))).tolist(), 1.0]


def points_of(curve: dict) -> np.ndarray:
    """The scores at SHARES, NaN below the first exit's, and the area: (P,)."""
    return np.r_[curve_of(curve, [*SHARES.values()]), curve["area"]]


def measure(records: Path, task: str, seed: int, layers: list[int], methods: dict[str, str]) -> dict[str, dict]:
    """Of a task and a seed, by name: of curves their points (W, P), as told above, at 11 thresholds and of other folds,
    and scores at GRID; the scores of exits (E,) and of models; whether the first exit answers with one class; minutes.
    """
    found, front = defaultdict(dict), None
    for name, method in methods.items():  # branches first: theirs is exit 0
        record = records / f"{task}-{seed}-{method}"
        run = load_answers(record, read_evaluation(record), read_record(record))
        if list(run.exits.layers)[-len(layers) :] != layers:
            raise InputError(f"{record}: exits after {run.exits.layers}, and those of other records after {layers}")
        front = run if front is None else front
        run = run._replace(logits=torch.cat([front.logits[:1], run.logits[-len(layers) :]]))
        run = run._replace(exits=run.exits._replace(layers=[0, *layers]))
        dealt = [(crossfit(one), one) for one in (run._replace(keys=run.keys * deal) for deal in DEALS)]
        rule = run.fit_rule()
        few, confidences = spaced_thresholds(11, rule.lowest), rule.confidences(run.logits)
        for curve, (of, exits) in curves_of(layers).items():
            if of == method:
                asked = [run.exits.layers.index(n) for n in exits]
                fine = fine_thresholds(confidences[asked[:-1]], rule.lowest)
                ways = [(dealt[0], fine), (dealt[0], few), *((deal, fine) for deal in dealt[1:])]
                swept = [sweep(*deal, thresholds, asked)[0] for deal, thresholds in ways]
                found["curve"][curve], found["grid"][curve] = [*map(points_of, swept)], curve_of(swept[0], GRID)
                if curve == name:
                    kept = ("scores", "speedup_ratios", "area")
                    found["record"][method] = read_json(record / EVALUATION) | {key: swept[0][key] for key in kept}
        answers = run.logits[1:].argmax(-1)  # (E, N)
        content = read_json(record / "run.json")
        found["minutes"][name], found["rate"][method] = content["seconds"] / 60, content["arguments"]["lr"]
        found["exits"][name] = score(answers, run.labels, run.metric)
        found["one class"][name] = bool((answers[0] == answers[0, 0]).all())
    full, one_class = front.logits[-1].argmax(-1), torch.full_like(front.labels, int(front.labels.mode().values))

    def saved(method: str, k: int = 0) -> torch.Tensor | None:
        """The answers of a model that is no run of early exit; None where it is not there."""
        path = records / f"{task}-{seed}-{method}" / LOGITS
        return load_file(path)["logits"][k].argmax(-1) if path.exists() else None

    alone = {"most frequent class": one_class, "exit 0": front.logits[0].argmax(-1), "TF-IDF": saved("tfidf")}
    alone |= {f"slice of {n}": saved("slices", k) for k, n in enumerate(layers[:-1])}
    alone |= {f"branch after {n}": front.logits[1 + k].argmax(-1) for k, n in enumerate(layers[:-1])}
    alone |= {"embeddings": saved("embeddings"), "full depth": full}
    alone = {name: answers for name, answers in alone.items() if answers is not None}
    found["alone"] = {name: score(answers, front.labels, front.metric) for name, answers in alone.items()}
    found["gain"] = score(full, front.labels, "accuracy") - score(one_class, front.labels, "accuracy")
    found["curve"]["full depth"] = np.full_like(found["curve"][OURS], found["alone"]["full depth"])
    return found


def read_rates(runs: Iterable[Path]) -> Rates:
    """The evaluations of records, by their method and task, then by rate and seed. Old evaluations lack `depth`."""
    found: Rates = defaultdict(lambda: defaultdict(dict))
    for run in sorted(runs):
        record = read_json(run / "run.json")
        if (its := record.get("arguments")) and its["targets"] == "labels":  # no slices, and none of linear.py
            key = its["method"], "own" if its["data"] else its["task"]
            found[key][its["lr"]][its["seed"]] = read_json(run / EVALUATION) | {"depth": record["depth"]}
    return found


def read_study(folder: Path) -> Study | None:
    """Read what a folder's `records` hold; None where no seed of a task is complete."""
    there = {name[0]: name for path in folder.glob("records/*") if (name := NAME.fullmatch(path.name))}
    its = [name for name in there.values() if name[3] in METHODS.values() and name[1] in TASKS and not name[4]]
    tasks, seeds = sorted({name[1] for name in its}, key=TASKS.index), sorted({int(name[2]) for name in its})
    lacking = {
        (task, seed): [method for method in METHODS.values() if f"{task}-{seed}-{method}" not in there]
        for task, seed in product(tasks, seeds)
    }
    missing = [f"{task}-{seed}-{method}" for (task, seed), methods in lacking.items() for method in methods]
    whole = [key for key, methods in lacking.items() if methods in ([], ["mm"])]
    methods = {name: method for name, method in METHODS.items() if not any(method in lacking[key] for key in whole)}
    if missing:
        LOG.warning("%s: %s (%s)", LEFT_OUT, ", ".join(missing), folder)
    if not whole:
        return None
    record, runs = read_record(folder / "records" / "{}-{}-branch".format(*whole[0])), defaultdict(dict)
    layers = [n for n in record.exit_layers if n > 0]
    for task, seed in whole:
        runs[task][seed] = measure(folder / "records", task, seed, layers, methods)
    searched = folder.glob("paper/runs/*-n6000-seed?")  # the search of rates by confidence, of all training rows
    rates = read_rates([*(folder / "records" / name for name in there), *searched])
    return Study(record.depth, layers, methods, dict(runs), missing, rates)
