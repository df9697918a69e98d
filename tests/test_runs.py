"""Run folders: what is read is what was saved, and what does not fit is refused. Also the defaults of a training."""

from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from minisweet.base.files import read_json
from minisweet.defaults import default_batch_size, default_exit_layers, default_learning_rate, fill_in
from minisweet.exits import HEADS, METHODS
from minisweet.loading import read_config
from minisweet.run import check_output, load_models, read_run, save_run
from minisweet.tasks import PAPER_STEPS, TASKS, Task
from minisweet.texts import Examples, Texts, load_tokenizer
from tests.conftest import answers_of, random_batch, refused, undecided_models, write_model


@pytest.mark.parametrize("strategy", HEADS)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_loaded_is_what_was_saved(tmp_path, run_of, model_type, method, strategy):
    folder, out, rows = write_model(tmp_path / "tiny", model_type), tmp_path / "run", Examples(["the film"], None, [1])
    models = undecided_models(folder, method, strategy=strategy, pooling="mean")
    config, run = read_config(folder, "mean"), replace(read_run(run_of("sweet")), method=method, exit_strategy=strategy)
    tokenizer = load_tokenizer(folder, config.vocab_size, run.max_length)
    save_run(out, run, models, config, tokenizer, overwrite=False)
    assert read_json(out / "config.json")["model_type"] == "minisweet"  # which no other library takes
    assert read_config(out) == config
    again = read_run(out)
    assert (replace(again, id=run.id), again.id == run.id) == (run, False)
    loaded = load_models(out, again, config)
    assert not any(model.training for model in loaded)
    for ours, theirs in zip(answers_of(loaded, random_batch()), answers_of(models, random_batch()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    keys = Texts(load_tokenizer(out, config.vocab_size, run.max_length), rows).keys
    assert keys.tolist() == Texts(tokenizer, rows).keys.tolist()


def test_every_depth_has_exit_layers():
    papers = {1: [1], 2: [1, 2], 4: [1, 2, 4], 6: [1, 2, 3, 6], 12: [1, 4, 6, 12], 24: [1, 6, 12, 24]}
    assert {depth: default_exit_layers(depth) for depth in papers} == papers


def test_a_task_of_ones_own_gets_the_papers_750_steps_and_never_fewer_than_two_epochs(tmp_path):
    config, own = read_config(write_model(tmp_path / "tiny", "bert")), Task(("a", "b"), steps=PAPER_STEPS)

    def epochs(name: str, task: Task, rows: int, **options: int) -> int:
        left_open = dict.fromkeys(("exit_layers", "batch_size", "lr", "epochs"))
        args = Namespace(**left_open | {"method": "sweet", "task": name} | options)
        fill_in(args, config, task, rows)
        return args.epochs

    for rows, wanted in ((788, 15), (6000, 2), (5999, 2), (5984, 3), (393_000, 2), (1, 750)):
        assert epochs("own", own, rows) == wanted
    assert (epochs("own", own, 788, batch_size=8), epochs("own", own, 788, epochs=1)) == (8, 1)
    assert [epochs(name, TASKS[name], 788) for name in ("mrpc", "toy")] == [2, 3]
    assert [default_batch_size(SimpleNamespace(model_type="deberta", hidden_size=D)) for D in (768, 1024)] == [16, 8]


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


def test_a_mount_point_and_a_folder_of_another_program_are_refused_before_training(tmp_path, monkeypatch):
    """A mount point could not be renamed at the end. Links are followed, as when the run is written."""
    for name in ("mounted", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "mounted")
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "mounted")
    error = refused(check_output, tmp_path / "link", False)
    assert "link is a mount point, which cannot be replaced; name a folder" in error
    check_output(tmp_path / "mounted" / "run", False)
    (tmp_path / "other" / "run.json").write_text('{"of": "another program"}')
    assert "run.json is not that of a run; name another folder" in refused(check_output, tmp_path / "other", True)
