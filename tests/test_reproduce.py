"""The grid: what is run, in which order, what is skipped, and what it becomes: tables and figures."""

import json
import math
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

import evaluate
import train
from minisweet.paper import report, reproduce
from minisweet.paper.report import STUDENT_T, interpolated, over_seeds, seed_means, tables
from tests.benchmark import zero_tables
from tests.conftest import CHECKOUT, run, write_model

TINY = ["--train-sizes", "32", "--epochs", "1", "--max-length", "32", "--tasks", "toy"]
ONE = ["--seeds", "0", "--lrs", "1e-3"]


@pytest.fixture
def grid(command, monkeypatch, tmp_path):
    """Run reproduce in an empty folder: its status, output, errors, and the command lines of what it started.

    What it would start in processes of their own runs in this one, which is faster.
    """
    write_model(tmp_path / "tiny", "bert")
    started = []

    def in_process(script: str, arguments: list[str]) -> int:
        started.append(" ".join([script, *arguments]))
        return run({"train.py": train, "evaluate.py": evaluate}[script], *arguments)

    monkeypatch.setattr(reproduce, "run_script", in_process)

    def reproduced(*arguments) -> tuple[int, str, str, list[str]]:
        started.clear()
        return *command(reproduce, "--model", "tiny", "--exit-layers", "1,4", *TINY, *arguments), list(started)

    return reproduced


def record(scores=(60.0, 70.0, 80.0), ratios=(0.25, 0.5, 1.0), **changes) -> dict:
    """A run's record with two exits, after layers 1 and 4, whose loss falls from 2 to 1."""
    return {
        "method": "ee",
        "exit_layers": [1, 4],
        "exit_scores": [scores[0], scores[-1]],
        "losses": [[loss, loss] for loss in np.linspace(2, 1, 40)],
        "speedup_ratios": list(ratios),
        "scores": list(scores),
        "area": float(np.mean(scores)),
    } | changes


def fake_run(method: str, lr: float = 1e-3, seed: int = 0, area: float = 60.0, **changes) -> Path:
    """Write the records of a run of the toy task, without its weights; all its scores are `area`."""
    folder = Path(f"reproduced/runs/tiny-{method}-toy-lr{lr:g}-n32-seed{seed}")
    folder.mkdir(parents=True)
    content = record([area] * 3, method=method, task="toy", lr=lr, train_size=32, seed=seed, epochs=1)
    content |= {"max_length": 32, "batch_size": 16, "model": "tiny", "depth": 4, "exit_strategy": "confidence"}
    content |= {"device": "none", "precision": "torch.float32", "metric": "accuracy", "thresholds": [0.5, 0.75, 1.0]}
    content |= {"labels": ["negative", "positive"], **changes}
    for name in ("run.json", "evaluation.json"):
        (folder / name).write_text(json.dumps(content))
    return folder


def results() -> str:
    return Path("reproduced/results.md").read_text()


def test_a_grid_runs_once_and_goes_on_where_it_stopped(grid):
    words = ["--methods", "ee,mm", "--seeds", "0,1", "--lrs", "1e-3,1e-2"]
    status, out, _, started = grid(*words)
    assert (status, len(started)) == (0, 2 * 2 * 3)  # two methods, two scripts, two rates and then another seed
    assert "results.md, curves.png, of 6 runs; 0 missing" in out
    assert {path.name for path in Path("reproduced").iterdir()} == {"runs", "results.md", "curves.png"}
    assert len(list(Path("reproduced/runs").iterdir())) == 6
    assert grid(*words)[3] == []
    Path("reproduced/runs/tiny-ee-toy-lr0.001-n32-seed0/evaluation.json").unlink()
    (line,) = grid(*words)[3]
    assert line.startswith("evaluate.py reproduced/runs/tiny-ee-toy-lr0.001-n32-seed0")


def test_commands_are_printed_the_search_first(grid):
    words = ["--methods", "sweet", "--seeds", "0,1,2", "--lrs", "1e-3,1e-2", "--print-commands"]
    status, out, _, started = grid(*words)
    assert (status, started, len(out.splitlines())) == (0, [], 2)
    assert not Path("reproduced").exists()
    fake_run("sweet", 1e-3, area=60.0)
    (line,) = grid(*words)[1].splitlines()
    assert "--lr 0.01 " in line
    fake_run("sweet", 1e-2, area=59.0)
    lines = grid(*words)[1].splitlines()
    assert ["--lr 0.001 --seed 1 " in lines[0], "--lr 0.001 --seed 2 " in lines[1], len(lines)] == [True, True, 2]
    assert len(grid("--methods", "ee,sweet", "--lrs", "1e-3", "--print-commands")[1].splitlines()) == 5


