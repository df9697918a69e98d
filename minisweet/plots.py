"""Speed-accuracy curves as a PNG: of saved evaluations, and what the paper's reports draw with.

A curve has a point per threshold: the score in percent over the speedup ratio, the share of the layers run (Eq. 1).
Dimension letter: P points of a curve.
"""

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from minisweet.base.files import InputError, one_line, written_beside
from minisweet.metrics import METRICS
from minisweet.methods import METHODS
from minisweet.record import Evaluation

# One colour per method in all pictures: Okabe and Ito's, which the colour-blind can tell apart.
COLOURS = {"sweet": "#D55E00", "ee": "#0072B2", "mm": "#009E73", "branch": "#CC79A7", "plain": "#000000"}
COLOURS |= {"exit 0": "#E69F00", "full depth": "#6E6E6E", "other": "#56B4E9"}
WORDS = {name: method.words for name, method in METHODS.items()}
LINES = ("-", "--", "-.", ":")  # of the curves that share a colour
MOST = 5  # curves that can be told apart in one picture


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


def draw_line(axis, method: str, ratios: ArrayLike, scores: ArrayLike, label: str, marker: str = ".") -> str:
    """Draw a curve in its method's colour, which is returned."""
    colour = COLOURS.get(method, COLOURS["other"])
    before = sum(line.get_color() == colour and line.get_label()[0] != "_" for line in axis.lines)
    style = LINES[before % len(LINES)]
    axis.plot(*sorted_curve(ratios, scores), style, color=colour, marker=marker, label=label)
    return colour


def label_axes(axis, title: str, score: str) -> None:
    """The title, the labels and the grid of speed-accuracy curves."""
    axis.set(title=one_line(title, 100), xlabel="speedup ratio: share of the layers run (less is faster)", ylabel=score)
    axis.grid(alpha=0.3)


def draw_curves(path: Path, evaluations: dict[str, Evaluation]) -> None:
    """Draw the curves of runs, by the names to show; replaces a PNG at `path`.

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
        label = f"{WORDS.get(evaluation.method, evaluation.method)}, {one_line(name, 60)}"
        draw_line(axis, evaluation.method, evaluation.speedup_ratios, evaluation.scores, label)
    title = f"{one_line(of_first.task, 30)}, {of_first.examples:,} rows"
    label_axes(axis, title, f"{METRICS[of_first.metric]}, in percent")
    axis.margins(y=0.12)
    save_figure(figure, path)
