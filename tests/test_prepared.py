"""The prepared copy answers as the plain model does, but for rounding."""

import copy
import json
import logging
import os

import pytest
import torch

import evaluate
import train
from minisweet import EarlyExitClassifier
from minisweet.adaptive import ExitRule, certainty_ranges, exits_taken, spaced_thresholds
from minisweet.base.safe import InputError
from minisweet.branches import METHODS
from minisweet.exits import EXIT_STRATEGIES, MultiModel
from minisweet.live import early_exit, full_depth
from minisweet.use import predict
from minisweet.use.prepared import PackedLayer, PackedLinear, prepare
from tests.conftest import all_exits, quick, random_batch, undecided_model, write_model


def is_packed(model) -> bool:
    """Whether a copy was made, not the model itself given back."""
    parts = model if isinstance(model, MultiModel) else [model]
    return all(isinstance(layer, PackedLayer) for part in parts for layer in part.encoder.layers)


@pytest.fixture(params=[1, 4, 40], ids=["a sentence alone", "few tokens", "many tokens"])
def batch(request):
    """11 tokens, 44, and more than `FEW` where products are not always packed; padded."""
    return random_batch(5, batch=request.param)


@pytest.fixture(params=[False, True], ids=["AVX2", "AVX-512"])
def processor(request, monkeypatch):
    """The rules of either kind of processor."""
    monkeypatch.setattr("minisweet.use.prepared.AVX512", request.param)
    monkeypatch.setattr("minisweet.use.prepared.FEW", 2**31 if request.param else 128)


@pytest.mark.parametrize("strategy", EXIT_STRATEGIES)
@pytest.mark.parametrize("method", METHODS)
def test_all_exits_say_the_same(tmp_path, model_type, method, strategy, batch, processor):
    model = undecided_model(write_model(tmp_path, model_type), method, 3, strategy=strategy)
    prepared = prepare(model, None)
    assert is_packed(prepared)
    with torch.no_grad():
        plain, packed = all_exits(model, batch), all_exits(prepared, batch)
    torch.testing.assert_close(packed[0].softmax(-1), plain[0].softmax(-1), atol=1e-4, rtol=0)
    if strategy == "lte":
        torch.testing.assert_close(packed[1], plain[1], atol=1e-4, rtol=0)
    assert full_depth(prepared, *batch).tolist() == plain[0][-1].argmax(-1).tolist()


