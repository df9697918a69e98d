"""evaluate.py as a command: what it writes and prints, and its other two modes."""

import json
import shutil

import numpy as np
import pytest
import torch

import evaluate
from minisweet.data.tasks import text_digest
from minisweet.data.text import TokenizedExamples, load_tokenizer
from minisweet.evaluation.records import Evaluation, read_evaluation
from minisweet.evaluation.sweep import all_logits, load_validation
from minisweet.runs.folders import load_run, read_record, read_validation

NAMES = ("sweet", "ee", "mm", "branch", "lte", "pairs", "trunk0")


@pytest.fixture
def copied(run_of, tmp_path):
    """A function that copies a finished run, which may be changed."""
    return lambda name: shutil.copytree(run_of(name), tmp_path / name)


@pytest.mark.parametrize("name", NAMES)
def test_an_evaluation_is_whole_and_the_same_again(copied, command, name):
    run = copied(name)
    before = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text("{broken")
    status, out, err = command(evaluate, run)
    assert (status, err) == (0, "")
    after = json.loads((run / "evaluation.json").read_text())
    assert {key for key in before if before[key] != after[key]} <= {"seconds", "device"}
    assert (run / "curve.png").exists()
    evaluation, record = read_evaluation(run), read_record(run)
    assert isinstance(evaluation, Evaluation)
    assert evaluation.exit_layers == record.exit_layers
    point = evaluation.operating_point
    assert point.wish == {"max_loss": 1.0, "sure": 70.0}
    assert f"exits {', '.join(map(str, point.asked_exits))}" in out
    low, high = point.score_interval
    assert f"{point.score:8.2f}   {low:7.2f} to {high:7.2f}" in out


def test_predictions_are_in_the_order_of_the_rows(run_of):
    run = run_of("pairs")
    model, record = load_run(run)
    rows = read_validation(run, record)
    examples = TokenizedExamples(load_tokenizer(run, record.vocab_size, record.max_length), rows)
    logits, certainty = all_logits(model, examples, None)
    assert certainty is None
    for n in (0, 3, len(examples) - 1):
        with torch.no_grad():
            alone = [said for said, _ in model.exit_by_exit(*examples.batch(np.array([n])).inputs)]
        assert torch.allclose(torch.stack(alone)[:, 0], logits[:, n], atol=1e-5)
    assert torch.equal(load_validation(run, read_evaluation(run), record).logits, logits)


def test_exits_are_asked_by_hand_and_goals_replace_each_other(copied, command):
    run = copied("trunk0")
    for options, wish in (
        (["--use-exits", "4"], {"max_loss": 1.0, "sure": 70.0}),
        (["--speed", "0"], {"speed": 0.0}),
        (["--max-change", "40", "--sure", "60"], {"max_change": 40.0, "sure": 60.0}),
        (["--max-loss", "150", "--sure", "95", "--use-exits", "0,4"], {"max_loss": 150.0, "sure": 95.0}),
    ):
        status, out, err = command(evaluate, run, *options)
        assert (status, err) == (0, "")
        evaluation = read_evaluation(run)
        assert evaluation.operating_point.wish == wish
        by_hand = {"4": [4], "0,4": [0, 4]}.get(options[-1])
        if by_hand:
            assert evaluation.exit_layers == evaluation.operating_point.asked_exits == by_hand
        if options[0] == "--speed":
            assert evaluation.operating_point.speedup_ratio == 0
    assert evaluation.operating_point.threshold < 1
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
def test_a_labelled_file_is_scored_beside_what_was_stated(copied, command, tmp_path, name):
    run = copied(name)
    assert command(evaluate, run, "--max-loss", "120", "--sure", "60")[0] == 0
    record, before = read_record(run), (run / "evaluation.json").read_bytes()
    rows = read_validation(run, record)
    texts = [[text] if isinstance(text, str) else list(text) for text in rows.texts()]
    columns = ["sentence1", "sentence2"] if name == "pairs" else ["text"]
    labels = [record.labels[label] for label in rows.labels]
    lines = [
        dict(zip(columns, text, strict=True)) | {"label": label} for text, label in zip(texts, labels, strict=True)
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, out, err = command(evaluate, run, "--test", tmp_path / "test.jsonl")
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
    rows = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "validation.jsonl").write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in rows))
    status, out, _ = command(evaluate, run)
    evaluation = read_evaluation(run)
    assert (status, evaluation.metric) == (0, "agreement")
    assert evaluation.operating_point.wish == {"max_change": 3.0, "sure": 90.0}
    assert "agreement with full depth" in out
    assert "never predicts" not in out
    assert command(evaluate, run, "--max-change", "60", "--sure", "70")[0] == 0
    _, out, _ = command(evaluate, run, "--test", tmp_path / "test.jsonl")
    (line,) = [line for line in out.splitlines() if line.startswith("accuracy")]
    assert line.count(" to ") == 1  # nothing was stated of labels
    assert "at most 60, 70% sure" in out


def test_several_runs_are_drawn_together(run_of, command, tmp_path):
    path = tmp_path / "plot.png"
    assert command(evaluate, run_of("sweet"), run_of("ee"), "--plot", path)[0] == 0
    assert path.exists()
