"""What users call: the classifier, and the commands predict, explain and export."""

import csv
import http.client
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import evaluate
import train
from minisweet import EarlyExitClassifier, MultiExitModel, load_encoder
from minisweet.adaptive import ExitRule, exits_taken
from minisweet.base.commands import run_command
from minisweet.base.safe import InputError, sha256
from minisweet.calibration import fit_rule
from minisweet.data import rows
from minisweet.data.tasks import load_examples
from minisweet.data.text import TokenizedExamples
from minisweet.evaluation import sweep
from minisweet.runs.folders import load_run, read_evaluation, read_record
from minisweet.use import explain, export, predict
from tests.conftest import CHECKOUT, DEBERTA_IS_SLOW, draw_quickly, exit_model, random_batch, tiny_encoder, write_model

TEXTS = ["the film was superb", ("a dull film", "you and i"), "", "not bad , it is great", ("the film", "")]


def call(module, *arguments) -> tuple[int, str, str]:
    """Run a command in this process: its exit status, standard output and standard error."""
    with pytest.MonkeyPatch.context() as patch:
        out, err = io.StringIO(), io.StringIO()
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        draw_quickly(patch)
        status = 0
        try:
            run_command(module.main)
        except SystemExit as exit_:
            status = exit_.code
        return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
    """Runs of tiny models on the toy task, evaluated; each is made once."""
    made, folder = {}, tmp_path_factory.mktemp("runs")

    def make(method="sweet", model_type="bert", exit_strategy="confidence"):
        key = (method, model_type, exit_strategy)
        if key not in made:
            tiny, run = folder / f"tiny-{model_type}", folder / "-".join(key)
            if not tiny.exists():
                write_model(tiny, model_type)
            options = ["--method", method, "--exit-strategy", exit_strategy, "--model", tiny, "--max-length", 32]
            options += ["--train-size", 48, "--epochs", 1, "--lr", 0.01, "--exit-layers", "1,2,4"]
            assert call(train, *options, "--out", run)[0] == 0
            assert call(evaluate, run, "--calibration", "dev")[0] == 0
            made[key] = run
        return made[key]

    return make


@pytest.fixture(scope="module")
def run(make_run):
    """A SWEET run."""
    return make_run()


