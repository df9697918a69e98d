"""The grid: what is run, in which order, what is skipped, and what it becomes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import evaluate
import train
from minisweet.paper import reproduce
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


def fake_run(method: str, lr: float = 1e-3, seed: int = 0, area: float = 60.0, stuck: bool = False, **changes) -> Path:
    """Write the records of a run of the toy task, without its weights; all its scores are `area`."""
    folder = Path(f"reproduced/runs/tiny-{method}-toy-lr{lr:g}-n32-seed{seed}")
    folder.mkdir(parents=True)
    record = {"task": "toy", "method": method, "lr": lr, "train_size": 32, "seed": seed, "epochs": 1, "max_length": 32}
    record |= {"batch_size": 16, "model": "tiny", "exit_strategy": "confidence", "exit_layers": [1, 4], "depth": 4}
    record |= {"losses": [[2.0, 2.0], [1.0, 1.0]], "device": "none", "precision": "torch.float32", **changes}
    record |= {"metric": "accuracy", "labels": ["negative", "positive"]}
    evaluation = {key: record[key] for key in ("task", "method", "exit_strategy", "metric", "exit_layers", "precision")}
    evaluation |= {"exit_scores": [area, area], "class_counts": [[0, 9], [9, 0]] if stuck else [[3, 6], [4, 5]]}
    evaluation |= {"thresholds": np.linspace(0.5, 1, 11).tolist(), "speedup_ratios": np.linspace(0.25, 1, 11).tolist()}
    evaluation |= {"scores": [area] * 11, "area": area}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


def report() -> str:
    return Path("reproduced/results.md").read_text()


def test_a_grid_runs_once_and_goes_on_where_it_stopped(grid):
    words = ["--methods", "ee,mm", "--seeds", "0,1", "--lrs", "1e-3,1e-2"]
    status, out, _, started = grid(*words)
    assert (status, len(started)) == (0, 2 * 2 * 3)  # two methods, two scripts, two rates and then another seed
    assert "results.md, curves.png, of 6 runs; 0 missing" in out
    assert {path.name for path in Path("reproduced").iterdir()} == {"runs", "results.md", "curves.png"}
    runs = {path.name: json.loads((path / "evaluation.json").read_text()) for path in Path("reproduced/runs").iterdir()}
    assert len(runs) == 6
    for method in ("ee", "mm"):
        areas = {lr: runs[f"tiny-{method}-toy-lr{lr:g}-n32-seed0"]["area"] for lr in (1e-3, 1e-2)}
        best = max(areas, key=areas.get)
        assert f"| {method} | {best:g} |" in report()
        scores = np.array([runs[f"tiny-{method}-toy-lr{best:g}-n32-seed{seed}"]["exit_scores"] for seed in (0, 1)])
        means, deviations = scores.mean(0), scores.std(0, ddof=1)
        cells = [f"{mean:.1f} ±{std:.1f}" for mean, std in zip(means, deviations, strict=True)]
        row = next(line for line in report().splitlines() if line.startswith(f"| toy | {method}"))
        assert row.replace("°", "").split(" | ")[3:] == [cells[0], f"{cells[1]} |"]
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
    assert "exit strategy lte" in report()
    grid("--methods", "branch", *ONE, "--exit-layers", "0,4", "--ratios", "1/4,1")
    assert "| task | method | seeds | layer 0 | layer 4 |" in report()
    assert "| task | method | seeds | 0.25 | 1 |" in report()


def test_whatever_method_a_record_names_is_reported_and_not_made(grid):
    fake_run("sweet-owner0.125", area=60)
    fake_run("ee-mixed", area=61, trunk="runs/branch", targets="labels", train_digest="a")
    fake_run("mm-taught", area=62, trunk="runs/branch", targets="trunk", train_digest="b")  # of rows without labels
    words = ["--methods", "sweet-owner0.125,ee-mixed,mm-taught", "--seeds", "0"]  # the rates are those that are there
    assert "other methods are only reported (--report-only)" in grid(*words, "--print-commands")[2]
    assert grid(*words, "--report-only")[0] == 0
    for row in ("sweet-owner0.125 | 1 | 60.0", "ee-mixed | 1 | 61.0", "mm-taught | 1 | 62.0"):
        assert f"| toy | {row} |" in report()


def test_what_is_missing_or_did_not_converge_is_named(grid):
    fake_run("sweet", area=60.0, stuck=True)
    status, out, _, started = grid("--methods", "ee,sweet", "--seeds", "0,1", "--lrs", "1e-3", "--report-only")
    assert (status, started, "of 1 runs; 3 missing" in out) == (0, [], True)
    for line in ("Missing runs: 3", "- tiny-ee-toy-lr0.001-n32-seed1", "trained on: none, torch.float32"):
        assert line in report()
    assert "Runs that did not converge: 1\n\n- tiny-sweet-toy-lr0.001-n32-seed0\n" in report()
    assert "| toy | sweet† | 1 | 60.0° | 60.0° |" in report()
    grid("--methods", "sweet", "--seeds", "0,1", "--lrs", "1e-3,1e-2", "--report-only")
    assert "Missing runs: 1\n\n- tiny-sweet-toy-lr0.01-n32-seed0\n" in report()  # no rate is known for the others


def test_training_sizes_use_the_rate_of_the_first_and_get_a_figure(grid):
    fake_run("sweet", 1e-3, area=60.0)
    fake_run("sweet", 1e-2, area=70.0)
    status, out, _, started = grid("--methods", "sweet", "--seeds", "0", "--lrs", "1e-3,1e-2", "--train-sizes", "32,16")
    assert (status, "curves.png, sizes.png" in out) == (0, True)
    assert all("tiny-sweet-toy-lr0.01-n16-seed0" in line for line in started)
    assert "## Up to 16 training examples" in report()
    out = grid("--methods", "sweet", *ONE, "--tasks", "toy,rte", "--report-only")[1]
    assert "curves.png, tasks.png" in out


def test_the_search_passes_over_a_rate_that_diverges(grid):
    words = ["--methods", "ee", "--seeds", "0,1"]
    status, out, _, started = grid(*words, "--lrs", "1e-3,1e30")
    assert any("tiny-ee-toy-lr1e+30-n32-seed0" in line for line in started)
    assert (status, "of 3 runs; 0 missing" in out) == (0, True)
    assert "| ee | 0.001 |" in report()
    assert "- tiny-ee-toy-lr1e+30-n32-seed0: its loss became infinite or NaN\n" in report()
    assert grid(*words, "--lrs", "1e-3,1e30")[3] == []
    grid(*words, "--lrs", "1e30", "--report-only")
    assert "| toy | ee† | 0 |  |  |" in report()


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
        ({"batch_size": 8}, "a run with batch_size 8, not 16"),
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