@pytest.mark.slow
def test_a_printed_command_makes_its_run(grid):
    words = ["--methods", "sweet", "--seeds", "3", "--lrs", "1e-3"]
    (line,) = grid(*words, "--print-commands")[1].splitlines()
    line = line.replace("python ", f"{sys.executable} {CHECKOUT}/")
    assert subprocess.run(["bash", "-c", line], capture_output=True).returncode == 0
    status, out, _, _ = grid(*words, "--report-only")
    assert (status, "of 1 runs; 0 missing" in out) == (0, True)


def test_options_reach_the_runs_and_the_report(grid):
    status, _, _, (trained, evaluated) = grid("--methods", "sweet", *ONE, "--exit-strategy", "lte", "--amp", "bf16")
    assert (status, "tiny-sweet-toy-lr0.001-n32-seed0-lte" in trained) == (0, True)
    for option in ("--exit-strategy lte", "--batch-size 16", "--exit-layers 1,4", "--amp bf16", "--resume"):
        assert option in trained
    assert "--amp bf16" in evaluated
    assert "exit strategy lte" in results()
    grid("--methods", "branch", *ONE, "--exit-layers", "0,4", "--ratios", "1/4,1")
    assert "| task | method | seeds | 0.25 | 1 |" in results()


def test_whatever_method_a_record_names_is_reported_and_not_made(grid):
    fake_run("sweet-owner0.125", area=60)
    fake_run("ee-mixed", area=61, trunk="runs/branch", targets="labels", train_digest="a")
    fake_run("mm-taught", area=62, trunk="runs/branch", targets="trunk", train_digest="b")  # of rows without labels
    words = ["--methods", "sweet-owner0.125,ee-mixed,mm-taught", "--seeds", "0"]  # the rates are those that are there
    assert "other methods are only reported (--report-only)" in grid(*words, "--print-commands")[2]
    assert grid(*words, "--report-only")[0] == 0
    for row in ("sweet-owner0.125 | 1 | 60.0", "ee-mixed | 1 | 61.0", "mm-taught | 1 | 62.0"):
        assert f"| toy | {row} |" in results()


def test_what_is_missing_is_named(grid):
    fake_run("sweet", area=60.0)
    status, out, _, started = grid("--methods", "ee,sweet", "--seeds", "0,1", "--lrs", "1e-3", "--report-only")
    assert (status, started, "of 1 runs; 3 missing" in out) == (0, [], True)
    for line in ("Missing runs: 3", "- tiny-ee-toy-lr0.001-n32-seed1", "trained on: none, torch.float32"):
        assert line in results()
    assert "Runs whose loss became infinite or NaN: 0\n" in results()
    grid("--methods", "sweet", "--seeds", "0,1", "--lrs", "1e-3,1e-2", "--report-only")
    assert "Missing runs: 1\n\n- tiny-sweet-toy-lr0.01-n32-seed0\n" in results()  # no rate is known for the others


def test_training_sizes_use_the_rate_of_the_first_and_get_a_figure(grid):
    fake_run("sweet", 1e-3, area=60.0)
    fake_run("sweet", 1e-2, area=70.0)
    status, out, _, started = grid("--methods", "sweet", "--seeds", "0", "--lrs", "1e-3,1e-2", "--train-sizes", "32,16")
    assert (status, "curves.png, sizes.png" in out) == (0, True)
    assert all("tiny-sweet-toy-lr0.01-n16-seed0" in line for line in started)
    for part in ("| sweet | 0.01 |", "| toy | sweet | 1 | 70.0 | 70.0 |", "## Up to 16 training examples"):
        assert part in results()
    out = grid("--methods", "sweet", *ONE, "--tasks", "toy,rte", "--report-only")[1]
    assert "curves.png, tasks.png" in out


