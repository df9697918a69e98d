"""The grid: what is run, in which order, what is skipped, and what it becomes: a CSV, tables and a figure."""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from minisweet.paper import reproduce
from minisweet.paper.report import Fraction, Run, counted, read_runs, run_of, tables
from tests.conftest import CONFIGS, write_model

TINY = ["--train-size", "32", "--epochs", "1", "--max-length", "32", "--tasks", "toy", "--exit-layers", "1,4"]
OUT = Path("reproduced")


@pytest.fixture
def grid(command, monkeypatch, tmp_path):
    """Run reproduce in an empty folder: its status, output, errors, and the scripts that it started."""
    write_model(tmp_path / "tiny", "bert")
    call, started = subprocess.run, []

    def noted(command: list[str]) -> subprocess.CompletedProcess:
        started.append(Path(command[1]).name)
        return call(command)

    monkeypatch.setattr(reproduce.subprocess, "run", noted)

    def reproduced(*arguments) -> tuple[int, str, str, list[str]]:
        started.clear()
        return *command(reproduce, "--model", "tiny", *TINY, *arguments), list(started)

    return reproduced


def options_of(command: list[str]) -> dict:
    """The options of a command of train.py; those of evaluate.py are not its method, rate and seed."""
    typed = dict(word.split("=", 1) for word in command[2:] if "=" in word)
    read = {"--method": str, "--lr": float, "--seed": int, "--out": Path}
    return {name[2:]: kind(typed[name]) for name, kind in read.items() if name in typed}


def fake_run(folder: Path, options: dict, area: float) -> None:
    """Write the files of a run of the toy task that reports read. Exits have `area` as their score."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {name: options[name] for name in ("method", "lr", "seed")}
    record |= {"model": "tiny", "exit_strategy": "confidence", "train_size": 32, "task": "toy", "amp": "off", "id": "1"}
    record |= {"epochs": 1, "max_length": 32, "batch_size": 16, "exit_layers": [1, 4], "precision": "torch.float32"}
    record |= dict.fromkeys(("labels", "text_columns", "header", "subset", "losses"), [])
    record |= dict.fromkeys(("data_dir", "train_rows", "dev_rows", "weights", "device"), "")
    record |= {"seconds": 9.5, "metric": "accuracy", "versions": {}}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "config.json").write_text(json.dumps(CONFIGS["bert"] | {"pooling": "cls"}))
    curve = {"speedup_ratios": [0.25, 0.5, 1.0], "scores": [area - 8, area - 4, area], "area": area, "majority": 50.0}
    exits = {"exit_layers": [1, 4], "exit_scores": [area] * 2, "exit_answers": [1, 2], "thresholds": [0.5] * 11}
    (folder / "evaluation.json").write_text(json.dumps(curve | exits | {"id": "1"}))


@pytest.mark.slow
def test_what_is_printed_runs_in_parallel_and_what_is_there_is_not_made_again(grid, monkeypatch):
    """Two jobs at a time, of the clone's scripts; the call after them only reports."""
    monkeypatch.setattr(reproduce, "FURTHER", 0)  # 32 rows teach nothing
    words = ["--methods", "ee,sweet", "--seeds", "0", "--lrs", "1e-3", "--exit-strategy", "lte", "--amp", "off"]
    Path("grid.txt").write_text(grid(*words, "--print")[1])
    assert os.system("xargs -a grid.txt -P 2 -d '\\n' -n 1 bash -c") == 0
    status, out, err, started = grid(*words)
    assert (status, started, "of 2 runs" in out) == (0, [], True), err
    (folder,) = (OUT / "runs").glob("*sweet*")
    assert folder.name.startswith("tiny-sweet-toy-lr0.001-seed0-")  # and then the other options
    record, found = (json.loads((folder / name).read_text()) for name in ("run.json", "evaluation.json"))
    wanted = {"exit_strategy": "lte", "exit_layers": [1, 4], "amp": "off", "lr": 1e-3, "seed": 0, "train_size": 32}
    assert record | wanted == record
    runs = read_runs(OUT / "results.csv")
    assert [run[:7] for run in runs] == [("tiny", "toy", name, "lte", 32, 1e-3, 0) for name in ("ee", "sweet")]
    assert runs[1].exits[4] == (pytest.approx(found["exit_scores"][1], abs=1e-4), found["exit_answers"][1])
    assert runs[1].area == pytest.approx(found["area"], abs=1e-4)
    assert {path.name for path in OUT.iterdir()} == {"runs", "results.csv", "results.md", "curves.png"}
    (folder / "evaluation.json").write_text(json.dumps(found | {"id": "of other weights"}))
    assert grid(*words)[3] == ["evaluate.py"]
    assert grid(*words, "--max-length", 16)[3] == ["train.py", "evaluate.py"] * 2  # other options are other runs


