"""Tables and figures from records."""

import math
import sys
import tarfile

import numpy as np
import pytest

from minisweet.paper import report, reproduce
from minisweet.paper.report import STUDENT_T, did_not_converge, interpolated, over_seeds, seed_means, tables
from tests.benchmark import zero_tables
from tests.conftest import CHECKOUT


def record(scores=(60.0, 70.0, 80.0), ratios=(0.25, 0.5, 1.0), counts=((4, 6), (5, 5)), **changes) -> dict:
    """A run's record with two exits, after layers 1 and 4, whose loss falls from 2 to 1."""
    return {
        "method": "ee",
        "exit_layers": [1, 4],
        "exit_scores": [scores[0], scores[-1]],
        "class_counts": counts,
        "losses": [[loss, loss] for loss in np.linspace(2, 1, 40)],
        "speedup_ratios": list(ratios),
        "scores": list(scores),
        "area": float(np.mean(scores)),
    } | changes


def test_students_quantiles_leave_one_fortieth_above():
    for n, quantile in enumerate(STUDENT_T, start=1):
        x = np.linspace(0, quantile, 20001)
        scale = math.exp(math.lgamma((n + 1) / 2) - math.lgamma(n / 2)) / math.sqrt(n * math.pi)
        assert np.trapezoid(scale * (1 + x**2 / n) ** (-(n + 1) / 2), x) == pytest.approx(0.475, abs=5e-5)


def test_mean_deviation_and_interval_over_seeds():
    mean, std, ci95 = over_seeds(np.array([[1.0, 10.0], [2.0, 10.0], [3.0, np.nan]]))
    assert (mean[0], std[0], ci95[0]) == (2.0, 1.0, pytest.approx(4.303 / math.sqrt(3)))
    assert np.isnan([mean[1], std[1], ci95[1]]).all()
    mean, std, ci95 = over_seeds(np.array([[1.0, 2.0]]))
    assert mean.tolist() == [1, 2]
    assert np.isnan([std, ci95]).all()


def test_interpolation_is_linear_and_never_extrapolates():
    curve = record()
    assert interpolated(curve, [0.25, 0.375, 0.5, 0.75, 1.0]).tolist() == [60, 65, 70, 75, 80]
    assert interpolated(record(ratios=(0.25, 0.5, 1 - 1e-12)), [1.0]).tolist() == [80]  # rounding
    assert np.isnan(interpolated(curve, [0.2, 1.01, 1.75])).all()
    branch = record((60, 70, 81, 80), (0.25, 0.5, 1.25, 1.0))  # at t = 1 no branch is asked
    assert interpolated(branch, [0.25, 0.75, 1.0, 1.125]).tolist() == [60, 75, 80, 80.5]


def test_what_failed_to_learn_is_found():
    assert not did_not_converge(record())
    assert did_not_converge({})  # it diverged
    assert did_not_converge(record(losses=[[1.0, 1.0]] * 40))
    noisy = [[loss, loss] for loss in np.linspace(2, 1, 40)]
    noisy[0], noisy[-1] = [1.0, 1.0], [1.5, 1.5]
    assert not did_not_converge(record(losses=noisy))  # single steps decide nothing
    one_rises = record(losses=[[3 - n / 20, 0.1 + n / 100] for n in range(40)])
    assert not did_not_converge(one_rises)  # under EE and SWEET the sum counts
    assert did_not_converge(one_rises | {"method": "mm"})  # MM's models are trained one by one
    assert not did_not_converge(record(losses=[[1.0, 1.0]]))  # one step tells nothing
    assert did_not_converge(record(counts=((0, 10), (10, 0))))
    assert not did_not_converge(record(counts=((0, 10), (5, 5))))


def test_exit_0_is_in_the_tables_and_has_no_loss():
    only_fitted = {"method": "branch", "exit_layers": [0, 6], "losses": []}  # on a trunk that was there
    assert not did_not_converge(record(**only_fitted))
    assert did_not_converge(record(exit_layers=[0, 6], counts=((5, 5), (0, 10))))  # exit 0 does not save the last one
    with_it = record(ratios=(0.0, 0.5, 1.0), **only_fitted)
    text = tables({"ee": {"sst2": {0: record()}}, "branch": {"sst2": {0: with_it}}})
    assert "| task | method | seeds | layer 0 | layer 1 | layer 4 | layer 6 |" in text
    assert "| sst2 | branch | 1 | 60.0 |  |  | 80.0 |" in text
    assert "| sst2 | ee | 1 |  | 60.0 | 70.0 | 75.0 | 80.0 |" in text
    assert "| ee | 1 |  | +5.0 | +0.0 | +0.0 | +0.0 |" in text


