"""Run folders, where what is read is what was saved; and what a training starts from that a user need not give."""

import json
import math
import shutil
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import train
from minisweet import EarlyExitClassifier, MultiExitModel
from minisweet.base.files import InputError, read_json, write_json
from minisweet.data.rows import Examples
from minisweet.evaluation.answers import load_answers
from minisweet.methods import METHODS
from minisweet.runs import folders, start
from minisweet.runs.folders import (
    load_run,
    load_trunk,
    read_evaluation,
    read_record,
    read_validation,
    run_digest,
    save_run,
)
from minisweet.runs.start import EPOCHS, STEPS, default_learning_rate, epochs_of, exit_layers_for
from minisweet.use.explain import write_page
from tests.conftest import random_batch, undecided_model, write_model
from tests.test_exits import with_exit_0
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
    assert folders.read_validation(tmp_path / "run", found) == rows
    trunk, labels = load_trunk(tmp_path / "run")
    assert (trunk.exit_layers, labels) == ((4,), ["negative", "positive"])  # exit 0 is fitted anew
    torch.testing.assert_close(trunk(*random_batch())[0], model(*random_batch())[-1], rtol=0, atol=1e-6)
    again = MultiExitModel(trunk.encoder, (1, 4), 2, "ee")  # a loaded encoder is as good as any other
    assert torch.equal(again.eval().encoder(*random_batch())[-1], trunk.encoder(*random_batch())[-1])


def test_what_old_records_lack_has_defaults(tmp_path, record):
    record["arguments"]["method"] = "sweet-flow0.5"  # of a study: reports read it
    for key in ("vocab_size", "seconds", "subset", "losses", "text_columns", "train_tokens"):
        del record[key]
    write_json(tmp_path / "run.json", record | {"digests": {"a": 1}})
    found = read_record(tmp_path)
    assert (found.method, found.losses, found.columns) == ("sweet-flow0.5", [], [])
    assert found.diverged is found.train_tokens is None


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
        assert start.search_rates(shape(*model)) == [1e-5, 2e-5, 3e-5, 4e-5, 5e-5]
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
    common, new = ["--train-size", 20, "--out", "run"], ["--model", model, "--exit-layers", "1,4"]
    own = ["--data", "own.csv", "--dev-data", "dev.csv"]
    for arguments, expected in {
        (*new,): "method sweet, lr 0.0002, epochs 3",
        (*new, *own, "--method", "ee", "--lr", "1e-3", "--epochs", 1): "method ee, lr 0.001, epochs 1",
        ("--model", model, *own): "method plain, lr 0.0001, epochs 5",
        ("--trunk", "first", *own): "method plain, no layer is trained: the trunk stays as it is",
    }.items():
        if "--trunk" in arguments:
            Path("run").rename("first")
        limit = [] if "--trunk" in arguments else ["--max-length", 8]  # a trunk has its own
        status, out, err = command(train, *limit, *common, *arguments, "--overwrite")
        assert (status, out.startswith(expected)) == (0, True), err
    for words in ("20 of 40 rows to train, 2 to validate", "skipped: 1", "cut to 8 tokens: 20"):
        assert words in out


ODD = [None, [], {}, "", "x", "mm", "agreement", -1, 0, 1, 0.5, 10**9, True, [0], [4], [4, 1], [1, 2, 99], ["a", "a"]]
ODD += [[None], [[0.5, 0.5]], math.nan, {"a": 1}, {"pairs": 1}, {"speed": 2}, {"speed": 0.5, "sure": 70}, "gone"]