def middle(run) -> float:
    """A threshold at which half of the validation rows or so leave at the first exit, in a gap of confidences."""
    saved = load_file(run / "logits.safetensors")
    rule = ExitRule.from_evaluation(read_evaluation(run, read_record(run)), saved["logits"].shape[-1])
    sure = rule.confidences(saved["logits"], saved.get("certainty"))[0].unique()  # sorted
    sure = sure[len(sure) // 4 : -(len(sure) // 4)]
    place = int(sure.diff().argmax())
    return float((sure[place] + sure[place + 1]) / 2)


def write_csv(path, rows, header=("id", "text")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def read_csv(path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("method", "strategy"), [("sweet", "confidence"), ("branch", "confidence"), ("mm", "lte"), ("branch", "lte")]
)
def test_predictions_are_those_of_the_evaluation(make_run, tmp_path, method, strategy):
    """Labels, exits and confidences of the sweep with --calibration dev, through the command, in the input's order."""
    run = make_run(method, exit_strategy=strategy)
    threshold, saved = middle(run), load_file(run / "logits.safetensors")
    rule = fit_rule(saved["logits"], saved.get("certainty"), saved["labels"], "dev")
    confidence = rule.confidences(saved["logits"], saved.get("certainty"))  # (K, N)
    taken = exits_taken(confidence, threshold, rule.lowest)
    assert len(taken.unique()) > 1
    rows = load_examples("toy", "dev", tmp_path)
    path = write_csv(tmp_path / "dev.csv", enumerate(rows.first))
    status, out, _ = call(predict, run, path, "--out", tmp_path / "out.csv", "--threshold", threshold)
    assert (status, "1,000 rows" in out) == (0, True)
    found = read_csv(tmp_path / "out.csv")
    assert [row["text"] for row in found] == rows.first
    assert [int(row["exit_layer"]) for row in found] == np.array([1, 2, 4])[taken.numpy()].tolist()
    labels = saved["logits"].argmax(-1).gather(0, taken[None])[0]
    assert [row["label"] for row in found] == [("negative", "positive")[label] for label in labels.tolist()]
    expected = confidence.gather(0, taken[None])[0].numpy()
    np.testing.assert_allclose(
        [float(row["confidence"]) for row in found], expected, atol=2e-6 if strategy != "lte" else 2e-5
    )
    for row in found[:20]:
        p = {name: float(row[f"p_{name}"]) for name in ("negative", "positive")}
        assert sum(p.values()) == pytest.approx(1)
        assert max(p, key=p.get) == row["label"]
        if strategy == "confidence":
            assert p[row["label"]] == float(row["confidence"])


@pytest.mark.parametrize("strategy", ["confidence", "lte"])
@pytest.mark.parametrize(("kind", "value"), [("dtype", torch.float64), ("dtype", torch.bfloat16), ("device", "meta")])
def test_torchs_defaults_change_no_answer(make_run, model_dir, kind, value, strategy):
    run, texts = make_run("sweet", exit_strategy=strategy), TEXTS[:3]

    def answers() -> list:
        model = MultiExitModel(load_encoder(model_dir), (1, 4), 2, exit_strategy=strategy).train()
        ids = torch.from_numpy(np.ones((2, 5), dtype=np.int64))
        assert model(ids, ids, ids * 0).isfinite().all()
        found = [EarlyExitClassifier(run, wish)(some) for wish in (0.7, 1.0) for some in (texts, texts[:1])]
        return [*found, EarlyExitClassifier(run, max_loss=5.0)(texts)]

    expected, set_default = answers(), getattr(torch, f"set_default_{kind}")
    before = getattr(torch, f"get_default_{kind}")()
    set_default(value)
    try:
        assert answers() == expected
    finally:
        set_default(None if kind == "device" else before)  # a device that is given would slow all tests to come


def test_classifier_answers_any_number_in_order(run):
    classify = EarlyExitClassifier(run, middle(run))
    alone = [classify([text])[0] for text in TEXTS]
    many = [TEXTS[i % len(TEXTS)] for i in range(1500)]  # more than are tokenised at once
    for answer, i in zip(classify(iter(many)), range(1500), strict=True):
        expected = alone[i % len(TEXTS)]
        assert (answer.label, answer.exit_layer) == (expected.label, expected.exit_layer)
        assert answer.confidence == pytest.approx(expected.confidence, abs=1e-6)
        assert list(answer.probabilities) == ["negative", "positive"]
    assert classify([]) == []
    assert classify([list(TEXTS[1])])[0].label == alone[1].label
    classify.model.train()  # it has dropout
    assert classify(TEXTS) == classify(TEXTS)


def test_classifier_serves_several_threads(run):
    classify = EarlyExitClassifier(run, middle(run))
    expected = [classify(TEXTS[i % 5 :]) for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: classify(TEXTS[i % 5 :]), range(40))) == expected


@pytest.mark.parametrize(
    ("texts", "where"),
    [
        (["a", None], "item 1: None"),
        ([b"a"], "item 0: b'a'"),
        ([("a", "b", "c")], "item 0"),
        (["a", "b", ("c", 1)], "item 2"),
        (["\ud800"], "item 0"),
        ("a text", r"classify\(\[text\]\)"),
        (None, "texts: None"),
    ],
)
def test_classifier_checks_what_it_gets(run, texts, where):
    with pytest.raises(ValueError, match=where):
        EarlyExitClassifier(run, 0.9)(texts)


@pytest.mark.parametrize("threshold", [0.2, 1.01, float("nan"), "0.9", True])
def test_threshold_outside_its_range(run, threshold):
    with pytest.raises(ValueError, match="from 0.5 .* to 1"):
        EarlyExitClassifier(run, threshold)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("run", [None, 5, b"x", "a\0b", ""]),
        ("amp", ["bfloat16", None]),
        ("speed", [0, 1.5, float("nan"), "0.5"]),
        ("max_loss", [-1, float("inf"), True]),
        ("max_change", [0, 100, "3", True]),
        ("sure", [49, 100, None]),
        ("batch_size", [0, 2.0, True]),
        ("device", [None, 0]),
    ],
)
def test_arguments_are_checked(run, name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{name}: {re.escape(repr(value))}, should be ") as error:
            EarlyExitClassifier(**{"run": run} | {name: value})
        assert "\n" not in str(error.value)


def test_ends_of_the_threshold(run):
    assert {answer.exit_layer for answer in EarlyExitClassifier(run, 0.5)(TEXTS)} == {1}
    assert {answer.exit_layer for answer in EarlyExitClassifier(run, 1)(TEXTS)} == {4}


def test_operating_point(make_run, run, tmp_path):
    """None is evaluation.json's; a wish chooses from the saved logits; without an evaluation there is neither."""
    copied = tmp_path / "run"
    copied.mkdir()
    for path in run.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["operating_point"] |= {"threshold": 0.8125}
    (copied / "evaluation.json").write_text(json.dumps(evaluation))
    assert EarlyExitClassifier(copied).threshold == 0.8125
    assert EarlyExitClassifier(copied, 0.75).threshold == 0.75
    rows = load_examples("toy", "dev", tmp_path).first[:50]  # that were evaluated
    assert {answer.exit_layer for answer in EarlyExitClassifier(copied, speed=0.25)(rows)} == {1}
    fast, slow = (EarlyExitClassifier(copied, max_loss=points).threshold for points in (100, 0))
    assert fast <= slow
    for given in ({"threshold": 0.75, "speed": 0.5}, {"max_change": 3, "max_loss": 1}):
        with pytest.raises(ValueError, match="more than one"):
            EarlyExitClassifier(copied, **given)
    with pytest.raises(ValueError, match="sure: 95 needs max_change"):
        EarlyExitClassifier(copied, sure=95)
    (copied / "evaluation.json").unlink()
    with pytest.raises(ValueError, match="evaluation.json"):
        EarlyExitClassifier(copied)
    status, _, err = call(predict, copied, write_csv(tmp_path / "a.csv", [(1, "a")]))
    assert (status, "threshold" in err, "Traceback" in err, err.count("\n")) == (2, True, False, 1)
    assert EarlyExitClassifier(copied, 0.75)(TEXTS)[0].label in ("negative", "positive")


@pytest.mark.parametrize(
    "wish", [{"max_loss": 5.0}, {"speed": 0.5}, {"max_change": 20.0}, {"max_change": 20.0, "sure": 60.0}]
)
@pytest.mark.parametrize(("method", "strategy"), [("sweet", "confidence"), ("branch", "lte")])
def test_a_wish_gives_one_rule_and_threshold_everywhere(make_run, tmp_path, wish, method, strategy):
    """evaluate.py with a wish, and the classifier and predict with that wish, on a run evaluated for another."""
    run = make_run(method, exit_strategy=strategy)
    options = [word for name, value in wish.items() for word in (f"--{name.replace('_', '-')}", value)]
    copied = shutil.copytree(run, tmp_path / "run")
    assert call(evaluate, copied, "--calibration", "dev", *options)[0] == 0
    point = json.loads((copied / "evaluation.json").read_text())["operating_point"]
    assert point["wish"] == ({"sure": 90.0} | wish if "max_change" in wish else wish)
    theirs, ours = EarlyExitClassifier(copied), EarlyExitClassifier(run, **wish)
    assert theirs.threshold == ours.threshold == point["threshold"]
    for name in ("temperatures", "ranges"):
        torch.testing.assert_close(getattr(theirs.rule, name), getattr(ours.rule, name))
    path = write_csv(tmp_path / "a.csv", [(1, "a")])
    status, out, _ = call(predict, run, path, "--out", tmp_path / "b.csv", *options)
    assert (status, f"at threshold {point['threshold']:.4g}" in out) == (0, True)
    assert f"threshold {point['threshold']:.4g}" in call(explain, run, "a text", *options)[1]
    for module, given in ((predict, (path,)), (explain, ("a text",)), (evaluate, ())):
        status, _, err = call(module, run, *given, "--sure", 90)
        assert (status, "--sure: 90.0 needs --max-change" in err) == (2, True)


def test_what_no_threshold_can_certify_is_said_in_one_line(run, caplog):
    assert EarlyExitClassifier(run, max_change=0.1, sure=99).threshold == 1
    assert EarlyExitClassifier(run, speed=0.1).threshold < 1
    certificate, speed = (record.getMessage() for record in caplog.records)
    assert "4603 rows would do if none changed, and 750 certify here" in certificate
    assert "speed: 0.1 is out of reach; the nearest is 0.25" in speed


@pytest.mark.parametrize(
    ("amp", "said"), [("off", ""), ("bf16", "it was certified in float32, which says nothing of bf")]
)
def test_a_certificate_is_of_one_precision(run, caplog, amp, said):
    EarlyExitClassifier(run, threshold=0.9, amp=amp)
    EarlyExitClassifier(run, max_loss=1.0, amp=amp)
    assert "certified" not in caplog.text
    EarlyExitClassifier(run, max_change=30, amp=amp)
    assert ("certified in" in caplog.text, said in caplog.text) == (bool(said), True)
    caplog.clear()
    assert EarlyExitClassifier(run, max_change=0.1, sure=99, amp=amp).threshold == 1  # where nothing can change
    assert "certified in" not in caplog.text


def test_a_file_is_tested_at_the_operating_point_and_nothing_changes(make_run, run, tmp_path):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    rows = load_examples("toy", "dev", tmp_path)
    names = [("negative", "positive")[label] for label in rows.labels]
    path = write_csv(tmp_path / "dev.csv", zip(names, rows.first, strict=True), ("label", "text"))
    status, out, err = call(evaluate, run, "--test", path)
    assert (status, "Traceback" in err) == (0, False)
    point = json.loads(before["evaluation.json"])["operating_point"]
    lines = {line[:24].strip(): line[24:].split() for line in out.splitlines()}
    for name, key in (("accuracy", "score"), ("points lost", "loss"), ("share of the layers", "speedup_ratio")):
        assert float(lines[name][0]) == pytest.approx(point[key], abs=0.006)  # the very rows that promised it
        assert lines[name][1] == f"{point[key]:.2f}"
    assert before == {path.name: path.read_bytes() for path in run.iterdir()}
    renamed = write_csv(tmp_path / "renamed.csv", zip(names, rows.first, strict=True), ("side", "body"))
    told = call(evaluate, run, "--test", renamed, "--text-columns", "body", "--label-column", "side")[1]
    assert told == out.replace(str(path), str(renamed))
    predicted = call(predict, run, path, "--out", tmp_path / "predicted.csv")[1]
    assert f"; {point['speedup_ratio']:.0%} of the layers; " in predicted
    for content, message in (("label,text\nneutral,a\n", "line 2"), ("text\na\n", "no column label")):
        (tmp_path / "bad.csv").write_text(content)
        status, _, err = call(evaluate, run, "--test", tmp_path / "bad.csv")
        assert (status, message in err, err.count("\n")) == (2, True, 1), err
    status, _, err = call(evaluate, run, "--test", path, "--text-columns", "label")
    assert (status, "should not be the label column, 'label'" in err, err.count("\n")) == (2, True, 1), err
    (tmp_path / "gap.csv").write_text("label,text\nnegative,a\nnegative, \n")
    assert "\ntest: empty texts, skipped: 1\n" in call(evaluate, run, "--test", tmp_path / "gap.csv")[1]
    status, _, err = call(evaluate, run, "--test", path, "--speed", 0.5)
    assert (status, "--speed: 0.5 needs an evaluation" in err) == (2, True)
    status, _, err = call(evaluate, run, "--label-column", "side")
    assert (status, "--label-column: side needs --test" in err) == (2, True)


def test_logits_are_those_of_the_evaluation(run, tmp_path):
    """Compared by their SHA-256."""
    copied = shutil.copytree(run, tmp_path / "run")
    saved, path = load_file(run / "logits.safetensors"), copied / "logits.safetensors"
    evaluation = json.loads((run / "evaluation.json").read_text())
    (copied / "evaluation.json").write_text(json.dumps(evaluation | {"logits_digest": "0"}))
    with pytest.raises(ValueError, match="logits.safetensors: .*SHA-256"):
        EarlyExitClassifier(copied, speed=0.5)
    for logits, reason in ((saved["logits"] + 1, "SHA-256"), (saved["logits"][:2], "not the logits")):
        save_file(saved | {"logits": logits.contiguous()}, path)
        digest = sha256(path) if reason != "SHA-256" else evaluation["logits_digest"]
        (copied / "evaluation.json").write_text(json.dumps(evaluation | {"logits_digest": digest}))
        with pytest.raises(ValueError, match=rf"logits.safetensors: .*{reason}"):
            EarlyExitClassifier(copied, speed=0.5)
    status, _, err = call(explain, copied, "--html", tmp_path / "page.html")
    assert (status, "not the logits" in err, err.count("\n")) == (2, True, 1)
    path.unlink()
    with pytest.raises(ValueError, match="logits.safetensors: no such file; evaluate it again"):
        EarlyExitClassifier(copied, speed=0.5)
    shutil.copytree(run, copied, dirs_exist_ok=True)
    EarlyExitClassifier(copied, speed=0.5)


@pytest.mark.parametrize("stop", ["evaluation.json", "replace", "neither"])
def test_a_stopped_evaluation_leaves_a_pair_that_fits(run, tmp_path, monkeypatch, stop):
    """The old pair until evaluation.json is there, then the new one; and the next evaluation clears up."""
    copied = shutil.copytree(run, tmp_path / "run")
    with monkeypatch.context() as patch:
        if stop == "evaluation.json":
            patch.setattr(sweep, "write_json", lambda *_: sys.exit(143))
        elif stop == "replace":
            replace, last = type(copied).replace, sweep.NEXT_LOGITS
            stopped = lambda path, to: sys.exit(143) if path.name == last else replace(path, to)  # noqa: E731
            patch.setattr(type(copied), "replace", stopped)
        status, *_ = call(evaluate, copied, "--use-exits", "2,4", "--calibration", "none")
    assert status == (0 if stop == "neither" else 143)
    is_old = stop == "evaluation.json"
    assert EarlyExitClassifier(copied, speed=0.5).exit_layers == ((1, 2, 4) if is_old else (2, 4))
    assert call(explain, copied, "--html", tmp_path / "page.html")[0] == 0
    assert call(evaluate, copied, "--thresholds", 3)[0] == 0
    assert EarlyExitClassifier(copied, speed=0.5).exit_layers == (1, 2, 4)
    assert {path.name for path in copied.iterdir()} == {path.name for path in run.iterdir()}


def test_exits_in_use_are_the_evaluations(make_run, run, tmp_path):
    """What evaluate.py --use-exits left out is not asked."""
    copied = tmp_path / "run"
    copied.mkdir()
    for path in run.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    assert call(evaluate, copied, "--use-exits", "2,4")[0] == 0
    assert EarlyExitClassifier(copied, 0.5)(TEXTS)[0].exit_layer == 2


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "csv.gz"])
def test_formats_and_names(run, tmp_path, suffix):
    """The format follows the suffix; the input's columns keep their names, and ours give way."""
    texts = ['it is "great", you', "two\nlines", ""]
    path = write_csv(tmp_path / "in.csv", [(text, "x", "y") for text in texts], ("text", "label", "predicted_label"))
    assert call(predict, run, path, "--out", tmp_path / f"out.{suffix}", "--threshold", 0.6)[0] == 0
    assert call(predict, run, tmp_path / f"out.{suffix}", "--out", tmp_path / "again.jsonl", "--threshold", 0.6)[0] == 0
    again = [json.loads(line) for line in (tmp_path / "again.jsonl").read_text().splitlines()]
    assert [row["text"] for row in again] == texts
    ours = ["predicted_predicted_label", "confidence", "exit_layer", "p_negative", "p_positive"]
    assert list(again[0])[:8] == ["text", "label", "predicted_label", *ours]
    for row in again:
        assert row["predicted_confidence"] == pytest.approx(float(row["confidence"]))
        assert (row["label"], row["predicted_label"]) == ("x", "y")
        assert row["predicted_predicted_predicted_label"] == row["predicted_predicted_label"]


