"""What users call: the classifier in Python, and the commands predict and explain."""

import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import evaluate
from minisweet import EarlyExitClassifier
from minisweet.adaptive import ExitRule, exits_taken
from minisweet.base.files import InputError
from minisweet.data.rows import DELIMITERS, read_rows, row_writer
from minisweet.methods import METHODS, build_alone, grow
from minisweet.runs.folders import read_evaluation, read_record, read_validation
from minisweet.runs.records import GOALS
from minisweet.use import explain, predict
from tests.conftest import CHECKOUT, random_batch, run, write_model

TEXTS = ["the film was superb", "a dull film", "", "not bad , it is great", "the film"]
CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=9)
OTHERS = ["label", "predicted_label", "confidence", "p_positive", "note"]  # columns beside a text


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


def cells_of(path: Path) -> list[dict]:
    """A file's rows."""
    return [row for _, row in read_rows(path)]


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
    found, texts = cells_of(tmp_path / "out.csv"), read_validation(run, record).first
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
        *(([], {"run": run}, "^run: .*, should be the path of a run folder$") for run in (None, b"run", 5, "")),
        ([], {"amp": "bfloat16"}, "^amp: 'bfloat16', should be one of auto, off"),
        *(([], {"batch_size": size}, "^batch_size: .*, should be") for size in (0, 2.5, "32", None)),
        *(([], {"threshold": value}, "^threshold: .*, should be") for value in ("0.5", 1.5, -1, 1j)),
    ],
)
def test_classifier_checks_what_it_gets(run_of, texts, arguments, message):
    with pytest.raises(ValueError, match=message):
        EarlyExitClassifier(**{"run": run_of("sweet")} | arguments)(texts)


def test_who_chooses_chooses_once(run_of, command, tmp_path):
    """evaluate.py keeps the goal until another is named, and the others take its operating point."""
    run = shutil.copytree(run_of("lte"), tmp_path / "run")
    (tmp_path / "a.csv").write_text("text\na\n")
    for words, goal in (
        ("--max-loss 5 --sure 80", {"max_loss": 5.0, "sure": 80.0}),
        ("", {"max_loss": 5.0, "sure": 80.0}),
        ("--sure 60", {"max_loss": 5.0, "sure": 60.0}),
        ("--max-change 20 --sure 60", {"max_change": 20.0, "sure": 60.0}),
        ("--speed 0.5 --use-exits 2,4", {"speed": 0.5}),
    ):
        before = read_evaluation(run).operating_point
        status, out, _ = command(evaluate, run, *words.split())
        point, classify = read_evaluation(run).operating_point, EarlyExitClassifier(run)
        assert (status, point.goal) == (0, goal)
        exits = ", ".join(map(str, before.asked_exits))
        assert f"it replaces threshold {before.threshold:.6g}, exits {exits}, by the goal --" in out
        assert ("(that of the last evaluation)" in out) == (goal == before.goal)
        assert (classify.threshold, classify.exit_layers) == (point.threshold, point.asked_exits)
    assert point.asked_exits == [2, 4]  # exits that were left out by hand stay out
    said = command(predict, run, "a.csv", "--out", "b.csv")[1], command(explain, run, "a text")[1]
    assert [f"threshold {point.threshold:.4g}" in out for out in said] == [True, True]
    assert "--sure: needs --max-loss or --max-change, since the goal" in command(evaluate, run, "--sure", 90)[2]


@pytest.mark.parametrize("name", GOALS)
def test_others_do_not_choose(run_of, command, name):
    for module, words in ((predict, ["a.csv"]), (explain, ["a text"])):
        status, out, err = command(module, run_of("sweet"), *words, f"--{name.replace('_', '-')}", 50)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert "evaluate.py alone chooses the operating point" in err
    with pytest.raises(TypeError, match=f"^{name} is no argument: evaluate.py alone chooses"):
        EarlyExitClassifier(run_of("sweet"), **{name: 50.0})


