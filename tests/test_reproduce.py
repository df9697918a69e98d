"""The grid: what is run, in which order, what is skipped, and what it becomes: tables and figures."""

import json
import shutil
from contextlib import ExitStack
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from minisweet.paper import reproduce
from minisweet.paper.report import tables
from minisweet.resume import checkpoint_folder, claimed
from tests.conftest import write_model

TINY = ["--train-size", "32", "--epochs", "1", "--max-length", "32", "--tasks", "toy"]
ONE = ["--seeds", "0", "--lrs", "1e-3"]
RESULTS = Path("reproduced/results.md")


@pytest.fixture
def grid(command, monkeypatch, tmp_path):
    """Run reproduce in an empty folder: its status, output, errors, and the names of runs that it worked on."""
    write_model(tmp_path / "tiny", "bert")
    complete, started = reproduce.Grid.complete, []

    def noted(self, run) -> None:
        started.append(self.folder(run).name)
        complete(self, run)

    monkeypatch.setattr(reproduce.Grid, "complete", noted)

    def reproduced(*arguments) -> tuple[int, str, str, list[str]]:
        started.clear()
        return *command(reproduce, "--model", "tiny", "--exit-layers", "1,4", *TINY, *arguments), list(started)

    return reproduced


def record(scores=(60.0, 70.0, 80.0), ratios=(0.25, 0.5, 1.0), **changes) -> dict:
    """A run's record with two exits, after layers 1 and 4, of which the first answers with one class."""
    exits = {"exit_layers": [1, 4], "exit_scores": [scores[0], scores[-1]], "exit_answers": [1, 2]}
    curve = {"speedup_ratios": list(ratios), "scores": list(scores), "area": float(np.mean(scores))}
    return {"method": "ee", "metric": "accuracy"} | exits | curve | changes


def fake_run(method: str, lr=1e-3, seed=0, area=60.0, **changes) -> Path:
    """Write the records of a run of the toy task, without its weights; all its scores are `area`."""
    folder = Path(f"reproduced/runs/tiny-{method}-toy-lr{lr:g}-n32-seed{seed}")
    folder.mkdir(parents=True)
    options = {"model": "tiny", "method": method, "lr": lr, "train_size": 32, "seed": seed, "max_length": 32}
    content = record([area] * 3, method=method, task="toy", arguments=options, depth=4, exit_strategy="confidence")
    content |= {"device": "none", "precision": "torch.float32", "vocab_size": 60, "examples": 100, "dev_digest": ""}
    content |= {"thresholds": [0.5, 0.75, 1.0], "exit_counts": [], "seconds": 0.0, "versions": {}}
    for name in ("run.json", "evaluation.json"):
        (folder / name).write_text(json.dumps(content | {"labels": ["negative", "positive"]} | changes))
    return folder


def test_a_run_that_another_process_trains_is_passed_over_and_then_waited_for(grid, monkeypatch):
    folder, others = fake_run("ee"), ExitStack()
    shutil.move(folder, "made")
    checkpoint_folder(folder).mkdir()
    others.enter_context(claimed(checkpoint_folder(folder)))

    def end_of_the_other(_) -> None:
        others.close()
        shutil.rmtree(checkpoint_folder(folder))
        shutil.move("made", folder)

    monkeypatch.setattr("time.sleep", end_of_the_other)
    status, out, err, started = grid("--methods", "ee,sweet", *ONE)
    assert (status, "of 2 runs; 0 missing" in out) == (0, True)
    assert "waiting for tiny-ee-toy-lr0.001-n32-seed0, which another process makes" in err
    assert started == ["tiny-sweet-toy-lr0.001-n32-seed0"]


