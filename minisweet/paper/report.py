"""Turns runs into results.csv, and into the paper's tables and figures.

The CSV has a row for each run and exit (the score of that exit alone, and in how many classes it answers), and for each
run and share of the layers (the curve's score there, interpolated as in App. A). Both are points of a table. Tasks are
strata: the variances of their means add up, since the seeds of one task have nothing in common with those of another.
"""

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minisweet import plots
from minisweet.base.files import read_json, written_beside
from minisweet.exits import METHODS
from minisweet.loading import read_config
from minisweet.run import EVALUATION, read_run

SHARES = [Fraction(1, 24), *(Fraction(n, 12) for n in range(1, 13)), *(Fraction(n, 4) for n in (5, 6, 7))]
SHOWN = [Fraction(share) for share in ("1/12", "1/4", "1/2", "3/4", "1")]  # as in the paper (App. A)
FAST = [Fraction(1, 6), Fraction(1, 4), Fraction(1, 2)]  # the shares of differences: where the paper calls it fast
PAIRS = [{"sweet": 1, "ee": -1}, {"sweet": 1, "mm": -1}, {"mm": 1, "ee": -1}]
NAMES = {"ee": "EE", "mm": "MM", "sweet": "SWEET", "sst2": "SST-2", "cola": "CoLA"}
NAMES |= {task: task.upper() for task in ("mrpc", "rte", "mnli", "qqp", "qnli")}
# The 97.5% quantiles of Student's t, by its degrees of freedom.
STUDENT_T: dict[float, float] = {1: 12.706, 1.5: 6.017, 2: 4.303, 2.25: 3.876, 2.5: 3.575, 3: 3.182, 3.5: 2.940}
STUDENT_T |= {4: 2.776, 5: 2.571, 6: 2.447, 8: 2.306, 10: 2.228, 15: 2.131, 30: 2.042, np.inf: 1.960}
CAPTION = """
Scores are in percent: Matthews correlation for CoLA, accuracy elsewhere. ± is a 95% interval (Student's t) over at
least three seeds; "over tasks", over the tasks' means. [n]: in n runs the exit predicts one class. Differences are
paired by seed. *: the interval excludes 0. (n): of n tasks, as others have no or too few runs.
"""


class Run(NamedTuple):
    """A run and its evaluation."""

    model: str
    task: str
    method: str
    strategy: str
    train_size: int
    rate: float
    seed: int
    pooling: str  # what an exit reads: "cls" or "mean"
    exits: dict[int, tuple[float, int]]  # by layer: the score, and how many classes the exit predicts
    shares: dict[Fraction, float]  # the curve's scores
    area: float  # under the curve
    constant: float  # what the majority class scores
    precision: str
    seconds: float  # of training; NaN where the file has none
    commit: str

    @property
    def converged(self) -> bool:
        """Whether the last exit predicts several classes, and beats the majority class."""
        score, classes = self.exits[max(self.exits)]
        return classes > 1 and round(score, 4) > round(self.constant, 4)  # as the CSV has them

    def score(self, point: int | Fraction) -> float:
        """The score of an exit alone, or of the curve at a share of the layers; NaN where there is none."""
        return self.exits.get(point, (np.nan, 0))[0] if isinstance(point, int) else self.shares.get(point, np.nan)


KEY = "model task method strategy train_size rate seed pooling".split()  # what tells a commit's runs apart
LAST = "area constant precision seconds commit".split()  # what follows the scores in the file
Chosen = dict[tuple[str, str], dict[int, Run]]  # the runs that are shown, by task and method, and by seed
Weights = Mapping  # of methods, as in PAIRS, or of points


class Estimate(NamedTuple):
    """A mean over tasks, and half of its 95% confidence interval (NaN if there are too few values)."""

    mean: float
    half: float
    tasks: int


def run_of(folder: Path, commit: str = "") -> Run:
    """What train.py and evaluate.py wrote of a run."""
    record, found = read_run(folder), read_json(folder / EVALUATION)
    of_exits = zip(found["exit_scores"], found["exit_answers"], strict=True)
    exits = dict(zip(found["exit_layers"], of_exits, strict=True))
    curve = np.round(found["speedup_ratios"], 9), found["scores"]
    scores = np.interp(np.round(np.array(SHARES, float), 9), *curve, left=np.nan, right=np.nan).tolist()
    shares = {share: score for share, score in zip(SHARES, scores, strict=True) if not np.isnan(score)}
    model, pooling = Path(os.path.realpath(record.model)).name, read_config(folder).pooling
    options = record.method, record.exit_strategy, record.train_size, record.lr, record.seed
    key = model, record.task, *options, pooling
    precision = record.precision.removeprefix("torch.")
    return Run._make([*key, exits, shares, found["area"], found["majority"], precision, record.seconds, commit])


