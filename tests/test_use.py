"""What users call: predict, which answers as the sweep says; and what is imported."""

import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from minisweet import EarlyExitClassifier
from minisweet.classifier.cascade import answers_of, at_full_depth
from minisweet.classifier.main import fit, predict
from minisweet.classifier.rows import SUFFIXES, read_rows, row_writer
from tests.conftest import CHECKOUT, run


def cells_of(path: Path) -> list[dict]:
    return [row for _, row in read_rows(path)]


@pytest.mark.parametrize("name", ["trunk", "own"])
def test_predictions_are_those_of_the_sweep(own_run, command, tmp_path, monkeypatch, name):
    """Labels, exits and confidences of the validation rows, through the command, in the input's order.

    The bag of words has a say at full depth in one of the two cases.
    """
    monkeypatch.setattr("minisweet.classifier.main.WINDOW", 60)
    folder = own_run
    if name == "trunk":
        folder = tmp_path / "run"
        more = own_run.parent / "more.csv"
        assert command(fit, "--trunk", own_run, "--unlabelled", more, "--out", folder, "--amp", "off")[0] == 0
    classify = EarlyExitClassifier.load(folder)
    record, rule, (rows, _, logits) = classify.record, classify.cascade.rule, classify.validation
    texts = rows.examples.first
    assert (rule[2] != 0) == (name == "own")
    answers, full = answers_of(logits, rule, rows.labels, rows.keys), at_full_depth(*logits, rule)
    confidence = np.stack([answers.confidence, full.softmax(-1).amax(-1)])  # (2, N)
    sure = np.unique(confidence[0])
    threshold = float(sure[len(sure) // 2 : len(sure) // 2 + 2].mean())  # between two, so that about half leave
    (stays,), (labels,) = answers.stay_at([threshold]), answers.decide_at([threshold])
    taken = stays.astype(int)
    assert len(set(taken)) > 1
    words = [folder / "validation.jsonl", "--out", tmp_path / "out.csv", "--threshold", threshold]
    status, out, _ = command(predict, folder, *words)
    found = cells_of(tmp_path / "out.csv")
    assert (status, f"{len(texts):,} rows" in out) == (0, True)
    assert [next(iter(row.values())) for row in found] == texts
    assert [int(row["exit_layer"]) for row in found] == np.array([0, 4])[taken].tolist()
    assert [row["predicted_label"] for row in found] == [record.labels[label] for label in labels]
    expected = confidence[taken, np.arange(len(taken))]
    np.testing.assert_allclose([float(row["confidence"]) for row in found], expected, atol=2e-5)
    for row in found[:20]:
        p = {name: float(row[f"p_{name}"]) for name in record.labels}
        assert (sum(p.values()), max(p, key=p.get)) == (pytest.approx(1), row["predicted_label"])
        assert max(p.values()) == float(row["confidence"])


@pytest.mark.parametrize("suffixes", [*product(SUFFIXES, repeat=2)])
def test_rows_keep_their_cells_and_get_ours_beside_them(run_of, suffixes, tmp_path):
    """In any format, whatever the texts and columns are; in JSON lines a row may lack a column."""
    rows = [{"text": 'a "film",\n\tbad', "label": ""}, {"text": "", "p_positive": "\u2028 x", "note": " "}]
    columns, classify = ["text", "label", "p_positive", "note"], EarlyExitClassifier.load(run_of("bag"))
    file, out = (tmp_path / f"{name}{suffix}" for name, suffix in zip(("in", "out"), suffixes, strict=True))
    with row_writer(file, columns) as write:
        for row in rows:
            write(row)
    assert run(predict, run_of("bag"), file, "--out", out) == 0
    found = cells_of(out)
    ours = ["predicted_label", "confidence", "exit_layer", "p_negative", "predicted_p_positive"]
    for before, row, answer in zip(rows, found, classify.classify([row["text"] for row in rows]), strict=True):
        assert {name: row.get(name) or "" for name in columns} == dict.fromkeys(columns, "") | before
        label, *numbers = (row[name] for name in ours)
        expected = [answer.confidence, answer.exit_layer, *answer.probabilities.values()]
        assert (label, list(map(float, numbers))) == (answer.label, pytest.approx(expected, abs=1e-6))


def test_columns_of_text_and_what_is_told(run_of, command):
    """What is deployed is enough: the validation rows are not read."""
    run, classify = Path("run"), EarlyExitClassifier.load(run_of("bag"))
    shutil.copytree(run_of("bag"), run, ignore=shutil.ignore_patterns("validation.jsonl", "logits.safetensors"))
    Path("in.csv").write_text(f"body,text\n{'bad ' * 31},awful\n{'bad ' * 30},\n")
    for options, text, empty, cut in ((["--text-columns", "body"], "bad " * 31, 0, 1), ([], "awful", 1, 0)):
        _, out, _ = command(predict, run, "in.csv", "--out", "out.csv", *options)
        row = cells_of(Path("out.csv"))[0]
        assert float(row["p_negative"]) == pytest.approx(classify.predict_proba([text])[0, 0], abs=1e-6)
        assert out.strip().endswith(f"empty: {empty}; cut to 32 tokens: {cut}")
    _, out, err = command(predict, run, "in.csv")  # on standard output, as CSV; what is told is on standard error
    assert out.startswith("body,text,label,confidence,exit_layer,p_negative,p_positive\r\n")
    assert (out.count("\n"), err.strip().endswith("empty: 1; cut to 32 tokens: 0")) == (3, True)


def test_light_start(run_of):
    """Nothing heavy is imported up to the first answer, and a program's logging is left alone."""
    heavy = "[name for name in ('transformers', 'matplotlib', 'torch._dynamo', 'sympy') if name in sys.modules]"
    code = f"from minisweet import EarlyExitClassifier as E; E.load({str(run_of('bag'))!r}).predict(['a']); "
    code += f"print({heavy}); import logging; log = logging.getLogger('minisweet'); print(log.level, log.handlers)"
    done = subprocess.run([sys.executable, "-c", f"import sys; {code}"], capture_output=True, text=True, cwd=CHECKOUT)
    assert (done.stdout, done.stderr) == ("[]\n0 []\n", "")
