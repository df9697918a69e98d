"""A training that was stopped and resumed is, byte for byte, the one that was never stopped."""

import errno
import json
import os
import resource
import shutil
import signal
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import train
from tests.conftest import slow, write_model

STEPS = 6  # of each stage: two epochs of 20 examples in batches of 8
STOPPED = Path(".a.checkpoint/checkpoint.pt")
NEW = "--model tiny --train-size 20 --epochs 2 --batch-size 8 --exit-layers 1,4 --max-length 32".split()
TIMES = ("seconds", "stages")  # of run.json
FREE = ("out", "save_every", "overwrite", "resume")  # options
METHODS = [
    ("--method", "sweet"),
    ("--method", "branch", "--exit-layers", "0,2,4"),
    *slow(
        ("--method", "mm", "--exit-strategy", "lte"),
        ("--method", "branch", "--exit-strategy", "lte", "--amp", "bf16"),
        ("--method", "branch", "--targets", "trunk", "--exit-layers", "0,4"),
    ),
]


def result(run: str | Path) -> tuple[bytes, dict]:
    """What must be the same of two runs: the weights' bytes, and what was told but for times and where it lies."""
    record = json.loads(Path(run, "run.json").read_text())
    record["arguments"] = {k: v for k, v in record["arguments"].items() if k not in FREE}
    told = {key: value for key, value in record.items() if key not in TIMES}
    return Path(run, "model.safetensors").read_bytes(), told


@pytest.fixture
def command(command, monkeypatch, tmp_path):
    """Run train.py on a tiny model, with signals after so many steps: status, output and errors."""
    write_model(tmp_path / "tiny", "bert")
    step = torch.optim.AdamW.step

    def run_and_read(*arguments, signals=(), words=NEW) -> tuple[int, str, str]:
        due, taken = dict(signals), []

        def step_and_signal(*of_step) -> None:
            step(*of_step)
            taken.append(1)
            for number in due.pop(len(taken), ()):
                os.kill(os.getpid(), number)

        monkeypatch.setattr(torch.optim.AdamW, "step", step_and_signal)
        answer = command(train, *words, *arguments)
        run_and_read.steps = len(taken)
        return answer

    return run_and_read


TERM = [signal.SIGTERM]


@pytest.mark.parametrize("options", METHODS)
@given(stops=st.lists(st.tuples(st.integers(1, 8), st.sampled_from([signal.SIGTERM, signal.SIGHUP])), min_size=1))
@example(stops=[(STEPS, signal.SIGTERM)])  # all is trained, and no run is written
@settings(max_examples=2, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_stopped_training_goes_on_as_if_it_never_had_been(command, options, stops):
    """Stopped again and again, each time so many steps after it went on, until it is finished."""
    if not Path("whole").exists():
        assert command("--out", "whole", *options)[0] == 0
    for step, number in stops:
        status, _, err = command("--out", "a", *options, "--resume", signals={step: [number]})
        if status == 0:
            break
        assert (status, command.steps, "--resume goes on from" in err) == (128 + number, step, True)
        assert not Path("a").exists()
    status, out, _ = command("--out", "a", *options, "--resume")
    assert (status, "--resume: goes on from step " in out or "finished already" in out) == (0, True)
    assert result("a") == result("whole")
    assert not list(Path().glob(".*"))
    shutil.rmtree("a")


def test_ctrl_c_and_sigterm_at_once_and_a_signal_that_is_ignored(command):
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as with nohup
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it starts ignored
    status, _, err = command("--out", "a", signals={2: [signal.SIGHUP], 3: [signal.SIGINT, signal.SIGTERM]})
    assert (status, err.count("Traceback"), "stopped after 3 steps of sweet; --resume goes on" in err) == (143, 0, True)
    assert signal.signal(signal.SIGINT, former) is signal.default_int_handler
    assert signal.signal(signal.SIGHUP, ignored) is signal.SIG_IGN
    assert command("--out", "a", "--resume")[0] == 0
    assert command.steps == STEPS - 3


CHANGES = [  # options, what is replaced in both files, and what differs then
    (["--lr", "0.25"], ("", ""), "lr is 0.25 and was 0.0001"),
    (["--method", "ee"], ("", ""), "method is ee and was sweet"),
    (["--exit-layers", "2,4"], ("", ""), "exit_layers is [2, 4] and was [1, 4]"),
    ([], ("a film bad", "a dull film"), "the training rows are others"),
    ([], ("the film bad", "a dull film"), "the validation rows are others"),
    ([], (",down", ",below"), "labels is ['below', 'up'] and was ['down', 'up']"),
]


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "stopped"])
def test_other_arguments_and_rows_are_refused_with_both_values_and_files_may_move(command, finished):
    rows = [f"film {word} {i},{label}\n" for i in range(15) for word, label in (("good", "up"), ("bad", "down"))]
    texts = {name: "text,label\n" + article + article.join(rows) for name, article in (("a", "a "), ("b", "the "))}
    words = ["--method", "sweet", "--data", "a.csv", "--dev-data", "b.csv", "--out", "a"]

    def write(old: str, new: str) -> None:
        for name, text in texts.items():
            Path(f"{name}.csv").write_text(text.replace(old, new))

    def written() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in (*Path().glob("a/*"), *Path().glob(".a.checkpoint/*"))}

    write("", "")
    assert command(*words, signals={} if finished else {3: TERM})[0] == (0 if finished else 143)
    before = written()
    for more, (old, new), reason in CHANGES:
        write(old, new)
        status, _, err = command(*words, "--resume", *more)
        assert (status, command.steps, written()) == (2, 0, before), err
        assert f"--resume: a is another training's: {reason}" in err
        assert len(err.splitlines()[-1]) < 400
    write("", "")
    Path("elsewhere").mkdir()
    Path("a.csv").rename("elsewhere/other.csv")
    status, out, err = command(*words, "--data", "elsewhere/other.csv", "--resume", "--save-every", "5")
    assert (status, "a: finished already" in out, command.steps) == (0, finished, 0 if finished else STEPS - 3), err
    assert (written() == before) is finished
    if finished:
        Path("a/run.json").write_text('{"arguments": [[1, 2]]}')
        broken = command(*words, "--data", "elsewhere/other.csv", "--resume")
        assert "a/run.json: arguments is [[1, 2]], should be an object" in broken[2]


