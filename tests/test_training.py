"""The training loop, what each method trains, and the runs that train.py writes."""

import copy
import hashlib
import json
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import train
from minisweet import load_encoder
from minisweet.base.files import read_json
from minisweet.exits import METHODS
from minisweet.fast import used_rows
from minisweet.run import read_run
from minisweet.tasks import load_examples
from tests.conftest import model_of, models_of, quick, toy_examples, write_model
from train import fine_tune


def test_each_step_draws_dropout_anew(tmp_path):
    model = model_of(write_model(tmp_path / "tiny", "bert", hidden_dropout_prob=0.5), "ee", (1, 4))
    examples = toy_examples(tmp_path / "tiny", [0] * 8)  # one text, so that their order does not count
    settings = {"epochs": 2, "batch_size": 8, "lr": 1e-12}
    first, second = fine_tune(model, examples, **settings)
    assert first != pytest.approx(second)
    assert fine_tune(model.eval(), examples, **settings) == pytest.approx(np.array([first, second]))
    assert fine_tune(model, examples, **settings, seed=1) != pytest.approx(np.array([first, second]))


@pytest.mark.parametrize("method", ["sweet", "ee"])
def test_mixed_precision_gradients_are_those_of_float32(tmp_path, monkeypatch, method):
    """float16 gradients are unscaled before they are clipped."""
    folder, norms, clip = write_model(tmp_path / "tiny", "bert"), {}, train.clip_grad_norm_
    for precision in (None, torch.bfloat16, torch.float16):
        seen = norms.setdefault(precision, [])
        monkeypatch.setattr(train, "clip_grad_norm_", lambda own, limit, seen=seen: seen.append(clip(own, limit)))
        model = model_of(folder, method, (1, 4))
        settings = {"epochs": 1, "batch_size": 16, "lr": 1e-3}
        fine_tune(model, toy_examples(folder, range(16), 16), **settings, precision=precision)
    assert len({seen[0].item() for seen in norms.values()}) == 3
    assert norms[torch.float16][0].item() == pytest.approx(norms[None][0].item(), rel=0.05)
    assert norms[torch.bfloat16][0].item() == pytest.approx(norms[None][0].item(), rel=0.1)


def test_a_model_trains_alike_on_the_rows_in_use_and_an_error_leaves_all_rows_whole(model_dir):
    examples = toy_examples(model_dir, range(24))
    small, whole = (model_of(model_dir, "sweet") for _ in range(2))
    table, settings = small.encoder.word_embeddings, {"epochs": 1, "batch_size": 8, "lr": 1e-3}
    with used_rows(table, examples) as few:
        assert len(table.weight) == len({*np.concatenate(examples.ids), examples.pad_id}) < 60
        assert few.batch(np.arange(24)).input_ids.unique().tolist() == [*range(len(table.weight))]
        history = fine_tune(small, few, **settings)
    np.testing.assert_allclose(fine_tune(whole, examples, **settings), history, atol=1e-5)
    torch.testing.assert_close(small.state_dict(), whole.state_dict(), atol=1e-5, rtol=1e-4)
    unseen = np.setdiff1d(np.arange(60), [*np.concatenate(examples.ids), examples.pad_id])
    new = load_encoder(model_dir).word_embeddings.weight[unseen]
    assert torch.equal(whole.encoder.word_embeddings.weight[unseen], new)  # no weight decay
    before = copy.deepcopy(small.state_dict())
    with pytest.raises(FloatingPointError), used_rows(table, examples):
        raise FloatingPointError
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())


# What follows runs train.py.


@pytest.mark.parametrize("method", METHODS)
def test_a_run_tells_what_made_it(command, model_dir, method):
    options = ["--method", method, "--exit-layers", "1,2,4", "--seed", 3, "--pooling", "mean"]
    status, _, err = command(train, *quick(model_dir, *options, "--lr", "2e-3", "--amp", "bf16"))
    assert (status, "lr 0.002" in err) == (0, True)
    record = read_json(Path(f"runs/tiny-{method}-toy-seed3/run.json"))
    assert record["subset"] == sorted(np.random.default_rng(3).permutation(400)[:48].tolist())  # of all methods
    steps, exits = zip(*map(np.shape, record["losses"]), strict=True)
    assert ({*steps}, exits, record["exit_layers"]) == ({6}, (1, 1, 1) if method == "mm" else (3,), [1, 2, 4])
    models, rows = models_of(model_dir, method, seed=3, pooling="mean"), toy_examples(model_dir, record["subset"])
    settings = {"epochs": 2, "batch_size": 16, "lr": 2e-3, "seed": 3, "precision": torch.bfloat16}
    for model, losses in zip(models, record["losses"], strict=True):
        np.testing.assert_allclose(fine_tune(model, rows, **settings), losses, atol=1e-4)
    assert {"torch", "tokenizers", "python"} <= set(record["versions"])
    assert record["weights"] == hashlib.sha256((model_dir / "model.safetensors").read_bytes()).hexdigest()
    folder = Path(f"runs/tiny-{method}-toy-seed3")
    assert (read_json(folder / "config.json")["pooling"], "pooling" in record) == ("mean", False)  # in one place
    assert read_run(folder).examples("dev") == load_examples("toy", "dev", Path())


def test_an_existing_run_is_refused_before_training_and_replaced_only_at_the_end(command, tmp_path, monkeypatch):
    options = quick(write_model(tmp_path / "tiny", "bert"), "--out", "a")
    assert command(train, *options)[0] == 0
    before = {path: path.read_bytes() for path in Path("a").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(train, "fine_tune", Mock(side_effect=KeyboardInterrupt))
        status, _, err = command(train, *options)
        message = "train.py: error: --out: a holds a run already; name another folder, or pass --overwrite\n"
        assert (status, err) == (2, message)
        assert command(train, *options, "--overwrite", "--seed", 1)[0] == 130
    with monkeypatch.context() as patch:  # of two trainings into a new folder, the slower finds it at the end
        patch.setattr(train, "check_output", lambda *_: None)
        assert f"error: {tmp_path / 'a'}: already exists; name another\n" in command(train, *options, "--seed", 1)[2]
    assert {path: path.read_bytes() for path in Path("a").iterdir()} == before
    assert command(train, *options, "--overwrite", "--seed", 1)[0] == 0
    after = read_run(Path("a"))
    assert (after.seed, after.subset != json.loads(before[Path("a/run.json")])["subset"]) == (1, True)
    assert {*Path("a").iterdir()} == {*before}
    assert not list(Path().glob(".*"))


def test_a_training_that_diverges_is_one_line_and_leaves_what_was_there(command, tmp_path):
    model = write_model(tmp_path / "tiny", "bert")
    options = quick(model, "--lr", "1e30", "--out", "a")
    status, _, err = command(train, *options)
    message = "train.py: error: --lr: at 1e+30 the loss became infinite or NaN at step 2; try a lower one\n"
    assert (status, err.splitlines(True)[-1], Path("a").exists()) == (2, message, False)
    one_step = "--train-size", 16, "--epochs", 1, "--lr", "1e39"  # no loss sees the last update
    assert "the weights became infinite or NaN at step 1; try a lower" in command(train, *options, *one_step)[2]
    assert command(train, *quick(model, "--out", "a", "--overwrite"))[0] == 0
    assert command(train, *options, "--overwrite")[0] == 2
    assert read_run(Path("a")).lr != 1e30