@pytest.mark.parametrize("strategy", EXIT_STRATEGIES)
@pytest.mark.parametrize("method", METHODS)
def test_live_takes_the_same_exits_in_batches_and_one_by_one(tmp_path, model_type, method, strategy):
    model, batch = undecided_model(write_model(tmp_path, model_type), method, strategy=strategy), random_batch(2, 8)
    prepared = prepare(model, None)
    with torch.no_grad():
        logits, certainty = all_exits(model, batch)
    rule = ExitRule(2, ranges=None if certainty is None else certainty_ranges(certainty, 3))
    confidence = rule.confidences(logits, certainty)
    for threshold in spaced_thresholds(4, rule.lowest):
        swept = exits_taken(confidence, threshold, rule.lowest)
        together = early_exit(prepared, *batch, threshold, rule, batch_size=5)
        alone = [early_exit(prepared, *(tensor[[n]] for tensor in batch), threshold, rule) for n in range(8)]
        for exits, said in (
            (together.exits, together.logits),
            (torch.cat([answer.exits for answer in alone]), torch.cat([answer.logits for answer in alone])),
        ):
            first = torch.minimum(exits, swept)
            near = (confidence.gather(0, first[None])[0] - threshold).abs() < 1e-4
            assert ((exits == swept) | near).all()
            expected = logits[exits, torch.arange(8)].softmax(-1)
            torch.testing.assert_close(said.softmax(-1), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_is_that_of_the_plain_model(tmp_path, model_type, method, batch):
    model = undecided_model(write_model(tmp_path, model_type), method)
    prepared = prepare(model, torch.bfloat16)  # the model itself where the processor cannot
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        plain, packed = (all_exits(which, batch)[0].float().softmax(-1) for which in (model, prepared))
    torch.testing.assert_close(packed, plain, atol=2e-2, rtol=0)


class PlainProducts:
    """Stands in for oneDNN's packed products, on a processor that has none in bfloat16."""

    def __call__(self, x, weight, bias, then, *how):
        assert x.dtype == weight.dtype == torch.bfloat16
        x = torch.nn.functional.linear(x, weight, bias)
        return torch.nn.functional.gelu(x) if then == "gelu" else x

    def binary(self, x, residual, weight, bias, how):
        assert residual.dtype == torch.bfloat16
        return self(x, weight, bias, "none") + residual


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_on_any_processor(tmp_path, model_type, method, batch, processor, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda weight: weight)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", PlainProducts())
    model = undecided_model(write_model(tmp_path, model_type), method)
    prepared = prepare(model, torch.bfloat16)
    assert is_packed(prepared)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        plain, packed = (all_exits(which, batch)[0].float().softmax(-1) for which in (model, prepared))
    torch.testing.assert_close(packed, plain, atol=2e-2, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_the_model_itself_stays_as_it_was(tmp_path, model_type, method):
    model = undecided_model(write_model(tmp_path, model_type), method)
    before = copy.deepcopy(model.state_dict())
    prepare(model, None)
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)
    assert not is_packed(model)
    logits = model.train()(*random_batch())
    logits.sum().backward()  # it can still be trained
    heads = model if isinstance(model, MultiModel) else [model]
    assert all(head.classifier.weight.grad is not None for part in heads for head in part.heads[: part.trained_exits])


def test_without_packed_products_a_line_says_so(tmp_path, monkeypatch, caplog):
    model = undecided_model(write_model(tmp_path, "bert"), "sweet")
    monkeypatch.setattr(PackedLinear, "__call__", lambda self, x: torch.ops.mkldnn.no_such_product(x))
    with caplog.at_level(logging.WARNING, "minisweet"):
        assert prepare(model, None) is model
    (line,) = caplog.messages
    assert line.startswith("prepared: no packed torch.float32 weights on this processor")


def test_the_commands_ask_for_many_compiled_products_before_the_first(command, tmp_path, monkeypatch):
    run, name = tmp_path / "run", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    assert command(train, *quick(write_model(tmp_path / "tiny", "bert"), "--out", run))[0] == 0
    (tmp_path / "texts.csv").write_text("text\na good film\n")
    seen = []
    monkeypatch.setattr("minisweet.base.devices.tune_cpu", lambda: seen.append(os.environ.get(name)))
    monkeypatch.setattr("minisweet.use.predict.tune_cpu", lambda: seen.append(os.environ.get(name)))
    for main, arguments in ((evaluate, [run]), (predict, [run, tmp_path / "texts.csv", "--out", tmp_path / "out.csv"])):
        monkeypatch.delenv(name, raising=False)
        assert command(main, *arguments)[0] == 0
    assert seen == ["8192", "8192"]


def test_another_device_is_refused(tmp_path):
    model = undecided_model(write_model(tmp_path, "bert"), "sweet").to("meta")
    with pytest.raises(InputError, match="prepared: is for the CPU, and the device is 'meta'"):
        prepare(model, None)


def test_the_commands_and_the_classifier_take_it(command, tmp_path):
    run, tiny = tmp_path / "run", write_model(tmp_path / "tiny", "bert")
    assert command(train, *quick(tiny, "--method", "branch", "--out", run))[0] == 0
    status, _, err = command(evaluate, run, "--prepared")
    assert (status, err) == (2, "evaluate.py: error: --prepared: needs --live\n")
    status, out, _ = command(evaluate, run, "--live", "--prepared", "--thresholds", 5)
    assert status == 0
    result = json.loads((run / "evaluation.json").read_text())
    assert result["live_prepared"] is True
    assert result["live_differs"] == result["live_differs_near"]
    texts = ["the film was superb", ("a dull film", "you and i"), ""] * 7
    plain, prepared = EarlyExitClassifier(run), EarlyExitClassifier(run, prepared=True)
    assert is_packed(prepared.model)
    for expected, answer in zip(plain(texts), prepared(texts), strict=True):
        assert answer.label == expected.label
        assert answer.probabilities == pytest.approx(expected.probabilities, abs=1e-4)
    with pytest.raises(InputError, match="prepared: 'yes', should be True or False"):
        EarlyExitClassifier(run, prepared="yes")
    (tmp_path / "texts.csv").write_text("text\na good film\n")
    assert command(predict, run, tmp_path / "texts.csv", "--out", tmp_path / "out.csv", "--prepared")[0] == 0
    assert (tmp_path / "out.csv").read_text().count("\n") == 2
