"""One ONNX file that leaves early: its answers are the model's, and it is all that a deployment needs."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import evaluate
import train
from minisweet import EarlyExitClassifier, load_encoder
from minisweet.adaptive import ExitRule, spaced_thresholds
from minisweet.live import early_exit
from minisweet.runs.folders import load_run
from minisweet.use import export
from tests.conftest import CHECKOUT, exit_model, quick, random_batch, write_model
from tests.test_use import call

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason=f"{package}, which the file needs, is missing")

import onnxruntime  # noqa: E402

from minisweet.use import onnx  # noqa: E402

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
TEXTS = ["the film was superb", ("a dull film", "you and i"), "", "not bad , it is great", "bad " * 60]


def session_of(file: bytes | str) -> onnxruntime.InferenceSession:
    """A file, or its bytes, in ONNX Runtime, without the warning that the threshold is no constant."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def asked(session, batch, threshold=None) -> tuple[np.ndarray, ...]:
    """Probabilities, confidence and exit layer of a batch."""
    inputs = dict(zip(INPUTS, (x.numpy() for x in batch), strict=True))
    if threshold is not None:
        inputs["threshold"] = np.array(threshold, np.float32)
    return session.run(None, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["bert", "deberta"])
@pytest.mark.parametrize("method", ["branch", "sweet", "ee"])
def test_answers_are_the_models(tmp_path, model_type, method):
    """At eleven thresholds and beyond, alone and in padded batches, where all leave at once and where nobody does."""
    encoder = load_encoder(write_model(tmp_path, model_type, num_hidden_layers=3))
    model = exit_model(encoder, (1, 2, 3), 3, method).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "classifier" in name:
            torch.nn.init.normal_(parameter, std=0.7)
        elif "branches" in name:  # no copies any more
            parameter.data.mul_(1.2)
    rule = ExitRule(3, torch.tensor([0.8, 1.0, 1.5]))
    flat, *names = onnx.flat_graph(onnx.Pieces(model, rule))
    file, ways = onnx.joined(flat, *names, 0.7, 3), set()
    session = session_of(file.SerializeToString())
    for B, T in ((1, 11), (7, 11), (32, 40), (1, 1)):
        batch = random_batch(B, B, T)
        for threshold in (*spaced_thresholds(11, rule.lowest), 0.0, 0.7, 1.5):
            found = early_exit(model, *batch, threshold, rule)
            probabilities, confidence, layer = asked(session, batch, None if threshold == 0.7 else threshold)
            expected = (found.logits / rule.temperatures[found.exits, None]).softmax(-1)
            np.testing.assert_allclose(probabilities, expected, atol=1e-5)
            np.testing.assert_allclose(confidence, found.confidence, atol=1e-5)
            assert layer.tolist() == [model.exit_layers[k] for k in found.exits]
            assert layer.dtype == np.int64
            if threshold <= rule.lowest or threshold >= 1:
                assert set(layer.tolist()) == {1 if threshold < 1 else 3}
            ways.add(tuple(sorted(set(layer.tolist()))))
    assert {(1,), (1, 2, 3), (3,)} <= ways

    first = next(node for node in file.graph.node if node.op_type == "If")  # asks the first exit, or not
    (ask,) = (attribute.g for attribute in first.attribute if attribute.name == "then_branch")
    for weights in ask.initializer:
        if weights.data_type == onnx.FLOAT:
            weights.raw_data = np.full(len(weights.raw_data) // 4, np.nan, np.float32).tobytes()
    blinded = session_of(file.SerializeToString())
    assert np.isnan(asked(blinded, batch, 0.9)[0]).any()
    np.testing.assert_array_equal(asked(blinded, batch, 1.0)[0], asked(session, batch, 1.0)[0])


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
    """Runs of tiny models on the toy task, by their options; each is made once, and evaluated."""
    folder = tmp_path_factory.mktemp("runs")

    def make(*options):
        run = folder / ("run" + "".join(options))
        if not run.exists():
            tiny = write_model(folder / "tiny", "bert", num_hidden_layers=3)
            assert call(train, *quick(tiny, "--exit-layers", "1,2,3", "--lr", 0.01, *options, "--out", run))[0] == 0
            assert call(evaluate, run, "--speed", 0.6)[0] == 0
        return run

    return make


@pytest.fixture(scope="module")
def run(make_run):
    """A branch run."""
    return make_run("--method", "branch")


@pytest.fixture
def exported_once(monkeypatch, kept={}):  # noqa: B006  kept from test to test
    """torch's export, the slow part, is done once for each model."""
    of_torch = onnx.flat_graph

    def flat_graph(pieces):
        key = tuple(float(weights.sum()) for weights in pieces.parameters())
        if key not in kept:
            flat, *names = of_torch(pieces)
            kept[key] = (flat.SerializeToString(), *names)
        flat, *names = kept[key]
        return onnx.onnx.ModelProto.FromString(flat), *names

    monkeypatch.setattr(onnx, "flat_graph", flat_graph)


@pytest.mark.slow
def test_command_writes_all_that_a_deployment_needs(run, tmp_path, exported_once):
    file, evaluation = tmp_path / "a.onnx", json.loads((run / "evaluation.json").read_text())
    status, out, err = call(export, run, "--onnx", file)
    assert status == 0, err
    assert re.search(r"a.onnx: float32, 0.\d MB, exits after layers 1,2,3, by default at threshold 0.\d+", out)
    assert re.search(r"1,000 validation rows: accuracy \d+.\d with \d+.\d% .*; labels and exits are the model's", out)
    session = session_of(file)
    told, threshold = session.get_modelmeta().custom_metadata_map, evaluation["operating_point"]["threshold"]
    assert sorted(told) == sorted(("tokenizer", "labels", "exit_layers", "max_length", "threshold", "versions"))
    values = {key: json.loads(value) for key, value in told.items() if key != "tokenizer"}
    assert values.pop("versions").keys() >= {"torch", "onnx", "onnxscript", "onnxruntime"}
    expected = {"labels": ["negative", "positive"], "exit_layers": [1, 2, 3], "max_length": 32, "threshold": threshold}
    assert values == expected
    assert [(x.name, x.type, x.shape) for x in session.get_inputs()] == [
        (name, "tensor(int64)", ["batch", "tokens"]) for name in INPUTS
    ]
    (default,) = session.get_overridable_initializers()
    assert (default.name, default.type, default.shape) == ("threshold", "tensor(float)", [])
    assert onnx.onnx.load(file).ir_version == 10
    classify, tokenizer = EarlyExitClassifier(run), Tokenizer.from_str(told["tokenizer"])
    encoded = tokenizer.encode_batch(TEXTS)
    batch = [torch.tensor([getattr(text, name) for text in encoded]) for name in ("ids", "attention_mask", "type_ids")]
    for answer, probabilities, confidence, layer in zip(classify(TEXTS), *asked(session, batch), strict=True):
        assert list(answer.probabilities.values()) == pytest.approx(probabilities.tolist(), abs=1e-5)
        assert (answer.confidence, answer.exit_layer) == (pytest.approx(confidence, abs=1e-5), layer)


@pytest.mark.slow
def test_int8_says_what_it_costs(run, tmp_path, exported_once):
    assert call(export, run, "--onnx", tmp_path / "b.onnx")[0] == 0
    status, out, _ = call(export, run, "--onnx", tmp_path / "a.onnx", "--int8")
    assert status == 0
    assert re.search(r"a.onnx: int8, \d.\d MB, exits", out)
    assert re.search(r"1,000 validation rows: accuracy \d+.\d with .*% of the layers; float32: \d+.\d with \d+", out)
    assert (tmp_path / "a.onnx").stat().st_size < (tmp_path / "b.onnx").stat().st_size
    probabilities, _, layer = asked(session_of(tmp_path / "a.onnx"), random_batch(), 1.0)
    np.testing.assert_allclose(probabilities, load_run(run)[0](*random_batch())[-1].softmax(-1).detach(), atol=0.1)
    assert layer.tolist() == [3] * 4


@pytest.mark.slow
def test_exits_and_calibration_of_the_evaluation(make_run, tmp_path):
    """What --use-exits left out is not in the file, and --calibration none leaves probabilities as they are."""
    run = shutil.copytree(make_run("--method", "sweet"), tmp_path / "run")
    assert call(evaluate, run, "--use-exits", "2,3", "--calibration", "none")[0] == 0
    assert call(export, run, "--onnx", tmp_path / "a.onnx")[0] == 0
    session, batch = session_of(tmp_path / "a.onnx"), random_batch()
    probabilities, _, layer = asked(session, batch, 0.5)
    assert layer.tolist() == [2] * 4
    _, second, last = load_run(run)[0](*batch).softmax(-1).detach()
    np.testing.assert_allclose(probabilities, second, atol=1e-5)
    np.testing.assert_allclose(asked(session, batch, 1.0)[0], last, atol=1e-5)
    assert json.loads(session.get_modelmeta().custom_metadata_map["exit_layers"]) == [2, 3]


@pytest.mark.slow
def test_answers_that_are_not_the_models_leave_no_file(run, tmp_path, monkeypatch, exported_once):
    answers = onnx.answers_of_file
    monkeypatch.setattr(onnx, "answers_of_file", lambda *arguments: 1 - answers(*arguments).clamp(max=1))
    status, _, err = call(export, run, "--onnx", tmp_path / "a.onnx")
    assert (status, "answers are not the model's" in err.splitlines()[-1]) == (2, True)
    assert list(tmp_path.iterdir()) == []
    assert call(export, run, "--onnx", tmp_path / "a.onnx", "--int8")[0] == 0  # where they may differ


@pytest.mark.slow
def test_rows_that_are_not_at_hand(tmp_path, exported_once):
    """Nothing is checked where the user's file is gone; --data names it where it moved."""
    rows = [f"{'good' if n % 2 else 'bad'} film {n},{n % 2}" for n in range(60)]
    (tmp_path / "own.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    tiny, run = write_model(tmp_path / "tiny", "bert", num_hidden_layers=1), tmp_path / "run"
    assert call(train, "--data", tmp_path / "own.csv", *quick(tiny, "--exit-layers", 1, "--out", run))[0] == 0
    assert call(evaluate, run)[0] == 0
    (tmp_path / "own.csv").rename(tmp_path / "moved.csv")
    status, out, _ = call(export, run, "--onnx", tmp_path / "a.onnx")
    assert (status, "nothing was checked" in out, (tmp_path / "a.onnx").exists()) == (0, True, True)
    status, out, _ = call(export, run, "--onnx", tmp_path / "b.onnx", "--data", tmp_path / "moved.csv")
    assert (status, "12 validation rows" in out) == (0, True)
    status, _, err = call(export, run, "--onnx", tmp_path / "c.onnx", "--data", tmp_path / "none.csv")
    assert (status, "none.csv" in err, (tmp_path / "c.onnx").exists()) == (2, True, False)


def test_refusals(make_run, run, tmp_path, monkeypatch):
    """One line each, before anything is made."""
    (tmp_path / "there.onnx").write_text("kept")
    new, bare = tmp_path / "new.onnx", shutil.copytree(run, tmp_path / "bare")
    (bare / "evaluation.json").unlink()
    cases = [
        ([run, "--onnx", tmp_path / "there.onnx"], "there.onnx exists already"),
        ([run, "--onnx", tmp_path / "new.pt"], "should end in .onnx"),
        ([bare, "--onnx", new], "evaluate.py"),
        ([make_run("--method", "mm"), "--onnx", new], "Multi-Model"),
        ([make_run("--exit-strategy", "lte"), "--onnx", new], "learning-to-exit"),
        ([run, "--onnx", new, "--exit-layer", 3], "--exit-layer: 3 needs --out"),
        ([run, "--out", tmp_path / "new", "--int8"], "--int8: needs --onnx"),
        ([run, "--out", tmp_path / "new", "--onnx", new], "not allowed"),
        ([tmp_path / "none", "--onnx", new], "no run"),
    ]
    for arguments, message in cases:
        status, _, err = call(export, *arguments)
        assert (status, message in err, err.count("\n")) == (2, True, 1), err
    monkeypatch.setattr(onnx, "LARGEST", 1000)
    status, _, err = call(export, run, "--onnx", new)
    assert (status, "less than 1,000" in err, err.count("\n")) == (2, True, 1)
    monkeypatch.delitem(sys.modules, "minisweet.use.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    status, _, err = call(export, run, "--onnx", new)
    assert (status, "onnxscript (pip install '.[onnx]')" in err, err.count("\n")) == (2, True, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "there.onnx"]
    assert (tmp_path / "there.onnx").read_text() == "kept"


@pytest.mark.slow
def test_python_of_the_readme(run, tmp_path, exported_once):
    """Run as it stands there, where neither torch nor minisweet can be imported."""
    assert call(export, run, "--onnx", tmp_path / "reviews.onnx")[0] == 0
    blocks = re.findall(r"```python\n(.*?)```", (CHECKOUT / "README.md").read_text(), re.S)
    (code,) = [block for block in blocks if "onnxruntime" in block]
    hidden = "import sys; sys.modules.update(dict.fromkeys(('torch', 'minisweet')))\n"
    done = subprocess.run([sys.executable, "-c", hidden + code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    texts = re.findall(r'"(The film[^"]*)"', code)
    for line, answer in zip(done.stdout.splitlines(), EarlyExitClassifier(run)(texts), strict=True):
        assert line.split() == [answer.label, f"{answer.confidence:.2f}", str(answer.exit_layer)]
