"""Run folders: what is read is what was saved."""

import json
import os
from pathlib import Path

import pytest
import torch

from minisweet import load_encoder
from minisweet.base.files import InputError
from minisweet.data.rows import Examples
from minisweet.exits import build_multi_model
from minisweet.ngrams import NgramExit
from minisweet.runs import folders
from minisweet.runs.folders import load_run, load_trunk, method_name, read_record, run_name, save_run
from tests.conftest import exit_model, random_batch, write_model

LAYERS = [1, 4]
ROWS = Examples(["the film", "a bad film"], None, [1, 0], ["one polar word", "contrast"])


def make_record(method: str = "sweet", **changes) -> dict:
    arguments = {"model": "tiny", "method": method, "task": "toy", "seed": 3, "exit_strategy": "confidence"}
    arguments |= {"lr": 1e-3, "epochs": 1, "batch_size": 16, "max_length": 32, "train_size": 48, "data_dir": "data"}
    record = {"arguments": arguments, "metric": "accuracy", "labels": ["negative", "positive"], "exit_layers": LAYERS}
    record |= {"depth": 4, "vocab_size": 60, "device": "none", "precision": "torch.float32", "seconds": 1.5}
    return record | {"finished": "now", "subset": [0, 2], "losses": [[0.7, 0.6], [0.5, 0.4]]} | changes


def make_model(folder: Path, method: str = "sweet", ngrams: bool = False):
    """A model with random heads, and its record."""
    if method == "mm":
        model = build_multi_model(folder, LAYERS, 2).eval()
    else:
        model = exit_model(load_encoder(folder), LAYERS, 2, method).eval()
    if not ngrams:
        return model, make_record(method)
    exit_0 = NgramExit(60, 2, [0, 2, 3], False)
    for tensor in exit_0.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_()
    return model.add_ngrams(exit_0), make_record(method, exit_layers=[0, *LAYERS], ngrams=exit_0.settings)


def make_run(folder: Path, model_type: str = "bert", method: str = "sweet", **changes) -> Path:
    """A run with random weights, beside its model; its path."""
    model_folder = write_model(folder / "tiny", model_type)
    model, record = make_model(model_folder, method)
    save_run(folder / "run", model, model_folder, record | changes, ROWS)
    return folder / "run"


@pytest.mark.parametrize("ngrams", [False, True], ids=["layers", "exit 0"])
@pytest.mark.parametrize("method", ["sweet", "ee", "mm", "branch"])
def test_what_is_loaded_is_what_was_saved(tmp_path, model_type, method, ngrams):
    model_folder = write_model(tmp_path / "tiny", model_type)
    model, record = make_model(model_folder, method, ngrams)
    save_run(tmp_path / "run", model, model_folder, record, ROWS)
    loaded, found = load_run(tmp_path / "run")
    assert not loaded.training
    assert loaded.exit_layers == tuple(found.exit_layers) == ((0, 1, 4) if ngrams else (1, 4))
    torch.testing.assert_close(loaded(*random_batch()), model(*random_batch()), rtol=0, atol=0)
    names = ("method", "task", "model", "seed", "lr", "exit_strategy", "num_labels", "depth", "vocab_size")
    assert [getattr(found, name) for name in names] == [method, "toy", "tiny", 3, 1e-3, "confidence", 2, 4, 60]
    validation = folders.read_validation(tmp_path / "run", found)
    assert (validation.texts(), validation.labels, validation.difficulties) == (ROWS.texts(), [1, 0], ROWS.difficulties)
    trunk, labels = load_trunk(tmp_path / "run")
    assert (trunk.exit_layers, labels) == ((4,), ["negative", "positive"])  # exit 0 is fitted anew
    torch.testing.assert_close(trunk(*random_batch())[0], model(*random_batch())[-1], rtol=0, atol=1e-6)


def test_no_other_library_takes_a_run_for_its_model(tmp_path):
    run = make_run(tmp_path)
    assert json.loads((run / "config.json").read_text())["model_type"] == "minisweet"
    save_run(tmp_path / "again", make_model(tmp_path / "tiny")[0], run, make_record(), ROWS)  # of a run's folder
    load_run(tmp_path / "again")
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="minisweet"):
        transformers.AutoModel.from_pretrained(run)


WRONG = [
    ({"labels": ["a", "b", "c"]}, r"classifier.weight.*\[[23], 16\].*\[[23], 16\]"),
    ({"exit_layers": [1, 2, 4]}, "heads.2"),
    ({"exit_layers": "delete"}, "exit_layers is missing"),
    ({"depth": "six"}, "depth is 'six'"),
    ({"arguments": None}, "model is missing"),
    ({"arguments": make_record()["arguments"] | {"exit_strategy": "sure"}}, "exit_strategy is 'sure'"),
    ({"diverged": 7}, "run: its training diverged at step 7"),
]


@pytest.mark.parametrize(("changes", "reason"), WRONG)
def test_a_run_that_cannot_be_is_one_line(tmp_path, changes, reason):
    run = make_run(tmp_path)
    content = json.loads((run / "run.json").read_text()) | changes
    (run / "run.json").write_text(json.dumps({key: value for key, value in content.items() if value != "delete"}))
    with pytest.raises(InputError, match=reason) as error:
        load_run(run)
    assert str(error.value).isprintable()


def test_what_old_records_lack_has_defaults(tmp_path):
    record = make_record("sweet-flow0.5")  # of a study: reports read it
    for key in ("vocab_size", "seconds", "subset", "losses"):
        del record[key]
    (tmp_path / "run.json").write_text(json.dumps(record | {"digests": {"a": 1}}))
    found = read_record(tmp_path)
    assert (found.method, found.losses, found.columns) == ("sweet-flow0.5", [], [])
    assert found.diverged is found.ngrams is found.train_texts is None


def test_names_of_runs_and_methods():
    arguments = make_record()["arguments"] | {"model": "some.one/bert-tiny", "lr": 2e-4, "train_size": 6000}
    assert run_name(arguments) == "bert-tiny-sweet-toy-seed3"
    assert run_name(arguments, in_grid=True) == "bert-tiny-sweet-toy-lr0.0002-n6000-seed3"
    assert run_name(arguments | {"exit_strategy": "lte"}, True) == "bert-tiny-sweet-toy-lr0.0002-n6000-seed3-lte"
    on_trunk = {method: method_name({"method": method, "trunk": "runs/a"}) for method in ("ee", "mm", "branch")}
    assert on_trunk == {"ee": "ee-mixed", "mm": "mm-taught", "branch": "branch"}


def test_the_newest_run(tmp_path):
    with pytest.raises(InputError, match="no run here"):
        folders.newest_run(tmp_path / "runs")
    for age, name in ((3, "a"), (9, "b"), (1, ".c")):
        path = tmp_path / "runs" / name / "run.json"
        path.parent.mkdir(parents=True)
        path.write_text("{}")
        os.utime(path, (100 - age, 100 - age))
    assert folders.newest_run(tmp_path / "runs").name == "a"  # .c is being written
    with pytest.raises(InputError, match="no run here"):
        read_record(tmp_path)
