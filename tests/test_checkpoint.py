"""Loading is strict: every tensor is loaded, or dropped by name, or stops the load."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from minisweet import MultiExitModel, build_multi_model, load_encoder
from minisweet.files.safe import InputError
from tests.conftest import CONFIGS, checkpoint_tensors, random_batch, tiny_encoder, write_model


def rewrite(folder, change) -> None:
    """Apply `change` to the checkpoint's dict of tensors."""
    tensors = load_file(folder / "model.safetensors")
    changed = change(tensors) or tensors
    save_file(changed, folder / "model.safetensors")


def reconfigure(folder, base, **changes) -> None:
    content = {key: value for key, value in (CONFIGS[base] | changes).items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(content))


def test_prefix_old_norm_names_and_known_extras_are_understood(model_dir, model_type):
    plain = load_encoder(model_dir).eval()

    def as_published(tensors):
        renamed = {}
        for name, tensor in tensors.items():
            name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            renamed[f"{model_type}.{name}"] = tensor
        renamed["cls.predictions.bias"] = torch.zeros(3)
        renamed[f"{model_type}.embeddings.position_ids"] = torch.arange(40)
        if model_type == "deberta":
            renamed["lm_predictions.lm_head.dense.weight"] = torch.zeros(2, 2)
            renamed["deberta.embeddings.position_embeddings.weight"] = torch.zeros(40, 16)
        return renamed

    rewrite(model_dir, as_published)
    batch = random_batch()
    torch.testing.assert_close(load_encoder(model_dir).eval()(*batch), plain(*batch), atol=0, rtol=0)


def test_half_precision_checkpoints_become_float32(model_dir):
    rewrite(model_dir, lambda tensors: {name: tensor.half() for name, tensor in tensors.items()})
    assert {parameter.dtype for parameter in load_encoder(model_dir).parameters()} == {torch.float32}


def test_all_that_is_wrong_is_listed_with_both_shapes(model_dir):
    def damage(tensors):
        del tensors["encoder.layer.1.output.dense.bias"]
        tensors["embeddings.word_embeddings.weight"] = torch.zeros(59, 16)
        tensors["encoder.layer.4.output.dense.bias"] = torch.zeros(16)

    rewrite(model_dir, damage)
    with pytest.raises(InputError) as error:
        load_encoder(model_dir)
    message = str(error.value)
    assert "encoder.layer.1.output.dense.bias [16] is missing" in message
    assert "embeddings.word_embeddings.weight is [59, 16] and should be [60, 16]" in message
    assert "encoder.layer.4.output.dense.bias [16] is unexpected" in message
    assert "\n" not in message
    assert str(model_dir / "model.safetensors") in message


def test_a_parameter_named_twice_is_refused(model_dir, model_type):
    name = "encoder.layer.0.output.dense.bias"
    rewrite(model_dir, lambda tensors: tensors | {f"{model_type}.{name}": torch.zeros(16)})
    with pytest.raises(InputError, match="are the same parameter"):
        load_encoder(model_dir)


@pytest.mark.parametrize(
    ("model_type", "key", "value"),
    [
        ("bert", "model_type", "roberta"),
        ("bert", "hidden_act", "relu"),
        ("bert", "position_embedding_type", "relative_key"),
        ("bert", "is_decoder", True),
        ("bert", "hidden_dropout_prob", 1.5),
        ("bert", "num_attention_heads", 3),
        ("bert", "hidden_size", "16"),
        ("bert", "num_hidden_layers", 0),
        ("bert", "num_hidden_layers", 4.0),
        ("bert", "type_vocab_size", 1),
        ("bert", "layer_norm_eps", float("nan")),
        ("bert", "model_type", ["bert"]),
        ("deberta", "max_relative_positions", "6"),
        ("deberta", "position_buckets", 256),
        ("bert", "vocab_size", "absent"),
        ("bert", "layer_norm_eps", -1.0),
        ("deberta", "pos_att_type", "c2p|p2p"),
        ("deberta", "pos_att_type", ""),
        ("deberta", "pos_att_type", None),
        ("deberta", "relative_attention", False),
        ("deberta", "relative_attention", "absent"),
        ("deberta", "position_biased_input", True),
        ("deberta", "talking_head", True),
        ("deberta", "type_vocab_size", 2),
        ("deberta", "embedding_size", 8),
        ("deberta", "hidden_act", "gelu_new"),
        ("deberta", "pooler_hidden_act", "relu"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(tmp_path, model_type, key, value):
    folder = write_model(tmp_path, model_type)
    load_encoder(folder)
    reconfigure(folder, model_type, **{key: value})
    with pytest.raises(InputError, match=key) as error:
        load_encoder(folder)
    assert str(folder / "config.json") in str(error.value)
    if value != "absent":
        assert repr(value) in str(error.value) or "c2p" in str(error.value) or key == "num_attention_heads"


def test_position_terms_may_be_a_list(tmp_path):
    folder = write_model(tmp_path, "deberta")
    before = load_encoder(folder).eval()(*random_batch())
    reconfigure(folder, "deberta", pos_att_type=["p2c", "c2p"])
    torch.testing.assert_close(load_encoder(folder).eval()(*random_batch()), before, atol=0, rtol=0)


def test_a_missing_or_broken_file_is_one_line(model_dir):
    (model_dir / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(InputError, match="model.safetensors: not readable"):
        load_encoder(model_dir)
    (model_dir / "model.safetensors").unlink()
    with pytest.raises(InputError, match="model.safetensors: no such file"):
        load_encoder(model_dir)
    (model_dir / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json: not readable as JSON"):
        load_encoder(model_dir)


def test_bert_heads_start_from_the_checkpoints_pooler_and_say_so_where_there_is_none(tmp_path, caplog):
    folder = write_model(tmp_path, "bert")
    pooler = load_file(folder / "model.safetensors")["pooler.dense.weight"]
    model = MultiExitModel(load_encoder(folder), (1, 4), 2)
    assert all(torch.equal(head.pooler.weight, pooler) for head in model.heads)
    assert model.heads[0].pooler.weight is not model.heads[1].pooler.weight
    assert not any(pooler.shape == p.shape and torch.equal(pooler, p) for p in model.encoder.parameters())
    assert not caplog.records
    save_file(checkpoint_tensors(tiny_encoder("bert"), pooler=False), folder / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        model = MultiExitModel(load_encoder(folder), (1, 4), 2)
    assert len(caplog.records) == 1
    assert "has no pooler" in caplog.text
    assert not torch.equal(model.heads[0].pooler.weight, model.heads[1].pooler.weight)


def test_multi_model_holds_and_reads_only_the_layers_it_uses(model_dir, model_type):
    models = build_multi_model(model_dir, (1, 3), 2)
    assert [len(model.encoder.layers) for model in models] == [1, 3]
    whole = load_encoder(model_dir).eval()
    batch = random_batch()
    for model, n in zip(models.eval(), (1, 3), strict=True):
        torch.testing.assert_close(model.encoder(*batch)[-1], whole(*batch)[n], atol=0, rtol=0)
    rewrite(model_dir, lambda tensors: {name: t for name, t in tensors.items() if "layer.3" not in name})
    assert models(*batch).shape == (2, 4, 2)
    build_multi_model(model_dir, (1, 3), 2)  # layer 4 is gone, and nobody misses it
    with pytest.raises(InputError, match="encoder.layer.3"):
        build_multi_model(model_dir, (1, 4), 2)
    parameters = [id(parameter) for parameter in models.parameters()]
    assert len(parameters) == len(set(parameters))
