"""Exit 0: what words and pairs of words say by themselves, before the embeddings and at the cost of no layer.

It is fastText's model (Joulin et al. 2017, https://arxiv.org/abs/1607.01759): a table has a row of C numbers for each
token and for each pair of neighbours, and a text's logits are the sum of its n-grams' rows over the root of their
number, plus a bias. There is no hidden layer: fitting is convex, and gives the same numbers each time. In a pair of
texts, a token that occurs in both texts uses a second row, since a pair is mostly about what its texts share. A token's
row is a free part plus a linear function of its pre-trained embedding, so that tokens unseen in training count too.

Letters: B batch, T tokens, V vocabulary, D hidden size, C classes, N texts, G all their n-grams, R table rows in use.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BUCKETS = 2**16  # rows for all pairs of neighbours, which are hashed; with a quarter of them CoLA loses five points
FIRST, SECOND, SHARED, PRIME = 1640531513, 1103515245, 1234567891, 2**31 - 1  # a linear hash (Carter and Wegman 1979)
STRENGTH, ITERATIONS = 5.0, 100  # prior variance of each weight (the L2 penalty); the most steps of L-BFGS
SCALES = (0.35, 0.7, 1.4)  # of the embedding part, chosen by cross-validation: large with few texts, small with many
FOLDS, ENOUGH = 3, 1000  # of cross-validation, and how many held-out texts are enough to choose a scale


class NgramExit(nn.Module):
    """Tokens to logits by a table of n-grams, which `fit_ngrams` fills. It has buffers, which training leaves alone.

    `special_ids` are tokens that are no words, such as [CLS], [SEP], [PAD] and [UNK], and say nothing. `pairs` is
    whether texts come in pairs. If so, each token has two rows: one for tokens of one text, one for tokens of both.
    """

    def __init__(self, vocab_size: int, num_labels: int, special_ids: Sequence[int], pairs: bool) -> None:
        super().__init__()
        special_ids, self.pairs, self.token_rows = list(special_ids), pairs, (1 + pairs) * vocab_size
        self.settings = {"vocab_size": vocab_size, "num_labels": num_labels, "special_ids": special_ids, "pairs": pairs}
        self.register_buffer("table", torch.zeros(self.token_rows + BUCKETS, num_labels))
        self.register_buffer("bias", torch.zeros(num_labels))
        self.register_buffer("is_word", torch.ones(vocab_size, dtype=torch.bool))
        self.is_word[special_ids] = False

    def find_rows(self, ids: Tensor, mask: Tensor, types: Tensor) -> tuple[Tensor, Tensor]:
        """The rows (B, 2T) of all tokens of texts (B, T), then of all pairs of neighbours, and which of them count."""
        is_word = mask * self.is_word[ids]  # 1 or 0
        shared = torch.zeros_like(ids)  # 1 where the other text has the token too
        if self.pairs:
            equal = (ids[:, :, None] == ids[:, None, :]) & is_word[:, None, :].bool()  # (B, T, T)
            shared = (equal & (types[:, :, None] != types[:, None, :])).any(2).long()
        after_ids, after_is_word, after_shared = F.pad(torch.stack([ids, is_word, shared]), (0, 1))[..., 1:]  # (B, T)
        code = ids * FIRST + after_ids * SECOND + (shared & after_shared) * SHARED  # far below 2^63
        rows = [shared * len(self.is_word) + ids, self.token_rows + code % PRIME % BUCKETS]
        return torch.cat(rows, 1), torch.cat([is_word, is_word & after_is_word], 1)  # no pair crosses [SEP]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Logits (B, C) of texts, each argument (B, T) of int64. A text without words has the bias alone."""
        rows, counts = self.find_rows(input_ids, attention_mask, token_type_ids)
        counts = counts[..., None].to(self.table.dtype)  # (B, 2T, 1)
        return (self.table[rows] * counts).sum(1) / counts.sum(1).clamp(min=1).sqrt() + self.bias