def test_pairs_and_text_columns(run, tmp_path):
    classify = EarlyExitClassifier(run, 0.9)
    path = write_csv(tmp_path / "in.csv", [("the film", "was bad", "awful")], ("subject", "body", "text"))
    for columns, text in (("subject,body", ("the film", "was bad")), ("body", "was bad"), (None, "awful")):
        chosen = ["--text-columns", columns] if columns else []
        assert call(predict, run, path, "--out", tmp_path / "out.csv", "--threshold", 0.9, *chosen)[0] == 0
        (row,) = read_csv(tmp_path / "out.csv")
        assert float(row["p_negative"]) == pytest.approx(classify([text])[0].probabilities["negative"], abs=1e-6)


def test_text_columns_that_cannot_be(run, tmp_path):
    """More than two, and any of standard input, whose lines have no columns: refused before it is read."""
    path = write_csv(tmp_path / "in.csv", [("a", "b", "c")], ("a", "b", "c"))
    for file, columns in ((path, "a,b,c"), ("-", "a"), ("-", "a,b")):
        status, out, err = call(predict, run, file, "--text-columns", columns, "--threshold", 0.6)
        assert (status, out, f"--text-columns: {columns}, should be" in err, err.count("\n")) == (2, "", True, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,text\n1,a\n2\n", "in.csv, line 3"),
        ('id,text\n1,a\n2,"b\n', "in.csv, line 3"),
        ("id,body\n1,a\n", "it has id, body"),
        ("id,text\n", "no rows"),
        ("id,text\n1,\xff\n", "in.csv, line 2"),
    ],
)
def test_broken_files(run, tmp_path, content, message):
    """One line that says where, and nothing is written: not even over what is there."""
    (tmp_path / "in.csv").write_bytes(content.encode("latin-1"))
    (tmp_path / "out.csv").write_text("kept")
    status, _, err = call(predict, run, tmp_path / "in.csv", "--out", tmp_path / "out.csv", "--threshold", 0.6)
    assert (status, message in err, "Traceback" in err) == (2, True, False)
    assert (tmp_path / "out.csv").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", "out.csv"]


