"""The grid: what is run, in which order, what is skipped, and what it becomes."""

import json
import math
import multiprocessing
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import evaluate
import train
from minisweet.base.commands import run_command
from minisweet.paper import reproduce
from tests.conftest import WORDS, be_quick, write_model

TINY = ["--train-sizes", "32", "--epochs", "1", "--exit-layers", "1,4", "--max-length", "32", "--tasks", "toy"]


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run the command in an empty folder: its exit status, output, errors, and the runs that it started.

    What it would start in processes of their own runs in this one, which is faster.
    """
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    model = write_model(tmp_path / "tiny", "bert")
    started, lines = [], []

    def in_process(script: str, arguments: list[str]) -> int:
        assert (reproduce.SCRIPTS / script).is_file()
        started.append((script, next(Path(a).name for a in arguments if "tiny-" in a)))
        lines.append(" ".join(arguments))
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        try:
            run_command({"train.py": train.main, "evaluate.py": evaluate.main}[script])
        except SystemExit as exit_:
            return exit_.code
        return 0

    def run(*arguments):
        be_quick(monkeypatch)
        monkeypatch.setattr(reproduce, "run_script", in_process)
        monkeypatch.setattr(sys, "argv", ["reproduce.py", "--model", str(model), *TINY, *map(str, arguments)])
        started.clear()
        status = 0
        try:
            run_command(reproduce.main)
        except SystemExit as exit_:
            status = exit_.code
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        captured = capsys.readouterr()
        return status, captured.out, captured.err, list(started)

    run.lines = lines
    return run


def fake_run(runs: Path, method: str, lr: float, seed: int, area: float, stuck: bool = False, **settings) -> Path:
    """Write the records of a run of the toy task, without its weights."""
    folder = runs / f"tiny-{method}-toy-lr{lr:g}-n32-seed{seed}"
    folder.mkdir(parents=True)
    arguments = {"task": "toy", "method": method, "lr": lr, "train_size": 32, "seed": seed, "epochs": 1}
    arguments |= {"max_length": 32, "batch_size": 16, "model": str(runs.parent.parent / "tiny")}
    arguments |= {"exit_strategy": "confidence"}
    record = {"arguments": arguments, "losses": [[2.0, 2.0], [1.0, 1.0]], "exit_layers": [1, 4], "device": "none"}
    record |= {"precision": "torch.float32", "depth": 4, "metric": "accuracy", "labels": ["negative", "positive"]}
    for key, value in settings.items():
        (record if key in record else arguments)[key] = value
    counts = [[0, 9], [9, 0]] if stuck else [[3, 6], [4, 5]]
    evaluation = {"exit_scores": [area, area], "class_counts": counts, "thresholds": np.linspace(0.5, 1, 11).tolist()}
    evaluation |= {"speedup_ratios": np.linspace(0.25, 1, 11).tolist(), "scores": [area] * 11, "area": area}
    evaluation |= {"calibration": "crossfit", "precision": "torch.float32", "exit_layers": record["exit_layers"]}
    evaluation |= {"task": "toy", "method": method, "exit_strategy": "confidence", "metric": "accuracy"}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


def test_a_grid_runs_once_and_goes_on_where_it_stopped(command, tmp_path):
    grid = ["--methods", "ee,mm", "--seeds", "0,1", "--lrs", "1e-3,1e-2"]
    status, out, _, started = command(*grid)
    assert status == 0
    assert len(started) == 2 * 2 * 3  # two methods, two scripts, two rates and then another seed
    assert "of 6 runs; 0 missing" in out
    out = tmp_path / "reproduced"
    assert {path.name for path in out.iterdir()} == {"runs", "results.md", "results.json", "curves.png"}
    results = json.loads((out / "results.json").read_text())
    runs = {path.name: json.loads((path / "evaluation.json").read_text()) for path in (out / "runs").iterdir()}
    for method in ("ee", "mm"):
        areas = {lr: runs[f"tiny-{method}-toy-lr{lr:g}-n32-seed0"]["area"] for lr in (1e-3, 1e-2)}
        best = max(areas, key=areas.get)
        assert results["learning_rates"][method]["toy"] == best
        scores = [runs[f"tiny-{method}-toy-lr{best:g}-n32-seed{seed}"]["exit_scores"] for seed in (0, 1)]
        assert results["individual"][method]["exit_layers"] == [1, 4]
        for k in (0, 1):
            assert results["individual"][method]["mean"][k] == pytest.approx((scores[0][k] + scores[1][k]) / 2)
        curve = results["interpolated"][method]["mean"]
        assert curve[0] == results["individual"][method]["mean"][0]  # all leave at the first exit
        assert method == "mm" or curve[-1] == results["individual"][method]["mean"][-1]  # all reach the last
    assert results["missing"] == []
    assert set(results["runs"]) == set(runs)

    assert command(*grid)[3] == []
    (out / "runs" / "tiny-ee-toy-lr0.001-n32-seed0" / "evaluation.json").unlink()
    assert command(*grid)[3] == [("evaluate.py", "tiny-ee-toy-lr0.001-n32-seed0")]


def test_commands_are_printed_the_search_first(command, tmp_path):
    grid = ["--methods", "sweet", "--seeds", "0,1,2", "--lrs", "1e-3,1e-2", "--print-commands"]
    status, out, _, started = command(*grid)
    assert (status, started, len(out.splitlines())) == (0, [], 2)
    assert not (tmp_path / "reproduced").exists()
    fake_run(tmp_path / "reproduced" / "runs", "sweet", 1e-3, 0, 60.0)
    (line,) = command(*grid)[1].splitlines()
    assert "--lr 0.01 " in line
    fake_run(tmp_path / "reproduced" / "runs", "sweet", 1e-2, 0, 59.0)
    lines = command(*grid)[1].splitlines()
    assert ["--lr 0.001 --seed 1 " in lines[0], "--lr 0.001 --seed 2 " in lines[1], len(lines)] == [True, True, 2]
    assert len(command("--methods", "ee,sweet", "--lrs", "1e-3", "--print-commands")[1].splitlines()) == 5


@pytest.mark.slow
def test_a_printed_command_makes_its_run(command, tmp_path):
    (line,) = command("--methods", "sweet", "--seeds", "3", "--lrs", "1e-3", "--print-commands")[1].splitlines()
    repository = Path(train.__file__).parent
    line = line.replace("python ", f"{sys.executable} {repository}/")
    assert subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True).returncode == 0
    status, out, _, _ = command("--methods", "sweet", "--seeds", "3", "--lrs", "1e-3", "--report-only")
    assert (status, "of 1 runs; 0 missing" in out) == (0, True)


def test_whatever_method_a_record_names_is_reported_and_not_made(command, tmp_path):
    runs, methods = tmp_path / "reproduced" / "runs", ["sweet-owner0.125", "ee-mixed", "mm-taught"]
    fake_run(runs, "sweet-owner0.125", 1e-3, 0, 60)
    for area, method in enumerate(methods[1:], start=61):  # as train.py writes them
        targets = {"ee-mixed": "labels", "mm-taught": "trunk"}[method]  # the trunk's need no labels: another digest
        folder = fake_run(runs, method, 1e-3, 0, area, trunk="runs/branch", model="runs/branch", targets=targets)
        record = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(record | {"train_digest": f"of {targets}", "dev_digest": "a"}))
        for name in ("run.json", "evaluation.json"):
            (folder / name).write_text((folder / name).read_text().replace(method, method[:2]))
    grid = ["--methods", ",".join(methods), "--seeds", "0", "--lrs", "1e-3"]
    for how in ([], ["--print-commands"]):
        status, out, err, _ = command(*grid, *how)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert "'sweet-owner0.125' is none of sweet, ee, mm, branch; others are only reported (--report-only)" in err
    assert command(*grid, "--report-only")[0] == 0
    individual = json.loads((tmp_path / "reproduced" / "results.json").read_text())["individual"]
    assert {name: individual[name]["mean"][0] for name in individual} == dict(zip(methods, (60, 61, 62), strict=True))
    (runs / "tiny-sweet-owner0.125-toy-lr0.001-n32-seed0").rename(runs / "tiny-sweet-owner1-toy-lr0.001-n32-seed0")
    status, _, err, _ = command("--methods", "sweet-owner1", "--seeds", "0", "--lrs", "1e-3", "--report-only")
    assert (status, "a run with method sweet-owner0.125, not sweet-owner1" in err) == (2, True)


def test_branches_are_a_method_whose_cost_is_lower_at_the_last_threshold(command, tmp_path):
    (line,) = command("--methods", "branch", "--seeds", "0", "--lrs", "1e-3", "--print-commands")[1].splitlines()
    assert "--method branch" in line
    folder = fake_run(tmp_path / "reproduced" / "runs", "branch", 1e-3, 0, 60.0)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    evaluation["speedup_ratios"] = [*np.linspace(0.25, 1.08, 10).tolist(), 1.0]
    evaluation["scores"] = [*np.linspace(60, 80, 10).tolist(), 80.5]
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    assert command("--methods", "branch", "--seeds", "0", "--lrs", "1e-3", "--report-only")[0] == 0
    curve = json.loads((tmp_path / "reproduced" / "results.json").read_text())["interpolated"]["branch"]
    assert curve["ratios"] == [0.25, 0.5, 0.75, 1]
    assert curve["mean"] == pytest.approx([60, 60 + 20 * 0.25 / 0.83, 60 + 20 * 0.5 / 0.83, 80.5], abs=1e-3)


def test_a_report_takes_the_rates_that_are_there(command, tmp_path):
    runs = tmp_path / "reproduced" / "runs"
    for lr, seed in ((1e-2, 0), (5e-5, 0), (1e-4, 1)):
        fake_run(runs, "ee", lr, seed, 60.0 + lr)
    (runs / "x-lr1.2.3-n32-seed0").mkdir()
    report = ["--methods", "ee,sweet", "--seeds", "0", "--report-only"]
    assert command(*report)[0] == 0
    results = json.loads((tmp_path / "reproduced" / "results.json").read_text())
    assert results["rates_searched"] == [5e-5, 1e-2]  # the third is of another seed
    assert results["learning_rates"]["ee"]["toy"] == 1e-2
    status, _, err, _ = command("--methods", "ee", "--seeds", "7", "--report-only")
    assert (status, "holds no run whose name ends with -n32-seed7" in err, err.count("\n")) == (2, True, 1)


def test_chosen_ratios_bring_single_models_too(command, tmp_path):
    for method in ("mm", "branch"):
        fake_run(tmp_path / "reproduced" / "runs", method, 1e-3, 0, 60.0)
    report = ["--methods", "mm,branch", "--seeds", "0", "--lrs", "1e-3", "--report-only"]
    assert command(*report, "--ratios", "1/4,2/3,1")[0] == 0
    text = (tmp_path / "reproduced" / "results.md").read_text()
    assert "| task | method | seeds | 0.25 | 0.667 | 1 |" in text
    assert "| toy | mm: one model of n layers | 1 | 60.0 |  | 60.0 |" in text
    assert "| mm: one model of n layers | 1 | +0.0 |  | +0.0 |" in text
    assert command(*report)[0] == 0
    assert "one model" not in (tmp_path / "reproduced" / "results.md").read_text()
    for ratio in ("0", "1/0", "-1/2", "half"):
        status, _, err, _ = command(*report, f"--ratios={ratio}")
        assert (status, "--ratios: " in err, "is not a positive number" in err) == (2, True, True)


def test_what_is_missing_is_named(command, tmp_path):
    runs = tmp_path / "reproduced" / "runs"
    fake_run(runs, "sweet", 1e-3, 0, 60.0)
    status, out, _, started = command("--methods", "ee,sweet", "--seeds", "0,1", "--lrs", "1e-3", "--report-only")
    assert (status, started) == (0, [])
    results = json.loads((tmp_path / "reproduced" / "results.json").read_text())
    assert len(results["missing"]) == 3
    text = (tmp_path / "reproduced" / "results.md").read_text()
    assert "Missing runs: 3" in text
    assert "- tiny-ee-toy-lr0.001-n32-seed1" in text
    assert "trained on: none, torch.float32" in text
    fake_run(runs, "ee", 1e-3, 0, 60.0)
    command("--methods", "ee", "--seeds", "0,1", "--lrs", "1e-3,1e-2", "--report-only")
    missing = json.loads((tmp_path / "reproduced" / "results.json").read_text())["missing"]
    waiting = "ee toy n32 seed1, once its learning rate is known"
    assert missing == ["tiny-ee-toy-lr0.01-n32-seed0", waiting]


def test_early_exits_that_fail_to_learn_are_counted_at_each_rate(command, tmp_path):
    runs = tmp_path / "reproduced" / "runs"
    fake_run(runs, "ee", 1e-3, 0, 60.0, stuck=True)
    fake_run(runs, "ee", 1e-2, 0, 60.0)
    fake_run(runs, "sweet", 1e-2, 0, 60.0)
    command("--methods", "ee,sweet", "--seeds", "0", "--lrs", "1e-3,1e-2", "--report-only")
    text = (tmp_path / "reproduced" / "results.md").read_text()
    assert "| ee | 1 of 1 | 0 of 1 |" in text  # the last exit, which fails too, is not counted
    assert "| sweet | 0 of 0 | 0 of 1 |" in text


def test_training_sizes_use_the_rate_of_the_first(command, tmp_path):
    runs = tmp_path / "reproduced" / "runs"
    fake_run(runs, "sweet", 1e-3, 0, 60.0)
    fake_run(runs, "sweet", 1e-2, 0, 70.0)
    grid = ["--methods", "sweet", "--seeds", "0", "--lrs", "1e-3,1e-2", "--train-sizes", "32,16"]
    status, _, _, started = command(*grid)
    assert status == 0
    assert {name for _, name in started} == {"tiny-sweet-toy-lr0.01-n16-seed0"}
    results = json.loads((tmp_path / "reproduced" / "results.json").read_text())
    assert results["individual"]["sweet"]["mean"] == [70, 70]
    assert list(results["by_train_size"]) == ["16"]
    assert len(results["by_train_size"]["16"]["individual"]["sweet"]["mean"]) == 2
    assert (tmp_path / "reproduced" / "sizes.png").exists()


def test_runs_that_did_not_converge_are_marked_and_repeated_only_if_told(command, tmp_path):
    runs = tmp_path / "reproduced" / "runs"
    fake_run(runs, "ee", 1e-3, 0, 50.0, stuck=True)
    grid = ["--methods", "ee", "--seeds", "0", "--lrs", "1e-3"]
    assert command(*grid)[3] == []
    results = json.loads((tmp_path / "reproduced" / "results.json").read_text())
    assert results["did_not_converge"] == ["tiny-ee-toy-lr0.001-n32-seed0"]
    assert results["one_class"] == {"tiny-ee-toy-lr0.001-n32-seed0": [1, 4]}
    assert "| toy | ee† | 1 | 50.0° | 50.0° |" in (tmp_path / "reproduced" / "results.md").read_text()

    fake_run(runs, "ee", 1e-3, 1000, 51.0, stuck=True)
    command(*grid, "--retry-diverged", "--report-only")
    results = json.loads((tmp_path / "reproduced" / "results.json").read_text())
    assert results["missing"] == ["tiny-ee-toy-lr0.001-n32-seed2000"]
    assert results["individual"]["ee"]["mean"] == [51, 51]  # marked, until its repetition is there
    assert results["individual"]["ee"]["did_not_converge"] == 1
    fake_run(runs, "ee", 1e-3, 2000, 66.0)
    assert command(*grid, "--retry-diverged")[3] == []
    results = json.loads((tmp_path / "reproduced" / "results.json").read_text())
    assert results["individual"]["ee"]["mean"] == [66, 66]
    name = "tiny-ee-toy-lr0.001-n32-seed"
    assert results["repeated"] == {f"{name}0": [f"{name}1000", f"{name}2000"]}
    assert "repeated with other seeds: 1" in (tmp_path / "reproduced" / "results.md").read_text()
    for seed in (2000, 3000):
        shutil.rmtree(runs / f"{name}{seed}", ignore_errors=True)
        fake_run(runs, "ee", 1e-3, seed, 50.0, stuck=True)
    assert command(*grid, "--retry-diverged")[3] == []  # three repetitions, no more


def test_a_rate_whose_loss_is_no_number_is_out_of_the_search(command, tmp_path):
    status, out, err, started = command("--methods", "ee", "--seeds", "0,1", "--lrs", "1e-3,1e30")
    assert ("train.py", "tiny-ee-toy-lr1e+30-n32-seed0") in started
    assert "--lr: at 1e+30 the loss is" in err
    assert (status, "of 2 runs; 0 missing" in out) == (0, True)
    results = json.loads((tmp_path / "reproduced" / "results.json").read_text())
    assert results["learning_rates"] == {"ee": {"toy": 1e-3}}
    assert "tiny-ee-toy-lr1e+30-n32-seed0" in results["did_not_converge"]
    folder = tmp_path / "reproduced" / "runs" / "tiny-ee-toy-lr1e+30-n32-seed0"
    assert [path.name for path in folder.iterdir()] == ["diverged.json"]
    assert command("--methods", "ee", "--seeds", "0,1", "--lrs", "1e-3,1e30")[3] == []
    status, _, err, _ = command("--methods", "ee", "--lrs", "1e-3,1e30", "--max-length", 16)
    assert (status, "a run with max_length 32, not 16" in err) == (2, True)
    command("--methods", "ee", "--seeds", "0", "--lrs", "1e29,1e30")
    results = json.loads((tmp_path / "reproduced" / "results.json").read_text())
    assert results["missing"][0] == "ee toy n32 seed0: no learning rate converged"
    assert results["individual"]["ee"]["did_not_converge"] == 1


def test_learning_to_exit_and_the_training_options_reach_the_runs(command, tmp_path):
    grid = ["--methods", "sweet", "--seeds", "0", "--lrs", "1e-3", "--exit-strategy", "lte", "--amp", "bf16"]
    status, _, _, started = command(*grid, "--batch-size", 8, "--tasks", "toy")
    assert (status, started[0][1]) == (0, "tiny-sweet-toy-lr0.001-n32-seed0-lte")
    for line in command.lines:
        assert "--amp bf16" in line
    assert "--exit-strategy lte" in command.lines[0]
    assert "--batch-size 8" in command.lines[0]
    assert "--exit-layers 1,4" in command.lines[0]
    record = json.loads((tmp_path / "reproduced" / "runs" / started[0][1] / "run.json").read_text())
    assert record["arguments"]["exit_strategy"] == "lte"
    assert len(record["losses"]) == 4
    status, _, err, _ = command("--methods", "sweet", "--seeds", "0", "--lrs", "1e-3")
    assert (status, "holds results of exit_strategy lte; name another folder" in err) == (2, True)


def test_figures_are_those_of_the_tables(command, tmp_path):
    out = tmp_path / "reproduced"
    for seed in (0, 1):
        fake_run(out / "runs", "ee", 1e-3, seed, 60.0)
    grid = ["--methods", "ee", "--seeds", "0,1", "--lrs", "1e-3", "--report-only"]
    assert command(*grid, "--tasks", "toy,rte")[0] == 0
    assert {path.name for path in out.glob("*.png")} == {"curves.png", "tasks.png"}
    assert command(*grid, "--train-sizes", "32,16")[0] == 0
    assert {path.name for path in out.glob("*.png")} == {"curves.png", "sizes.png"}


def test_a_run_that_fails_is_named_and_the_others_go_on(command, tmp_path, monkeypatch):
    grid = ["--methods", "ee,sweet", "--seeds", "0", "--lrs", "1e-3", "--data-dir", "nowhere"]
    folder = fake_run(tmp_path / "reproduced" / "runs", "ee", 1e-3, 0, 60.0)
    (folder / "evaluation.json").unlink()  # and it has no weights
    status, out, err, started = command(*grid)
    assert status == 2
    assert ("train.py", "tiny-sweet-toy-lr0.001-n32-seed0") in started
    assert err.splitlines()[-1].endswith("1 runs failed, see their messages above: tiny-ee-toy-lr0.001-n32-seed0")
    assert "of 1 runs; 1 missing" in out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 3}, "a run with epochs 3, not 1; name another --out or --runs"),
        ({"batch_size": 8}, "a run with batch_size 8, not 16; name another --out or --runs"),
        ({"exit_layers": [1, 2]}, "a run with exit_layers [1, 2], not [1, 4]; name another --out or --runs"),
        ({"losses": [1.0, 2.0]}, "losses is [1.0, 2.0], and must be lists"),
        ({"losses": [[1.0], [2.0, 3.0]]}, "losses is [[1.0], [2.0, 3.0]], and must be lists"),
    ],
)
def test_a_run_of_other_settings_or_a_broken_one_is_refused(command, tmp_path, settings, message):
    fake_run(tmp_path / "reproduced" / "runs", "ee", 1e-3, 0, 60.0, **settings)
    status, _, err, _ = command("--methods", "ee", "--seeds", "0", "--lrs", "1e-3")
    assert (status, len(err.splitlines())) == (2, 1)
    assert message in err


@pytest.mark.parametrize(
    "change", [{"scores": [math.nan] * 11}, {"scores": [-5.0] * 11}, {"area": 1e9}, {"speedup_ratios": [9.0] * 11}]
)
def test_numbers_that_evaluate_cannot_have_written_do_not_reach_the_tables(command, tmp_path, change):
    folder = fake_run(tmp_path / "reproduced" / "runs", "ee", 1e-3, 0, 60.0)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    (folder / "evaluation.json").write_text(json.dumps(evaluation | change))
    status, out, err, _ = command("--methods", "ee", "--seeds", "0", "--lrs", "1e-3", "--report-only")
    assert (status, out, err.count("\n"), folder.name in err) == (2, "", 1, True)
    assert not (tmp_path / "reproduced" / "results.md").exists()


def test_runs_of_another_precision_or_other_data_are_refused(command, tmp_path):
    runs = tmp_path / "reproduced" / "runs"
    ee = fake_run(runs, "ee", 1e-3, 0, 60.0, precision="torch.bfloat16")
    grid = ["--methods", "ee,sweet", "--seeds", "0", "--lrs", "1e-3"]
    for how in ([], ["--report-only", "--amp", "off"]):
        status, _, err, started = command(*grid, *how)
        assert (status, started, err.count("\n")) == (2, [], 1)
        assert "a run with precision torch.bfloat16, not torch.float32; name another" in err
    sweet = fake_run(runs, "sweet", 1e-3, 0, 60.0, precision="torch.bfloat16")
    assert command(*grid, "--report-only")[0] == 0  # auto: whatever they were made in
    out = command("--methods", "ee", *grid[2:], "--amp", "bf16", "--print-commands")[1]
    assert out.startswith("python evaluate.py")  # since it was evaluated in another
    for key, digest, expected in (("train_digest", "a", 0), ("train_digest", "b", 2), ("dev_digest", "b", 2)):
        for folder, value in ((ee, "a"), (sweet, digest)):
            record = json.loads((folder / "run.json").read_text()) | {"train_digest": "a", key: value}
            (folder / "run.json").write_text(json.dumps(record))
        status, _, err, _ = command(*grid, "--report-only")
        assert status == expected
    assert f"{sweet}: a run on other dev rows than {ee}; name".replace(f"{tmp_path}/", "") in err


def test_runs_of_another_data_folder_are_not_taken_over(command, tmp_path):
    for name in ("first", "second"):
        (tmp_path / name / "SST-2").mkdir(parents=True)
        for split in ("train", "dev"):
            lines = [f"a {word} film\t{k % 2}" for k, word in enumerate([*WORDS, name])]
            (tmp_path / name / "SST-2" / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *lines]))
    grid = ["--methods", "ee", "--seeds", "0", "--lrs", "1e-3", "--tasks", "sst2"]
    assert command(*grid, "--data-dir", "first")[0] == 0
    assert command(*grid, "--data-dir", "first")[0] == 0
    status, _, err, started = command(*grid, "--data-dir", "second")
    assert (status, started, err.count("\n")) == (2, [], 1)
    assert "a run on other train rows than second; name another --out or --runs" in err
    shutil.copy(tmp_path / "first" / "SST-2" / "train.tsv", tmp_path / "second" / "SST-2" / "train.tsv")
    assert "a run on other dev rows than second" in command(*grid, "--data-dir", "second")[2]
    assert command(*grid, "--data-dir", "second", "--report-only")[0] == 0


def test_what_a_report_did_not_write_stays(command, tmp_path):
    out = tmp_path / "reproduced"
    fake_run(out / "runs", "ee", 1e-3, 0, 60.0)
    grid = ["--methods", "ee", "--seeds", "0", "--lrs", "1e-3", "--report-only"]
    for name in ("results.md", "curves.png", "sizes.png"):
        (out / name).write_text("mine")
        status, _, err, _ = command(*grid)
        assert (status, err.count("\n")) == (2, 1)
        assert f"reproduced/{name} is not of this command" in err
        assert {path.name for path in out.iterdir()} == {"runs", name}
        assert (out / name).read_text() == "mine"
        (out / name).unlink()
    (out / "results.md").mkdir()
    assert command(*grid)[0] == 2
    assert (out / "results.md").is_dir()
    (out / "results.md").rmdir()
    (out / "results.json").write_text('{"mine": 1}')
    assert command(*grid)[0] == 2
    (out / "results.json").unlink()
    assert command(*grid)[0] == command(*grid)[0] == 0
    (out / "tasks.png").write_text("mine")  # a report of one task has none
    assert command(*grid)[0] == 2


# Stand-ins that copy a run, so that processes have something quick to make.
TRAIN = """
import json, pathlib, sys, time
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open("made", "a") as made:
    print(options["--out"], file=made)
