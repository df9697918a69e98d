"""Speed-accuracy curves of saved evaluations as a PNG: one run's, or several in one picture.

A curve has a point per threshold: the score in percent over the speedup ratio, the share of the layers run (Eq. 1).
Bars and the band of full depth are 95% intervals. An operating point is stated by the rows that judge, and its curve is
of all rows, so it may lie beside the curve. Dimension letter: P points of a curve.
"""

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from minisweet.adaptive import Exits
from minisweet.base.files import InputError, one_line, written_beside
from minisweet.evaluation.metrics import METRICS
from minisweet.runs.folders import Evaluation

# Okabe and Ito's colours, which the colour-blind can tell apart. Line styles say the same without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")
WITH_INTERVAL = "{:.1f} ({:.1f} to {:.1f})"


def new_figure(width: float, height: float):
    """A figure of matplotlib's, in inches. The classifier starts faster where matplotlib is imported here alone."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["text.parse_math"] = False  # a name may hold two $
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path: Path) -> None:
    """Write a figure to a PNG, whole or not at all, with one legend below its axes, where it covers no curve."""
    entries = {name: line for axis in figure.axes for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    if entries:
        figure.legend(entries.values(), entries.keys(), fontsize=9, loc="outside lower left")
    with written_beside(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def sorted_curve(ratios: ArrayLike, scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The ratios (P,) in increasing order, and their scores (P,).

    The thresholds' order is another: at t = 1 a branch model asks no exit but the last, which is cheaper.
    """
    ratios = np.round(ratios, 9)
    order = ratios.argsort(kind="stable")
    return ratios[order], np.array(scores)[order]


def draw_line(axis, k: int, ratios: ArrayLike, scores: ArrayLike, label: str, marker: str = ".") -> str:
    """Draw the k-th curve of a picture; returns its colour."""
    colour = COLOURS[k % len(COLOURS)]
    axis.plot(*sorted_curve(ratios, scores), LINES[k % len(LINES)], color=colour, marker=marker, label=label)
    return colour


def label_axes(axis, title: str, score: str) -> None:
    """The title, the labels and the grid of speed-accuracy curves."""
    axis.set(title=one_line(title, 100), xlabel="speedup ratio: share of the layers run", ylabel=score)
    axis.grid(alpha=0.3)


def draw_curves(path: Path, evaluations: dict[str, Evaluation]) -> None:
    """Draw the curves and operating points of runs, by the names to show; replaces a PNG at `path`.

    One run alone also has full depth, and each exit as a dot. Raises InputError for a run that was evaluated on other
    data than the first.
    """
    first, of_first = next(iter(evaluations.items()))
    figure = new_figure(7.2, 5.6)
    axis = figure.subplots()
    for k, (name, evaluation) in enumerate(evaluations.items()):
        if (evaluation.metric, evaluation.dev_digest) != (of_first.metric, of_first.dev_digest):
            raise InputError(f"{name[:120]}: it was evaluated on other rows, or by another metric, than {first[:120]}")
        point = evaluation.operating_point
        label = f"{one_line(name, 80)}, {evaluation.method}: area {evaluation.area:.1f}, operating point "
        label += WITH_INTERVAL.format(point.score, *point.score_interval)
        colour = draw_line(axis, k, evaluation.speedup_ratios, evaluation.scores, label)
        axis.plot(point.speedup_interval, [point.score] * 2, color=colour, linewidth=2)
        axis.plot([point.speedup_ratio] * 2, point.score_interval, color=colour, linewidth=2)
        axis.plot(point.speedup_ratio, point.score, "*", color=colour, markersize=15, markeredgecolor="white", zorder=3)
    if len(evaluations) == 1:
        _draw_exits(axis, of_first)
    title = f"{one_line(of_first.task, 30)}, {of_first.examples:,} rows; stars: operating points, 95% intervals"
    label_axes(axis, title, f"{METRICS[of_first.metric]}, in percent")
    axis.margins(y=0.12)
    save_figure(figure, path)


def _draw_exits(axis, evaluation: Evaluation) -> None:
    """Draw full depth, and each exit without the others."""
    layers, scores, point = evaluation.exit_layers, evaluation.exit_scores, evaluation.operating_point
    name = "full depth: " + WITH_INTERVAL.format(scores[-1], *point.full_depth_interval)
    axis.axhspan(*point.full_depth_interval, color="0.5", alpha=0.13, linewidth=0)
    axis.axhline(scores[-1], color="0.35", linestyle="--", linewidth=1, label=name)
    depth = Exits(layers, 1, evaluation.method).costs(1.0)[-1] / evaluation.speedup_ratios[-1]  # all take the last exit
    name = "an exit without the others, and its layer"
    axis.plot(np.array(layers) / depth, scores, "o", color=COLOURS[1], label=name)
    for n, score in zip(layers, scores, strict=True):
        axis.annotate(n, (n / depth, score), xytext=(0, -15), textcoords="offset points", ha="center")
