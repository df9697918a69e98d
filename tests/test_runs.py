"""Run folders, where what is read is what was saved; and what a training starts from that a user need not give."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train
from minisweet import MultiExitModel
from minisweet.base.files import read_json, write_json
from minisweet.data.tasks import default_learning_rate, search_rates
from minisweet.data.text import Examples
from minisweet.methods import METHODS, exit_layers_for
from minisweet.runs.folders import load_run, load_trunk, read_operating_point, read_validation, save_run
from minisweet.runs.start import EPOCHS, STEPS, epochs_of
from minisweet.use import fit
from tests.conftest import random_batch, undecided_model, with_exit_0, write_model
from tests.test_rows import refused

ROWS = Examples(["the film", 'a "bad"\n\u2028 film'], None, [1, 0], ["one polar word", "contrast"])


@pytest.fixture
def record(run_of) -> dict:
    """The run.json of a finished run."""
    return read_json(run_of("sweet") / "run.json")


@pytest.mark.parametrize("method", METHODS)
def test_what_is_loaded_is_what_was_saved(tmp_path, record, model_type, method):
    model_folder = write_model(tmp_path / "tiny", model_type)
    model, rows = undecided_model(model_folder, method), ROWS
    record["arguments"]["method"], record["exit_layers"] = method, list(model.exit_layers)
    if model_type == "bert":
        model, rows = with_exit_0(model), ROWS._replace(second=["a", "b"])
        record |= {"exit_layers": list(model.exit_layers), "text_columns": ["a", "b"]}
    save_run(tmp_path / "run", model, model_folder, record, rows)
    loaded, found = load_run(tmp_path / "run")
    assert not loaded.training
    assert read_json(tmp_path / "run" / "config.json")["model_type"] == "minisweet"  # which no other library takes
    assert list(loaded.exit_layers) == found.exit_layers == record["exit_layers"]
    torch.testing.assert_close(loaded(*random_batch()), model(*random_batch()), rtol=0, atol=0)
    assert (found.method, found.task, found.lr, found.num_labels) == (method, "toy", 3e-3, 2)
    assert read_validation(tmp_path / "run", found) == rows
    trunk, labels = load_trunk(tmp_path / "run")
    assert (trunk.exit_layers, labels) == ((4,), ["negative", "positive"])  # exit 0 is fitted anew
    torch.testing.assert_close(trunk(*random_batch())[0], model(*random_batch())[-1], rtol=0, atol=1e-6)
    again = MultiExitModel(trunk.encoder, (1, 4), 2, "ee")  # a loaded encoder is as good as any other
    assert torch.equal(again.eval().encoder(*random_batch())[-1], trunk.encoder(*random_batch())[-1])


# What a training starts from.


def test_every_depth_has_exit_layers():
    papers = {1: (1,), 2: (1, 2), 3: (1, 2, 3), 4: (1, 2, 4), 6: (1, 2, 3, 6), 12: (1, 4, 6, 12), 24: (1, 6, 12, 24)}
    branches = {1: (0, 1), 6: (0, 3, 6), 7: (0, 3, 7), 12: (0, 6, 12), 24: (0, 12, 24)}
    assert {depth: exit_layers_for(depth) for depth in papers} == papers
    assert {depth: exit_layers_for(depth, "branch") for depth in branches} == branches
    for depth in range(1, 100):
        for method in METHODS:
            layers = exit_layers_for(depth, method)
            assert (list(layers), layers[-1]) == (sorted(set(layers)), depth)
        assert exit_layers_for(depth, "plain") == (0, depth)
        assert exit_layers_for(depth, "branch", "lte") == exit_layers_for(depth)  # exit 0 learns no certainty


def shape(model_type: str, hidden_size: int, depth: int) -> SimpleNamespace:
    return SimpleNamespace(model_type=model_type, hidden_size=hidden_size, num_hidden_layers=depth)


def test_the_papers_rates_are_the_defaults_and_elsewhere_the_size_decides():
    """Some of Table 2, in 1e-5: of EE, MM and SWEET."""
    for model, task, printed in (
        (("bert", 768, 12), "mrpc", [5, 3, 4]),
        (("bert", 1024, 24), "sst2", [4, 2, 2]),
        (("deberta", 768, 12), "rte", [2, 1, 4]),
        (("deberta", 1024, 24), "rte", [1, 2, 2]),
    ):
        rates = [default_learning_rate(shape(*model), task, method) for method in ("ee", "mm", "sweet")]
        assert rates == pytest.approx([rate * 1e-5 for rate in printed])
        assert default_learning_rate(shape(*model), task, "branch") == rates[1]  # the trunk is MM's last model
        assert search_rates(shape(*model)) == [1e-5, 2e-5, 3e-5, 4e-5, 5e-5]
    for size, depth, task in ((768, 12, None), (768, 6, "mrpc"), (384, 6, "mrpc"), (384, 6, None)):
        rates = {default_learning_rate(shape("bert", size, depth), task, method) for method in METHODS}
        assert rates == {5e-5 if size == 768 else 2e-4 if task else 1e-4}


@given(examples=st.integers(1, 10**6), batch_size=st.sampled_from([1, 8, 16]))
def test_epochs_make_the_steps_and_none_more_and_are_four_at_least(examples, batch_size):
    epochs, per_epoch = epochs_of(examples, batch_size), -(-examples // batch_size)
    assert epochs >= EPOCHS == 4
    assert epochs * per_epoch >= STEPS
    assert epochs == 4 or (epochs - 1) * per_epoch < STEPS


def test_the_first_lines_say_what_is_trained_on_what(command, tmp_path, monkeypatch):
    model = write_model(tmp_path / "tiny", "bert")
    monkeypatch.setattr("minisweet.runs.start.STEPS", 9)
    rows = [f"text number {n} is not good and not bad,{'ab'[n % 2]}\n" for n in range(40)]
    Path("own.csv").write_text("text,label\n ,a\n" + "".join(rows))
    Path("dev.csv").write_text("text,label\n" + rows[0] + "a film,a\n")
    common, new = ["--out", "run", "--overwrite"], ["--model", model, "--max-length", 8]
    own = ["own.csv", "--dev-data", "dev.csv"]
    for module, arguments, expected in (
        (train, [*new, "--train-size", 20, "--exit-layers", "1,4"], "method sweet, lr 0.0002, epochs 3"),
        (fit, [*own, *new, "--method", "ee", "--lr", "1e-3", "--epochs", 1], "method ee, lr 0.001, epochs 1"),
        (fit, [*own, *new], "method plain, lr 0.0001, epochs 4"),
        (fit, [*own, "--trunk", "first"], "method plain, no layer is trained: the trunk stays as it is"),
    ):
        if "--trunk" in arguments:
            Path("run").rename("first")
        status, _, err = command(module, *common, *arguments)
        assert (status, f"{expected}\n" in err) == (0, True), err
    for words in ("40 of 40 rows to train on, 2 to validate", "skipped: 1", "cut to 8 tokens: 40"):
        assert words in err


@pytest.mark.parametrize(
    ("name", "key", "value", "words"),
    [
        ("run.json", "labels", ["a", "b", "c"], "classifier.weight is [2, 16] and should be [3, 16]"),
        ("run.json", "exit_layers", [1, 4], "heads.2"),
        ("run.json", "exit_layers", None, "run.json: exit_layers is None"),
        ("run.json", "diverged", 7, "run: its training diverged at step 7"),
        ("run.json", "metric", "f1", "run.json: metric is 'f1', should be one of "),
        ("operating.json", "threshold", "x", "operating.json: threshold is 'x', should be float"),
        ("operating.json", "goal", {"max_lost": None}, "operating.json: goal is {'max_lost': None}, should be dict"),
        ("operating.json", "id", "0", "operating.json: is of other weights than the model beside it; make it anew"),
    ],
)
def test_a_key_that_does_not_fit_is_named(run_of, tmp_path, name, key, value, words):
    run = shutil.copytree(run_of("sweet"), tmp_path / "run")
    write_json(run / name, read_json(run / name) | {key: value})
    assert words in refused(load_run if name == "run.json" else read_operating_point, run)
