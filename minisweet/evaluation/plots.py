"""Speed-accuracy curves as a PNG: of saved evaluations, and what the paper's reports draw with.

A curve has a point per threshold: the score in percent over the speedup ratio, the share of the layers run (Eq. 1).
Bars and bands are 95% intervals. An operating point is stated by the rows that judge, and its curve is of all rows, so
it may lie beside the curve. Dimension letters: S curves, P points of a curve.
"""

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from minisweet.base.files import InputError, one_line, written_beside
from minisweet.evaluation.metrics import METRICS
from minisweet.methods import METHODS
from minisweet.runs.records import Evaluation

COLOURS = {name: method.colour for name, method in METHODS.items()}  # one colour per method in all pictures
COLOURS |= {"exit 0": "#E69F00", "full depth": "#6E6E6E", "other": "#56B4E9"}
WORDS = {name: method.words for name, method in METHODS.items()}
LINES = ("-", "--", "-.", ":")  # of the curves that share a colour
MOST = 5  # curves that can be told apart in one picture
# The 97.5% quantiles of Student's t, for 1 to 30 degrees of freedom.
STUDENT_T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
STUDENT_T += [2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]


def new_figure(width: float, height: float):
    """A figure of matplotlib's, in inches. The classifier starts faster where matplotlib is imported here alone."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path: Path) -> None:
    """Write a figure to a PNG, whole or not at all, with one legend below its axes, where it covers no curve."""
    entries = {name: line for axis in figure.axes for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    if entries:
        room = int(13 * figure.get_figwidth() / (7 + max(map(len, entries))))  # 13 characters per inch
        options = {"fontsize": 9, "loc": "outside lower center", "ncols": max(1, min(room, len(entries)))}
        figure.legend(entries.values(), entries.keys(), frameon=False, **options)
    for text in figure.findobj(lambda artist: hasattr(artist, "set_parse_math")):
        text.set_parse_math(False)  # a name may hold two $
    with written_beside(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def sorted_curve(ratios: ArrayLike, scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The ratios (P,) in increasing order, and their scores (P,).

    The thresholds' order is another: at t = 1 a branch model asks no exit but the last, which is cheaper.
    """
    ratios = np.round(ratios, 9)
    order = ratios.argsort(kind="stable")
    return ratios[order], np.array(scores)[order]


def mean_and_spread(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, sample deviation and half of the 95% confidence interval (Student's t): (S, ...) to (...) each.

    They are NaN where one of the S values is. Of two values there is no interval: it would be nine deviations wide. Of
    one there is no deviation, and of none all three are empty.
    """
    if (S := len(values)) == 0:
        return (np.array([]),) * 3
    unknown = np.full(values.shape[1:], np.nan)
    deviation = values.std(0, ddof=1) if S > 1 else unknown
    return values.mean(0), deviation, deviation * STUDENT_T[min(S, 31) - 2] / np.sqrt(S) if S > 2 else unknown


def draw_line(axis, method: str, ratios: ArrayLike, scores: ArrayLike, label: str, marker: str = ".") -> str:
    """Draw a curve in its method's colour, which is returned."""
    colour = COLOURS.get(method, COLOURS["other"])
    before = sum(line.get_color() == colour and line.get_label()[0] != "_" for line in axis.lines)
    style = LINES[before % len(LINES)]
    axis.plot(*sorted_curve(ratios, scores), style, color=colour, marker=marker, label=label)
    return colour


def draw_mean(axis, method: str, ratios: np.ndarray, values: np.ndarray, label: str) -> None:
    """Draw the mean of S curves at the same ratios (P,), scores (S, P), and the band of its interval if S > 2."""
    mean, _, half = mean_and_spread(values)
    colour = draw_line(axis, method, ratios, mean, label, marker="")
    axis.fill_between(ratios, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)


def label_axes(axis, title: str, score: str) -> None:
    """The title, the labels and the grid of speed-accuracy curves."""
    axis.set(title=one_line(title, 100), xlabel="speedup ratio: share of the layers run (less is faster)", ylabel=score)
    axis.grid(alpha=0.3)


def draw_curves(path: Path, evaluations: dict[str, Evaluation]) -> None:
    """Draw the curves and operating points of runs, by the names to show; replaces a PNG at `path`.

    Raises InputError for a run that was evaluated on other data than the first, and for too many runs.
    """
    first, of_first = next(iter(evaluations.items()))
    if len(evaluations) > MOST:
        raise InputError(f"--plot: {len(evaluations)} runs, should be at most {MOST}")
    figure = new_figure(7.2, 5.6)
    axis = figure.subplots()
    for name, evaluation in evaluations.items():
        if (evaluation.metric, evaluation.dev_digest) != (of_first.metric, of_first.dev_digest):
            raise InputError(f"{name[:120]}: it was evaluated on other rows, or by another metric, than {first[:120]}")
        point, label = evaluation.operating_point, WORDS.get(evaluation.method, evaluation.method)
        label += f", {one_line(name, 60)}: {point.score:.1f} at {point.speedup_ratio:.0%} of the layers"
        colour = draw_line(axis, evaluation.method, evaluation.speedup_ratios, evaluation.scores, label)
        axis.plot(point.speedup_interval, [point.score] * 2, color=colour, linewidth=2)
        axis.plot([point.speedup_ratio] * 2, point.score_interval, color=colour, linewidth=2)
        axis.plot(point.speedup_ratio, point.score, "*", color=colour, markersize=15, markeredgecolor="white", zorder=3)
    title = f"{one_line(of_first.task, 30)}, {of_first.examples:,} rows; stars: operating points, 95% intervals"
    label_axes(axis, title, f"{METRICS[of_first.metric]}, in percent")
    axis.margins(y=0.12)
    save_figure(figure, path)
