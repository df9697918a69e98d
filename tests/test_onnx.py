"""One ONNX file that leaves early: its answers are the model's, and it is all that a deployment needs."""

import copy
import functools
import json
import logging
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import evaluate
from minisweet import EarlyExitClassifier
from minisweet.adaptive import ExitRule, Exits, exits_taken, spaced_thresholds
from minisweet.evaluation.answers import load_answers
from minisweet.evaluation.operating import deal, operating_point
from minisweet.ngrams import BUCKETS, NgramExit
from minisweet.runs.folders import read_evaluation, read_record, read_validation
from minisweet.use import export
from tests.conftest import random_batch, slow, undecided_model, write_model
from tests.test_readme import USE, blocks_of

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason=f"{package}, which the file needs, is missing")

import onnxruntime  # noqa: E402
from onnx.numpy_helper import to_array  # noqa: E402

from minisweet.use import onnx, onnx_graph  # noqa: E402


def session_of(file: bytes | str) -> onnxruntime.InferenceSession:
    """A file, or its bytes, in ONNX Runtime, without the warning that the threshold is no constant."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def ask(session, batch, threshold=None) -> list[np.ndarray]:
    """Probabilities, confidence and exit layer of a batch."""
    inputs = dict(zip(onnx_graph.INPUTS, map(np.asarray, batch), strict=True))
    return session.run(None, inputs if threshold is None else inputs | {"threshold": np.array(threshold, np.float32)})


CASES = [
    ("bert", "branch", (0, 1, 4)),
    ("bert", "ee", (1, 4)),
    ("bert", "sweet", (4,)),
    ("deberta", "branch", (0, 1, 4)),
    ("mpnet", "branch", (0, 1, 4)),
]
TEMPERATURES = [0.8, 1.0, 1.5]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function that gives an undecided model of a case, which takes 512 tokens, and its file: each is made once."""

    @functools.cache
    def made(model_type: str, method: str, exit_layers: tuple[int, ...], int8: bool = False):
        sizes = {"max_position_embeddings": 514}  # 512 tokens, of MPNet too
        folder = write_model(tmp_path_factory.mktemp("model"), model_type, **sizes)
        model = undecided_model(folder, method, 3).add_ngrams(NgramExit(60, 3, [0, 1, 2, 3], pairs=True))
        torch.nn.init.normal_(model.ngrams.table)
        model = model.keep_exits(exit_layers)
        return model, onnx_graph.export_graph(model, 0.7, TEMPERATURES[: len(exit_layers)], int8)

    return made