def test_tables_mark_what_failed_and_leave_blank_what_a_curve_does_not_reach():
    stuck = record((50.0, 50.0, 80.0), counts=((0, 10), (5, 5)))
    grid = {
        "ee": {"sst2": {0: stuck, 1: stuck}, "rte": {0: record(losses=[[1.0, 1.0]] * 40), 1: record()}},
        "mm": {"sst2": {0: record(ratios=(0.25, 0.5, 1.25))}, "rte": {0: {}}},  # {}: diverged
    }
    text = tables(grid)
    assert "| task | method | seeds | 0.25 | 0.5 | 0.75 | 1 | 1.25 | 1.5 | 1.75 |" in text
    assert "| mean | ee† | 2 | 55.0 ±0.0° | 80.0 ±0.0 |" in text
    assert "| sst2 | ee | 2 | 50.0 ±0.0° | 80.0 ±0.0 |" in text
    assert "| rte | ee† | 2 | 60.0 ±0.0 | 80.0 ±0.0 |" in text
    assert "| sst2 | ee° | 2 | 50.0 ±0.0 | 50.0 ±0.0 | 65.0 ±0.0 | 80.0 ±0.0 |  |  |  |" in text
    assert "| mean | mm† | 0 |  |  |" in text  # no seed has both tasks
    assert "| sst2 | mm | 1 | 60.0 | 70.0 | 73.3 | 76.7 | 80.0 |  |  |" in text
    # The last method less each other, where both have a run: 60, 70, 73.3, 76.7 less 50, 50, 65, 80.
    assert "| ee | 1 | +10.0 | +20.0 | +8.3 | -3.3 |\n" in text
    assert "| task | method | seeds | 0.333 | 1 |" in tables(grid, (1 / 3, 1))


def test_a_seed_that_lacks_a_task_has_no_mean_and_differences_are_paired_over_tasks_and_seeds():
    one, two = {0: record(), 1: record((62, 70, 82))}, {1: record((70, 70, 90)), 2: record((0, 0, 0))}
    ends = seed_means({"sst2": one, "mrpc": two}, lambda run: run["exit_scores"])
    assert ends.tolist() == [[66, 86]]
    higher = {0: record((61, 72, 80)), 1: record((63, 72, 80)), 2: {}, 3: record()}
    same = {seed: record() for seed in range(3)}
    text = tables({"mm": {"sst2": {}}, "ee": {"sst2": same}, "sweet": {"sst2": higher}})
    assert "| ee | 2 | +2.0 ±12.7 | +2.0 ±0.0 | +1.0 ±0.0 | +0.0 ±0.0 |" in text  # seed 2 diverged, seed 3 has no pair
    assert "| method | seeds | sst2 | less mm | less ee | less sweet |" in text
    assert "| ee | 3 | 70.0 ±0.0 |  |  | -1.3 ±4.2 |" in text  # 70 less 71 and 71.67
    assert "| mm | 0 |  |  |  |  |" in text


def test_a_figure_has_a_curve_of_its_own_colour_for_each_method(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(report, "save_figure", lambda figure, path: figures.append(figure))
    methods = ["sweet-flow0.5", "ee", "mm", "sweet", "sweet-cap1"]
    grid = {method: {"sst2": {0: record(), 1: record()}} for method in methods} | {"branch": {"sst2": {}}}
    report.draw_curves(tmp_path / "a.png", [("title", grid, ["sst2"])])
    lines = figures[0].axes[0].lines
    assert [line.get_label() for line in lines] == methods
    assert len({line.get_color() for line in lines}) == len(methods)


FOUR = "sst2,mrpc,qqp,qnli"
SWEETS = "sweet,sweet-flow0.3,sweet-flow0.5,sweet-flow0.7,sweet-flow0.9,ee,sweet-cap0.25,sweet-cap0.5,sweet-cap1,"
SWEETS += "sweet-cap2,sweet-owner0.0625,sweet-owner0.125,sweet-owner0.25,sweet-owner0.5,sweet-owner1"
SIX = ["--tasks", f"{FOUR},cola,rte", "--methods", "ee,mm,sweet,ee-mixed,mm-taught,branch"]
RATES = ["--lrs", "5e-5,1e-4,2e-4,4e-4", "--ratios", "1/6,1/4,1/3,1/2,2/3,3/4,1"]
ONE = ["--seeds", "0", "--tasks"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("archives", "committed", "options"),
    [
        (["records"], "results.md", ["--tasks", FOUR]),
        (["records", "branch"], "branch.md", [*SIX, *RATES]),
        (["records"], "owner.md", ["--tasks", FOUR, "--methods", "ee,mm,sweet,sweet-flow0.3,sweet-owner0.125"]),
        (["held"], "held.md", [*ONE, FOUR, "--methods", SWEETS]),
        (["records"], "lte.md", [*ONE, "sst2,mrpc", "--exit-strategy", "lte", "--lrs", "2e-4"]),
        (["records"], "sizes.md", [*ONE, "sst2", "--train-sizes", "6000,500,2000,20000"]),
    ],
)
def test_the_committed_records_make_the_committed_reports(tmp_path, monkeypatch, archives, committed, options):
    results = CHECKOUT / ".github" / "results"
    for name in archives:
        with tarfile.open(results / f"{name}.tar.xz") as archive:
            archive.extractall(tmp_path / "runs", filter="data")
    monkeypatch.setattr(sys, "argv", ["reproduce", *options, "--report-only", "--out", str(tmp_path)])
    reproduce.main()
    made, kept = ((folder / name).read_text() for folder, name in ((tmp_path, "results.md"), (results, committed)))
    assert "Missing runs: 0" in made
    assert set(made.splitlines()) <= set(kept.splitlines())  # at its time it also compared single models


@pytest.mark.slow
def test_the_committed_records_make_the_tables_of_exit_0(tmp_path, capsys):
    results = CHECKOUT / ".github" / "results"
    with tarfile.open(results / "zero.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    zero_tables.report(tmp_path / "records", list(zero_tables.TASKS), [0, 1, 2], None)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 50
    assert set(lines) <= set((results / "zero.md").read_text().splitlines())
