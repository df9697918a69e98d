"""Several processes train and evaluate as one does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minisweet.base import devices
from minisweet.checkpoint import load_encoder
from minisweet.data.tasks import load_examples
from minisweet.data.text import TokenizedExamples, load_tokenizer
from minisweet.evaluation import answers
from minisweet.exits import EXIT_STRATEGIES, MultiExitModel
from tests.conftest import CHECKOUT, write_model
from tests.test_resume import result
from train import compute_gradients

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def as_process(monkeypatch, rank: int, processes: int) -> None:
    """As if this process were one of torchrun's, and had met the others."""
    for module in (devices, answers):
        monkeypatch.setattr(module, "process_rank", lambda: rank)
        monkeypatch.setattr(module, "num_processes", lambda: processes)


@pytest.fixture
def tiny(tmp_path):
    """A model of two exits without dropout, and a function that gives so many examples."""
    folder = write_model(tmp_path / "tiny", "bert", **NO_DROPOUT)
    torch.manual_seed(0)
    model = MultiExitModel(load_encoder(folder), (1, 4), 2)
    tokenizer, rows = load_tokenizer(folder, 60, 32), load_examples("toy", "train", Path())
    return model, lambda N: TokenizedExamples(tokenizer, rows.take(range(N)))


@pytest.mark.parametrize("processes", [2, 3, 5])
@pytest.mark.parametrize("B", [1, 4, 8])
def test_the_shares_of_a_batch_add_up_to_its_gradients_and_losses(tiny, monkeypatch, B, processes):
    model, some = tiny
    parameters, scaler = list(model.parameters()), torch.amp.GradScaler("cpu", enabled=False)
    batch = some(B).batch(np.arange(B))
    losses = compute_gradients(model, batch, scaler, None)
    whole = [parameter.grad for parameter in parameters]
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    weights, rows, total, loss = [], [], 0, 0
    for rank in range(processes):
        as_process(monkeypatch, rank, processes)
        share, weight = devices.own_rows(batch)
        model.zero_grad()
        mean = devices.add_up_gradients(parameters, compute_gradients(model, share, scaler, None), weight)
        loss = loss + mean
        total = total + torch.cat([parameter.grad.flatten() for parameter in parameters])
        weights.append(weight)
        rows += share.rows.tolist() if weight else []
    assert (sum(weights), sorted(rows)) == (pytest.approx(1), list(range(B)))
    torch.testing.assert_close(loss, losses)
    torch.testing.assert_close(total, torch.cat([gradient.flatten() for gradient in whole]))


def test_a_process_without_rows_adds_zeros_whatever_its_loss(monkeypatch):
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad, unused = torch.tensor([1.0, torch.inf, torch.nan]), torch.nn.Parameter(torch.ones(2))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.add_(1))
    as_process(monkeypatch, 1, 2)
    assert devices.add_up_gradients([weight, unused], torch.tensor([torch.nan]), 0.0).tolist() == [1]
    assert (weight.grad.tolist(), unused.grad) == ([1, 1, 1], None)


@pytest.mark.parametrize("strategy", EXIT_STRATEGIES)
@pytest.mark.parametrize("N", [2, 20])
def test_each_process_predicts_a_share_and_gets_all(tiny, monkeypatch, N, strategy):
    model, some = tiny
    model, examples = MultiExitModel(model.encoder, (1, 4), 2, exit_strategy=strategy).eval(), some(N)
    monkeypatch.setattr(answers, "BATCH_SIZE", 3)
    whole = answers.all_logits(model, examples, None)
    with torch.no_grad():
        single = torch.cat([model(*examples.batch(np.array([row])).inputs) for row in range(N)], dim=1)
    torch.testing.assert_close(whole[0], single, atol=1e-5, rtol=0)  # in the order of the examples
    shares = []
    monkeypatch.setattr(answers, "all_gather", lambda share: shares.append(share) or shares)
    for rank in range(3):
        as_process(monkeypatch, rank, 3)
        logits, certainty = answers.all_logits(model, examples, None)
    assert [len(rows) for rows, _, _ in shares] == ([1, 0, 0] if N == 2 else [3, 2, 2])
    assert torch.equal(logits, whole[0])  # to the bit: the batches are those of one process
    assert certainty is whole[1] is None or torch.equal(certainty, whole[1])


OPTIONS = "--model tiny --train-size 161 --batch-size 8 --epochs 3 --exit-layers 0,1,2,4 --max-length 32 --lr 1e-4"
OPTIONS = [*OPTIONS.split(), "--amp", "off"]


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
@pytest.mark.parametrize("method", ["sweet", "ee", "mm", "branch"])
def test_processes_train_and_evaluate_as_one_does(tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "tiny", "bert", **NO_DROPOUT)
    options = [*OPTIONS, "--method", method]  # the last of 21 steps of an epoch has one row
    options += ["--class-weights", "balanced"] if method == "branch" else []
    assert run(0, "train.py", *options, "--out", "one").returncode == 0
    assert run(0, "evaluate.py", "one").returncode == 0
    for processes in (2, 3):
        done = run(processes, "train.py", *options, "--out", f"of{processes}")
        assert (done.returncode, done.stdout.count("trained in")) == (0, 1), done.stderr
        assert run(processes, "evaluate.py", f"of{processes}").returncode == 0
        close = {"rtol": 0, "atol": 1e-5 + 1e-6}  # run.json rounds losses to 1e-5
        torch.testing.assert_close(told_by(f"of{processes}"), told_by("one"), **close)


@pytest.mark.slow
def test_processes_stop_at_one_step_and_go_on_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "tiny", "bert")
    options = [*OPTIONS, "--epochs", "20"]
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
def test_bad_input_is_one_line_and_the_first_process_says_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "tiny", "bert")
    for options, message in ((["--lr", "1e30"], "the loss became"), (["--task", "q"], "'q'")):
        done = run(2, "train.py", *OPTIONS, "--out", "a", *options)
        assert done.returncode != 0
        assert message in done.stderr
        assert f'File "{CHECKOUT / "train.py"}"' not in done.stderr
    assert json.loads(Path("a/run.json").read_text())["diverged"] > 0
