"""All exits on all rows: the folds and the sweep; and evaluate.py as a command, with its other two modes."""

import json
import os
import re
import shutil
from collections import defaultdict
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import evaluate
from minisweet import EarlyExitClassifier
from minisweet.adaptive import ExitRule, Exits, exits_taken, spaced_thresholds
from minisweet.base.files import InputError, read_json, write_json
from minisweet.evaluation.answers import AnsweredRows, load_answers
from minisweet.evaluation.goals import never_right
from minisweet.evaluation.operating import trained_on
from minisweet.evaluation.sweep import crossfit, curve_of, sweep
from minisweet.runs import folders
from minisweet.runs.folders import read_evaluation, read_record, read_validation
from minisweet.use import explain, predict
from tests.conftest import slow
from tests.test_operating import random_validation


@pytest.fixture
def copied(run_of, tmp_path):
    """A function that copies a finished run, which may be changed."""
    return lambda name: shutil.copytree(run_of(name), tmp_path / f"my {name}")


def test_folds_take_turns_and_each_is_decided_by_the_rule_of_the_others():
    validation = random_validation(5, (1, 2, 4), 103, 3)
    thresholds, turns = spaced_thresholds(7, 1 / 3), crossfit(validation)
    assert sorted(np.concatenate([rows for _, rows in turns])) == list(range(103))
    for rule, rows in turns:
        others = validation.take(np.setdiff1d(np.arange(103), rows))
        assert torch.equal(rule.temperatures, others.fit_rule().temperatures)
    assert len({tuple(rule.temperatures.tolist()) for rule, _ in turns}) == 5
    _, taken = sweep(turns, validation, thresholds)
    for rule, rows in turns:
        confidence = rule.confidences(validation.logits[:, rows])
        for i, threshold in enumerate(thresholds):
            assert taken[i, rows].tolist() == exits_taken(confidence, threshold, rule.lowest).tolist()
    nll = curve_of(validation, turns, thresholds)["nll"]
    assert all(after < before for before, after in zip(nll["before"], nll["after"], strict=True))
    assert [rows.tolist() for _, rows in crossfit(validation.take([7, 7, 7]))] == [[0, 1, 2]]  # a single text


@pytest.mark.parametrize("method", ["sweet", "mm", "branch"])
@pytest.mark.parametrize("layers", [(1, 2, 4), (0, 2, 4)])
def test_the_sweep_of_some_exits_is_that_of_a_model_that_has_no_others(method, layers):
    validation, rule = random_validation(2, layers, 60, 2, method), ExitRule(2, torch.tensor([0.7, 1.1, 2.0]))
    thresholds, asked, every = spaced_thresholds(9, 0.5), [0, 2], np.arange(60)
    some, taken = sweep([(rule, every)], validation, thresholds, asked)
    kept = AnsweredRows(validation.logits[asked], None, *validation[2:5], Exits((layers[0], 4), 4, method))
    alone, its_taken = sweep([(rule.kept(asked), every)], kept, thresholds)
    assert np.array_equal(taken, np.array(asked)[its_taken])
    for key in ("scores", "speedup_ratios", "area"):
        assert some[key] == pytest.approx(alone[key])
    assert [row[1] for row in some["exit_counts"]] == [0] * 9
    assert (some["speedup_ratios"][0], some["scores"][0]) == pytest.approx((layers[0] / 4, some["exit_scores"][0]))
    assert some["scores"][-1] == pytest.approx(some["exit_scores"][-1])


def test_warnings_name_classes_that_no_row_gets():
    recalls = [90.0, 0.0, 0.0], [90.0, 50.0, 0.0]  # of two exits
    reports = [{"recall": of_exit, "support": [20, 6, 4]} for of_exit in recalls]
    evaluation = {"exit_layers": [0, 4], "per_class": reports, "metric": "accuracy"}
    (line,) = never_right(evaluation, ["no", "yes", "rare"])
    assert line.startswith("exit 0 never predicts yes rightly: ")  # and of four rows nothing is said
    assert not never_right(evaluation | {"metric": "agreement"}, ["no", "yes", "rare"])