def batches() -> list[tuple[torch.Tensor, ...]]:
    """Pairs and single texts, alone and in padded batches; among them an empty one, one of unknown tokens, and 512."""
    found = [random_batch(B, B, T) for B, T in ((1, 11), (7, 11), (32, 40), (1, 512))]
    ids, mask, _ = random_batch(2, 7, 20)
    odd = torch.tensor([[2, 3, 0, 0, 0], [2, 1, 1, 1, 3]])  # [CLS] [SEP], and [CLS] [UNK] [UNK] [UNK] [SEP]
    empty = odd[:1, :2]
    return [*found, (ids, mask, ids * 0), (odd, (odd > 0).long(), odd * 0), (empty, empty * 0 + 1, empty * 0)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_answers_are_the_models(exported, case):
    """At eleven thresholds and beyond, and at the file's own."""
    (model, file), ways = exported(*case), set()
    rule = ExitRule(3, torch.tensor(TEMPERATURES[: len(model.exit_layers)]))
    session = session_of(file.SerializeToString())
    for batch in batches():
        logits = model(*batch).detach()
        each = (logits / rule.temperatures[:, None, None]).softmax(-1)  # (K, B, C)
        for threshold in (*spaced_thresholds(11, rule.lowest), 0.0, 0.7, 1.5):
            taken = exits_taken(rule.confidences(logits), threshold, rule.lowest)
            expected = each[taken, torch.arange(len(taken))]
            probabilities, confidence, layer = ask(session, batch, None if threshold == 0.7 else threshold)
            np.testing.assert_allclose(probabilities, expected, atol=1e-5)
            np.testing.assert_allclose(confidence, expected.amax(-1), atol=1e-5)
            assert (layer.dtype, layer.tolist()) == (np.int64, [model.exit_layers[k] for k in taken])
            ways.add(tuple(sorted(set(layer.tolist()))))
    assert {model.exit_layers[:1], model.exit_layers, model.exit_layers[-1:]} <= ways


@pytest.mark.slow
def test_in_int8_all_may_leave_too(exported):
    cases = (*CASES[0], True), CASES[0]
    int8, plain = (session_of(exported(*case)[1].SerializeToString()) for case in cases)
    for batch in batches():
        np.testing.assert_allclose(ask(int8, batch, 0.0)[0], ask(plain, batch, 0.0)[0], atol=1e-6)
        assert (ask(int8, batch, 0.0)[2].max(), ask(int8, batch, 1.0)[2].min()) == (0, 4)


@pytest.mark.slow
def test_nothing_is_run_in_vain(exported):
    """Who leaves at exit 0 is never embedded; at threshold 1 no exit but the last is asked."""
    _, file = exported(*CASES[0])

    def spoilt(is_spoilt) -> onnxruntime.InferenceSession:
        """The file, where some weights have their first row alone, so that who reads another one raises an error."""
        spoilt = copy.deepcopy(file)
        for weights in (weights for graph in onnx_graph.graphs_in(spoilt.graph) for weights in graph.initializer):
            if is_spoilt(weights):
                weights.raw_data = weights.raw_data[: len(weights.raw_data) // weights.dims[0]]
                weights.dims[0] = 1
        return session_of(spoilt.SerializeToString())

    whole, ids, mask, types = spoilt(lambda weights: False), *random_batch(0, 32)
    ids[0] = 0  # the one row that the spoilt embeddings know
    _, confidence, _ = ask(whole, (ids, mask, types), 0.0)
    kept = confidence >= confidence[0]
    batch, threshold = (ids[kept], mask[kept], types[kept]), np.nextafter(confidence[0], np.float32(1))
    no_words = spoilt(lambda weights: weights.name.endswith("word_embeddings.weight"))
    probabilities, _, layer = ask(no_words, batch, threshold)
    assert (layer[0] > 0, set(layer[1:].tolist()), len(layer) > 8) == (True, {0}, True)
    np.testing.assert_array_equal(probabilities, ask(whole, batch, threshold)[0])
    no_table = spoilt(lambda weights: weights.dims[:1] > [BUCKETS])
    np.testing.assert_array_equal(ask(no_table, batch, 1.0)[0], ask(whole, batch, 1.0)[0])
    for session, asked in ((no_words, 1.0), (no_table, 0.99)):
        with pytest.raises(Exception, match="out of.*bounds|invalid"):
            ask(session, batch, asked)


def told_by(file) -> dict:
    """What a file's metadata say, but for the tokenizer."""
    told = session_of(file).get_modelmeta().custom_metadata_map
    return {key: json.loads(value) for key, value in told.items() if key != "tokenizer"}


@pytest.mark.parametrize("name", ["trunk0", *slow("pairs")])
def test_file_tells_what_it_is_and_the_guides_python_runs_it(run_of, tmp_path, name):
    """For single texts and for pairs, where neither torch nor minisweet can be imported."""
    run, file = run_of(name), tmp_path / "tickets.onnx"
    first, rows, changes, *_ = onnx.export_onnx(run, file)
    evaluation, record, told = read_evaluation(run), read_record(run), told_by(file)
    point, sides = evaluation.operating_point, deal(load_answers(run, evaluation, record), record.train_tokens)
    assert first.endswith(f"by default at threshold {point.threshold:.6g}")
    assert "; 0 labels or exits are not the model's" in rows
    assert told.pop("versions").keys() >= {"torch", "onnx", "onnxscript", "onnxruntime"}
    assert told.pop("file_rows") == len(sides.judging)  # equal texts count as one in `judging_texts`
    assert told.pop("file_changes") == int(changes.split()[0])
    expected = {"labels": record.labels, "exit_layers": point.asked_exits, "max_length": 32, "goal": point.goal}
    expected |= {"threshold": point.threshold, "certified_for": "model", "pairs": name == "pairs"}
    assert told == expected

    (code,) = [block for kind, block in blocks_of(USE) if kind == "python" and "onnxruntime" in block]
    code = f"import sys; sys.modules.update(torch=None, minisweet=None)\n{code}print(json.dumps(texts))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *lines, texts = done.stdout.splitlines()
    for line, answer in zip(lines, EarlyExitClassifier(run)(json.loads(texts)), strict=True):
        assert line.split() == [answer.label, f"{answer.confidence:.2f}", str(answer.exit_layer)]


@pytest.mark.slow
@pytest.mark.parametrize("goal", ["--max-loss 2 --sure 60", "--max-change 10 --sure 80"])
def test_int8_and_a_threshold_from_the_files_own_answers(run_of, tmp_path, command, goal):
    run, int8, own = shutil.copytree(run_of("trunk0"), tmp_path / "run"), tmp_path / "int8.onnx", tmp_path / "own.onnx"
    if "change" in goal:  # without labels: the model's own decide who chooses and who judges, not the file's
        for name, old, new in (("run.json", "accuracy", "agreement"), ("validation.jsonl", r', "label": "\w+"', "")):
            (run / name).write_text(re.sub(old, new, (run / name).read_text()))
    assert command(evaluate, run, *goal.split())[0] == 0
    evaluation, record = read_evaluation(run), read_record(run)
    _, out, _ = command(export, run, "--onnx", int8, "--int8")
    assert ("says nothing of int8" in out) == (evaluation.operating_point.threshold < 1)
    assert told_by(int8)["certified_for"] == "model"
    status, out, err = command(export, run, "--onnx", own, "--int8", "--recertify")
    assert status == 0, err

    # Every row's answers of both exits, by the file itself: at threshold 0 all leave at exit 0, at 1 nobody does.
    session, told, validation = session_of(own), told_by(own), load_answers(run, evaluation, record)
    texts = EarlyExitClassifier(run).tokenize(read_validation(run, record).texts())
    singles = [texts.batch(np.array([row])).inputs for row in range(len(texts))]
    said = np.array([[ask(session, one, threshold)[0][0] for one in singles] for threshold in (0.0, 1.0, None)])
    weights = onnx_graph.onnx.load(own).graph.initializer
    (temperatures,) = [to_array(value) for value in weights if value.name == "temperatures"]
    logits = torch.tensor(np.log(said[:2]) * temperatures[:, None, None])  # (2, N, C)
    sides = deal(validation, record.train_tokens)
    labels = logits[-1].argmax(-1) if record.metric == "agreement" else validation.labels
    validation = validation._replace(logits=logits, labels=labels, exits=Exits([0, 4], record.depth, record.method))
    rule, point = operating_point(validation, told["goal"], sides, [0, 4])
    assert temperatures == pytest.approx(rule.temperatures.numpy(), rel=1e-3)
    assert told["threshold"] == pytest.approx(point["threshold"], abs=1e-4)
    _, full_depth, early = said.argmax(-1)[:, sides.judging]
    assert (told["file_rows"], told["file_changes"]) == (len(early), (early != full_depth).sum())
    assert (told["exit_layers"], told["certified_for"]) == ([0, 4], "file")
    assert ("holds for this file" in out) == (told["threshold"] < 1)


@pytest.mark.slow
def test_refusals(run_of, tmp_path, command, monkeypatch):
    run, new = run_of("trunk0"), tmp_path / "new.onnx"

    def refused(run, *options) -> str:
        status, _, err = command(export, run, "--onnx", new, *options)
        assert (status, err.count("\n"), new.exists()) == (2, 1, False), err
        return err

    assert "Multi-Model (mm)" in refused(run_of("mm"))
    assert "learning-to-exit (lte)" in refused(run_of("lte"))
    fast = shutil.copytree(run_of("trunk0"), tmp_path / "fast")
    assert command(evaluate, fast, "--speed", "0.7")[0] == 0
    assert "--recertify: " in refused(fast, "--recertify")
    monkeypatch.setattr(onnx, "export_graph", lambda model, *_: onnx_graph.export_graph(model, 0.0, [1.0, 1.0]))
    assert "answers are not the model's" in refused(run)
    for name in ("onnx", "onnx_graph"):
        monkeypatch.delitem(sys.modules, f"minisweet.use.{name}")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "onnxscript (pip install '.[onnx]')" in refused(run)


@pytest.mark.parametrize("former", [logging.NOTSET, logging.INFO, logging.ERROR])
def test_a_callers_logging_is_as_it_was_also_where_the_export_fails(monkeypatch, former):
    seen = []
    monkeypatch.setattr(onnx_graph, "Writer", lambda model: seen.append(logging.root.manager.disable) or 1 / 0)
    monkeypatch.setattr(logging.root.manager, "disable", former)
    with pytest.raises(ZeroDivisionError):
        onnx_graph.export_graph(None, 0.5, [])
    assert (seen, logging.root.manager.disable) == ([max(former, logging.WARNING)], former)
