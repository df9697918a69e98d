"""The training loop, what each method trains, and the runs that train.py writes."""

import copy
import hashlib
import json
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import train
from minisweet import fast, load_encoder, training
from minisweet.base.files import read_json
from minisweet.fast import used_rows
from minisweet.methods import METHODS
from minisweet.run import read_record, read_validation
from minisweet.tasks import load_examples
from minisweet.training import fine_tune
from tests.conftest import model_of, quick, toy_examples, write_model


def test_each_step_draws_dropout_anew(tmp_path):
    model = model_of(write_model(tmp_path / "tiny", "bert", hidden_dropout_prob=0.5), "ee", (1, 4))
    examples = toy_examples(tmp_path / "tiny", [0] * 8)  # one text, so that their order does not count
    first, second = fine_tune(model, examples, 2, 8, 1e-12)
    assert first != pytest.approx(second)
    assert fine_tune(model, examples, 2, 8, 1e-12) == pytest.approx(np.array([first, second]))
    assert fine_tune(model, examples, 2, 8, 1e-12, seed=1) != pytest.approx(np.array([first, second]))


@pytest.mark.parametrize("method", ["sweet", "ee"])
def test_mixed_precision_gradients_are_those_of_float32(tmp_path, monkeypatch, method):
    """float16 gradients are unscaled before they are clipped."""
    folder, norms, clip = write_model(tmp_path / "tiny", "bert"), {}, training.clip_grad_norm_
    for precision in (None, torch.bfloat16, torch.float16):
        seen = norms.setdefault(precision, [])
        monkeypatch.setattr(training, "clip_grad_norm_", lambda own, limit, seen=seen: seen.append(clip(own, limit)))
        model = model_of(folder, method, (1, 4))
        fine_tune(model, toy_examples(folder, range(16), 16), 1, 16, 1e-3, precision=precision)
    assert len({seen[0].item() for seen in norms.values()}) == 3
    assert norms[torch.float16][0].item() == pytest.approx(norms[None][0].item(), rel=0.05)
    assert norms[torch.bfloat16][0].item() == pytest.approx(norms[None][0].item(), rel=0.1)


def test_a_model_trains_alike_on_the_rows_in_use_and_an_error_leaves_all_rows_whole(model_dir, monkeypatch):
    examples = toy_examples(model_dir, range(24))
    few, whole = (model_of(model_dir, "sweet") for _ in range(2))
    history = fine_tune(few, examples, 1, 8, 1e-3)
    with monkeypatch.context() as patch:
        patch.setattr(fast, "used_rows", lambda table, _: nullcontext(torch.arange(len(table.weight))))
        np.testing.assert_allclose(fine_tune(whole, examples, 1, 8, 1e-3), history, atol=1e-5)
    torch.testing.assert_close(few.state_dict(), whole.state_dict(), atol=1e-5, rtol=1e-4)
    unseen = np.setdiff1d(np.arange(60), [*np.concatenate(examples.ids), examples.pad_id])
    new = load_encoder(model_dir).word_embeddings.weight[unseen]
    assert torch.equal(whole.encoder.word_embeddings.weight[unseen], new)  # no weight decay
    before = copy.deepcopy(few.state_dict())
    table, ids = few.encoder.word_embeddings, np.concatenate(examples.ids)
    with used_rows(table, ids) as row_of:
        assert row_of[ids].unique().tolist() == [*range(len(table.weight))]
    with pytest.raises(FloatingPointError), used_rows(table, ids):
        raise FloatingPointError
    assert all(torch.equal(tensor, before[name]) for name, tensor in few.state_dict().items())


# What follows runs train.py.


@pytest.mark.parametrize("method", METHODS)
def test_a_run_tells_what_made_it(command, model_dir, method):
    options = ["--method", method, "--exit-layers", "1,2,4", "--seed", 3, "--pooling", "mean"]
    status, _, err = command(train, *quick(model_dir, *options, "--lr", "2e-3", "--amp", "bf16"))
    assert (status, "lr 0.002" in err) == (0, True)
    record = read_json(Path(f"runs/tiny-{method}-toy-seed3/run.json"))
    assert record["subset"] == sorted(np.random.default_rng(3).permutation(400)[:48].tolist())  # of all methods
    steps, exits = zip(*map(np.shape, record["losses"].values()), strict=True)
    assert ({*steps}, sum(exits), record["exit_layers"]) == ({6}, 3, [1, 2, 4])
    assert list(record["losses"]) == (["layers 1", "layers 2", "layers 4"] if method == "mm" else [method])
    model, rows = model_of(model_dir, method, seed=3, pooling="mean"), toy_examples(model_dir, record["subset"])
    for part, losses in zip(model.models_alone, record["losses"].values(), strict=True):
        again = fine_tune(part, rows, 2, 16, 2e-3, seed=3, precision=torch.bfloat16)
        np.testing.assert_allclose(again, losses, atol=1e-4)
    assert record["trained_keys"] == sorted({*toy_examples(model_dir, record["subset"]).keys.tolist()})
    assert {"torch", "tokenizers", "python"} <= set(record["versions"])
    assert record["weights"] == hashlib.sha256((model_dir / "model.safetensors").read_bytes()).hexdigest()
    folder = Path(f"runs/tiny-{method}-toy-seed3")
    assert read_json(folder / "config.json")["pooling"] == "mean"
    assert read_validation(folder, read_record(folder)).first == load_examples("toy", "dev", Path()).first


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
    after = read_record(Path("a"))
    assert (after.arguments.seed, after.subset != json.loads(before[Path("a/run.json")])["subset"]) == (1, True)
    assert {*Path("a").iterdir()} == {*before}
    assert not list(Path().glob(".*"))


def test_a_training_that_diverges_is_one_line_and_leaves_what_was_there(command, tmp_path):
    model = write_model(tmp_path / "tiny", "bert")
    options = quick(model, "--lr", "1e30", "--out", "a")
    status, _, err = command(train, *options)
    message = "train.py: error: --lr: at 1e+30 the loss became infinite or NaN at step 2; try a lower one\n"
    assert (status, err.splitlines(True)[-1], Path("a").exists()) == (2, message, False)
    assert command(train, *quick(model, "--out", "a", "--overwrite"))[0] == 0
    assert command(train, *options, "--overwrite")[0] == 2
    assert read_record(Path("a")).arguments.lr != 1e30
