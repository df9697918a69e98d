"""All exits on all rows: the folds, the sweep and what is saved; and evaluate.py as a command."""

import os
import re
import shutil

import numpy as np
import pytest
import torch

import evaluate
from minisweet.adaptive import exits_taken
from minisweet.base.files import InputError, read_json
from minisweet.texts import Texts
from minisweet.toy import LEVELS
from minisweet.calibration import fit_rule
from minisweet.sweep import crossfit, spaced_thresholds, sweep
from minisweet.run import Run
from minisweet.classifier import choose, predict
from minisweet.classifier import test as check
from tests.conftest import slow
from tests.test_operating import random_validation


@pytest.fixture
def copied(run_of, tmp_path):
    """A function that copies a finished run, which may be changed."""
    return lambda name: shutil.copytree(run_of(name), tmp_path / f"my {name}")


def test_folds_take_turns_and_each_is_decided_by_the_rule_of_the_others():
    validation = random_validation(5, (1, 2, 4), 103, 3)
    thresholds, turns = spaced_thresholds(7, 1 / 3), crossfit(validation)
    assert sorted(np.concatenate([rows for _, rows in turns])) == list(range(103))
    for rule, rows in turns:
        others = validation.take(np.setdiff1d(np.arange(103), rows))
        assert torch.equal(rule.temperatures, fit_rule(others).temperatures)
    assert len({tuple(rule.temperatures.tolist()) for rule, _ in turns}) == 5
    _, taken = sweep(turns, validation, thresholds)
    for rule, rows in turns:
        confidence = rule.confidences(validation.logits[:, rows])
        for i, threshold in enumerate(thresholds):
            assert taken[i, rows].tolist() == exits_taken(confidence, threshold, rule.lowest).tolist()
    assert [rows.tolist() for _, rows in crossfit(validation.take([7, 7, 7]))] == [[0, 1, 2]]  # a single text


@pytest.mark.parametrize("name", ["branch", "lte", "pairs", "trunk0", *slow("mm")])
def test_an_evaluation_is_whole_and_the_same_again_and_what_is_saved_is_read(copied, command, tmp_path, name):
    """Its logits are compared with what rows get alone in test_use.py."""
    folder = copied(name)
    before = read_json(folder / "evaluation.json")
    (folder / "evaluation.json").write_text("{broken")
    status, out, err = command(evaluate, folder)
    assert (status, err) == (0, "")
    run, after = Run.read(folder), read_json(folder / "evaluation.json")
    assert {key for key in before if before[key] != after[key]} <= {"seconds", "device"}
    outputs, rows = run.outputs, run.examples
    assert (outputs.certainty is None, outputs.precision) == (name != "lte", "torch.float32")
    assert (outputs.labels.tolist(), outputs.keys.tolist()) == (rows.labels, Texts(run.tokenizer, rows).keys.tolist())
    curve, _ = sweep(crossfit(outputs), outputs, after["thresholds"])
    assert curve.items() <= after.items()
    assert f"\n{1:9.3f}{after['scores'][-1]:8.1f}{after['speedup_ratios'][-1]:15.3f}" in out
    assert f"area under the curve {after['area']:.2f}; all exits" in out
    assert (f"to choose what to deploy: minisweet choose '{folder}'" in out) == (name != "lte")
    told = re.findall(f"^({'|'.join(LEVELS)}) +[0-9.]+$", out, re.MULTILINE)
    assert len(told) == (0 if name == "pairs" else 4)
    assert ("gives all rows one answer" in out) == (1 in after["exit_answers"])
    (tmp_path / "logits.safetensors").write_bytes(b"{")
    with pytest.raises(InputError, match="logits.safetensors: not readable.*make it anew: minisweet choose"):
        _ = Run(run.record, tmp_path).outputs


def test_files_of_another_run_are_refused(copied, run_of, command):
    run = copied("sweet")
    rows = run / "validation.jsonl"
    shutil.copy(run_of("ee") / "model.safetensors", run / "model.safetensors")
    for module, *words in [(predict, rows), (check, rows), (evaluate, "--plot", "a.png"), (evaluate,)]:
        status, out, err = command(module, run, *words)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert "is of other weights than the model beside it" in err or "is of another run than run.json" in err
    shutil.copy(run_of("sweet") / "model.safetensors", run / "model.safetensors")
    shutil.copy(run_of("ee") / "logits.safetensors", run / "logits.safetensors")
    for said in ("is of other weights than the model beside it; make it anew\n", ""):  # which it does
        status, _, err = command(choose, run)
        assert (status, err[-len(said) :] if said else err) == (0, said)
    (run / "model.safetensors").unlink()  # as in an archive of results
    assert command(evaluate, run, "--plot", "a.png")[0] == command(choose, run)[0] == 0


def test_without_a_run_it_takes_the_newest_and_passes_no_unfinished_training_over(copied, command, tmp_path):
    assert "no run here" in command(evaluate)[2]
    run = shutil.move(copied("trunk0"), tmp_path / "runs" / "newer")
    for name, time in (("older", 1e9), (".written", 1e10)):  # the other is being written
        path = shutil.copytree(run, tmp_path / "runs" / name) / "run.json"
        os.utime(path, (time, time))
    (tmp_path / "runs" / ".new.checkpoint").mkdir()
    status, _, err = command(evaluate)
    assert (status, err.count("\n"), "runs/new: its training is not finished" in err) == (2, 1, True)
    os.utime(tmp_path / "runs" / ".new.checkpoint", (0, 0))  # older than the run
    assert command(evaluate)[1].startswith(f"{run.relative_to(tmp_path)}: ")


def test_exit_0_has_its_say_in_the_curve_of_own_text(own_run, command, tmp_path):
    folder = shutil.copytree(own_run, tmp_path / "run")
    assert command(evaluate, folder)[0] == 0
    outputs, found = Run.read(folder).outputs.labelled(), read_json(folder / "evaluation.json")
    folds = crossfit(outputs, combine=True)
    assert any(rule.needs_exit_0 for rule, _ in folds)
    assert found["scores"] == sweep(folds, outputs, found["thresholds"])[0]["scores"]