@settings(max_examples=20)
@given(st.data())
def test_a_run_that_was_edited_by_hand_works_or_is_refused_in_one_line(run_of, tmp_path_factory, data):
    """A value of run.json or of evaluation.json becomes an odd one, or is gone. All else still fits."""
    original = run_of(data.draw(st.sampled_from(["sweet", "lte", "trunk0"])))
    run = shutil.copytree(original, tmp_path_factory.mktemp("edited") / "run")
    name = data.draw(st.sampled_from(["run.json", "evaluation.json"]))
    content = json.loads((run / name).read_text())
    inner = content["arguments" if name == "run.json" else "operating_point"]
    edited = content if data.draw(st.booleans()) else inner
    key, value = data.draw(st.sampled_from(sorted(edited))), data.draw(st.sampled_from(ODD))
    edited[key] = value
    if value == "gone":
        del edited[key]
    (run / name).write_text(json.dumps(content))
    if name == "run.json":  # so that the edit is seen, and not that the digest is another
        evaluation, tensors = read_json(run / "evaluation.json"), load_file(run / "logits.safetensors")
        write_json(run / "evaluation.json", evaluation | {"run_digest": run_digest(run)})
        save_file(tensors, run / "logits.safetensors", {"run_digest": run_digest(run)})
    with suppress(InputError):  # which is one line
        record, evaluation = load_run(run)[1], read_evaluation(run)
        rows = read_validation(run, record, evaluation)
        classify = EarlyExitClassifier(run)
        classify(rows.texts()[:20])
        classify.threshold = 0.5
        classify(rows.texts()[:20])
        write_page(run / "page.html", evaluation, record, rows, load_answers(run, evaluation, record))


@pytest.mark.parametrize(
    ("name", "key", "value", "words"),
    [
        ("run.json", "labels", ["a", "b", "c"], "classifier.weight is [2, 16] and should be [3, 16]"),
        ("run.json", "exit_layers", [1, 4], "heads.2"),
        ("run.json", "exit_layers", None, "run.json: exit_layers is None"),
        ("run.json", "arguments", None, "run.json: model is missing"),
        ("run.json", "exit_strategy", "sure", "run.json: exit_strategy is 'sure'"),
        ("run.json", "diverged", 7, "run: its training diverged at step 7"),
        ("run.json", "exit_layers", [], "run.json: exit_layers is [], should be increasing layers up to 4"),
        ("run.json", "exit_layers", [0, 10**12], "run.json: exit_layers is [0, 1000000000000], should be "),
        ("evaluation.json", "scores", [10**400], "evaluation.json: scores is [1000"),
        ("run.json", "labels", ["a", "a"], "run.json: labels is ['a', 'a'], should be different names"),
        ("run.json", "method", "x", "run.json: method is 'x', should be one of "),
        ("run.json", "metric", "f1", "run.json: metric is 'f1', should be one of "),
        ("run.json", "depth", 3, "run.json: exit_layers is [1, 2, 4], should be increasing layers up to 3"),
        ("run.json", "max_length", 0, "run.json: max_length is 0, should be from 8 to 40"),
        ("run.json", "seed", -1, "run.json: seed is -1, should be 0 or more"),
        ("run.json", "batch_size", 0, "run.json: batch_size is 0, should be 1 or more"),
        ("evaluation.json", "exit_scores", [1.0], "evaluation.json: exit_scores is [1.0], should be a number for each"),
        ("evaluation.json", "per_class", [{}] * 3, "evaluation.json: per_class is [{}, {}, {}], should be for"),
        ("evaluation.json", "temperatures", [1.0], "evaluation.json: temperatures is [1.0], should be a number from"),
        ("evaluation.json", "scores", [], "evaluation.json: scores is [], should be as many as speedup_ratios"),
        ("evaluation.json", "exit_layers", [1, 4], "evaluation.json: asked_exits is "),
        ("evaluation.json", "operating_point", {"threshold": "x"}, "operating_point: threshold is 'x', should be"),
    ],
)
def test_what_was_edited_is_named(run_of, tmp_path, name, key, value, words):
    run = shutil.copytree(run_of("sweet"), tmp_path / "run")
    content = read_json(run / name)
    content.get("operating_point", {})["asked_exits"] = [1, 2, 4]
    write_json(run / name, content | {key: value})
    assert words in refused(load_run if name == "run.json" else read_evaluation, run)
