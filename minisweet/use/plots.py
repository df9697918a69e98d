"""Speed-accuracy curves of saved evaluations, as PNG files: one run's, or several in one picture.

A curve has a point per threshold: the score in percent over the speedup ratio, the share of the layers run (Eq. 1).
Dimension letters: C classes, K exits, N instances.
"""

from itertools import cycle
from pathlib import Path

from minisweet.adaptive import exit_costs
from minisweet.files.figures import load_pyplot, save_figure
from minisweet.files.safe import InputError

METRICS = {
    "accuracy": "accuracy",
    "matthews": "Matthews correlation",
    "agreement": "agreement with full depth",
}
# Okabe and Ito's colours, which the colour-blind can tell apart. Line styles and markers say the same without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES, MARKERS = ("-", "--", "-.", ":"), "osD^vP*"
SAME = ("task", "metric", "examples", "dev_digest")  # in evaluations of the same data


def sorted_curve(evaluation: dict) -> tuple[list[float], list[float]]:
    """The speedup ratios of the thresholds, in increasing order, and their scores.

    The order is not that of the thresholds: at t = 1 a branch model asks no exit but the last, which is cheaper.
    """
    points = sorted(zip(evaluation["speedup_ratios"], evaluation["scores"], strict=True), key=lambda point: point[0])
    return [ratio for ratio, _ in points], [score for _, score in points]


def depth_of(evaluation: dict) -> int:
    """The backbone's layers: at the lowest threshold all leave at the first exit, having run n of them."""
    return round(evaluation["exit_layers"][0] / evaluation["speedup_ratios"][0])


def missed_labels(evaluation: dict, labels: list[str] | None) -> dict[int, list[str]]:
    """The labels that an exit predicts for no instance, by the exit's layer; exits that predict all are left out."""
    if labels is None or "class_counts" not in evaluation:
        return {}
    never = {
        layer: [label for label, count in zip(labels, counts, strict=True) if count == 0]
        for layer, counts in zip(evaluation["exit_layers"], evaluation["class_counts"], strict=True)
    }
    return {layer: names for layer, names in never.items() if names}


def draw_curve(path: Path, evaluation: dict, labels: list[str] | None = None) -> None:
    """Draw the speed-accuracy curve of one run: each exit as a dot, full depth as a line, the operating point.

    On the toy task a second panel shows where each difficulty leaves.

    Args:
        path: the PNG to write; what stands there is replaced.
        evaluation: what evaluation.json holds.
        labels: (C), the classes' names: an exit that never predicts one of them is a hollow dot.

    Raises:
        InputError: matplotlib is not installed.
    """
    pyplot = load_pyplot(path)
    means, exit_layers = evaluation.get("mean_exit_layers"), evaluation["exit_layers"]
    figure, axes = pyplot.subplots(1, 2 if means else 1, figsize=(11 if means else 6.4, 4.4), squeeze=False)
    axis = axes[0, 0]
    full = evaluation["exit_scores"][-1]
    axis.axhline(full, color="0.35", linestyle="--", linewidth=1, label=f"full depth: {full:.1f}")
    axis.plot(*sorted_curve(evaluation), color=COLOURS[0], marker=".", label="early exit, a point per threshold")
    missed = missed_labels(evaluation, labels)
    costs = exit_costs(exit_layers, depth_of(evaluation), evaluation["method"])
    for layer, cost, value in zip(exit_layers, costs, evaluation["exit_scores"], strict=True):
        name = "each exit alone, and its layer" if layer == exit_layers[0] else None
        fill = "white" if layer in missed else COLOURS[1]
        axis.plot(cost, value, "o", color=COLOURS[1], markerfacecolor=fill, markersize=8, label=name)
        axis.annotate(str(layer), (cost, value), xytext=(0, -15), textcoords="offset points", ha="center")
    if point := evaluation.get("operating_point"):
        name = f"operating point: threshold {point['threshold']:.2f}, score {point['score']:.1f}"
        axis.plot(point["speedup_ratio"], point["score"], "*", color=COLOURS[2], markersize=17, zorder=3, label=name)
    where = f"{evaluation['method']} on {evaluation['task']}, {evaluation['examples']} examples"
    _finish(axis, evaluation["metric"], where)
    if missed:
        layer, names = next(iter(missed.items()))
        shown = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
        text = f"hollow: never predicts some label (layer {layer}: {shown})"
        axis.text(0.02, 0.02, text, transform=axis.transAxes, fontsize=8)
    if means:
        axis = axes[0, 1]
        for (level, layers), colour, line in zip(means.items(), cycle(COLOURS), cycle(LINES), strict=False):
            axis.plot(evaluation["thresholds"], layers, line, color=colour, marker=".", label=level)
        axis.set(title="where each difficulty leaves", xlabel="threshold", ylabel="mean layer of the exit taken")
        axis.set_yticks(exit_layers)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9)
    figure.tight_layout()
    save_figure(figure, path)


def compare_curves(path: Path, evaluations: dict[str, dict]) -> None:
    """Draw the speed-accuracy curves of several runs on the same data, by name, in one picture.

    Args:
        path: the PNG to write; what stands there is replaced.
        evaluations: what each run's evaluation.json holds, by the name to show.

    Raises:
        InputError: a run that was evaluated on other data than the first, by its name; matplotlib is not installed.
    """
    first, *others = evaluations
    for name in others:
        for key in SAME:
            ours, theirs = evaluations[first].get(key), evaluations[name].get(key)
            both = ours is not None and theirs is not None
            if ours != theirs and (both or key != "dev_digest"):
                values = f"{key} is {theirs!r:.50}, and {ours!r:.50} in {str(first)[:80]}"
                raise InputError(f"{str(name)[:120]}: its evaluation is of other data ({values})")
    pyplot = load_pyplot(path)
    figure, axis = pyplot.subplots(figsize=(7.2, 4.8))
    styles = zip(cycle(COLOURS), cycle(LINES), cycle(MARKERS), strict=False)
    for (name, evaluation), (colour, line, marker) in zip(evaluations.items(), styles, strict=False):
        label = f"{name}, {evaluation['method']}: area {evaluation['area']:.1f}"
        axis.plot(*sorted_curve(evaluation), line, color=colour, marker=marker, markersize=4, label=label)
        if point := evaluation.get("operating_point"):
            axis.plot(point["speedup_ratio"], point["score"], "*", color=colour, markersize=15, zorder=3)
    where = f"{evaluations[first]['task']}, {evaluations[first]['examples']} examples"
    starred = any("operating_point" in evaluation for evaluation in evaluations.values())
    _finish(axis, evaluations[first]["metric"], where + ("; stars: operating points" if starred else ""))
    figure.tight_layout()
    save_figure(figure, path)


def _finish(axis, metric: str, title: str) -> None:
    name = METRICS.get(metric, metric)
    axis.set(title=title, xlabel="speedup ratio: share of the layers run", ylabel=f"{name}, in percent")
    axis.margins(y=0.12)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
