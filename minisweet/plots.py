"""Speed-accuracy curves as PNG files, of evaluated runs and for the paper's report.

A curve has a point per threshold: the score in percent over the speedup ratio, the share of the layers run (Eq. 1).
Dimension letter: P points of a curve.
"""

from pathlib import Path

from numpy.typing import ArrayLike

from minisweet.base.files import InputError, one_line, written_beside
from minisweet.exits import METHODS
from minisweet.metrics import METRICS

# One colour per method in all pictures: Okabe and Ito's, which the colour-blind can tell apart.
COLOURS = {"sweet": "#D55E00", "ee": "#0072B2", "mm": "#009E73"}
LINES = ("-", "--", "-.", ":")  # of the curves that share a colour


def new_figure(width: float, height: float):
    """A new figure of matplotlib, which is only imported here; sizes are in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path: Path) -> None:
    """Write a figure to a PNG, whole or not at all, with one legend below its axes."""
    entries = {name: line for axis in figure.axes for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    if entries:
        room = int(13 * figure.get_figwidth() / (7 + max(map(len, entries))))  # 13 characters per inch
        options = {"fontsize": 9, "loc": "outside lower center", "ncols": max(1, min(room, len(entries)))}
        figure.legend(entries.values(), entries.keys(), frameon=False, **options)
    with written_beside(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def draw_line(axis, method: str, ratios: ArrayLike, scores: ArrayLike, label: str, marker: str = ".") -> str:
    """Draw a curve in the colour of its method. Returns the colour."""
    colour = COLOURS.get(method, "#666666")
    before = sum(line.get_color() == colour and line.get_label()[0] != "_" for line in axis.lines)
    style = LINES[before % len(LINES)]
    axis.plot(ratios, scores, style, color=colour, marker=marker, label=label)
    return colour


def label_axes(axis, title: str, score: str) -> None:
    """The title, the labels and the grid of speed-accuracy curves."""
    ratio = "speedup ratio: share of the layers run (lower is faster)"
    axis.set(title=one_line(title, 100).replace("$", r"\$"), xlabel=ratio, ylabel=score)
    axis.grid(alpha=0.3)


def draw_curves(path: Path, evaluations: dict[str, dict]) -> None:
    """Draw the curves of some evaluations, by the names to show. A PNG at `path` is replaced.

    Raises InputError for one of another task, metric or number of rows than the first.
    """
    first, of_first = next(iter(evaluations.items()))
    rows = [of_first[key] for key in ("task", "metric", "examples")]
    figure = new_figure(7.2, 5.6)
    axis = figure.subplots()
    for name, evaluation in evaluations.items():
        if [evaluation[key] for key in ("task", "metric", "examples")] != rows:
            raise InputError(f"{name[:120]}: it was evaluated on other rows, or by another metric, than {first[:120]}")
        short = name if len(name) <= 60 else f"{name[:28]}...{name[-29:]}"
        label = f"{METHODS[evaluation['method']]}, {one_line(short)}".replace("$", r"\$")
        draw_line(axis, evaluation["method"], evaluation["speedup_ratios"], evaluation["scores"], label)
    task, metric, examples = rows
    label_axes(axis, f"{one_line(task, 30)}, {examples:,} rows", f"{METRICS[metric]}, in percent")
    axis.margins(y=0.12)
    save_figure(figure, path)
