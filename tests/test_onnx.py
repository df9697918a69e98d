"""One ONNX file that leaves early: its answers are the model's, and it is all that a deployment needs."""

import ast
import copy
import functools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minisweet import EarlyExitClassifier, load_encoder
from minisweet.classifier.cascade import Cascade, at_exit_0, at_full_depth, leaves
from minisweet.classifier.main import choose, export
from minisweet.classifier.probe import FullModel
from minisweet.classifier.promise import choose as choose_point
from minisweet.classifier.report import what_is_promised
from minisweet.classifier.run import save_choice
from minisweet.exits import ExitHead
from tests.conftest import CHECKOUT, random_bag, random_batch, write_model

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason=f"{package}, which the file needs, is missing")

import onnxruntime  # noqa: E402
from onnx.numpy_helper import to_array  # noqa: E402

from minisweet.classifier import onnx  # noqa: E402

# The head of the model, and how much the answer of exit 0 counts.
CASES = [("bert", "pooler", 0.0), ("deberta", "linear", 0.7), ("mpnet", "linear", -0.4)]


def session_of(file: bytes | str) -> onnxruntime.InferenceSession:
    """A file, or its bytes, in ONNX Runtime."""
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def ask(session, batch, threshold=None) -> list[np.ndarray]:
    """Probabilities, confidence and exit layer of a batch."""
    inputs = dict(zip(onnx.INPUTS, map(np.asarray, batch), strict=True))
    return session.run(None, inputs if threshold is None else inputs | {"threshold": np.array(threshold, np.float32)})


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function that gives a case's undecided model, which takes 512 tokens, rule and file: each is made once."""

    @functools.cache
    def made(model_type: str, head: str, weight: float, int8: bool = False):
        sizes = {"max_position_embeddings": 514}  # 512 tokens, of MPNet too
        folder = write_model(tmp_path_factory.mktemp("model"), model_type, **sizes)
        encoder, bag = load_encoder(folder, pooling="mean" if head == "linear" else "cls"), random_bag(3)
        torch.manual_seed(0)
        model = FullModel(encoder, torch.nn.Linear(16, 3) if head == "linear" else ExitHead(encoder, 3)).eval()
        torch.nn.init.normal_(getattr(model.head, "classifier", model.head).weight, std=4.0)
        rule = (0.8, 1.5, weight)
        return model, bag, rule, onnx.export_graph(copy.deepcopy(model), bag, 0.7, rule, int8)

    return made


