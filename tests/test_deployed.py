"""Runs of own text: what is loaded is what was saved, and nothing else is; what does not fit is refused in one line."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from minisweet import EarlyExitClassifier
from minisweet.base.files import read_json, write_json
from minisweet.classifier.main import fit
from tests.conftest import opinions, random_batch, refused, run, write_rows


def load(folder: Path) -> EarlyExitClassifier:
    return EarlyExitClassifier.load(folder, amp="off")


@pytest.mark.parametrize(
    ("labels", "kind"),
    [((np.str_("a \u2028\n c"), "b"), str), ((2, 10), int), ((0.5, 2), float), ((np.False_, np.True_), bool)],
)
def test_what_is_loaded_is_what_was_saved(own_run, tmp_path, labels, kind):
    """Labels keep their type, as JSON has them. With groups and rows without a label too."""
    rows = opinions(90)
    texts, groups = [text for text, _ in rows], [f"group {n // 2}" if n % 3 else None for n in range(90)]
    names = [None if n == 5 else labels[label == "up"] for n, (_, label) in enumerate(rows)]
    options = {"model": str(own_run.parent / "tiny"), "max_length": 32, "amp": "off", "epochs": 1, "lr": 3e-3}
    made = EarlyExitClassifier(**options, max_lost=40, sure=60)
    made.fit(texts, names, groups=groups, unlabelled=[text for text, _ in opinions(150)[90:]])
    made.save(tmp_path / "run")
    again = load(tmp_path / "run")
    assert (again.operating_point, again.record, again.get_params()) == (
        made.operating_point,
        made.record,
        made.get_params() | {"lr": 3e-3, "batch_size": 16},
    )
    assert ({*map(type, again.cascade.labels)}, again.cascade.labels) == ({kind}, [*labels])
    assert again.predict(texts).dtype == again.predict([]).dtype == again.classes_.dtype
    assert again.predict_proba([]).shape == (0, 2)
    for part, inputs in (("model", 3), ("bag", 2)):
        batch = random_batch()[:inputs]
        ours, theirs = (getattr(classify.cascade, part)(*batch) for classify in (again, made))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert again.validation.texts.examples == made.validation.texts.examples._replace(names=None)
    for ours, theirs in zip(again.validation[1:], made.validation[1:], strict=True):
        assert np.array_equal(ours, theirs)
    assert again.classify(texts[:9]) == made.classify(texts[:9])


@pytest.fixture(scope="module")
def two_runs(own_run, tmp_path_factory) -> list[Path]:
    """Two runs with one trunk, so that their models are equal, and as many validation rows."""
    folder = tmp_path_factory.mktemp("two")
    for name, rows in (("a", opinions(1000)[800:900]), ("b", opinions(1000)[900:])):
        path = write_rows(folder / f"{name}.csv", rows, "text", "label")
        assert run(fit, path, "--trunk", own_run, "--out", folder / name, "--amp", "off") == 0
    return [folder / "a", folder / "b"]


@pytest.mark.parametrize(
    "name", "bag_of_words.safetensors logits.safetensors model.safetensors operating.json validation.jsonl".split()
)
def test_files_of_another_run_and_missing_ones_are_refused(two_runs, tmp_path, name):
    """Even if both runs have the same model."""
    (a, b), mixed = two_runs, tmp_path / "mixed"
    assert (a / "config.json").read_bytes() == (b / "config.json").read_bytes()
    shutil.copytree(a, mixed)
    assert load(mixed).operating_point == load(a).operating_point
    shutil.copy(b / name, mixed)
    assert f"{name}: belongs to another run than run.json beside it" in refused(load, mixed)
    (mixed / name).unlink()
    assert f"{name}: not readable" in refused(load, mixed) or "no readable model" in refused(load, mixed)


def test_validation_rows_that_were_cut_are_refused(own_run, tmp_path):
    mixed = Path(shutil.copytree(own_run, tmp_path / "run"))
    lines = (mixed / "validation.jsonl").read_text().splitlines(True)
    (mixed / "validation.jsonl").write_text("".join(lines[:10]))
    assert refused(load, mixed).endswith("run.json beside it, or changed: 10 rows, should be 160")


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("operating.json", "share", "a", "operating.json: share is 'a', should be float"),
        ("run.json", "program", "", "a run of train.py, which is evaluated by: python evaluate.py"),
    ],
)
def test_what_does_not_fit_is_named(own_run, tmp_path, name, key, value, message):
    run = Path(shutil.copytree(own_run, tmp_path / "run"))
    write_json(run / name, read_json(run / name) | {key: value})
    assert message in refused(load, run)
    assert "train one with minisweet fit" in refused(load, tmp_path)
