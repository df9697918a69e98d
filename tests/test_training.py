"""The training loop, what each method trains, what a trunk keeps, and what run.json tells of it."""

import copy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import train
from minisweet import BranchModel, MultiExitModel, training
from minisweet.base.files import read_json
from minisweet.exits import EXIT_STRATEGIES
from minisweet.methods import METHODS
from minisweet import recipe
from minisweet.options import epochs_of
from minisweet.run import Run
from minisweet.training import fine_tune, used_rows
from minisweet.classifier import fit
from tests import conftest
from tests.conftest import (
    NO_DROPOUT,
    in_folder,
    model_of,
    quick,
    random_batch,
    run,
    toy_examples,
    train_on,
    write_model,
)


def test_where_branches_are_trained_the_trunk_runs_without_dropout_and_as_far_as_it_must(tmp_path, model_type):
    folder = write_model(tmp_path / "tiny", model_type, hidden_dropout_prob=0.3)
    model, ran = model_of(folder, "branch", (1, 3, 4)).eval(), []
    model.encoder.layers[2].register_forward_hook(lambda *_: ran.append(1))
    assert np.shape(train_on(toy_examples(folder, range(20)), model, 1e-2)) == (5, 2)
    assert not ran  # the trunk's layer 3, which no branch reads
    new = BranchModel(copy.deepcopy(model.encoder).train(), (1, 4), 2)
    assert (new.encoder.training, new.branches[0].training) == (False, True)
    one, other = model(*random_batch()), model(*random_batch())
    assert torch.equal(one[-1], other[-1])
    assert (one[:-1] != other[:-1]).flatten(1).any(1).all()


@pytest.mark.parametrize("method", ["sweet", "ee"])
def test_mixed_precision_gradients_are_those_of_float32(tmp_path, monkeypatch, method):
    """float16 gradients are unscaled before they are clipped."""
    folder, norms, clip = write_model(tmp_path / "tiny", "bert"), {}, training.clip_grad_norm_
    for precision in (None, torch.bfloat16, torch.float16):
        seen = norms.setdefault(precision, [])
        monkeypatch.setattr(training, "clip_grad_norm_", lambda own, limit, seen=seen: seen.append(clip(own, limit)))
        model = model_of(folder, method, (1, 4)).eval()
        train_on(toy_examples(folder, range(16), 16), model, 1e-3, 16, precision=precision)
    assert norms[torch.float16][0].item() == pytest.approx(norms[None][0].item(), rel=0.05)
    assert norms[torch.bfloat16][0].item() == pytest.approx(norms[None][0].item(), rel=0.1)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.booleans())
def test_balanced_classes_weigh_the_same_and_all_rows_together_as_much_as_before(labels, are_probabilities):
    N, classes, rows = len(labels), len({*labels}), np.eye(4)[labels]
    rows = rows * 0.6 + 0.1 if are_probabilities else rows  # of a trunk, whose answers are the classes
    weighted = recipe.weighted(np.full(4, np.nan), rows if are_probabilities else np.array(labels))
    weights = weighted.sum(1)
    np.testing.assert_allclose(weighted, rows * weights[:, None], rtol=1e-5)
    for label in {*labels}:
        its = weights[np.array(labels) == label]
        np.testing.assert_allclose(its, N / (classes * len(its)), rtol=1e-5)


def test_with_the_rows_in_use_alone_a_model_trains_as_with_all_and_an_error_leaves_them_whole(model_dir):
    examples = toy_examples(model_dir, range(24))
    few, whole = (model_of(model_dir, "sweet") for _ in range(2))
    history = train_on(examples, few, 1e-3, 8)
    batches = list(examples.shuffled(8, 0, 0))
    np.testing.assert_allclose(fine_tune(whole, batches, 3, 1e-3), history, atol=1e-5)
    torch.testing.assert_close(few.state_dict(), whole.state_dict(), atol=1e-5, rtol=1e-4)
    before = copy.deepcopy(few.state_dict())
    with used_rows(few, examples) as row_of:
        ids = torch.cat([batch.input_ids.flatten() for batch in batches])
        assert row_of[ids].unique().tolist() == [*range(len(few.encoder.word_embeddings.weight))]
    with pytest.raises(FloatingPointError), used_rows(few, examples):
        raise FloatingPointError
    assert all(torch.equal(tensor, before[name]) for name, tensor in few.state_dict().items())


