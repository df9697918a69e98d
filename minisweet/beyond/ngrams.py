"""Exit 0: what words and pairs of words say by themselves, before the embeddings and at the cost of no layer.

It is a bag of words and word pairs with pre-trained embeddings, and for pairs of texts how well each text's words are
met in the other. The base is fastText (Joulin et al. 2017, https://arxiv.org/abs/1607.01759) without its hidden layer:
a table has a row of C numbers for each token and for each pair of neighbours, and a text's logits are the sum of its
n-grams' rows over the root of their number, plus a bias. In a pair of texts, a token that occurs in both texts uses a
second row, since a pair is mostly about what its texts share. A pair also has two numbers with weights of their own:
how well each text is met in the other one, by other words too (Corley and Mihalcea 2005,
https://aclanthology.org/W05-1203). See `NgramExit.find_met`.

`fit_ngrams` fits it by L-BFGS on the CPU, in seconds. The loss is convex, so the numbers are the same each time. A
token's row is a free part plus a linear function of its pre-trained embedding, so that tokens unseen in training count
too. `Features` is the texts as a linear map, `fit_weights` finds the weights with the least loss, and `fit_ngrams`
searches the scale of the embeddings and fills the exit.

With more than 16 classes only the most frequent n-grams are fitted, so that their rows have at most 2 million numbers
in all. L-BFGS then sees the weights in units of equal curvature (a preconditioner), in which 15 steps get further than
100 do without. With fewer classes nothing of this is needed.

Letters: B batch, T tokens, V vocabulary, D hidden size, C classes, N texts, G all their n-grams, R n-grams with a row.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisweet.base.commands import progress
from minisweet.base.files import LOG, InputError

BUCKETS = 2**16  # rows for all pairs of neighbours, which are hashed
FIRST, SECOND, SHARED, PRIME = 1640531513, 1103515245, 1234567891, 2**31 - 1  # a linear hash (Carter and Wegman 1979)
COMPONENTS = 32  # principal components of the embeddings, by which words of a pair are compared; 64 are no better
STRENGTH, ITERATIONS = 5.0, 100  # prior variance of each weight (the L2 penalty); the most steps of L-BFGS
SCALES = (0.35, 0.7, 1.4)  # of the embedding part, chosen by cross-validation: large with few texts, small with many
FOLDS, ENOUGH = 3, 1000  # of cross-validation, and how many held-out texts are enough to choose a scale
MANY, MANY_ITERATIONS = 16, 15  # with more classes than these, L-BFGS has units of equal curvature, and so many steps
LARGE, MOST = 2**21, 2**27  # numbers: in the rows to fit, where classes are many; in the whole table, or all logits


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
        raise InputError(f"--exit-layers: {why}; name the other exits alone, without 0")


def compare_words(exit: NgramExit, batches: Sequence, embeddings: Tensor) -> None:
    """Fill what `find_met` compares words by: vectors, the embeddings' principal components, and IDF."""
    centred, V = embeddings - embeddings.mean(0), len(embeddings)
    axes = torch.linalg.eigh(centred.T @ centred)[1][:, -exit.vectors.shape[1] :]  # their signs change no cosine
    exit.vectors.zero_()[:, : axes.shape[1]] = F.normalize(centred @ axes)
    holders = sum(torch.zeros(len(ids), V).scatter_(1, ids, mask.float()).sum(0) for ids, mask, _ in batches)
    exit.idf.copy_(1 + ((1 + sum(len(ids) for ids, _, _ in batches)) / (1 + holders)).log())


