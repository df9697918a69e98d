"""Exit 0: what words and pairs of words say by themselves, before the embeddings and at the cost of no layer.

It is a bag of words and word pairs with pre-trained embeddings, and for pairs of texts how well each text's words are
met in the other. The base is fastText (Joulin et al. 2017, https://arxiv.org/abs/1607.01759) without its hidden layer:
a table has a row of C numbers for each token and for each pair of neighbours, and a text's logits are the sum of its
n-grams' rows over the root of their number, plus a bias. In a pair of texts, a token that occurs in both texts uses a
second row, since a pair is mostly about what its texts share. A pair also has two numbers with weights of their own:
how well each text is met in the other one, by other words too (Corley and Mihalcea 2005,
https://aclanthology.org/W05-1203). See `NgramExit.find_met`. How all this is fitted stands in ngram_fit.py.

Letters: B batch, T tokens, V vocabulary, C classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BUCKETS = 2**16  # rows for all pairs of neighbours, which are hashed
FIRST, SECOND, SHARED, PRIME = 1640531513, 1103515245, 1234567891, 2**31 - 1  # a linear hash (Carter and Wegman 1979)
COMPONENTS = 32  # principal components of the embeddings, by which words of a pair are compared; 64 are no better


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
