"""From runs to the paper's tables and figures: the individual classifiers (Tables 1, 3, 4), the scores at set speedup
ratios and the areas under the curve (App. A), and the speed-accuracy curves (Figs. 4 to 8, 10).

The mean over tasks is taken for each seed, so that its deviation is the one over seeds, as in the paper. A seed that
lacks the run of a task has no mean. Only the differences between methods pool all pairs of a task and a seed.

Dimension letters: S seeds, P points (exits, or speedup ratios).
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from operator import itemgetter
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from minisweet.use.plots import draw_line, label_axes, new_figure, save_figure, sorted_curve

# The 97.5% quantiles of Student's t, for 1 to 30 degrees of freedom.
STUDENT_T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
STUDENT_T += [2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]
INTERVAL = "mean ± 95% interval"
RATIOS = (1 / 4, 1 / 2, 3 / 4, 1.0)  # besides the ratios of the first exits
MULTI_MODEL_RATIOS = (5 / 4, 3 / 2, 7 / 4)  # MM runs one model after the other; the paper's text for these is garbled
# The records of one method and training size, by task and seed. A run that diverged is {}.
Records = dict[str, dict[int, dict]]
Points = Callable[[dict], ArrayLike]  # makes the points (P,) of a record, or one number


def interpolated(record: dict, ratios: Sequence[float]) -> np.ndarray:
    """Interpolate the curve's scores at speedup ratios (P,). A ratio that the curve does not reach gets NaN."""
    curve = sorted_curve(record["speedup_ratios"], record["scores"])
    return np.interp(np.round(ratios, 9), *curve, left=np.nan, right=np.nan)


def exit_scores(record: dict, layers: Sequence[int]) -> list[float]:
    """The scores of the exits after these layers, and NaN where there is no exit."""
    found = dict(zip(record["exit_layers"], record["exit_scores"], strict=True))
    return [found.get(n, np.nan) for n in layers]


def seed_means(records: Records, points: Points) -> np.ndarray:
    """Average the points over the tasks, for each seed that has a run of all tasks: (S, P)."""
    seeds = set.intersection(*({seed for seed, run in runs.items() if run} for runs in records.values()))
    return np.array([np.mean([points(runs[seed]) for runs in records.values()], axis=0) for seed in sorted(seeds)])


