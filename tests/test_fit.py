"""`minisweet choose` and `test`: what is stated and promised of new text, and whether it holds."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from minisweet import EarlyExitClassifier
from minisweet.base.files import read_json
from minisweet.classifier.cascade import Cascade
from minisweet.classifier.main import choose, predict
from minisweet.classifier.main import test as check
from minisweet.classifier.report import comparison, what_is_promised
from minisweet.texts import Examples
from tests.conftest import opinions, write_rows


def read(run: Path, name: str = "operating") -> dict:
    return read_json(run / f"{name}.json")


@pytest.fixture
def copied(own_run, tmp_path) -> Path:
    """The run, which may be changed."""
    return Path(shutil.copytree(own_run, tmp_path / "copied"))


def test_what_is_printed_is_what_is_saved(copied, command):
    (_, out, _), point = command(choose, copied, "--max-lost", 8, "--sure", 80), read(copied)
    rows = {line[:42].strip(): line[42:].split() for line in out.splitlines()}
    for title, key, share in (("a bag of words alone (exit 0)", "exit_0", 0), ("full depth", "full_depth", 1)):
        low, high = point[f"{key}_interval"]
        assert rows[title] == [f"{point[key]:.1f}", f"{low:.1f}", "to", f"{high:.1f}", f"{share:.2f}"]
    assert (rows["deployed"][0], rows["deployed"][-1]) == (f"{point['score']:.1f}", f"{point['share']:.2f}")
    promise, last = out.splitlines()[-2:]
    assert promise == what_is_promised(EarlyExitClassifier.load(copied).operating_point)
    assert last == f"next: minisweet predict {copied} FILE.csv --out predicted.csv"
    assert point["lost"] * point["judging_texts"] / 100 == pytest.approx(round(point["lost"] * 1.2))
    assert point["judging_texts"] == 120


def test_choose_takes_another_goal_or_precision_and_is_the_same_again(own_run, copied, command, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Cascade, "ask_both", None)  # no model runs
        for words, goal in (
            ("", {"max_lost": 3.0, "sure": 90.0}),
            ("--max-lost 8 --sure 75", {"max_lost": 8.0, "sure": 75.0}),
        ):
            assert [command(choose, copied, *words.split())[0] for _ in range(2)] == [0, 0]
            assert read(copied)["goal"] == goal
    status, out, _ = command(choose, copied, "--max-lost", 99, "--amp", "bf16")
    assert (status, read(copied)["precision"], "all texts leave at exit 0" in out) == (0, "torch.bfloat16", True)
    assert command(choose, copied)[0] == 0  # what bfloat16 said is not taken for float32's
    assert read(copied) == read(own_run)


def test_unlabelled_texts_teach_exit_0_and_judge(own_run, command, copied):
    """Those that are also labelled are left out, and their labels are not read."""
    labelled, unlabelled, new = (opinions(1000)[part] for part in (slice(300), slice(300, 800), slice(800, None)))
    record, point = read(own_run, "run"), read(own_run)
    rows = [json.loads(line) for line in (own_run / "validation.jsonl").read_text().splitlines()]
    judges = [row["text"] for row in rows if row["label"] is None]
    assert (len(rows), len(judges), record["labels"]) == (160, 100, ["down", "up"])
    assert {*judges} < {text for text, _ in unlabelled}
    learnt = [*{text for text, _ in labelled + unlabelled} - {row["text"] for row in rows}]
    assert set(record["trained_keys"]) == {*EarlyExitClassifier.load(own_run).cascade.tokenize(learnt).keys.tolist()}
    assert [point[f"{name}_texts"] for name in ("choosing", "judging")] == [15 + 25, 45 + 75]
    assert point["labelled_judges"] == 45  # the score is of these
    assert command(choose, copied, *"--max-lost 3 --sure 90".split())[0] == 0  # which needs no other file
    assert read(copied) == point
    write_rows(Path("all.csv"), labelled + unlabelled + new, "text", "label")
    _, out, _ = command(check, own_run, "all.csv")
    told = "200 of 1,000 rows count; left out: 640 that were trained on, 160 that are validation rows, which set the"
    assert out.startswith(f"all.csv: {told} threshold\n")


def test_another_file_is_tested_beside_what_was_stated(copied, run_of, command):
    assert command(choose, copied, "--max-lost", 20, "--sure", 60)[0] == 0
    new, point = opinions(1000)[800:], read(copied)
    texts, labels = map(list, zip(*new, strict=True))
    others = [("the film", "left"), ("a film", "right"), ("is it", ""), (" ", "up")]
    write_rows(Path("new.csv"), [*new, *others], "body", "label")
    _, out, _ = command(check, copied, "new.csv", "--text-columns", "body")
    told = "201 of 204 rows count; left out: 1 without text, 2 with a label that the model does not know (left, right)"
    assert out.startswith(f"new.csv: {told}\n")
    found = {line[:26].strip(): line[26:].split() for line in out.splitlines()}
    titles = {"accuracy": "score", "full depth": "full_depth", "macro F1": "macro_f1", "lost, of 100 texts": "lost"}
    for title, key in titles.items():
        assert found[title][-1] == f"{point[key]:.2f}"
    right = EarlyExitClassifier.load(copied).score(texts, labels)
    assert float(found["accuracy"][0]) == pytest.approx(100 * right, abs=0.005)
    assert "promised: at most 20 of 100 lost, 60% sure; held here" in out
    for words in (("--threshold", 1), ("--amp", "bf16")):  # neither was promised
        status, out, _ = command(check, copied, "new.csv", "--text-columns", "body", *words)
        assert (status, "\n201 rows, threshold" in out, "promised: at most" in out) == (0, True, False)
    # Where nothing could be told it says so: 0.8**4 is more than 0.4.
    for rows, said in (
        (4, "too few texts to tell whether it holds; about 5 suffice if none is lost"),
        (5, "held here"),
    ):
        write_rows(Path("few.csv"), new[:rows], "text", "label")
        assert f"60% sure; {said}\n" in command(check, copied, "few.csv")[1]
    classify = EarlyExitClassifier.load(copied)
    answers, _ = classify.ask_new(Examples(texts, None, None, names=labels), "")
    wrong = answers._replace(confidence=torch.ones(len(texts)), early=1 - answers.full, labels=answers.full)
    lines = comparison(*classify.deployed, wrong)
    assert "60% sure; not held here: by chance, or these texts come from another source" in "\n".join(lines)
    # Without labels what changes is lost, and what was stated of labels is not shown beside it.
    write_rows(Path("texts.csv"), [[text] for text in texts], "text")
    for run, promised in ((copied, True), (run_of("bag"), False)):
        _, out, _ = command(check, run, "texts.csv")
        assert ("accuracy" in out, "full depth" in out, "promised" in out) == (False, False, promised)
        early, full = (EarlyExitClassifier.load(run, threshold=t).predict(texts) for t in (None, 1))
        (line,) = re.findall("^lost, of 100 texts(.*)$", out, re.MULTILINE)
        assert line.split()[0] == f"{100 * np.mean(early != full):.2f}"
    assert command(predict, copied, "texts.csv", "--out", "p.csv")[0] == 0
    assert "p.csv: its column label was written by predict" in command(check, copied, "p.csv")[2]
