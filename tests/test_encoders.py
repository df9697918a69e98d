"""The encoders without the network or `transformers`: stored reference values, padding, precision, published slices."""

import json
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from minisweet import MultiExitModel, bert, load_encoder
from minisweet.bert import attention, fused_is_faster
from minisweet.deberta import skew
from minisweet.layers import Dropout, TransformerLayer, padding_bias
from tests.conftest import CHECKOUT, CONFIGS, exit_model, random_batch, tiny_encoder
from tests.make_golden import CONFIGS as GOLDEN_CONFIGS
from tests.make_golden import GOLDEN, INPUTS, SIZES, formula_weights

BATCH = (INPUTS["input_ids"], INPUTS["attention_mask"], INPUTS["token_type_ids"])


def golden_model(folder, model_type):
    """The model of make_golden.py as a checkpoint, through our loader, and the reference's tensors."""
    D, half = SIZES["hidden_size"], SIZES["intermediate_size"]
    linear = {"attention.output.dense": (D, D), "intermediate.dense": (half, D), "output.dense": (D, half)}
    norms = ["attention.output.LayerNorm", "output.LayerNorm"]
    shapes = {"embeddings.word_embeddings.weight": (SIZES["vocab_size"], D)}
    shapes |= {"embeddings.LayerNorm.weight": (D,), "embeddings.LayerNorm.bias": (D,)}
    if model_type == "bert":
        linear |= {f"attention.self.{part}": (D, D) for part in ("query", "key", "value")}
        shapes |= {"embeddings.position_embeddings.weight": (SIZES["max_position_embeddings"], D)}
        shapes |= {"embeddings.token_type_embeddings.weight": (2, D)}
    else:
        linear |= {"attention.self.pos_q_proj": (D, D)}
        shapes |= {"encoder.rel_embeddings.weight": (10, D)}
    for n in range(SIZES["num_hidden_layers"]):
        layer = f"encoder.layer.{n}."
        if model_type == "deberta":
            shapes |= {f"{layer}attention.self.in_proj.weight": (3 * D, D)}
            shapes |= {f"{layer}attention.self.pos_proj.weight": (D, D)}
            shapes |= {f"{layer}attention.self.{name}": (D,) for name in ("q_bias", "v_bias")}
        for name, (rows, columns) in linear.items():
            shapes |= {f"{layer}{name}.weight": (rows, columns), f"{layer}{name}.bias": (rows,)}
        for name in norms:
            shapes |= {f"{layer}{name}.weight": (D,), f"{layer}{name}.bias": (D,)}
    prefixed = {f"{model_type}.{name}": shape for name, shape in shapes.items()}
    pooler = "bert.pooler.dense" if model_type == "bert" else "pooler.dense"
    prefixed |= {f"{pooler}.weight": (D, D), f"{pooler}.bias": (D,)}
    (folder / "config.json").write_text(json.dumps(GOLDEN_CONFIGS[model_type]))
    save_file(formula_weights(prefixed), folder / "model.safetensors")
    head = formula_weights({"classifier.weight": (2, D), "classifier.bias": (2,)})
    with safe_open(GOLDEN, "pt") as golden:
        expected = {name: golden.get_tensor(f"{model_type}.{name}") for name in ("hidden", "logits")}
    return load_encoder(folder).eval(), head, expected


def test_hidden_states_and_logits_are_the_stored_ones_of_the_reference(tmp_path, model_type):
    encoder, head, expected = golden_model(tmp_path, model_type)
    mask = BATCH[1] == 1
    for ours, theirs in zip(encoder(*BATCH), expected["hidden"], strict=True):
        torch.testing.assert_close(ours[mask], theirs[mask], atol=1e-5, rtol=0)
    model = MultiExitModel(encoder, (1, 3), 2).eval()
    model.heads[1].classifier.load_state_dict({name.split(".")[1]: tensor for name, tensor in head.items()})
    torch.testing.assert_close(model(*BATCH)[-1], expected["logits"], atol=1e-5, rtol=0)


def test_a_wrong_sign_in_the_position_to_content_term_would_be_seen(tmp_path):
    encoder, _, expected = golden_model(tmp_path, "deberta")
    with torch.no_grad():
        for layer in encoder.layers:
            layer.pos_q_proj.weight.neg_()
            layer.pos_q_proj.bias.neg_()
    assert (encoder(*BATCH)[1] - expected["hidden"][1])[BATCH[1] == 1].abs().max() > 1e-3


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


