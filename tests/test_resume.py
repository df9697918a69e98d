"""A training that was stopped and resumed is, byte for byte, the one that was never stopped."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import train
from minisweet import resume
from minisweet.classifier import fit
from tests.conftest import CHECKOUT, OWN, opinions, rewrite, slow, write_model, write_rows

STEPS = 6  # of each stage: two epochs of 20 examples in batches of 8
STOPPED = Path(".a.checkpoint/checkpoint.pt")
NEW = "--model tiny --train-size 20 --epochs 2 --batch-size 8 --exit-layers 1,4 --max-length 32".split()
METHODS = ["--method sweet", "--method branch --exit-layers 0,2,4"]
METHODS += slow("--method mm --exit-strategy lte", "--method branch --exit-strategy lte --amp bf16")


def result(run: str | Path) -> tuple[bytes, dict]:
    """What must be the same of two runs: the weights' bytes, and what was told but for times."""
    record = json.loads(Path(run, "run.json").read_text())
    return Path(run, "model.safetensors").read_bytes(), record | dict.fromkeys(("seconds", "stages"))


@pytest.fixture
def command(command, monkeypatch, tmp_path):
    """Run train.py on a tiny model, stopped after so many steps: status, output and errors.

    There is a checkpoint of each step, or of each stage where `minutes` is 10.
    """
    write_model(tmp_path / "tiny", "bert")
    keep = resume.SavedTraining.keep

    def run_and_read(*arguments, stop=None, minutes=0, words=NEW, module=train) -> tuple[int, str, str]:
        taken = []

        def keep_and_stop(*of_step) -> None:
            keep(*of_step)
            taken.append(1)
            if len(taken) == stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(resume, "MINUTES", minutes)
        monkeypatch.setattr(resume.SavedTraining, "keep", keep_and_stop)
        answer = command(module, *words, *arguments)
        run_and_read.steps = len(taken)
        return answer

    return run_and_read


