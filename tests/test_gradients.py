"""The comparison of the exits' gradients."""

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from minisweet import MultiExitModel, load_encoder
from minisweet.base.commands import run_command
from minisweet.data.text import Batch, TokenizedExamples
from minisweet.paper import gradients
from minisweet.paper.gradients import exit_similarities, row_similarity
from minisweet.runs.folders import load_run
from tests.conftest import random_batch, tiny_encoder, write_model


def test_row_similarity_of_a_case_worked_out_by_hand():
    a = torch.tensor([[1.0, 0.0], [1.0, 1.0], [3.0, 4.0], [0.0, 0.0], [1.0, 2.0]])
    b = torch.tensor([[0.0, 2.0], [-2.0, -2.0], [4.0, 3.0], [1.0, 0.0], [0.0, 0.0]])
    mean, left_out = row_similarity(a, b)  # 0, -1, 24/25; two rows have no direction
    assert mean == pytest.approx((0 - 1 + 24 / 25) / 3)
    assert left_out == 2
    assert row_similarity(a, 5 * a) == (pytest.approx(1), 1)
    assert np.isnan(row_similarity(a, torch.zeros_like(a))[0])


@pytest.mark.parametrize("model_type", ["bert", "deberta"])
def test_similarities_are_those_of_separate_backward_passes(model_type):
    model = MultiExitModel(tiny_encoder(model_type), (1, 3, 4), 2, "ee").eval()
    inputs, labels = random_batch(), torch.tensor([0, 1, 1, 0])
    similarity, left_out = exit_similarities(model, Batch(torch.arange(4), *inputs, labels))
    assert similarity.shape == left_out.shape == (2, 3, 3)
    found = {}
    for k in range(3):
        model.zero_grad()
        F.cross_entropy(model(*inputs)[k], labels).backward()
        for m, layer in enumerate((1, 3)):
            gradient = model.encoder.layers[layer - 1].output.weight.grad
            found[m, k] = None if gradient is None else gradient.clone()
    for m in range(2):
        for i in range(3):
            for j in range(3):
                if i < m or j < m:  # an exit below the layer
                    assert np.isnan(similarity[m, i, j])
                else:
                    expected = F.cosine_similarity(found[m, i], found[m, j], dim=1).mean().item()
                    assert similarity[m, i, j] == pytest.approx(expected, abs=1e-5)
                    assert similarity[m, i, j] == pytest.approx(1) if i == j else similarity[m, i, j] < 0.999


def test_under_sweet_only_one_exit_reaches_a_matrix(model_dir):
    model = MultiExitModel(load_encoder(model_dir), (1, 3, 4), 2, "sweet").eval()
    similarity, _ = exit_similarities(model, Batch(torch.arange(4), *random_batch(), torch.tensor([0, 1, 1, 0])))
    there = np.argwhere(~np.isnan(similarity)).tolist()
    assert there == [[0, 0, 0], [1, 1, 1]]


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run the command in an empty folder: its exit status, standard output and standard error.

    Its training, which would be a process, runs in this one, which is faster.
    """
    monkeypatch.chdir(tmp_path)
    model = write_model(tmp_path / "tiny", "bert")

    def in_process(script: str, arguments: list[str]) -> int:
        assert script == "train.py"
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [script, *arguments])
            try:
                run_command(train.main)
            except SystemExit as exit_:
                return exit_.code
        return 0

    monkeypatch.setattr(gradients, "run_script", in_process)

    def run(*arguments) -> tuple[int, str, str]:
        options = ["--model", model, "--task", "toy", "--exit-layers", "1,3,4", "--max-length", 32, *arguments]
        monkeypatch.setattr(sys, "argv", ["gradients.py", *map(str, options)])
        status = 0
        try:
            run_command(gradients.main)
        except SystemExit as exit_:
            status = exit_.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_the_command_writes_what_it_measured(command, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    measured, trained, single = [], [], []

    def tokenize(tokenizer, examples, chosen):
        measured.append(chosen.tolist())
        return TokenizedExamples(tokenizer, examples, chosen)

    def load(run):
        model, record = load_run(run)
        trained.append(record.subset)
        return model, record

    def measure(model, batch):
        assert not model.training  # dropout is off
        single.append(exit_similarities(model, batch))
        return single[-1]

    monkeypatch.setattr(gradients, "TokenizedExamples", tokenize)
    monkeypatch.setattr(gradients, "load_run", load)
    monkeypatch.setattr(gradients, "exit_similarities", measure)
    status, out, _ = command("--steps", 3, "--batches", 2, "--lr", 1e-3)
    assert status == 0
    assert (len(measured[0]), len(trained[0])) == (32, 48)  # two batches to measure on, three to train on
    assert len(set(measured[0] + trained[0])) == 80  # which share no row
    values = [similarity[0, 0, 1] for similarity, _ in single]
    report = json.loads((tmp_path / "gradients" / "gradients.json").read_text())
    assert (report["layers"], report["exits"]) == ([1, 3], [1, 3, 4])
    assert np.shape(report["cosine"]) == np.shape(report["deviation"]) == (2, 3, 3)
    assert report["cosine"][1][0] == [None, None, None]
    assert report["cosine"][0][0][0] == 1
    assert abs(report["cosine"][0][0][1]) < 1
    assert report["cosine"][0][0][1] == report["cosine"][0][1][0]
    assert report["cosine"][0][0][1] == pytest.approx(np.mean(values), abs=1e-4)
    assert report["deviation"][0][0][1] == pytest.approx(abs(values[0] - values[1]) / np.sqrt(2), abs=1e-4)
    assert not report["nothing_to_conflict"]
    assert "layer 3: cosine similarity" in out
    assert {path.name for path in (tmp_path / "gradients").iterdir()} == {"gradients.json", "gradients.png"}
    assert (tmp_path / "gradients" / "gradients.png").read_bytes().startswith(b"\x89PNG")

    status, _, err = command()
    assert (status, "pass --overwrite" in err) == (2, True)
    status, out, _ = command("--method", "sweet", "--steps", 1, "--batches", 1, "--overwrite")
    assert (status, "there is nothing to conflict" in out) == (0, True)
    assert json.loads((tmp_path / "gradients" / "gradients.json").read_text())["nothing_to_conflict"]
    (tmp_path / "file").touch()
    status, out, err = command("--out", "file", "--steps", 1)
    assert (status, out, "File exists" in err) == (2, "", True)


def test_a_training_that_fails_has_said_why(command):
    status, _, err = command("--steps", 2, "--batches", 1, "--lr", 1e30)
    assert (status, err.splitlines()[-1].count("--lr: at 1e+30 the loss is")) == (2, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", 10**6], "--steps: 1000000 steps and 10 new batches of 16 need 16000160 examples, and toy has"),
        (["--exit-layers", "4"], "--exit-layers: 4 is one exit"),
        (["--method", "mm"], "--method"),
    ],
)
def test_bad_input_is_one_line(command, arguments, message):
    status, out, err = command(*arguments)
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