# What follows runs train.py, or `minisweet fit` on 300 rows of random words.


def weights_of(run: str | Path) -> dict[str, torch.Tensor]:
    """A run's weights."""
    return load_file(Path(run, "model.safetensors"))


@pytest.fixture
def trained(command):
    """Run train.py or another command, which must go well; gives what it prints."""

    def run_and_read(*arguments, module=train) -> str:
        status, out, err = command(module, *arguments)
        assert status == 0, err
        return out + err

    return run_and_read


@pytest.fixture
def fitted(trained):
    """Run `minisweet fit` on own.csv, or on other files."""
    conftest.write_table(Path("own.csv"), ["text", "label"], {"label": ["negative", "positive"]})

    def run_and_read(*arguments, file=("own.csv",)) -> str:
        return trained(*file, *"--epochs 1 --batch-size 512 --max-length 32".split(), *arguments, module=fit)

    return run_and_read


@pytest.mark.parametrize("method", METHODS)
def test_a_run_tells_what_made_it(trained, model_dir, method):
    layers = [4] if method == "plain" else [1, 2, 4]
    options = ["--method", method, "--exit-layers", ",".join(map(str, layers)), "--seed", 3]
    assert "lr 0.0002" in trained(*quick(model_dir, *options))
    record = read_json(Path(f"runs/tiny-{method}-toy-seed3/run.json"))
    assert len(record["subset"]) == 48 == len(set(record["subset"]))
    steps, exits = zip(*map(np.shape, record["losses"].values()), strict=True)
    assert ({*steps}, sum(exits), record["exit_layers"]) == ({6}, len(layers), layers)
    stages = {"mm": ["layers 1", "layers 2", "layers 4"], "branch": ["trunk", "branches"], "plain": ["trunk"]}
    assert list(record["stages"]) == stages.get(method, [method])
    assert record["trained_keys"] == sorted({*toy_examples(model_dir, record["subset"]).keys.tolist()})
    assert {"torch", "tokenizers", "python"} <= set(record["versions"])


class LastCountsTwice(MultiExitModel):
    """EE, but the last exit's loss counts twice."""

    def sum_losses(self, losses):
        return super().sum_losses(losses) + losses[-1]


def test_a_row_adds_a_method(tmp_path, monkeypatch):
    """The other exits get another share of the gradient."""
    monkeypatch.setitem(METHODS, "twice", METHODS["ee"]._replace(build=partial(LastCountsTwice, method="ee")))
    folder = write_model(tmp_path, "bert", **NO_DROPOUT)
    models = [model_of(folder, method) for method in ("ee", "twice")]
    ee, twice = (train_on(toy_examples(folder, range(8)), model, 1e-2) for model in models)
    assert twice[0] == ee[0]
    assert not np.allclose(twice[1], ee[1], atol=1e-4)


