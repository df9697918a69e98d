"""What users call: predict, which answers as the sweep says; label, which asks for what helps; and what is imported."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import torch

from minisweet import EarlyExitClassifier
from minisweet.classifier import choose, label, predict, selection
from minisweet.classifier.deployed import OwnRun, choose_for, load_run, save, write_chosen
from minisweet.classifier.operating_point import OperatingPoint
from minisweet.classifier.promise import Goal
from minisweet.classifier.rows import SUFFIXES, read_rows, row_writer
from minisweet.run import weights_id
from minisweet.texts import Examples, Texts
from tests.conftest import CHECKOUT, WORDS, random_bag, run, undecided_model, write_rows


def cells_of(path: Path) -> list[dict]:
    return [row for _, row in read_rows(path)]


@pytest.mark.parametrize("method", ["sweet", "mm", "branch", "pairs", "bag", "own"])
def test_predictions_are_those_of_the_sweep(run_of, own_run, command, tmp_path, monkeypatch, method):
    """Labels, exits and confidences of the validation rows, through the command, in the input's order.

    All exits are asked, and the bag of words has a say in one of the two cases.
    """
    monkeypatch.setattr(predict, "WINDOW", 60)
    folder = shutil.copytree(own_run if method == "own" else run_of(method), tmp_path / method)
    loaded = load_run(folder, "outputs", "texts")
    record, outputs, texts = loaded.record, loaded.outputs, loaded.texts.examples.first
    layers = outputs.exits.layers
    point = selection.choose(outputs, Goal(max_share=1.0), (), layers, combines=method == "own")
    write_chosen(folder, loaded._replace(point=replace(point, id=record.id)))
    assert point.rule.needs_bag == (method == "own")
    confidence = point.rule.confidences(outputs.logits)  # (K, N)
    sure = confidence[0].unique()
    threshold = float(sure[len(sure) // 2 : len(sure) // 2 + 2].mean())  # between two, so that about half leave
    (taken,), (labels,), _ = outputs.decide_at(range(len(confidence)), [threshold], point.rule)
    assert len(set(taken)) > 1
    words = [folder / "validation.jsonl", "--out", tmp_path / "out.csv", "--threshold", threshold]
    status, out, _ = command(predict, folder, *words)
    found = cells_of(tmp_path / "out.csv")
    assert (status, f"{len(texts):,} rows" in out) == (0, True)
    assert [next(iter(row.values())) for row in found] == texts
    assert [int(row["exit_layer"]) for row in found] == np.array(layers)[taken].tolist()
    assert [row["predicted_label"] for row in found] == [record.labels[label] for label in labels]
    expected = confidence.numpy()[taken, np.arange(len(taken))]
    np.testing.assert_allclose([float(row["confidence"]) for row in found], expected, atol=2e-5)
    for row in found[:20]:
        p = {name: float(row[f"p_{name}"]) for name in record.labels}
        assert (sum(p.values()), max(p, key=p.get)) == (pytest.approx(1), row["predicted_label"])
        assert max(p.values()) == float(row["confidence"])


@pytest.fixture
def disputed(run_of, command, tmp_path) -> OwnRun:
    """A run of 480 pairs, 200 of them labelled, for which a goal is chosen.

    The surer exit 0 is, in twenty steps, the more seldom its answer is not full depth's, which is often wrong there.
    """
    its, rng, N = load_run(run_of("bag"), "tokenizer"), np.random.default_rng(0), 480
    words = [*permutations(WORDS, 3)][::16][:N]
    step, full = rng.integers(0, 20, N), rng.integers(0, 2, N)
    early = np.where(rng.random(N) < 0.6 * (1 - step / 20) ** 2, 1 - full, full)
    labels = np.where(rng.random(N) < np.where(early == full, 0.85, 0.6), full, 1 - full)
    labels[200:] = -1
    texts = Examples([f"{a} {b}" for a, b, _ in words], [c for *_, c in words], labels.tolist())
    model = undecided_model(run_of("bag").with_name("tiny"), "plain")
    fit = its.record.fit | {"label_column": "team"}
    record = replace(its.record, text_columns=["subject", "body"], labels=["no", "yes"], fit=fit, id=weights_id(model))
    made = its._replace(record=record, model=model, bag=random_bag(2), texts=Texts(its.tokenizer, texts))
    made = choose_for(made, Goal(), "cpu", "off")
    logits = np.stack([(0.2 + step / 8)[:, None] * np.eye(2)[early], 6 * np.eye(2)[full]])
    save(tmp_path / "run", made._replace(outputs=made.outputs._replace(logits=torch.from_numpy(logits).float())))
    assert command(choose, "run", "--amp", "off")[0] == 0
    return load_run(Path("run"), "point", "outputs", "texts")


def test_labels_are_asked_for_where_they_help_and_those_that_are_given_count(disputed, command):
    point, outputs, ask = disputed.point, disputed.outputs, Path("ask.csv")
    (early, full), (sure, _) = outputs.by(point.rule).logits.argmax(-1).numpy(), point.rule.confidences(outputs.logits)
    changed = [
        row for row in selection.choosers_and_judges(outputs)[1] if outputs.labels[row] < 0 and early[row] != full[row]
    ]
    changed.sort(key=lambda row: (-sure[row], outputs.keys[row]))
    texts = [disputed.texts.examples.texts()[row] for row in changed]
    wrong = {text: ["yes", "no"][full[row]] for text, row in zip(texts, changed, strict=True)}  # so full depth was

    def said_and_asked(*options) -> tuple[str, list[tuple[str, str]]]:
        ask.unlink(missing_ok=True)
        _, out, _ = command(label, "run", "--out", ask, *options)
        rows = cells_of(ask) if ask.exists() else []
        assert all([*row.items()][2:] == [("team", "")] for row in rows)  # nothing that the model says
        return out, [(row["subject"], row["body"]) for row in rows]

    def with_labels(labels: dict[tuple[str, str], str]) -> OperatingPoint:
        row_of = dict(zip(texts, changed, strict=True))
        by_key = {int(outputs.keys[row_of[text]]): ["no", "yes"].index(name) for text, name in labels.items()}
        return replace(selection.choose(outputs, point.goal, given=by_key, combines=True), id=disputed.record.id)

    # What stops the way down first is asked first, and nothing that would not help.
    (out, asked), (_, first) = said_and_asked(), said_and_asked("--most", 5)
    assert (asked, first) == (texts[: len(asked)], texts[:5])
    assert len(asked) < len(texts)
    assert with_labels({text: wrong[text] for text in asked}).threshold == with_labels(wrong).threshold
    half = with_labels({text: wrong[text] for text in asked[1::2]})  # as is expected of them
    told = rf"About {len(asked)} labels may cut the layers run from (\d+) to (\d+) of 100; no other"
    found = re.match(f"{told} unlabelled text limits the threshold\n", out)
    assert [*map(int, found.groups())] == pytest.approx([100 * point.share, 100 * half.share], abs=0.51)
    assert out.endswith("; fill in 'team', then: minisweet choose run --labels ask.csv\n")

    ask.write_text("filled in")  # which is not replaced
    status, _, err = command(label, "run", "--out", ask)
    assert (status, "--out: ask.csv already exists" in err, ask.read_text()) == (2, True, "filled in")

    # Python's are the same, and are kept. The folder that they came from stays as it is.
    classify = EarlyExitClassifier.load("run", amp="off")
    assert classify.to_label(most=5) == first
    classify.choose(labels=(asked[:9], [wrong[text] for text in asked[:9]])).save("saved")
    again = EarlyExitClassifier.load("saved", amp="off")
    assert again.operating_point == with_labels({text: wrong[text] for text in asked[:9]})
    assert again.operating_point == again.choose().operating_point != point == load_run(Path("run"), "point").point
    assert not {*again.to_label()} & {*asked[:9]}

    # Somebody fills in that full depth was right in one of four, and wrong in the others; not all of it is right.
    given = {
        text: name if n % 4 else {"no": "yes", "yes": "no"}[name]
        for n, (text, name) in enumerate([*wrong.items()][3 : len(asked)])
    }
    other = next(text for text, n in zip(disputed.texts.examples.texts(), outputs.labels, strict=True) if n >= 0)
    rows = [(*text, name) for text, name in given.items()] + [(*asked[0], ""), (*asked[1], "maybe")]
    write_rows(ask, [*rows, (asked[2][0], "edited", "yes"), (*other, "yes")], "subject", "body", "team")
    status, _, err = command(choose, "run", "--labels", ask, "--amp", "off")
    told = f"left out, as this run does not ask about them, or they were edited: {(asked[2][0], 'edited')}, {other}\n"
    assert (status, err) == (0, f"{told}labels that the run does not know, left out: maybe\n")
    emptied, twice = next(iter(given)), [(*asked[0], "yes"), (*asked[0], "no")]
    write_rows(ask, [(*emptied, "")], "subject", "body", "team")
    _, _, err = command(choose, "run", "--labels", ask, "--amp", "off")
    assert f"cells that are empty now; their earlier labels are kept: {emptied}\n" in err
    write_rows(ask, twice, "subject", "body", "team")
    status, _, err = command(choose, "run", "--labels", ask, "--amp", "off")
    assert (status, err) == (2, f"minisweet choose: error: --labels: {asked[0]} has two labels, should have one\n")
    assert command(choose, "run", "--amp", "off")[0] == 0  # they are kept
    now = load_run(Path("run"), "point").point
    assert (now, now.share < point.share) == (with_labels(given), True)
    _, asked_again = said_and_asked()
    assert (asked_again[:3], {*asked_again} & {*given}) == (asked[:3], set())

    # Where labels would change nothing it says why: since those of both times count.
    write_rows(ask, [(*text, wrong[text]) for text in asked_again], "subject", "body", "team")
    assert command(choose, "run", "--labels", ask, "--amp", "off")[0] == 0
    assert said_and_asked() == ("labels would change nothing: no unlabelled text limits the threshold\n", [])


@pytest.mark.parametrize("suffixes", [*product(SUFFIXES, repeat=2)])
def test_rows_keep_their_cells_and_get_ours_beside_them(run_of, suffixes, tmp_path):
    """In any format, whatever the texts and columns are; in JSON lines a row may lack a column."""
    rows = [{"text": 'a "film",\n\tbad', "label": ""}, {"text": "", "p_positive": "\u2028 x", "note": " "}]
    columns, classify = ["text", "label", "p_positive", "note"], EarlyExitClassifier.load(run_of("sweet"))
    file, out = (tmp_path / f"{name}{suffix}" for name, suffix in zip(("in", "out"), suffixes, strict=True))
    with row_writer(file, columns) as write:
        for row in rows:
            write(row)
    assert run(predict, run_of("sweet"), file, "--out", out) == 0
    found = cells_of(out)
    ours = ["predicted_label", "confidence", "exit_layer", "p_negative", "predicted_p_positive"]
    for before, row, answer in zip(rows, found, classify.classify([row["text"] for row in rows]), strict=True):
        assert {name: row.get(name) or "" for name in columns} == dict.fromkeys(columns, "") | before
        label, *numbers = (row[name] for name in ours)
        expected = [answer.confidence, answer.exit_layer, *answer.probabilities.values()]
        assert (label, list(map(float, numbers))) == (answer.label, pytest.approx(expected, abs=1e-6))


def test_columns_of_text_and_what_is_told(run_of, command):
    run, classify = run_of("sweet"), EarlyExitClassifier.load(run_of("sweet"))
    Path("in.csv").write_text(f"body,text\n{'bad ' * 31},awful\n{'bad ' * 30},\n")
    for options, text, empty, cut in ((["--text-columns", "body"], "bad " * 31, 0, 1), ([], "awful", 1, 0)):
        _, out, _ = command(predict, run, "in.csv", "--out", "out.csv", *options)
        row = cells_of(Path("out.csv"))[0]
        assert float(row["p_negative"]) == pytest.approx(classify.predict_proba([text])[0, 0], abs=1e-6)
        assert out.strip().endswith(f"empty: {empty}; cut to 32 tokens: {cut}")
    _, out, _ = command(predict, run, "in.csv")  # on standard output, as CSV
    assert out.startswith("body,text,label,confidence,exit_layer,p_negative,p_positive\r\n")


def test_light_start(run_of):
    """Nothing heavy is imported up to the first answer, and a program's logging is left alone."""
    heavy = "[name for name in ('transformers', 'matplotlib', 'torch._dynamo', 'sympy') if name in sys.modules]"
    code = f"from minisweet import EarlyExitClassifier as E; E.load({str(run_of('sweet'))!r}).predict(['a']); "
    code += f"print({heavy}); import logging; log = logging.getLogger('minisweet'); print(log.level, log.handlers)"
    done = subprocess.run([sys.executable, "-c", f"import sys; {code}"], capture_output=True, text=True, cwd=CHECKOUT)
    assert (done.stdout, done.stderr) == ("[]\n0 []\n", "")