def test_the_search_passes_over_a_rate_that_diverges(grid):
    words = ["--methods", "ee", "--seeds", "0,1"]
    status, out, _, started = grid(*words, "--lrs", "1e-3,1e30")
    assert any("tiny-ee-toy-lr1e+30-n32-seed0" in line for line in started)
    assert (status, "of 3 runs; 0 missing" in out) == (0, True)
    assert "| ee | 0.001 |" in results()
    assert "Runs whose loss became infinite or NaN: 1\n\n- tiny-ee-toy-lr1e+30-n32-seed0\n" in results()
    assert grid(*words, "--lrs", "1e-3,1e30")[3] == []
    grid(*words, "--lrs", "1e30", "--report-only")
    assert "| toy | ee | 0 |  |  |" in results()


def test_a_run_that_fails_is_named_and_the_others_go_on(grid):
    folder = fake_run("ee")
    (folder / "evaluation.json").unlink()  # and it has no weights
    status, out, err, started = grid("--methods", "ee,sweet", *ONE)
    assert any("tiny-sweet-toy-lr0.001-n32-seed0" in line for line in started)
    assert err.splitlines()[-1].endswith("1 runs failed, see their messages above: tiny-ee-toy-lr0.001-n32-seed0")
    assert (status, "of 1 runs; 1 missing" in out) == (2, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 3}, "a run with epochs 3, not 1"),
        ({"exit_layers": [1, 2]}, "a run with exit_layers [1, 2], not [1, 4]"),
        ({"train_digest": "b"}, "on other train rows than other runs"),
        ({"dev_digest": "b"}, "on other dev rows than other runs"),
        ({"losses": 1.0}, "losses"),
    ],
)
def test_a_run_of_other_settings_or_rows_is_refused(grid, changes, message):
    fake_run("ee", train_digest="a", dev_digest="a")
    folder = fake_run("sweet", **{"train_digest": "a", "dev_digest": "a"} | changes)
    status, _, err, started = grid("--methods", "ee,sweet", *ONE)
    assert (status, started, err.count("\n")) == (2, [], 1)
    assert f"{folder}" in err
    assert message in err


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


def test_exit_0_is_in_the_tables_and_has_no_loss():
    only_fitted = {"method": "branch", "exit_layers": [0, 6], "losses": []}  # on a trunk that was there
    with_it = record(ratios=(0.0, 0.5, 1.0), **only_fitted)
    text = tables({"ee": {"sst2": {0: record()}}, "branch": {"sst2": {0: with_it}}})
    assert "| task | method | seeds | layer 0 | layer 1 | layer 4 | layer 6 |" in text
    assert "| sst2 | branch | 1 | 60.0 |  |  | 80.0 |" in text
    assert "| sst2 | ee | 1 |  | 60.0 | 70.0 | 75.0 | 80.0 |" in text
    assert "| ee | 1 |  | +5.0 | +0.0 | +0.0 | +0.0 |" in text


def test_tables_leave_blank_what_a_curve_does_not_reach():
    other = record((50.0, 50.0, 80.0))
    grid = {
        "ee": {"sst2": {0: other, 1: other}, "rte": {0: record(), 1: record()}},
        "mm": {"sst2": {0: record(ratios=(0.25, 0.5, 1.25))}, "rte": {0: {}}},  # {}: diverged
    }
    text = tables(grid)
    assert "| task | method | seeds | 0.25 | 0.5 | 0.75 | 1 | 1.25 | 1.5 | 1.75 |" in text
    assert "| mean | ee | 2 | 55.0 ±0.0 | 80.0 ±0.0 |" in text
    assert "| sst2 | ee | 2 | 50.0 ±0.0 | 80.0 ±0.0 |" in text
    assert "| sst2 | ee | 2 | 50.0 ±0.0 | 50.0 ±0.0 | 65.0 ±0.0 | 80.0 ±0.0 |  |  |  |" in text
    assert "| mean | mm | 0 |  |  |" in text  # no seed has both tasks
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
SIX = ["--tasks", f"{FOUR},cola,rte", "--methods", "ee,mm,sweet,ee-mixed,mm-taught,branch"]
RATES = ["--lrs", "5e-5,1e-4,2e-4,4e-4", "--ratios", "1/6,1/4,1/3,1/2,2/3,3/4,1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("archives", "committed", "options"),
    [
        (["records"], "results.md", ["--tasks", FOUR]),
        (["records", "branch"], "branch.md", [*SIX, *RATES]),
        (["records"], "lte.md", ["--seeds", "0", "--tasks", "sst2,mrpc", "--exit-strategy", "lte", "--lrs", "2e-4"]),
        (["records"], "sizes.md", ["--seeds", "0", "--tasks", "sst2", "--train-sizes", "6000,500,2000,20000"]),
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
