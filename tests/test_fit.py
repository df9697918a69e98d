"""`minisweet fit`, `choose` and `test`: from own text to what is promised of new text, and whether it holds."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from minisweet import EarlyExitClassifier, load_encoder
from minisweet.classifier.teacher import embed, regress, taught
from minisweet import recipe
from minisweet.classifier.operating_point import CHOOSING
from minisweet.options import epochs_of
from minisweet.run import Run, load_trunk
from minisweet.classifier import choose, fit, predict
from minisweet.classifier import test as check
from minisweet.classifier.estimator import tokenize
from tests.conftest import OWN, opinions, random_batch, write_classifier, write_rows

KEYS = "threshold exits goal choosing_texts judging_texts labelled_judges score full_depth lost share temperatures"
KEYS += " weights per_class id precision"
INTERVALS = {f"{name}_interval" for name in ("score", "full_depth", "lost", "share")}


def read(run: Path, name: str = "operating") -> dict:
    return json.loads((run / f"{name}.json").read_text())


@pytest.fixture
def copied(own_run, tmp_path) -> Path:
    """The run, which may be changed."""
    return Path(shutil.copytree(own_run, tmp_path / "copied"))


def test_what_is_printed_is_what_is_saved(copied, command):
    (_, out, _), point = command(choose, copied, "--max-lost", 8, "--sure", 80), read(copied)
    assert point.keys() == {*KEYS.split()} | INTERVALS
    rows = {line[:42].strip(): line[42:].split() for line in out.splitlines()}
    assert rows["deployed"] == [f"{point['score']:.1f}", f"{point['share']:.2f}"]
    assert rows["full depth"] == [f"{point['full_depth']:.1f}", "1.00"]
    assert rows["a bag of words alone (exit 0)"][1] == "0.00"
    promise, last = out.splitlines()[-2:]
    assert promise == Run.read(copied).point.promise
    assert last == f"next: minisweet predict {copied} FILE.csv --out predicted.csv"
    assert point["lost"] == 100 * round(point["lost"] * point["judging_texts"] / 100) / point["judging_texts"]
    assert all(low <= point[name[:-9]] <= high for name in INTERVALS for low, high in [point[name]])


def test_choose_takes_another_goal_or_precision_and_is_the_same_again(own_run, copied, command, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Run, "model", None)  # no model runs
        for words, goal in (
            ("", {"max_lost": 3.0, "sure": 90.0}),
            ("--max-lost 8 --sure 75", {"max_lost": 8.0, "sure": 75.0}),
            ("--max-share 0.4", {"max_share": 0.4}),
        ):
            assert [command(choose, copied, *words.split())[0] for _ in range(2)] == [0, 0]
            assert read(copied)["goal"] == goal
    assert read(copied)["share"] <= 0.4 + 0.05  # on those who judge
    status, out, _ = command(choose, copied, "--max-share", 0, "--amp", "bf16")
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
    learnt = {text for text, _ in labelled + unlabelled} - {row["text"] for row in rows}
    assert set(record["trained_keys"]) == {*tokenize(EarlyExitClassifier.load(own_run).deployed, learnt).keys.tolist()}
    assert [point[f"{name}_texts"] for name in ("choosing", "judging")] == [15 + 25, 45 + 75]
    assert sum(point["per_class"]["support"]) == 45  # the score is of the labelled ones
    assert command(choose, copied, *"--max-lost 3 --sure 90".split())[0] == 0  # which needs no other file
    assert read(copied) == point
    write_rows(Path("all.csv"), labelled + unlabelled + new, "text", "label")
    _, out, _ = command(check, own_run, "all.csv")
    assert f"{300 + 500 - 160} of these rows were trained on, and do not count\n160 of these rows are validation" in out
    assert "\n200 rows, threshold " in out


def test_layers_learn_from_unlabelled_texts_where_few_are_labelled(own_run, command, monkeypatch):
    """The plain model where these are more than the labels, from itself and its embeddings; and branches always."""
    embedded, heard = [], []

    def spied(encoder, *more) -> torch.Tensor:
        assert not encoder.training
        embedded.append((encoder.layers[-1].output.weight.clone(), embed(encoder, *more), more[1]))
        return embedded[-1][1]

    monkeypatch.setattr(recipe, "embed", spied)
    monkeypatch.setattr(recipe, "taught", lambda *both: heard.append(both) or taught(*both))
    write_rows(Path("few.csv"), [[text] for text, _ in opinions(400)[300:]], "text")
    Path("half.jsonl").write_text('{"text": "the film is you", "label": [1]}\n' * 2)  # labels are not read
    folder = own_run.parent
    options = [folder / "own.csv", *OWN[2:], "--model", folder / "tiny", "--out", "run", "--method", "branch"]
    for files, counts, stages in (
        (
            [folder / "more.csv", "half.jsonl"],
            "401 to learn from, 100 to judge; left out, labelled too or there twice: 28",
            {"trunk": 240, "trunk again": 240 + 401, "branches": 240 + 401},
        ),
        (["few.csv"], "80 to learn from, 20 to judge", {"trunk": 240, "branches": 240 + 80}),
    ):
        more = [word for file in files for word in ("--unlabelled", file)]
        status, _, err = command(fit, *options, *more, "--overwrite")
        assert (status, f"unlabelled texts: {counts}" in err) == (0, True), err
        assert f"epochs: 2, and {epochs_of(240, 16, 2)} are the rule here; with few the model may learn nothing" in err
        steps = {stage: len(losses) for stage, losses in read(Path("run"), "run")["losses"].items()}
        assert steps == {stage: 2 * -(-rows // 16) for stage, rows in stages.items()}
    (before, vectors, examples), (first, second) = *embedded, *heard  # once each
    assert torch.equal(before, load_encoder(folder / "tiny").layers[-1].output.weight)  # by public weights
    labels = torch.tensor(examples.labels)
    assert ((labels[:240] >= 0).all(), (labels[240:] < 0).all(), first.shape) == (True, True, (401, 2))
    torch.testing.assert_close(second, regress(vectors, torch.eye(2)[labels[:240]])[240:])


@pytest.mark.parametrize("method", ["plain", "branch"])
def test_a_finished_classifier_gets_exits_without_any_label(own_run, command, method):
    """Of a run, whose texts are as long, or of a classifier that was trained elsewhere; it stays as it is."""
    options = ["--unlabelled", own_run.parent / "more.csv", "--out", "run", "--method", method, *OWN[4:]]
    theirs = write_classifier(Path("theirs"))
    for trunk, labels, length in ((own_run, ["down", "up"], []), (theirs, ["LABEL_0", "LABEL_1"], OWN[2:4])):
        status, out, err = command(fit, "--trunk", trunk, *options, *length, "--overwrite")
        assert (status, "agreement with full depth" in out) == (0, True), err
        assert ("its labels have no names" in err) is (trunk is theirs)
        its = Run.read(Path("run"))
        assert (its.record.labels, its.record.arguments.max_length) == (labels, 32)
        assert (its.point.labelled_judges, its.point.full_depth, its.record.combines) == (0, 100.0, False)
        said = its.model(*random_batch())[-1], load_trunk(trunk)[0](*random_batch())[0]
        torch.testing.assert_close(*said, rtol=0, atol=0)


def test_without_labels_all_exits_learn_what_the_trunk_says(own_run, command):
    options = ["--unlabelled", own_run.parent / "more.csv", *OWN[2:], "--exit-layers", "2,4", "--method", "sweet"]
    _, _, err = command(fit, "--trunk", own_run, *options, "--out", "run")
    assert "unlabelled texts: 416 to learn from, 104 to judge" in err
    assert len(read(Path("run"), "run")["losses"]["sweet"]) == 2 * 416 // 16


def test_another_file_is_tested_beside_what_was_stated(copied, run_of, command):
    assert command(choose, copied, "--max-lost", 20, "--sure", 60)[0] == 0
    new, point = opinions(1000)[800:], read(copied)
    texts, labels = map(list, zip(*new, strict=True))
    write_rows(Path("new.csv"), [*new, ("the film", "left"), ("a film", "right"), ("is it", "")], "text", "label")
    _, out, _ = command(check, copied, "new.csv")
    assert out.startswith("rows with another label than the model's, left out: 2 (left, right)\n")
    assert "\n201 rows, threshold " in out
    found = {line[:26].strip(): line[26:].split() for line in out.splitlines()}
    for title, key in (("accuracy", "score"), ("full depth", "full_depth"), ("lost, of 100 texts", "lost")):
        assert found[title][-1] == f"{point[key]:.2f}"
    right = EarlyExitClassifier.load(copied).score(texts, labels)
    assert float(found["accuracy"][0]) == pytest.approx(100 * right, abs=0.005)
    assert "promised: at most 20 of 100 lost, 60% sure; held here" in out
    # Where nothing could be told it says so: 0.8**4 is more than 0.4.
    for rows, said in (
        (4, "too few texts to tell whether it holds; some 5 would do where none is lost"),
        (5, "held here"),
    ):
        write_rows(Path("few.csv"), new[:rows], "text", "label")
        assert f"60% sure; {said}\n" in command(check, copied, "few.csv")[1]
    # Without labels what changes is lost, and what was stated of labels is not shown beside it.
    write_rows(Path("texts.csv"), [[text] for text in texts], "text")
    for run, promised in ((copied, True), (run_of("trunk0"), False)):
        _, out, _ = command(check, run, "texts.csv")
        assert ("accuracy" in out, "full depth" in out, "promised" in out) == (False, False, promised)
        early, full = (EarlyExitClassifier.load(run, threshold=t).predict(texts) for t in (None, 1))
        (line,) = re.findall("^lost, of 100 texts(.*)$", out, re.MULTILINE)
        assert line.split()[0] == f"{100 * np.mean(early != full):.2f}"
    assert command(predict, copied, "texts.csv", "--out", "p.csv")[0] == 0
    assert "p.csv: its label is what predict answered" in command(check, copied, "p.csv")[2]


def test_groups_stay_together_in_all_files_and_judge_by_one_text(own_run, command):
    """Of 200 threads 100 have labelled texts, and all have others."""
    folder, thread_of = own_run.parent, {text: f"thread {n % 200}" for n, (text, _) in enumerate(opinions(1000))}
    rows = [(*row, thread_of[row[0]]) for n, row in enumerate(opinions(500)) if n % 200 < 100]
    more = [(text, thread_of[text]) for text, _ in opinions(1000)[500:]]
    write_rows(Path("own.csv"), rows, "text", "label", "thread")
    write_rows(Path("more.csv"), more, "text", "thread")
    options = ["own.csv", *OWN[2:], "--model", folder / "tiny", "--out", "run", "--dev-size", 0.3, "--unlabelled"]
    assert "no column thread; it has" in command(fit, *options, folder / "more.csv", "--group-column", "thread")[2]
    status, _, err = command(fit, *options, "more.csv", "--group-column", "thread")
    assert status == 0, err
    run = Run.read(Path("run"))
    is_labelled, threads = (
        np.array(run.examples.labels) >= 0,
        np.array([thread_of[text] for text in run.examples.first]),
    )
    aside = {*threads[is_labelled]}, {*threads[~is_labelled]}
    assert (len(aside[0]), len(aside[1])) == (30, 20)
    learnt = [text for text, *_, thread in rows + more if thread not in aside[0] | aside[1]]
    assert set(run.record.trained_keys) == {*tokenize(EarlyExitClassifier.load("run").deployed, learnt).keys.tolist()}
    assert run.point.judging_texts == 30 + 20 - math.ceil(30 / CHOOSING) - 20 // CHOOSING
    # So it is in Python, and of a run that is read again, for whose choice the texts are asked anew.
    its = {name: getattr(run.record.arguments, name) for name in "model max_length amp epochs lr dev_size".split()}
    (texts, labels, groups), (others, of_others) = zip(*rows, strict=True), zip(*more, strict=True)
    ours = EarlyExitClassifier(**its).fit(texts, labels, groups=groups, unlabelled=others, unlabelled_groups=of_others)
    assert ours.operating_point == run.point  # the weights too, of which its id is a hash
    assert command(choose, "run", "--amp", "bf16")[0] == 0
    assert Run.read(Path("run")).outputs.units.equal(run.outputs.units)
    new = [(text, label, f"new {n % 10}") for n, (text, label) in enumerate(opinions(1030)[1000:])]
    write_rows(Path("new.csv"), new, "text", "label", "thread")
    assert "\n10 rows, threshold" in command(check, "run", "new.csv")[1]
