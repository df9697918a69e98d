"""The encoders without the network or `transformers`: stored reference values, padding, precision, published slices."""

import json
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minisweet import MultiExitModel, load_encoder
from minisweet.checkpoint import new_encoder, read_config
from minisweet.deberta import skew
from minisweet.layers import Dropout
from tests.conftest import CHECKOUT, checkpoint_tensors, random_batch, tiny_encoder
from tests.make_golden import CONFIGS as GOLDEN_CONFIGS
from tests.make_golden import GOLDEN, INPUTS, SIZES, formula_weights

BATCH = (INPUTS["input_ids"], INPUTS["attention_mask"], INPUTS["token_type_ids"])


def test_hidden_states_and_logits_are_the_stored_ones_of_the_reference(tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps(GOLDEN_CONFIGS[model_type]))
    tensors, D = checkpoint_tensors(new_encoder(read_config(tmp_path))), SIZES["hidden_size"]
    shapes = {f"{model_type}.{name}": tensor.shape for name, tensor in tensors.items()}
    if model_type == "deberta":
        shapes |= {"pooler.dense.weight": (D, D), "pooler.dense.bias": (D,)}
    save_file(formula_weights(shapes), tmp_path / "model.safetensors")  # as make_golden.py fills the reference
    head = formula_weights({"classifier.weight": (2, D), "classifier.bias": (2,)})
    golden, encoder, mask = load_file(GOLDEN), load_encoder(tmp_path).eval(), BATCH[1] == 1
    for ours, theirs in zip(encoder(*BATCH), golden[f"{model_type}.hidden"], strict=True):
        torch.testing.assert_close(ours[mask], theirs[mask], atol=1e-5, rtol=0)
    model = MultiExitModel(encoder, (1, 3), 2).eval()
    model.heads[1].classifier.load_state_dict({name.split(".")[1]: tensor for name, tensor in head.items()})
    torch.testing.assert_close(model(*BATCH)[-1], golden[f"{model_type}.logits"], atol=1e-5, rtol=0)


@settings(max_examples=20, deadline=None)
@given(
    model_type=st.sampled_from(["bert", "deberta"]), seed=st.integers(0, 10**6), extra=st.integers(1, 9), data=st.data()
)
def test_padding_and_batch_order_change_no_token(model_type, seed, extra, data):
    encoder = tiny_encoder(model_type).eval()
    input_ids, mask, types = random_batch(seed)
    B, T = input_ids.shape
    order = torch.tensor(data.draw(st.permutations(range(B))))
    junk = torch.randint(0, 60, (B, extra))
    padded = tuple(
        torch.cat([x[order], tail], 1) for x, tail in ((input_ids, junk), (mask, 0 * junk), (types, 0 * junk))
    )
    for before, after in zip(encoder(input_ids, mask, types), encoder(*padded), strict=True):
        real = mask[order] == 1
        torch.testing.assert_close(after[:, :T][real], before[order][real], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_models_stay_close_and_train_and_padding_changes_no_token(model_type, dtype):
    encoder, batch = tiny_encoder(model_type, scale=0.1).eval(), random_batch(1)
    exact, real = encoder(*batch)[-1], batch[1] == 1
    with torch.autocast("cpu", dtype=dtype):
        cast = encoder(*batch)[-1].float()
        padded = encoder(*(torch.nn.functional.pad(x, (0, 6)) for x in batch))[-1][:, :11].float()
        cast[real].square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())
    rounding = (cast - exact)[real].abs().max()
    limit = 32 * torch.finfo(dtype).eps  # a few roundings of numbers of size 1 to 4
    assert 0 < rounding < limit
    assert (padded - cast)[real].abs().max() <= 2 * rounding
    assert (encoder.to(dtype)(*batch)[-1].float() - exact)[real].abs().max() < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_padding_alone_are_finite(model_type, dtype):
    encoder = tiny_encoder(model_type)
    input_ids, mask, types = random_batch(2)
    mask[1] = 0
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32):
        hidden = encoder(input_ids, mask, types)
    assert all(h.isfinite().all() for h in hidden)
    hidden[-1].float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())


@pytest.mark.parametrize("T", [1, 2, 3, 8])
def test_the_fast_view_of_distances_is_the_plain_gather(T):
    scores, i, j = torch.arange(2 * 3 * T * 2 * T).view(2, 3, T, 2 * T), torch.arange(T)[:, None], torch.arange(T)
    for column in (T - 1, T):
        plain = scores.gather(-1, (column + j - i).expand(2, 3, T, T))
        assert torch.equal(skew(scores, column), plain)
        assert torch.equal(skew(scores.mT.contiguous().mT, column), plain)  # whatever lies how in memory