time.sleep(0.1)
while HELD and not pathlib.Path("go").exists():
    time.sleep(0.02)
record = json.loads(pathlib.Path("example/run.json").read_text())
record["arguments"] |= {"lr": float(options["--lr"]), "seed": int(options["--seed"])}
out = pathlib.Path(options["--out"])
out.mkdir()
(out / "run.json").write_text(json.dumps(record))
"""
EVALUATE = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
evaluation = json.loads(pathlib.Path("example/evaluation.json").read_text())
evaluation["area"] = 50.0 + len(out.name) + int(out.name[-1])
(out / "evaluation.json").write_text(json.dumps(evaluation))
"""


def start(out: str) -> multiprocessing.Process:
    """A process that makes a grid of five runs in `out`. In "killed" they wait for a file, go."""

    def main() -> None:
        reproduce.SCRIPTS = Path(out + "-scripts").resolve()
        options = ["--methods", "ee", "--seeds", "0,1,2", "--lrs", "1e-3,2e-3,1e-2", "--out", out]
        sys.argv = ["reproduce.py", "--model", str(Path("tiny").resolve()), *TINY, *options]
        run_command(reproduce.main)

    Path(out + "-scripts").mkdir(exist_ok=True)
    Path(out + "-scripts", "train.py").write_text(TRAIN.replace("HELD", str(out == "killed")))
    Path(out + "-scripts", "evaluate.py").write_text(EVALUATE)
    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    return process


