"""Loading is strict: every tensor is loaded, or dropped by name, or stops the load."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from minisweet import load_encoder
from tests.conftest import random_batch, reconfigure, refused, rewrite, write_model


def test_other_names_and_types_known_extras_and_other_ways_to_write_the_config_are_understood(model_dir, model_type):
    rewrite(model_dir, lambda tensors: {name: tensor.half().float() for name, tensor in tensors.items()})
    plain = load_encoder(model_dir).eval()

    def as_published(tensors):
        renamed = {}
        for name, tensor in tensors.items():
            name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            renamed[f"{model_type}.{name}"] = tensor.half()
        renamed["cls.predictions.bias"] = torch.zeros(3)
        renamed[f"{model_type}.embeddings.position_ids"] = torch.arange(40)
        if model_type == "deberta":
            renamed["lm_predictions.lm_head.dense.weight"] = torch.zeros(2, 2)
            renamed["deberta.embeddings.position_embeddings.weight"] = torch.zeros(40, 16)
        return renamed

    rewrite(model_dir, as_published)
    written = {"bert": {"model_type": "absent"}, "deberta": {"pos_att_type": ["c2p", "p2c"]}}
    reconfigure(model_dir, model_type, **written.get(model_type, {}))
    encoder, batch = load_encoder(model_dir), random_batch()
    assert not any(module.training for module in encoder.modules())
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    torch.testing.assert_close(encoder(*batch), plain(*batch), atol=0, rtol=0)
    rewrite(model_dir, lambda tensors: tensors | {"embeddings.LayerNorm.beta": torch.zeros(16)})
    assert "it holds embeddings.LayerNorm.bias twice" in refused(load_encoder, model_dir)


@pytest.mark.parametrize(
    ("damaged", "words"),
    [
        (None, "is missing and should be [16]"),
        (torch.zeros(1), "is [1] and should be [16]"),
        (torch.full([16], torch.nan), "holds NaN or infinity"),
        (torch.zeros(16, dtype=torch.int8), "is torch.int8 and should be torch.float32"),
    ],
)
def test_all_that_is_wrong_is_listed_with_both_shapes(model_dir, damaged, words):
    path = model_dir / "model.safetensors"
    name, extra = (f"encoder.layer.{n}.output.dense.bias" for n in (3, 4))
    tensors = load_file(path) | {name: damaged, extra: torch.zeros(16)}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    error = refused(load_encoder, model_dir)
    assert [part for part in (str(path), f"{name} {words}", f"{extra} [16] is unexpected") if part not in error] == []


@pytest.mark.parametrize(
    ("model_type", "key", "value"),
    [
        ("bert", "model_type", "roberta"),
        ("bert", "hidden_act", "relu"),
        ("bert", "num_attention_heads", 3),
        ("bert", "classifier_dropout", 1.5),
        ("deberta", "pos_att_type", "c2p"),
        ("deberta", "position_biased_input", True),
        ("mpnet", "relative_attention_num_buckets", 31),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(tmp_path, model_type, key, value):
    folder = write_model(tmp_path, model_type)
    reconfigure(folder, model_type, **{key: value})
    (folder / "model.safetensors").unlink()  # the config is looked at first: RoBERTa is no BERT, with or without
    error = refused(load_encoder, folder)
    assert (str(folder / "config.json") in error, key in error) == (True, True)


def test_weights_that_are_missing_or_cut_are_one_line_and_stay_as_they_are(tmp_path):
    folder = write_model(tmp_path, "bert")
    content = (folder / "model.safetensors").read_bytes()
    for name, left in (("model.safetensors", 4), ("model.safetensors", -1), ("pytorch_model.bin", 9)):
        (folder / "model.safetensors").unlink(missing_ok=True)
        assert "no readable model.safetensors or pytorch_model.bin" in refused(load_encoder, folder)
        (folder / name).write_bytes(content[:left])
        assert "no readable model.safetensors or pytorch_model.bin" in refused(load_encoder, folder)
    assert (folder / "pytorch_model.bin").read_bytes() == content[:9]


def test_a_pickled_checkpoint_is_converted_once(model_dir):
    plain, tensors = load_encoder(model_dir).state_dict(), load_file(model_dir / "model.safetensors")
    (model_dir / "model.safetensors").unlink()
    tensors["cls.predictions.decoder.weight"] = tensors["embeddings.word_embeddings.weight"]  # tied, as published
    tensors["encoder.layer.0.output.dense.weight"] = tensors["encoder.layer.0.output.dense.weight"].T.contiguous().T
    torch.save(tensors, model_dir / "pytorch_model.bin")
    torch.testing.assert_close(load_encoder(model_dir).state_dict(), plain, rtol=0, atol=0)
    (model_dir / "pytorch_model.bin").unlink()
    torch.testing.assert_close(load_encoder(model_dir).state_dict(), plain, rtol=0, atol=0)