class Features:
    """N texts as a linear map: from weights to logits, and back from the logits' errors to the weights' gradients.

    The weights: `free`, a row for each n-gram (R, C); `linear` functions of a token's embedding, one for tokens of one
    text and one for tokens of both (1 or 2, D+1, C); `of_met`, of `find_met`'s numbers (0 or 2, C); `bias` (C,).
    """

    def __init__(self, exit: NgramExit, batches: Sequence, embeddings: Tensor) -> None:
        (V, D), C = embeddings.shape, len(exit.bias)
        found = [exit.find_rows(*batch) for batch in batches]
        sizes = torch.cat([counts.sum(1) for _, counts in found])  # (N,) n-grams of each text
        self.has_words, self.root = (sizes > 0)[:, None], sizes.clamp(min=1).rsqrt()[:, None]  # (N, 1)
        rows = torch.cat([rows[counts.bool()] for rows, counts in found])  # (G,) of the table, text by text
        self.used, gram, counts = rows.unique(return_inverse=True, return_counts=True)  # (R,), (G,) in 0 to R-1, (R,)
        text = torch.arange(len(sizes)).repeat_interleave(sizes)  # (G,)
        if C > MANY:  # the most frequent n-grams alone; a token that is not among them counts as one unseen
            kept = counts.argsort(descending=True, stable=True)[: LARGE // C].sort().values
            gram = torch.full_like(self.used, -1).index_copy(0, kept, torch.arange(len(kept)))[gram]
            self.used, counts, text, gram = self.used[kept], counts[kept], text[gram >= 0], gram[gram >= 0]
        # embedding_bag adds up, per text, its n-grams' rows; and for the gradient, per n-gram, the errors of its texts.
        sizes = text.bincount(minlength=len(sizes))
        self.grams, self.text_starts = gram, sizes.cumsum(0) - sizes
        self.texts, self.gram_starts = text[gram.argsort(stable=True)], counts.cumsum(0) - counts
        known = (embeddings - embeddings.mean(0)) / embeddings.std(0).clamp(min=1e-6) / D**0.5  # of length about 1
        self.known = torch.cat([known, torch.ones(V, 1)], 1)  # (V, D+1): the ones count shared tokens
        # Of tokens of one text, and of tokens of both: which of the R they are, and their embeddings.
        are_tokens = [self.used // V == part for part in range(1 + exit.pairs)]
        self.parts = [(which, self.known[self.used[which] % V]) for which in are_tokens]
        met = torch.cat([exit.find_met(*batch) for batch in batches]) if exit.pairs else torch.zeros(len(sizes), 0)
        self.mean = met.mean(0)
        self.spread = (met - self.mean).square().mean(0).sqrt().clamp(min=0.01)  # rounding alone is no spread
        self.met = (met - self.mean) / self.spread  # (N, 0 or 2)

    def sums(self, table: Tensor) -> Tensor:
        """The sum of each text's rows of a table (R, any), over the root of its number of n-grams: (N, any)."""
        return F.embedding_bag(self.grams, table, self.text_starts, mode="sum") * self.root

    def logits(self, scale: float, free: Tensor, linear: Tensor, of_met: Tensor, bias: Tensor) -> Tensor:
        """The logits (N, C). `scale` is that of the embeddings."""
        table = free.clone()
        for (which, vectors), function in zip(self.parts, linear, strict=True):
            table[which] += vectors @ (scale * function)
        return self.sums(table) + self.met @ of_met + bias

    def gradients(self, scale: float, error: Tensor) -> list[Tensor]:
        """The weights' gradients, where `error` (N, C) is that of the logits. By hand, which is four times as fast."""
        of_free = F.embedding_bag(self.texts, error * self.root, self.gram_starts, mode="sum")  # (R, C)
        of_linear = scale * torch.stack([vectors.T @ of_free[which] for which, vectors in self.parts])
        return [of_free, of_linear, self.met.T @ error, error.sum(0)]

    def units(self, scale: float, C: int) -> list[Tensor]:
        """For each weight the unit, or for `linear` a matrix (D+1, D+1), in which the loss has a curvature of about 1.

        The curvature is that of the penalty, and of the features' squares times 1 / C, which all classes have at first.
        """
        N, weigh = len(self.met), lambda squares: squares / (C * N) + 1 / (STRENGTH * N)
        of_linear = []
        for which, vectors in self.parts:
            table = torch.zeros(len(self.used), vectors.shape[1])
            table[which] = scale * vectors
            features = self.sums(table)  # (N, D+1)
            squares, axes = torch.linalg.eigh(features.T @ features)
            of_linear.append(axes * weigh(squares.clamp(min=0)).rsqrt() @ axes.T)
        of_free = F.embedding_bag(self.texts, self.root.square(), self.gram_starts, mode="sum")  # (R, 1)
        return [weigh(of_free).rsqrt(), torch.stack(of_linear), torch.tensor(C**0.5), torch.tensor(C**0.5)]


def fit_weights(features: Features, scale: float, targets: Tensor, bar) -> list[Tensor]:
    """The weights with the least mean cross-entropy and penalty. `targets` (N, C); rows of zeros do not count."""
    (N, C), R, parts, D1 = targets.shape, len(features.used), len(features.parts), features.known.shape[1]
    steps = MANY_ITERATIONS if C > MANY else ITERATIONS
    units = features.units(scale, C) if C > MANY else [torch.tensor(1.0)] * 4
    shapes = [(R, C), (parts, D1, C), (features.met.shape[1], C), (C,)]
    found, end = [torch.zeros(shape) for shape in shapes], bar.n + steps  # the weights in these units

    def times_units(values: list[Tensor]) -> list[Tensor]:
        return [unit @ value if unit.ndim == 3 else unit * value for unit, value in zip(units, values, strict=True)]

    def loss() -> Tensor:
        bar.update(bar.n < end)  # a step may ask for the loss twice
        *penalised, _ = weights = times_units(found)
        said = features.logits(scale, *weights).log_softmax(-1)
        error = (said.exp() * targets.sum(1, keepdim=True) - targets) / N  # of the logits
        gradients = features.gradients(scale, error)
        for gradient, weight in zip(gradients, penalised, strict=False):
            gradient += weight / (STRENGTH * N)
        for value, gradient in zip(found, times_units(gradients), strict=True):
            value.grad = gradient
        squares = sum(weight.square().sum() for weight in penalised)
        return squares / (2 * STRENGTH * N) - (targets * said).sum(1).mean()

    settings = {"max_iter": steps, "history_size": 10, "tolerance_grad": 1e-6}
    torch.optim.LBFGS(found, line_search_fn="strong_wolfe", **settings).step(loss)
    bar.update(end - bar.n)
    return times_units(found)


@torch.no_grad()
def fit_ngrams(exit: NgramExit, batches: Sequence, targets: Tensor, embeddings: Tensor) -> float:
    """Fill the buffers, in place, by L-BFGS on the CPU. Returns the scale that cross-validation chose.

    Args:
        batches: (input_ids, attention_mask, token_type_ids) of all N texts, in the order of `targets`.
        targets: labels (N,), or probabilities (N, C), each row multiplied by its weight.
        embeddings: the pre-trained word embeddings (V, D), in float32.
    """
    N, C = len(targets), len(exit.bias)
    if exit.pairs:
        compare_words(exit, batches, embeddings)
    features = Features(exit, batches, embeddings)
    # A text without a known word has zeros, whatever is fitted.
    targets = (targets if targets.ndim == 2 else F.one_hot(targets, C).float()) * features.has_words
    fold = torch.randperm(N, generator=torch.Generator().manual_seed(0)) % FOLDS  # (N,)
    held_out = [fold == n for n in range(min(FOLDS, -(-ENOUGH * FOLDS // N)))]  # two from 1,500 texts, one from 3,000
    LOG.info(f"exit 0: fits {len(features.used):,} n-grams x {C:,} classes to {N:,} texts")

    steps = (len(SCALES) * len(held_out) + 1) * (MANY_ITERATIONS if C > MANY else ITERATIONS)
    with progress(total=steps, desc="exit 0", unit="step") as bar:

        def likelihood(scale: float) -> float:  # the log-likelihood of texts that the fit has not seen
            total = 0.0
            for out in held_out:
                weights = fit_weights(features, scale, targets * ~out[:, None], bar)
                total += float((targets * features.logits(scale, *weights).log_softmax(-1))[out].sum())
            return total

        scale = max(SCALES, key=likelihood)
        free, linear, of_met, bias = fit_weights(features, scale, targets, bar)
    exit.table.zero_()[: exit.token_rows] = scale * (features.known @ linear).flatten(0, 1)
    exit.table[features.used] += free
    if exit.pairs:
        exit.met_weights.copy_(of_met / features.spread[:, None])
    exit.bias.copy_(bias - features.mean / features.spread @ of_met)
    return scale
