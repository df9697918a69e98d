"""The curve of one run and the comparison of several: what stands in the figures."""

from types import SimpleNamespace

import pytest

from minisweet.base.files import InputError
from minisweet.use import plots
from minisweet.use.plots import draw_curves

POINT = {
    "asked_exits": [1, 2, 4],
    "score": 88.0,
    "score_interval": [80.0, 93.0],
    "full_depth_interval": [82.0, 95.0],
    "speedup_ratio": 0.7,
    "speedup_interval": [0.6, 0.8],
}
# The last ratio but one is larger than the last, as it is with branches: at t = 1 they are not asked.
EVALUATION = {
    "task": "toy",
    "metric": "accuracy",
    "method": "sweet",
    "exit_layers": [1, 2, 4],
    "exit_scores": [60.0, 70.0, 90.0],
    "scores": [60.0, 80.0, 89.0, 90.0],
    "speedup_ratios": [0.25, 0.6, 1.05, 1.0],
    "area": 75.0,
    "examples": 8,
    "dev_digest": "0",
}


def an_evaluation(point=(), **changes) -> SimpleNamespace:
    return SimpleNamespace(**EVALUATION | changes, operating_point=SimpleNamespace(**POINT | dict(point)))


@pytest.fixture
def figures(monkeypatch) -> list:
    """The figures that are saved, kept to be looked at."""
    kept, save = [], plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: (kept.append(figure), save(figure, path)))
    return kept


def line(axis, label: str):
    (found,) = [line for line in axis.lines if line.get_label().startswith(label)]
    return found


def test_one_run_has_exits_full_depth_and_the_operating_point_with_intervals(tmp_path, figures):
    path = tmp_path / "curve.png"
    draw_curves(path, {"runs/a": an_evaluation()})
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    (axis,) = figures[0].axes
    curve = line(axis, "runs/a, sweet: area 75.0, operating point 88.0 (80.0 to 93.0)")
    assert list(curve.get_xdata()) == [0.25, 0.6, 1.0, 1.05]  # by ratio, not by threshold
    assert list(curve.get_ydata()) == [60.0, 80.0, 90.0, 89.0]
    assert set(line(axis, "full depth: 90.0 (82.0 to 95.0)").get_ydata()) == {90.0}
    (band,) = axis.patches
    assert band.get_extents().transformed(axis.transData.inverted()).intervaly.tolist() == pytest.approx([82, 95])
    assert [text.get_text() for text in axis.texts] == ["1", "2", "4"]
    (star,) = [entry for entry in axis.lines if entry.get_marker() == "*"]
    assert (*star.get_xdata(), *star.get_ydata()) == (0.7, 88.0)
    bars = [entry.get_xydata().tolist() for entry in axis.lines if len(entry.get_xdata()) == 2]
    assert [[0.6, 88.0], [0.8, 88.0]] in bars
    assert [[0.7, 80.0], [0.7, 93.0]] in bars
    assert "accuracy, in percent" in axis.get_ylabel()
    (legend,) = figures[0].legends
    assert not legend.get_window_extent().overlaps(axis.get_tightbbox())


@pytest.mark.parametrize(("method", "last_ratio"), [("branch", 1.0), ("mm", 7 / 4)])
def test_each_exit_alone(tmp_path, figures, method, last_ratio):
    """Full depth stands at 1, whatever the exits before it would cost with branches or MM."""
    ratios = [0.25, 0.6, 1.05, last_ratio]
    draw_curves(tmp_path / "a.png", {"a": an_evaluation({"asked_exits": [2, 4]}, method=method, speedup_ratios=ratios)})
    dots = line(figures[0].axes[0], "an exit without the others")
    assert dots.get_xydata().tolist() == [[0.25, 60.0], [0.5, 70.0], [1.0, 90.0]]


def test_several_runs_of_the_same_rows_are_in_one_picture(tmp_path, figures):
    other = an_evaluation({"score": 85.0}, method="mm", area=70.0)
    draw_curves(tmp_path / "a.png", {"first": an_evaluation(), "second": other})
    (axis,) = figures[0].axes
    assert list(line(axis, "first, sweet: area 75.0").get_xdata()) == [0.25, 0.6, 1.0, 1.05]
    assert list(line(axis, "second, mm: area 70.0").get_ydata()) == [60.0, 80.0, 90.0, 89.0]
    assert line(axis, "first").get_color() != line(axis, "second").get_color()
    assert [entry.get_ydata()[0] for entry in axis.lines if entry.get_marker() == "*"] == [88.0, 85.0]
    assert not axis.texts  # no exits
    odd = an_evaluation(metric="matthews")
    with pytest.raises(InputError, match="^runs/odd: it was evaluated on other rows, .* than first"):
        draw_curves(tmp_path / "b.png", {"first": an_evaluation(), "second": other, "runs/odd": odd})
