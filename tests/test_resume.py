"""A training that was stopped and resumed is, byte for byte, the one that was never stopped."""

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import train
from minisweet.base.commands import run_command
from minisweet.runs import start
from tests.benchmark.kill import METHODS, result
from tests.conftest import CHECKOUT, write_model

STEPS = 6  # of each stage: two epochs of 20 examples in batches of 8
STOPPED = Path(".a.checkpoint")
NEW = "train.py --model tiny --train-size 20 --epochs 2 --batch-size 8 --exit-layers 1,4 --max-length 32".split()


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run train.py on a tiny model, interrupted by `signals` after so many steps: status, output and errors."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "tiny", "bert")
    update = train.update

    def run(*arguments, signals=(), words=NEW) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [*words, *map(str, arguments)])
        due = dict(signals)
        taken = []

        def update_and_kill(*of_step) -> None:
            update(*of_step)
            taken.append(1)
            for number in due.pop(len(taken), ()):
                os.kill(os.getpid(), number)

        monkeypatch.setattr(train, "update", update_and_kill)
        status = 0
        try:
            run_command(train.main)
        except SystemExit as exit_:
            status = exit_.code
        run.steps = len(taken)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


TERM = [signal.SIGTERM]


@pytest.mark.parametrize(("options", "step"), list(zip(METHODS, (3, 6, 1, 8, 4, 11), strict=True)))
def test_a_stopped_training_goes_on_as_if_it_never_had_been(command, options, step):
    assert command("--out", "whole", *options)[0] == 0
    assert command("--out", "a", *options, signals={step: TERM})[0] == 143
    assert not Path("a").exists()
    status, _, err = command("--out", "a", *options, "--resume", signals={1: TERM})
    assert (status, "--resume goes on from" in err) == ((143, True) if step != STEPS else (0, False))
    assert command("--out", "a", *options, "--resume")[0] == 0
    assert result("a") == result("whole")
    assert not STOPPED.exists()


def test_signals(command, monkeypatch):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with both ignored
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    former = signal.getsignal(signal.SIGINT)
    status, _, err = command("--out", "a", signals={3: [signal.SIGINT]})
    assert (status, err.count("Traceback"), len(list(STOPPED.glob("sweet.000000003.*")))) == (130, 0, 1)
    status, *_ = command("--out", "b", signals={3: [signal.SIGTERM, signal.SIGTERM]})
    assert (status, Path(".b.checkpoint").exists()) == (143, False)  # the second ended it at once
    assert command("--out", "c", signals={3: [signal.SIGHUP]})[0] == 129
    monkeypatch.setattr(signal, "signal", signal.signal)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert command("--out", "d", signals={3: [signal.SIGHUP]})[0] == 0
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert signal.getsignal(signal.SIGINT) is former


def test_what_has_changed_is_refused_with_both_values(command, monkeypatch):
    assert command("--out", "a", signals={3: TERM})[0] == 143
    changed = {("--lr", "0.5"): ("--lr is 0.5", "0.0002"), ("--seed", "1"): ("--seed is 1", "was 0")}
    for options, parts in changed.items():
        status, _, err = command("--out", "a", "--resume", *options)
        assert (status, err.count("\n"), len(err) < 400) == (2, 1, True)
        assert all(part in err for part in parts), err
    with monkeypatch.context() as other:
        other.setattr(start, "versions", lambda: dict.fromkeys(("torch", "numpy", "tokenizers"), "0"))
        assert f"torch is 0 and was {version('torch')}" in command("--out", "a", "--resume")[2]
    vocabulary = Path("tiny/vocab.txt")
    words = vocabulary.read_text()
    vocabulary.write_text(words.replace("film\nwas", "was\nfilm"))
    assert "the model has changed" in command("--out", "a", "--resume")[2]  # which its tokenizer belongs to
    vocabulary.write_text(words)
    write_model(Path("tiny"), "bert", hidden_dropout_prob=0.3)
    assert "the model has changed" in command("--out", "a", "--resume")[2]
    assert len(list(STOPPED.glob("*.pt"))) == 1  # and nothing is lost
    write_model(Path("tiny"), "bert")
    assert command("--out", "a", "--resume", "--save-every", "5", "--overwrite")[0] == 0


def test_a_finished_run_says_so(command):
    assert command("--out", "a", "--resume")[0] == 0  # starts where there is none
    before = Path("a/run.json").stat().st_mtime_ns
    status, out, _ = command("--out", "a", "--resume")
    assert (status, "a: finished already" in out, command.steps) == (0, True, 0)
    status, _, err = command("--out", "a", "--resume", "--lr", "0.5")
    assert (status, "--lr is 0.5 and was 0.0002" in err) == (2, True)
    assert Path("a/run.json").stat().st_mtime_ns == before
    assert command("--out", "a", "--resume", "--seed", "1", "--overwrite", signals={2: TERM})[0] == 143
    status, _, err = command("--out", "a", "--resume", "--seed", "1")
    assert (status, "--out: a holds a run already" in err, command.steps, len(list(STOPPED.glob("*.pt")))) == (
        2,
        True,
        0,
        1,
    )
    assert command("--out", "a", "--resume", "--seed", "1", "--overwrite")[0] == 0  # of the one that is to replace it
    assert command.steps == STEPS - 2
    assert json.loads(Path("a/run.json").read_text())["arguments"]["seed"] == 1
    STOPPED.mkdir()  # as if it had been killed just after it had saved the run
    (STOPPED / "sweet.end.0.pt").touch()
    os.utime(STOPPED / "sweet.end.0.pt", (1, 1))
    assert "finished already" in command("--out", "a", "--resume", "--seed", "1")[1]
    assert not STOPPED.exists()


