"""Speed-accuracy curves of saved evaluations, as PNG files: one run's, or several in one picture.

A curve has a point per threshold: the score in percent over the speedup ratio, the share of the layers run (Eq. 1).
Dimension letters: C classes, P points of a curve.
"""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import numpy as np

from minisweet.adaptive import exit_costs
from minisweet.files.safe import InputError, load_pyplot, one_line, save_figure, shown

METRICS = {"accuracy": "accuracy", "matthews": "Matthews correlation", "agreement": "agreement with full depth"}
# Okabe and Ito's colours, which the colour-blind can tell apart. Line styles and markers say the same without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES, MARKERS = ("-", "--", "-.", ":"), "osD^vP*"
SAME = ("task", "metric", "examples", "dev_digest")  # in evaluations of the same data


def sorted_curve(evaluation: dict) -> tuple[np.ndarray, np.ndarray]:
    """The speedup ratios of the thresholds, (P,), in increasing order, and their scores, (P,).

    The order is not that of the thresholds: at t = 1 a branch model asks no exit but the last, which is cheaper.
    """
    ratios = np.round(evaluation["speedup_ratios"], 9)
    order = ratios.argsort(kind="stable")
    return ratios[order], np.array(evaluation["scores"])[order]


def label_axes(axis, title: str, score: str) -> None:
    """The title, the labels and the grid of speed-accuracy curves."""
    axis.set(title=shown(title, 100), xlabel="speedup ratio: share of the layers run", ylabel=score)
    axis.grid(alpha=0.3)


def draw_curve(path: Path, evaluation: dict, labels: Sequence[str] = ()) -> None:
    """Draw what one run's evaluation.json holds: its curve, each exit as a dot, full depth, the operating point.

    On the toy task a second panel shows where each difficulty leaves. An exit that never predicts one of the `labels`
    (C) is a hollow dot. A PNG at `path` is replaced. Raises InputError where matplotlib is not installed.
    """
    pyplot = load_pyplot(path)
    means, exit_layers = evaluation.get("mean_exit_layers"), evaluation["exit_layers"]
    figure, axes = pyplot.subplots(1, 2 if means else 1, figsize=(11 if means else 6.4, 4.4), squeeze=False)
    axis = axes[0, 0]
    full = evaluation["exit_scores"][-1]
    axis.axhline(full, color="0.35", linestyle="--", linewidth=1, label=f"full depth: {full:.1f}")
    axis.plot(*sorted_curve(evaluation), color=COLOURS[0], marker=".", label="early exit, a point per threshold")
    depth = round(exit_layers[0] / evaluation["speedup_ratios"][0])  # all leave at the first exit there
    costs, missed = exit_costs(exit_layers, depth, evaluation["method"]), []
    exits = zip(exit_layers, costs, evaluation["exit_scores"], evaluation["class_counts"], strict=True)
    for layer, cost, score, counts in exits:
        never = [label for label, count in zip(labels, counts, strict=False) if count == 0]
        missed += [(layer, never)] if never else []
        name = "each exit alone, and its layer" if layer == exit_layers[0] else None
        fill = "white" if never else COLOURS[1]
        axis.plot(cost, score, "o", color=COLOURS[1], markerfacecolor=fill, markersize=8, label=name)
        axis.annotate(str(layer), (cost, score), xytext=(0, -15), textcoords="offset points", ha="center")
    if missed:
        layer, never = missed[0]
        first = ", ".join(map(shown, never[:3])) + " ..." * (len(never) > 3)
        text = f"hollow: never predicts some label (layer {layer}: {first})"
        axis.text(0.02, 0.02, text, transform=axis.transAxes, fontsize=8)
    if point := evaluation.get("operating_point"):
        name = f"operating point: threshold {point['threshold']:.2f}, score {point['score']:.1f}"
        axis.plot(point["speedup_ratio"], point["score"], "*", color=COLOURS[2], markersize=17, zorder=3, label=name)
    _finish(axis, evaluation, f"{evaluation['method']} on ")
    if means:
        axis = axes[0, 1]
        for (level, layers), colour, line in zip(means.items(), COLOURS, LINES, strict=False):
            axis.plot(evaluation["thresholds"], layers, line, color=colour, marker=".", label=shown(level))
        axis.set(title="where each difficulty leaves", xlabel="threshold", ylabel="mean layer of the exit taken")
        axis.set_yticks(exit_layers)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9)
    figure.tight_layout()
    save_figure(figure, path)


def compare_curves(path: Path, evaluations: dict[str, dict]) -> None:
    """Draw what several runs' evaluation.json hold, by the names to show, in one picture. A PNG at `path` is replaced.

    Raises InputError for a run that was evaluated on other data than the first, by its name, and without matplotlib.
    """
    first, of_first = next(iter(evaluations.items()))
    for name, evaluation in evaluations.items():
        for key in SAME:
            ours, theirs = of_first.get(key), evaluation.get(key)
            if ours != theirs and (key != "dev_digest" or (ours and theirs)):  # old runs have no digest
                values = f"{key} is {theirs!r:.50}, and {ours!r:.50} in {str(first)[:80]}"
                raise InputError(f"{str(name)[:120]}: its evaluation is of other data ({values})")
    pyplot = load_pyplot(path)
    figure, axis = pyplot.subplots(figsize=(7.2, 4.8))
    starred = ""
    styles = zip(cycle(COLOURS), cycle(LINES), cycle(MARKERS), strict=False)
    for (name, evaluation), (colour, line, marker) in zip(evaluations.items(), styles, strict=False):
        label = f"{shown(name, 80)}, {evaluation['method']}: area {evaluation['area']:.1f}"
        axis.plot(*sorted_curve(evaluation), line, color=colour, marker=marker, markersize=4, label=label)
        if point := evaluation.get("operating_point"):
            axis.plot(point["speedup_ratio"], point["score"], "*", color=colour, markersize=15, zorder=3)
            starred = "; stars: operating points"
    _finish(axis, of_first, "", starred)
    figure.tight_layout()
    save_figure(figure, path)


def _finish(axis, evaluation: dict, before: str, after: str = "") -> None:
    where = f"{one_line(evaluation['task'], 30)}, {evaluation['examples']} examples"
    metric = METRICS.get(evaluation["metric"], shown(evaluation["metric"]))
    label_axes(axis, before + where + after, f"{metric}, in percent")
    axis.margins(y=0.12)
    axis.legend(fontsize=9)