def test_training_mode_without_dropout_computes_what_evaluation_mode_does(model_type):
    encoder = tiny_encoder(model_type, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    batch = random_batch(5)
    mask = batch[1] == 1
    assert not mask.all()
    for training, evaluation in zip(encoder.train()(*batch), encoder.eval()(*batch), strict=True):
        torch.testing.assert_close(training[mask], evaluation[mask], atol=1e-5, rtol=0)


def test_dropout_is_where_the_models_have_it(model_type, monkeypatch):
    rates = {"hidden_dropout_prob": 0.11, "attention_probs_dropout_prob": 0.12}
    rates |= {"classifier_dropout": 0.13} if model_type == "bert" else {"cls_dropout": 0.13, "pooler_dropout": 0.14}
    model = MultiExitModel(tiny_encoder(model_type, **rates), (1, 4), 2).train()
    seen = Counter()
    monkeypatch.setattr("minisweet.layers.Dropout.forward", lambda self, x: seen.update([(self.p, x.dim())]) or x)
    model(*random_batch())
    # Embeddings; then attention weights, attention output, feed-forward output in layers 1 to 3, and for [CLS] alone in
    # layers 1 and 4; then two heads.
    expected = {(0.11, 3): 1 + 5 * 2, (0.12, 4): 5, (0.13, 2): 2}
    # DeBERTa also each time the relative positions (2T, D), and [CLS] before the pooler.
    expected |= {(0.11, 2): 5, (0.14, 2): 2} if model_type == "deberta" else {(0.0, 2): 2}
    assert seen == expected


@settings(max_examples=30, deadline=None)
@given(model_type=st.sampled_from(["bert", "deberta"]), T=st.integers(1, 40), training=st.booleans())
def test_a_layer_for_cls_alone_gives_what_the_whole_layer_gives_cls(model_type, T, training):
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    encoder = tiny_encoder(model_type, **rates).train(training)
    layer, (input_ids, mask, types) = encoder.layers[0], random_batch(length=T)
    hidden, context, found = encoder.embed(input_ids, types).detach(), encoder.context(mask), []
    for output in (layer(hidden, context, rows=1), layer(hidden, context)[:, :1]):
        layer.zero_grad()
        output.square().sum().backward(retain_graph=True)
        gradients = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
        found.append({"output": output.detach()} | gradients)
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_config_is_honoured():
    changed = tiny_encoder("bert", layer_norm_eps=0.5).eval()
    batch = random_batch()
    assert (changed(*batch)[-1] - tiny_encoder("bert").eval()(*batch)[-1]).abs().max() > 1e-3
    encoder = tiny_encoder("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    torch.testing.assert_close(encoder(*batch)[-1], encoder(*batch)[-1], atol=0, rtol=0)
    assert tiny_encoder("bert", classifier_dropout=0.4).config.head_dropout == 0.4
    assert tiny_encoder("deberta", cls_dropout=0.4).config.head_dropout == 0.4
    assert tiny_encoder("deberta").config.relative_span == 6
    assert tiny_encoder("deberta", max_relative_positions=-1).config.relative_span == 40


PUBLISHED = {
    "bert-base": (
        [0, 345, 232, 328, 740, 140, 1695, 69, 6078, 1588, 2],
        [[0.4249, 0.1008, 0.7531], [0.3771, 0.1188, 0.7467], [0.4152, 0.1098, 0.7108]],
    ),
    "deberta-base": (
        [0, 31414, 232, 328, 740, 1140, 12695, 69, 46078, 1588, 2],
        [[-0.5986, -0.8055, -0.8462], [1.4484, -0.9348, -0.8059], [0.3123, 0.0032, -1.4131]],
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_give_the_published_slice(name):
    folder = CHECKOUT / "weights" / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not in weights/")
    input_ids, expected = PUBLISHED[name]
    input_ids = torch.tensor([input_ids])
    mask = torch.ones_like(input_ids)
    mask[0, 0] = 0
    with torch.no_grad():
        hidden = load_encoder(folder).eval()(input_ids, mask, torch.zeros_like(input_ids))[-1]
    torch.testing.assert_close(hidden[0, 1:4, 1:4], torch.tensor(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_elements_are_dropped_one_by_one_and_the_others_scaled(dtype, p):
    torch.manual_seed(0)
    x = torch.ones(1001, 103, dtype=dtype, requires_grad=True)  # no multiple of the four numbers of a draw
    y = Dropout(p).train()(x)
    dropped = (y == 0).float()
    assert dropped.mean().item() == pytest.approx(p, abs=0.005)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / (1 - round(p * 65536) / 65536), dtype=dtype).item()}
    centred = dropped - p
    for dim, shift in ((0, 1), (1, 1), (1, 4)):  # neighbours know nothing of each other, nor do draws
        correlation = (centred * centred.roll(shift, dim)).mean() / (p * (1 - p))
        assert abs(correlation) < 0.015
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach())


def test_evaluation_and_p_0_change_nothing_and_the_seed_decides():
    x = torch.randn(5, 7)
    assert torch.equal(Dropout(0.3).eval()(x), x)
    assert torch.equal(Dropout(0.0).train()(x), x)
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(Dropout(0.5).train()(torch.ones(50)))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