@pytest.mark.parametrize("options", METHODS)
@given(stops=st.lists(st.tuples(st.integers(1, 8), st.sampled_from([0, 10])), min_size=1))
@example(stops=[(1, 0), (2, 0)])
@example(stops=[(STEPS, 10)])  # a stage is over, and no run is written
@settings(max_examples=2, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_stopped_training_goes_on_as_if_it_never_had_been(command, options, stops):
    """Stopped again and again, each time so many steps after it went on, until it is finished."""
    options = options.split()
    if not Path("whole").exists():
        assert command("--out", "whole", *options)[0] == 0
    for step, minutes in stops:
        status, _, err = command("--out", "a", *options, "--resume", stop=step, minutes=minutes)
        if status == 0:
            break
        assert (status, command.steps, STOPPED.exists() or minutes > 0) == (130, step, True)
        assert not Path("a").exists()
    is_there = STOPPED.exists() or Path("a").exists()
    status, out, err = command("--out", "a", *options, "--resume")
    assert (status, "--resume: goes on after " in err or "finished already" in out) == (0, is_there)
    assert result("a") == result("whole")
    assert not list(Path().glob(".*"))
    shutil.rmtree("a")


def test_fit_goes_on_too_and_takes_another_goal(command, own_run):
    """Stopped in the training, while the model answers the unlabelled texts, and while it learns its answers."""
    folder, answers = own_run.parent, "minisweet.recipe.ask_all"
    words = [folder / "own.csv", "--unlabelled", folder / "more.csv", *OWN[2:], "--out", "a"]
    words += ["--model", folder / "tiny"]
    assert command(stop=3, words=words, module=fit)[0] == 130
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, Mock(side_effect=KeyboardInterrupt))
        assert command("--resume", words=words, module=fit)[0] == 130
    other = write_rows(Path("other.csv"), [[text] for text, _ in opinions(1000)[400:900]], "text")
    _, _, err = command("--resume", "--unlabelled", other, words=words, module=fit)
    assert "--resume: a is another training's: its rows are others" in err
    assert command("--resume", stop=9, words=words, module=fit)[0] == 130
    status, _, err = command("--resume", "--max-lost", 5, words=words, module=fit)
    assert (status, command.steps, "0 steps of first answers, 9 steps of trunk again" in err) == (0, 80 - 9, True)
    assert Path("a/model.safetensors").read_bytes() == (own_run / "model.safetensors").read_bytes()


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "stopped"])
def test_other_arguments_and_rows_are_refused_with_both_values_and_files_may_move(command, finished):
    def write(*replaced: tuple[int, str, str]) -> None:
        rows = opinions(60)
        for place, *row in replaced:
            rows[place] = row
        write_rows(Path("a.csv"), rows[:30], "text", "label")
        write_rows(Path("b.csv"), rows[30:], "text", "label")

    def written() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in (*Path().glob("a/*"), *Path().glob(".a.checkpoint/*"))}

    write()
    words = "--model tiny --epochs 2 --batch-size 8 --exit-layers 1,4 --max-length 32 --dev-data b.csv --out a".split()
    of_fit = {"words": [*words, "--method", "sweet"], "module": fit}
    assert command("a.csv", stop=None if finished else 3, **of_fit)[0] == (0 if finished else 130)
    before = written()
    for more, replaced, reason in (
        (["--lr", "0.25"], [], "lr is 0.25 and was 0.0001"),
        (["--exit-layers", "2,4"], [], "exit_layers is [2, 4] and was [1, 4]"),
        ([], [(0, "a film", "up")], "its rows are others"),
        ([], [(59, "a film", "up")], "its rows are others"),
        ([], [(0, "a film", "below")], "labels is ['below', 'down', 'up'] and was ['down', 'up']"),
    ):
        write(*replaced)
        status, _, err = command("a.csv", "--resume", *more, **of_fit)
        assert (status, command.steps, written()) == (2, 0, before), err
        assert f"--resume: a is another training's: {reason}" in err
    write()
    weights = Path("tiny/model.safetensors").read_bytes()
    rewrite(Path("tiny"), lambda tensors: {name: 2 * tensor for name, tensor in tensors.items()})
    assert (
        "--resume: a is another training's: it starts from other weights" in command("a.csv", "--resume", **of_fit)[2]
    )
    Path("tiny/model.safetensors").write_bytes(weights)
    assert (command.steps, written()) == (0, before)
    Path("a.csv").rename("other.csv")
    status, out, err = command("other.csv", "--resume", **of_fit)
    assert (status, "a: finished already" in out, command.steps) == (0, finished, 0 if finished else 8 - 3), err


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"half"])
def test_a_broken_checkpoint_is_one_line_and_stays(command, content):
    assert command("--out", "a", stop=3)[0] == 130
    whole = STOPPED.read_bytes()
    STOPPED.write_bytes(whole[: len(whole) // 2] if content == b"half" else content)
    broken = STOPPED.read_bytes()
    status, _, err = command("--out", "a", "--resume")
    assert (status, command.steps, STOPPED.read_bytes(), "Traceback" in err) == (2, 0, broken, False)
    assert f"error: --resume: {STOPPED.absolute()} is not readable (" in err.splitlines()[-1]
    assert (command("--out", "a", "--overwrite")[0], command.steps) == (0, STEPS)


def test_a_training_claims_its_folder(command):
    """A second training is refused while the first one runs, and after that one was stopped or killed."""
    assert command("--out", "a", stop=3)[0] == 130
    before = STOPPED.read_bytes()
    status, _, err = command("--out", "a")
    assert (status, err.count("\n"), command.steps, STOPPED.read_bytes() == before) == (2, 1, 0, True)
    assert "--out: another training runs, or was stopped, with " in err
    assert command("--out", "a", "--seed", "1", "--overwrite")[0] == 0
    assert (command.steps, STOPPED.parent.exists()) == (STEPS, False)
    assert command("--out", "a", "--overwrite", stop=2)[0] == 130
    assert (command("--out", "a", "--resume")[0], command.steps) == (0, STEPS - 2)  # the checkpoint goes first
    assert command("--out", "c", "--model", "nowhere")[0] == 2
    assert not Path(".c.checkpoint").exists()  # what fails before a checkpoint claims nothing


def test_on_a_full_disk_the_last_checkpoint_stays(command, monkeypatch):
    assert command("--out", "a", stop=3)[0] == 130
    with monkeypatch.context() as disk:
        full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
        disk.setattr("minisweet.resume.torch.save", full)
        status, _, err = command("--out", "a", "--resume")
        assert (status, "checkpoint.pt: cannot be written ([Errno 28] No space left on device" in err) == (2, True)
    with monkeypatch.context() as disk:
        disk.setattr("minisweet.run.write_json", full)
        status, _, err = command("--out", "a", "--resume")
        assert (status, command.steps, "a: cannot be written ([Errno 28]" in err) == (2, STEPS - 3, True)
    assert (command("--out", "a", "--resume")[0], command.steps) == (0, 0)  # what was trained is not lost


HERE = {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}


@contextmanager
def fitting(*options):
    """Within, another process trains, with a checkpoint of each step. Then it is killed."""
    code = "from minisweet import resume; from minisweet.classifier.fit import *; resume.MINUTES = 0; main()"
    process = subprocess.Popen([sys.executable, "-c", code, *options], env=os.environ | HERE)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def steps_saved() -> int:
    """Of the one stage; at any time there is no checkpoint, or a whole one."""
    return len(torch.load(STOPPED)["stages"]["ee"]["losses"]) if STOPPED.exists() else 0


@pytest.mark.slow
def test_a_living_training_is_left_alone_and_a_killed_one_goes_on(command):
    """It is killed twice in a row, wherever it is."""
    write_rows(Path("own.csv"), opinions(40), "text", "label")
    words = "own.csv --model tiny --method ee --exit-layers 1,4 --batch-size 2 --epochs 10 --max-length 32".split()
    options, taken = {"words": words, "module": fit}, [0]
    assert command("--out", "whole", minutes=10, **options)[0] == 0
    steps = command.steps
    for resumed in ([], ["--resume"]):
        with fitting(*words, "--out", "a", *resumed) as process:
            while process.poll() is None and steps_saved() < taken[-1] + 9:
                time.sleep(0.05)
            for more in ("--resume", "--overwrite"):
                status, _, err = command("--out", "a", more, **options)
                assert (status, "--out: another process trains a now; wait for it, or" in err) == (2, True)
            assert resume.is_claimed(Path("a"))
        taken.append(steps_saved())
        assert not resume.is_claimed(Path("a"))
        assert "another training runs, or was stopped" in command("--out", "a", **options)[2]
    assert 0 < taken[1] < taken[2] < steps
    assert (command("--out", "a", "--resume", minutes=10, **options)[0], command.steps) == (0, steps - taken[2])
    assert result("a") == result("whole")
