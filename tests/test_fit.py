"""`minisweet fit`, `choose` and `test`: from own text to what is promised of new text, and whether it holds."""

import json
import re
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from safetensors.torch import load_file

from minisweet import EarlyExitClassifier
from minisweet.base.files import InputError
from minisweet.runs.run import Run
from minisweet.use import check, choose, fit, predict
from minisweet.use.classifier import tokenize
from tests.conftest import OWN, opinions, slow, write_classifier, write_rows

KEYS = "threshold exits goal lost_means choosing_texts judging_texts score full_depth lost share temperatures"
KEYS += " per_class id precision"
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


def test_choose_takes_another_goal_of_what_is_saved_and_is_the_same_again(copied, command, monkeypatch, tmp_path):
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


@pytest.mark.parametrize("name", ["mm", *slow("trunk0")])
def test_runs_of_the_paper_are_chosen_for_too(run_of, command, tmp_path, name):
    files = shutil.ignore_patterns("operating.json", "logits.safetensors")
    copy = Path(shutil.copytree(run_of(name), tmp_path / name, ignore=files))
    for module in (predict, check):
        status, _, err = command(module, copy, "a.csv")
        assert (status, f"{copy}: has no operating.json; first: minisweet choose {copy}\n" in err) == (2, True)
    assert command(choose, copy)[0] == 0
    assert read(copy) == read(run_of(name))


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
    assert (point["lost_means"], point["choosing_texts"], point["judging_texts"]) == ("changed", 25, 75)
    assert sum(point["per_class"]["support"]) == 45  # the score is of the labelled ones
    assert command(choose, copied, *"--max-lost 3 --sure 90".split())[0] == 0  # which needs no other file
    assert read(copied) == point
    write_rows(Path("all.csv"), labelled + unlabelled + new, "text", "label")
    _, out, _ = command(check, own_run, "all.csv")
    assert f"{300 + 500 - 160} of these rows were trained on, and do not count\n160 of these rows are validation" in out
    assert "\n200 rows, threshold " in out


def test_where_enough_labelled_texts_judge_the_others_only_teach(own_run, command, monkeypatch):
    for name in ("data.own.ENOUGH_JUDGES", "evaluation.operating.ENOUGH_JUDGES"):
        monkeypatch.setattr(f"minisweet.{name}", 45)
    folder, more = own_run.parent, own_run.parent / "more.csv"
    Path("half.jsonl").write_text('{"text": "the film is you", "label": [1]}\n' * 2)  # labels are not read
    options = [*OWN[2:], "--model", folder / "tiny", "--out", "run"]
    status, _, err = command(fit, folder / "own.csv", "--unlabelled", more, "--unlabelled", "half.jsonl", *options)
    counts = "unlabelled texts: 501 to learn from, 0 to judge; left out, labelled too or there twice: 28"
    assert (status, counts in err) == (0, True), err
    assert (read(Path("run"))["lost_means"], read(Path("run"))["judging_texts"]) == ("lost", 45)


