"""Turns runs into results.csv, and into the paper's tables and figures.

The CSV has a row for each run and exit (the score of that exit alone, and in how many classes it answers), and for each
run and share of the layers (the curve's score there, interpolated as in App. A). A mean over tasks is taken seed by
seed, so that its deviation is the one over seeds, as in the paper.

Dimension letters: S seeds, P points (exits, by their layers, or shares of the layers).
"""

import csv
import os
from collections.abc import Sequence
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from minisweet import plots
from minisweet.base.files import read_json, written_beside
from minisweet.checkpoint import read_config
from minisweet.exits import METHODS
from minisweet.run import EVALUATION, read_run

SHARES = [Fraction(1, 24), *(Fraction(n, 12) for n in range(1, 13)), *(Fraction(n, 4) for n in (5, 6, 7))]
# The paper's shares (App. A). For 24 layers the first is 1/24.
SHOWN = [Fraction(share) for share in ("1/12", "1/4", "1/2", "3/4", "1")]
QUARTERS = [SHOWN[1], SHOWN[3]]  # the shares of differences
PAIRS = [("sweet", "ee"), ("sweet", "mm"), ("mm", "ee")]
NAMES = {"ee": "EE", "mm": "MM", "sweet": "SWEET", "sst2": "SST-2", "cola": "CoLA"}
NAMES |= {task: task.upper() for task in ("mrpc", "rte", "mnli", "qqp", "qnli")}
# The 97.5% quantiles of Student's t, for 1 to 30 degrees of freedom.
STUDENT_T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
STUDENT_T += [2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]
CAPTION = """
Scores are in percent: Matthews correlation for CoLA, accuracy elsewhere. ± is a 95% interval over at least three seeds
(Student's t); for single exits, the standard deviation. [n]: in n runs the exit predicts one class.
Differences, at each exit and at shares of the layers, are paired over seeds. *: the interval excludes 0. "chance":
neither method beats the majority class; means leave out such tasks, and (n) is the number left.
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

    One that did not converge gives its place to the next run with a further seed that did, as in the paper (Sec. 4.2).
    Where there is none it keeps its place.
    """
    found = {run.seed: run for run in runs}
    first = sorted(seeds, key=lambda n: n not in found)  # those that were not run are the last to get one
    spare = iter(sorted(seed for seed, run in found.items() if seed > max(seeds) and run.converged))
    kept = {n: found[n] if n in found and found[n].converged else found.get(next(spare, n)) for n in first}
    return {n: run for n, run in kept.items() if run}


def best_rate(runs: Sequence[Run], seed: int) -> float | None:
    """The rate with the largest area on a seed, of the runs of a task and method (App. A); None where none has one."""
    areas = {run.rate: run.area for run in runs if run.seed == seed}
    return max(areas, key=areas.__getitem__, default=None)


def common_seeds(chosen: Chosen, tasks: Sequence[str], of: Sequence[str]) -> list[int]:
    """The seeds common to all these methods and tasks."""
    return sorted(set.intersection(*(set(chosen.get((task, method), {})) for method in of for task in tasks)))


def seed_means(chosen: Chosen, tasks: Sequence[str], of: Sequence[str], points: Sequence) -> np.ndarray:
    """A method's scores (S, P), averaged over the tasks, for seeds that ran on all; for two methods, the difference."""
    runs = [[chosen.get((task, method), {}) for task in tasks] for method in of]
    seeds = common_seeds(chosen, tasks, of)
    shape = len(of), len(tasks), len(seeds), len(points)
    scores = [by_seed[seed].score(point) for some in runs for by_seed in some for seed in seeds for point in points]
    return np.subtract.reduce(np.reshape(scores, shape).mean(1))