def test_a_training_claims_its_folder(command):
    """A second training is refused while the first one runs, and after that one was stopped or killed."""
    assert command("--out", "a", signals={3: TERM})[0] == 143
    before = STOPPED.read_bytes()
    status, _, err = command("--out", "a")
    assert (status, err.count("\n"), command.steps, STOPPED.read_bytes() == before) == (2, 1, 0, True)
    assert "--out: another training runs, or was stopped, with " in err
    assert "; pass --resume or --overwrite to take it" in err
    assert command("--out", "a", "--overwrite", "--seed", "1", "--model", "nowhere")[0] == 2
    assert STOPPED.read_bytes() == before  # nothing is lost before a new checkpoint takes its place
    for broken in (b"", before[:-200]):
        STOPPED.write_bytes(broken)
        assert "checkpoint.pt: is no checkpoint (" in command("--out", "a", "--resume")[2]
    assert command("--out", "a", "--seed", "1", "--overwrite")[0] == 0
    assert (command.steps, STOPPED.parent.exists()) == (STEPS, False)
    finished = Path("a/run.json").stat().st_mtime_ns
    assert command("--out", "a", "--overwrite", signals={2: TERM})[0] == 143
    assert Path("a/run.json").stat().st_mtime_ns == finished  # the run stays; beside it the checkpoint goes first
    assert (command("--out", "a", "--resume")[0], command.steps) == (0, STEPS - 2)
    assert json.loads(Path("a/run.json").read_text())["arguments"]["seed"] == 0
    Path(".b.checkpoint").mkdir()  # of a training that was killed before its first checkpoint
    assert command("--out", "b")[0] == 2
    status, out, _ = command("--out", "b", "--resume")
    assert (status, "--resume: goes on from step 0\n" in out) == (0, True)
    assert not Path(".b.checkpoint").exists()
    assert command("--out", "c", "--model", "nowhere")[0] == 2
    assert not Path(".c.checkpoint").exists()  # what fails before a checkpoint claims nothing


def test_on_a_full_disk_the_last_checkpoint_stays(command, monkeypatch):
    """Here no file may be larger than a kilobyte; then only the run is not written."""
    assert command("--out", "whole")[0] == 0
    assert command("--out", "a", signals={3: TERM})[0] == 143
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, former[1]))
    try:
        status, _, err = command("--out", "a", "--resume", "--save-every", "1e-9")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert (status, command.steps) == (2, 1)
    assert "checkpoint.pt: cannot be written ([Errno 27] File too large" in err
    assert (command("--out", "a", "--resume")[0], command.steps) == (0, STEPS - 3)
    assert result("a") == result("whole")
    with monkeypatch.context() as disk:
        disk.setattr("minisweet.runs.folders.save", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
        assert command("--out", "c")[0] == 2
    assert (command("--out", "c", "--resume")[0], command.steps) == (0, 0)  # what was trained is not lost
    assert result("c") == result("whole")


def test_where_memory_is_too_little_for_exit_0_the_training_goes_on_without_it(command, monkeypatch):
    """What was trained until then is kept, and the next call does not train it again."""
    options, fit = ["--method", "sweet", "--exit-layers", "0,2,4"], train.fit_ngrams
    with monkeypatch.context() as patch:  # where it is known before, nothing is trained
        patch.setattr("minisweet.ngrams.MOST", 100_000)
        status, _, err = command("--out", "a", *options)
        assert (status, "--exit-layers: exit 0 can be fitted for at most 1 classes" in err) == (2, True)
        assert (command.steps, list(Path().glob(".*"))) == (0, [])
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        monkeypatch.setattr(train, "fit_ngrams", Mock(side_effect=error))
        status, _, err = command("--out", "a", *options, "--overwrite")
        line = "--exit-layers: too little memory to fit exit 0; --resume --exit-layers 2,4 goes on without it\n"
        assert (status, err.endswith(line)) == (2, True)
    monkeypatch.setattr(train, "fit_ngrams", fit)
    assert command("--out", "a", *options[:2], "--resume", "--exit-layers", "2,4")[0] == 0
    assert command.steps == 0
    assert command("--out", "b", *options[:2], "--exit-layers", "2,4")[0] == 0
    assert result("a")[0] == result("b")[0]
