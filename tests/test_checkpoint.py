"""Loading is strict: every tensor is loaded, or dropped by name, or stops the load."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minisweet import load_encoder
from minisweet.classifier.probe import load_classifier
from minisweet.hub import home
from tests import conftest
from tests.conftest import CONFIGS, random_batch, reconfigure, rewrite, without_1, write_classifier, write_model


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
    assert "it holds embeddings.LayerNorm.bias twice" in conftest.refused(load_encoder, model_dir)


DAMAGES = [  # what is done to a tensor, and what is said of its name and its shape
    (lambda tensor: None, "{} is missing and should be {}"),
    (lambda tensor: tensor.flatten()[:1], "{} is [1] and should be {}"),
    (lambda tensor: tensor / 0, "{} holds NaN or infinity"),
    (lambda tensor: tensor.char(), "{} is torch.int8 and should be torch.float32"),
]


@settings(max_examples=20)
@given(model_type=st.sampled_from([*CONFIGS]), data=st.data())
def test_all_that_is_wrong_is_listed_with_both_shapes(tmp_path_factory, model_type, data):
    folder, expected = write_model(tmp_path_factory.mktemp("damaged"), model_type), []
    tensors = load_file(folder / "model.safetensors")
    ignored = ("key.bias", ".attn.k.bias", "pooler.dense.weight")  # without a pooler's weight there is no pooler
    names = st.sampled_from([name for name in tensors if not name.endswith(ignored)])
    for name in data.draw(st.lists(names, min_size=1, max_size=2, unique=True)):
        damage, words = data.draw(st.sampled_from(DAMAGES))
        expected.append(words.format(name, list(tensors[name].shape)))
        tensors[name] = damage(tensors[name])
    extra = data.draw(st.sampled_from(["encoder.layer.4.output.dense.bias", "encoder.layer.0.output.extra"]))
    tensors[extra] = torch.zeros(16)
    expected.append(f"{extra} [16] is unexpected")
    save_file({name: t.clone() for name, t in tensors.items() if t is not None}, folder / "model.safetensors")
    error = conftest.refused(load_encoder, folder)
    assert [words for words in (str(folder / "model.safetensors"), *expected) if words not in error] == []


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
    error = conftest.refused(load_encoder, folder)
    assert (str(folder / "config.json") in error, key in error) == (True, True)


@pytest.mark.parametrize("name", ["pytorch_model.bin", None])
def test_missing_or_broken_weights_are_one_line(model_dir, name):
    (model_dir / "model.safetensors").unlink()
    if name:
        (model_dir / name).write_bytes(b"no tensors")
    assert "no readable model.safetensors or pytorch_model.bin" in conftest.refused(load_encoder, model_dir)
    assert {path.name for path in model_dir.iterdir()} == {"config.json", "vocab.txt", name} - {None}


def test_a_pickled_checkpoint_is_converted_once(model_dir):
    plain, tensors = load_encoder(model_dir).state_dict(), load_file(model_dir / "model.safetensors")
    (model_dir / "model.safetensors").unlink()
    tensors["cls.predictions.decoder.weight"] = tensors["embeddings.word_embeddings.weight"]  # tied, as published
    tensors["encoder.layer.0.output.dense.weight"] = tensors["encoder.layer.0.output.dense.weight"].T.contiguous().T
    torch.save(tensors, model_dir / "pytorch_model.bin")
    torch.testing.assert_close(load_encoder(model_dir).state_dict(), plain, rtol=0, atol=0)
    (model_dir / "pytorch_model.bin").unlink()
    torch.testing.assert_close(load_encoder(model_dir).state_dict(), plain, rtol=0, atol=0)


def test_a_finished_classifiers_logits_are_those_of_transformers(tmp_path, model_type):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**CONFIGS[model_type], id2label={0: "no", 1: "yes"})
    theirs = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "1_Pooling").mkdir()  # left by the sentence encoder; the classifier reads [CLS] all the same
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    model, labels = load_classifier(tmp_path)
    ids, mask, types = random_batch()
    read = {"input_ids": without_1(ids), "attention_mask": mask}
    read |= {} if model_type == "mpnet" else {"token_type_ids": types}
    assert labels == ["no", "yes"]
    torch.testing.assert_close(model(without_1(ids), mask, types), theirs(**read).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"id2label": {"0": "a", "1": "a"}}, "id2label is {'0': 'a', '1': 'a'}, should give the classes"),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, "classifier.weight is [2, 16] and should be [3, 16]"),
        ({"id2label": {"0": "score"}}, "None with 1 outputs, should be single_label_classification with two or more"),
        ({"problem_type": "multi_label_classification"}, "multi_label_classification with 2 outputs, should be"),
        ({"left_out": "pooler.dense.weight"}, "pooler.dense.weight is missing"),  # of a classifier of tokens
    ],
)
def test_a_classifier_that_is_no_trunk_is_refused(tmp_path, changes, words):
    folder = write_classifier(tmp_path, **changes)
    rewrite(folder, lambda tensors: tensors | {"qa_outputs.bias": torch.zeros(2)})
    load_encoder(folder)  # which needs none of the heads
    rewrite(folder, lambda tensors: {name: t for name, t in tensors.items() if name != changes.get("left_out")})
    assert words in conftest.refused(load_classifier, folder)


PUBLISHED = {  # last hidden states [0, 1:4, 1:4], as published with the reference implementations of these checkpoints
    "bert-base": (
        [0, 345, 232, 328, 740, 140, 1695, 69, 6078, 1588, 2],
        [[0.4249, 0.1008, 0.7531], [0.3771, 0.1188, 0.7467], [0.4152, 0.1098, 0.7108]],
    ),
    "deberta-base": (
        [0, 31414, 232, 328, 740, 1140, 12695, 69, 46078, 1588, 2],
        [[-0.5986, -0.8055, -0.8462], [1.4484, -0.9348, -0.8059], [0.3123, 0.0032, -1.4131]],
    ),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_public_weights_give_the_published_hidden_states(model):
    folder = home() / "weights" / model
    if not folder.is_dir():
        pytest.skip(f"weights/{model} is not at hand")
    ids, expected = map(torch.tensor, PUBLISHED[model])
    mask = torch.tensor([[0] + [1] * 10])  # hides the first token, as in the publication
    with torch.no_grad():
        hidden = load_encoder(folder)(ids[None], mask)[-1]
    torch.testing.assert_close(hidden[0, 1:4, 1:4], expected, atol=1e-4, rtol=0)
