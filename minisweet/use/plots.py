"""Speed-accuracy curves of saved evaluations, as PNG files: one run's, or several in one picture.

A curve has a point per threshold: the score in percent over the speedup ratio, the share of the layers run (Eq. 1).
Dimension letter: P points of a curve.
"""

import os
from itertools import cycle, product
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from minisweet.adaptive import Exits
from minisweet.base.safe import InputError, one_line, written_beside
from minisweet.runs.records import Evaluation

METRICS = {"accuracy": "accuracy", "matthews": "Matthews correlation", "agreement": "agreement with full depth"}
# Okabe and Ito's colours, which the colour-blind can tell apart. Line styles and markers say the same without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES, MARKERS = ("-", "--", "-.", ":"), "osD^vP*"


def new_figure(path: Path, **options):
    """A figure of matplotlib's for `path`, whatever backend is asked for. Raises InputError where there is none."""
    asked = os.environ.pop("MPLBACKEND", None)  # of a notebook or a window: matplotlib would load it, or fail
    try:
        from matplotlib import figure
    except ImportError:
        raise InputError(f"{path}: not drawn, since matplotlib is not installed (pip install matplotlib)") from None
    except Exception as error:  # of its settings or its cache
        raise InputError(f"{path}: not drawn, since matplotlib cannot be loaded ({error})") from None
    finally:
        if asked is not None:
            os.environ["MPLBACKEND"] = asked
    return figure.Figure(**options)


def save_figure(figure, path: Path) -> None:
    """Write a figure of matplotlib's to a PNG, whole or not at all."""
    with written_beside(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def shown(text: object, limit: int = 30) -> str:
    """`text` cut for a figure. matplotlib would read what stands between two $ as a formula."""
    return one_line(text, limit).replace("$", r"\$")


def sorted_curve(ratios: ArrayLike, scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The ratios (P,) in increasing order, and their scores (P,).

    The thresholds' order is another: at t = 1 a branch model asks no exit but the last, which is cheaper.
    """
    ratios = np.round(ratios, 9)
    order = ratios.argsort(kind="stable")
    return ratios[order], np.array(scores)[order]


def label_axes(axis, title: str, score: str) -> None:
    """The title, the labels and the grid of speed-accuracy curves."""
    axis.set(title=shown(title, 100), xlabel="speedup ratio: share of the layers run", ylabel=score)
    axis.grid(alpha=0.3)


def draw_curve(path: Path, evaluation: Evaluation) -> None:
    """Draw one run's curve, each exit as a dot, full depth, the operating point; replaces a PNG at `path`.

    On the toy task a second panel shows where each difficulty leaves. Raises InputError without matplotlib.
    """
    means, layers, scores = evaluation.mean_exit_layers, evaluation.exit_layers, evaluation.exit_scores
    figure = new_figure(path, figsize=(11 if means else 6.4, 4.4), layout="tight")
    axes = figure.subplots(ncols=2 if means else 1, squeeze=False)
    axis = axes[0, 0]
    axis.axhline(scores[-1], color="0.35", linestyle="--", linewidth=1, label=f"full depth: {scores[-1]:.1f}")
    curve = sorted_curve(evaluation.speedup_ratios, evaluation.scores)
    axis.plot(*curve, color=COLOURS[0], marker=".", label="early exit, a point per threshold")
    depth = round(layers[0] / evaluation.speedup_ratios[0])  # all leave at the first exit there
    costs = Exits(layers, depth, evaluation.method).costs()
    axis.plot(costs, scores, "o", color=COLOURS[1], markersize=8, label="each exit alone, and its layer")
    for layer, *place in zip(layers, costs, scores, strict=True):
        axis.annotate(layer, place, xytext=(0, -15), textcoords="offset points", ha="center")
    point = evaluation.operating_point
    name = f"operating point: threshold {point.threshold:.2f}, score {point.score:.1f}"
    axis.plot(point.speedup_ratio, point.score, "*", color=COLOURS[2], markersize=17, zorder=3, label=name)
    _finish(axis, evaluation, f"{evaluation.method} on ")
    if means:
        axis = axes[0, 1]
        for (level, mean), colour, line in zip(means.items(), COLOURS, LINES, strict=False):
            axis.plot(evaluation.thresholds, mean, line, color=colour, marker=".", label=shown(level))
        label_axes(axis, "where each difficulty leaves", "mean layer of the exit taken")
        axis.set(xlabel="threshold", yticks=layers)
        axis.legend(fontsize=9)
    save_figure(figure, path)


def compare_curves(path: Path, evaluations: dict[str, Evaluation]) -> None:
    """Draw several runs' curves, by the names to show, in one picture; replaces a PNG at `path`.

    Raises InputError for a run that was evaluated on other data than the first, by its name, and without matplotlib.
    """
    first, of_first = next(iter(evaluations.items()))
    for name, key in product(evaluations, ("task", "metric", "examples", "dev_digest")):
        ours, theirs = getattr(of_first, key), getattr(evaluations[name], key)
        if ours != theirs:
            values = f"{key} is {theirs!r:.50}, and {ours!r:.50} in {first[:80]}"
            raise InputError(f"{name[:120]}: its evaluation is of other data ({values})")
    figure = new_figure(path, figsize=(7.2, 4.8), layout="tight")
    axis = figure.subplots()
    styles = zip(cycle(COLOURS), cycle(LINES), cycle(MARKERS), strict=False)
    for (name, evaluation), (colour, line, marker) in zip(evaluations.items(), styles, strict=False):
        label = f"{shown(name, 80)}, {evaluation.method}: area {evaluation.area:.1f}"
        curve, point = sorted_curve(evaluation.speedup_ratios, evaluation.scores), evaluation.operating_point
        axis.plot(*curve, line, color=colour, marker=marker, markersize=4, label=label)
        axis.plot(point.speedup_ratio, point.score, "*", color=colour, markersize=15, zorder=3)
    _finish(axis, of_first, "", "; stars: operating points")
    save_figure(figure, path)


def _finish(axis, evaluation: Evaluation, before: str, after: str = "") -> None:
    title = f"{before}{one_line(evaluation.task, 30)}, {evaluation.examples} examples{after}"
    label_axes(axis, title, f"{METRICS[evaluation.metric]}, in percent")
    axis.margins(y=0.12)
    axis.legend(fontsize=9)
