"""matplotlib, imported only where a figure is drawn, and figures that are never half-written."""

from pathlib import Path

from minisweet.files.safe import InputError, one_line, written_beside


def load_pyplot(path: Path):
    """matplotlib's pyplot, without a screen, to draw `path`. Raises InputError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise InputError(f"{path}: not drawn, since matplotlib is not installed (pip install matplotlib)") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def shown(text: object, limit: int = 30) -> str:
    """`text` cut for a figure. matplotlib would read what stands between two $ as a formula."""
    return one_line(text, limit).replace("$", r"\$")


def save_figure(figure, path: Path) -> None:
    """Write a figure of matplotlib's to a PNG, whole or not at all, and close it."""
    with written_beside(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
    load_pyplot(path).close(figure)
