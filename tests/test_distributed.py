"""Several processes train and evaluate as one does."""

import copy
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minisweet.base import devices
from minisweet.base.commands import run_command
from minisweet.base.safe import InputError
from minisweet.branches import METHODS
from minisweet.checkpoint import load_encoder
from minisweet.data.tasks import load_examples
from minisweet.data.text import TokenizedExamples, load_tokenizer
from minisweet.evaluation import sweep
from minisweet.exits import EXIT_STRATEGIES, MultiExitModel
from tests.benchmark.kill import result
from tests.conftest import CHECKOUT, write_model
from train import send_back

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def as_process(monkeypatch, rank: int, processes: int) -> None:
    """As if this process were one of torchrun's, and had met the others."""
    monkeypatch.setattr(devices, "PLACES", [devices.Place(rank, rank, processes)])


@pytest.fixture
def tiny(tmp_path):
    """A model of two exits without dropout, and examples."""
    folder = write_model(tmp_path / "tiny", "bert", **NO_DROPOUT)
    rows = load_examples("toy", "train", Path())
    torch.manual_seed(0)
    model = MultiExitModel(load_encoder(folder), (1, 4), 2)
    return model, TokenizedExamples(load_tokenizer(folder, 60, 32), rows, np.arange(20))


@pytest.mark.parametrize("processes", [2, 3, 5])
@pytest.mark.parametrize("B", [1, 4, 8])
def test_the_shares_of_a_batch_add_up_to_its_gradients_and_losses(tiny, monkeypatch, B, processes):
    model, examples = tiny
    parameters, scaler = list(model.parameters()), torch.amp.GradScaler("cpu", enabled=False)
    batch = examples.batch(np.arange(B))
    losses = send_back(model, batch, scaler)
    whole = [parameter.grad for parameter in parameters]
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    weights, rows, total, loss = [], [], 0, 0
    for rank in range(processes):
        as_process(monkeypatch, rank, processes)
        mine, weight = devices.own_rows(batch)
        model.zero_grad()
        mean = devices.add_up_gradients(parameters, send_back(model, mine, scaler), weight)
        assert mean.untyped_storage().nbytes() == mean.nbytes  # and not all gradients too, for many steps
        loss = loss + mean
        total = total + torch.cat([parameter.grad.flatten() for parameter in parameters])
        weights.append(weight)
        rows += mine.rows.tolist() if weight else []
    assert (sum(weights), sorted(rows)) == (pytest.approx(1), list(range(B)))
    torch.testing.assert_close(loss, losses)
    torch.testing.assert_close(total, torch.cat([gradient.flatten() for gradient in whole]))


def test_a_process_without_rows_adds_zeros_whatever_its_loss(monkeypatch):
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad, unused = torch.tensor([1.0, torch.inf, torch.nan]), torch.nn.Parameter(torch.ones(2))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.add_(1))
    as_process(monkeypatch, 1, 2)
    assert devices.add_up_gradients([weight, unused], torch.tensor([torch.nan]), 0.0).tolist() == [1]
    assert (weight.grad.tolist(), unused.grad.tolist()) == ([1, 1, 1], [1, 1])


@pytest.mark.parametrize("strategy", EXIT_STRATEGIES)
@pytest.mark.parametrize("N", [2, 20])
def test_each_process_predicts_a_share_and_gets_all(tiny, monkeypatch, N, strategy):
    model, examples = tiny
    model = MultiExitModel(model.encoder, (1, 4), 2, exit_strategy=strategy).eval()
    examples = copy.copy(examples)
    examples.ids = examples.ids[:N]
    for name in ("labels", "targets", "lengths", "first_lengths"):
        setattr(examples, name, getattr(examples, name)[:N])
    monkeypatch.setattr(sweep, "BATCH_SIZE", 3)
    whole = sweep.predict(model, examples, None)
    shares = []

    def of_all(share: tuple) -> list[tuple]:
        shares.append(share)
        return shares

    monkeypatch.setattr(sweep, "of_all", of_all)
    for rank in range(3):
        as_process(monkeypatch, rank, 3)
        logits, certainty = sweep.predict(model, examples, None)
    assert [len(rows) for rows, _, _ in shares] == ([1, 0, 0] if N == 2 else [3, 2, 2])
    assert torch.equal(logits, whole[0])  # to the bit: the batches are those of one process
    assert certainty is whole[1] is None or torch.equal(certainty, whole[1])


