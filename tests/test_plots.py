"""The curve of one run and the comparison of several, drawn from evaluations: what stands in the figure."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from minisweet.base.safe import InputError
from minisweet.use import plots
from minisweet.use.plots import compare_curves, draw_curve
from tests.conftest import CHECKOUT

# The last ratio but one is larger than the last, as it is with branches: at t = 1 they are not asked.
EVALUATION = {
    "task": "toy",
    "metric": "accuracy",
    "method": "sweet",
    "exit_layers": [1, 2, 4],
    "exit_scores": [60.0, 70.0, 90.0],
    "thresholds": [0.5, 0.75, 0.99, 1.0],
    "scores": [60.0, 80.0, 89.0, 90.0],
    "speedup_ratios": [0.25, 0.6, 1.05, 1.0],
    "exit_counts": [[8, 0, 0], [3, 1, 4], [0, 0, 8], [0, 0, 8]],
    "area": 75.0,
    "examples": 8,
    "dev_digest": "0",
    "mean_exit_layers": None,
    "operating_point": SimpleNamespace(threshold=0.8, score=88.0, speedup_ratio=0.7),
}


def an_evaluation(**changes) -> SimpleNamespace:
    return SimpleNamespace(**EVALUATION | changes)


@pytest.fixture
def figures(monkeypatch) -> list:
    """The figures that are saved, kept to be looked at."""
    kept, save = [], plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: (kept.append(figure), save(figure, path)))
    return kept


def line(axis, label: str):
    """The line of an axis whose label starts so."""
    (found,) = [line for line in axis.lines if line.get_label().startswith(label)]
    return found


def test_the_curve_has_exits_full_depth_and_the_operating_point(tmp_path, figures):
    path = tmp_path / "curve.png"
    draw_curve(path, an_evaluation())
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["curve.png"]
    (axis,) = figures[0].axes
    curve = line(axis, "early exit")
    assert list(curve.get_xdata()) == [0.25, 0.6, 1.0, 1.05]  # by ratio, not by threshold
    assert list(curve.get_ydata()) == [60.0, 80.0, 90.0, 89.0]
    assert set(line(axis, "full depth: 90.0").get_ydata()) == {90.0}
    assert line(axis, "each exit").get_xydata().tolist() == [[0.25, 60.0], [0.5, 70.0], [1.0, 90.0]]
    assert [text.get_text() for text in axis.texts] == ["1", "2", "4"]
    star = line(axis, "operating point: threshold 0.80, score 88.0")
    assert (*star.get_xdata(), *star.get_ydata()) == (0.7, 88.0)
    assert "accuracy" in axis.get_ylabel()
    assert "percent" in axis.get_ylabel()


def test_the_toy_task_shows_where_each_difficulty_leaves(tmp_path, figures):
    means = {"easy": [1.0, 1.5, 4.0, 4.0], "hard": [1.0, 3.0, 4.0, 4.0]}
    draw_curve(tmp_path / "curve.png", an_evaluation(mean_exit_layers=means))
    _, axis = figures[0].axes
    assert list(line(axis, "hard").get_xdata()) == EVALUATION["thresholds"]
    assert list(line(axis, "hard").get_ydata()) == means["hard"]
    assert list(line(axis, "easy").get_ydata()) == means["easy"]


def test_an_exit_that_runs_models_one_after_the_other_costs_all_of_them(tmp_path, figures):
    mm = an_evaluation(method="mm", speedup_ratios=[0.25, 0.9, 1.6, 1.75])
    draw_curve(tmp_path / "curve.png", mm)
    assert list(line(figures[0].axes[0], "each exit").get_xdata()) == [0.25, 0.75, 1.75]


def test_a_branch_costs_the_exits_that_were_asked_before_it(tmp_path, figures):
    draw_curve(tmp_path / "curve.png", an_evaluation(method="branch"))
    assert list(line(figures[0].axes[0], "each exit").get_xdata()) == pytest.approx(
        [1 / 4, (2 + 1 / 6) / 4, (4 + 2 / 6) / 4]
    )


def test_several_runs_in_one_picture(tmp_path, figures):
    other = an_evaluation(method="mm", area=70.0)
    compare_curves(tmp_path / "compare.png", {"first": an_evaluation(), "second": other})
    (axis,) = figures[0].axes
    assert list(line(axis, "first, sweet: area 75.0").get_xdata()) == [0.25, 0.6, 1.0, 1.05]
    assert list(line(axis, "second, mm: area 70.0").get_ydata()) == [60.0, 80.0, 90.0, 89.0]
    assert line(axis, "first").get_color() != line(axis, "second").get_color()
    assert sum(entry.get_marker() == "*" for entry in axis.lines) == 2
    assert "operating point" in axis.get_title()


@pytest.mark.parametrize(
    ("key", "value"), [("task", "sst2"), ("metric", "matthews"), ("examples", 9), ("dev_digest", "2")]
)
def test_a_run_of_other_data_is_refused_by_name(tmp_path, key, value):
    first = an_evaluation()
    with pytest.raises(InputError, match=f"^runs/odd: .*{key}"):
        compare_curves(
            tmp_path / "compare.png", {"one": first, "two": first, "runs/odd": an_evaluation(**{key: value})}
        )
    assert not list(tmp_path.iterdir())


def test_no_picture_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"curve\.png.*matplotlib"):
        draw_curve(tmp_path / "curve.png", an_evaluation())


INLINE = pytest.param("module://matplotlib_inline.backend_inline", marks=pytest.mark.slow)


@pytest.mark.parametrize("backend", [INLINE, "no-such-backend"])
def test_the_backend_of_a_notebook_or_a_window_has_no_say(tmp_path, backend):
    """In a process of its own, since matplotlib reads the environment once."""
    code = "import sys, pathlib; from types import SimpleNamespace as namespace; "
    code += "from minisweet.use.plots import draw_curve; "
    code += f"draw_curve(pathlib.Path(sys.argv[1]), {an_evaluation()!r}); assert 'matplotlib.pyplot' not in sys.modules"
    environment = os.environ | {"MPLBACKEND": backend}
    command = [sys.executable, "-c", code, tmp_path / "curve.png"]
    done = subprocess.run(command, env=environment, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_names_that_matplotlib_would_read_as_formulas_or_never_end(tmp_path):
    draw_curve(tmp_path / "curve.png", an_evaluation(task=r"a$x^$^" + "x" * 100_000))
    compare_curves(tmp_path / "both.png", {r"r$\frac{$_": an_evaluation(), "x" * 100_000: an_evaluation()})
    assert (tmp_path / "curve.png").stat().st_size > 1000 < (tmp_path / "both.png").stat().st_size
