"""Tables and figures from records."""

import math
import sys
import tarfile
from operator import itemgetter

import numpy as np
import pytest

from minisweet.base.safe import InputError
from minisweet.paper import report, reproduce
from minisweet.paper.report import (
    STUDENT_T,
    did_not_converge,
    draw_curves,
    interpolated,
    markdown,
    new_figure,
    one_class_layers,
    over_seeds,
    results_of,
    seed_means,
    with_single_models,
)
from tests.conftest import CHECKOUT


def record(scores=(60.0, 70.0, 80.0), ratios=(0.25, 0.5, 1.0), counts=((4, 6), (5, 5)), losses=(2.0, 1.0)) -> dict:
    """A run's record with two exits, after layers 1 and 4."""
    return {
        "method": "ee",
        "exit_layers": [1, 4],
        "exit_scores": [scores[0], scores[-1]],
        "class_counts": [list(row) for row in counts],
        "losses": [[loss, loss] for loss in np.linspace(*losses, 40)],
        "speedup_ratios": list(ratios),
        "scores": list(scores),
        "area": float(np.mean(scores)),
    }


def test_students_quantiles_leave_one_fortieth_above():
    for n, quantile in enumerate(STUDENT_T, start=1):
        x = np.linspace(0, quantile, 20001)
        scale = math.exp(math.lgamma((n + 1) / 2) - math.lgamma(n / 2)) / math.sqrt(n * math.pi)
        assert np.trapezoid(scale * (1 + x**2 / n) ** (-(n + 1) / 2), x) == pytest.approx(0.475, abs=5e-5)


def test_mean_deviation_and_interval_over_seeds():
    mean, std, ci95 = over_seeds(np.array([[1.0, 10.0], [2.0, 10.0], [3.0, np.nan]]))
    assert (mean[0], std[0]) == (2.0, 1.0)
    assert ci95[0] == pytest.approx(4.303 / math.sqrt(3))
    assert np.isnan([mean[1], std[1], ci95[1]]).all()
    mean, std, ci95 = over_seeds(np.array([[1.0, 2.0]]))
    assert mean.tolist() == [1, 2]
    assert np.isnan([std, ci95]).all()


def test_interpolation_is_linear_and_never_extrapolates():
    curve = record()
    assert interpolated(curve, np.array([0.25, 0.375, 0.5, 0.75, 1.0])).tolist() == [60, 65, 70, 75, 80]
    assert interpolated(record(ratios=(0.25, 0.5, 1 - 1e-12)), np.array([1.0])).tolist() == [80]  # rounding
    assert np.isnan(interpolated(curve, np.array([0.2, 1.01, 1.75]))).all()
    assert np.isnan(interpolated(record(ratios=(0.25, 0.5, 0.9)), np.array([1.0]))).all()
    branch = record((60, 70, 81, 80), (0.25, 0.5, 1.25, 1.0))  # at t = 1 no branch is asked
    assert interpolated(branch, np.array([0.25, 0.75, 1.0, 1.125])).tolist() == [60, 75, 80, 80.5]
    unsorted = results_of({"branch": {"sst2": {0: record((60, 60, 80), (0.5, 0.25, 1.0))}}})
    assert unsorted["interpolated"]["branch"]["ratios"] == [0.25, 0.5, 0.75, 1]


def test_a_seed_that_lacks_a_task_has_no_mean():
    records = {
        "sst2": {0: record((60, 70, 80)), 1: record((62, 70, 82))},
        "mrpc": {1: record((70, 70, 90)), 2: record((0, 0, 0))},
    }
    ends = itemgetter("exit_scores")
    assert seed_means(records, ends).tolist() == [[66, 86]]
    assert seed_means({"sst2": records["sst2"]}, ends).tolist() == [[60, 80], [62, 82]]
    table = results_of({"ee": records})["individual"]["ee"]
    assert (table["mean"], table["std"]) == ([66, 86], [None, None])
    assert table["tasks"]["sst2"]["mean"] == [61, 81]
    assert table["tasks"]["sst2"]["std"] == pytest.approx([math.sqrt(2)] * 2, abs=1e-4)


def test_what_failed_to_learn_is_found():
    assert not did_not_converge(record())
    assert did_not_converge(record(losses=(1.0, 1.0)))
    noisy = record()
    noisy["losses"][0], noisy["losses"][-1] = [1.0, 1.0], [1.5, 1.5]  # single steps decide nothing
    assert not did_not_converge(noisy)
    one_rises = record() | {"losses": [[3 - n / 20, 0.1 + n / 100] for n in range(40)]}
    assert not did_not_converge(one_rises)  # under EE and SWEET the sum counts
    assert did_not_converge(one_rises | {"method": "mm"})  # MM's models are trained one by one
    assert not did_not_converge(record() | {"losses": [[1.0, 1.0]]})  # one step tells nothing
    assert did_not_converge(record() | {"losses": [[1.0, 1.0]] * 3 + [[2.0, 2.0]] * 3})
    assert did_not_converge(record(counts=((0, 10), (10, 0))))
    assert not did_not_converge(record(counts=((0, 10), (5, 5))))
    assert one_class_layers(record(counts=((0, 10), (5, 5)))) == [1]
    assert one_class_layers(record(counts=((1, 9), (10, 0)))) == [4]


