"""The teacher of texts without labels: embeddings one by one, an optimum, and a model that is too sure of itself."""

import numpy as np
import torch
import torch.nn.functional as F

from minisweet import load_encoder
from minisweet.classifier.teacher import embed, ensemble, regress
from minisweet.texts import Examples, Texts, load_tokenizer
from tests.conftest import WORDS, write_model


def test_embeddings_are_means_of_the_last_layer(tmp_path):
    folder = write_model(tmp_path / "tiny", "mpnet")
    encoder, tokenizer = load_encoder(folder).eval(), load_tokenizer(folder, 60, 16)
    texts = [" ".join(WORDS[n : 3 * n]) for n in range(1, 8)]
    found = embed(encoder, Texts(tokenizer, Examples(texts, None, None)))
    for text, vector in zip(texts, found, strict=True):  # one by one, without padding
        ids = torch.tensor([tokenizer.encode(text).ids])
        alone = encoder(ids, torch.ones_like(ids), torch.zeros_like(ids))[-1][0].mean(0)
        torch.testing.assert_close(vector, alone / alone.norm(), atol=1e-6, rtol=0)


def test_the_regression_is_at_the_optimum():
    """The gradient of cross-entropy and penalty is zero there; the rows that have no target follow from the weights."""
    torch.manual_seed(0)
    vectors, labels = F.normalize(torch.randn(90, 8)), torch.arange(60) % 3
    vectors[:60] += F.one_hot(labels, 8) * 0.3
    targets = F.one_hot(labels, 3).float()
    logits, known = regress(vectors, targets), vectors[:60]
    features = F.pad(vectors / known.square().sum(1).mean().sqrt(), (0, 1), value=1.0)
    weights = torch.linalg.lstsq(features, logits).solution
    torch.testing.assert_close(features @ weights, logits, atol=1e-4, rtol=0)
    errors = logits[:60].softmax(-1) - targets
    gradient = features[:60].T @ errors + weights / 5
    assert gradient.abs().max() < 0.02 < (features[:60].T @ errors).abs().max()


def test_a_model_is_heard_as_sure_as_the_regression_finds_it_right():
    """However sure it says it is; one that agrees by chance is not heard at all."""
    generator = np.random.default_rng(0)
    labels = torch.from_numpy(generator.integers(3, size=2000))

    def said(right: float, scale: float) -> torch.Tensor:
        answers = np.where(generator.random(2000) < right, labels, generator.integers(3, size=2000))
        return F.one_hot(torch.from_numpy(answers), 3) * scale

    model, second, chance = said(0.7, 3.0), said(0.7, 2.0), said(0.0, 3.0)
    torch.testing.assert_close(ensemble(2 * model, second), ensemble(model, second), atol=0.02, rtol=0)
    both = ensemble(4 * model, second)
    assert torch.equal(both.sum(-1).round(decimals=5), torch.ones(2000))
    agree = model.argmax(-1) == second.argmax(-1)
    assert both[agree].amax(-1).min() > second.softmax(-1).max() > both[~agree].amax(-1).max()
    assert torch.equal(ensemble(chance, second).argmax(-1), second.argmax(-1))
