"""The exit that starts from a regression: embeddings one by one, an optimum, and a model that answers as it does."""

import torch
import torch.nn.functional as F

from minisweet import load_encoder
from minisweet.classifier.cascade import run_all
from minisweet.classifier.probe import PRIOR_VARIANCE, FullModel, fit_probe
from minisweet.texts import Examples, Texts, load_tokenizer
from tests.conftest import WORDS, write_model


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