def test_the_search_comes_first_and_runs_that_do_not_converge_are_repeated(grid, monkeypatch):
    """On two rates. An area of 50 is that of the majority class."""
    areas = {"ee": {1e-3: 60, 1e-2: 70}, "sweet": {1e-3: 50, 1e-2: 55}, "mm": {1e-3: 51, 1e-2: 52}}
    words = ["--methods", "ee,sweet,mm", "--lrs", "1e-3,1e-2", "--seeds", "0,1,2"]
    made = []

    def pretend(command: list[str]) -> SimpleNamespace:
        if "train.py" in command[1]:
            options = options_of(command)
            made.append((options["method"], options["lr"], options["seed"]))
            fails = options["seed"] in {"ee": (1, 3), "mm": (2, 3, 4, 5)}.get(options["method"], ())
            fake_run(options["out"], options, 50 if fails else areas[options["method"]][options["lr"]])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(reproduce.subprocess, "run", pretend)
    printed = grid(*words, "--print")[1].splitlines()
    assert [line.count("train.py") + line.count(" && ") + line.count("evaluate.py") for line in printed] == [3] * 6
    assert (made, OUT.exists()) == ([], False)  # nothing is run
    assert grid(*words)[0] == 0
    seeds = {"ee": (1, 2, 3, 4), "sweet": (1, 2), "mm": (1, 2, 3, 4, 5)}  # further ones one at a time; in vain
    rates = [(1e-3, 0), (1e-2, 0)]  # the search comes first
    expected = [rates + [(1e-2, seed) for seed in of_method] for of_method in seeds.values()]
    assert made == [(name, *of_run) for name, runs in zip(seeds, expected, strict=True) for of_run in runs]
    before = [*made]
    assert (grid(*words)[0], made) == (0, before)  # nothing is made again
    assert grid(*words, "--print")[1] == ""
    evaluation = next(OUT.glob("runs/*seed0*/evaluation.json"))
    evaluation.write_text(evaluation.read_text().replace("0.5, ", ""))  # at one threshold, by hand
    out = grid(*words, "--print")[1]
    assert (out.count("\n"), "evaluate.py" in out, "train.py" in out) == (1, True, False)
    text = (OUT / "results.md").read_text()
    assert "| toy | 1e-2: 70.0 ±0.0 | 1e-2: 55.0 ±0.0 | 1e-2: 51.3 ±2.9 |" in text
    assert "toy ee 0.01 seed 1" in text
    assert "toy sweet 0.001 seed 0" in text


def test_a_run_that_fails_is_named_and_the_others_go_on(grid, monkeypatch):
    """At one rate of the search the others choose. A second call tries it once more, and misses nothing either."""

    def pretend(command: list[str]) -> SimpleNamespace:
        options, fails = options_of(command), "--method=ee" in command or "--lr=2.0" in command
        if "train.py" in command[1] and not fails:
            fake_run(options["out"], options, 60.0)
        return SimpleNamespace(returncode=int(fails))

    monkeypatch.setattr(reproduce.subprocess, "run", pretend)
    for _ in range(2):
        status, out, err, _ = grid("--methods", "sweet", "--seeds", "0,1", "--lrs", "1e-3,2")
        assert (status, "of 2 runs" in out) == (0, True), err
        assert "Failed runs: tiny-sweet-toy-lr2-seed0-" in (OUT / "results.md").read_text()
    status, out, err, _ = grid("--methods", "ee,sweet", "--seeds", "0", "--lrs", "1e-3")
    assert (status, "of 1 runs" in out) == (0, True)
    status, _, err, _ = grid("--methods", "ee", "--seeds", "0", "--lrs", "1e-3")  # none has a score
    assert (status, "all runs failed, see their messages above" in err) == (2, True)
    monkeypatch.setattr(reproduce, "CLONE", OUT)
    assert "not a clone of the repository" in grid()[2]


def test_a_curve_is_interpolated_at_the_shares_that_it_reaches(tmp_path):
    fake_run(tmp_path / "run", {"method": "ee", "lr": 1e-3, "seed": 0}, 70.0)
    run = run_of(tmp_path / "run")
    assert (min(run.shares), max(run.shares)) == (Fraction(1, 4), 1)
    assert [run.shares[Fraction(n, 12)] for n in (3, 6, 9, 12)] == pytest.approx([62, 66, 68, 70])
    assert (run.constant, run.converged, run.exits) == (50.0, True, {1: (70.0, 1), 4: (70.0, 2)})


def test_tables_pair_seeds_and_mark_exits_of_one_answer(tmp_path):
    fake_run(tmp_path / "run", {"method": "ee", "lr": 5e-5, "seed": 0}, 60.0)

    def made(task: str, method: str, seed: int, *exits: tuple[float, int], at_1: dict | None = None) -> Run:
        """A run with exits after layers 1 and 4, and perhaps a score at all layers."""
        key, scores = {"task": task, "method": method, "seed": seed}, dict(zip((1, 4), exits, strict=True))
        return run_of(tmp_path / "run")._replace(exits=scores, shares=at_1 or {}, **key)

    runs = {("sst2", "ee"): {n: made("sst2", "ee", n, (50.0, 1), (80.0, 2)) for n in range(3)}}
    runs["sst2", "sweet"] = {n: made("sst2", "sweet", n, (70.0 + n, 2), (79.0, 2)) for n in range(3)}
    runs["rte", "ee"] = {n: made("rte", "ee", n, (50.0, 1), (68 - 8 * n, 2), at_1={Fraction(1): 60.0}) for n in (0, 1)}
    runs["rte", "sweet"] = {1: made("rte", "sweet", 1, (50.0, 1), (60.0, 2), at_1={Fraction(1): 50.0})}
    text = tables(runs, ["sst2", "rte"], ["ee", "sweet"])
    for line in (
        "| SST-2 | 5e-5: 60.0 ±0.0 | 5e-5: 60.0 ±0.0 |",
        "| mean of 2, EE | 50.0 ±0.0 (1) [3] | 80.0 ±0.0 (1) |",
        "| **mean** | +21.0 ±2.5* (1) | -1.0 ±0.0* (1) |",  # RTE has one seed
        "| SST-2 | +21.0 ±2.5* | -1.0 ±0.0* |",
        "| RTE | +0.0 | +0.0 |",
    ):
        assert line in text, text
    assert "|  | 1/12 | 1/4 | 1/2 | 3/4 | 1 |" in text
    failed, spare = made("rte", "ee", 2, (50.0, 1), (50.0, 1)), made("rte", "ee", 3, (50.0, 1), (60.0, 2))
    assert counted([failed, spare], range(3)) == {2: spare}  # not of seed 0, which was not run