def read_runs(path: Path) -> list[Run]:
    """The runs of a CSV."""
    runs: dict[tuple, Run] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            *texts, size, rate, seed, pooling = (row[name] for name in KEY)
            area, constant, precision, seconds, commit = (row[name] for name in LAST)
            key = *texts, int(size), float(rate), int(seed), pooling
            last = float(area), float(constant), precision, float(seconds or "nan"), commit
            run = runs.setdefault((key, commit), Run._make([*key, {}, {}, *last]))
            if row["exit"]:
                run.exits[int(row["exit"])] = float(row["score"]), int(row["classes"])
            elif row["share"]:
                run.shares[Fraction(row["share"])] = float(row["score"])
    return list(runs.values())


def write_runs(path: Path, runs: Sequence[Run]) -> None:
    """Write runs to a CSV file. Scores have four decimals. Runs that differ only by commit keep their order."""
    with written_beside(path) as new, new.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*KEY, "exit", "share", "score", "classes", *LAST])
        for run in sorted(runs, key=lambda run: run[: len(KEY)]):
            seconds = "" if np.isnan(run.seconds) else run.seconds
            last = [f"{run.area:.4f}", f"{run.constant:.4f}", run.precision, seconds, run.commit]
            rows = [[layer, "", f"{score:.4f}", classes] for layer, (score, classes) in run.exits.items()]
            rows += [["", share, f"{score:.4f}", ""] for share, score in run.shares.items()]
            key = run._asdict() | {"rate": rate_text(run.rate)}
            writer.writerows([*(key[name] for name in KEY), *row, *last] for row in rows)


def rate_text(rate: float) -> str:
    """A learning rate as it is typed, such as 5e-5."""
    mantissa, exponent = f"{rate:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def counted(runs: Sequence[Run], seeds: Sequence[int]) -> dict[int, Run]:
    """The runs of a task, method and rate by the seed that they count for.

    A run that did not converge is replaced by the next run with a further seed that did, as in the paper (Sec. 4.2).
    If there is none, it stays.
    """
    found = {run.seed: run for run in runs}
    first = sorted(seeds, key=lambda n: n not in found)  # those that were not run are the last to get one
    spare = iter(sorted(seed for seed, run in found.items() if seed > max(seeds) and run.converged))
    kept = {n: found[n] if n in found and found[n].converged else found.get(next(spare, n)) for n in first}
    return {n: run for n, run in kept.items() if run}


def complete(chosen: Chosen, tasks: Sequence[str], methods: Iterable[str]) -> list[str]:
    """The tasks that all these methods ran on. One with fewer than three seeds is left out if another has more."""
    seeds = {task: min(len(chosen.get((task, method), {})) for method in methods) for task in tasks}
    return [task for task in tasks if seeds[task] >= max(1, min(3, max(seeds.values())))]


def estimate(*samples: Sequence[float] | np.ndarray, tasks: int = 1) -> Estimate:
    """The sum of the means of independent samples, divided by the number of tasks.

    The variances of the means add up, and Student's t has Welch and Satterthwaite's degrees of freedom. If a sample has
    fewer than three values there is no interval.
    """
    mean, sizes = sum(float(np.mean(sample)) for sample in samples) / tasks, np.array([*map(len, samples)])
    if sizes.min() < 3:
        return Estimate(mean, np.nan, tasks)
    errors = np.array([np.var(sample, ddof=1) for sample in samples]) / sizes / tasks**2
    freedom = errors.sum() ** 2 / (errors**2 / (sizes - 1)).sum() if errors.any() else np.inf
    log_t = np.interp(-1 / freedom, [-1 / n for n in STUDENT_T], np.log([*STUDENT_T.values()]))  # nearly linear
    return Estimate(mean, float(np.exp(log_t) * np.sqrt(errors.sum())), tasks)


def samples_of(chosen: Chosen, task: str, methods: Weights, points: Weights) -> list[list[float]]:
    """A task's independent samples. The sum of their means is the weighted sum over methods and points.

    Runs with the same seed saw the same rows, so they are combined seed by seed. If that leaves fewer than three seeds,
    because others replaced those that failed, each method is a sample of its own.
    """
    values = []
    for method, sign in methods.items():
        runs = chosen[task, method].values()
        values.append({run.seed: sign * sum(n * run.score(point) for point, n in points.items()) for run in runs})
    shared = set.intersection(*map(set, values))
    if len(shared) < min(3, *map(len, values)):
        return [list(of_method.values()) for of_method in values]
    return [[sum(of_method[seed] for of_method in values) for seed in shared]]


def compare(chosen: Chosen, tasks: Sequence[str], methods: Weights, points: Weights) -> Estimate:
    """A weighted sum over methods and points, averaged over the tasks that have runs of all methods."""
    counting = complete(chosen, tasks, methods)
    samples = [sample for task in counting for sample in samples_of(chosen, task, methods, points)]
    return estimate(*samples, tasks=len(counting)) if counting else Estimate(np.nan, np.nan, 0)


def cell(found: Estimate, of: int = 1, sign: str = "") -> str:
    """Format a mean over up to `of` tasks, with its interval; see CAPTION. For a difference, `sign` is "+"."""
    mean, half = round(found.mean, 4), round(found.half, 4)
    text = f"{mean:{sign}.1f}" + ("" if np.isnan(half) else f" ±{half:.1f}")
    text += "*" * bool(sign and abs(mean) > half) + f" ({found.tasks})" * (found.tasks < of)
    return "" if np.isnan(mean) else text