def over_seeds(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, sample deviation and half of the 95% confidence interval (Student's t): (S, ...) to (...) each.

    They are NaN where a seed has no value, and the latter two are NaN with one seed. Without a seed all are empty.
    """
    if (S := len(values)) == 0:
        return (np.array([]),) * 3
    std = values.std(0, ddof=1) if S > 1 else np.full(values.shape[1:], np.nan)
    return values.mean(0), std, std * STUDENT_T[min(S, 31) - 2] / np.sqrt(S)


def differences(ours: Records, theirs: Records, points: Points) -> list[np.ndarray]:
    """Subtract from the points of a method's runs those of another method's run of the same task and seed."""
    pairs = [(runs[seed], theirs[task].get(seed)) for task, runs in ours.items() for seed in runs]
    return [np.subtract(points(run), points(other)) for run, other in pairs if run and other]


def cells(values: ArrayLike, deviation: bool = False, sign: str = "") -> list[str]:
    """Write the means of values (S, P) or (S,), each with its 95% interval or deviation. What has no mean is blank."""
    mean, std, ci95 = (np.atleast_1d(of_seeds).round(4) for of_seeds in over_seeds(np.array(values)))
    pairs = zip(mean, std if deviation else ci95, strict=True)
    pairs = [(value, "" if np.isnan(spread) else f" ±{spread:.1f}") for value, spread in pairs]
    return ["" if np.isnan(value) else f"{value:{sign}.1f}{spread}" for value, spread in pairs]


def table(title: str, head: Sequence, rows: Sequence[Sequence]) -> str:
    """A heading and a table in Markdown, after an empty line. Short rows are filled with blank cells."""
    filled = [[*row, *[""] * (len(head) - len(row))] for row in (head, *rows)]
    first, *others = (f"| {' | '.join(map(str, row))} |\n" for row in filled)
    return f"\n### {title}\n\n{first}{'|---' * len(head)}|\n{''.join(others)}"


def tables(grid: dict[str, Records], chosen: Sequence[float] | None = None) -> str:
    """Write the tables of a grid, which maps method to task to seed to record, in Markdown.

    A table has a row for the mean over tasks and for each task. `chosen` replaces the paper's speedup ratios.
    """
    tasks, runs = list(next(iter(grid.values()))), [run for records in grid.values() for run in _runs(records)]
    shown = ({"mean": tasks} if len(tasks) > 1 else {}) | {task: [task] for task in tasks}
    papers = [*RATIOS, *(min(run["speedup_ratios"]) for run in runs)]
    papers += MULTI_MODEL_RATIOS if any(method.startswith("mm") for method in grid) else ()
    ratios = sorted({round(float(ratio), 9) for ratio in chosen or papers})
    layers = sorted({n for run in runs for n in run["exit_layers"]})
    individual, curves = [], []
    for (name, its), (method, records) in product(shown.items(), grid.items()):
        records = {task: records[task] for task in its}
        scores = seed_means(records, partial(exit_scores, layers=layers))
        individual.append([name, method, len(scores), *cells(scores, deviation=True)])
        at_ratios = cells(seed_means(records, partial(interpolated, ratios=ratios)))
        curves.append([name, method, len(scores), *at_ratios])
    head = ["task", "method", "seeds"]
    title = "Individual classifiers: mean score ± deviation over seeds"
    text = table(title, [*head, *map("layer {}".format, layers)], individual)
    title = f"Scores at speedup ratios, interpolated, {INTERVAL} over seeds"
    text += table(title, [*head, *map("{:.3g}".format, ratios)], curves)
    return text + difference_tables(grid, shown, [ratio for ratio in ratios if ratio <= 1])


def difference_tables(grid: dict[str, Records], shown: dict[str, list[str]], ratios: Sequence[float]) -> str:
    """Write the last method's interpolated scores less each other method's, and all methods' areas under the curve.

    `shown` are the tasks to average the areas over, by the name of the column.
    """
    *others, last = grid
    points, area, rows = partial(interpolated, ratios=ratios), itemgetter("area"), []
    pairs = {other: differences(grid[last], grid[other], points) for other in others}
    compared = [[other, len(found), *cells(found, sign="+")] for other, found in pairs.items() if found]
    for method, records in grid.items():
        row = [cells(seed_means({task: records[task] for task in its}, area)) for its in shown.values()]
        row += [cells(differences(records, grid[other], area), sign="+") if other != method else [] for other in grid]
        rows.append([method, len(seed_means(records, area)), *map("".join, row)])
    title = f"{last} less each other, paired over tasks and seeds, {INTERVAL}"
    text = table(title, ["less", "pairs", *map("{:.3g}".format, ratios)], compared) if compared else ""
    title = f"Area under the curve, {INTERVAL} over seeds, and less each other's, paired over tasks and seeds"
    return text + table(title, ["method", "seeds", *shown, *(f"less {other}" for other in grid)], rows)


def _runs(records: Records) -> list[dict]:
    """The records of all tasks and seeds but those of runs that diverged."""
    return [run for runs in records.values() for run in runs.values() if run]


def draw_curves(path: Path, panels: list[tuple[str, dict[str, Records], list[str]]]) -> None:
    """Draw speed-accuracy curves to a PNG: the mean over seeds and, shaded, its 95% interval.

    Each panel is a title, a grid as in `tables`, and the tasks to average over.
    """
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(1 + 4.2 * columns, 1 + 3.4 * rows)
    for place, (title, grid, tasks) in enumerate(panels, start=1):
        axis = figure.add_subplot(rows, columns, place)
        for k, (method, records) in enumerate(grid.items()):
            records = {task: records[task] for task in tasks}
            reached = [ratio for run in _runs(records) for ratio in run["speedup_ratios"]] or [0]
            ratios = np.linspace(min(reached), max(reached), 400)
            mean, _, ci95 = over_seeds(seed_means(records, partial(interpolated, ratios=ratios)))
            if len(mean):
                colour = draw_line(axis, k, ratios, mean, method, marker="")
                axis.fill_between(ratios, mean - ci95, mean + ci95, color=colour, alpha=0.15, linewidth=0)
        label_axes(axis, title, "score")
    save_figure(figure, path)