def test_layers_learn_from_unlabelled_texts_where_few_are_labelled(own_run, command):
    """The plain model its own answers, if these are more than the labels, and branches always."""
    few = write_rows(Path("few.csv"), [[text] for text, _ in opinions(400)[300:]], "text")
    for more, stages in (
        (own_run.parent / "more.csv", {"trunk": 240, "trunk again": 240 + 400, "branches": 240 + 400}),
        (few, {"trunk": 240, "branches": 240 + 100}),
    ):
        options = ["--unlabelled", more, *OWN[2:], "--model", own_run.parent / "tiny", "--out", "run", "--overwrite"]
        assert command(fit, own_run.parent / "own.csv", *options, "--method", "branch")[0] == 0
        steps = {stage: len(losses) for stage, losses in read(Path("run"), "run")["losses"].items()}
        assert steps == {stage: 2 * -(-rows // 16) for stage, rows in stages.items()}


@pytest.mark.parametrize("method", ["plain", "branch"])
def test_a_finished_classifier_gets_exits_without_any_label(own_run, command, method):
    """Of a run, or of a classifier that was trained elsewhere."""
    more = own_run.parent / "more.csv"
    options = ["--unlabelled", more, "--out", "run", "--method", method, *OWN[2:]]
    for trunk, labels in ((own_run, ["down", "up"]), (write_classifier(Path("theirs")), ["LABEL_0", "LABEL_1"])):
        status, out, err = command(fit, "--trunk", trunk, *options, "--overwrite")
        assert (status, "agreement with full depth" in out) == (0, True), err
        record, point = read(Path("run"), "run"), read(Path("run"))
        assert (record["labels"], point["lost_means"], point["full_depth"]) == (labels, "changed", 100.0)
        before, after = (load_file(Path(folder, "model.safetensors")) for folder in (trunk, "run"))
        words = [tensors[name] for tensors in (before, after) for name in tensors if "word_embeddings" in name]
        assert words[0].equal(words[1])  # the trunk stays as it is
    assert "no row has a label of the model's: LABEL_0, LABEL_1" in command(check, "run", own_run.parent / "new.csv")[2]


def test_without_labels_all_exits_learn_what_the_trunk_says(own_run, command):
    options = ["--unlabelled", own_run.parent / "more.csv", *OWN[2:], "--exit-layers", "2,4", "--method", "sweet"]
    _, _, err = command(fit, "--trunk", own_run, *options, "--out", "run")
    assert "unlabelled texts: 416 to learn from, 104 to judge" in err
    assert len(read(Path("run"), "run")["losses"]["sweet"]) == 2 * 416 // 16


def test_rows_without_a_label_are_counted_and_no_error(own_run, command):
    """Also where no exit learns from them, or each of them is labelled elsewhere in the file."""
    for name, unlabelled in (("new", opinions(160)[60:]), ("same", opinions(5))):
        write_rows(Path(f"{name}.csv"), opinions(60) + [(text, "") for text, _ in unlabelled], "text", "label")
    for words, counts in (
        ("new.csv", "80 to learn from, 20 to judge; left out, labelled too or there twice: 0"),
        ("same.csv", "0 to learn from, 0 to judge; left out, labelled too or there twice: 5"),
        ("new.csv --method sweet --exit-layers 1,4", "0 to learn from, 20 to judge"),
    ):
        options = [*OWN[2:], "--epochs", 1, "--model", own_run.parent / "tiny", "--out", "run", "--overwrite"]
        status, _, err = command(fit, *words.split(), *options)
        assert (status, counts in err) == (0, True), err
        assert len(read(Path("run"), "run")["trained_keys"]) == 48 + 80 * (words == "new.csv")


def test_classes_that_may_be_a_typo_are_named_before_the_training(own_run, command, monkeypatch):
    monkeypatch.setattr("minisweet.runs.recipe.train", Mock(side_effect=InputError("the training")))
    rows = [*opinions(60), ("a film", "Up"), ("the dull film", "upp")]
    write_rows(Path("own.csv"), rows, "text", "label")
    _, _, err = command(fit, "own.csv", *OWN[2:], "--model", own_run.parent / "tiny")
    alike, few, aside, *_, training = err.splitlines()
    assert alike == "classes of their own, though they differ in case or Unicode form alone: Up, up"
    assert few == "classes of fewer than 5 rows, which may be a typo: Up (1), upp (1)"
    assert aside == "no row to validate on has the label Up, upp"
    assert training.endswith("the training")


def test_a_labelled_file_is_tested_beside_what_was_stated(copied, command):
    assert command(choose, copied, "--max-lost", 20, "--sure", 60)[0] == 0
    new = opinions(1000)[800:]
    write_rows(Path("new.csv"), [*new, ("the film", "left"), ("a film", "right"), ("is it", "")], "text", "label")
    (_, out, _), point = command(check, copied, "new.csv"), read(copied)
    assert out.startswith("rows with another label than the model's, left out: 2 (left, right)\n")
    assert "\n201 rows, threshold " in out
    found = {line[:26].strip(): line[26:].split() for line in out.splitlines()}
    for title, key in (("accuracy", "score"), ("full depth", "full_depth"), ("changed, of 100 texts", "lost")):
        assert found[title][-1] == f"{point[key]:.2f}"
    right = np.mean(EarlyExitClassifier.load(copied).predict([text for text, _ in new]) == [label for _, label in new])
    assert float(found["accuracy"][0]) == pytest.approx(100 * right, abs=0.005)
    assert "promised: at most 20 of 100 changed, 60% sure; held here" in out


def test_without_labels_a_test_counts_what_changes(copied, run_of, command, tmp_path):
    """What was stated of labels is not shown beside it."""
    assert command(choose, copied, "--max-lost", 20, "--sure", 60)[0] == 0
    texts = [text for text, _ in opinions(1000)[800:]]
    write_rows(Path("new.csv"), [[text] for text in texts], "text")
    for run, promised in ((copied, True), (run_of("trunk0"), False)):
        _, out, _ = command(check, run, "new.csv")
        assert ("accuracy" in out, "full depth" in out, "promised" in out) == (False, False, promised)
        early, full = (EarlyExitClassifier.load(run, threshold=t).predict(texts) for t in (None, 1))
        (line,) = re.findall("^changed, of 100 texts(.*)$", out, re.MULTILINE)
        assert line.split()[0] == f"{100 * np.mean(early != full):.2f}"
    assert command(predict, copied, "new.csv", "--out", "p.csv")[0] == 0
    assert "p.csv: its label is what predict answered" in command(check, copied, "p.csv")[2]