def row_of(chosen: Chosen, tasks: Sequence[str], method: str, points: Sequence) -> list[str]:
    """The cells of a method at some points; see CAPTION."""
    counting, texts = complete(chosen, tasks, [method]), []
    runs = [run for task in counting for run in chosen[task, method].values()]
    for point in points:
        constant = isinstance(point, int) and sum(run.exits.get(point, (0, 2))[1] < 2 for run in runs)
        text = cell(compare(chosen, tasks, {method: 1}, {point: 1}), len(tasks))
        texts.append(text + f" [{constant}]" * (constant > 0))
    return texts


def differences(chosen: Chosen, tasks: Sequence[str], pair: Weights, points: Sequence) -> list[list[str]]:
    """One method minus another, by points: the mean over the tasks, with both intervals, and each task."""
    rows, counting = [], complete(chosen, tasks, pair)
    for name, its in with_mean(tasks, "**mean**").items():
        rows.append([name, *(cell(compare(chosen, its, pair, {point: 1}), len(its), "+") for point in points)])
    if len(counting) > 2:
        means = [[compare(chosen, [task], pair, {point: 1}).mean for task in counting] for point in points]
        rows.insert(1, ["over tasks", *(cell(estimate(of_point), sign="+") for of_point in means)])
    return rows


def with_mean(tasks: Sequence[str], title: str) -> dict[str, Sequence[str]]:
    """All tasks together if there are several, by this title, and then each task alone, by its name."""
    return ({title: tasks} if len(tasks) > 1 else {}) | {named(task): [task] for task in tasks}


def named(*of: str) -> str:
    """The name of a task or a method, or of one method minus another."""
    return " − ".join(NAMES.get(name, name) for name in of)


def table(title: str, head: Sequence, rows: Sequence[Sequence]) -> str:
    """A table in Markdown, with a heading if it has a title."""
    first, *others = (f"| {' | '.join(map(str, row))} |\n" for row in (head, *rows))
    heading = f"\n### {title}\n\n" if title else ""
    return f"{heading}{first}{'|---' * len(head)}|\n{''.join(others)}"


def tables(chosen: Chosen, tasks: Sequence[str], methods: Sequence[str]) -> str:
    """All tables of some runs: rates and areas; scores and differences, of the mean over all tasks and of each task."""
    some = with_mean(tasks, f"mean of {len(tasks)}")
    layers = sorted({n for runs in chosen.values() for run in runs.values() for n in run.exits})
    shares = [Fraction(1, 24), *SHOWN[1:]] if 24 in layers else SHOWN
    rows = []
    for task in tasks:
        found = [[(rate_text(run.rate), run.area) for run in chosen[task, method].values()] for method in methods]
        areas = [f"{runs[0][0]}: {cell(estimate([area for _, area in runs]))}" if runs else "" for runs in found]
        rows.append([named(task), *areas])
    text = table("The rate of each method, and the area under its curve", ["task", *map(named, methods)], rows)
    for where, points in (("exit", layers), ("share of the layers", shares)):
        head = [f"exit {n}" if where == "exit" else n for n in points]
        ways = product(some.items(), methods)
        rows = [[f"{name}, {named(way)}", *row_of(chosen, its, way, points)] for (name, its), way in ways]
        text += table(f"Scores by {where}", ["", *head], rows)
    for pair in [pair for pair in PAIRS if {*pair} <= {*methods}]:
        head = ["", *(f"exit {n}" for n in layers), *FAST]
        text += table(named(*pair), head, differences(chosen, tasks, pair, [*layers, *FAST]))
    return text + CAPTION


def draw_panels(path: Path, panels: dict[str, tuple[Chosen, Sequence[str]]], methods: Sequence[str]) -> None:
    """Draw the methods' curves to a PNG: means over seeds, and 95% intervals. A panel is of runs and tasks."""
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = plots.new_figure(1 + 4.2 * columns, 1 + 3.4 * rows)
    for place, (title, (chosen, tasks)) in enumerate(panels.items(), start=1):
        axis = figure.add_subplot(rows, columns, place)
        for method in methods:
            if complete(chosen, tasks, [method]):
                exits = sorted(next(iter(chosen[tasks[0], method].values())).exits)
                end = Fraction(sum(exits), exits[-1]) if method == "mm" else Fraction(1)  # all texts take the last exit
                shares = [share for share in SHARES if share < end]
                values = [compare(chosen, tasks, {method: 1}, {point: 1}) for point in (*shares, exits[-1])]
                ratios, (mean, half, _) = np.array([*shares, end], float), np.array(values).T
                colour = plots.draw_line(axis, method, ratios, mean, METHODS[method], marker="")
                axis.fill_between(ratios, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
        plots.label_axes(axis, title, "score, in percent")
    plots.save_figure(figure, path)