def test_where_a_process_is(monkeypatch):
    assert devices.place() == (0, 0, 1)
    assert devices.of_all("x") == ["x"]
    as_process(monkeypatch, 2, 3)
    assert devices.place() == (2, 2, 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert str(devices.choose_device("auto")) == str(devices.choose_device("cuda")) == "cuda:2"
    assert str(devices.choose_device("cpu")) == "cpu"
    with pytest.raises(InputError, match="cuda:1"):
        devices.choose_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="'cuda:2' is not here; this machine has 2"):
        devices.choose_device("auto")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    as_process(monkeypatch, 0, 3)  # which alone is heard
    with pytest.raises(InputError, match="--nproc-per-node: 3, and this machine has 2"):
        devices.choose_device("auto")


GROUP = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK 1, LOCAL_RANK 0, WORLD_SIZE 1: should be as torchrun sets them"),
        ({"RANK": "1", "LOCAL_RANK": None, "WORLD_SIZE": "1"}, "RANK 1, "),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE 0: should be"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE two: should be"),
        ({"RANK": "-1"}, "RANK -1, "),
        ({"MASTER_ADDR": None}, "MASTER_ADDR: not set, and WORLD_SIZE is 2"),
        ({"RANK": None}, "RANK: not set, and WORLD_SIZE is 2"),
        ({"MASTER_PORT": "http"}, "the processes do not meet"),
    ],
)
def test_what_torchrun_never_sets_is_one_line(monkeypatch, capsys, changed, message):
    for name, value in (GROUP | changed).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        run_command(devices.together(lambda: print("it ran")))
    out, err = capsys.readouterr()
    assert (stopped.value.code, out, err.count("\n"), message in err) == (2, "", 1, True), err


def test_one_process_of_torchrun_is_the_only_one(monkeypatch):
    for name, value in (GROUP | {"WORLD_SIZE": "1"}).items():
        monkeypatch.setenv(name, value)
    ran = []
    devices.together(lambda: ran.append(devices.place()))()
    monkeypatch.delenv("WORLD_SIZE")
    devices.together(lambda: ran.append(devices.place()))()  # some clusters set RANK alone
    assert ran == [(0, 0, 1)] * 2