def test_tables_mark_it_and_leave_blank_what_a_curve_does_not_reach():
    stuck = record((50.0, 50.0, 80.0), counts=((0, 10), (5, 5)))
    grid = {
        "ee": {"sst2": {0: stuck, 1: stuck}, "rte": {0: record(losses=(1.0, 1.0)), 1: record()}},
        "mm": {"sst2": {0: record(ratios=(0.25, 0.5, 1.25))}, "rte": {0: {}}},  # {}: lost to NaN
    }
    results = results_of(grid)
    assert results["interpolated"]["ee"]["ratios"] == [0.25, 0.5, 0.75, 1]
    assert results["interpolated"]["mm"]["ratios"] == [0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]
    assert results["interpolated"]["ee"]["tasks"]["rte"]["seeds"] == 2
    assert results["interpolated"]["mm"]["mean"] == []  # no seed has both tasks
    assert results["interpolated"]["mm"]["tasks"]["sst2"]["mean"][-3:] == [80, None, None]
    assert results["individual"]["ee"]["did_not_converge"] == 1
    assert results["individual"]["ee"]["tasks"]["sst2"]["one_class_layers"] == [1]
    # The last method less each other, where both have a run: 60, 70, 73.3, 76.7 less 50, 50, 65, 80.
    assert results["differences"]["of"] == "mm"
    assert results["differences"]["from"]["ee"]["pairs"] == 1
    assert results["differences"]["from"]["ee"]["mean"] == pytest.approx([10, 20, 8.3333, -3.3333, None, None, None])
    text = markdown(results)
    assert "| ee | 1 | +10.0 | +20.0 |" in text
    assert "| mean | ee† | 2 | 55.0 ±0.0° | 80.0 ±0.0 |" in text
    assert "| sst2 | ee | 2 | 50.0 ±0.0° | 80.0 ±0.0 |" in text
    assert "| rte | ee† | 2 | 60.0 ±0.0 | 80.0 ±0.0 |" in text
    assert "| sst2 | ee° | 2 | 50.0 ±0.0 | 50.0 ±0.0 | 65.0 ±0.0 | 80.0 ±0.0 |  |  |  |" in text
    assert "| rte | mm† | 0 |  |  |" in text
    assert "± deviation" in text


def test_differences_are_paired_over_tasks_and_seeds():
    higher = {0: record((61, 72, 80)), 1: record((63, 72, 80)), 2: {}, 3: record()}
    grid = {"ee": {"sst2": {0: record(), 1: record(), 2: record()}}, "sweet": {"sst2": higher}}
    difference = results_of(grid)["differences"]["from"]["ee"]
    assert difference["pairs"] == 2  # seed 2 was lost to NaN, seed 3 has no partner
    assert difference["mean"] == [2, 2, 1, 0]
    assert difference["ci95"] == pytest.approx([12.706, 0, 0, 0], abs=1e-3)
    assert "| ee | 2 | +2.0 ±12.7 | +2.0 ±0.0 | +1.0 ±0.0 | +0.0 ±0.0 |" in markdown(results_of(grid))


def test_one_model_of_n_layers_is_a_point_at_its_own_cost(tmp_path, monkeypatch):
    def of(*exit_scores: float) -> dict:
        alone = {"method": "mm", "depth": 6, "exit_scores": list(exit_scores)}  # after layers 1 and 4
        return record(ratios=(1 / 6, 0.5, 5 / 6)) | alone

    taught = {0: of(62, 81), 1: of(64, 83), 2: {}}
    branch = {seed: record((60, 70, 80), (1 / 6, 0.5, 1.0)) for seed in range(3)}
    grid = with_single_models({"ee": {"sst2": branch}, "mm-taught": {"sst2": taught}, "branch": {"sst2": branch}})
    single = "mm-taught: one model of n layers"
    assert list(grid) == ["ee", single, "mm-taught", "branch"]
    results = results_of(grid, (1 / 6, 1 / 2, 2 / 3, 1))
    assert results["interpolated"][single]["ratios"] == [0.166666667, 0.5, 0.666666667, 1]
    assert results["interpolated"][single]["mean"] == [63, None, 82, None]  # nothing between the models
    assert results["interpolated"]["mm-taught"]["mean"][3] is None  # whose cost adds up
    difference = results["differences"]["from"][single]
    assert (difference["pairs"], difference["mean"]) == (2, [-3, None, pytest.approx(73.3333 - 82, abs=1e-3), None])
    assert difference["ci95"][0] == pytest.approx(12.706, abs=1e-3)
    assert single not in results["areas"] | results["individual"] | results["area_differences"]["branch"]
    assert f"| {single}† | 2 | 63.0 ±12.7 |  | 82.0 ±12.7 |  |" in markdown(results)
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(report, "save_figure", lambda figure, path: figures.append(figure))
    draw_curves(tmp_path / "a.png", [("title", grid, ["sst2"])])
    (points,) = figures[0].axes[0].containers
    assert points.lines[0].get_xydata() == pytest.approx(np.array([[1 / 6, 63], [2 / 3, 82]]))