def batches() -> list[tuple[torch.Tensor, ...]]:
    """Texts alone and in padded batches; among them an empty one, one of unknown tokens, and 512."""
    found = [random_batch(B, B, T) for B, T in ((1, 11), (7, 11), (32, 40), (1, 512))]
    ids, mask, _ = random_batch(2, 7, 20)
    odd = torch.tensor([[2, 3, 0, 0, 0], [2, 1, 1, 1, 3]])  # [CLS] [SEP], and [CLS] [UNK] [UNK] [UNK] [SEP]
    empty = odd[:1, :2]
    return [*found, (ids, mask, ids * 0), (odd, (odd > 0).long(), odd * 0), (empty, empty * 0 + 1, empty * 0)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_answers_are_the_models(exported, case):
    """At eleven thresholds and beyond, and at the file's own."""
    (model, bag, rule, file), ways = exported(*case), set()
    session = session_of(file.SerializeToString())
    for batch in batches():
        first, logits = bag(*batch[:2]), model(*batch).detach()
        each = torch.stack([at_exit_0(first, rule), at_full_depth(first, logits, rule)]).softmax(-1)  # (2, B, C)
        for threshold in (*np.linspace(1 / 3, 1, 11), 0.0, 0.7, 1.5):
            taken = (~leaves(each[0].amax(-1), threshold, 1 / 3)).long()
            expected = each[taken, torch.arange(len(taken))]
            probabilities, confidence, layer = ask(session, batch, None if threshold == 0.7 else threshold)
            np.testing.assert_allclose(probabilities, expected, atol=1e-5)
            np.testing.assert_allclose(confidence, expected.amax(-1), atol=1e-5)
            assert (layer.dtype, layer.tolist()) == (np.int64, [(0, 4)[k] for k in taken])
            ways.add(tuple(sorted(set(layer.tolist()))))
    assert {(0,), (0, 4), (4,)} <= ways


@pytest.mark.slow
def test_int8_leaves_exit_0_as_it_is_and_takes_one_text_at_a_time(exported, capfd):
    """ONNX Runtime warns of nothing."""
    files = [exported(*case)[-1].SerializeToString() for case in ((*CASES[0], True), CASES[0])]
    capfd.readouterr()
    int8, plain = map(session_of, files)
    for batch in batches():
        for n in range(len(batch[0])):
            one = [x[n : n + 1] for x in batch]
            np.testing.assert_allclose(ask(int8, one, 0.0)[0], ask(plain, one, 0.0)[0], atol=1e-6)
            assert (ask(int8, one, 0.0)[2], ask(int8, one, 1.0)[2]) == (0, 4)
            np.testing.assert_array_equal(ask(int8, one)[0], ask(int8, one, 0.7)[0])
    assert capfd.readouterr() == ("", "")
    with pytest.raises(Exception, match="invalid dimensions"):  # others would change its answers
        ask(int8, random_batch(0, 2))


@pytest.mark.slow
def test_nothing_is_run_in_vain(exported):
    """Who leaves at exit 0 is never embedded."""
    *_, file = exported(*CASES[0])

    def spoilt(is_spoilt) -> onnxruntime.InferenceSession:
        """The file, where some weights have their first row alone, so that who reads another one raises an error."""
        spoilt = copy.deepcopy(file)
        for weights in (weights for graph in onnx.graphs_in(spoilt.graph) for weights in graph.initializer):
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
    with pytest.raises(Exception, match="out of.*bounds|invalid"):
        ask(no_words, batch, 1.0)


@pytest.fixture
def chosen(run_of, tmp_path, command) -> Path:
    """A copy of a run, for which a goal is chosen at which some texts leave early."""
    run = shutil.copytree(run_of("bag"), tmp_path / "bag")
    assert command(choose, run, "--max-lost", 40, "--sure", 60)[0] == 0
    return run


@pytest.mark.slow
def test_file_tells_what_it_is_and_the_guides_python_runs_it(chosen, tmp_path):
    """Where neither torch nor minisweet can be imported."""
    run, file = chosen, tmp_path / "tickets.onnx"
    classify = EarlyExitClassifier.load(run)
    first, rows, promised = classify.export(file)
    point, record = classify.operating_point, classify.record
    assert first.endswith(f"by default at threshold {point.threshold:.6g}")
    assert rows.endswith(": 0 answers or exits are not the model's")
    assert promised == classify.promise
    assert promised.startswith("On ")
    assert classify.export(tmp_path / "a.onnx", int8=True)[0].startswith(f"{tmp_path}/a.onnx: int8")
    told = session_of(file).get_modelmeta().custom_metadata_map
    expected = {"labels": record.labels, "exit_layers": [0, 4], "max_length": 32, "goal": vars(point.goal)}
    expected |= {"threshold": point.threshold, "texts_at_once": None}
    assert {key: json.loads(value) for key, value in told.items() if key != "tokenizer"} == expected

    guide = (CHECKOUT / "minisweet/classifier/README.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall("```python\n(.*?)```", guide, re.DOTALL) if "onnxruntime" in block]
    (texts,) = re.findall(r"^for text in (\(.*?\)):", code, re.MULTILINE)
    code = f"import sys; sys.modules.update(torch=None, minisweet=None)\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for line, answer in zip(done.stdout.splitlines(), classify.classify(ast.literal_eval(texts)), strict=True):
        assert line.split() == [answer.label, f"{answer.confidence:.2f}", str(answer.exit_layer)]


@pytest.mark.slow
@pytest.mark.parametrize("labelled", [True, False])
def test_int8_promises_anew_against_its_own_full_depth(own_run, run_of, tmp_path, command, labelled):
    """Of own text, where exit 0 has a say; and where the file's answers at full depth stand in for labels."""
    goal, file = ("--max-lost", "30", "--sure", "60"), tmp_path / "int8.onnx"
    run = shutil.copytree(own_run if labelled else run_of("bag"), tmp_path / "run")
    if labelled:
        assert command(choose, run, *goal)[0] == 0
        status, out, err = command(export, run, "--onnx", file, "--int8")
        assert status == 0, err
    classify = EarlyExitClassifier.load(run)
    texts, roles, _ = classify.validation
    if not labelled:
        texts.labels[:] = -1
        out = "\n".join(classify.choose(max_lost=30, sure=60).export(file, int8=True))

    # Every row's answers of both exits, by the file itself: at threshold 0 all leave at exit 0, at 1 nobody does.
    session = session_of(file)
    singles = [texts.batch(np.array([row])).inputs for row in range(len(texts))]
    first, last = np.log([[ask(session, one, threshold)[0][0] for one in singles] for threshold in (0.0, 1.0)])
    numbers = {value.name: to_array(value) for value in onnx.onnx.load(file).graph.initializer}
    threshold, bag_temperature, temperature, weight = (float(numbers[name]) for name in onnx.NUMBERS)
    logits = torch.from_numpy(np.stack([first * bag_temperature, (last - weight * first) * temperature]))
    point = choose_point(logits, texts.labels, texts.keys, roles, classify.operating_point.goal, combines=True)
    told = session.get_modelmeta().custom_metadata_map
    assert (bag_temperature, temperature, weight) == pytest.approx(point.rule, rel=1e-3)
    assert (weight != 0) == labelled
    assert json.loads(told["threshold"]) == pytest.approx(point.threshold, abs=1e-4) != 1
    assert threshold == pytest.approx(json.loads(told["threshold"]))
    assert what_is_promised(point) in out
    assert told["texts_at_once"] == "1"


@pytest.mark.slow
def test_refusals(chosen, tmp_path, command, monkeypatch):
    run, new = chosen, tmp_path / "new.onnx"

    def refused() -> str:
        status, _, err = command(export, run, "--onnx", new)
        assert (status, err.count("\n"), new.exists()) == (2, 1, False), err
        return err

    decide = Cascade.decide

    def with_others(cascade, texts) -> tuple:
        logits, layers = decide(cascade, texts)
        return torch.cat([-logits[:others], logits[others:]]), layers

    others = 2
    monkeypatch.setattr(Cascade, "decide", with_others)
    assert re.search(r"not written: 2 of \d+ answers are not the model's", refused())
    others = 1  # of a thousand answers one may be another one
    classify = EarlyExitClassifier.load(run)
    save_choice(run, replace(classify.operating_point, precision="torch.bfloat16"), classify.validation)
    status, out, _ = command(export, run, "--onnx", new)
    assert (status, "one by one: 1 answers or exits are not" in out) == (0, True)
    assert out.endswith("made in torch.bfloat16, and this is torch.float32: choose again with --amp off\n")
    new.unlink()
    monkeypatch.delitem(sys.modules, "minisweet.classifier.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "onnxscript (pip install '.[onnx]')" in refused()
