"""The grid: what is run, in which order, what is skipped, and what it becomes: tables and figures."""

import json
import re
import shutil
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
import train
from minisweet.paper import reproduce
from minisweet.paper.report import cells, size_table, tables
from minisweet.runs.resume import checkpoint_folder, claimed
from tests.conftest import in_folder, run, write_model

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
    """A run's record with two exits, after layers 1 and 4, of which the first answers with one class."""
    return {
        "method": "ee",
        "metric": "accuracy",
        "exit_layers": [1, 4],
        "exit_scores": [scores[0], scores[-1]],
        "exit_answers": [1, 2],
        "speedup_ratios": list(ratios),
        "scores": list(scores),
        "area": float(np.mean(scores)),
    } | changes


def fake_run(method: str, lr=1e-3, size=32, seed=0, area=60.0, **changes) -> Path:
    """Write the records of a run of the toy task, without its weights; all its scores are `area`."""
    folder = Path(f"reproduced/runs/tiny-{method}-toy-lr{lr:g}-n{size}-seed{seed}")
    folder.mkdir(parents=True)
    content = record([area] * 3, method=method, task="toy", lr=lr, train_size=size, seed=seed, epochs=1)
    content |= {"max_length": 32, "batch_size": 16, "model": "tiny", "depth": 4, "exit_strategy": "confidence"}
    content |= {"device": "none", "precision": "torch.float32", "vocab_size": 60, "examples": 100, "dev_digest": ""}
    content |= {"labels": ["negative", "positive"]} | changes
    for name in ("run.json", "evaluation.json"):
        (folder / name).write_text(json.dumps(content))
    return folder


def results() -> str:
    return Path("reproduced/results.md").read_text()


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
    assert ["tiny-sweet-toy" in line for line in started] == [True, True]


@settings(max_examples=8)
@given(
    areas=st.lists(st.none() | st.integers(0, 100), min_size=4, max_size=4),
    seeds=st.sampled_from([[0], [0, 1, 2]]),
    sizes=st.sampled_from([[32], [32, 16]]),
)
def test_the_search_comes_first_and_the_rate_with_the_largest_area_makes_the_rest(run_of, areas, seeds, sizes):
    """On two methods at two rates. An area that is None is of a run that diverges."""
    area_of = dict(zip(product(("ee", "sweet"), (1e-3, 1e-2)), areas, strict=True))
    words = ["--model", str(run_of("sweet").parent / "tiny"), *TINY, "--methods", "ee,sweet", "--lrs", "1e-3,1e-2"]
    words += ["--exit-layers", "1,4", "--seeds", ",".join(map(str, seeds)), "--train-sizes", ",".join(map(str, sizes))]
    made = []

    def pretend(script: str, arguments: list[str]) -> int:
        if script == "train.py":
            method, *numbers = re.search(r"tiny-(\w+)-toy-lr([\d.]+)-n(\d+)-seed(\d)", " ".join(arguments)).groups()
            lr, size, seed = float(numbers[0]), *map(int, numbers[1:])
            made.append((method, lr, size, seed))
            area = area_of[method, lr]
            fake_run(method, lr, size, seed, area or 0, model=words[1], diverged=3 if area is None else None)
        return 0

    with TemporaryDirectory() as folder, in_folder(Path(folder)), pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduce, "run_script", pretend)
        assert run(reproduce, *words) == 0
        once = list(made)
        assert run(reproduce, *words) == 0
        text, figures = results(), {path.name for path in Path("reproduced").glob("*.png")}
    assert made == once
    search, rest = [(*pair, sizes[0], seeds[0]) for pair in area_of], []
    for method in ("ee", "sweet"):
        there = {lr: area for (its, lr), area in area_of.items() if its == method and area is not None}
        best = [max(there, key=there.get)] if there else []
        rest += product([method], best, sizes, seeds)
        assert f"| {method} | {best[0]:g} |" in text if best else f"| toy | {method} | 0 |" in text
    assert (once[:4], sorted(once)) == (search, sorted({*search, *rest}))
    assert f"infinite or NaN: {areas.count(None)}\n" in text
    assert figures == {"curves.png"} | ({"sizes.png"} if len(sizes) > 1 else set())