@pytest.mark.parametrize("name", ["branch", "lte", "pairs", "trunk0"])
def test_what_is_saved_is_read_again(run_of, name, tmp_path):
    """Its logits are compared with what rows get alone in test_use.py and test_distributed.py."""
    run = run_of(name)
    record, evaluation = read_record(run), read_evaluation(run)
    validation, rows = load_answers(run, evaluation, record), read_validation(run, record)
    assert (validation.certainty is None) == (name != "lte")
    assert validation.labels.tolist() == rows.labels
    assert validation.keys.tolist() == EarlyExitClassifier(run).tokenize(rows.texts()).keys().tolist()
    saved = json.loads((run / "evaluation.json").read_text())
    curve, _ = sweep(crossfit(validation), validation, saved["thresholds"])
    assert curve.items() <= saved.items()
    for broken in (None, b"{"):
        if broken:
            (tmp_path / "logits.safetensors").write_bytes(broken)
        with pytest.raises(InputError, match="logits.safetensors: not readable.*evaluate again"):
            load_answers(tmp_path, evaluation, record)


@pytest.mark.parametrize("name", ["lte", "trunk0", *slow("mm")])
def test_an_evaluation_is_whole_and_the_same_again(copied, command, name):
    run = copied(name)
    before = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text("{broken")
    status, out, err = command(evaluate, run)
    assert (status, err) == (0, "")
    after = json.loads((run / "evaluation.json").read_text())
    assert {key for key in before if before[key] != after[key]} <= {"seconds", "device"}
    assert (run / "curve.png").exists()
    assert after["warnings"] == re.findall(r"^warning: (.*)$", out, re.MULTILINE)
    point = read_evaluation(run).operating_point
    assert point.goal == {"max_loss": 1.0, "sure": 70.0}
    assert f"exits {', '.join(map(str, point.asked_exits))}" in out
    low, high = point.score_interval
    assert f"{point.score:8.2f}   {low:7.2f} to {high:7.2f}" in out
    assert f"{point.judging_texts} distinct texts judged, {point.choosing_texts} others chose" in out
    assert re.search(r"^class +precision +recall +F1", out, re.MULTILINE)
    rows, left = read_validation(run, read_record(run)), defaultdict(list)
    for level, answer in zip(rows.difficulties, EarlyExitClassifier(run)(rows.texts()), strict=True):
        left[level].append(answer.exit_layer)
    assert all(f"\n{level:<25}{np.mean(layers):8.2f}\n" in out for level, layers in left.items())
    assert re.search(r"^at full depth +[0-9.]+ +[0-9.]+$", out, re.MULTILINE)  # milliseconds
    assert all(f"{words} '{run}' " in out for words in ("minisweet predict", "evaluate.py", "minisweet explain"))


def test_where_the_figure_cannot_be_written_all_else_is_told(copied, command):
    run = copied("trunk0")
    (run / "curve.png").unlink(missing_ok=True)
    (run / "curve.png" / "x").mkdir(parents=True)
    status, out, err = command(evaluate, run)
    assert (status, err.count("\n"), "curve.png: cannot be written" in err) == (2, 1, True)
    assert "predict takes this operating point now" in out


def test_an_older_evaluation_can_still_be_read(copied):
    path = copied("sweet") / "evaluation.json"
    text = re.sub("(choosing|judging)_texts", "certified_rows", path.read_text())
    path.write_text(text.replace('"goal": {', '"wish": {'))
    point = read_evaluation(path.parent).operating_point
    assert (point.judging_texts, point.goal) == (None, {"max_loss": 1.0, "sure": 70.0})


@pytest.mark.parametrize("goal", ["--max-change 50", "--speed 0.5"])
def test_texts_that_were_trained_on_are_counted(copied, command, goal):
    run = copied("sweet")
    record = json.loads((run / "run.json").read_text())
    keys = load_answers(run, read_evaluation(run), read_record(run)).keys.tolist()
    for trained, words, line in (
        (None, "trained on these texts cannot be checked", "trained on these texts cannot be checked"),
        (keys[:1], " of the rows w", f"{keys.count(keys[0])} of these 200 rows w"),
        (keys, "200 of the rows were trained on, and neither chose nor judged", "200 rows, all of which were trained"),
    ):
        (run / "run.json").write_text(json.dumps(record | {"train_tokens": trained}))
        _, out, _ = command(evaluate, run, *goal.split())
        assert words in out
        assert ("too few new texts" in out) == (trained is keys)
        status, out, err = command(evaluate, run, "--test", run / "validation.jsonl")
        assert (status, err.count("\n")) == ((2, 1) if trained is keys else (0, 0))
        assert line in out + err
    del record["train_tokens"]  # as in an old run
    (run / "run.json").write_text(json.dumps(record | {"train_texts": ["0123456789abcdef"]}))
    assert "trained on these texts cannot be checked" in command(evaluate, run)[1]


