"""Run folders: what is read is what was saved, and what does not fit is refused. Also the defaults of a training."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minisweet.base.files import read_json
from minisweet.checkpoint import read_config
from minisweet.defaults import default_exit_layers, default_learning_rate, resolve
from minisweet.methods import METHODS
from minisweet.options import TrainingOptions
from minisweet.outputs import ask_all, read_outputs, write_outputs
from minisweet.run import (
    check_output,
    load_model,
    load_run_tokenizer,
    read_record,
    read_validation,
    save_run,
    weights_id,
)
from minisweet.tasks import PAPER_STEPS, TASKS, Task
from minisweet.texts import Examples, Texts, load_tokenizer
from tests.conftest import random_batch, refused, undecided_model, write_model

ROWS = Examples(["the film", 'a "bad"\n\u2028 film'], None, [1, 0])


@pytest.mark.parametrize("strategy", ["confidence", "lte"])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_loaded_is_what_was_saved(tmp_path, run_of, model_type, method, strategy):
    folder, record, rows = write_model(tmp_path / "tiny", model_type), read_record(run_of("sweet")), ROWS
    if model_type == "bert":
        rows = ROWS._replace(second=["a", "b"], groups=["x", None], labels=[1, -1])
    model = undecided_model(folder, method, strategy=strategy)
    arguments = replace(record.arguments, method=method, exit_strategy=strategy)
    record = replace(record, arguments=arguments, exit_layers=list(model.exit_layers), id=weights_id(model))
    tokenizer = load_tokenizer(folder, record.vocab_size, record.arguments.max_length)
    run = tmp_path / "run"
    save_run(run, record, model.train(), tokenizer, rows, {"more": b""})
    assert (read_record(run), read_validation(run, record)) == (record, rows)
    assert read_json(run / "config.json")["model_type"] == "minisweet"  # which no other library takes
    assert (run / "more").exists()
    loaded = load_model(run, record)
    assert not loaded.training
    torch.testing.assert_close(loaded(*random_batch()), model.eval()(*random_batch()), rtol=0, atol=0)
    texts = Texts(tokenizer, rows)
    assert Texts(load_run_tokenizer(run, record), rows).keys.tolist() == texts.keys.tolist()
    outputs = ask_all(loaded, texts)
    write_outputs(run / "logits.safetensors", outputs, record.id)
    for ours, theirs in zip(read_outputs(run / "logits.safetensors", record.id), outputs, strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


@pytest.mark.parametrize("left", [0, 4, 1000, -1])
def test_a_file_of_tensors_that_was_cut_is_one_line(run_of, tmp_path, left):
    run = shutil.copytree(run_of("sweet"), tmp_path / "run")
    record = read_record(run)
    for name, load in (
        ("model.safetensors", lambda _: load_model(run, record)),
        ("logits.safetensors", lambda path: read_outputs(path, record.id)),
    ):
        path = Path(run, name)
        path.write_bytes(path.read_bytes()[:left])
        assert refused(load, path).startswith(f"{path}: not readable (")


def test_every_depth_has_exit_layers():
    papers = {1: [1], 2: [1, 2], 3: [1, 2, 3], 4: [1, 2, 4], 6: [1, 2, 3, 6], 12: [1, 4, 6, 12], 24: [1, 6, 12, 24]}
    assert {depth: default_exit_layers(depth) for depth in papers} == papers


def test_a_task_of_ones_own_gets_the_papers_750_steps_and_never_fewer_than_two_epochs(tmp_path):
    config, own = read_config(write_model(tmp_path / "tiny", "bert")), Task(("a", "b"), steps=PAPER_STEPS)

    def epochs(name: str, task: Task, rows: int, **options: int) -> int:
        return resolve(TrainingOptions(**options), config, name, task, rows).epochs

    for rows, wanted in ((788, 15), (6000, 2), (5999, 2), (5984, 3), (393_000, 2), (1, 750)):
        assert epochs("own", own, rows) == wanted
    assert (epochs("own", own, 788, batch_size=8), epochs("own", own, 788, epochs=1)) == (8, 1)
    assert [epochs(name, TASKS[name], 788) for name in ("mrpc", "toy")] == [2, 3]


def test_the_papers_rates_are_the_defaults_and_elsewhere_the_size_decides():
    """Some of Table 2, in 1e-5: of EE, MM and SWEET."""

    def rates(kind: str, hidden_size: int, depth: int, task: str, methods: list[str]) -> list[float]:
        config = SimpleNamespace(model_type=kind, hidden_size=hidden_size, num_hidden_layers=depth)
        return [default_learning_rate(config, task, method) for method in methods]

    for model, task, printed in (
        (("bert", 768, 12), "mrpc", [5, 3, 4]),
        (("bert", 1024, 24), "sst2", [4, 2, 2]),
        (("deberta", 768, 12), "rte", [2, 1, 4]),
        (("deberta", 1024, 24), "rte", [1, 2, 2]),
    ):
        assert rates(*model, task, ["ee", "mm", "sweet"]) == pytest.approx([rate * 1e-5 for rate in printed])
    for size, depth, task in ((768, 12, "mine"), (768, 6, "mrpc"), (384, 6, "mrpc"), (384, 6, "mine")):
        assert {*rates("bert", size, depth, task, [*METHODS])} == {5e-5 if size == 768 else 1e-4}


def test_a_mount_point_is_refused_before_training(tmp_path, monkeypatch):
    """It could not be renamed at the end. Links are followed, as when the run is written."""
    (tmp_path / "mounted").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "mounted")
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "mounted")
    for name in ("mounted", "link"):
        error = refused(check_output, tmp_path / name, False)
        assert error == f"out: {tmp_path / name} is a mount point, which cannot be replaced; name a folder in it"
    check_output(tmp_path / "mounted" / "run", False)
