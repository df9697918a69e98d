"""The bag of words sums the right rows of its table, and is fitted to the optimum of an independent implementation."""

from random import Random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence

from minisweet.adaptive import ExitRule, leaves
from minisweet.base.files import InputError
from minisweet.classifier import bag_of_words
from minisweet.classifier.bag_of_words import NgramExit, check_size, fit_ngrams

V, CLS, SEP, PAD, UNKNOWN = 40, 1, 2, 0, 3
SPECIAL = [PAD, CLS, SEP, UNKNOWN]


def encode(*texts: tuple[list[int], ...]) -> tuple[torch.Tensor, ...]:
    """Texts, or pairs of texts, of word ids to a padded batch: [CLS] A [SEP] B [SEP]."""
    ids = [[CLS, *[id for part in text for id in (*part, SEP)]] for text in texts]
    types = [[0, *[side for side, part in enumerate(text) for _ in (*part, SEP)]] for text in texts]
    mask = [[1] * len(row) for row in ids]
    return tuple(pad_sequence([torch.tensor(row) for row in rows], batch_first=True) for rows in (ids, mask, types))


def random_texts(count: int, pairs: bool, seed: int = 0) -> list[tuple[list[int], ...]]:
    """So many texts or pairs; some parts are empty, and some words unknown."""
    draw = Random(seed)
    return [tuple(draw.choices(range(UNKNOWN, V), k=draw.randrange(9)) for _ in range(1 + pairs)) for _ in range(count)]


def filled(pairs: bool) -> NgramExit:
    """An exit with random numbers, and vectors of length 1."""
    torch.manual_seed(0)
    exit = NgramExit(V, 3, SPECIAL, pairs)
    for name, tensor in exit.state_dict().items():
        if name != "is_word":
            tensor.normal_()
    if pairs:
        exit.vectors.copy_(F.normalize(exit.vectors))
        exit.idf.abs_().add_(1)
    return exit


def rows_by_hand(exit: NgramExit, text: tuple[list[int], ...]) -> list[int]:
    """The table's row of each n-gram of a text, one by one."""
    rows = []
    for part, words in enumerate(text):
        others = set(text[1 - part]) - {UNKNOWN} if len(text) == 2 else set()
        known = [word not in SPECIAL for word in words]
        rows += [word + V * (word in others) for word, is_known in zip(words, known, strict=True) if is_known]
        for n in range(len(words) - 1):
            a, b = words[n : n + 2]
            if known[n] and known[n + 1]:
                code = (
                    a * bag_of_words.FIRST
                    + b * bag_of_words.SECOND
                    + bag_of_words.SHARED * (a in others and b in others)
                )
                rows.append((1 + exit.pairs) * V + code % bag_of_words.PRIME % exit.buckets)
    return rows


def met_by_hand(exit: NgramExit, text: tuple[list[int], ...]) -> list[float]:
    """How well each side's words are met in the other, one by one."""
    sides, found = [[word for word in part if word not in SPECIAL] for part in text], []
    for side, other in zip(sides, sides[::-1], strict=True):
        best = [max([0.0] + [float(exit.vectors[word] @ exit.vectors[one]) for one in other]) for word in side]
        idf = [float(exit.idf[word]) for word in side]
        found.append(sum(map(float.__mul__, best, idf)) / sum(idf) if side else 0.0)
    return found


def logits_by_hand(exit: NgramExit, text: tuple[list[int], ...]) -> torch.Tensor:
    """The logits (C,) of a text or a pair."""
    rows = rows_by_hand(exit, text)
    if not rows:
        return torch.zeros(3)
    logits = exit.table[rows].sum(0) / len(rows) ** 0.5 + exit.bias
    return logits + torch.tensor(met_by_hand(exit, text)) @ exit.met_weights if exit.pairs else logits