def test_a_group_that_a_librarys_user_made_is_not_ours(tiny, monkeypatch):
    """In a user's job of two processes a model predicts all rows by itself, on any device."""
    for name, value in (GROUP | {"RANK": "1", "LOCAL_RANK": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(devices.choose_device(name)) for name in ("auto", "cuda:1", "cuda:0")] == ["cuda", "cuda:1", "cuda:0"]
    assert devices.of_all("x") == ["x"]
    model, examples = tiny
    assert sweep.predict(model.eval(), examples, None)[0].shape == (2, 20, 2)


OPTIONS = "--model tiny --train-size 161 --batch-size 8 --epochs 3 --exit-layers 1,2,4 --max-length 32 --lr 1e-4"


def command(processes: int, script: str, *options, agent=("--standalone",)) -> list[str]:
    start = [sys.executable]
    if processes:
        start += ["-m", "torch.distributed.run", *agent, "--nproc-per-node", str(processes)]
    return [*start, str(CHECKOUT / script), *map(str, options)]


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def differences(one: str, other: str) -> tuple[float, float]:
    """The largest difference of two runs' losses and weights, but for a key's bias, whose gradient is but rounding."""
    losses = [torch.tensor(json.loads(Path(run, "run.json").read_text())["losses"]) for run in (one, other)]
    first, second = (load_file(Path(run, "model.safetensors")) for run in (one, other))
    weights = [(first[name] - second[name]).abs() for name in first]
    return (losses[0] - losses[1]).abs().max().item(), max(weight.max().item() for weight in weights)


ALONE = """
import os
from datetime import timedelta
from minisweet.base import devices
from minisweet.base.commands import run_command
from minisweet.base.safe import InputError

devices.FAREWELL = timedelta(seconds=3)

def main():
    if os.environ["RANK"] in os.environ["FAIL"]:
        raise InputError("--data: not on this machine")
    devices.of_all(0)

run_command(devices.together(main))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("fail", "said"), [("1", "process 1: error: "), ("01", "alone.py: error: ")])
def test_what_one_process_alone_must_say_is_heard(tmp_path, monkeypatch, fail, said):
    (tmp_path / "alone.py").write_text(ALONE)
    monkeypatch.setenv("FAIL", fail)
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    done = run(2, tmp_path / "alone.py")
    ours = [line for line in done.stderr.splitlines() if "not on this machine" in line]
    assert (done.returncode == 0, ours) == (False, [f"{said}--data: not on this machine"]), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_processes_train_and_evaluate_as_one_does(tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "tiny", "bert", **NO_DROPOUT)
    options = [*OPTIONS.split(), "--method", method]  # the last of 21 steps of an epoch has one row
    options += ["--class-weights", "balanced"] if method == "branch" else []
    assert run(0, "train.py", *options, "--out", "one").returncode == 0
    assert run(0, "evaluate.py", "one").returncode == 0
    for processes in (2, 3):
        done = run(processes, "train.py", *options, "--out", f"of{processes}")
        assert (done.returncode, done.stdout.count("trained in")) == (0, 1), done.stderr
        assert max(differences("one", f"of{processes}")) < 1e-5 + 1e-6  # run.json rounds losses to 1e-5
        assert run(processes, "evaluate.py", f"of{processes}").returncode == 0
        scores = [json.loads(Path(run, "evaluation.json").read_text())["nll"] for run in ("one", f"of{processes}")]
        assert scores[0]["before"] == pytest.approx(scores[1]["before"], abs=1e-5)


@pytest.mark.slow
def test_processes_stop_and_go_on_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "tiny", "bert")
    options = [*OPTIONS.split(), "--epochs", "20"]
    assert run(2, "train.py", *options, "--out", "whole").returncode == 0
    stopped = subprocess.Popen(command(2, "train.py", *options, "--out", "a", "--save-every", "1e-9"))
    while not list(Path(".a.checkpoint").glob("*.pt")):
        time.sleep(0.1)
    stopped.send_signal(signal.SIGTERM)
    stopped.wait(60)
    done = run(3, "train.py", *options, "--out", "a", "--resume")
    assert "processes is 3 and was 2" in done.stderr
    done = run(2, "train.py", *options, "--out", "a", "--resume")
    assert done.returncode == 0, done.stderr
    assert result("a") == result("whole")


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_with_one_line_at_most(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "tiny", "bert")
    options = [*OPTIONS.split(), "--epochs", "9999", "--save-every", "1e-9", "--out", "a"]
    training = subprocess.Popen(command(3, "train.py", *options), stderr=subprocess.PIPE, text=True)
    while not list(Path(".a.checkpoint").glob("*.pt")):
        time.sleep(0.1)
    children = Path(f"/proc/{training.pid}/task/{training.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    _, err = training.communicate(timeout=60)
    assert training.returncode != 0
    ours = [line for line in re.split(r"[\r\n]", err) if line.startswith("train.py: error:")]
    assert len(ours) <= 1
    assert not re.search(r'File ".*(train|devices|resume)\.py"', err), err[-6000:]


@pytest.mark.slow
def test_bad_input_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "tiny", "bert")
    for options, message in ((["--lr", "x"], "--lr: 'x'"), (["--lr", "1e30"], "the loss is"), (["--task", "q"], "'q'")):
        done = run(2, "train.py", *OPTIONS.split(), "--out", "a", *options)
        assert done.returncode != 0
        assert len([line for line in done.stderr.splitlines() if line.startswith("train.py: error:")]) == 1
        assert message in done.stderr
        assert 'Traceback (most recent call last):\n  File "' + str(CHECKOUT / "train.py") not in done.stderr
    assert Path("a/diverged.json").exists()


@pytest.mark.slow
def test_two_machines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "tiny", "bert", **NO_DROPOUT)
    assert run(0, "train.py", *OPTIONS.split(), "--out", "one").returncode == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agent = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "x")
    words = command(2, "train.py", *OPTIONS.split(), "--out", "two", agent=agent)
    machines = [subprocess.Popen(words, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [machine.wait(300) for machine in machines] == [0, 0]
    assert max(differences("one", "two")) < 1e-5 + 1e-6
