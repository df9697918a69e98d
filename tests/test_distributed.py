"""Several processes train as one does."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from minisweet import training
from minisweet.checkpoint import load_encoder
from minisweet.exits import MultiExitModel
from tests.conftest import CHECKOUT, NO_DROPOUT, toy_examples, write_model


@contextmanager
def as_process(rank: int, processes: int):
    """Within, this process is one of torchrun's, and meets no others."""
    world = {"is_initialized": lambda: True, "get_rank": lambda: rank, "get_world_size": lambda: processes}
    with pytest.MonkeyPatch.context() as patch:
        for name, call in (world | {"all_reduce": lambda tensor: None}).items():
            patch.setattr(torch.distributed, name, call)
        yield


@given(B=st.integers(1, 8), processes=st.integers(2, 5))
@settings(max_examples=20)
def test_the_shares_of_a_batch_add_up_to_its_gradients_and_losses(tmp_path_factory, B, processes):
    folder = write_model(tmp_path_factory.mktemp("tiny"), "bert", **NO_DROPOUT)
    model, batch = MultiExitModel(load_encoder(folder), (1, 4), 2), toy_examples(folder, range(B)).batch(np.arange(B))
    unused = torch.nn.Parameter(torch.ones(2))
    parameters, scaler = [*model.parameters(), unused], torch.amp.GradScaler("cpu", enabled=False)
    losses = training.compute_gradients(model, batch, scaler, None)
    whole = [parameter.grad for parameter in model.parameters()]
    rows, total, loss = [], 0, 0
    for rank in range(processes):
        with as_process(rank, processes):
            share, weight = training.own_rows(batch)
            model.zero_grad()
            of_share = training.compute_gradients(model, share, scaler, None)
            if not weight:  # a process without rows adds zeros, whatever its loss
                of_share.fill_(torch.nan)
            loss += training.add_up_gradients(parameters, of_share, weight)
        total += torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        rows += share.rows.tolist() if weight else []
    assert (sorted(rows), unused.grad) == (list(range(B)), None)
    torch.testing.assert_close(loss, losses)
    torch.testing.assert_close(total, torch.cat([gradient.flatten() for gradient in whole]))


OPTIONS = "--model tiny --train-size 161 --batch-size 8 --epochs 3 --exit-layers 0,1,2,4 --max-length 32 --lr 1e-4"
OPTIONS = [*OPTIONS.split(), "--amp", "off"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Processes start in a folder with a tiny model."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "tiny", "bert", **NO_DROPOUT)


def command(processes: int, script: str, *options) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(torchrun if processes else []), str(CHECKOUT / script), *map(str, options)]


def run(*arguments) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=environment)


def told_by(run: str) -> tuple:
    """A run's losses and its weights."""
    return json.loads(Path(run, "run.json").read_text())["losses"], load_file(Path(run, "model.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ee", "branch"])
def test_processes_train_as_one_does(here, method):
    options = [*OPTIONS, "--method", method]  # the last of 21 steps of an epoch has one row
    assert run(0, "train.py", *options, "--out", "one").returncode == 0
    done = run(3, "train.py", *options, "--out", "of3")
    assert (done.returncode, done.stdout.count("trained; next")) == (0, 1), done.stderr
    torch.testing.assert_close(told_by("of3"), told_by("one"), rtol=0, atol=1e-5 + 1e-6)  # run.json rounds to 1e-5


@pytest.mark.slow
def test_processes_that_were_stopped_go_on_together(here):
    write_model(Path("tiny"), "bert")  # with dropout, which differs between processes
    options = [*OPTIONS, "--method", "mm", "--epochs", "6"]
    assert run(2, "train.py", *options, "--out", "whole").returncode == 0
    stopped = subprocess.Popen(command(2, "train.py", *options, "--out", "a"))
    while not Path(".a.checkpoint/checkpoint.pt").exists():  # until the first of MM's models is trained
        time.sleep(0.1)
    stopped.send_signal(signal.SIGTERM)
    stopped.wait(60)
    assert not Path("a").exists()
    done = run(2, "train.py", *options, "--out", "a", "--resume")
    assert (done.returncode, "--resume: goes on after" in done.stderr) == (0, True), done.stderr
    assert told_by("a")[0] == told_by("whole")[0]
    torch.testing.assert_close(told_by("a")[1], told_by("whole")[1], rtol=0, atol=0)


@pytest.mark.slow
def test_bad_input_is_one_line_and_the_first_process_says_it(here):
    for options, message in ((["--lr", "1e30"], "the loss became"), (["--task", "q"], "'q'")):
        done = run(2, "train.py", *OPTIONS, "--out", "a", *options)
        assert (done.returncode == 0, message in done.stderr) == (False, True)
        assert f'File "{CHECKOUT / "train.py"}"' not in done.stderr
    assert json.loads(Path("a/run.json").read_text())["diverged"] > 0