@pytest.mark.parametrize("name", ["sweet", "mm", "trunk0", "lte"])
def test_the_users_default_device_and_type_make_no_difference(run_of, name, tmp_path):
    expected, batch, folder = EarlyExitClassifier(run_of(name))(TEXTS), random_batch(), write_model(tmp_path, "bert")
    for device, dtype in (("meta", torch.float32), ("cpu", torch.float64), ("cpu", torch.bfloat16)):
        torch.set_default_device(device)
        torch.set_default_dtype(dtype)
        try:
            classify = EarlyExitClassifier(run_of(name))
            assert classify(TEXTS) == expected
            assert explain.explain(classify, TEXTS[0])
            for model in (grow(method, build_alone(folder, 4, 2), [1, 4]) for method in METHODS):
                assert model(*batch).dtype is torch.float32
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(torch.float32)


def test_the_operating_point_is_the_evaluations(copy_of):
    run = copy_of("sweet", threshold=0.8125, asked_exits=[2, 4])
    assert EarlyExitClassifier(run).threshold == 0.8125
    assert {answer.exit_layer for answer in EarlyExitClassifier(run, Fraction(1, 2))(TEXTS)} == {2}  # any real number
    assert [answer.exit_layer for answer, _ in explain.explain(EarlyExitClassifier(run), "a")] == [2, 4]
    (run / "evaluation.json").unlink()
    with pytest.raises(InputError, match="has no evaluation.json; first: evaluate.py"):
        EarlyExitClassifier(run, 0.75)


def test_a_promise_for_another_precision_is_told_in_one_line(copy_of, caplog):
    run = copy_of("sweet", threshold=0.9, goal={"max_change": 30.0, "sure": 90.0})
    for options in ({"threshold": 0.9, "amp": "bf16"}, {}, {"amp": "bf16"}):
        EarlyExitClassifier(run, **options)
    (told,) = [record.getMessage() for record in caplog.records if "promised" in record.getMessage()]
    assert "promised for torch.float32, and not for torch.bfloat16" in told


@settings(max_examples=10)
@given(
    rows=st.lists(st.fixed_dictionaries({"text": CELLS}, optional=dict.fromkeys(OTHERS, CELLS)), min_size=1),
    suffixes=st.tuples(st.sampled_from([*DELIMITERS]), st.sampled_from([*DELIMITERS])),
)
def test_rows_keep_their_cells_and_get_ours_beside_them(run_of, rows, suffixes):
    """In any format, whatever the texts and columns are; in JSON lines a row may lack a column."""
    columns, classify = list(dict.fromkeys(chain(*rows))), EarlyExitClassifier(run_of("sweet"))
    with TemporaryDirectory() as folder:
        file, out = (Path(folder, name + suffix) for name, suffix in zip(("in", "out"), suffixes, strict=True))
        with row_writer(file, columns) as write:
            for row in rows:
                write(row)
        assert run(predict, run_of("sweet"), file, "--out", out) == 0
        found = cells_of(out)
    ours = [name for name in found[0] if name not in columns]
    names = ["label", "confidence", "exit_layer", "p_negative", "p_positive"]
    assert [name.replace("predicted_", "") for name in ours] == names
    assert {*names} - {*columns} <= {*ours}  # none has another name without need
    for before, row, answer in zip(rows, found, classify([row["text"] for row in rows]), strict=True):
        assert {name: row.get(name) or "" for name in columns} == dict.fromkeys(columns, "") | before
        label, *numbers = (row[name] for name in ours)
        expected = [answer.confidence, answer.exit_layer, *answer.probabilities.values()]
        assert (label, list(map(float, numbers))) == (answer.label, pytest.approx(expected, abs=1e-6))


def test_columns_of_text_and_what_is_told(run_of, command):
    run, classify = run_of("sweet"), EarlyExitClassifier(run_of("sweet"))
    Path("in.csv").write_text(f"body,text\n{'bad ' * 31},awful\n{'bad ' * 30},\n")
    for options, text, empty, cut in ((["--text-columns", "body"], "bad " * 31, 0, 1), ([], "awful", 1, 0)):
        _, out, _ = command(predict, run, "in.csv", "--out", "out.csv", *options)
        row = cells_of(Path("out.csv"))[0]
        assert float(row["p_negative"]) == pytest.approx(classify([text])[0].probabilities["negative"], abs=1e-6)
        assert out.strip().endswith(f"empty: {empty}; cut to 32 tokens: {cut}")
    status, out, err = command(predict, run, "in.csv")  # on standard output, as CSV
    assert (status, err, len(out.splitlines())) == (0, "", 3)
    assert out.startswith("body,text,label,confidence,exit_layer,p_negative,p_positive\n")


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