def test_a_finished_run_of_branches_on_a_trunk_says_so(command):
    assert command("--out", "trunk", "--exit-layers", "4")[0] == 0
    words = "train.py --trunk trunk --out a --train-size 20 --max-length 32 --targets trunk --resume".split()

    def branches(*more: str) -> tuple[int, str, str]:
        return command(*more, words=words)

    assert branches()[0] == 0
    assert "finished already" in branches("--exit-layers", "1,2,4")[1]  # its default
    assert "--exit-layers is [2, 4] and was [1, 2, 4]" in branches("--exit-layers", "2,4")[2]
    assert "--targets is half and was trunk" in branches("--targets", "half")[2]


def write_texts(path: str, old: str = "", new: str = "") -> None:
    """Own data of two classes, with one piece of it replaced."""
    rows = [f"a film {word} {i},{label}\n" for i in range(15) for word, label in (("good", "up"), ("bad", "down"))]
    Path(path).write_text("text,label\n" + "".join(rows).replace(old or "a film", new or "a film"))


@pytest.mark.parametrize("is_finished", [True, False], ids=["finished", "stopped"])
def test_data_and_options_that_changed_are_refused_with_both_values(command, is_finished):
    write_texts("train.csv")
    write_texts("dev.csv", "a film", "the film")
    given = ["--method", "sweet", "--data", "train.csv", "--dev-data", "dev.csv", "--out", "a"]
    assert command(*given, signals={} if is_finished else {3: TERM})[0] == (0 if is_finished else 143)

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in (*Path().glob("a/*"), *STOPPED.glob("*"))}

    def refused(*more: str) -> str:
        status, _, err = command(*given, "--resume", *more)
        assert (status, err.count("\n"), command.steps, files()) == (2, 1, 0, before), err
        assert ("a is finished, but" in err) is is_finished
        return err

    before = files()
    assert len(before) == (4 if is_finished else 2)
    for option, now, was in (
        ("epochs", 1, 2),
        ("lr", 0.25, 0.0002),
        ("exit-layers", [2, 4], [1, 4]),
        ("exit-strategy", "lte", "confidence"),
        ("max-length", 16, 32),
        ("batch-size", 4, 8),
        ("train-size", 19, 20),
        ("seed", 7, 0),
        ("method", "ee", "sweet"),
    ):
        value = ",".join(map(str, now)) if isinstance(now, list) else str(now)
        assert f"--{option} is {now} and was {was}" in refused(f"--{option}", value)
    write_texts("train.csv", "bad", "dull")
    assert "the training data has changed" in refused()
    write_texts("train.csv", "down", "below")
    write_texts("dev.csv", "down", "below")
    assert "labels is ['below', 'up'] and was ['down', 'up']" in refused()
    write_texts("train.csv")
    write_texts("dev.csv")
    assert "the validation data has changed" in refused()
    write_texts("dev.csv", "a film", "the film")
    assert command(*given, "--resume")[0] == 0
    assert command.steps == (0 if is_finished else STEPS - 3)


