"""Exit 0: what words and pairs of words say by themselves, before the embeddings and at the cost of no layer.

It is fastText (Joulin et al. 2017, https://arxiv.org/abs/1607.01759) without its hidden layer: a table has a row of C
numbers for each token and for each pair of neighbours, and a text's logits are the sum of its n-grams' rows over the
root of their number, plus a bias. So fitting is convex, and gives the same numbers each time. In a pair of texts, a
token that occurs in both texts uses a second row, since a pair is mostly about what its texts share. A token's
row is a free part plus a linear function of its pre-trained embedding, so that tokens unseen in training count too.
A pair also has two numbers with weights of their own: how well each text is met in the other one, by other words too
(Corley and Mihalcea 2005, https://aclanthology.org/W05-1203). See `NgramExit.find_met`.

Letters: B batch, T tokens, V vocabulary, D hidden size, C classes, N texts, G all their n-grams, R table rows in use.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BUCKETS = 2**16  # rows for all pairs of neighbours, which are hashed
FIRST, SECOND, SHARED, PRIME = 1640531513, 1103515245, 1234567891, 2**31 - 1  # a linear hash (Carter and Wegman 1979)
COMPONENTS = 32  # principal components of the embeddings, by which words of a pair are compared; 64 are no better
STRENGTH, ITERATIONS = 5.0, 100  # prior variance of each weight (the L2 penalty); the most steps of L-BFGS
SCALES = (0.35, 0.7, 1.4)  # of the embedding part, chosen by cross-validation: large with few texts, small with many
FOLDS, ENOUGH = 3, 1000  # of cross-validation, and how many held-out texts are enough to choose a scale


class NgramExit(nn.Module):
    """Tokens to logits by a table of n-grams, which `fit_ngrams` fills. It has buffers, which training leaves alone.

    `special_ids` are tokens that are no words, such as [CLS]. Where texts come in `pairs`, each token has two rows: one
    for tokens of one text, one for tokens of both; and words are compared by vectors.
    """

    def __init__(self, vocab_size: int, num_labels: int, special_ids: Sequence[int], pairs: bool) -> None:
        super().__init__()
        self.pairs, self.token_rows = pairs, (1 + pairs) * vocab_size
        self.register_buffer("table", torch.zeros(self.token_rows + BUCKETS, num_labels))
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
        rows = [shared * len(self.is_word) + ids, self.token_rows + code % PRIME % BUCKETS]
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
        """Logits (B, C) of texts, each argument (B, T) of int64. A text without a known word has zeros, and goes on."""
        rows, counts = self.find_rows(input_ids, attention_mask, token_type_ids)
        counts = counts[..., None].to(self.table.dtype)  # (B, 2T, 1)
        number = counts.sum(1)  # (B, 1)
        logits = (self.table[rows] * counts).sum(1) / number.clamp(min=1).sqrt() + self.bias
        if self.pairs:
            met = self.find_met(input_ids, attention_mask, token_type_ids)
            logits = logits + (met[..., None] * self.met_weights).sum(1)
        return logits * number.clamp(max=1)


@torch.no_grad()
def fit_ngrams(exit: NgramExit, batches: Sequence, targets: Tensor, embeddings: Tensor) -> float:
    """Fill the buffers, in place, by L-BFGS on the CPU. Returns the scale that cross-validation chose.

    Args:
        batches: (input_ids, attention_mask, token_type_ids) of all N texts, in the order of `targets`.
        targets: labels (N,), or probabilities (N, C), each row multiplied by its weight.
        embeddings: the pre-trained word embeddings (V, D), in float32.
    """
    grams = [exit.find_rows(*batch) for batch in batches]
    used, gram = torch.cat([rows[counts.bool()] for rows, counts in grams]).unique(return_inverse=True)  # (R,), (G,)
    sizes, counts = torch.cat([counts.sum(1) for _, counts in grams]), gram.bincount(minlength=len(used))  # (N,), (R,)
    (V, D), N, R, C = embeddings.shape, len(sizes), len(used), len(exit.bias)
    # A text without a known word has zeros, whatever is fitted.
    targets = (targets if targets.ndim == 2 else F.one_hot(targets, C).float()) * (sizes > 0)[:, None]
    centred, met = embeddings - embeddings.mean(0), torch.zeros(N, 0)
    known = centred / embeddings.std(0).clamp(min=1e-6) / D**0.5  # of length about 1
    known = torch.cat([known, torch.ones(V, 1)], 1)  # (V, D+1): by the ones, the number of shared tokens counts
    if exit.pairs:
        axes = torch.linalg.eigh(centred.T @ centred)[1][:, -COMPONENTS:]  # their signs change no cosine
        exit.vectors.zero_()[:, : axes.shape[1]] = F.normalize(centred @ axes)
        holders = sum(torch.zeros(len(ids), V).scatter_(1, ids, mask.float()).sum(0) for ids, mask, _ in batches)
        exit.idf.copy_(1 + ((1 + N) / (1 + holders)).log())
        met = torch.cat([exit.find_met(*batch) for batch in batches])  # (N, 2)
    met = met - (mean := met.mean(0))
    met = met / (spread := met.square().mean(0).sqrt().clamp(min=0.01))  # rounding alone is no spread
    # The rows in use of tokens of one text, and of tokens that both texts have: which they are, and their embeddings.
    parts = [(rows := used // V == part, known[used[rows] % V]) for part in range(1 + exit.pairs)]
    # embedding_bag adds up, per text, its n-grams' rows; and for the gradient, per n-gram, the errors of its texts.
    texts = torch.arange(N).repeat_interleave(sizes)[gram.argsort(stable=True)]  # (G,)
    text_starts, gram_starts = sizes.cumsum(0) - sizes, counts.cumsum(0) - counts  # of the slices
    root = sizes.clamp(min=1).rsqrt()[:, None]  # (N, 1)

    def log_probabilities(scale, free, linear, of_met, bias):  # of all texts, (N, C)
        table = free.clone()
        for (rows, vectors), function in zip(parts, linear, strict=True):
            table[rows] += vectors @ (scale * function)
        return (F.embedding_bag(gram, table, text_starts, mode="sum") * root + met @ of_met + bias).log_softmax(-1)

    def solve(scale, targets):
        free, linear = torch.zeros(R, C), torch.zeros(len(parts), D + 1, C)  # free parts, and linear functions
        of_met, bias = torch.zeros(met.shape[1], C), torch.zeros(C)

        def loss() -> Tensor:  # mean cross-entropy and a penalty; the gradient is by hand, which is four times as fast
            said = log_probabilities(scale, free, linear, of_met, bias)
            error = (said.exp() * targets.sum(1, keepdim=True) - targets) / N  # of the logits
            sums = F.embedding_bag(texts, error * root, gram_starts, mode="sum")  # (R, C)
            of_linear = scale * torch.stack([vectors.T @ sums[rows] for rows, vectors in parts])
            free.grad, linear.grad = sums + free / (STRENGTH * N), of_linear + linear / (STRENGTH * N)
            of_met.grad, bias.grad = met.T @ error + of_met / (STRENGTH * N), error.sum(0)
            squares = free.square().sum() + linear.square().sum() + of_met.square().sum()
            return squares / (2 * STRENGTH * N) - (targets * said).sum(1).mean()

        settings = {"max_iter": ITERATIONS, "history_size": 10, "tolerance_grad": 1e-6}
        torch.optim.LBFGS([free, linear, of_met, bias], line_search_fn="strong_wolfe", **settings).step(loss)
        return free, linear, of_met, bias

    fold = torch.randperm(N, generator=torch.Generator().manual_seed(0)) % FOLDS  # (N,)
    held_out = [fold == n for n in range(min(FOLDS, -(-ENOUGH * FOLDS // N)))]  # two from 1,500 texts, one from 3,000

    def likelihood(scale):  # the log-likelihood of texts that the fit has not seen
        fits = [(out, solve(scale, targets * ~out[:, None])) for out in held_out]
        return sum(float((targets * log_probabilities(scale, *fit))[out].sum()) for out, fit in fits)

    scale = max(SCALES, key=likelihood)
    free, linear, of_met, bias = solve(scale, targets)
    exit.table.zero_()[: exit.token_rows] = scale * (known @ linear).flatten(0, 1)
    exit.table[used] += free
    if exit.pairs:
        exit.met_weights.copy_(of_met / spread[:, None])
    exit.bias.copy_(bias - mean / spread @ of_met)
    return scale