def test_files_of_another_run_are_refused_and_the_same_run_elsewhere_is_not(copied, run_of, command, caplog):
    run = copied("sweet")
    EarlyExitClassifier(run)
    rows = run / "validation.jsonl"
    readers = [(explain, "--html", "a.html"), (explain, "a"), (predict, rows)]
    readers += [(evaluate, "--plot", "a.png"), (evaluate, "--test", rows)]
    trained = dict.fromkeys(("evaluation.json", "run.json", "model.safetensors"), readers)  # two of a new training
    for name, commands in ({"logits.safetensors": readers[:1]} | trained).items():
        shutil.copy(run_of("ee") / name, run / name)
        file = name if name == "logits.safetensors" else "evaluation.json"
        for module, *words in commands:
            status, out, err = command(module, run, *words)
            assert (status, out, err.count("\n")) == (2, "", 1)
            assert f"{run / file}: is not of the model beside it; evaluate again: evaluate.py {run}" in err
        shutil.copy(run_of("sweet") / name, run / name)
    assert caplog.text == ""
    write_json(run / "evaluation.json", read_json(run / "evaluation.json") | {"run_digest": None})
    EarlyExitClassifier(run)
    assert "older evaluation" in caplog.text


@given(st.integers(1, 40), st.integers(0, 10**6), st.data())
def test_the_digest_sees_each_byte_of_small_weights_and_each_part_of_large_ones(tmp_path_factory, pages, size, data):
    run = tmp_path_factory.mktemp("run")
    (run / "run.json").write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "PAGES", pages)
        content = bytearray(size)
        step = max(4096, size // pages)
        place = data.draw(st.integers(0, size)) if step == 4096 else data.draw(st.integers(0, pages - 1)) * step
        (run / "model.safetensors").write_bytes(content)
        before = folders.run_digest(run)
        content[place : place + 1] = b"x"
        (run / "model.safetensors").write_bytes(content)
        assert folders.run_digest(run) != before


FAILURES = {  # what the line says, what fails, and how
    "No space left": ("evaluate.write_json", Mock(side_effect=OSError(28, "No space left"))),
    "(Read-only)": ("tempfile.TemporaryFile", Mock(side_effect=OSError(30, "Read-only"))),
    "NaN": ("minisweet.evaluation.answers.all_logits", Mock(return_value=(torch.full((2, 200, 2), torch.nan), None))),
    # of the beginning, of the former evaluation, and of the moment before the files are renamed
    "evaluate again": ("minisweet.runs.folders.run_digest", Mock(side_effect="aab")),
}


@pytest.mark.parametrize("words", FAILURES)
def test_an_evaluation_that_fails_replaces_nothing(copied, command, monkeypatch, words):
    run = copied("trunk0")
    before = {path: path.read_bytes() for path in run.iterdir()}
    monkeypatch.setattr(*FAILURES[words])
    if words == "(Read-only)":  # it is said before anything is computed
        monkeypatch.setattr(evaluate, "run_exits", None)
    status, _, err = command(evaluate, run, "--speed", "0.5")
    assert (status, err.count("\n"), words in err) == (2, 1, True), err
    assert {path: path.read_bytes() for path in run.iterdir()} == before


def test_without_a_run_it_takes_the_newest_and_passes_no_unfinished_training_over(copied, command, tmp_path):
    assert "no run here" in command(evaluate)[2]
    run = shutil.move(copied("trunk0"), tmp_path / "runs" / "newer")
    for name, time in (("older", 1e9), (".written", 1e10)):  # the other is being written
        path = shutil.copytree(run, tmp_path / "runs" / name) / "run.json"
        os.utime(path, (time, time))
    (tmp_path / "runs" / ".new.checkpoint").mkdir()
    status, _, err = command(evaluate)
    assert (status, err.count("\n"), "runs/new: its training is not finished" in err) == (2, 1, True)
    os.utime(tmp_path / "runs" / ".new.checkpoint", (0, 0))  # older than the run
    assert command(evaluate)[1].startswith(f"{run.relative_to(tmp_path)}: the newest run under runs/\n")


@pytest.mark.parametrize("name", ["branch", "pairs", "trunk0", "lte"])
def test_a_labelled_file_is_scored_beside_what_was_stated(copied, command, name):
    run = copied(name)
    status, out, _ = command(evaluate, run, "--max-loss", "120", "--sure", "60")
    assert (status, "promised, of texts drawn like these: at most 120 points are lost, 60% sure" in out) == (0, True)
    before = (run / "evaluation.json").read_bytes()
    status, out, err = command(evaluate, run, "--test", run / "validation.jsonl")
    assert (status, err) == (0, "")
    point = read_evaluation(run).operating_point
    share = next(line for line in out.splitlines() if line.startswith("share of the layers")).split()
    assert share[8] == f"{point.speedup_ratio:.2f}"
    assert float(share[4]) == pytest.approx(point.speedup_ratio, abs=0.1)  # all rows, and those that judged
    assert "at most 120 points are lost, 60% sure, which holds here" in out
    assert re.search(r"^[\d,]+ of those that count (is a|are) validation rows? of the run", out, re.MULTILINE)
    assert (run / "evaluation.json").read_bytes() == before
    lines = (run / "validation.jsonl").read_text().splitlines()
    unlabelled = [{key: value for key, value in json.loads(line).items() if key != "label"} for line in lines]
    Path("new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in unlabelled))
    assert command(predict, run, "new.jsonl", "--out", "predicted.jsonl")[0] == 0
    status, _, err = command(evaluate, run, "--test", "predicted.jsonl")
    assert (status, "its label is what predict answered" in err) == (2, True)


def test_a_file_without_labels_shows_changes_and_whether_the_promise_holds(copied, command, tmp_path):
    run = copied("trunk0")
    assert command(evaluate, run, "--max-change", "20", "--sure", "60")[0] == 0
    rows = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    evaluation = read_evaluation(run)
    answers = load_answers(run, evaluation, read_record(run))
    rule = ExitRule.from_evaluation(evaluation, 2)
    _, (early,), _ = answers.decide_at(rule, [0, 1], [evaluation.operating_point.threshold])
    is_new = ~trained_on(answers, read_record(run).train_tokens)  # else it does not count
    rows, changes = np.array(rows)[is_new], (early != answers.logits[-1].argmax(-1).numpy())[is_new]
    assert changes.any()
    for kind, which, words in (("all", slice(None), "which holds here"), ("changed", changes, "does not hold here")):
        texts = [{"text": row["text"]} for row in rows[which]]
        (tmp_path / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
        status, out, err = command(evaluate, run, "--test", tmp_path / f"{kind}.jsonl")
        assert (status, err) == (0, "")
        assert f"percent changed          {100 * changes[which].mean():8.2f}" in out
        assert "at most 20% of the answers change, 60% sure, " in out
        assert words in out
        assert ("accuracy" in out, "without labels" in out) == (False, True)


def test_without_labels_what_is_stated_is_agreement(copied, command, tmp_path):
    run = copied("sweet")
    labelled = shutil.copy(run / "validation.jsonl", tmp_path / "test.jsonl")
    for name, old, new in (("run.json", "accuracy", "agreement"), ("validation.jsonl", r', "label": "\w+"', "")):
        (run / name).write_text(re.sub(old, new, (run / name).read_text()))
    status, out, _ = command(evaluate, run, "--sure", "75")
    evaluation = read_evaluation(run)
    assert (status, evaluation.metric) == (0, "agreement")
    assert evaluation.operating_point.goal == {"max_change": 3.0, "sure": 75.0}
    assert re.search(r"^full depth +100.00 +100.00 to +100.00$", out, re.MULTILINE)
    assert "agreement with full depth" in out
    assert "never predicts" not in out
    Path("a.csv").write_text("text\na\n")
    assert command(predict, run, "a.csv")[1].startswith("text,label,agreement,exit_layer,")
    _, out, _ = command(explain, run, "a text")
    assert ("compared with the agreement with full depth" in out, "confidence" in out) == (True, False)
    assert EarlyExitClassifier(run)(["a"])[0].confidence  # in Python the name stays
    assert command(evaluate, run, "--max-loss", "60", "--sure", "70")[0] == 0
    _, out, _ = command(evaluate, run, "--test", labelled)
    (line,) = [line for line in out.splitlines() if line.startswith("accuracy")]
    assert line.count(" to ") == 1  # nothing was stated of labels
    assert "at most 60 points are lost, 70% sure, which holds here" in out
