"""DeBERTa's encoder (He et al. 2020, https://arxiv.org/abs/2006.03654), by hand. This is version 1.

Disentangled attention (their Eq. 4): the content of a token attends to content and to relative position (c2p), and
relative position attends to content (p2c). With delta(i, j) = clamp(i - j + k, 0, 2k - 1), the score of query i on key
j is
    (q_i . k_j  +  q_i . K_delta(i,j)  +  k_j . Q_delta(i,j)) / sqrt(3 d)
where K and Q are projections of one table of 2k relative positions that all layers share. (Eq. 4 has Q_delta(j,i), but
the public weights were trained with delta(i,j) in both terms.) There are no absolute positions and no token types.

layers.py has what all encoders share. The relative table is part of the context: where the gradient of the context
stops, it stops for the table too.

Dimension letters: B batch, T tokens, D hidden size, H heads, d = D/H head size, k relative span.
"""

import torch
from torch import Tensor, nn

from minisweet.config import DebertaConfig
from minisweet.layers import TransformerEncoder, TransformerLayer, draw_weights, padding_bias


def skew(scores: Tensor, column: int) -> Tensor:
    """Turn scores per distance into scores per token: (..., T, 2T) to (..., T, T).

    Element [i, j] of the result is scores[i, column + j - i], where `column` is T - 1 or T. For T = 3 and column 2
    these are the marked elements. Their rows start 2T - 1 = 5 elements apart in memory, so the result is a view of the
    scores. (A gather would take longer than the matrix products.)
        . . x x x .
        . x x x . .
        x x x . . .
    """
    T = scores.shape[-2]
    return scores.flatten(-2)[..., column : column + T * (2 * T - 1)].unflatten(-1, (T, 2 * T - 1))[..., :T]


class DebertaLayer(TransformerLayer):
    """Disentangled self-attention and a feed-forward block."""

    def __init__(self, config: DebertaConfig) -> None:
        super().__init__(config)
        D = config.hidden_size
        self.scale = (3 * (D // self.num_heads)) ** -0.5
        self.in_proj = nn.Linear(D, 3 * D, bias=False)  # rows ordered by head: q, k, v of the first, of the second, ...
        self.q_bias = nn.Parameter(torch.zeros(D))
        self.v_bias = nn.Parameter(torch.zeros(D))
        self.pos_proj = nn.Linear(D, D, bias=False)
        self.pos_q_proj = nn.Linear(D, D)

    def attend(self, hidden: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        """Disentangled attention: hidden states (B, T, D) to the heads' outputs (B, H, T, d).

        The context is the bias of the scores for padding, (B, 1, 1, T), and the rows of the relative table for the
        distances i - j from T-1 down to -T, (2T, D).
        """
        bias, positions = context
        T = hidden.shape[1]
        positions = self.dropout(positions)
        query, key, value = self.split_heads(self.in_proj(hidden)).chunk(3, dim=-1)  # (B, H, T, d) each
        query = (query + self.q_bias.view(self.num_heads, 1, -1)) * self.scale
        value = value + self.v_bias.view(self.num_heads, 1, -1)
        pos_key = self.split_heads(self.pos_proj(positions))  # (H, 2T, d)
        pos_query = self.split_heads(self.pos_q_proj(positions)) * self.scale  # (H, 2T, d)
        c2p = skew(query @ pos_key.mT, T - 1)  # (B, H, T, T)
        # Rows are keys here. flip() makes distances increase along a row, so that column T + i - j of row j has
        # distance i - j, and .mT puts this score at [i, j].
        p2c = skew(key @ pos_query.flip(1).mT, T).mT  # (B, H, T, T)
        scores = query @ key.mT + bias + c2p + p2c  # (B, H, T, T)
        return self.attention_dropout(scores.softmax(-1)).to(value.dtype) @ value


class DebertaEncoder(TransformerEncoder):
    """Embeddings, relative table and layers of DeBERTa, randomly initialized."""

    def __init__(self, config: DebertaConfig) -> None:
        super().__init__(config)
        self.relative_table = nn.Embedding(2 * config.relative_span, config.hidden_size)
        self.layers = nn.ModuleList(DebertaLayer(config) for _ in range(config.num_hidden_layers))
        draw_weights(self, config.initializer_range)

    def embed(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        """The input of layer 1 (B, T, D), from ids (B, T). DeBERTa has no token types and ignores them."""
        return self.dropout(self.embedding_norm(self.word_embeddings(input_ids)))

    def context(self, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """The bias of the scores (B, 1, 1, T) and the relative positions (2T, D), from a mask (B, T)."""
        T, k = attention_mask.shape[1], self.relative_table.num_embeddings // 2
        # T tokens have 2T - 1 distances. One more, which is never read, makes the rows of skew() 2T long.
        distance = T - 1 - torch.arange(2 * T, device=attention_mask.device)
        table = self.relative_table.weight
        return padding_bias(attention_mask, table.dtype), table[(distance + k).clamp(0, 2 * k - 1)]