@pytest.mark.slow
def test_several_processes_make_each_run_once(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "tiny", "bert")
    fake_run(tmp_path / "a" / "b", "ee", 1e-3, 0, 60.0).rename("example")
    made = Path("made")
    for out, count in (("alone", 1), ("together", 3), ("killed", 8)):
        processes = [start(out) for _ in range(count)]
        if out == "killed":
            while not made.exists() or len(made.read_text().splitlines()) < 3:
                time.sleep(0.02)
            claims = "".join(claim.read_text() for claim in Path("killed/runs").glob(".*.maker"))
            for killed in [process for process in processes if f" {process.pid} " in claims][:2]:
                killed.kill()
                killed.join()  # its training goes on, and keeps the claim
                processes.remove(killed)
            time.sleep(1.5)  # nobody takes over what the two have left at work
            assert (len(processes), len(made.read_text().splitlines())) == (6, 3)
            Path("go").touch()
        for process in processes:
            process.join()
        assert {process.exitcode for process in processes} == {0}
        runs = [Path(line).name for line in made.read_text().splitlines()]
        assert len(runs) == len(set(runs)) == 5
        assert sorted(path.name for path in Path(out, "runs").iterdir()) == sorted(set(runs))  # no claim is left
        for name in ("results.md", "results.json", "curves.png"):
            assert Path(out, name).read_bytes() == Path("alone", name).read_bytes()
        made.unlink()


