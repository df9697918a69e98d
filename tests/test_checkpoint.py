"""Loading is strict: every tensor is loaded, or dropped by name, or stops the load."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from minisweet import MultiExitModel, build_multi_model, checkpoint, load_encoder
from minisweet.base.safe import InputError
from minisweet.checkpoint import load_classifier
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
    assert "problems, among them" not in message
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
    rewrite(
        model_dir, lambda tensors: {name: t * (torch.nan if "layer.3" in name else 1) for name, t in tensors.items()}
    )
    assert models(*batch).shape == (2, 4, 2)
    build_multi_model(model_dir, (1, 3), 2)  # layer 4 is broken, and nobody reads it
    with pytest.raises(InputError, match="encoder.layer.3"):
        build_multi_model(model_dir, (1, 4), 2)
    parameters = [id(parameter) for parameter in models.parameters()]
    assert len(parameters) == len(set(parameters))


def test_of_many_wrong_tensors_five_are_shown_and_all_are_counted(model_dir):
    rewrite(
        model_dir, lambda tensors: {name: t.reshape(-1)[1:] if "layer.1" in name else t for name, t in tensors.items()}
    )
    with pytest.raises(InputError, match=r"\d\d problems, among them") as error:
        load_encoder(model_dir)
    assert str(error.value).count("should be") <= 5
    assert len(str(error.value)) <= 400


def test_a_number_that_json_does_not_know_is_refused_wherever_it_stands(tmp_path):
    folder = write_model(tmp_path, "bert")
    reconfigure(folder, "bert", of_another_library=float("inf"))
    with pytest.raises(InputError, match=r"config\.json: Out of range float values"):
        load_encoder(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_not_finite_are_refused_by_name(model_dir, value):
    name = "encoder.layer.2.output.dense.bias"

    def spoil(tensors):
        tensors[name] = tensors[name].double()
        tensors[name][3] = value  # 1e300 is infinite in float32

    rewrite(model_dir, spoil)
    with pytest.raises(InputError, match=f"{name} holds NaN or infinity"):
        load_encoder(model_dir)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**5),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 10**30),
        ("hidden_size", 2**31),
        ("hidden_size", 2**30),
        ("vocab_size", 2**31 - 1),
        ("intermediate_size", 2**31 - 1),
        ("max_position_embeddings", 10**30),
        ("max_position_embeddings", 2**31 - 1),
        ("hidden_dropout_prob", None),
        ("hidden_dropout_prob", 10**400),
        ("layer_norm_eps", [1]),
        ("attention_probs_dropout_prob", {}),
        ("num_attention_heads", True),
    ],
)
def test_hostile_sizes_cost_nothing(model_dir, model_type, key, value, monkeypatch):
    reconfigure(model_dir, model_type, **{key: value})
    if (model_type, key, value) == ("deberta", "max_position_embeddings", 2**31 - 1):
        assert load_encoder(model_dir).config.max_position_embeddings == value  # it has max_relative_positions
        return
    if key in ("num_hidden_layers", "hidden_size"):  # of the others nothing is allocated
        monkeypatch.setattr(checkpoint, "new_encoder", lambda config: pytest.fail("built"))
    with pytest.raises(InputError) as error:
        load_encoder(model_dir, 1 if value == 10**9 else None)
    assert str(model_dir) in str(error.value)
    assert len(str(error.value)) <= 400


def shard(folder) -> dict:
    """Cut the checkpoint into two files and write their index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {name: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(sorted(tensors))}
    for file in set(index.values()):
        save_file({name: tensors[name] for name in index if index[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return index


def test_sharded_checkpoints_and_pickled_ones_are_the_same_model(model_dir):
    plain = load_encoder(model_dir).state_dict()
    tensors = load_file(model_dir / "model.safetensors")
    index = shard(model_dir)
    torch.testing.assert_close(load_encoder(model_dir).state_dict(), plain, rtol=0, atol=0)
    (model_dir / sorted(index.values())[0]).unlink()
    with pytest.raises(InputError, match="no such file"):
        load_encoder(model_dir)
    (model_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(InputError, match="weight_map must name a file of the same folder"):
        load_encoder(model_dir)
    (model_dir / "model.safetensors.index.json").unlink()
    torch.save(tensors, model_dir / "pytorch_model.bin")
    torch.testing.assert_close(load_encoder(model_dir).state_dict(), plain, rtol=0, atol=0)
    assert (model_dir / "model.safetensors").is_file()


def test_a_checkpoint_without_model_type_is_a_bert(tmp_path):
    folder = write_model(tmp_path, "bert")
    reconfigure(folder, "bert", model_type="absent")
    assert load_encoder(folder).config.model_type == "bert"


def save_classifier(folder, model_type: str, kind: str = "ForSequenceClassification", **settings):
    """A tiny model of transformers, saved by itself."""
    transformers = pytest.importorskip("transformers")
    name = {"bert": "Bert", "deberta": "Deberta"}[model_type]
    content = {key: value for key, value in CONFIGS[model_type].items() if key != "model_type"}
    config = getattr(transformers, f"{name}Config")(**content, **settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}{kind}")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("labels", [None, ["no", "maybe", "yes"]])
def test_a_finished_classifier_is_transformers_own(tmp_path, model_type, labels):
    settings = {"id2label": dict(enumerate(labels)), "label2id": {b: a for a, b in enumerate(labels)}} if labels else {}
    theirs = save_classifier(tmp_path, model_type, hidden_dropout_prob=0.3, **settings)
    encoder, classifier, names = load_classifier(tmp_path)
    assert names == (labels or ["LABEL_0", "LABEL_1"])
    assert encoder.config.head_dropout == 0.3
    model = MultiExitModel(encoder, (4,), len(names)).eval()
    with torch.no_grad():
        model.heads[0].classifier.weight.copy_(classifier[0])  # the pooler starts as the checkpoint's
        model.heads[0].classifier.bias.copy_(classifier[1])
        input_ids, mask, token_types = random_batch()
        types = {"token_type_ids": token_types} if model_type == "bert" else {}
        expected = theirs(input_ids=input_ids, attention_mask=mask, **types).logits
        torch.testing.assert_close(model(*random_batch())[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("ForSequenceClassification", {"num_labels": 1}, "1 output, which is regression"),
        ("ForSequenceClassification", {"problem_type": "regression"}, "problem_type is 'regression'"),
        ("ForSequenceClassification", {"problem_type": "multi_label_classification"}, "problem_type is 'multi_label"),
        ("ForTokenClassification", {}, r"architectures is \['\w+ForTokenClassification'\]"),
        ("ForQuestionAnswering", {}, r"architectures is \['\w+ForQuestionAnswering'\]"),
    ],
)
def test_other_heads_are_refused_as_trunks_and_left_out_elsewhere(tmp_path, model_type, kind, settings, reason, caplog):
    save_classifier(tmp_path, model_type, kind, **settings)
    with pytest.raises(InputError, match=reason):
        load_classifier(tmp_path)
    with caplog.at_level(logging.WARNING):
        load_encoder(tmp_path)
    assert sum("the head of its task is left out" in record.message for record in caplog.records) == 1
    assert "\n" not in caplog.text.strip() or len(caplog.records) > 1


@pytest.mark.parametrize(
    "id2label", [{"0": "a"}, {"0": "a", "1": "a"}, {"0": "a", "2": "b"}, {"0": "a", "1": 5}, ["a", "b"], "ab", True, 2]
)
def test_labels_that_do_not_fit_the_head_are_refused(tmp_path, id2label):
    save_classifier(tmp_path, "bert")
    content = json.loads((tmp_path / "config.json").read_text()) | {"id2label": id2label}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="must name each of the head's 2 classes once"):
        load_classifier(tmp_path)


def test_a_classifier_without_its_head_is_refused(tmp_path):
    folder = write_model(tmp_path, "bert")
    with pytest.raises(InputError, match=r"classifier.weight \[2, 16\] is missing"):
        load_classifier(folder)
