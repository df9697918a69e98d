"""The curve of one run and the comparison of several: what stands in the figures."""

from types import SimpleNamespace

import pytest

from minisweet.base.files import InputError
from minisweet.use import plots
from minisweet.use.plots import COLOURS, draw_curves

POINT = {
    "score": 88.0,
    "score_interval": [80.0, 93.0],
    "speedup_ratio": 0.7,
    "speedup_interval": [0.6, 0.8],
}
# The last ratio but one is larger than the last, as it is with branches: at t = 1 they are not asked.
EVALUATION = {
    "task": "toy",
    "metric": "accuracy",
    "method": "sweet",
    "scores": [60.0, 80.0, 89.0, 90.0],
    "speedup_ratios": [0.25, 0.6, 1.05, 1.0],
    "examples": 8,
    "dev_digest": "0",
}


def an_evaluation(**changes) -> SimpleNamespace:
    return SimpleNamespace(**EVALUATION | changes, operating_point=SimpleNamespace(**POINT))


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """A function that draws evaluations by name and gives the figure."""
    kept, save = [], plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: (kept.append(figure), save(figure, path)))

    def draw(evaluations):
        draw_curves(tmp_path / "a.png", evaluations)
        assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        return kept.pop()

    return draw


def lines(figure) -> dict:
    """The lines of the legend, by their labels."""
    return {line.get_label(): line for line in figure.axes[0].lines if line.get_label()[0] != "_"}


def test_one_run_has_its_curve_and_the_operating_point_with_intervals(drawn):
    figure = drawn({"runs/a": an_evaluation()})
    (axis,), found = figure.axes, lines(figure)
    curve = found["SWEET, runs/a: 88.0 at 70% of the layers"]
    assert curve.get_xydata().tolist() == [[0.25, 60], [0.6, 80], [1.0, 90], [1.05, 89]]  # by ratio, not by threshold
    (star,) = [entry for entry in axis.lines if entry.get_marker() == "*"]
    assert star.get_xydata().tolist() == [[0.7, 88.0]]
    bars = [entry.get_xydata().tolist() for entry in axis.lines if len(entry.get_xdata()) == 2]
    assert [[0.6, 88.0], [0.8, 88.0]] in bars
    assert [[0.7, 80.0], [0.7, 93.0]] in bars


def test_several_runs_of_the_same_rows_are_in_one_picture(drawn):
    """Each method has one colour."""
    figure = drawn({"one": an_evaluation(), "two": an_evaluation(), "three": an_evaluation(method="mm")})
    one, two, three = lines(figure).values()
    assert [line.get_color() for line in (one, two, three)] == [COLOURS[name] for name in ("sweet", "sweet", "mm")]
    assert one.get_linestyle() != two.get_linestyle()
    with pytest.raises(InputError, match="^--plot: 6 runs, should be at most 5"):
        drawn({str(n): an_evaluation() for n in range(6)})