@pytest.mark.parametrize("is_finished", [True, False], ids=["finished", "stopped"])
def test_files_may_move_where_their_digests_agree(command, is_finished):
    write_texts("train.csv")
    assert command("--method", "sweet", "--data", "train.csv", "--out", "whole")[0] == 0
    stop = {} if is_finished else {3: TERM}
    assert command("--method", "sweet", "--data", "train.csv", "--out", "a", signals=stop)[0] in (0, 143)
    Path("elsewhere").mkdir()
    for name in ("tiny", "train.csv"):
        Path(name).rename(Path("elsewhere", name))
    Path("elsewhere/train.csv").rename("elsewhere/other.csv")
    words = [word.replace("tiny", "elsewhere/tiny") for word in NEW]
    moved = ["--method", "sweet", "--data", "elsewhere/other.csv", "--out", "a", "--resume"]
    status, _, err = command(*moved, words=words)
    assert (status, command.steps) == (0, 0 if is_finished else STEPS - 3), err
    assert Path("a/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    write_model(Path("elsewhere/tiny"), "bert", hidden_dropout_prob=0.3)
    if is_finished:
        assert "a is finished, but the model has changed" in command(*moved, words=words)[2]


def test_a_task_in_another_folder_goes_on(command):
    for folder in ("one", "two"):
        rows = "".join(f"{n}\tthe film\tnot bad {n}\t{'not_' * (n % 2)}entailment\n" for n in range(20))
        Path(folder, "RTE").mkdir(parents=True)
        for name in ("train", "dev"):
            Path(folder, "RTE", f"{name}.tsv").write_text("index\tsentence1\tsentence2\tlabel\n" + rows)
    assert command("--task", "rte", "--data-dir", "one", "--out", "a", signals={3: TERM})[0] == 143
    assert command("--task", "rte", "--data-dir", "two", "--out", "a", "--resume")[0] == 0
    assert command.steps == STEPS - 3


def test_another_machine_is_noted(command, monkeypatch):
    assert command("--out", "a", signals={3: TERM})[0] == 143
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    status, _, err = command("--out", "a", "--resume", signals={1: TERM})
    machine = "--resume: machine is .*, 77 threads and was .*, " + f"{threads} threads; the last bits may not be"
    assert (status, len(re.findall(machine, err))) == (143, 1), err
    monkeypatch.undo()


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_broken_checkpoint_falls_back_to_the_one_before(command, damage):
    assert command("--out", "whole")[0] == 0
    assert command("--out", "a", "--save-every", "1e-9", signals={5: TERM})[0] == 143
    first, newest = sorted(STOPPED.glob("*.pt"))
    assert [path.name[:15] for path in (first, newest)] == ["sweet.000000004", "sweet.000000005"]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content if damage == "flip" else content[:-1])
    status, _, err = command("--out", "a", "--resume")
    assert (status, f"{newest.name}: broken" in err, command.steps) == (0, True, STEPS - 4)
    assert result("a") == result("whole")


def test_a_finished_stage_that_is_broken_is_trained_again(command):
    options = ["--method", "mm", "--save-every", "1e-9"]
    assert command("--out", "whole", *options)[0] == 0
    assert command("--out", "a", *options, signals={STEPS + 1: TERM})[0] == 143
    (end,) = STOPPED.glob("layers-1.end.*")
    end.write_bytes(b"")
    assert command("--out", "a", *options, "--resume")[0] == 0
    assert result("a") == result("whole")


def test_without_resume_or_overwrite_what_was_stopped_is_kept(command):
    assert command("--out", "a", signals={3: TERM})[0] == 143
    before = {path: path.read_bytes() for path in STOPPED.iterdir()}
    for more in ((), ("--seed", "1"), ("--save-every", "1e-9")):
        status, _, err = command("--out", "a", *more)
        assert (status, err.count("\n"), command.steps) == (2, 1, 0)
        assert "--out: a has a training that was stopped" in err
        assert "--resume" in err
        assert "--overwrite" in err
        assert {path: path.read_bytes() for path in STOPPED.iterdir()} == before
    status, _, err = command("--out", "a", "--seed", "1", "--overwrite")
    assert (status, command.steps, "this one starts anew" in err, STOPPED.exists()) == (0, STEPS, True, False)


def test_a_full_disk(command, monkeypatch):
    assert command("--out", "whole")[0] == 0
    save = torch.save

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    status, _, err = command("--out", "a", "--save-every", "1e-9")  # the training goes on
    assert (status, err.count(f"{STOPPED}/partial: cannot be written")) == (0, STEPS)
    assert result("a") == result("whole")
    status, _, err = command("--out", "b", "--save-every", "1e-9", signals={3: TERM})
    assert (status, "nothing of it is kept" in err, "--resume goes on from" in err) == (143, True, False)
    room = Path(".c.checkpoint")  # for two checkpoints: the older one gives way
    monkeypatch.setattr(torch, "save", lambda *of: (save if len(list(room.glob("*.pt"))) < 2 else full)(*of))
    assert command("--out", "c", "--save-every", "1e-9", signals={3: TERM})[0] == 143
    kept = sorted(path.name[:15] for path in room.glob("*.pt"))
    assert kept == ["sweet.000000002", "sweet.000000003"]
    monkeypatch.setattr(torch, "save", save)
    with monkeypatch.context() as broken:
        broken.setattr("minisweet.runs.folders.save", full)
        status, _, err = command("--out", "b")
    assert (status, "kept in" in err, ".b.checkpoint: --resume saves it" in err) == (2, True, True)
    assert (command("--out", "b", "--resume")[0], command.steps) == (0, 0)
    assert result("b") == result("whole")


def test_the_seconds_are_those_that_were_computed(command, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    assert command("--out", "a", "--save-every", "1000", signals={4: TERM})[0] == 143
    before = torch.load(next(STOPPED.glob("*.pt")), weights_only=True)["seconds"]
    next(iter(range(1000)))
    clock = iter(range(5000, 10**6))  # long after
    assert command("--out", "a", "--save-every", "1000", "--resume")[0] == 0
    record = json.loads(Path("a/run.json").read_text())
    assert before < record["stages"]["sweet"] <= record["seconds"] < 200


@pytest.mark.slow
def test_trainings_killed_at_random_moments():
    seed = str(random.randrange(10**6))
    killed = subprocess.run(
        [sys.executable, "-m", "tests.benchmark.kill", "--kills", "3", "--seed", seed], cwd=CHECKOUT
    )
    assert killed.returncode == 0
