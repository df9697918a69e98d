"""The comparison of the exits' gradients."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from minisweet import MultiExitModel
from minisweet.data import toy
from minisweet.data.text import Batch, TokenizedExamples
from minisweet.paper import gradients
from minisweet.paper.gradients import exit_similarities
from minisweet.runs.folders import read_record
from tests.conftest import quick, random_batch, tiny_encoder, write_model


def test_similarities_are_those_of_separate_backward_passes(model_type):
    model = MultiExitModel(tiny_encoder(model_type), (1, 3, 4), 2, "ee").eval()
    inputs, labels = random_batch(), torch.tensor([0, 1, 1, 0])
    similarity = exit_similarities(model, Batch(torch.arange(4), *inputs, labels))
    assert similarity.shape == (2, 3, 3)
    found = {}
    for k, (logits, _) in enumerate(model.exit_by_exit(*inputs)):
        model.zero_grad()
        F.cross_entropy(logits, labels).backward(retain_graph=True)
        for m, layer in enumerate((1, 3)):
            gradient = model.encoder.layers[layer - 1].output.weight.grad
            found[m, k] = None if gradient is None else gradient.clone()
    for m, i, j in np.ndindex(similarity.shape):
        if i < m or j < m:  # an exit below the layer
            assert np.isnan(similarity[m, i, j])
        else:
            expected = F.cosine_similarity(found[m, i], found[m, j], dim=1).mean().item()
            assert similarity[m, i, j] == pytest.approx(expected, abs=1e-5)
            assert similarity[m, i, j] == pytest.approx(1) if i == j else similarity[m, i, j] < 0.999


def test_the_command_writes_the_mean_of_the_runs_and_passes_exit_0_over(command, tmp_path, monkeypatch):
    model, measured, single = write_model(tmp_path / "tiny", "bert"), [], []
    for seed in ("0", "1"):
        words = ["--method", "ee", "--exit-layers", "0,1,2,4", "--lr", "1e-3", "--seed", seed, "--out", f"run{seed}"]
        assert command(train, *quick(model, *words))[0] == 0

    def tokenize(tokenizer, examples):
        measured.append(examples.first)
        return TokenizedExamples(tokenizer, examples)

    def compare(model, batch):
        assert not model.training  # dropout is off
        single.append(exit_similarities(model, batch))
        return single[-1]

    monkeypatch.setattr(gradients, "TokenizedExamples", tokenize)
    monkeypatch.setattr(gradients, "exit_similarities", compare)
    assert command(gradients, "run0", "run1", "--batches", 2)[0] == 0
    sentences, *_ = toy.make_toy("train")
    for seed in (0, 1):
        trained = [sentences[row] for row in read_record(Path(f"run{seed}")).subset]
        assert len({*measured[seed], *trained}) == 32 + len(trained)  # no row that was trained on
    report = json.loads(Path("gradients/gradients.json").read_text())
    assert (report["layers"], report["exits"], report["steps"], report["seeds"]) == ([1, 2], [1, 2, 4], 6, [0, 1])
    assert report["cosine"][1][0] == [None, None, None]
    values = np.array([similarity[0, 0, 1] for similarity in single]).reshape(2, 2)  # (runs, batches)
    assert report["cosine"][0][0][1] == report["cosine"][0][1][0] == pytest.approx(values.mean(), abs=1e-4)
    assert report["deviation"][0][0][1] == pytest.approx(values.mean(1).std(ddof=1), abs=1e-4)
    assert command(gradients, "run0", "--batches", 2)[0] == 0
    assert {path.name for path in Path("gradients").iterdir()} == {"gradients.json", "gradients.png"}
    deviation = json.loads(Path("gradients/gradients.json").read_text())["deviation"][0][0][1]
    assert deviation == pytest.approx(values[0].std(ddof=1), abs=1e-4)  # of one run over its batches


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({"task": "mnli", "text_columns": ["a", "b"]}, ["own"], "own: a run of ee on mnli (own text), exits after"),
        ({"seed": 1, "lr": 0.1}, ["ee", "own"], "own: its lr is 0.1, should be 0.003 as ee's"),
    ],
)
def test_own_text_is_no_task_and_a_mean_is_of_equal_runs(run_of, command, changes, words, message):
    shutil.copytree(run_of("ee"), "ee")
    content = json.loads(Path("ee/run.json").read_text())
    Path(shutil.copytree("ee", "own"), "run.json").write_text(json.dumps(content | changes))
    status, _, err = command(gradients, *words)
    assert (status, err.count("\n"), message in err, Path("gradients").exists()) == (2, 1, True, False), err
