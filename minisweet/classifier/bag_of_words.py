"""Exit 0: what words and pairs of words say by themselves, before the embeddings and at the cost of no layer.

The paper has no such exit. It is fastText (Joulin et al. 2017, https://arxiv.org/abs/1607.01759) without a hidden
layer: a table has a row of C numbers for each token and for each pair of neighbours, and a text's logits are the sum of
its n-grams' rows over the root of their number, plus a bias. In a pair of texts, a token that occurs in both texts uses
a second row, since a pair is mostly about what its texts share. A pair also has two numbers with weights of their own:
how well each text is met in the other one, by other words too (Corley and Mihalcea 2005,
https://aclanthology.org/W05-1203). See `NgramExit.find_met`.

`fit_ngrams` fits it on the CPU, in seconds. A token's row is a free part plus a linear function of its pre-trained
embedding, so that tokens unseen in training count too. The logits are linear in the weights (`Features`), and the loss
is convex. `fit_weights` takes a few steps of L-BFGS and stops before the minimum. It starts from zeros and draws
nothing at random, so that the same texts give the same numbers.

Letters: B batch, T tokens, V vocabulary, D hidden size, C classes, N texts, G all their n-grams, R n-grams with a row
to fit, M dense features.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisweet.base.files import InputError

BUCKETS = 2**16  # rows for all pairs of neighbours, which are hashed
FEW, FEW_BUCKETS = 4, 2**18  # with so few classes there is room for more of them, and fewer pairs share a row
FIRST, SECOND, SHARED, PRIME = 1640531513, 1103515245, 1234567891, 2**31 - 1  # a linear hash (Carter and Wegman 1979)
COMPONENTS = 32  # principal components of the embeddings, by which words of a pair are compared; 64 are no better
STRENGTH, STEPS = 5.0, 25  # prior variance of each weight (the L2 penalty); steps of L-BFGS, 100 are no better
CURVATURE = 0.25  # of the loss, times 1 / C, which it is at zero weights; towards the minimum it is smaller
SCALES = (0.35, 0.7, 1.4)  # of the embedding part, chosen on held-out texts: large with few texts, small with many
LARGE, MOST = 2**21, 2**27  # numbers: in the rows to fit; in the whole table, or all logits


class NgramExit(nn.Module):
    """Tokens to logits by a table of n-grams, which `fit_ngrams` fills. It has buffers, which training leaves alone.

    `special_ids` are tokens that are no words, such as [CLS]. Where texts come in `pairs`, each token has two rows: one
    for tokens of one text, one for tokens of both; and words are compared by vectors.
    """

    def __init__(self, vocab_size: int, num_labels: int, special_ids: Sequence[int], pairs: bool) -> None:
        super().__init__()
        self.pairs, self.token_rows = pairs, (1 + pairs) * vocab_size
        self.buckets = FEW_BUCKETS if num_labels <= FEW else BUCKETS
        self.register_buffer("table", torch.zeros(self.token_rows + self.buckets, num_labels))
        self.register_buffer("bias", torch.zeros(num_labels))
        self.register_buffer("is_word", torch.ones(vocab_size, dtype=torch.bool))
        self.is_word[list(special_ids)] = False
        if pairs:
            self.register_buffer("vectors", torch.zeros(vocab_size, COMPONENTS))  # each of length 1
            self.register_buffer("idf", torch.ones(vocab_size))  # inverse document frequencies, at least 1
            self.register_buffer("met_weights", torch.zeros(2, num_labels))

    def find_rows(self, ids: Tensor, mask: Tensor, types: Tensor) -> tuple[Tensor, Tensor]:
        """The rows (B, 2T) of all tokens of texts (B, T), then of all pairs of neighbours, and which of them count."""
        is_word = mask * self.is_word[ids]  # 1 or 0
        shared = torch.zeros_like(ids)  # 1 where the other text has the token too
        if self.pairs:
            equal = (ids[:, :, None] == ids[:, None, :]) & is_word[:, None, :].bool()  # (B, T, T)
            shared = (equal & (types[:, :, None] != types[:, None, :])).any(2).long()
        after_ids, after_is_word, after_shared = F.pad(torch.stack([ids, is_word, shared]), (0, 1))[..., 1:]  # (B, T)
        code = ids * FIRST + after_ids * SECOND + (shared & after_shared) * SHARED  # far below 2^63
        rows = [shared * len(self.is_word) + ids, self.token_rows + code % PRIME % self.buckets]
        return torch.cat(rows, 1), torch.cat([is_word, is_word & after_is_word], 1)  # no pair crosses [SEP]

    def find_met(self, ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
        """How well the first text is met in the second, and the second in the first: pairs (B, T) to (B, 2), in 0 to 1.

        The mean over a text's words, weighted by their IDF, of the largest cosine to any word of the other text; or 0,
        where that is negative, or a side has no words.
        """
        is_word = (mask * self.is_word[ids])[..., None]  # (B, T, 1)
        vectors = self.vectors[ids] * is_word
        are_apart = types[:, :, None] != types[:, None, :]  # (B, T, T); no token is apart from itself, which gives a 0
        met = (vectors @ vectors.mT * are_apart).amax(2, keepdim=True)  # (B, T, 1)
        weights = is_word * self.idf[ids, None] * torch.stack([1 - types, types], 2)  # (B, T, 2)
        return (weights * met).sum(1) / weights.sum(1).clamp(min=1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Logits (B, C) of texts, each argument (B, T) of int64.

        A text without a known word has zeros. So it goes on, but at a threshold of 1/C or less, where all texts leave.
        """
        rows, counts = self.find_rows(input_ids, attention_mask, token_type_ids)
        counts = counts[..., None].to(self.table.dtype)  # (B, 2T, 1)
        number = counts.sum(1)  # (B, 1)
        logits = (self.table[rows] * counts).sum(1) / number.clamp(min=1).sqrt() + self.bias
        if self.pairs:
            met = self.find_met(input_ids, attention_mask, token_type_ids)
            logits = logits + (met[..., None] * self.met_weights).sum(1)
        return logits * number.clamp(max=1)

    def contributions(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """What makes the logits of texts that have words, but for the bias: (B, 2T, C), or in pairs (B, 2T+2, C).

        They are those of all tokens, of each token with its next neighbour, and of the two numbers of `find_met`.
        """
        rows, counts = self.find_rows(input_ids, attention_mask, token_type_ids)
        root = counts.sum(1).clamp(min=1).sqrt()[:, None, None]
        added = self.table[rows] * counts[..., None] / root
        if self.pairs:
            met = self.find_met(input_ids, attention_mask, token_type_ids)
            added = torch.cat([added, met[..., None] * self.met_weights], 1)
        return added


def check_size(vocab_size: int, num_labels: int, pairs: bool, texts: int) -> None:
    """Raise InputError where so many classes need a table, or logits of all texts, that cannot be fitted in memory."""
    rows = max((1 + pairs) * vocab_size + BUCKETS, texts)
    if num_labels > MOST // rows:
        why = f"exit 0 can be fitted for at most {MOST // rows:,} classes here, and there are {num_labels:,}"
        raise InputError(f"{why}; name the other exits alone, without 0", "exit_layers")


def compare_words(exit: NgramExit, batches: Sequence, embeddings: Tensor) -> None:
    """Fill what `find_met` compares words by: vectors, the embeddings' principal components, and IDF."""
    centred, V = embeddings - embeddings.mean(0), len(embeddings)
    axes = torch.linalg.eigh(centred.T @ centred)[1][:, -exit.vectors.shape[1] :]  # their signs change no cosine
    exit.vectors.zero_()[:, : axes.shape[1]] = F.normalize(centred @ axes)
    holders = sum(torch.zeros(len(ids), V).scatter_(1, ids, mask.float()).sum(0) for ids, mask, _ in batches)
    exit.idf.copy_(1 + ((1 + sum(len(ids) for ids, _, _ in batches)) / (1 + holders)).log())


class Features:
    """N texts as a linear map from weights to logits.

    The weights are of two kinds. `free` (R, C) has a row for each n-gram, or for the most frequent ones where all would
    be too many numbers. `dense` (M, C) has the linear functions of the embeddings of a text's tokens (D+1 rows, and
    D+1 more for tokens of both texts of a pair), the weights of `find_met`'s numbers (0 or 2 rows), and the bias.
    """

    def __init__(self, exit: NgramExit, batches: Sequence, embeddings: Tensor) -> None:
        (V, D), parts = embeddings.shape, 1 + exit.pairs
        known = (embeddings - embeddings.mean(0)) / embeddings.std(0).clamp(min=1e-6) / D**0.5  # of length about 1
        self.known = torch.cat([known, torch.ones(V, 1)], 1)  # (V, D+1): the ones count tokens
        self.of_tokens = parts * (D + 1)  # the dense features that are sums of these
        rows, sizes, dense = [], [], []
        for ids, mask, types in batches:
            found, counts = exit.find_rows(ids, mask, types)  # (B, 2T)
            rows.append(found[counts.bool()])
            sizes.append(counts.sum(1))
            root = sizes[-1].clamp(min=1).rsqrt()[:, None]  # (B, 1)
            of_token, is_word = found[:, : ids.shape[1]], counts[:, : ids.shape[1], None]
            is_in = (F.one_hot(of_token // V, parts) * is_word).float()  # (B, T, parts)
            sums = (is_in.mT @ self.known[ids]).flatten(1)  # (B, parts * (D+1))
            met = exit.find_met(ids, mask, types) if exit.pairs else root[:, :0]
            dense.append(torch.cat([sums * root, met, torch.ones_like(root)], 1))
        self.dense, sizes, rows = torch.cat(dense), torch.cat(sizes), torch.cat(rows)  # (N, M), (N,), (G,) text by text
        # Their weights are penalised as if these features had a spread of 1; the bias, a feature of ones, hardly is.
        self.variances = self.dense[:, self.of_tokens :].var(0, correction=0).clamp(min=1e-4)
        self.has_words, self.root = (sizes > 0)[:, None], sizes.clamp(min=1).rsqrt()[:, None]  # (N, 1)

        counts = rows.bincount(minlength=len(exit.table))
        fitted = min(LARGE // len(exit.bias), int(counts.count_nonzero()))
        self.used = counts.argsort(descending=True, stable=True)[:fitted].sort().values  # (R,) rows of the table
        gram = torch.full_like(counts, -1).index_copy(0, self.used, torch.arange(fitted))[rows]  # (G,) in 0 to R-1
        self.grams, self.texts = gram[gram >= 0], torch.arange(len(sizes)).repeat_interleave(sizes)[gram >= 0]
        sizes = self.texts.bincount(minlength=len(sizes))
        self.starts = sizes.cumsum(0) - sizes  # of each text, in `grams`

    def logits(self, free: Tensor, dense: Tensor) -> Tensor:
        """The logits (N, C)."""
        return F.embedding_bag(self.grams, free, self.starts, mode="sum") * self.root + self.dense @ dense


def fit_weights(features: Features, scale: float, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The weights, near the least mean cross-entropy and penalty; the embeddings count as if `scale` times as large.

    Rows of zeros among the `targets` (N, C) do not count.

    L-BFGS sees the weights in units in which the loss has about the same curvature in all directions (a
    preconditioner), so that few steps suffice. For `free` that is a number for each n-gram. The dense features depend
    on each other, as all grow with a text's length, so that `dense` takes a matrix.
    """
    (N, C), weights = targets.shape, targets.sum(1, keepdim=True)  # of the texts (N, 1)
    penalties = torch.cat([torch.full((features.of_tokens,), scale**-2), features.variances])[:, None] / STRENGTH
    curvature = CURVATURE / C * weights
    of_texts = (curvature * features.root.square()).squeeze(1)[features.texts]  # (G,)
    of_free = features.grams.bincount(of_texts, minlength=len(features.used)).float() + 1 / STRENGTH  # (R,)
    unit = (of_free / N).rsqrt()[:, None]
    of_dense = (features.dense.T @ (curvature * features.dense) + penalties.squeeze().diag()) / N  # (M, M)
    matrix = torch.linalg.inv(torch.linalg.cholesky(of_dense.double())).mT.float()
    found = [torch.zeros(len(part), C, requires_grad=True) for part in (unit, matrix)]  # the weights in these units

    def loss() -> Tensor:
        free, dense = unit * found[0], matrix @ found[1]
        error = -(targets * features.logits(free, dense).log_softmax(-1)).sum()
        total = (error + (free.square().sum() / STRENGTH + (penalties * dense.square()).sum()) / 2) / N
        for part, gradient in zip(found, torch.autograd.grad(total, found), strict=True):
            part.grad = gradient
        return total

    torch.optim.LBFGS(found, max_iter=STEPS, history_size=10, line_search_fn="strong_wolfe").step(loss)
    return unit * found[0], matrix @ found[1]


@torch.no_grad()
def fit_ngrams(
    exit: NgramExit,
    batches: Sequence,
    targets: Tensor,
    embeddings: Tensor,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """Fill the buffers, in place, on the CPU. Returns the scale of the embeddings that held-out texts chose.

    Args:
        batches: (input_ids, attention_mask, token_type_ids) of all N texts, as `targets` has them; read several times.
        targets: labels (N,), or probabilities (N, C), each row multiplied by its text's weight.
        embeddings: the pre-trained word embeddings (V, D), in float32.
        report: called with the fits that are done, and their number in all, after each of them.
    """
    N, C = len(targets), len(exit.bias)
    if exit.pairs:
        compare_words(exit, batches, embeddings)
    features = Features(exit, batches, embeddings)
    # A text without a known word has zeros, whatever is fitted.
    targets = (targets if targets.ndim == 2 else F.one_hot(targets, C).float()) * features.has_words
    held_out = (torch.randperm(N, generator=torch.Generator().manual_seed(0)) % 3 == 0)[:, None]  # a third
    likelihoods = []
    for done, scale in enumerate(SCALES):
        weights = fit_weights(features, scale, targets * ~held_out)
        likelihoods.append(float((targets * held_out * features.logits(*weights).log_softmax(-1)).sum()))
        report(done + 1, len(SCALES) + 1)
    scale = SCALES[likelihoods.index(max(likelihoods))]
    free, dense = fit_weights(features, scale, targets)
    report(len(SCALES) + 1, len(SCALES) + 1)
    linear, rest = dense[: features.of_tokens].unflatten(0, (1 + exit.pairs, -1)), dense[features.of_tokens :]
    exit.table.zero_()[: exit.token_rows] = (features.known @ linear).flatten(0, 1)
    exit.table[features.used] += free
    if exit.pairs:
        exit.met_weights.copy_(rest[:2])
    exit.bias.copy_(rest[-1])
    return scale
