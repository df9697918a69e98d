"""The model: an exit that starts from a regression, and a classifier that was fine-tuned elsewhere, or is refused."""

import pytest
import torch
import torch.nn.functional as F

from minisweet import load_encoder
from minisweet.classifier.cascade import run_all
from minisweet.classifier.probe import PRIOR_VARIANCE, FullModel, fit_probe, load_classifier
from minisweet.texts import Examples, Texts, load_tokenizer
from tests.conftest import CONFIGS, WORDS, random_batch, refused, rewrite, without_1, write_classifier, write_model


def test_embeddings_are_means_of_the_last_layer_and_the_exit_reads_them(tmp_path):
    folder = write_model(tmp_path / "tiny", "mpnet")
    encoder, tokenizer = load_encoder(folder, pooling="mean").eval(), load_tokenizer(folder, 60, 16)
    texts = [" ".join(WORDS[n : 3 * n]) for n in range(1, 8)]
    rows = Texts(tokenizer, Examples(texts, None, None))
    model, cpu = FullModel(encoder, torch.nn.Linear(16, 3)).eval(), torch.device("cpu")
    found = run_all(lambda *inputs: F.normalize(model.pooled(*inputs)), rows, cpu)
    for text, vector in zip(texts, found, strict=True):  # one by one, without padding
        ids = torch.tensor([tokenizer.encode(text).ids])
        alone = encoder(ids, torch.ones_like(ids), torch.zeros_like(ids))[-1][0].mean(0)
        torch.testing.assert_close(vector, alone / alone.norm(), atol=1e-6, rtol=0)
    fit_probe(model.head, found, torch.arange(7) % 3)
    logits, half = run_all(model, rows, cpu), run_all(model, rows, cpu, torch.bfloat16)
    torch.testing.assert_close(logits, F.linear(found, model.head.weight, model.head.bias), atol=1e-5, rtol=0)
    assert (half != half.bfloat16()).any()  # the head is in float32, even where layers are not


def test_the_regression_is_at_the_optimum():
    """The gradient of cross-entropy and penalty is zero there."""
    torch.manual_seed(0)
    vectors, labels = F.normalize(torch.randn(90, 8)), torch.arange(90) % 3
    vectors += F.one_hot(labels, 8) * 0.3
    head = torch.nn.Linear(8, 3)
    fit_probe(head, vectors, labels)
    errors = F.linear(vectors, head.weight, head.bias).softmax(-1) - F.one_hot(labels, 3)
    gradient = errors.T @ vectors + head.weight / PRIOR_VARIANCE
    assert gradient.abs().max() < 0.02 < (errors.T @ vectors).abs().max()
    assert errors.sum(0).abs().max() < 0.02


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
    assert words in refused(load_classifier, folder)