@pytest.mark.parametrize(
    "change",
    [{"calibration": "none"}, {"thresholds": [0.5, 1.0], "speedup_ratios": [0.25, 1.0], "scores": [60.0, 60.0]}],
)
def test_a_run_that_was_evaluated_otherwise_is_evaluated_again(command, tmp_path, change):
    folder = fake_run(tmp_path / "reproduced" / "runs", "ee", 1e-3, 0, 60.0)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    (folder / "evaluation.json").write_text(json.dumps(evaluation | change))
    (line,) = command("--methods", "ee", "--seeds", "0", "--lrs", "1e-3", "--print-commands")[1].splitlines()
    assert line.startswith("python evaluate.py")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "sst3"], "'sst3' is none of rte, mrpc"),
        (["--seeds", "0,0"], "'0,0' names a value twice"),
        (["--lrs", "1e-3,x"], "'x' is not a positive number"),
        (["--methods", "bert"], "'bert' is none of"),
        (["--exit-layers", "1,9"], "--exit-layers"),
        (["--print-commands", "--report-only"], "not allowed with argument"),
        (["--seeds", "0,1000", "--retry-diverged"], "must not differ by a multiple of 1000"),
    ],
)
def test_bad_input_is_one_line(command, arguments, message):
    status, out, err, _ = command(*arguments)
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
