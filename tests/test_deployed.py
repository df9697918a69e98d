"""Runs of own text: what is loaded is what was saved, and nothing else is; what does not fit is refused in one line."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minisweet.base.files import read_json, write_json
from minisweet.classifier.folder import load_state, save_state
from minisweet.classifier.promise import Goal
from minisweet.classifier.state import State, choose_state
from minisweet.texts import Examples
from tests.conftest import WORDS, random_bag, random_batch, refused


def load(folder: Path, amp: str = "off") -> State:
    return load_state(folder, None, "cpu", amp, 32)


def test_what_is_loaded_is_what_was_saved(own_run, tmp_path):
    rows = ['the film a "bad"\n\u2028 film', *WORDS[:12]]
    groups, labels = [f"group {n % 5}" for n in range(12)], [n % 3 - 1 for n in range(13)]
    validation = Examples(rows, None, labels, groups=[None, *groups])
    trained = load(own_run).trained._replace(bag=random_bag(2), validation=validation)
    made = choose_state(trained, Goal(max_lost=40.0, sure=60.0), torch.device("cpu"), None)
    save_state(tmp_path / "run", made, overwrite=False)
    again = load(tmp_path / "run")
    assert (again.trained.record, again.trained.about, again.point) == (trained.record, trained.about, made.point)
    assert again.trained.validation == validation
    for module, as_made, inputs in (("model", trained.model, 3), ("bag", trained.bag, 2)):
        batch = random_batch()[:inputs]
        torch.testing.assert_close(getattr(again.trained, module)(*batch), as_made(*batch), rtol=0, atol=0)
    for ours, theirs in zip(again.logits, made.logits, strict=True):
        assert np.array_equal(ours, theirs)
    assert len({*again.logits.units}) == 6
    assert read_json(tmp_path / "run" / "operating.json")["goal"] == {"max_lost": 40, "sure": 60}


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("operating.json", "goal", {"max_lost": 200}, "operating.json: goal: max_lost: 200, should be a number from"),
        ("operating.json", "id", "0", "operating.json: belongs to other weights than the model beside it"),
        ("run.json", "fit", {}, "run.json: fit: head is missing"),
        (
            "run.json",
            "fit",
            {"head": "pooler", "training_groups": [], "validation_groups": []},
            "heads.0.pooler.weight is missing and should be",
        ),
        ("run.json", "metric", "f1", "run.json: metric is 'f1', should be one of "),
    ],
)
def test_what_does_not_fit_is_named(own_run, tmp_path, name, key, value, message):
    run = Path(shutil.copytree(own_run, tmp_path / "run"))
    write_json(run / name, read_json(run / name) | {key: value})
    assert message in refused(load, run)


def test_files_of_another_run_and_missing_ones_are_refused(own_run, run_of, tmp_path):
    for name in ("bag_of_words", "logits", "model"):
        run = Path(shutil.copytree(own_run, tmp_path / name))
        shutil.copy(run_of("bag") / f"{name}.safetensors", run)
        assert f"{name}.safetensors: belongs to " in refused(load, run)
        (run / f"{name}.safetensors").unlink()
        assert "(No such file" in refused(load, run)


def test_the_summary_tells_who_judges(own_run):
    state = load(own_run)

    def lines(**changes) -> list[str]:
        logits = state.logits._replace(**changes)
        point = state.trained.choose(logits, Goal())
        return replace(state, logits=logits, point=point).summary().splitlines()

    grouped = lines(units=state.logits.units // 2**10)
    assert "of 160 validation rows judge, one of each text and group; a quarter chooses" in grouped[-2]
    constant = torch.eye(2)[0].expand(160, 2)
    assert "full depth is no better than the majority class" in "".join(lines(bag=constant, model=constant))
    assert "majority class" not in "".join(grouped)
