"""From runs to the paper's tables and figures: the individual classifiers (Tables 1, 3, 4), the scores at set speedup
ratios and the areas under the curve (App. A), and the speed-accuracy curves (Figs. 4 to 8, 10).

The mean over tasks is taken for each seed, so that its deviation is the one over seeds, as in the paper. A seed that
lacks the run of a task has no mean.

Dimension letters: S seeds, P points (exits, or speedup ratios).
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from minisweet import plots
from minisweet.paper.statistics import mean_and_spread

RATIOS = (1 / 4, 1 / 2, 3 / 4, 1.0)  # besides the ratios of the first exits
MULTI_MODEL_RATIOS = (5 / 4, 3 / 2, 7 / 4)  # MM runs one model after the other; the paper's text for these is garbled
# The records of one method, by task and seed; runs that diverged are left out.
Records = dict[str, dict[int, dict]]
Points = Callable[[dict], ArrayLike]  # makes the points (P,) of a record, or one number


def curve_of(record: dict, ratios: Sequence[float]) -> np.ndarray:
    """Interpolate the curve's scores at speedup ratios (P,). A ratio that the curve does not reach gets NaN."""
    curve = plots.sorted_curve(record["speedup_ratios"], record["scores"])
    return np.interp(np.round(ratios, 9), *curve, left=np.nan, right=np.nan)


def numbers_of(record: dict, layers: Sequence[int], ratios: Sequence[float]) -> np.ndarray:
    """The scores of the exits after these layers and at the speedup ratios, and the area; NaN where there is none."""
    found = dict(zip(record["exit_layers"], record["exit_scores"], strict=True))
    return np.array([*(found.get(n, np.nan) for n in layers), *curve_of(record, ratios), record["area"]])


def with_one_class(record: dict, layers: Sequence[int]) -> list[bool]:
    """Whether each of the exits after these layers gives all validation rows the same answer."""
    found = dict(zip(record["exit_layers"], record["exit_answers"], strict=True))
    return [found.get(n, 2) < 2 for n in layers]


def seed_means(records: Records, points: Points) -> np.ndarray:
    """Average the points over the tasks, for each seed that has a run of all tasks: (S, P)."""
    seeds = set.intersection(*map(set, records.values()))
    return np.array([np.mean([points(runs[seed]) for runs in records.values()], axis=0) for seed in sorted(seeds)])


def cells(values: ArrayLike, deviation: bool = False, sign: str = "") -> list[str]:
    """Write the means of values (S, P) or (S,), each with its 95% interval or deviation. What has no mean is blank.

    With a sign they are differences, in bold where the interval leaves out 0.
    """
    mean, std, half = (np.atleast_1d(values).round(4) for values in mean_and_spread(np.array(values)))
    texts = []
    for value, spread in zip(mean, std if deviation else half, strict=True):
        text = f"{value:{sign}.1f}" + ("" if np.isnan(spread) else f" ±{spread:.1f}")
        text = f"**{text}**" if sign and abs(value) > spread else text
        texts.append("" if np.isnan(value) else text)
    return texts


def table(title: str, head: Sequence, rows: Sequence[Sequence]) -> str:
    """A table in Markdown, with a heading if it has a title. Short rows are filled with blank cells."""
    filled = [[*row, *[""] * (len(head) - len(row))] for row in (head, *rows)]
    first, *others = (f"| {' | '.join(map(str, row))} |\n" for row in filled)
    heading = f"\n### {title}\n\n" if title else ""
    return f"{heading}{first}{'|---' * len(head)}|\n{''.join(others)}"


def tables(grid: dict[str, Records]) -> str:
    """Write the tables of a grid, which maps method to task to seed to record, in Markdown.

    A table has a row for the mean over all tasks and for each task. The speedup ratios are the paper's.
    """
    tasks, runs = list(next(iter(grid.values()))), [run for records in grid.values() for run in _runs(records)]
    shown = ({f"mean of all {len(tasks)}": tasks} if len(tasks) > 1 else {}) | {task: [task] for task in tasks}
    ratios = [*RATIOS, *(min(run["speedup_ratios"]) for run in runs), *(MULTI_MODEL_RATIOS if "mm" in grid else ())]
    ratios = sorted({round(float(ratio), 9) for ratio in ratios})
    layers = sorted({n for run in runs for n in run["exit_layers"]})
    individual, curves = [], []
    for (name, its), (method, records) in product(shown.items(), grid.items()):
        records = {task: records[task] for task in its}
        means = seed_means(records, partial(numbers_of, layers=layers, ratios=ratios))
        constant = np.atleast_1d(np.sum([with_one_class(run, layers) for run in _runs(records)], axis=0))  # (exits,)
        marked = zip(cells(means, deviation=True), constant, strict=False)
        individual.append([name, method, len(means), *(f"{text} [{n}]" if n else text for text, n in marked)])
        curves.append([name, method, len(means), *cells(means)[len(layers) :]])
    head = ["task", "method", "seeds"]
    title = "Individual classifiers: mean score ± deviation over seeds; [n]: in n runs it answers with one class"
    text = "\nScores in percent: Matthews correlation of CoLA, accuracy elsewhere. An interval needs three seeds.\n"
    text += table(title, [*head, *(f"layer {n}" for n in layers)], individual)
    title = "Scores at speedup ratios, and the area under the curve: mean ± 95% interval over seeds"
    return text + table(title, [*head, *map("{:.3g}".format, ratios), "area"], curves)


def _runs(records: Records) -> list[dict]:
    """The records of all tasks and seeds."""
    return [run for runs in records.values() for run in runs.values()]


def draw_curves(path: Path, grid: dict[str, Records], panels: dict[str, list[str]]) -> None:
    """Draw the speed-accuracy curves of a grid's methods to a PNG: means over seeds and their 95% intervals.

    Each panel has a title, and the tasks to average over.
    """
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = plots.new_figure(1 + 4.2 * columns, 1 + 3.4 * rows)
    for place, (title, tasks) in enumerate(panels.items(), start=1):
        axis = figure.add_subplot(rows, columns, place)
        for method in grid:
            records = {task: grid[method][task] for task in tasks}
            reached = [ratio for run in _runs(records) for ratio in run["speedup_ratios"]] or [0]
            ratios = np.linspace(min(reached), max(reached), 400)
            values = seed_means(records, partial(curve_of, ratios=ratios))  # (S, P)
            if len(values):
                draw_mean(axis, method, ratios, values, plots.WORDS.get(method, method))
        plots.label_axes(axis, title, "score, in percent")
    plots.save_figure(figure, path)


def draw_mean(axis, method: str, ratios: np.ndarray, values: np.ndarray, label: str) -> None:
    """Draw the mean of S curves at the same ratios (P,), scores (S, P), and the band of its interval if S > 2."""
    mean, _, half = mean_and_spread(values)
    colour = plots.draw_line(axis, method, ratios, mean, label, marker="")
    axis.fill_between(ratios, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