def test_bad_outputs(run, tmp_path):
    path = write_csv(tmp_path / "in.csv", [(1, "a")])
    for out in (path, tmp_path, tmp_path / "out.txt"):
        status, _, err = call(predict, run, path, "--out", out, "--threshold", 0.6)
        assert (status, str(out) in err, err.count("\n")) == (2, True, 1)
    assert read_csv(path) == [{"id": "1", "text": "a"}]


def test_standard_input_as_it_comes(run):
    """Each line is answered before the next one is there."""
    command = [sys.executable, "-m", "minisweet.predict", run, "-", "--threshold", "0.6"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, cwd=CHECKOUT) as process:
        process.stdin.write("\ufeffthe film, \u00e9\n".encode())
        process.stdin.flush()
        assert process.stdout.readline() == b"text,label,confidence,exit_layer,p_negative,p_positive\n"
        assert process.stdout.readline().startswith('"the film, \u00e9",'.encode())
        out, err = process.communicate(b"a\r\n\n\xff\n")
    assert [line.split(b",")[0] for line in out.splitlines()] == [b"a", b""]  # those before the broken one
    assert (process.returncode, err.count(b"\n"), b"standard input, line 4" in err) == (2, 1, True)


def test_no_line_of_standard_input_is_no_rows(run, tmp_path):
    command = [sys.executable, "-m", "minisweet.predict", run, "-", "--out", tmp_path / "out.csv"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=CHECKOUT)
    assert (done.returncode, "out.csv: 0 rows" in done.stdout, done.stderr) == (0, True, "")