def test_a_training_that_diverges_leaves_its_step_but_no_weights(command, tmp_path):
    model = write_model(tmp_path / "tiny", "bert")
    options = quick(model, "--lr", "1e30", "--out", "a")
    status, _, err = command(train, *options)
    message = "train.py: error: --lr: at 1e+30 the loss became infinite or NaN at step 2; try a lower one\n"
    assert (status, err.splitlines(True)[-1]) == (2, message)
    assert [path.name for path in Path().glob("*a*/*")] == ["run.json"]  # no weights, and no checkpoint
    record = Run.read(Path("a")).record
    assert (record.diverged, record.arguments.lr) == (2, 1e30)
    at_the_end = command(train, *options, "--train-size", 1, "--epochs", 1, "--lr", "1e39", "--overwrite")
    assert (at_the_end[0], "NaN at step 1; try a lower one" in at_the_end[2]) == (2, True)
    assert command(train, *quick(model, "--out", "a", "--overwrite"))[0] == 0
    assert command(train, *options, "--overwrite")[0] == 2
    assert Run.read(Path("a")).record.diverged is None  # a run with weights stays


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run with exits 0 and 4, of the model in the folder `tiny` beside it."""
    folder = tmp_path_factory.mktemp("plain")
    model = write_model(folder / "tiny", "bert")
    with in_folder(folder):
        assert run(train, *quick(model, "--exit-layers", "0,4", "--method", "sweet", "--out", "plain")) == 0
    return folder / "plain"


@pytest.mark.parametrize("method", ["sweet", "mm", "branch"])
def test_exit_0_beside_others_changes_none_of_them(trained, plain, method):
    """It is the same bag of words with the other exits and without, and they are the same with it and without."""
    for layers in ("0,2,4", "2,4"):
        trained(*quick(plain.with_name("tiny"), "--exit-layers", layers, "--method", method, "--out", f"run-{layers}"))
    both, without, alone = map(weights_of, ("run-0,2,4", "run-2,4", plain))
    ngrams = {name for name in both if name.startswith("ngrams.")}
    assert ngrams
    assert both.keys() - ngrams == without.keys()
    assert all(torch.equal(both[name], without[name]) for name in without)
    assert all(torch.equal(both[name], alone[name]) for name in ngrams)


@pytest.mark.parametrize("method", METHODS)
def test_a_trunk_gets_exit_0_and_stays_as_it_is(fitted, plain, method):
    """The trunk has exit 0 itself; another one is fitted."""
    said = fitted("--trunk", plain, "--method", method, "--exit-layers", "0,4", "--out", "run")
    assert "no layer is trained: the trunk stays as it is" in said
    before, after = map(weights_of, (plain, "run"))
    after = {name.removeprefix("models.0."): tensor for name, tensor in after.items()}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert moved
    assert all(name.startswith("ngrams.") for name in moved)
    record = read_json(Path("run/run.json"))
    assert (record["losses"], list(record["stages"]), record["exit_layers"]) == ({}, ["exit 0"], [0, 4])
    assert set(read_json(plain / "run.json")["trained_keys"]) < set(record["trained_keys"])


@pytest.mark.parametrize("strategy", EXIT_STRATEGIES)
def test_a_trunk_is_a_plain_model_to_the_bit_wherever_it_comes_from(trained, fitted, tmp_path, strategy):
    write_model(tmp_path / "tiny", "bert")
    new, exits = ["--model", "tiny"], ["--exit-layers", "1,2,4"]
    runs = {
        "mm": [*new, *exits, "--method", "mm"],
        "one": [*new, "--method", "sweet", "--exit-layers", 4],
        "branch": [*new, *exits, "--method", "branch"],
    }
    if is_own_text := strategy == "confidence":
        runs |= {
            "on-mm": ["--trunk", "mm", *exits, "--method", "branch"],
            "on-one": ["--trunk", "one", *exits, "--method", "branch"],
            "on-branch": ["--trunk", "branch", *exits, "--method", "branch"],
            "mm-on": ["--trunk", "one", *exits, "--method", "mm"],
            "ee-on": ["--trunk", "one", *exits, "--method", "ee"],
        }
    for out, arguments in runs.items():
        options = [*arguments, "--lr", "1e-3", "--seed", 3, "--out", out]
        fitted(*options) if is_own_text else trained(*quick("tiny", *options, "--exit-strategy", strategy))
    weights = {path.parent.name: load_file(path) for path in tmp_path.glob("*/model.safetensors")}
    ours, mm = weights["branch"], weights["mm"]
    trunk = {name for name in ours if name.startswith(("encoder.", "heads.2."))}
    for name in trunk:
        assert torch.equal(ours[name], mm[f"models.2.{name.replace('heads.2.', 'heads.0.')}"]), name
        assert torch.equal(ours[name], weights["one"][name.replace("heads.2.", "heads.0.")]), name
    assert len(trunk) == len([name for name in mm if name.startswith("models.2.")])
    assert ("heads.0.lte.weight" in ours) is (strategy == "lte")
    if is_own_text:
        for name in ("on-mm", "on-one", "on-branch"):
            assert weights[name].keys() == ours.keys()
            assert all(torch.equal(weights[name][key], ours[key]) for key in ours), name
        assert all(torch.equal(weights["mm-on"][key], mm[key]) for key in mm if key.startswith("models.2."))
        last = "encoder.layers.3.output.weight"  # EE goes on training the trunk
        assert not torch.equal(weights["ee-on"][last], ours[last])


@pytest.mark.parametrize("file", ["own.csv", "--unlabelled"])
def test_branches_and_exit_0_learn_the_same_balanced_labels_or_what_the_trunk_says(fitted, tmp_path, monkeypatch, file):
    """The trunk answers without dropout. In balance each class weighs the same."""
    write_model(tmp_path / "tiny", "bert", hidden_dropout_prob=0.3)
    fitted("--model", "tiny", "--method", "plain", "--exit-layers", 4, "--lr", "1e-3", "--out", "one")
    seen = {}

    def spy_on(module, name: str) -> None:
        call = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, **more: seen.update({name: given}) or call(*given, **more))

    spy_on(training, "exit_loss")
    spy_on(recipe, "fit_ngrams")
    options = ["--trunk", "one", "--method", "branch", "--exit-layers", "0,2,4", "--class-weights", "balanced"]
    fitted(*options, "--out", "a", file=[file] if file == "own.csv" else [file, "own.csv"])
    (_, inputs, exit_0, *_), (*_, branches) = seen["fit_ngrams"], seen["exit_loss"]
    torch.testing.assert_close(branches.sort(0).values, exit_0.sort(0).values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(exit_0.sum(), torch.tensor(float(len(exit_0))))
    with torch.no_grad():
        said = torch.cat([Run.read(Path("one")).model(*batch)[0].softmax(-1) for batch in inputs])
    if file == "--unlabelled":
        expected = torch.from_numpy(recipe.weighted(np.full(2, np.nan), said.numpy()))
        torch.testing.assert_close(exit_0, expected, atol=1e-5, rtol=1e-5)
    else:
        torch.testing.assert_close(exit_0.sum(0), torch.full((2,), len(exit_0) / 2))


def test_own_texts_epochs_follow_from_what_a_stage_learns(trained, tmp_path, monkeypatch):
    """Labelled texts, pairs, and teachers' answers to other texts, which are more than the labels."""
    write_model(tmp_path / "tiny", "bert")
    for name, *columns in (("own", "text"), ("more", "text"), ("most", "text"), ("pairs", "sentence1", "sentence2")):
        conftest.write_table(Path(f"{name}.csv"), [*columns, "label"], {"label": ["a", "b", "c"]})
    monkeypatch.setattr(recipe, "MOST_AGAIN", 400)
    steps, options = [], "--model tiny --max-length 32 --batch-size 4 --overwrite --out run".split()
    monkeypatch.setattr(recipe, "fine_tune", lambda model, bar, count, *_: steps.append(count))
    for words in ("own.csv --unlabelled more.csv --unlabelled most.csv --method branch", "pairs.csv"):
        trained(*words.split(), *options, module=fit)
    rows, all_rows = 240, 240 + 480  # of 300, and of 600 others
    expected = [(rows, epochs_of(rows, 4, 3)), (rows + 400, recipe.EPOCHS_AGAIN)]
    expected += [(all_rows, epochs_of(all_rows, 4, 3, False)), (rows, epochs_of(rows, 4, 3, False))]
    assert steps == [epochs * some // 4 for some, epochs in expected]
