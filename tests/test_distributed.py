"""Several processes train and evaluate as one does."""

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

from minisweet.base import devices
from minisweet.checkpoint import load_encoder
from minisweet.evaluation import answers
from minisweet.exits import EXIT_STRATEGIES, MultiExitModel
from tests.conftest import CHECKOUT, write_model
from tests.test_resume import result
from tests.test_training import toy_examples
from train import compute_gradients

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@contextmanager
def as_process(rank: int, processes: int, **calls):
    """Within, this process is one of torchrun's. `calls` stand in for those that meet the others."""
    world = {"is_initialized": lambda: True, "get_rank": lambda: rank, "get_world_size": lambda: processes}
    with pytest.MonkeyPatch.context() as patch:
        for name, call in (world | calls).items():
            patch.setattr(torch.distributed, name, call)
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """An encoder without dropout, and a function that gives so many examples."""
    folder = write_model(tmp_path_factory.mktemp("tiny"), "bert", **NO_DROPOUT)
    return load_encoder(folder), lambda N: toy_examples(folder, range(N))


@given(B=st.integers(1, 8), processes=st.integers(2, 5))
@settings(max_examples=20)
def test_the_shares_of_a_batch_add_up_to_its_gradients_and_losses(tiny, B, processes):
    encoder, some = tiny
    model, batch = MultiExitModel(encoder, (1, 4), 2), some(B).batch(np.arange(B))
    unused = torch.nn.Parameter(torch.ones(2))
    parameters, scaler = [*model.parameters(), unused], torch.amp.GradScaler("cpu", enabled=False)
    model.zero_grad()
    losses = compute_gradients(model, batch, scaler, None)
    whole = [parameter.grad for parameter in model.parameters()]
    rows, total, loss = [], 0, 0
    for rank in range(processes):
        with as_process(rank, processes, all_reduce=lambda tensor: None):
            share, weight = devices.own_rows(batch)
            model.zero_grad()
            of_share = compute_gradients(model, share, scaler, None)
            if not weight:  # a process without rows adds zeros, whatever its loss
                of_share.fill_(torch.nan)
            loss += devices.add_up_gradients(parameters, of_share, weight)
        total += torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        rows += share.rows.tolist() if weight else []
    assert (sorted(rows), unused.grad) == (list(range(B)), None)
    torch.testing.assert_close(loss, losses)
    torch.testing.assert_close(total, torch.cat([gradient.flatten() for gradient in whole]))


@given(N=st.integers(1, 30), processes=st.integers(2, 4), strategy=st.sampled_from(EXIT_STRATEGIES))
@settings(max_examples=20)
def test_each_process_predicts_a_share_and_gets_all(tiny, N, processes, strategy):
    encoder, some = tiny
    model, examples = MultiExitModel(encoder, (1, 4), 2, exit_strategy=strategy).eval(), some(N)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(answers, "BATCH_SIZE", 3)
        whole = answers.all_logits(model, examples, None)
        single = torch.cat([model(*examples.batch(np.array([row])).inputs) for row in range(N)], dim=1)
        torch.testing.assert_close(whole[0], single, atol=1e-5, rtol=0)  # in the order of the examples
        shares = []

        def gather(values: list, share: tuple) -> None:
            shares.append(share)
            values[:] = shares

        for rank in range(processes):
            with as_process(rank, processes, all_gather_object=gather):
                of_last = answers.all_logits(model, examples, None)
    batches = [len(rows) for rows, _, _ in shares]
    assert max(batches) - min(batches) <= 1
    torch.testing.assert_close(of_last, whole, rtol=0, atol=0)  # to the bit: the batches are those of one process


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
    """A run's losses, its weights, and the loss of its exits on the validation rows."""
    record, evaluation = (json.loads(Path(run, name).read_text()) for name in ("run.json", "evaluation.json"))
    return record["losses"], load_file(Path(run, "model.safetensors")), evaluation["nll"]["before"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ee", "branch"])
def test_processes_train_and_evaluate_as_one_does(here, method):
    options = [*OPTIONS, "--method", method]  # the last of 21 steps of an epoch has one row
    options += ["--class-weights", "balanced"] if method == "branch" else []
    assert run(0, "train.py", *options, "--out", "one").returncode == 0
    assert run(0, "evaluate.py", "one").returncode == 0
    done = run(3, "train.py", *options, "--out", "of3")
    assert (done.returncode, done.stdout.count("trained in")) == (0, 1), done.stderr
    assert run(3, "evaluate.py", "of3").returncode == 0
    torch.testing.assert_close(told_by("of3"), told_by("one"), rtol=0, atol=1e-5 + 1e-6)  # run.json rounds to 1e-5


@pytest.mark.slow
def test_processes_stop_at_one_step_and_go_on_together(here):
    write_model(Path("tiny"), "bert")  # with dropout, which differs between processes
    options = [*OPTIONS, "--epochs", "6"]
    assert run(2, "train.py", *options, "--out", "whole").returncode == 0
    stopped = subprocess.Popen(command(2, "train.py", *options, "--out", "a", "--save-every", "1e-9"))
    while not Path(".a.checkpoint/checkpoint.pt").exists():
        time.sleep(0.1)
    stopped.send_signal(signal.SIGTERM)
    stopped.wait(60)
    assert not Path("a").exists()
    done = run(2, "train.py", *options, "--out", "a", "--resume")
    assert done.returncode == 0, done.stderr
    assert result("a") == result("whole")


ENDS = """
from pathlib import Path
from minisweet.base import devices

def main():
    import torch._dynamo  # as the first optimizer does
    devices.all_gather(0)

devices.distributed(main)()
left = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
assert not [name for name in left if "gloo" in name], left
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for threads in /proc")
def test_no_thread_of_gloo_outlives_the_group(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    (tmp_path / "ends.py").write_text(ENDS)
    done = run(2, tmp_path / "ends.py")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_bad_input_is_one_line_and_the_first_process_says_it(here):
    for options, message in ((["--lr", "1e30"], "the loss became"), (["--task", "q"], "'q'")):
        done = run(2, "train.py", *OPTIONS, "--out", "a", *options)
        assert (done.returncode == 0, message in done.stderr) == (False, True)
        assert f'File "{CHECKOUT / "train.py"}"' not in done.stderr
    assert json.loads(Path("a/run.json").read_text())["diverged"] > 0
