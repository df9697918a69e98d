"""Run folders, where what is read is what was saved; and what a training starts from that a user need not give."""

import math
import shutil
from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from minisweet.base.files import read_json, write_json
from minisweet.tasks import default_learning_rate
from minisweet.texts import Examples, Texts, load_tokenizer
from minisweet.methods import METHODS, exit_layers_for
from minisweet.options import EPOCHS, EPOCHS_OF_OTHERS, STEPS, epochs_of
from minisweet.run import Run, load_trunk
from tests.conftest import random_batch, undecided_model, with_exit_0, write_model
from tests.test_rows import refused

ROWS = Examples(["the film", 'a "bad"\n\u2028 film'], None, [1, 0], ["one polar word", "contrast"])


@pytest.mark.parametrize("method", METHODS)
def test_what_is_loaded_is_what_was_saved(tmp_path, run_of, model_type, method):
    folder, record = write_model(tmp_path / "tiny", model_type), Run.read(run_of("sweet")).record
    model, rows, columns = undecided_model(folder, method), ROWS, None
    if model_type == "bert":
        rows, columns = ROWS._replace(second=["a", "b"], groups=["x", "x"]), ["a", "b"]
        model = with_exit_0(model)
    arguments, layers = replace(record.arguments, method=method), list(model.exit_layers)
    record = replace(record, arguments=arguments, exit_layers=layers, text_columns=columns)
    tokenizer = load_tokenizer(folder, record.vocab_size, record.arguments.max_length)
    made = Run.made(record, model.train(), tokenizer, Texts(tokenizer, rows))
    made.outputs = made.ask(made.texts, "cpu")
    made.save(tmp_path / "run")
    found = Run.read(tmp_path / "run")
    assert read_json(tmp_path / "run" / "config.json")["model_type"] == "minisweet"  # which no other library takes
    assert (found.record, found.examples, found.model.training) == (made.record, rows, False)
    for name in ("keys", "units"):
        assert getattr(found.texts, name).tolist() == getattr(made.texts, name).tolist()
    torch.testing.assert_close(found.model(*random_batch()), model(*random_batch()), rtol=0, atol=0)
    for ours, theirs in zip(found.outputs, made.outputs, strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    trunk, labels, before = load_trunk(tmp_path / "run")
    assert (trunk.exit_layers, labels) == ((4,), ["negative", "positive"])  # exit 0 is fitted anew
    assert before == made.record
    torch.testing.assert_close(trunk(*random_batch())[0], model(*random_batch())[-1], rtol=0, atol=1e-6)


# What a training starts from.


def test_every_depth_has_exit_layers():
    papers = {1: (1,), 2: (1, 2), 3: (1, 2, 3), 4: (1, 2, 4), 6: (1, 2, 3, 6), 12: (1, 4, 6, 12), 24: (1, 6, 12, 24)}
    branches = {1: (0, 1), 6: (0, 3, 6), 7: (0, 3, 7), 12: (0, 6, 12), 24: (0, 12, 24)}
    assert {depth: exit_layers_for(depth) for depth in papers} == papers
    assert {depth: exit_layers_for(depth, "branch") for depth in branches} == branches
    assert exit_layers_for(7, "plain") == (0, 7)
    assert exit_layers_for(7, "branch", "lte") == exit_layers_for(7)  # exit 0 learns no certainty


def test_the_papers_rates_are_the_defaults_and_elsewhere_the_size_decides():
    """Some of Table 2, in 1e-5: of EE, MM and SWEET."""

    def rates(kind: str, hidden_size: int, depth: int, task: str | None, methods: Iterable[str]) -> list[float]:
        config = SimpleNamespace(model_type=kind, hidden_size=hidden_size, num_hidden_layers=depth)
        return [default_learning_rate(config, task, method) for method in methods]

    for model, task, printed in (
        (("bert", 768, 12), "mrpc", [5, 3, 4]),
        (("bert", 1024, 24), "sst2", [4, 2, 2]),
        (("deberta", 768, 12), "rte", [2, 1, 4]),
        (("deberta", 1024, 24), "rte", [1, 2, 2]),
    ):
        found = rates(*model, task, ("ee", "mm", "sweet", "branch"))  # a branch's trunk is MM's last model
        assert found == pytest.approx([rate * 1e-5 for rate in (*printed, printed[1])])
    for size, depth, task in ((768, 12, None), (768, 6, "mrpc"), (384, 6, "mrpc"), (384, 6, None)):
        assert {*rates("bert", size, depth, task, METHODS)} == {5e-5 if size == 768 else 2e-4 if task else 1e-4}


@pytest.mark.parametrize(
    ("classes", "are_single", "least"), [(3, True, EPOCHS), (2, True, EPOCHS_OF_OTHERS), (3, False, EPOCHS_OF_OTHERS)]
)
def test_epochs_make_so_many_steps_and_are_so_many_at_least(classes, are_single, least):
    for rows in (1, 16 * STEPS // least, 16 * STEPS // least + 1, 10**6):
        steps, epochs = math.ceil(rows / 16), epochs_of(rows, 16, classes, are_single)
        assert epochs == least or (epochs - 1) * steps < STEPS
        assert epochs >= max(least, STEPS / steps)


@pytest.mark.parametrize(
    ("name", "key", "value", "words"),
    [
        ("run.json", "labels", ["a", "b", "c"], "classifier.weight is [2, 16] and should be [3, 16]"),
        ("run.json", "exit_layers", [1, 4], "heads.2"),
        ("run.json", "diverged", 7, "run: its training diverged at step 7"),
        ("run.json", "metric", "f1", "run.json: metric is 'f1', should be one of "),
        ("operating.json", "goal", {"max_lost": None}, "operating.json: goal is {'max_lost': None}, should be dict"),
        ("operating.json", "id", "0", "operating.json: is of other weights than the model beside it; make it anew"),
    ],
)
def test_a_key_that_does_not_fit_is_named(run_of, tmp_path, name, key, value, words):
    run = shutil.copytree(run_of("sweet"), tmp_path / "run")
    write_json(run / name, read_json(run / name) | {key: value})
    assert words in refused(lambda: (Run.read(run).model, Run.read(run).point))


@pytest.mark.parametrize("left", [0, 4, 1000, -1])
def test_a_file_of_tensors_that_was_cut_is_one_line(run_of, tmp_path, left):
    run = shutil.copytree(run_of("sweet"), tmp_path / "run")
    for file, part in ((run / "logits.safetensors", "outputs"), (run / "model.safetensors", "model")):
        file.write_bytes(file.read_bytes()[:left])
        assert refused(getattr, Run.read(run), part).startswith(f"{file}: not readable (")
    assert refused(getattr, Run.read(run), "point").startswith(f"{file}: not readable (")  # is it of these weights?