@settings(max_examples=30)
@given(pairs=st.booleans(), seed=st.integers(0, 10**6), count=st.integers(1, 5))
def test_logits_are_those_made_by_hand(pairs, seed, count):
    exit, texts = filled(pairs), random_texts(count, pairs, seed)
    logits = exit(*encode(*texts))
    for text, found in zip(texts, logits, strict=True):
        torch.testing.assert_close(found, logits_by_hand(exit, text), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found, exit(*encode(text))[0], atol=1e-5, rtol=1e-5)  # whatever the padding
    said = exit.contributions(*encode(*texts)).sum(1) + exit.bias
    torch.testing.assert_close(said[logits.any(1)], logits[logits.any(1)], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pairs", [False, True])
def test_a_text_without_a_known_word_leaves_only_where_all_do(pairs):
    exit, nothing, rule = filled(pairs), ([],) * (1 + pairs), ExitRule(3, torch.tensor([0.1]))
    batches = [encode(nothing, nothing), encode(([UNKNOWN],) * (1 + pairs)), encode(*[([UNKNOWN] * 510,)] * 2)]
    batches.append((torch.full((2, 7), PAD), torch.zeros(2, 7, dtype=torch.long), torch.zeros(2, 7, dtype=torch.long)))
    for batch in batches:
        logits = exit(*batch)
        assert (logits == 0).all()
        for threshold, all_leave in ((1 / 3, True), (1 / 3 + 1e-6, False)):
            assert (leaves(rule.confidence(0, logits, None), threshold, rule.lowest) == all_leave).all()


@pytest.mark.parametrize("pairs", [False, True])
def test_fitting_goes_to_the_optimum(pairs, monkeypatch):
    """Against features by hand and their weights in float64. The targets are probabilities."""
    monkeypatch.setattr(bag_of_words, "SCALES", (0.8,))
    monkeypatch.setattr(bag_of_words, "BUCKETS_IF_FEW", 64)
    monkeypatch.setattr(bag_of_words, "COMPONENTS", 3)
    texts, C, D = random_texts(30, pairs), 3, 5
    torch.manual_seed(1)
    targets, embeddings = torch.rand(30, C).softmax(-1), torch.randn(V, D)
    exit, batches = NgramExit(V, C, SPECIAL, pairs), [encode(*texts[:11]), encode(*texts[11:])]
    assert fit_ngrams(exit, batches, targets, embeddings) == 0.8

    centred = embeddings.double() - embeddings.double().mean(0)
    known = 0.8 * torch.cat([centred / centred.std(0) / D**0.5, torch.ones(V, 1)], 1)
    rows, counts = exit.find_rows(*encode(*texts))
    has_words = counts.any(1, keepdim=True)
    features = torch.zeros(30, len(exit.table), dtype=torch.float64).scatter_add_(1, rows, counts.double())
    features /= counts.sum(1, keepdim=True).clamp(min=1).sqrt()
    met = torch.zeros(30, 0, dtype=torch.float64)
    if pairs:
        axes = torch.linalg.svd(centred, full_matrices=False)[2][:3]
        vectors = F.normalize(centred @ axes.T)
        torch.testing.assert_close(exit.vectors @ exit.vectors.T, (vectors @ vectors.T).float(), atol=1e-4, rtol=0)
        holders = [sum(word in sum(text, []) for text in texts) for word in range(UNKNOWN, V)]
        torch.testing.assert_close(exit.idf[UNKNOWN:], 1 + (31 / (1 + torch.tensor(holders))).log())
        met = torch.tensor([met_by_hand(exit, text) for text in texts]).double()
        met = (met - met.mean(0)) / met.std(0, correction=0)
    shapes = [(len(exit.table), C), (1 + pairs, D + 1, C), (2 * pairs, C), (C,)]
    weights = [torch.zeros(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    optimizer = torch.optim.LBFGS(weights, 1, 1000, line_search_fn="strong_wolfe")

    def logits() -> torch.Tensor:
        free, linear, of_met, bias = weights
        table = free + torch.cat([(known @ linear).flatten(0, 1), torch.zeros(64, C)])
        return (features @ table + met @ of_met + bias) * has_words

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        error = F.cross_entropy(logits(), targets.double(), reduction="sum")
        total = error + sum(part.square().sum() for part in weights[:3]) / (2 * bag_of_words.PRIOR_VARIANCE)
        total.backward()
        return total

    optimizer.step(loss)
    torch.testing.assert_close(exit(*encode(*texts)).double(), logits().detach(), atol=1e-2, rtol=0)


def test_more_classes_than_can_be_fitted_are_one_line():
    """Where the table would be too large, and where the texts' logits would be."""
    for texts, classes in ((6000, 1398), (200_000, 1000)):
        with pytest.raises(InputError, match=f"^exit_layers: .* there are {classes:,}; .* without 0$"):
            check_size(30522, classes, False, texts)


@pytest.mark.parametrize("text", [([],), ([], []), ([5], [5])], ids=["empty", "empty pair", "equal texts"])
def test_texts_that_say_nothing_can_be_fitted(text):
    exit = NgramExit(V, 2, SPECIAL, pairs=len(text) == 2)
    fit_ngrams(exit, [encode(*[text] * 8)], torch.tensor([0, 1, 1, 1] * 2), torch.randn(V, 4))
    assert all(tensor.isfinite().all() for tensor in exit.state_dict().values())
    (probabilities,) = exit(*encode(text)).softmax(-1)
    expected = torch.tensor([0.25, 0.75] if any(text) else [0.5, 0.5])
    torch.testing.assert_close(probabilities, expected, atol=1e-2, rtol=0)