@torch.no_grad()
def fit_ngrams(
    exit: NgramExit, batches: Iterable, targets: Tensor, embeddings: Tensor, weights: Tensor | None = None
) -> float:
    """Fill the table and the bias, in place, by L-BFGS on the CPU. Returns the scale that cross-validation chose.

    Args:
        batches: (input_ids, attention_mask, token_type_ids) of all N texts, in the order of `targets`.
        targets, weights: labels (N,) or probabilities (N, C), and the weight of each text (N,), by default 1.
        embeddings: the pre-trained word embeddings (V, D), in float32.
    """
    grams = [exit.find_rows(*batch) for batch in batches]
    used, gram = torch.cat([rows[counts.bool()] for rows, counts in grams]).unique(return_inverse=True)  # (R,), (G,)
    sizes, counts = torch.cat([counts.sum(1) for _, counts in grams]), gram.bincount(minlength=len(used))  # (N,), (R,)
    (V, D), N, R, C = embeddings.shape, len(sizes), len(used), len(exit.bias)
    targets = targets if targets.ndim == 2 else F.one_hot(targets, C).float()
    weights = torch.ones(N) if weights is None else weights.float()
    known = (embeddings - embeddings.mean(0)) / embeddings.std(0).clamp(min=1e-6) / D**0.5  # of length about 1
    known = torch.cat([known, torch.ones(V, 1)], 1)  # (V, D+1): by the ones, the number of shared tokens counts
    # The rows in use of tokens of one text, and of tokens that both texts have: which they are, and their embeddings.
    is_of_part = [used // V == part for part in range(1 + exit.pairs)]
    parts = [(rows, known[used[rows] % V]) for rows in is_of_part]
    # embedding_bag adds up, per text, the table's rows of its n-grams; and for the gradient, per n-gram, the errors of
    # the texts that hold it.
    texts = torch.arange(N).repeat_interleave(sizes)[gram.argsort(stable=True)]  # (G,)
    text_starts, gram_starts = sizes.cumsum(0) - sizes, counts.cumsum(0) - counts  # of the slices
    root = sizes.clamp(min=1).rsqrt()[:, None]  # (N, 1)

    def log_probabilities(scale: float, free: Tensor, linear: Tensor, bias: Tensor) -> Tensor:
        """Those of all texts, (N, C)."""
        table = free.clone()
        for (rows, vectors), function in zip(parts, linear, strict=True):
            table[rows] += scale * vectors @ function
        return (F.embedding_bag(gram, table, text_starts, mode="sum") * root + bias).log_softmax(-1)

    def solve(scale: float, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Free parts (R, C), linear functions (parts, D+1, C) and the bias (C,), for `weights` of the texts (N,)."""
        free, linear, bias = torch.zeros(R, C), torch.zeros(len(parts), D + 1, C), torch.zeros(C)

        def loss() -> Tensor:  # mean cross-entropy and a penalty; the gradient is by hand, which is four times as fast
            said = log_probabilities(scale, free, linear, bias)
            error = (said.exp() * targets.sum(1, keepdim=True) - targets) * weights[:, None] / N  # of the logits
            sums = F.embedding_bag(texts, error * root, gram_starts, mode="sum")  # (R, C)
            of_linear = torch.stack([scale * vectors.T @ sums[rows] for rows, vectors in parts])
            free.grad, linear.grad = sums + free / (STRENGTH * N), of_linear + linear / (STRENGTH * N)
            bias.grad = error.sum(0)
            penalty = (free.square().sum() + linear.square().sum()) / (2 * STRENGTH * N)
            return penalty - weights @ (targets * said).sum(1) / N

        settings = {"max_iter": ITERATIONS, "history_size": 10, "tolerance_grad": 1e-6}
        torch.optim.LBFGS([free, linear, bias], line_search_fn="strong_wolfe", **settings).step(loss)
        return free, linear, bias

    fold = torch.randperm(N, generator=torch.Generator().manual_seed(0)) % FOLDS  # (N,)
    held_out = [fold == n for n in range(min(FOLDS, -(-ENOUGH * FOLDS // N)))]  # two from 1,500 texts, one from 3,000

    def likelihood(scale: float) -> float:
        """The log-likelihood of texts that the fit has not seen."""
        total = 0.0
        for out in held_out:
            said = log_probabilities(scale, *solve(scale, weights * ~out))
            total += float(weights[out] @ (targets * said)[out].sum(1))
        return total

    scale = max(SCALES, key=likelihood)
    free, linear, bias = solve(scale, weights)
    exit.table.zero_()[: exit.token_rows] = scale * (known @ linear).flatten(0, 1)
    exit.table[used] += free
    exit.bias.copy_(bias)
    return scale