def mean_and_spread(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, sample deviation and half of the 95% confidence interval (Student's t): (S, ...) to (...) each.

    They are NaN where one of the S values is. Two values have no interval (its half would be nine deviations), one has
    no deviation either, and with none all three are empty.
    """
    if (S := len(values)) == 0:
        return (np.array([]),) * 3
    unknown = np.full(values.shape[1:], np.nan)
    deviation = values.std(0, ddof=1) if S > 1 else unknown
    return values.mean(0), deviation, deviation * STUDENT_T[min(S, 31) - 2] / np.sqrt(S) if S > 2 else unknown


def cells(values: ArrayLike, deviation: bool = False, sign: str = "") -> list[str]:
    """Write the means of values (S, P) or (S,), each with its 95% interval or deviation. What has no mean is blank.

    With a sign they are differences, with a star where the interval excludes 0.
    """
    texts = []
    mean, std, half = (np.atleast_1d(values).round(4) for values in mean_and_spread(np.array(values)))
    for value, spread in zip(mean, std if deviation else half, strict=True):
        text = f"{value:{sign}.1f}" + ("" if np.isnan(spread) else f" ±{spread:.1f}")
        text += "*" if sign and abs(value) > spread else ""
        texts.append("" if np.isnan(value) else text)
    return texts


def row_of(chosen: Chosen, tasks: Sequence[str], method: str, points: Sequence) -> list[str]:
    """The cells of a method at some points; see CAPTION."""
    are_exits = all(isinstance(n, int) for n in points)
    texts = cells(seed_means(chosen, tasks, (method,), points), deviation=are_exits)
    runs = [chosen[task, method][seed] for task in tasks for seed in common_seeds(chosen, tasks, (method,))]
    for place, n in enumerate(points[: len(texts)] if are_exits else ()):
        constant = sum(run.exits.get(n, (0, 2))[1] < 2 for run in runs)
        texts[place] += f" [{constant}]" * (constant > 0)
    return texts


def learned(chosen: Chosen, tasks: Sequence[str], of: Sequence[str], points: Sequence) -> list[str]:
    """The tasks on which any of these methods beats the majority class, on average over seeds and points."""

    def beats(task: str, method: str) -> bool:
        constant = next(iter(chosen[task, method].values())).constant
        return not seed_means(chosen, [task], (method,), points).mean().round(4) <= round(constant, 4)

    return [task for task in tasks if any(beats(task, method) for method in of)]


def compare(chosen: Chosen, tasks: Sequence[str], pair: tuple[str, str], points: Sequence) -> tuple[str, np.ndarray]:
    """One method minus another: a cell (see CAPTION), and its value for each seed (S,).

    The mean over the points and over the tasks on which one of them has learned something. A task with fewer than three
    seeds does not count beside others that have them.
    """
    seeds = {task: len(common_seeds(chosen, [task], pair)) for task in tasks}
    run = [task for task in tasks if seeds[task] >= max(1, min(3, max(seeds.values())))]
    if not (counting := learned(chosen, run, pair, points)):
        return "chance" if run else "not run", np.array([])
    values = seed_means(chosen, counting, pair, points).mean(1)
    text = cells(values, sign="+")[0]
    return text + f" ({len(counting)})" * (text != "" and len(counting) < len(tasks)), values


def differences(chosen: Chosen, tasks: Sequence[str], pair: tuple[str, str], points: Sequence) -> list[list[str]]:
    """One method minus another, by points: the rows of a table, the mean over the tasks and each task."""
    groups = with_mean(tasks, "**mean**").items()
    return [[name, *(compare(chosen, its, pair, [point])[0] for point in points)] for name, its in groups]


def with_mean(tasks: Sequence[str], title: str) -> dict[str, Sequence[str]]:
    """All tasks together if there are several, by this title, and then each task alone, by its name."""
    return ({title: tasks} if len(tasks) > 1 else {}) | {named(task): [task] for task in tasks}


def named(*of: str) -> str:
    """The name of a task or a method, or of one method minus another."""
    return " − ".join(NAMES.get(name, name) for name in of)


def table(title: str, head: Sequence, rows: Sequence[Sequence]) -> str:
    """A table in Markdown, with a heading if it has a title. Short rows are filled with blank cells."""
    filled = [[*row, *[""] * (len(head) - len(row))] for row in (head, *rows)]
    first, *others = (f"| {' | '.join(map(str, row))} |\n" for row in filled)
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
        areas = [f"{runs[0][0]}: {cells([area for _, area in runs])[0]}" if runs else "" for runs in found]
        rows.append([named(task), *areas])
    text = table("The rate of each method, and the area under its curve", ["task", *map(named, methods)], rows)
    for where, points in (("exit", layers), ("share of the layers", shares)):
        head = [f"exit {n}" if where == "exit" else n for n in points]
        ways = product(some.items(), methods)
        rows = [[f"{name}, {named(way)}", *row_of(chosen, its, way, points)] for (name, its), way in ways]
        text += table(f"Scores by {where}", ["", *head], rows)
    for pair in [pair for pair in PAIRS if {*pair} <= {*methods}]:
        head = ["", *(f"exit {n}" for n in layers), *QUARTERS]
        text += table(named(*pair), head, differences(chosen, tasks, pair, [*layers, *QUARTERS]))
    return text + CAPTION


def draw_panels(path: Path, panels: dict[str, tuple[Chosen, Sequence[str]]], methods: Sequence[str]) -> None:
    """Draw the methods' curves to a PNG: means over seeds, and 95% intervals. A panel is of runs and tasks."""
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = plots.new_figure(1 + 4.2 * columns, 1 + 3.4 * rows)
    ratios = np.array(SHARES, float)
    for place, (title, (chosen, tasks)) in enumerate(panels.items(), start=1):
        axis = figure.add_subplot(rows, columns, place)
        for method in methods:
            if len(values := seed_means(chosen, tasks, (method,), SHARES)):
                mean, _, half = mean_and_spread(values)
                colour = plots.draw_line(axis, method, ratios, mean, METHODS[method], marker="")
                axis.fill_between(ratios, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
        plots.label_axes(axis, title, "score, in percent")
    plots.save_figure(figure, path)
