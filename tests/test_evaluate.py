"""All exits on all rows: the folds and the sweep; and evaluate.py as a command, with its other two modes."""

import json
import shutil

import numpy as np
import pytest
import torch

import evaluate
from minisweet.adaptive import ExitRule, Exits, exits_taken, spaced_thresholds
from minisweet.base.files import InputError
from minisweet.data.tasks import text_digest
from minisweet.data.text import TokenizedExamples, load_tokenizer
from minisweet.evaluation.sweep import Validation, crossfit, curve_of, load_validation, never_predicted, sweep
from minisweet.runs.folders import load_run, read_evaluation, read_record, read_validation
from tests.conftest import all_exits
from tests.test_operating import random_validation


@pytest.fixture
def copied(run_of, tmp_path):
    """A function that copies a finished run, which may be changed."""
    return lambda name: shutil.copytree(run_of(name), tmp_path / name)


@pytest.mark.parametrize("parts", [4, 5])
def test_parts_are_drawn_class_by_class_and_equal_texts_stay_together(parts):
    N = 200
    validation = random_validation(0, (1, 2), N)._replace(labels=torch.arange(N) % 2)  # a file whose labels alternate
    found = validation.parts(parts)
    assert np.bincount(2 * found + np.arange(N) % 2).tolist() == [N // parts // 2] * (2 * parts)
    order = np.random.default_rng(1).permutation(N)
    assert validation.take(order).parts(parts).tolist() == found[order].tolist()
    repeated = validation.take(np.random.default_rng(2).integers(20, size=N))
    # a text under two labels is in one part too
    both = repeated._replace(labels=torch.from_numpy(np.random.default_rng(3).integers(2, size=N)))
    for rows in (repeated, both):
        found, keys = rows.parts(parts), rows.keys.numpy()
        assert all(len(set(found[keys == key])) == 1 for key in keys)
        assert len(set(found)) == parts


def test_folds_take_turns_and_each_is_decided_by_the_rule_of_the_others():
    validation = random_validation(5, (1, 2, 4), 103, 3)
    folds = validation.folds()
    assert len(folds) == 5
    assert sorted(np.concatenate([rows for _, rows in folds])) == list(range(103))
    assert all(sorted([*others, *rows]) == list(range(103)) for others, rows in folds)
    thresholds, turns = spaced_thresholds(7, 1 / 3), crossfit(validation)
    for (rule, _), (others, _) in zip(turns, folds, strict=True):
        assert torch.equal(rule.temperatures, validation.take(others).fit_rule().temperatures)
    assert len({tuple(rule.temperatures.tolist()) for rule, _ in turns}) == 5
    _, taken = sweep(turns, validation, thresholds)
    for rule, rows in turns:
        confidence = rule.confidences(validation.logits[:, rows])
        for i, threshold in enumerate(thresholds):
            assert taken[i, rows].tolist() == exits_taken(confidence, threshold, rule.lowest).tolist()
    nll = curve_of(validation, turns, thresholds)["nll"]
    assert all(after < before for before, after in zip(nll["before"], nll["after"], strict=True))
    ((others, rows),) = validation.take([7, 7, 7]).folds()  # a single text
    assert others.tolist() == rows.tolist() == [0, 1, 2]


@pytest.mark.parametrize("method", ["sweet", "mm", "branch"])
@pytest.mark.parametrize("layers", [(1, 2, 4), (0, 2, 4)])
def test_the_sweep_of_some_exits_is_that_of_a_model_that_has_no_others(method, layers):
    validation, rule = random_validation(2, layers, 60, 2, method), ExitRule(2, torch.tensor([0.7, 1.1, 2.0]))
    thresholds, places, every = spaced_thresholds(9, 0.5), [0, 2], np.arange(60)
    some, taken = sweep([(rule, every)], validation, thresholds, places)
    kept = Validation(validation.logits[places], None, *validation[2:5], Exits((layers[0], 4), 4, method))
    alone, its_taken = sweep([(rule.kept(places), every)], kept, thresholds)
    assert np.array_equal(taken, np.array(places)[its_taken])
    for key in ("scores", "speedup_ratios", "area"):
        assert some[key] == pytest.approx(alone[key])
    assert [row[1] for row in some["exit_counts"]] == [0] * 9
    assert (some["speedup_ratios"][0], some["scores"][0]) == pytest.approx((layers[0] / 4, some["exit_scores"][0]))
    assert some["scores"][-1] == pytest.approx(some["exit_scores"][-1])


def test_warnings_name_classes_that_are_never_predicted():
    labels = torch.tensor([0] * 20 + [1] * 6 + [2] * 4)
    logits = torch.nn.functional.one_hot(torch.stack([labels * 0, labels]), 3).float()
    validation = Validation(logits, None, labels, torch.arange(30), "accuracy", Exits((0, 4), 4, "sweet"))
    (line,) = never_predicted(validation, ["no", "yes", "rare"])
    assert "the exit after layer 0 never predicts yes: " in line  # and of four rows nothing is said
    assert not never_predicted(validation._replace(metric="agreement"), ["no", "yes", "rare"])


@pytest.mark.parametrize("name", ["branch", "lte", "pairs", "trunk0"])
def test_what_is_saved_is_what_each_row_gets_alone(run_of, name, tmp_path):
    run = run_of(name)
    (model, record), evaluation = load_run(run), read_evaluation(run)
    validation, rows = load_validation(run, evaluation, record), read_validation(run, record)
    examples = TokenizedExamples(load_tokenizer(run, record.vocab_size, record.max_length), rows)
    for n in (0, 3, len(examples) - 1):
        with torch.no_grad():
            logits, certainty = all_exits(model, examples.batch(np.array([n])).inputs)
        torch.testing.assert_close(validation.logits[:, n], logits[:, 0], atol=1e-5, rtol=0)
        if name == "lte":
            torch.testing.assert_close(validation.certainty[:, n], certainty[:, 0], atol=1e-5, rtol=0)
        else:
            assert validation.certainty is certainty is None
    assert validation.labels.tolist() == rows.labels
    assert [f"{key % 2**64:016x}" for key in validation.keys.tolist()] == [*map(text_digest, rows.texts())]
    curve, _ = sweep(crossfit(validation), validation, evaluation.thresholds)
    assert [curve[key] for key in ("scores", "area")] == [evaluation.scores, evaluation.area]
    with pytest.raises(InputError, match="logits.safetensors: not readable.*evaluate again"):
        load_validation(tmp_path, evaluation, record)


@pytest.mark.parametrize("name", ["sweet", "ee", "mm", "branch", "lte", "pairs", "trunk0"])
def test_an_evaluation_is_whole_and_the_same_again(copied, command, name):
    run = copied(name)
    before = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text("{broken")
    status, out, err = command(evaluate, run)
    assert (status, err) == (0, "")
    after = json.loads((run / "evaluation.json").read_text())
    assert {key for key in before if before[key] != after[key]} <= {"seconds", "device"}
    assert (run / "curve.png").exists()
    point = read_evaluation(run).operating_point
    assert point.wish == {"max_loss": 1.0, "sure": 70.0}
    assert f"exits {', '.join(map(str, point.asked_exits))}" in out
    low, high = point.score_interval
    assert f"{point.score:8.2f}   {low:7.2f} to {high:7.2f}" in out


def test_exits_are_asked_by_hand_and_goals_replace_each_other(copied, command):
    run = copied("trunk0")
    for options, wish, by_hand in (
        (["--use-exits", "4"], {"max_loss": 1.0, "sure": 70.0}, [4]),
        (["--speed", "0"], {"speed": 0.0}, None),
        (["--max-change", "40"], {"max_change": 40.0, "sure": 90.0}, None),
        (["--max-change", "40", "--sure", "60"], {"max_change": 40.0, "sure": 60.0}, None),
        (["--max-loss", "150", "--sure", "95", "--use-exits", "0,4"], {"max_loss": 150.0, "sure": 95.0}, [0, 4]),
    ):
        status, out, err = command(evaluate, run, *options)
        assert (status, err) == (0, "")
        evaluation = read_evaluation(run)
        point = evaluation.operating_point
        assert point.wish == wish
        assert by_hand in (None, evaluation.exit_layers)
        assert by_hand in (None, point.asked_exits)
        assert point.speedup_ratio == 0 or "speed" not in wish
    assert point.threshold < 1
    assert "promised, 95% sure, of texts drawn like these: at most 150 points are lost" in out


def test_texts_that_were_trained_on_are_counted(copied, command):
    run = copied("sweet")
    record = json.loads((run / "run.json").read_text())
    record["train_texts"] = None
    (run / "run.json").write_text(json.dumps(record))
    assert "cannot be checked" in command(evaluate, run, "--max-change", "50")[1]
    rows = read_validation(run, read_record(run))
    record["train_texts"] = [*map(text_digest, rows.texts())]
    (run / "run.json").write_text(json.dumps(record))
    _, out, _ = command(evaluate, run, "--max-change", "50")
    point = read_evaluation(run).operating_point
    assert (point.certified_rows, point.threshold) == (0, 1)
    assert point.trained_rows == len(rows.first) - -(-len(rows.first) // 4)
    assert f"{point.trained_rows} of these rows were trained on, and promise nothing" in out
    assert "and 0 are here" in out


@pytest.mark.parametrize("name", ["branch", "pairs", "trunk0", "lte"])
def test_a_labelled_file_is_scored_beside_what_was_stated(copied, command, name):
    run = copied(name)
    assert command(evaluate, run, "--max-loss", "120", "--sure", "60")[0] == 0
    before = (run / "evaluation.json").read_bytes()
    status, out, err = command(evaluate, run, "--test", run / "validation.jsonl")
    assert (status, err) == (0, "")
    point = read_evaluation(run).operating_point
    share = next(line for line in out.splitlines() if line.startswith("share of the layers")).split()
    assert share[4:5] == share[8:9] == [f"{point.speedup_ratio:.2f}"]  # here and stated: the same rows
    assert "percent changed" in out
    assert (run / "evaluation.json").read_bytes() == before


def test_without_labels_what_is_stated_is_agreement(copied, command, tmp_path):
    run = copied("sweet")
    record = json.loads((run / "run.json").read_text()) | {"metric": "agreement"}
    (run / "run.json").write_text(json.dumps(record))
    shutil.copy(run / "validation.jsonl", tmp_path / "test.jsonl")
    rows = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    (run / "validation.jsonl").write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in rows))
    status, out, _ = command(evaluate, run)
    evaluation = read_evaluation(run)
    assert (status, evaluation.metric) == (0, "agreement")
    assert evaluation.operating_point.wish == {"max_change": 3.0, "sure": 90.0}
    assert "agreement with full depth" in out
    assert "never predicts" not in out
    assert command(evaluate, run, "--max-loss", "5")[0] == 0
    assert read_evaluation(run).operating_point.wish == {"max_loss": 5.0, "sure": 70.0}
    assert command(evaluate, run, "--max-change", "60", "--sure", "70")[0] == 0
    _, out, _ = command(evaluate, run, "--test", tmp_path / "test.jsonl")
    (line,) = [line for line in out.splitlines() if line.startswith("accuracy")]
    assert line.count(" to ") == 1  # nothing was stated of labels
    assert "at most 60, 70% sure" in out
