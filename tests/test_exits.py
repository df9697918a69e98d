"""What exits read, and parity with the authors' code."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minisweet import MultiExitModel, load_encoder
from minisweet.base.files import read_json, write_json
from minisweet.checkpoint import public_name
from minisweet.exits import HEADS, METHODS, Answer, LearningToExitHead, exit_loss
from minisweet.hub import home
from minisweet.inference import early_exit
from minisweet.loading import read_config
from tests import conftest
from tests.conftest import (
    answers_of,
    exit_losses,
    model_of,
    models_of,
    note_difference,
    random_batch,
    tiny_encoder,
    write_model,
)


@pytest.mark.parametrize("strategy", HEADS)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("method", METHODS)
def test_every_exit_reads_what_the_pooling_says_of_the_layer_below_it(model_dir, method, pooling, strategy):
    models, batch = models_of(model_dir, method, (1, 3, 4), 3, strategy, pooling=pooling), random_batch()
    hidden, mask = load_encoder(model_dir)(*batch), batch[1]
    heads = [head for model in models for head in model.eval().heads]
    assert [model.exit_layers for model in models] == ([[1], [3], [4]] if method == "mm" else [[1, 3, 4]])
    for n, head, output in zip((1, 3, 4), heads, answers_of(models, batch), strict=True):
        means = torch.stack([states[: tokens.sum()].mean(0) for states, tokens in zip(hidden[n], mask, strict=True)])
        torch.testing.assert_close(output, head(hidden[n][:, 0] if pooling == "cls" else means), atol=1e-5, rtol=1e-5)
        assert (type(head) is LearningToExitHead) is (strategy == "lte")


def test_the_pooling_is_the_checkpoints_or_the_presets_or_that_which_is_asked_for(tmp_path):
    folder = write_model(tmp_path / "tiny", "bert")
    assert load_encoder(folder).config.pooling == "cls"
    assert load_encoder(folder, pooling="mean").config.pooling == "mean"
    shutil.copytree(folder, tmp_path / "minilm-l6")  # as fetched before pooling was known
    assert read_config(tmp_path / "minilm-l6").pooling == "mean"
    (folder / "1_Pooling").mkdir()
    old = {"word_embedding_dimension": 16, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False}
    for content, expected in (
        (old | {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}, "mean"),
        (old | {"pooling_mode_cls_token": True}, "cls"),
        ({"embedding_dimension": 16, "pooling_mode": "mean", "include_prompt": True}, "mean"),
        ({"pooling_mode": "cls", "pooling_mode_mean_tokens": True}, "cls"),
        ({"pooling_mode": ["mean"]}, "mean"),
    ):
        write_json(folder / "1_Pooling" / "config.json", content)
        assert read_config(folder).pooling == expected
    several = {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}
    for content in ({}, old, several, {"pooling_mode": "sum"}, {"pooling_mode": ["cls", "mean"]}, {"pooling_mode": 1}):
        write_json(folder / "1_Pooling" / "config.json", content)
        error = conftest.refused(read_config, folder)
        assert error.startswith(f"pooling: {folder / '1_Pooling' / 'config.json'}: the model was trained to give ")
        assert read_config(folder, "mean").pooling == load_encoder(folder, pooling="mean").config.pooling == "mean"
    shutil.rmtree(folder / "1_Pooling")
    write_json(folder / "config.json", read_json(folder / "config.json") | {"pooling": "none"})
    assert "pooling is 'none', should be one of" in conftest.refused(read_config, folder)


@pytest.mark.parametrize("method", ["sweet", "mm"])
def test_a_mask_and_types_may_be_left_out_and_padding_on_the_left_is_refused(model_dir, method):
    models = [model.eval() for model in models_of(model_dir, method)]
    ids, mask, types = random_batch(batch=8)
    live = partial(early_exit, models, threshold=0.8, fitted=[[1.0]] * 3)
    for answer in (lambda *inputs: models[-1](*inputs)[-1].logits, lambda *inputs: live(*inputs).confidence):
        assert torch.equal(answer(ids, None, None), answer(ids, torch.ones_like(ids), torch.zeros_like(ids)))
        with pytest.raises(ValueError, match="padding stands before a token"):
            answer(ids, mask.flip(1), types)
    assert len(live(ids[:0], mask[:0], types[:0]).exits) == 0


@pytest.mark.parametrize(
    ("exit_layers", "more", "reason"),
    [(layers, [], "exit_layers is") for layers in [(), (0, 2), (2, 2), (3, 1), (1, 5)]]
    + [((1,), ["both"], "none of sweet, ee, mm"), ((1,), ["ee", "sure"], "'sure' is none of")],
)
def test_impossible_exits_and_unknown_methods_are_refused(exit_layers, more, reason):
    with pytest.raises(ValueError, match=reason):
        MultiExitModel(tiny_encoder("bert"), exit_layers, 2, *more)
    with pytest.raises(ValueError, match="'none' is none of cls, mean"):
        MultiExitModel(tiny_encoder("bert", pooling="none"), (1,), 2)


def test_the_loss_is_cross_entropy_and_the_squared_error_of_the_certainty():
    logits, certainty, labels = torch.tensor([[2.0, 0.0], [0.5, 1.0]]), torch.tensor([0.9, 0.4]), torch.tensor([0, 0])
    expected = -logits.log_softmax(-1)[:, 0].mean()
    torch.testing.assert_close(exit_loss(Answer(logits), labels), expected)
    expected = expected + (0.1**2 + 0.4**2) / 2  # the first is right, the second is not
    torch.testing.assert_close(exit_loss(Answer(logits, certainty), labels), expected)


MINILM = home() / "weights" / "minilm-l6"


@pytest.mark.skipif(not MINILM.is_dir(), reason="minilm-l6 is not in weights/")
@pytest.mark.parametrize("method", ["sweet", "ee"])
def test_logits_losses_and_gradient_norms_are_those_of_the_authors_code(method):
    """What their classes gave once, on eight pairs of RTE's dev set, without dropout, in float32, is stored."""
    official = load_file(Path(__file__).with_name("authors_minilm_rte.safetensors"))
    model = model_of(MINILM, method, (1, 2, 3, 6), pooling="cls").eval()
    with torch.no_grad():
        for k, head in enumerate(model.heads):
            head.classifier.weight.copy_(official["classifier_weight"][k])
            head.classifier.bias.copy_(official["classifier_bias"][k])
    batch = official["input_ids"], official["attention_mask"], official["token_type_ids"]
    close = {"rtol": 1e-4, "atol": 1e-6}
    logits = torch.stack([answer.logits for answer in model(*batch)])
    torch.testing.assert_close(logits, official[f"logits_{method}"], **close)
    note_difference("logits of EE and SWEET, beside the authors' code", logits, official[f"logits_{method}"])
    losses = exit_losses(model, batch, official["labels"])
    torch.testing.assert_close(sum(losses)[None], official[f"loss_{method}"], **close)

    parameters, compared = dict(model.named_parameters()), 0
    names = [name.removeprefix("encoder.") for name in parameters if name.startswith("encoder.")]
    ours = {public_name(name, "bert"): [f"encoder.{name}"] for name in names}
    for kind in ("weight", "bias"):  # the gradients of our poolers are summed, as theirs is one
        ours[f"pooler.dense.{kind}"] = [f"heads.{k}.pooler.{kind}" for k in range(4)]
    sum_and_each = {"": sum(losses)} | {f"_exit{k}": loss for k, loss in enumerate(losses)}
    for which, loss in sum_and_each.items():
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()), **options), strict=True))
        prefix = f"gradnorm_{method}{which}."
        for key in (key for key in official if key.startswith(prefix)):
            name = key.removeprefix(prefix).removeprefix("bert.")
            if "classifier" not in name and not name.endswith("key.bias"):
                norm = sum(gradients[part] for part in ours[name]).norm()
                note_difference(f"gradient norms of {method}, beside the authors' code", norm[None], official[key])
                torch.testing.assert_close(norm[None], official[key], msg=lambda m, key=key: f"{key}: {m}", **close)
                compared += 1
    assert compared > 100
