"""Exit 0: a bag of words, which answers before the embeddings and at the cost of no layer.

The paper has no such exit. It is fastText (Joulin et al. 2017, https://arxiv.org/abs/1607.01759) without a hidden
layer: a table has a row of C numbers for each token and each bigram (two neighbouring tokens). The logits of a text are
the sum of its n-grams' rows, divided by the root of their number, plus a bias. In a pair of texts, a token that both
texts contain uses a second row, since a pair is mostly about what its texts share. Pairs of texts also have two
features with weights of their own: how similar the words of each text are to those of the other (Corley and Mihalcea
2005, https://aclanthology.org/W05-1203), see `NgramExit.word_similarity`.

`fit_ngrams` fits it on the CPU, in seconds. The row of a token is a free part plus a linear function of its pre-trained
embedding, so that tokens unseen in training count too. The logits are linear in the weights (`Features`), so the loss
is convex. `fit_weights` takes a few steps of L-BFGS and stops before the minimum. It starts from zeros and draws no
random numbers, so that the same texts always give the same weights.

Dimension letters: B batch, T tokens, V vocabulary, D hidden size, C classes, N texts, G all their n-grams, R n-grams
with a row to fit, M dense features.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisweet.base.commands import progress
from minisweet.base.files import InputError

BUCKETS = 2**16  # rows for all bigrams, which are hashed
FEW_CLASSES = 4
BUCKETS_IF_FEW = 2**18  # up to FEW_CLASSES a larger table fits, in which fewer bigrams share a row
FIRST, SECOND, SHARED, PRIME = 1640531513, 1103515245, 1234567891, 2**31 - 1  # a linear hash (Carter and Wegman 1979)
COMPONENTS = 32  # principal components of the embeddings, to compare the words of a pair by; 64 are no better
PRIOR_VARIANCE = 5.0  # of each weight (L2 penalty)
STEPS = 25  # of L-BFGS; 100 are no better
CURVATURE = 0.25  # of the loss at zero weights, times 1 / C; it decreases towards the minimum
SCALES = (0.35, 0.7, 1.4)  # of the embeddings, chosen on held-out texts: large for few texts, small for many
LARGE = 2**21  # numbers in the rows to fit
MOST = 2**27  # numbers in the whole table, or in the logits of all texts

Inputs = tuple[Tensor, Tensor, Tensor]  # input_ids, attention_mask, token_type_ids: (B, T) each, int64


class NgramExit(nn.Module):
    """A table of n-grams that maps tokens to logits. It only has buffers, which `fit_ngrams` fills.

    `special_ids` are tokens that are not words, such as [CLS]. If texts come in `pairs`, each token has two rows, for
    one text and for both, and the words of the two texts are compared by vectors.
    """

    def __init__(self, vocab_size: int, num_labels: int, special_ids: Sequence[int], pairs: bool) -> None:
        super().__init__()
        self.pairs = pairs
        self.token_rows = (1 + pairs) * vocab_size
        self.buckets = BUCKETS_IF_FEW if num_labels <= FEW_CLASSES else BUCKETS
        self.register_buffer("table", torch.zeros(self.token_rows + self.buckets, num_labels))
        self.register_buffer("bias", torch.zeros(num_labels))
        self.register_buffer("is_word", torch.ones(vocab_size, dtype=torch.bool))
        self.is_word[list(special_ids)] = False
        if pairs:
            self.register_buffer("vectors", torch.zeros(vocab_size, COMPONENTS))  # each of length 1
            self.register_buffer("idf", torch.ones(vocab_size))  # inverse document frequencies, at least 1
            self.register_buffer("met_weights", torch.zeros(2, num_labels))  # of the two values of `word_similarity`

    def find_rows(self, ids: Tensor, mask: Tensor, types: Tensor) -> tuple[Tensor, Tensor]:
        """The table's rows (B, 2T) of all tokens of texts (B, T), then of all bigrams; and which count."""
        is_word = mask * self.is_word[ids]  # 1 or 0
        shared = torch.zeros_like(ids)  # 1 for a token that is also in the other text
        if self.pairs:
            equal = (ids[:, :, None] == ids[:, None, :]) & is_word[:, None, :].bool()  # (B, T, T)
            shared = (equal & (types[:, :, None] != types[:, None, :])).any(2).long()
        next_ids, next_is_word, next_shared = F.pad(torch.stack([ids, is_word, shared]), (0, 1))[..., 1:]  # (B, T)
        code = ids * FIRST + next_ids * SECOND + (shared & next_shared) * SHARED  # far below 2^63
        rows = [shared * len(self.is_word) + ids, self.token_rows + code % PRIME % self.buckets]
        return torch.cat(rows, 1), torch.cat([is_word, is_word & next_is_word], 1)  # no neighbours across [SEP]

    def word_similarity(self, ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
        """How similar the words of the first text are to those of the second, and vice versa: (B, T) to (B, 2).

        Each word counts with its largest cosine to any word of the other text, or 0 if that is negative. The result is
        their mean, weighted by the words' IDF, from 0 to 1, and 0 for a text without words.
        """
        is_word = (mask * self.is_word[ids])[..., None]  # (B, T, 1)
        vectors = self.vectors[ids] * is_word
        are_apart = types[:, :, None] != types[:, None, :]  # (B, T, T); the cosine of tokens of one text becomes 0
        similarity = (vectors @ vectors.mT * are_apart).amax(2, keepdim=True)  # (B, T, 1)
        weights = is_word * self.idf[ids, None] * torch.stack([1 - types, types], 2)  # (B, T, 2)
        return (weights * similarity).sum(1) / weights.sum(1).clamp(min=1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """The logits (B, C) of texts. Each argument is (B, T), int64.

        The logits of a text without a known word are zeros, so that it only leaves at a threshold of at most 1/C, where
        all texts do.
        """
        rows, counts = self.find_rows(input_ids, attention_mask, token_type_ids)
        counts = counts[..., None].to(self.table.dtype)  # (B, 2T, 1)
        number = counts.sum(1)  # (B, 1)
        logits = (self.table[rows] * counts).sum(1) / number.clamp(min=1).sqrt() + self.bias
        if self.pairs:
            similarity = self.word_similarity(input_ids, attention_mask, token_type_ids)
            logits = logits + (similarity[..., None] * self.met_weights).sum(1)
        return logits * number.clamp(max=1)

    def contributions(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """The summands of the logits of texts that have words, without the bias: (B, 2T, C), or (B, 2T+2, C) for pairs.

        They are those of the tokens, of the bigrams, and of the two similarities that `word_similarity` gives.
        """
        rows, counts = self.find_rows(input_ids, attention_mask, token_type_ids)
        root = counts.sum(1).clamp(min=1).sqrt()[:, None, None]
        summands = self.table[rows] * counts[..., None] / root
        if self.pairs:
            similarity = self.word_similarity(input_ids, attention_mask, token_type_ids)
            summands = torch.cat([summands, similarity[..., None] * self.met_weights], 1)
        return summands


def check_size(vocab_size: int, num_labels: int, pairs: bool, texts: int) -> None:
    """Raise InputError if there are too many classes to hold the table, or the logits of all texts, in memory."""
    most = MOST // max((1 + pairs) * vocab_size + BUCKETS, texts)
    if num_labels > most:
        reason = f"exit 0 can be fitted for at most {most:,} classes here, and there are {num_labels:,}"
        raise InputError(f"{reason}; name the other exits alone, without 0", "exit_layers")


@torch.no_grad()
def fit_ngrams(bag: NgramExit, batches: Sequence[Inputs], targets: Tensor, embeddings: Tensor) -> float:
    """Fit a bag of words in place, on the CPU. Returns the scale of the embeddings that held-out texts chose.

    Args:
        bag: what was in it before does not count.
        batches: N texts in the order of the targets; read several times.
        targets: labels (N,) or probabilities (N, C).
        embeddings: the pre-trained word embeddings (V, D), float32.
    """
    N, C = len(targets), len(bag.bias)
    if bag.pairs:
        compare_words(bag, batches, embeddings)
    features = Features(bag, batches, embeddings)
    # The logits of a text without a known word are zeros, whatever is fitted, so it does not count.
    targets = (targets if targets.ndim == 2 else F.one_hot(targets, C).float()) * features.has_words
    held_out = (torch.randperm(N, generator=torch.Generator().manual_seed(0)) % 3 == 0)[:, None]  # a third
    likelihoods = []
    with progress(total=len(SCALES) + 1, desc="bag of words", unit="fit") as bar:
        for scale in SCALES:
            weights = fit_weights(features, scale, targets * ~held_out)
            likelihoods.append(float((targets * held_out * features.logits(*weights).log_softmax(-1)).sum()))
            bar.update()
        scale = SCALES[likelihoods.index(max(likelihoods))]
        free, dense = fit_weights(features, scale, targets)
        bar.update()
    of_tokens, rest = dense[: features.of_tokens], dense[features.of_tokens :]
    linear = of_tokens.unflatten(0, (1 + bag.pairs, -1))  # (1 or 2, D+1, C)
    bag.table.zero_()[: bag.token_rows] = (features.known @ linear).flatten(0, 1)
    bag.table[features.used] += free
    if bag.pairs:
        bag.met_weights.copy_(rest[:2])
    bag.bias.copy_(rest[-1])
    return scale


def compare_words(bag: NgramExit, batches: Sequence[Inputs], embeddings: Tensor) -> None:
    """Set what `word_similarity` compares words by: vectors (principal components of the embeddings) and IDF."""
    centred = embeddings - embeddings.mean(0)
    V = len(embeddings)
    axes = torch.linalg.eigh(centred.T @ centred)[1][:, -bag.vectors.shape[1] :]  # their signs change no cosine
    bag.vectors.zero_()[:, : axes.shape[1]] = F.normalize(centred @ axes)
    texts_with = sum(torch.zeros(len(ids), V).scatter_(1, ids, mask.float()).sum(0) for ids, mask, _ in batches)  # (V,)
    bag.idf.copy_(1 + ((1 + sum(len(ids) for ids, _, _ in batches)) / (1 + texts_with)).log())


class Features:
    """The features of N texts, which map weights to logits.

    There are two kinds of weights. `free` (R, C) has a row for each n-gram, or only for the most frequent ones if that
    is more than LARGE numbers. `dense` (M, C) has the linear functions of the embeddings of a text's tokens (D+1 rows,
    and for pairs D+1 more for tokens of both texts), the weights of `word_similarity` (0 or 2 rows), and the bias.
    """

    def __init__(self, bag: NgramExit, batches: Sequence[Inputs], embeddings: Tensor) -> None:
        V, D = embeddings.shape
        kinds = 1 + bag.pairs  # of tokens: in one text, and in both
        known = (embeddings - embeddings.mean(0)) / embeddings.std(0).clamp(min=1e-6) / D**0.5  # of length about 1
        self.known = torch.cat([known, torch.ones(V, 1)], 1)  # (V, D+1): the ones count tokens
        self.of_tokens = kinds * (D + 1)  # how many dense features are sums of these
        rows, sizes, dense = [], [], []
        for ids, mask, types in batches:
            all_rows, counts = bag.find_rows(ids, mask, types)  # (B, 2T)
            rows.append(all_rows[counts.bool()])
            sizes.append(counts.sum(1))
            root = sizes[-1].clamp(min=1).rsqrt()[:, None]  # (B, 1)
            token_rows, is_word = all_rows[:, : ids.shape[1]], counts[:, : ids.shape[1], None]
            of_kind = (F.one_hot(token_rows // V, kinds) * is_word).float()  # (B, T, kinds)
            sums = (of_kind.mT @ self.known[ids]).flatten(1)  # (B, kinds * (D+1))
            similarity = bag.word_similarity(ids, mask, types) if bag.pairs else root[:, :0]
            dense.append(torch.cat([sums * root, similarity, torch.ones_like(root)], 1))
        self.dense, sizes, rows = torch.cat(dense), torch.cat(sizes), torch.cat(rows)  # (N, M), (N,), (G,) text by text
        # The weights of the last features are penalised as if these had a standard deviation of 1. The bias, a feature
        # of ones, is hardly penalised.
        self.variances = self.dense[:, self.of_tokens :].var(0, correction=0).clamp(min=1e-4)
        self.has_words = (sizes > 0)[:, None]  # (N, 1)
        self.root = sizes.clamp(min=1).rsqrt()[:, None]  # (N, 1)

        counts = rows.bincount(minlength=len(bag.table))
        R = min(LARGE // len(bag.bias), int(counts.count_nonzero()))
        self.used = counts.argsort(descending=True, stable=True)[:R].sort().values  # (R,) rows of the table
        gram = torch.full_like(counts, -1).index_copy(0, self.used, torch.arange(R))[rows]  # (G,) in 0 to R-1, or -1
        self.grams = gram[gram >= 0]
        self.texts = torch.arange(len(sizes)).repeat_interleave(sizes)[gram >= 0]
        sizes = self.texts.bincount(minlength=len(sizes))
        self.starts = sizes.cumsum(0) - sizes  # of each text, in `grams`

    def logits(self, free: Tensor, dense: Tensor) -> Tensor:
        """The logits (N, C) that weights (R, C) and (M, C) give."""
        return F.embedding_bag(self.grams, free, self.starts, mode="sum") * self.root + self.dense @ dense


def fit_weights(features: Features, scale: float, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Minimise the mean cross-entropy plus an L2 penalty. Returns the weights `free` (R, C) and `dense` (M, C).

    `scale` multiplies the embeddings. `targets` (N, C) are probabilities, or zeros for a text that does not count.

    L-BFGS sees the weights in units in which the loss has about the same curvature in all directions (a
    preconditioner), so that few steps suffice. For `free` that is a number for each n-gram. The dense features depend
    on each other, as all grow with a text's length, so that `dense` takes a matrix.
    """
    N, C = targets.shape
    counted = targets.sum(1, keepdim=True)  # (N, 1): 1, or 0 for a text that does not count
    penalties = torch.cat([torch.full((features.of_tokens,), scale**-2), features.variances])[:, None] / PRIOR_VARIANCE
    curvature = CURVATURE / C * counted
    of_texts = (curvature * features.root.square()).squeeze(1)[features.texts]  # (G,)
    of_free = features.grams.bincount(of_texts, minlength=len(features.used)).float() + 1 / PRIOR_VARIANCE  # (R,)
    unit = (of_free / N).rsqrt()[:, None]
    of_dense = (features.dense.T @ (curvature * features.dense) + penalties.squeeze().diag()) / N  # (M, M)
    matrix = torch.linalg.inv(torch.linalg.cholesky(of_dense.double())).mT.float()
    variables = [torch.zeros(len(part), C, requires_grad=True) for part in (unit, matrix)]  # the weights in these units

    def loss() -> Tensor:
        free = unit * variables[0]
        dense = matrix @ variables[1]
        error = -(targets * features.logits(free, dense).log_softmax(-1)).sum()
        total = (error + (free.square().sum() / PRIOR_VARIANCE + (penalties * dense.square()).sum()) / 2) / N
        for part, gradient in zip(variables, torch.autograd.grad(total, variables), strict=True):
            part.grad = gradient
        return total

    torch.optim.LBFGS(variables, max_iter=STEPS, history_size=10, line_search_fn="strong_wolfe").step(loss)
    return unit * variables[0], matrix @ variables[1]