def test_areas_are_compared_for_every_pair_of_methods():
    grid = {
        "ee": {"sst2": {0: record(), 1: record((61, 71, 81))}, "rte": {0: record(), 1: record()}},
        "mm": {"sst2": {0: record((62, 72, 82)), 1: record((62, 72, 82))}, "rte": {0: record((64, 74, 84)), 1: {}}},
        "sweet": {"sst2": {}, "rte": {}},
    }
    results = results_of(grid)
    assert results["areas"]["ee"]["mean"] == [70.25]
    assert results["areas"]["mm"]["tasks"]["sst2"]["mean"] == [72]
    of_mm = results["area_differences"]["mm"]
    assert list(of_mm) == ["ee"]  # SWEET has no pair
    assert (of_mm["ee"]["pairs"], of_mm["ee"]["mean"]) == (3, [pytest.approx(7 / 3, abs=1e-4)])  # 2, 1, 4
    assert of_mm["ee"]["ci95"] == [pytest.approx(4.303 * np.std([2, 1, 4], ddof=1) / 3**0.5, abs=1e-3)]
    assert results["area_differences"]["ee"]["mm"]["mean"] == [pytest.approx(-7 / 3, abs=1e-4)]
    text = markdown(results)
    assert "| method | seeds | mean | sst2 | rte | less ee | less mm | less sweet |" in text
    assert "| mm | 1 | 73.0 | 72.0 ±0.0 | 74.0 | +2.3 ±3.8 |  |  |" in text
    assert "| sweet | 0 |  |  |  |  |  |  |" in text


def test_a_figure_is_drawn_or_matplotlib_is_asked_for(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    path = tmp_path / "curves.png"
    grid = {"ee": {"sst2": {0: record(), 1: record()}}, "mm": {"sst2": {}}}
    draw_curves(path, [("title", grid, ["sst2"])])
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [entry.name for entry in tmp_path.iterdir()] == ["curves.png"]
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        new_figure(path)


def test_every_method_has_a_colour_of_its_own(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(report, "save_figure", lambda figure, path: figures.append(figure))
    methods = ["sweet-flow0.5", "ee", "mm", "sweet", "sweet-cap1", "sweet-owner0.5"]
    draw_curves(tmp_path / "a.png", [("title", {method: {"sst2": {0: record()}} for method in methods}, ["sst2"])])
    lines = figures[0].axes[0].lines
    assert [line.get_label() for line in lines] == methods
    assert len({line.get_color() for line in lines}) == len(methods)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("archives", "tasks", "methods", "ratios", "committed"),
    [
        (["records"], "sst2,mrpc,qqp,qnli", "ee,mm,sweet", [], "results.md"),
        (
            ["records", "branch"],
            "sst2,mrpc,qqp,qnli,cola,rte",
            "ee,mm,sweet,ee-mixed,mm-taught,branch",
            ["--ratios", "1/6,1/4,1/3,1/2,2/3,3/4,1"],
            "branch.md",
        ),
    ],
)
def test_the_committed_records_make_the_committed_report(
    tmp_path, monkeypatch, archives, tasks, methods, ratios, committed
):
    results = CHECKOUT / ".github" / "results"
    for name in archives:
        with tarfile.open(results / f"{name}.tar.xz") as archive:
            archive.extractall(tmp_path / "out" / "runs", filter="data")
    arguments = ["--tasks", tasks, "--methods", methods, "--lrs", "5e-5,1e-4,2e-4,4e-4", "--seeds", "0,1,2"]
    arguments += ["--amp", "bf16", "--data-dir", tmp_path, "--out", tmp_path / "out", "--report-only", *ratios]
    monkeypatch.setattr(sys, "argv", ["reproduce", *map(str, arguments)])
    reproduce.main()
    assert (tmp_path / "out" / "results.md").read_bytes() == (results / committed).read_bytes()
