"""Exit 0: a bag of words, which answers before the embeddings are computed, so it costs no layers.

It is fastText (Joulin et al. 2017, https://arxiv.org/abs/1607.01759) without a hidden layer: a table has a row of C
numbers for each token and each bigram (two neighbouring tokens). The logits of a text are the sum of its n-grams' rows,
divided by the square root of their number, plus a bias.

The row of a token is a free part plus a linear function of its pre-trained embedding, so that tokens unseen in training
count too. The logits are linear in the weights, so the loss is convex. A few steps of L-BFGS stop before the minimum.
They start from zeros and draw no random numbers, so that the same texts always give the same weights.

Dimension letters: B batch, T tokens, V vocabulary, D hidden size, C classes, N texts, G all their n-grams, R n-grams
with a row to fit.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisweet.base.commands import progress

BUCKETS = 2**16  # rows for all bigrams, which are hashed
FEW_CLASSES = 4
BUCKETS_IF_FEW = 2**18  # up to FEW_CLASSES a larger table fits, in which fewer bigrams share a row
FIRST, SECOND, PRIME = 1640531513, 1103515245, 2**31 - 1  # a linear hash (Carter and Wegman 1979)
PRIOR_VARIANCE = 5.0  # of each weight (L2 penalty)
OF_BIAS = 1e-4  # times that penalty: the bias is hardly penalized
STEPS = 25  # of L-BFGS; 100 are no better
CURVATURE = 0.25  # of the loss, times 1 / C: less than at zero weights, as it decreases towards the minimum
SCALES = (0.35, 0.7, 1.4)  # of the embeddings, chosen on held-out texts: large for few texts, small for many
LARGE = 2**21  # numbers in the rows to fit

Inputs = tuple[Tensor, Tensor]  # input_ids, attention_mask: (B, T) each, int64


class NgramExit(nn.Module):
    """A table of n-grams that maps tokens to logits. It only has buffers, which `fit_ngrams` fills.

    `special_ids` are tokens that are not words, such as [CLS].
    """

    table: Tensor  # (V + buckets, C)
    bias: Tensor  # (C,)
    is_word: Tensor  # (V,), bool

    def __init__(self, vocab_size: int, num_labels: int, special_ids: Sequence[int]) -> None:
        super().__init__()
        self.buckets = BUCKETS_IF_FEW if num_labels <= FEW_CLASSES else BUCKETS
        self.register_buffer("table", torch.zeros(vocab_size + self.buckets, num_labels))
        self.register_buffer("bias", torch.zeros(num_labels))
        self.register_buffer("is_word", torch.ones(vocab_size, dtype=torch.bool))
        self.is_word[list(special_ids)] = False

    def find_rows(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Table rows (B, 2T) of the tokens, then of the bigrams, of texts (B, T), and whether each counts (1 or 0)."""
        is_word = mask * self.is_word[ids]  # 1 or 0
        next_ids, next_is_word = F.pad(torch.stack([ids, is_word]), (0, 1))[..., 1:]  # (B, T)
        code = ids * FIRST + next_ids * SECOND  # far below 2^63
        rows = [ids, len(self.is_word) + code % PRIME % self.buckets]
        return torch.cat(rows, 1), torch.cat([is_word, is_word & next_is_word], 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The logits (B, C) of texts. Each argument is (B, T), int64.

        The logits of a text without a known word are zeros, so that it only leaves at a threshold of at most 1/C, where
        all texts do.
        """
        rows, counts = self.find_rows(input_ids, attention_mask)
        counts = counts[..., None].to(self.table.dtype)  # (B, 2T, 1)
        number = counts.sum(1)  # (B, 1)
        logits = (self.table[rows] * counts).sum(1) / number.clamp(min=1).sqrt() + self.bias
        return logits * number.clamp(max=1)

    def contributions(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The summands of the logits of texts, without the bias: (B, 2T, C), of the tokens, then of the bigrams."""
        rows, counts = self.find_rows(input_ids, attention_mask)
        root = counts.sum(1).clamp(min=1).sqrt()[:, None, None]
        return self.table[rows] * counts[..., None] / root


@torch.no_grad()
def fit_ngrams(bag: NgramExit, batches: Sequence[Inputs], targets: Tensor, embeddings: Tensor) -> None:
    """Fit a bag of words in place, on the CPU, to batches of N texts. Held-out texts choose the embeddings' scale.

    The targets are labels (N,) or probabilities (N, C), and the embeddings those of words (V, D), float32.
    """
    N, C = len(targets), len(bag.bias)
    features = Features(bag, batches, embeddings)
    # The logits of a text without a known word are zeros, whatever is fitted, so it does not count.
    targets = (targets if targets.ndim == 2 else F.one_hot(targets, C).float()) * features.has_words
    held_out = (torch.randperm(N, generator=torch.Generator().manual_seed(0)) % 3 == 0)[:, None]  # a third
    likelihoods = []
    for scale in progress(SCALES, desc="bag of words", unit="fit"):
        weights = fit_weights(features, scale, targets * ~held_out)
        likelihoods.append(float((targets * held_out * features.logits(*weights).log_softmax(-1)).sum()))
    free, dense = fit_weights(features, SCALES[likelihoods.index(max(likelihoods))], targets)
    bag.table.zero_()[: len(embeddings)] = features.known @ dense[:-1]
    bag.table[features.used] += free
    bag.bias.copy_(dense[-1])


class Features:
    """The features of N texts, which map weights to logits.

    There are two kinds of weights. `free` (R, C) has a row for each n-gram, or only for the most frequent ones if that
    is more than LARGE numbers. `dense` (D+2, C) has the linear function of the embeddings of tokens, and the bias.
    """

    def __init__(self, bag: NgramExit, batches: Sequence[Inputs], embeddings: Tensor) -> None:
        V, D = embeddings.shape
        known = (embeddings - embeddings.mean(0)) / embeddings.std(0).clamp(min=1e-6) / D**0.5  # of length about 1
        self.known = torch.cat([known, torch.ones(V, 1)], 1)  # (V, D+1): the ones count tokens
        parts = []
        for ids, mask in batches:
            all_rows, counted = bag.find_rows(ids, mask)  # (B, 2T)
            size = counted.sum(1)  # (B,)
            root = size.clamp(min=1).rsqrt()[:, None]  # (B, 1)
            is_word = counted[:, None, : ids.shape[1]].float()  # (B, 1, T)
            sums = (is_word @ self.known[ids]).squeeze(1)  # (B, D+1)
            parts.append((torch.cat([sums * root, torch.ones_like(root)], 1), size, all_rows[counted.bool()]))
        self.dense, sizes, rows = map(torch.cat, zip(*parts, strict=True))  # (N, D+2), (N,), (G,) text by text
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
        """The logits (N, C) that weights (R, C) and (D+2, C) give."""
        return F.embedding_bag(self.grams, free, self.starts, mode="sum") * self.root + self.dense @ dense


def fit_weights(features: Features, scale: float, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Minimize the mean cross-entropy plus an L2 penalty. Returns the weights `free` (R, C) and `dense` (D+2, C).

    `scale` multiplies the embeddings. `targets` (N, C) are probabilities, or zeros for a text that does not count.

    L-BFGS sees the weights in units in which the loss has about the same curvature in all directions (a
    preconditioner), so that few steps suffice. For `free` that is a number for each n-gram. The dense features depend
    on each other, as all grow with a text's length, so that `dense` takes a matrix.
    """
    N, C = targets.shape
    counted = targets.sum(1, keepdim=True)  # (N, 1): 1, or 0 for a text that does not count
    penalties = torch.tensor([scale**-2] * (features.dense.shape[1] - 1) + [OF_BIAS])[:, None] / PRIOR_VARIANCE
    curvature = CURVATURE / C * counted
    of_texts = (curvature * features.root.square()).squeeze(1)[features.texts]  # (G,)
    of_free = features.grams.bincount(of_texts, minlength=len(features.used)).float() + 1 / PRIOR_VARIANCE  # (R,)
    unit = (of_free / N).rsqrt()[:, None]
    of_dense = (features.dense.T @ (curvature * features.dense) + penalties.squeeze().diag()) / N  # (D+2, D+2)
    matrix = torch.linalg.inv(torch.linalg.cholesky(of_dense.double())).mT.float()
    variables = [torch.zeros(len(part), C, requires_grad=True) for part in (unit, matrix)]  # the weights in these units

    def loss() -> Tensor:
        free, dense = unit * variables[0], matrix @ variables[1]
        error = -(targets * features.logits(free, dense).log_softmax(-1)).sum()
        return (error + (free.square().sum() / PRIOR_VARIANCE + (penalties * dense.square()).sum()) / 2) / N

    minimize(loss, variables, STEPS)
    return unit * variables[0], matrix @ variables[1]


def minimize(loss: Callable[[], Tensor], variables: list[Tensor], steps: int, history: int = 10) -> None:
    """Minimize a loss in place, with at most `steps` steps of L-BFGS, which keeps the last `history` updates."""

    def with_gradients() -> Tensor:
        value = loss()
        for part, gradient in zip(variables, torch.autograd.grad(value, variables), strict=True):
            part.grad = gradient
        return value

    optimizer = torch.optim.LBFGS(variables, max_iter=steps, history_size=history, line_search_fn="strong_wolfe")
    optimizer.step(with_gradients)
