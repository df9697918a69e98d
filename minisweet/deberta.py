"""DeBERTa's encoder (He et al. 2020, https://arxiv.org/abs/2006.03654), by hand: the first version, of 2020.

Disentangled attention (their Eq. 4): a token's content attends to content and to relative position (c2p), and relative
position attends to content (p2c). With delta(i, j) = clamp(i - j + k, 0, 2k - 1), the score of query i on key j is
    (q_i . k_j  +  q_i . K_delta(i,j)  +  k_j . Q_delta(i,j)) / sqrt(d (1 + number of position terms))
where K and Q are projections of one table of 2k relative positions, which all layers share. (The paper's Eq. 4 has
Q_delta(j,i). The public weights were trained with delta(i,j) in both terms, so that is what is right here.) There are
no absolute positions and no token types at the input. There is no pooler here: each exit has its own, see exits.py.

What BERT and DeBERTa share, and the contract that both keep, is in layers.py. DeBERTa's context holds the rows of the
relative table, so that what happens to the context at an exit happens to the table.

Dimension letters: B batch, T tokens, D hidden size, H heads, d = D/H head size, k relative span.
"""

import torch
from torch import Tensor, nn

from minisweet.config import DebertaConfig
from minisweet.layers import TransformerEncoder, TransformerLayer, padding_bias


def skew(scores: Tensor, column: int) -> Tensor:
    """Scores per distance as scores per token: (..., T, 2T) to (..., T, T), out[i, j] = scores[i, column + j - i].

    `column` is T - 1 or T. For T = 3 and column 2 the answer is the marked numbers, whose rows start 2T - 1 = 5 apart
    in memory, so it is a view, without an index tensor and a gather:
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
        self.scale = (D // self.num_heads * (1 + len(config.pos_att_type.split("|")))) ** -0.5
        self.in_proj = nn.Linear(D, 3 * D, bias=False)  # rows ordered by head: q, k, v of the first, of the second, ...
        self.q_bias = nn.Parameter(torch.zeros(D))
        self.v_bias = nn.Parameter(torch.zeros(D))
        self.pos_proj = nn.Linear(D, D, bias=False) if "c2p" in config.pos_att_type else None
        self.pos_q_proj = nn.Linear(D, D) if "p2c" in config.pos_att_type else None

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled queries, keys and values, (B, H, T, d) each."""
        query, key, value = self.split_heads(self.in_proj(hidden)).chunk(3, dim=-1)
        query = (query + self.q_bias.view(self.num_heads, 1, -1)) * self.scale
        return query, key, value + self.v_bias.view(self.num_heads, 1, -1)

    def attend(self, hidden: Tensor, context: tuple[Tensor, Tensor]) -> Tensor:
        """Disentangled attention. The context holds what padding adds to the scores, (B, 1, 1, T), and the rows of the
        relative table for the distances i - j from T-1 down to -T: (2T, D).
        """
        bias, positions = context
        T = hidden.shape[1]
        query, key, value = self.project(hidden)
        positions = self.dropout(positions)
        scores = query @ key.mT + bias  # (B, H, T, T)
        if self.pos_proj is not None:
            pos_key = self.split_heads(self.pos_proj(positions))  # (H, 2T, d), from T-1 down to -T
            scores = scores + skew(query @ pos_key.mT, T - 1)
        if self.pos_q_proj is not None:
            pos_query = self.split_heads(self.pos_q_proj(positions)) * self.scale  # (H, 2T, d), from T-1 down to -T
            # Rows are keys j here, distances go up: column T + i - j of row j is i - j, and .mT puts it at [i, j].
            scores = scores + skew(key @ pos_query.flip(1).mT, T).mT
        return self.attention_dropout(scores.softmax(-1)).to(value.dtype) @ value

    def projections(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """See the base class."""
        weights = self.in_proj.weight.unflatten(0, (self.num_heads, 3, -1))  # (H, 3, d, D)
        return *weights.unbind(1), *(bias.view(self.num_heads, 1, -1) for bias in (self.q_bias, self.v_bias))

    def cls_scores(self, query: Tensor, Wk: Tensor, hidden: Tensor, context: tuple[Tensor, Tensor]) -> Tensor:
        """The terms of `attend` for i = 0, which meets the distances 0 - j: from 0 down to -(T-1)."""
        (bias, positions), T = context, hidden.shape[1]
        positions = self.dropout(positions)[T - 1 : 2 * T - 1]
        scores = bias[:, 0]  # (B, 1, T)
        if self.pos_proj is not None:
            scores = scores + (query @ self.split_heads(self.pos_proj(positions)).mT).transpose(0, 1)
        if self.pos_q_proj is not None:
            pos_query = self.split_heads(self.pos_q_proj(positions)) * self.scale  # (H, T, d)
            asks = (pos_query @ Wk).permute(1, 2, 0)  # (T, D, H): p_j . (Wk h_j) = (Wk^T p_j) . h_j
            scores = scores + (hidden.transpose(0, 1) @ asks).permute(1, 2, 0)
        return scores


class DebertaEncoder(TransformerEncoder):
    """Embeddings, relative table and layers of DeBERTa, randomly initialised.

    `minisweet.load_encoder` fills in a checkpoint's weights.
    """

    def __init__(self, config: DebertaConfig) -> None:
        super().__init__(config)
        self.relative_table = nn.Embedding(2 * config.max_relative_positions, config.hidden_size)
        self.layers = nn.ModuleList(DebertaLayer(config) for _ in range(config.num_hidden_layers))
        self.draw_weights()

    def embed(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        """The hidden states (B, T, D) that enter layer 1, of ids (B, T). DeBERTa has no token types and reads none."""
        return self.dropout(self.embedding_norm(self.word_embeddings(input_ids)))

    def context(self, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """What padding adds to the scores, (B, 1, 1, T), and the positions (2T, D), of a mask (B, T)."""
        T, k = attention_mask.shape[1], self.config.max_relative_positions
        # Of the 2k rows, T tokens reach 2T - 1. One more, never read, gives skew() rows of the right length.
        distance = T - 1 - torch.arange(2 * T, device=attention_mask.device)
        table = self.relative_table.weight
        return padding_bias(attention_mask, table.dtype), table[(distance + k).clamp(0, 2 * k - 1)]