def test_options_reach_the_runs_and_what_is_there_is_not_made_again(grid):
    words = ["--methods", "sweet", *ONE, "--exit-strategy", "lte", "--amp", "bf16"]
    status, out, _, (trained, evaluated) = grid(*words)
    assert (status, "results.md, curves.png, of 1 runs; 0 missing" in out) == (0, True)
    for option in ("--exit-strategy lte", "--batch-size 16", "--exit-layers 1,4", "--amp bf16", "--resume"):
        assert option in trained
    assert "--amp bf16" in evaluated
    assert "exit strategy lte" in results()
    assert {path.name for path in Path("reproduced").iterdir()} == {"runs", "results.md", "curves.png"}
    Path("reproduced/runs/tiny-sweet-toy-lr0.001-n32-seed0-lte/evaluation.json").unlink()
    assert grid(*words)[3] == [evaluated]


def test_what_is_missing_is_named(grid):
    fake_run("sweet", area=60.0)
    fake_run("mm", 0.1)  # which nobody asks for
    status, out, _, started = grid("--methods", "ee,sweet", "--seeds", "0,1", "--report-only")
    assert (status, started, "of 1 runs; 3 missing" in out) == (0, [], True)
    for line in ("Missing runs: 3", "- tiny-ee-toy-lr0.001-n32-seed1", "infinite or NaN: 0\n"):
        assert line in results()
    out = grid("--methods", "sweet", *ONE, "--tasks", "toy,rte", "--report-only")[1]
    assert "curves.png, tasks.png" in out
    grid("--methods", "sweet", "--seeds", "0,1", "--lrs", "1e-3,1e-2", "--report-only")
    assert "Missing runs: 1\n\n- tiny-sweet-toy-lr0.01-n32-seed0\n" in results()  # no rate is known for the others


def test_a_run_that_fails_is_named_and_the_others_go_on(grid):
    folder = fake_run("ee")
    (folder / "evaluation.json").unlink()  # and it has no weights
    status, out, err, started = grid("--methods", "ee,sweet", *ONE)
    assert any("tiny-sweet-toy-lr0.001-n32-seed0" in line for line in started)
    assert err.splitlines()[-1].endswith("1 runs failed, see their messages above: tiny-ee-toy-lr0.001-n32-seed0")
    assert (status, "of 1 runs; 1 missing" in out) == (2, True)


def test_a_run_that_diverged_is_in_no_table(grid):
    fake_run("ee", diverged=3)
    assert grid("--methods", "ee", *ONE, "--report-only")[0] == 0
    assert "| toy | ee | 0 |" in results()
    assert "infinite or NaN: 1\n" in results()


def test_where_it_is_installed_without_a_clone_it_is_refused_first(grid, monkeypatch, tmp_path):
    monkeypatch.setattr(reproduce, "CLONE", tmp_path)
    status, _, err, started = grid("--methods", "ee", *ONE)
    assert (status, started, err.count("\n"), "minisweet reproduce in a clone" in err) == (2, [], 1, True)
    assert not Path("reproduced").exists()


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
    assert "| sst2 | mm | 1 | 60.0 [1] |  |  | 80.0 |" in text
    assert "| task | method | seeds | 0 | 0.25 | 0.5 | 0.75 | 1 | 1.25 | 1.5 | 1.75 | area |" in text
    assert "| sst2 | ee | 2 |  | 50.0 | 50.0 | 65.0 | 80.0 |  |  |  | 60.0 |" in text  # two seeds have no interval
    assert "| sst2 | mm | 1 | 60.0 | 65.0 | 70.0 | 73.3 | 76.7 | 80.0 |  |  | 70.0 |" in text
    assert "| mean of all 2 | mm | 0 |  |  |" in text  # no seed has both tasks


def test_what_is_told_apart_is_bold_and_two_values_have_no_interval():
    values = [[1.0, -1.0, np.nan], [2.0, 0.0, 0.0], [3.0, 1.0, 0.0]]
    assert cells(np.array(values) + [1.0, 0.0, 0.0], sign="+") == ["**+3.0 ±2.5**", "+0.0 ±2.5", ""]
    assert cells(values, deviation=True) == ["2.0 ±1.0", "0.0 ±1.0", ""]
    assert cells(values[:2]) == ["1.5", "-0.5", ""]


def test_areas_by_training_size():
    large = {"ee": {"a": {k: record() for k in range(3)}}, "mm": {"a": {k: record((58 + k,) * 3) for k in range(3)}}}
    text = size_table({64: large, 32: {"ee": {"a": {0: record()}}, "mm": {"a": {}}}})
    assert "| ee | 70.0 ±0.0 | 70.0 |\n| mm | 59.0 ±2.5 |  |\n" in text