def test_rows_that_no_table_can_hold_are_found_before_they_are_predicted(run, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{"text": "b", "id": 1}\n')
    for out in ("-", tmp_path / "out.csv"):
        status, printed, err = call(predict, run, tmp_path / "in.jsonl", "--out", out)
        assert (status, printed, "in.jsonl, line 2: line 1 has no 'id'" in err) == (2, "", True)
    assert call(predict, run, tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl")[0] == 0


@pytest.mark.parametrize(
    ("line", "reason"),
    [(b"b\0", "a NUL character"), (b"b" * 60, "longer than 50 bytes"), (b"\xff", "not readable as UTF-8")],
)
def test_broken_lines_of_standard_input(tmp_path, monkeypatch, line, reason):
    """The message names the line, and the lines before it are there."""
    monkeypatch.setattr(rows, "LONGEST_LINE", 50)
    (tmp_path / "in").write_bytes(b"a\n" + line + b"\nc\n")
    kept, file = os.dup(0), os.open(tmp_path / "in", os.O_RDONLY)
    os.dup2(file, 0)
    try:
        lines = predict.read_lines_as_they_come(["text"])
        assert next(lines) == [{"text": "a"}]
        with pytest.raises(InputError, match=f"^standard input, line 2: {reason}"):
            next(lines)
    finally:
        os.dup2(kept, 0)
        os.close(kept)
        os.close(file)


def test_light_start(run):
    """Nothing heavy is imported up to the first answer, the compiler among it: a start is a user's first impression."""
    heavy = "[name for name in ('transformers', 'matplotlib', 'torch._dynamo', 'sympy') if name in sys.modules]"
    code = f"import sys; from minisweet import EarlyExitClassifier as E; E({str(run)!r})(['a']); print({heavy})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CHECKOUT, check=True)
    assert out.stdout == "[]\n"


@pytest.mark.parametrize(("method", "strategy"), [("sweet", "confidence"), ("branch", "lte")])
def test_explain(make_run, method, strategy):
    run = make_run(method, exit_strategy=strategy)
    for threshold in (0.5, middle(run), 1.0):
        classify = EarlyExitClassifier(run, threshold)
        for text in TEXTS:
            exits = explain.explain(classify, text)
            assert [answer.exit_layer for answer, _ in exits] == [1, 2, 4]
            taken = next(answer for answer, is_enough in exits if is_enough)
            (answer,) = classify([text])
            assert taken.label == answer.label
            assert taken.exit_layer == answer.exit_layer
            assert taken.confidence == pytest.approx(answer.confidence, abs=1e-6)
            assert taken.probabilities == pytest.approx(answer.probabilities, abs=1e-6)
    status, out, _ = call(explain, run, "the film", "was bad", "--threshold", 1)
    assert status == 0
    assert re.search(r"^->     4 .* yes ", out, re.M)
    assert len(re.findall(r"^       [12] .* no ", out, re.M)) == 2
    assert call(explain, run, "a", "b", "c")[0] == call(explain, run)[0] == 2


def test_explain_page(run, tmp_path):
    status, _, err = call(explain, run, "--html", tmp_path / "page.html")
    assert (status, err) == (0, "")
    assert load_examples("toy", "dev", tmp_path).first[0] in (tmp_path / "page.html").read_text()


@DEBERTA_IS_SLOW
@pytest.mark.parametrize("method", ["sweet", "mm", "branch"])
def test_export_for_transformers(make_run, tmp_path, method, model_type):
    """Logits, ids and labels of each exit, as transformers loads the folder."""
    transformers = pytest.importorskip("transformers", reason="transformers, which loads the folder, is missing")
    run = make_run(method, model_type)
    model, record = load_run(run)
    classify = EarlyExitClassifier(run, 1.0)
    for k, layer in enumerate((1, 2, 4)):
        out = tmp_path / f"exit{layer}"
        assert call(export, run, "--out", out, *(["--exit-layer", layer] if layer < 4 else []))[0] == 0
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(out)
        assert (theirs.training, theirs.config.num_hidden_layers) == (False, layer)
        assert theirs.config.id2label == {0: "negative", 1: "positive"}
        drops = {name: module.p for name, module in theirs.named_modules() if isinstance(module, torch.nn.Dropout)}
        assert set(drops.values()) <= {0.0, 0.1}
        tokenizer = transformers.AutoTokenizer.from_pretrained(out)
        for text in ("the film was superb [SEP]", ("a dull film", "you and i"), "", ("bad " * 90, "good " * 40)):
            ours = classify.tokenize([text]).batch(np.array([0])).inputs
            parts = (text,) if isinstance(text, str) else text
            encoded = tokenizer(*parts, truncation=True, return_tensors="pt")
            for ours_, key in zip(ours, ("input_ids", "attention_mask", "token_type_ids"), strict=True):
                assert torch.equal(encoded[key], ours_), key
            with torch.no_grad():
                torch.testing.assert_close(theirs(**encoded).logits, model(*ours)[k], atol=1e-5, rtol=0)
        padded = tokenizer(["the film", "a"], padding=True, return_tensors="pt")
        assert padded["attention_mask"].sum(1).tolist() == [4, 3]


def test_export_refuses(make_run, run, tmp_path):
    (tmp_path / "there").mkdir()
    cases = [
        ([make_run("mm", exit_strategy="lte"), "--out", tmp_path / "new"], "lte"),
        ([run, "--out", tmp_path / "new", "--exit-layer", 3], "1, 2, 4"),
        ([run, "--out", tmp_path / "there"], "exists already"),
        ([tmp_path / "none", "--out", tmp_path / "new"], "no run"),
    ]
    for arguments, message in cases:
        status, _, err = call(export, *arguments)
        assert (status, message in err, err.count("\n")) == (2, True, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "method"),
    [("bert", "sweet"), ("deberta", "sweet"), ("bert", "branch"), ("deberta", "branch"), ("deberta", "ee")],
)
def test_torch_export_with_dynamic_shapes(model_type, method):
    """One program for all batches and lengths, from two tokens to all positions."""
    encoder = tiny_encoder(model_type, num_hidden_layers=2, max_position_embeddings=200)
    model = exit_model(encoder, (1, 2), 3, method).eval()
    shape = {0: torch.export.Dim("B", min=1, max=512), 1: torch.export.Dim("T", min=2, max=200)}
    with torch.no_grad():
        program = torch.export.export(model, random_batch(batch=3), dynamic_shapes=[shape] * 3).module()
        for batch, length in ((1, 2), (2, 3), (5, 40), (2, 200)):
            inputs = random_batch(batch=batch, length=length)
            torch.testing.assert_close(program(*inputs), model(*inputs), atol=1e-5, rtol=0)


def test_http_service_of_the_readme(run, tmp_path):
    """The README's service, run as it stands there but for the run's folder and the port."""
    blocks = re.findall(r"```python\n(.*?)```", (CHECKOUT / "README.md").read_text(), re.S)
    services = [block for block in blocks if "http.server" in block]
    if not services:
        pytest.skip("README.md has no block with http.server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = re.sub(r'EarlyExitClassifier\("[^"]*"', f'EarlyExitClassifier("{run}"', services[0]).replace(
        "8000", str(port)
    )
    pythonpath = {"PYTHONPATH": str(CHECKOUT)}
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | pythonpath) as process:
        try:
            for body, expected in ((TEXTS, 200), ([], 200), (["a", None], 400), ("no list", 400)):
                status, answer = post(port, json.dumps(body).encode(), process)
                assert status == expected
                if status == 200:
                    expected_answers = [answer._asdict() for answer in EarlyExitClassifier(run)(body)]
                    assert [row["label"] for row in answer] == [row["label"] for row in expected_answers]
                else:
                    assert "item 1" in answer["error"] or "texts" in answer["error"]
            for body in (b"no JSON", b"[" * 99_999, b""):
                assert post(port, body, process)[0] == 400
            for length, expected in ((None, 411), ("two", 411), ("-1", 411), ("1000000", 413), ("9" * 5000, 413)):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                connection.putrequest("POST", "/")
                if length:
                    connection.putheader("Content-Length", length)
                connection.endheaders()
                answer = connection.getresponse()
                assert (answer.status, bool(answer.headers["Content-Type"])) == (expected, True)
        finally:
            process.terminate()


def post(port: int, body: bytes, process) -> tuple[int, object]:
    """What the service answers, once it is there."""
    while process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}", body, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)
        except urllib.error.URLError:
            time.sleep(0.05)
    raise AssertionError("the service has ended")


def test_tokenize_takes_texts_and_pairs(run):
    examples = EarlyExitClassifier(run, 0.9).tokenize(["the film", ("the", "film")])
    assert isinstance(examples, TokenizedExamples)
    assert (examples.lengths - examples.first_lengths).tolist() == [0, 2]


@pytest.mark.parametrize("argument", [{"threshold": 10**5000}, {"max_loss": -(10**5000)}, {"amp": np.array([1, 2])}])
def test_arguments_that_cannot_be_written_out_or_compared(run, argument):
    with pytest.raises(InputError, match=f"{next(iter(argument))}: .*, should be"):
        EarlyExitClassifier(run, **argument)


def test_a_device_that_is_not_here_is_named_as_it_was_given(run, tmp_path):
    """An argument in Python, an option in a command."""
    with pytest.raises(InputError, match=r"^device: 'cuda:99' is not here"):
        EarlyExitClassifier(run, 0.9, device="cuda:99")
    path = write_csv(tmp_path / "in.csv", [(1, "a")])
    assert "error: --device: 'cuda:99' is not here" in call(predict, run, path, "--device", "cuda:99")[2]
    assert "error: --threshold: 0.2, should be" in call(predict, run, path, "--threshold", "0.2")[2]


def test_predict_counts_empty_and_cut_texts(run, tmp_path):
    rows = [(1, "the film"), (2, ""), (3, " \t"), (4, "bad " * 31), (5, "bad " * 30)]
    path = write_csv(tmp_path / "in.csv", rows)
    _, out, _ = call(predict, run, path, "--out", tmp_path / "out.csv", "--threshold", 0.6)
    assert out.splitlines()[-1].endswith("; empty: 2; cut to 32 tokens: 1")


def test_classifiers_made_by_threads_at_once(run):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: EarlyExitClassifier(run, 0.9)(TEXTS), range(16)))
    assert all(answer == answers[0] for answer in answers)


