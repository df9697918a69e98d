"""What users call: the classifier in Python, and the commands predict and explain."""

import csv
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import evaluate
from minisweet import EarlyExitClassifier
from minisweet.adaptive import ExitRule, exits_taken
from minisweet.base.files import InputError
from minisweet.runs.folders import read_evaluation, read_record, read_validation
from minisweet.use import explain, predict
from tests.conftest import CHECKOUT

TEXTS = ["the film was superb", "a dull film", "", "not bad , it is great", "the film"]


@pytest.fixture
def copy_of(run_of, tmp_path):
    """A copy of a run whose operating point is changed: by default, it asks all exits."""

    def copied(name: str, **point) -> Path:
        run = shutil.copytree(run_of(name), tmp_path / name)
        content = json.loads((run / "evaluation.json").read_text())
        content["operating_point"] |= {"asked_exits": read_record(run).exit_layers} | point
        (run / "evaluation.json").write_text(json.dumps(content))
        return run

    return copied


def middle(run: Path) -> float:
    """A threshold at which half of the validation rows or so leave at the first exit, in a gap of confidences."""
    saved, evaluation = load_file(run / "logits.safetensors"), read_evaluation(run)
    rule = ExitRule.from_evaluation(evaluation, saved["logits"].shape[-1])
    sure = rule.confidences(saved["logits"], saved.get("certainty"))[0].unique()  # sorted
    sure = sure[len(sure) // 4 : len(sure) - len(sure) // 4]
    place = int(sure.diff().argmax())
    return float((sure[place] + sure[place + 1]) / 2)


def write_csv(path, rows, header=("id", "text")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def read_csv(path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("method", ["sweet", "mm", "branch", "lte", "pairs", "trunk0"])
def test_predictions_are_those_of_the_evaluation(copy_of, command, tmp_path, monkeypatch, method):
    """Labels, exits and confidences of the validation rows, through the command, in the input's order."""
    monkeypatch.setattr(predict, "WINDOW", 60)
    run = copy_of(method)
    record, saved, threshold = read_record(run), load_file(run / "logits.safetensors"), middle(run)
    rule = ExitRule.from_evaluation(read_evaluation(run), record.num_labels)
    confidence = rule.confidences(saved["logits"], saved.get("certainty"))  # (K, N)
    taken = exits_taken(confidence, threshold, rule.lowest)
    assert len(taken.unique()) > 1
    words = [run / "validation.jsonl", "--out", tmp_path / "out.csv", "--threshold", threshold]
    status, out, _ = command(predict, run, *words)
    found, texts = read_csv(tmp_path / "out.csv"), read_validation(run, record).first
    assert (status, f"{len(texts):,} rows" in out) == (0, True)
    assert [next(iter(row.values())) for row in found] == texts
    assert [int(row["exit_layer"]) for row in found] == np.array(record.exit_layers)[taken].tolist()
    labels = saved["logits"].argmax(-1).gather(0, taken[None])[0]
    assert [row["predicted_label"] for row in found] == [record.labels[label] for label in labels]
    expected = confidence.gather(0, taken[None])[0].numpy()
    np.testing.assert_allclose([float(row["confidence"]) for row in found], expected, atol=2e-5)
    for row in found[:20]:
        p = {name: float(row[f"p_{name}"]) for name in record.labels}
        assert sum(p.values()) == pytest.approx(1)
        assert max(p, key=p.get) == row["predicted_label"]
        if method != "lte":
            assert max(p.values()) == float(row["confidence"])


def test_classifier_answers_any_number_in_order(copy_of):
    run = copy_of("sweet")
    classify = EarlyExitClassifier(run, middle(run))
    alone = [classify([text])[0] for text in TEXTS]
    many = iter(TEXTS * 300)  # more than are gathered at once
    for answer, expected in zip(classify(many), alone * 300, strict=True):
        assert (answer.label, answer.exit_layer) == (expected.label, expected.exit_layer)
        assert answer.confidence == pytest.approx(expected.confidence, abs=1e-6)
        assert list(answer.probabilities) == classify.labels
    assert classify([]) == []
    exact, rounded = (EarlyExitClassifier(run, 1, amp=amp)(TEXTS) for amp in ("off", "bf16"))
    for one, other in zip(exact, rounded, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=0.05)
    assert exact != rounded


def test_an_empty_line_of_one_column_is_predicted(run_of, command, tmp_path):
    (tmp_path / "in.csv").write_text("text\na\n\nb\n")
    status, out, _ = command(predict, run_of("sweet"), tmp_path / "in.csv", "--out", tmp_path / "out.csv")
    assert (status, ": 3 rows" in out) == (0, True)
    assert [row["text"] for row in read_csv(tmp_path / "out.csv")] == ["a", "", "b"]


def test_threads_make_and_share_classifiers(run_of):
    run = run_of("sweet")
    expected = EarlyExitClassifier(run)(TEXTS)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: EarlyExitClassifier(run)(TEXTS), range(8))) == [expected] * 8
        classify = EarlyExitClassifier(run)
        assert list(pool.map(lambda _: classify(TEXTS), range(40))) == [expected] * 40


@pytest.mark.parametrize(
    ("texts", "arguments", "message"),
    [
        (["a", None], {}, "item 1: None, should be one text, as in training"),
        (["\ud800"], {}, r"^item 0: it holds '.ud800', half of a character"),  # of an emoji
        ([["a", "b"]], {}, r"item 0: \['a', 'b'\]"),
        *((texts, {}, r"^texts: .*classify\(\[text\]\)") for texts in ("a text", b"a", None, 5, {"a": 1})),
        ([], {"threshold": float("nan")}, "^threshold: nan, should be a number from 0 to 1$"),
        *(([], {"run": run}, "^run: .*, should be the path of a run folder$") for run in (None, b"run", 5)),
        ([], {"amp": "bfloat16"}, "^amp: 'bfloat16', should be one of auto, off"),
        *(([], {"batch_size": size}, "^batch_size: .*, should be") for size in (0, 2.5, "32", None)),
        *(([], {"threshold": value}, "^threshold: .*, should be") for value in ("0.5", 1.5, -1, 1j)),
    ],
)
def test_classifier_checks_what_it_gets(run_of, texts, arguments, message):
    with pytest.raises(ValueError, match=message):
        EarlyExitClassifier(**{"run": run_of("sweet")} | arguments)(texts)


@pytest.mark.parametrize("goal", [{"max_loss": 5.0, "sure": 80.0}, {"speed": 0.5}, {"max_change": 20.0, "sure": 60.0}])
@pytest.mark.parametrize("method", ["branch", "lte"])
def test_who_chooses_chooses_once(run_of, command, tmp_path, goal, method):
    """The others take evaluate.py's operating point, and evaluate.py keeps the goal until another is named."""
    run = shutil.copytree(run_of(method), tmp_path / "run")
    options = [word for name, value in goal.items() for word in (f"--{name.replace('_', '-')}", f"{value:g}")]
    for words in (options, [], ["--sure", 80] if "sure" in goal else [], ["--speed", 1]):
        before = json.loads((run / "evaluation.json").read_text())["operating_point"]
        status, out, _ = command(evaluate, run, *words)
        point = json.loads((run / "evaluation.json").read_text())["operating_point"]
        expected = (
            goal | {"sure": 80.0} if "--sure" in words[:1] else {"speed": 1.0} if words == ["--speed", 1] else goal
        )
        assert (status, point["goal"]) == (0, expected)
        exits = ", ".join(map(str, before["asked_exits"]))
        assert f"it replaces threshold {before['threshold']:.6g}, exits {exits}, by the goal --" in out
        assert ("(that of the last evaluation)" in out) == (point["goal"] == before["goal"])
        classify = EarlyExitClassifier(run)
        assert (classify.threshold, classify.exit_layers) == (point["threshold"], point["asked_exits"])
        out = command(predict, run, write_csv(tmp_path / "a.csv", [(1, "a")]), "--out", tmp_path / "b.csv")[1]
        assert f"at threshold {point['threshold']:.4g}" in out
        assert f"threshold {point['threshold']:.4g}" in command(explain, run, "a text")[1]
    assert "--sure: needs --max-loss or --max-change, since the goal" in command(evaluate, run, "--sure", 90)[2]
    for module, word in ((predict, tmp_path / "a.csv"), (explain, "a text")):
        status, out, err = command(module, run, word, *options)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert "evaluate.py alone chooses the operating point" in err
    with pytest.raises(TypeError, match=f"^{next(iter(goal))} is no argument: evaluate.py alone chooses"):
        EarlyExitClassifier(run, **goal)


def test_an_older_evaluation_that_names_its_goal_a_wish_is_read(copy_of):
    run = copy_of("sweet")
    path = run / "evaluation.json"
    path.write_text(path.read_text().replace('"goal": {', '"wish": {'))
    assert read_evaluation(run).operating_point.goal == {"max_loss": 1.0, "sure": 70.0}


@pytest.mark.parametrize("name", ["sweet", "mm", "trunk0", "lte"])
def test_the_users_default_device_makes_no_difference(run_of, name):
    expected = EarlyExitClassifier(run_of(name))(TEXTS)
    torch.set_default_device("meta")
    try:
        classify = EarlyExitClassifier(run_of(name))
        assert classify(TEXTS) == expected
        assert explain.explain(classify, TEXTS[0])
    finally:
        torch.set_default_device(None)


def test_a_threshold_may_be_any_real_number(run_of):
    assert EarlyExitClassifier(run_of("sweet"), Fraction(9, 10))(TEXTS) == EarlyExitClassifier(run_of("sweet"), 0.9)(
        TEXTS
    )


def test_the_operating_point_is_the_evaluations(copy_of):
    run = copy_of("sweet", threshold=0.8125, asked_exits=[2, 4])
    assert EarlyExitClassifier(run).threshold == 0.8125
    assert {answer.exit_layer for answer in EarlyExitClassifier(run, 0.5)(TEXTS)} == {2}
    assert [answer.exit_layer for answer, _ in explain.explain(EarlyExitClassifier(run), "a")] == [2, 4]
    (run / "evaluation.json").unlink()
    with pytest.raises(InputError, match="has no evaluation.json; first: evaluate.py"):
        EarlyExitClassifier(run, 0.75)


def test_exits_that_were_left_out_by_hand_stay_out(run_of, command, tmp_path):
    run = shutil.copytree(run_of("sweet"), tmp_path / "run")
    assert command(evaluate, run, "--use-exits", "2,4")[0] == 0
    assert list(EarlyExitClassifier(run).exit_layers) == [2, 4]


def test_what_a_threshold_does_not_grant_is_told_in_one_line(copy_of, caplog):
    run = copy_of("sweet", threshold=0.9, goal={"max_change": 30.0, "sure": 90.0})
    EarlyExitClassifier(run, 0.9, amp="bf16")
    EarlyExitClassifier(run)
    assert caplog.text == ""
    EarlyExitClassifier(run, amp="bf16")  # promised in float32
    (precision,) = [record.getMessage() for record in caplog.records]
    assert "float32" in precision


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_formats_and_names(run_of, command, tmp_path, suffix):
    """The format follows the suffix; the input's columns keep their names, and ours give way."""
    texts, run = ['it is "great", you', "two\nlines", ""], run_of("sweet")
    path = write_csv(tmp_path / "in.csv", [(text, "x") for text in texts], ("text", "label"))
    assert command(predict, run, path, "--out", tmp_path / f"out.{suffix}")[0] == 0
    assert command(predict, run, tmp_path / f"out.{suffix}", "--out", tmp_path / "again.jsonl")[0] == 0
    again = [json.loads(line) for line in (tmp_path / "again.jsonl").read_text().splitlines()]
    assert [row["text"] for row in again] == texts
    ours = ["predicted_label", "confidence", "exit_layer", "p_negative", "p_positive"]
    assert list(again[0])[:7] == ["text", "label", *ours]
    assert "predicted_predicted_label" in again[0]  # no column is replaced, however often a file is predicted
    for row in again:
        assert row["predicted_confidence"] == pytest.approx(float(row["confidence"]))
        assert row["label"] == "x"


def test_columns_of_text_and_what_is_told(run_of, command, tmp_path):
    run, classify = run_of("sweet"), EarlyExitClassifier(run_of("sweet"))
    path = write_csv(tmp_path / "in.csv", [("bad " * 31, "awful"), ("bad " * 30, "a")], ("body", "text"))
    for options, text, cut in ((["--text-columns", "body"], "bad " * 31, 1), ([], "awful", 0)):
        _, out, _ = command(predict, run, path, "--out", tmp_path / "out.csv", *options)
        row = read_csv(tmp_path / "out.csv")[0]
        assert float(row["p_negative"]) == pytest.approx(classify([text])[0].probabilities["negative"], abs=1e-6)
        assert out.strip().endswith(f"cut to 32 tokens: {cut}")
    status, out, err = command(predict, run, path)  # on standard output, as CSV
    assert (status, err, len(out.splitlines())) == (0, "", 3)
    assert out.startswith("body,text,label,confidence,exit_layer,p_negative,p_positive\n")


def test_no_row_gets_a_prediction_where_others_have_their_label(run_of, command, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{"text": "b", "label": "gold", "id": 1}\n{"text": "c"}\n')
    for name in ("out.jsonl", "out.csv"):
        assert command(predict, run_of("sweet"), "in.jsonl", "--out", name)[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row.get("label") for row in rows] == [None, "gold", None]
    assert {row["predicted_label"] for row in rows} <= {"negative", "positive"}
    assert [row["label"] for row in read_csv(tmp_path / "out.csv")] == ["", "gold", ""]


def test_without_labels_confidence_is_called_agreement_where_it_is_shown(copy_of, command, tmp_path):
    run = copy_of("sweet")
    path = run / "run.json"
    path.write_text(path.read_text().replace('"metric": "accuracy"', '"metric": "agreement"'))
    assert command(evaluate, run)[0] == 0
    _, out, _ = command(predict, run, write_csv(tmp_path / "a.csv", [(1, "a")]))
    assert out.startswith("id,text,label,agreement,exit_layer,")
    _, out, _ = command(explain, run, "a text")
    assert "compared with the agreement with full depth" in out
    assert "confidence" not in out
    assert EarlyExitClassifier(run)(["a"])[0].confidence  # in Python the name stays


@pytest.mark.parametrize("name", ["sweet", "lte", "trunk0", "pairs"])
def test_explain(copy_of, command, name):
    run = copy_of(name)
    layers = list(read_record(run).exit_layers)
    for threshold in (0.5, middle(run), 1.0):
        classify = EarlyExitClassifier(run, threshold)
        for text in zip(TEXTS, reversed(TEXTS), strict=True) if name == "pairs" else TEXTS:
            exits = explain.explain(classify, text)
            assert [answer.exit_layer for answer, _ in exits] == layers
            taken = next(answer for answer, is_enough in exits if is_enough)
            (answer,) = classify([text])
            assert (taken.label, taken.exit_layer) == (answer.label, answer.exit_layer)
            assert taken.confidence == pytest.approx(answer.confidence, abs=1e-6)
            assert taken.probabilities == pytest.approx(answer.probabilities, abs=1e-6)
    assert command(explain, run, "--html", "page.html")[0] == 0
    assert json.dumps(read_validation(run, read_record(run)).first[0]) in Path("page.html").read_text()
    texts = ["the film", "was bad"] if name == "pairs" else ["the film"]
    early, full = (command(explain, run, *texts, "--threshold", threshold)[1] for threshold in (0, 1))
    assert re.search(r"^->     4 .* yes ", full, re.MULTILINE)
    assert len(re.findall(r"^       [012] .* no ", full, re.MULTILINE)) == len(layers) - 1
    assert f"-> leaves {'after layer 1' if layers[0] else 'at exit 0, a bag of words'} as " in early


def test_light_start(run_of):
    """Nothing heavy is imported up to the first answer, and a program's logging is left alone."""
    heavy = "[name for name in ('transformers', 'matplotlib', 'torch._dynamo', 'sympy') if name in sys.modules]"
    code = f"from minisweet import EarlyExitClassifier as E; E({str(run_of('sweet'))!r})(['a']); print({heavy})"
    code += "; import logging; log = logging.getLogger('minisweet'); print(log.level, log.handlers)"
    done = subprocess.run([sys.executable, "-c", f"import sys; {code}"], capture_output=True, text=True, cwd=CHECKOUT)
    assert (done.stdout, done.stderr) == ("[]\n0 []\n", "")
