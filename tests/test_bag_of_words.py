"""The bag of words sums the right rows of its table, and is fitted to the optimum of an independent implementation."""

from itertools import pairwise
from random import Random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence

from minisweet.classifier import bag_of_words
from minisweet.classifier.bag_of_words import NgramExit, fit_ngrams
from minisweet.classifier.cascade import leaves
from tests.conftest import random_bag

V, CLS, SEP, PAD, UNKNOWN = 60, 1, 2, 0, 3
SPECIAL = [PAD, CLS, SEP, UNKNOWN]


def encode(*texts: list[int]) -> tuple[torch.Tensor, ...]:
    """Texts of word ids to a padded batch: [CLS] A [SEP]."""
    rows = [torch.tensor([CLS, *text, SEP]) for text in texts]
    return tuple(pad_sequence(some, batch_first=True) for some in (rows, list(map(torch.ones_like, rows))))


def random_texts(count: int, seed: int = 0) -> list[list[int]]:
    """So many texts; some are empty, and some words unknown."""
    draw = Random(seed)
    return [draw.choices(range(UNKNOWN, V), k=draw.randrange(9)) for _ in range(count)]


def logits_by_hand(exit: NgramExit, text: list[int]) -> torch.Tensor:
    """The logits (C,) of a text, by the table's row of each n-gram."""
    rows = [word for word in text if word not in SPECIAL]
    for a, b in pairwise(text):
        if a not in SPECIAL and b not in SPECIAL:
            code = a * bag_of_words.FIRST + b * bag_of_words.SECOND
            rows.append(V + code % bag_of_words.PRIME % exit.buckets)
    return exit.table[rows].sum(0) / len(rows) ** 0.5 + exit.bias if rows else torch.zeros(3)


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 5))
def test_logits_are_those_made_by_hand(seed, count):
    exit, texts = random_bag(3), random_texts(count, seed)
    logits = exit(*encode(*texts))
    for text, found in zip(texts, logits, strict=True):
        torch.testing.assert_close(found, logits_by_hand(exit, text), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found, exit(*encode(text))[0], atol=1e-5, rtol=1e-5)  # whatever the padding
    said = exit.contributions(*encode(*texts)).sum(1) + exit.bias
    torch.testing.assert_close(said[logits.any(1)], logits[logits.any(1)], atol=1e-5, rtol=1e-5)


def test_a_text_without_a_known_word_leaves_only_where_all_do():
    exit, temperature = random_bag(3), 0.1
    batches = [encode([], []), encode([UNKNOWN]), encode(*[[UNKNOWN] * 510] * 2)]
    batches.append((torch.full((2, 7), PAD), torch.zeros(2, 7, dtype=torch.long)))
    for batch in batches:
        logits = exit(*batch)
        assert (logits == 0).all()
        for threshold, all_leave in ((1 / 3, True), (1 / 3 + 1e-6, False)):
            assert (leaves((logits / temperature).softmax(-1).amax(-1), threshold, 1 / 3) == all_leave).all()


def test_fitting_goes_to_the_optimum(monkeypatch):
    """Against features by hand and their weights in float64. The targets are probabilities."""
    monkeypatch.setattr(bag_of_words, "SCALES", (0.8,))
    monkeypatch.setattr(bag_of_words, "BUCKETS_IF_FEW", 64)
    texts, C, D = random_texts(30), 3, 5
    torch.manual_seed(1)
    targets, embeddings = torch.rand(30, C).softmax(-1), torch.randn(V, D)
    exit, batches = NgramExit(V, C, SPECIAL), [encode(*texts[:11]), encode(*texts[11:])]
    fit_ngrams(exit, batches, targets, embeddings)

    centred = embeddings.double() - embeddings.double().mean(0)
    known = 0.8 * torch.cat([centred / centred.std(0) / D**0.5, torch.ones(V, 1)], 1)
    rows, counts = exit.find_rows(*encode(*texts))
    has_words = counts.any(1, keepdim=True)
    features = torch.zeros(30, len(exit.table), dtype=torch.float64).scatter_add_(1, rows, counts.double())
    features /= counts.sum(1, keepdim=True).clamp(min=1).sqrt()
    shapes = [(len(exit.table), C), (D + 1, C), (C,)]
    weights = [torch.zeros(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    optimizer = torch.optim.LBFGS(weights, 1, 1000, line_search_fn="strong_wolfe")

    def logits() -> torch.Tensor:
        free, linear, bias = weights
        return (features @ (free + torch.cat([known @ linear, torch.zeros(64, C)])) + bias) * has_words

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        error = F.cross_entropy(logits(), targets.double(), reduction="sum")
        total = error + sum(part.square().sum() for part in weights[:2]) / (2 * bag_of_words.PRIOR_VARIANCE)
        total.backward()
        return total

    optimizer.step(loss)
    torch.testing.assert_close(exit(*encode(*texts)).double(), logits().detach(), atol=1e-2, rtol=0)


def test_held_out_texts_choose_the_scale(monkeypatch):
    calls, fit_weights = [], bag_of_words.fit_weights

    def spied(*given) -> tuple[torch.Tensor, ...]:
        calls.append((*given, fit_weights(*given)))
        return calls[-1][-1]

    monkeypatch.setattr(bag_of_words, "fit_weights", spied)
    torch.manual_seed(0)
    fit_ngrams(NgramExit(V, 2, SPECIAL), [encode(*random_texts(90))], torch.arange(90) % 2, torch.randn(V, 4))
    *tried, (features, chosen, targets, _) = calls
    held_out = targets - tried[0][2]
    assert 20 < held_out.sum() < 40
    found = {scale: (features.logits(*weights).log_softmax(-1) * held_out).sum() for _, scale, _, weights in tried}
    assert (tuple(found), chosen) == (bag_of_words.SCALES, max(found, key=found.get))


def test_of_many_ngrams_the_most_frequent_are_kept(monkeypatch):
    monkeypatch.setattr(bag_of_words, "LARGE", 3 * 20)
    exit, texts = NgramExit(V, 3, SPECIAL), encode(*random_texts(30))
    features, (rows, counted) = bag_of_words.Features(exit, [texts], torch.randn(V, 4)), exit.find_rows(*texts)
    counts = rows[counted.bool()].bincount(minlength=len(exit.table))
    assert sorted(counts[features.used].tolist()) == sorted(counts.tolist())[-20:]
    kept = (torch.isin(rows, features.used) & counted.bool()).sum(1)[:, None] * features.root
    found = features.logits(torch.ones(20, 3), torch.zeros(features.dense.shape[1], 3))
    torch.testing.assert_close(found, kept.expand(-1, 3))


@pytest.mark.parametrize("text", [[], [5]], ids=["empty", "a word"])
def test_texts_that_say_nothing_can_be_fitted(text):
    exit = NgramExit(V, 2, SPECIAL)
    fit_ngrams(exit, [encode(*[text] * 8)], torch.tensor([0, 1, 1, 1] * 2), torch.randn(V, 4))
    assert all(tensor.isfinite().all() for tensor in exit.state_dict().values())
    (probabilities,) = exit(*encode(text)).softmax(-1)
    expected = torch.tensor([0.25, 0.75] if text else [0.5, 0.5])
    torch.testing.assert_close(probabilities, expected, atol=1e-2, rtol=0)