def test_a_name_that_is_too_long_and_items_of_thousands_of_digits(run):
    with pytest.raises(InputError, match="no run here"):
        EarlyExitClassifier("x" * 5000)
    with pytest.raises(InputError, match="item 0: what is too long or too deep to show, should be a text"):
        EarlyExitClassifier(run)([10**5000])


FORGED = {
    "NaN": lambda tensors: {**tensors, "logits": tensors["logits"] * float("nan")},
    "no labels": lambda tensors: {"logits": tensors["logits"]},
    "labels beyond the classes": lambda tensors: {**tensors, "labels": tensors["labels"] + 9},
    "no keys": lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "keys"},
    "few labels": lambda tensors: {**tensors, "labels": tensors["labels"][:5].clone()},
    "whole numbers": lambda tensors: {**tensors, "logits": tensors["logits"].long()},
}


@pytest.mark.parametrize("what", FORGED)
def test_logits_that_no_evaluation_wrote_are_refused_whatever_their_digest(run, tmp_path, what):
    copied = shutil.copytree(run, tmp_path / "run")
    path = copied / "logits.safetensors"
    save_file(FORGED[what](load_file(path)), path)
    evaluation = json.loads((copied / "evaluation.json").read_text())
    (copied / "evaluation.json").write_text(json.dumps(evaluation | {"logits_digest": sha256(path)}))
    with pytest.raises(InputError, match=r"logits.safetensors: not the logits and labels of 1000 rows at 3 exits"):
        EarlyExitClassifier(copied, max_loss=1.0)
    status, _, err = call(explain, copied, "--html", tmp_path / "page.html")
    assert (status, err.count("\n")) == (2, 1)
