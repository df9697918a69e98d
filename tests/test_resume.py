"""A training that was stopped and resumed is, byte for byte, the one that was never stopped."""

import errno
import json
import os
import signal
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import train
from tests.conftest import write_model

STEPS = 6  # of each stage: two epochs of 20 examples in batches of 8
STOPPED = Path(".a.checkpoint/checkpoint.pt")
NEW = "--model tiny --train-size 20 --epochs 2 --batch-size 8 --exit-layers 1,4 --max-length 32".split()
TIMES = ("seconds", "stages")  # of run.json
FREE = ("out", "save_every", "overwrite", "resume")  # options
METHODS = [
    ("--method", "sweet"),
    ("--method", "ee", "--amp", "bf16"),
    ("--method", "mm", "--exit-strategy", "lte"),
    ("--method", "branch", "--exit-strategy", "lte", "--amp", "bf16"),
    ("--method", "branch", "--exit-layers", "0,2,4"),
    ("--method", "branch", "--targets", "trunk", "--exit-layers", "0,4"),
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


@pytest.mark.parametrize(("options", "step"), list(zip(METHODS, (3, 6, 1, 8, 11, 4), strict=True)))
def test_a_stopped_training_goes_on_as_if_it_never_had_been(command, options, step):
    assert command("--out", "whole", *options)[0] == 0
    assert command("--out", "a", *options, signals={step: TERM})[0] == 143
    assert not Path("a").exists()
    status, out, err = command("--out", "a", *options, "--resume", signals={1: [signal.SIGHUP]})
    assert "--resume: goes on from step " in out
    assert (status, "--resume goes on from" in err) == ((0, False) if step == STEPS else (129, True))
    assert command("--out", "a", *options, "--resume")[0] == 0
    assert result("a") == result("whole")
    assert not list(Path().glob(".*"))


def test_ctrl_c_and_sigterm_at_once_and_a_signal_that_is_ignored(command):
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as with nohup
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it starts ignored
    status, _, err = command("--out", "a", signals={2: [signal.SIGHUP], 3: [signal.SIGINT, signal.SIGTERM]})
    assert (status, err.count("Traceback"), "stopped after 3 steps of sweet; --resume goes on" in err) == (143, 0, True)
    assert signal.signal(signal.SIGINT, former) is signal.default_int_handler
    assert signal.signal(signal.SIGHUP, ignored) is signal.SIG_IGN
    assert len(torch.load(STOPPED, weights_only=True)["stages"]["sweet"]["losses"]) == 3


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "stopped"])
def test_other_arguments_and_rows_are_refused_with_both_values(command, finished):
    rows = [f"a film {word} {i},{label}\n" for i in range(15) for word, label in (("good", "up"), ("bad", "down"))]
    for path, article in (("train.csv", "a"), ("dev.csv", "the")):
        Path(path).write_text("text,label\n" + "".join(rows).replace("a film", f"{article} film"))
    given = ["--method", "sweet", "--data", "train.csv", "--dev-data", "dev.csv", "--out", "a"]
    assert command(*given, signals={} if finished else {3: TERM})[0] == (0 if finished else 143)

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in (*Path().glob("a/*"), *Path().glob(".a.checkpoint/*"))}

    def refused(*more: str) -> str:
        status, _, err = command(*given, "--resume", *more)
        assert (status, len(err.splitlines()[-1]) < 400, command.steps, files()) == (2, True, 0, before), err
        return err.partition("--resume: a is another training's: ")[2]

    before = files()
    assert "lr is 0.25 and was 0.0001" in refused("--lr", "0.25")
    assert "method is ee and was sweet" in refused("--method", "ee")
    assert "exit_layers is [2, 4] and was [1, 4]" in refused("--exit-layers", "2,4")
    kept = {path: path.read_text() for path in map(Path, ("train.csv", "dev.csv"))}
    for old, new, reason in (
        ("a film bad", "a dull film", "train_digest is "),
        ("the film bad", "a dull film", "dev_digest is "),
        (",down", ",below", "labels is ['below', 'up'] and was ['down', 'up']"),
    ):
        for path, text in kept.items():
            path.write_text(text.replace(old, new))
        assert reason in refused()
    for path, text in kept.items():
        path.write_text(text)
    Path("elsewhere").mkdir()
    Path("train.csv").rename("elsewhere/other.csv")  # files may move, and be called otherwise
    moved = [*given, "--data", "elsewhere/other.csv", "--resume", "--save-every", "5"]
    status, out, err = command(*moved)
    assert (status, "a: finished already" in out, command.steps) == (0, finished, 0 if finished else STEPS - 3), err
    assert (files() == before) is finished


def test_a_training_claims_its_folder(command):
    """A second training is refused while the first one runs, and after that one was stopped or killed."""
    assert command("--out", "a", signals={3: TERM})[0] == 143
    before = STOPPED.read_bytes()
    for more in ((), ("--seed", "1")):
        status, _, err = command("--out", "a", *more)
        assert (status, err.count("\n"), command.steps, STOPPED.read_bytes() == before) == (2, 1, 0, True)
        assert "--out: another training runs, or was stopped, with " in err
        assert "; pass --resume or --overwrite to take it" in err
    assert command("--out", "a", "--overwrite", "--seed", "1", "--model", "nowhere")[0] == 2
    assert STOPPED.read_bytes() == before  # nothing is lost before a new checkpoint takes its place
    assert command("--out", "a", "--seed", "1", "--overwrite")[0] == 0
    assert (command.steps, STOPPED.parent.exists()) == (STEPS, False)
    Path(".b.checkpoint").mkdir()  # of a training that was killed before its first checkpoint
    assert command("--out", "b")[0] == 2
    assert command("--out", "b", "--resume")[0] == 0
    assert not Path(".b.checkpoint").exists()
    status, _, err = command("--out", "c", "--task", "sst2", "--data-dir", "nowhere")
    assert (status, Path(".c.checkpoint").exists()) == (2, False)  # what fails before a checkpoint claims nothing


def test_a_checkpoint_beside_a_finished_run_goes_first(command):
    assert "--resume: goes on from step 0\n" in command("--out", "a", "--resume")[1]  # where there is none
    before = Path("a/run.json").stat().st_mtime_ns
    assert command("--out", "a", "--seed", "1", "--overwrite", signals={2: TERM})[0] == 143
    assert Path("a/run.json").stat().st_mtime_ns == before
    assert (command("--out", "a", "--resume", "--seed", "1")[0], command.steps) == (0, STEPS - 2)
    assert json.loads(Path("a/run.json").read_text())["arguments"]["seed"] == 1


def test_a_full_disk(command, monkeypatch):
    assert command("--out", "whole")[0] == 0
    save = torch.save

    def full(content: dict, file: object) -> None:
        if len(content["stages"]["sweet"]["losses"]) > 3:
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            finally:
                raise RuntimeError("unexpected pos 64 vs 0")  # as torch.save does where the disk was full before
        save(content, file)

    with monkeypatch.context() as disk:
        disk.setattr(torch, "save", full)
        status, _, err = command("--out", "a", "--save-every", "1e-9")
        assert (status, command.steps) == (2, 4)
        assert "checkpoint.pt: cannot be written ([Errno 28] No space left" in err
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
        patch.setattr("minisweet.ngram_fit.MOST", 100_000)
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
