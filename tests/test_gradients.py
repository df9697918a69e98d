"""The comparison of the exits' gradients."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from minisweet import MultiExitModel
from minisweet.base.files import read_json, write_json
from minisweet.paper import gradients
from minisweet.paper.gradients import exit_similarities
from minisweet.tasks import load_examples
from minisweet.texts import Batch
from tests.benchmark import read_rows
from tests.conftest import quick, random_batch, tiny_encoder, write_model


def test_similarities_are_those_of_separate_backward_passes(model_type):
    model = MultiExitModel(tiny_encoder(model_type), (1, 3, 4), 2, "ee").eval()
    inputs, labels = random_batch(), torch.tensor([0, 1, 1, 0])
    similarity = exit_similarities(model, Batch(torch.arange(4), *inputs, labels))
    assert similarity.shape == (2, 3, 3)
    weights, found = [model.encoder.layers[n - 1].output.weight for n in (1, 3)], []
    for logits, _ in model(*inputs):
        loss = F.cross_entropy(logits, labels)
        found.append(torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True))
    for m, i, j in np.ndindex(similarity.shape):
        if i < m or j < m:  # an exit below the layer
            assert np.isnan(similarity[m, i, j])
        else:
            expected = F.cosine_similarity(found[i][m], found[j][m], dim=1).mean().item()
            assert similarity[m, i, j] == pytest.approx(expected, abs=1e-5)
            assert similarity[m, i, j] == pytest.approx(1) if i == j else similarity[m, i, j] < 0.999


def test_the_command_writes_the_mean_of_the_runs(command, tmp_path, monkeypatch):
    model, runs = write_model(tmp_path / "tiny", "bert"), (Path("run0"), Path("run1"))
    for seed, run in enumerate(runs):
        assert command(train, *quick(model, "--method", "ee", "--lr", "1e-3", "--seed", seed, "--out", run))[0] == 0
    found = np.stack([gradients.similarities_of_run(run, 2, tmp_path) for run in runs])
    one = found[0]  # of one run the deviation is that of its batches
    for named, mean, parts in ((runs, found.mean((0, 1)), found.mean(1)), (runs[:1], one.mean(0), one)):
        assert command(gradients, *named, "--batches", 2)[0] == 0
        rows = read_rows(Path("gradients.csv"))
        places = [(row["layer"], row["exit"], row["other"]) for row in rows]
        assert places == [("1", "1", "2"), ("1", "1", "4"), ("1", "2", "4"), ("2", "2", "4")]
        for name, values in (("cosine", mean), ("deviation", parts.std(0, ddof=1))):
            expected = [values[0, 0, 1], values[0, 0, 2], values[0, 1, 2], values[1, 1, 2]]
            np.testing.assert_allclose([float(row[name]) for row in rows], expected, atol=1e-4)
    assert "99 of 16 rows, and toy has 352 other rows" in command(gradients, *runs, "--batches", 99)[2]
    record = read_json(runs[1] / "run.json")
    write_json(runs[1] / "run.json", record | {"lr": 1.0})
    assert "run1 is of another task or has other options than run0" in command(gradients, *runs, "--batches", 2)[2]
    write_json(runs[1] / "run.json", record)
    monkeypatch.setattr("minisweet.run.load_examples", lambda task, _, folder: load_examples(task, "dev", folder))
    assert "its train rows of toy are not those of the training" in command(gradients, *runs, "--batches", 2)[2]