def test_the_search_comes_first_and_the_rate_with_the_largest_area_makes_the_rest(grid, monkeypatch):
    """On three methods at two rates. An area that is None is of a run that diverges."""
    areas = {"ee": {1e-3: 60, 1e-2: 70}, "sweet": {1e-3: None, 1e-2: 50}, "mm": {1e-3: None, 1e-2: None}}
    words = ["--methods", "ee,sweet,mm", "--lrs", "1e-3,1e-2", "--seeds", "0,1,2"]
    made = []

    def pretend(_, run) -> None:
        made.append((run.method, run.lr, run.seed))
        area = areas[run.method][run.lr]
        fake_run(run.method, run.lr, run.seed, area or 0, diverged=3 if area is None else None)

    monkeypatch.setattr(reproduce.Grid, "complete", pretend)
    assert grid(*words)[0] == 0
    search, rest = [(method, lr, 0) for method, rates in areas.items() for lr in rates], [*made]
    assert made[:6] == search
    assert sorted(made) == sorted({*search, *product(("ee", "sweet"), [1e-2], (0, 1, 2))})
    assert (grid(*words)[0], made) == (0, rest)  # nothing is made again
    for line in ("| ee | 0.01 |", "| sweet | 0.01 |", "| toy | mm | 0 |", "infinite or NaN: 3\n"):
        assert line in RESULTS.read_text()
    figures = {path.name for path in Path("reproduced").glob("*.png")}
    assert figures == {"curves.png"}


def test_options_reach_the_runs_and_what_is_there_is_not_made_again(grid):
    words = ["--methods", "sweet", *ONE, "--exit-strategy", "lte", "--amp", "bf16"]
    status, out, _, (name,) = grid(*words)
    assert (status, "results.md, curves.png, of 1 runs; 0 missing" in out) == (0, True)
    folder, evaluation = Path("reproduced/runs", name), Path("reproduced/runs", name, "evaluation.json")
    arguments = json.loads((folder / "run.json").read_text())["arguments"]
    wanted = {"exit_strategy": "lte", "batch_size": 16, "exit_layers": [1, 4], "amp": "bf16"}
    assert arguments | wanted == arguments
    assert json.loads(evaluation.read_text())["precision"] == "torch.bfloat16"
    assert "exit strategy lte" in RESULTS.read_text()
    evaluation.unlink()
    weights = (folder / "model.safetensors").stat().st_mtime_ns
    assert (grid(*words)[3], grid(*words)[3]) == ([name], [])
    assert (folder / "model.safetensors").stat().st_mtime_ns == weights


def test_a_run_that_fails_is_named_and_the_others_go_on(grid):
    (fake_run("ee") / "evaluation.json").unlink()  # and it has no weights
    status, out, err, _ = grid("--methods", "ee,sweet", *ONE)
    assert err.splitlines()[-1].endswith("1 runs failed, see their messages above: tiny-ee-toy-lr0.001-n32-seed0")
    assert (status, "of 1 runs; 1 missing" in out) == (2, True)


def test_tables_leave_blank_what_a_run_lacks_and_mark_exits_of_one_class():
    other = record((50.0, 50.0, 80.0), metric="matthews")
    far = record(ratios=(0.0, 0.5, 1.25), metric="matthews", exit_layers=[0, 6], exit_answers=[1, 3])
    grid = {
        "ee": {"sst2": {0: other, 1: other}, "rte": {0: record(), 1: record()}},
        "mm": {"sst2": {0: far}, "rte": {1: record((0, 0, 0))}},
    }
    text = tables(grid)
    assert "| task | method | seeds | layer 0 | layer 1 | layer 4 | layer 6 |" in text
    assert "| mean of all 2 | ee | 2 |  | 55.0 ±0.0 [4] | 80.0 ±0.0 |  |" in text
    assert "| task | method | seeds | 0 | 0.25 | 0.5 | 0.75 | 1 | 1.25 | 1.5 | 1.75 | area |" in text
    assert "| sst2 | ee | 2 |  | 50.0 | 50.0 | 65.0 | 80.0 |  |  |  | 60.0 |" in text  # two seeds have no interval
    assert "| mean of all 2 | mm | 0 |  |  |" in text  # no seed has both tasks
