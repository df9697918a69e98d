"""Runs of own text: what is loaded is what was saved, and nothing else is; what does not fit is refused in one line."""

import shutil
from pathlib import Path

import pytest
import torch

from minisweet.base.files import read_json, write_json
from minisweet.classifier import choose, deployed
from minisweet.classifier.deployed import ANSWERING, OwnRun, choose_for, load_run, save
from minisweet.classifier.promise import Goal
from minisweet.classifier.split import units_of
from minisweet.classifier.summary import summary
from minisweet.texts import Examples, Texts
from tests.conftest import WORDS, random_bag, random_batch
from tests.test_rows import refused

PARTS = (*ANSWERING, "texts", "outputs")


def test_what_is_loaded_is_what_was_saved(own_run, tmp_path):
    loaded = load_run(own_run, "model", "tokenizer")
    rows = ['the film a "bad"\n\u2028 film', *WORDS[:12]]
    groups, labels = [f"group {n % 5}" for n in range(12)], [n % 3 - 1 for n in range(13)]
    texts = Texts(loaded.tokenizer, Examples(rows, None, labels, groups=[None, *groups]))
    texts.units = units_of(texts)
    made = OwnRun(loaded.record, loaded.model, random_bag(2), loaded.tokenizer, texts)
    made = choose_for(made, Goal(max_lost=40.0, sure=60.0), "cpu", "off")
    save(tmp_path / "run", made)
    again = load_run(tmp_path / "run", *PARTS)
    assert (again.record, again.point) == (made.record, made.point)
    assert again.texts.examples == texts.examples
    for name in ("keys", "units"):
        assert getattr(again.texts, name).tolist() == getattr(texts, name).tolist()
    for module, as_made, inputs in ((again.model, made.model, 3), (again.bag, made.bag, 2)):
        batch = random_batch()[:inputs]
        torch.testing.assert_close(module(*batch), as_made(*batch), rtol=0, atol=0)
    for ours, theirs in zip(again.outputs, made.outputs, strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    assert read_json(tmp_path / "run" / "operating.json")["goal"] == {"max_lost": 40, "sure": 60}


def test_only_what_is_needed_is_read(own_run, command, tmp_path):
    """To predict neither the validation rows nor their logits, and to choose no model."""
    run = Path(shutil.copytree(own_run, tmp_path / "run"))
    (run / "model.safetensors").unlink()
    (run / "bag_of_words.safetensors").unlink()
    assert command(choose, run)[0] == 0
    run = Path(shutil.copytree(own_run, tmp_path / "other"))
    for name in ("validation.jsonl", "logits.safetensors"):
        (run / name).unlink()
    assert len(deployed.classify(deployed.deploy(load_run(run, *ANSWERING)), load_run(own_run, "texts").texts)) == 160


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("operating.json", "goal", {"max_lost": 200}, "operating.json: goal: max_lost: 200, should be a number from"),
        ("operating.json", "id", "0", "operating.json: belongs to other weights than the model beside it; first: min"),
        ("bag_of_words.safetensors", None, None, "bag_of_words.safetensors: not readable (No such file"),
        ("logits.safetensors", None, None, "logits.safetensors); make it again: minisweet choose "),
    ],
)
def test_what_does_not_fit_is_named(own_run, tmp_path, name, key, value, message):
    run = Path(shutil.copytree(own_run, tmp_path / "run"))
    if key:
        write_json(run / name, read_json(run / name) | {key: value})
    else:
        (run / name).unlink()
    assert message in refused(load_run, run, "model", *PARTS)


def test_files_of_another_run_are_refused(own_run, run_of, tmp_path):
    run = Path(shutil.copytree(own_run, tmp_path / "run"))
    for name, part in (("bag_of_words", "bag"), ("logits", "outputs")):
        shutil.copy(run_of("bag") / f"{name}.safetensors", run)
        assert f"{name}.safetensors: belongs to other weights than the model beside it" in refused(load_run, run, part)


def test_choose_makes_logits_anew_that_are_broken_and_cut_texts_are_counted(own_run, tmp_path, command, caplog):
    run = Path(shutil.copytree(own_run, tmp_path / "run"))
    (run / "logits.safetensors").write_bytes(b"")
    status, _, err = command(choose, run, "--amp", "off")
    assert (status, f"{run / 'logits.safetensors'}: not readable" in err, "it is made again" in err) == (0, True, True)
    assert read_json(run / "operating.json") == read_json(own_run / "operating.json")
    loaded = load_run(run, "model", "bag", "tokenizer")
    texts = Texts(loaded.tokenizer, Examples(["bad " * 90, "a film"], None, None))
    deployed.ask_exits(loaded.model, loaded.bag, texts, None)
    assert [record.getMessage() for record in caplog.records][-1] == "cut to 32 tokens: 1 texts"


def test_to_ask_moves_no_weights_that_others_share(own_run, monkeypatch):
    """To another device: other threads go on answering with them."""
    run = load_run(own_run, "model", "bag", "texts")
    monkeypatch.setattr(deployed, "choose_device", lambda name: torch.device("meta"))
    with pytest.raises(RuntimeError):  # there are no numbers on this device
        choose_for(run, Goal(), "meta", "off")
    assert {part.device.type for part in (*run.model.parameters(), *run.bag.buffers())} == {"cpu"}


def test_the_summary_tells_who_judges(own_run):
    run = load_run(own_run, "outputs")
    outputs = run.outputs._replace(units=run.outputs.keys)
    run = choose_for(run._replace(outputs=outputs), Goal(), "cpu", "off")
    lines = summary(run).splitlines()
    reasons = "a quarter chooses the thresholds to try, one text of each group judges"
    assert f"{run.point.judging_texts} of 160 validation rows judge: {reasons}" in lines
    constant = torch.eye(outputs.logits.shape[-1])[0].expand_as(outputs.logits)
    told = summary(choose_for(run._replace(outputs=outputs._replace(logits=constant)), Goal(), "cpu", "off"))
    assert "full depth is no better than the most frequent class" in told
    assert "most frequent class" not in "".join(lines)