def test_padding_changes_no_token_beyond_bfloat16s_rounding(model_type):
    encoder = tiny_encoder(model_type, scale=0.1).eval()
    batch = random_batch(3)
    padded = tuple(torch.nn.functional.pad(x, (0, 6)) for x in batch)
    exact = encoder(*batch)[-1]
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        before, after = encoder(*batch)[-1], encoder(*padded)[-1][:, :11]
    mask = batch[1] == 1
    rounding = (before.float() - exact)[mask].abs().max()
    assert rounding > 0
    assert (after.float() - before.float())[mask].abs().max() <= 2 * rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_models_stay_close_and_train(model_type, dtype):
    encoder = tiny_encoder(model_type, scale=0.1).eval()
    batch = random_batch(1)
    mask = batch[1] == 1
    exact = encoder(*batch)[-1]
    with torch.autocast("cpu", dtype=dtype):
        cast = encoder(*batch)[-1]
        cast.float()[mask].square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())
    rounding = 32 * torch.finfo(dtype).eps  # a few roundings of numbers of size 1 to 4
    assert (cast.float() - exact)[mask].abs().max() < rounding
    assert (encoder.to(dtype)(*batch)[-1].float() - exact)[mask].abs().max() < rounding


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


@pytest.mark.parametrize(("T", "fused"), [(9, 0), (127, 0), (128, 1), (150, 1)])
@pytest.mark.parametrize("first_token_alone", [False, True])
def test_attention_is_the_softmax_of_scaled_scores_and_ignores_padding(monkeypatch, T, fused, first_token_alone):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, T, 8)  # (B, H, T, d) each
    query = query[:, :, :1] if first_token_alone else query
    mask = torch.ones(2, T)
    mask[1, T // 3 :] = 0
    calls, fast = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(bert.F, "scaled_dot_product_attention", lambda *a, **b: calls.append(1) or fast(*a, **b))
    ours = attention(query, key, value, padding_bias(mask, torch.float32), Dropout(0.5).eval())
    weights = (query @ key.mT / 8**0.5).masked_fill(mask[:, None, None] == 0, float("-inf")).softmax(-1)
    torch.testing.assert_close(ours, weights @ value, atol=1e-5, rtol=1e-5)
    assert len(calls) == fused
    attention(query, key, value, padding_bias(mask, torch.float32), Dropout(0.5).train())
    assert len(calls) == fused  # with dropout the plain form is faster here


def test_a_long_batch_has_the_hidden_states_of_the_plain_attention(monkeypatch):
    encoder = tiny_encoder("bert", max_position_embeddings=160).eval()
    batch = random_batch(length=160)
    assert not batch[1].all()
    assert fused_is_faster(torch.zeros(1, 1, 160, 1), training=False)
    fast = encoder(*batch)
    monkeypatch.setattr(bert, "fused_is_faster", lambda *_: False)
    for ours, plain in zip(fast, encoder(*batch), strict=True):
        torch.testing.assert_close(ours[batch[1] == 1], plain[batch[1] == 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("T", [1, 2, 3, 8])
def test_the_fast_view_of_distances_is_the_plain_gather(T):
    scores, i, j = torch.arange(2 * 3 * T * 2 * T).view(2, 3, T, 2 * T), torch.arange(T)[:, None], torch.arange(T)
    for column in (T - 1, T):
        plain = scores.gather(-1, (column + j - i).expand(2, 3, T, T))
        assert torch.equal(skew(scores, column), plain)
        assert torch.equal(skew(scores.mT.contiguous().mT, column), plain)  # whatever lies how in memory


def test_more_tokens_than_positions_is_an_error():
    with pytest.raises(ValueError, match="41 tokens, but max_position_embeddings is 40"):
        tiny_encoder("bert")(*random_batch(length=41))


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
    # Embeddings; then attention weights, attention output, feed-forward output in layers 1 to 3, and for [CLS] alone,
    # whose weights are (B, H, T), in layers 1 and 4; then two heads.
    expected = {(0.11, 3): 1 + 5 * 2, (0.12, 4): 3, (0.12, 3): 2, (0.13, 2): 2}
    # DeBERTa also each time the relative positions (2T, D), and [CLS] before the pooler.
    expected |= {(0.11, 2): 5, (0.14, 2): 2} if model_type == "deberta" else {(0.0, 2): 2}
    assert seen == expected


@settings(max_examples=30, deadline=None)
@given(
    model_type=st.sampled_from(["bert", "deberta"]),
    n=st.integers(1, 4),
    T=st.integers(1, 40),
    keep=st.lists(st.booleans(), min_size=4, max_size=4).map(torch.tensor),
)
def test_first_cls_and_then_the_others_are_the_layer(model_type, n, T, keep):
    """`cls_at_exit` and `cross_exit` of an exit after layer n, for all instances and for those that stay alone."""
    encoder = tiny_encoder(model_type).eval()
    input_ids, mask, types = random_batch(length=T)
    exit_layers = (n,) if n == 4 else (n, 4)
    models = {method: exit_model(encoder, exit_layers, 2, method).eval() for method in ("ee", "sweet", "branch")}
    with torch.no_grad():
        context = encoder.context(mask)
        hidden = encoder.run_layers(encoder.embed(input_ids, types), context, 0, n - 1)
        whole = encoder.run_layers(hidden, context, n - 1, n)
        for model in models.values():
            cls = model.cls_at_exit(0, hidden, context)
            torch.testing.assert_close(cls, whole[:, :1], atol=1e-5, rtol=1e-5)
            if n < 4:
                after, passed_on = model.cross_exit(0, hidden, context, cls)
                torch.testing.assert_close(after, whole, atol=1e-5, rtol=1e-5)
                assert all(torch.equal(a, b) for a, b in zip(passed_on, context, strict=True))
                context_of_some = model.encoder.context(mask[keep])
                of_some, _ = model.cross_exit(0, hidden[keep], context_of_some, cls[keep])
                torch.testing.assert_close(of_some, whole[keep], atol=1e-5, rtol=1e-5)


def test_cls_alone_trains_as_all_tokens_do(model_type, monkeypatch):
    """With dropout that drops the same everywhere: what comes out, and each parameter's gradient."""
    encoder = tiny_encoder(model_type, attention_probs_dropout_prob=0.5).train()
    layer, (_, mask, _) = encoder.layers[0], random_batch(length=9)
    dropped = torch.arange(9) % 3 == 0  # tokens, of [CLS]'s attention weights (..., T); nothing else is dropped
    monkeypatch.setattr(Dropout, "forward", lambda self, x: x * ~dropped * 1.5 if x.shape[-1] == 9 else x)
    hidden, found = torch.randn(4, 9, encoder.config.hidden_size), []
    for run in (layer.forward_cls, lambda *arguments: layer(*arguments)[:, :1]):
        layer.zero_grad()
        output = run(hidden, encoder.context(mask))
        output.square().sum().backward()
        gradients = {name: p.grad.clone() for name, p in layer.named_parameters()}
        found.append({"output": output.detach()} | gradients)
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_an_exits_cls_goes_on_with_the_dropout_that_the_exit_saw(model_type):
    for method in ("ee", "sweet"):
        model = MultiExitModel(tiny_encoder(model_type, hidden_dropout_prob=0.5), (2, 4), 2, method).train()
        input_ids, mask, types = random_batch()
        hidden, context = model.encoder.embed(input_ids, types), model.encoder.context(mask)
        cls = model.cls_at_exit(0, hidden, context)
        after, _ = model.cross_exit(0, hidden, context, cls)
        assert torch.equal(after[:, :1], cls)


def test_a_layer_of_another_encoder_that_lacks_a_part_is_refused_by_its_name():
    class Layer(TransformerLayer):
        attend = bert.BertLayer.attend
        projections = bert.BertLayer.projections

    with pytest.raises(TypeError, match="Layer.*cls_scores"):
        Layer(tiny_encoder("bert").config)


def test_config_is_honoured():
    changed = tiny_encoder("bert", layer_norm_eps=0.5).eval()
    batch = random_batch()
    assert (changed(*batch)[-1] - tiny_encoder("bert").eval()(*batch)[-1]).abs().max() > 1e-3
    encoder = tiny_encoder("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    torch.testing.assert_close(encoder(*batch)[-1], encoder(*batch)[-1], atol=0, rtol=0)
    assert tiny_encoder("bert", classifier_dropout=0.4).config.head_dropout == 0.4
    assert tiny_encoder("deberta", cls_dropout=0.4).config.head_dropout == 0.4
    assert CONFIGS["deberta"]["max_relative_positions"] == tiny_encoder("deberta").config.max_relative_positions
    assert tiny_encoder("deberta", max_relative_positions=-1).config.max_relative_positions == 40


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
