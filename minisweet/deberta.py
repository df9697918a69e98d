"""DeBERTa's encoder (He et al. 2020, https://arxiv.org/abs/2006.03654), by hand: the first version, of 2020.

Disentangled attention (their Eq. 4): a token's content attends to content and to relative position (c2p), and relative
position attends to content (p2c). With delta(i, j) = clamp(i - j + k, 0, 2k - 1), the score of query i on key j is
    (q_i . k_j  +  q_i . K_delta(i,j)  +  k_j . Q_delta(i,j)) / sqrt(d (1 + number of position terms))
where K and Q are projections of one table of 2k relative positions, which all layers share. (The paper's Eq. 4 has
Q_delta(j,i). The public weights were trained with delta(i,j) in both terms, so that is what is right here.) There are
no absolute positions and no token types at the input. There is no pooler here: each exit has its own, see exits.py.

The contract that BERT and DeBERTa share is in bert.py. DeBERTa's stream is (hidden states, relative table): the table
passes from layer to layer beside the hidden states, so that what happens at a segment's boundary happens to both.

Dimension letters: B batch, T tokens, D hidden size, H heads, d = D/H head size, L layers, k relative span.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisweet.config import check_config
from minisweet.files.safe import InputError
from minisweet.layers import Dropout

# Added to the attention scores of padding. exp() makes it 0 against any real score, and it fits float16 too. It is
# not -inf, so that a row of nothing but padding still has a softmax.
PADDING_SCORE = -3e4


@dataclass(frozen=True)
class DebertaConfig:
    """The keys of config.json that shape a DeBERTa encoder. Defaults are those of the published format."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    pos_att_type: str | list[str] | tuple[str, ...]  # "c2p|p2c", or a list
    relative_attention: bool
    position_biased_input: bool
    max_relative_positions: int | None = -1  # below 1: max_position_embeddings (not `int`, which must be positive)
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    pooler_dropout: float = 0.0
    cls_dropout: float | None = None
    layer_norm_eps: float = 1e-7
    initializer_range: float = 0.02
    pooler_hidden_act: str = "gelu"
    hidden_act: str = "gelu"
    talking_head: bool = False
    share_att_key: bool = False  # this and the next two belong to DeBERTa's second version
    norm_rel_ebd: str = "none"
    position_buckets: int = -1
    type_vocab_size: int = 0
    embedding_size: int | None = None
    pooler_hidden_size: int | None = None
    model_type: ClassVar[str] = "deberta"

    def __post_init__(self) -> None:
        terms = self.pos_att_type if isinstance(self.pos_att_type, list | tuple) else str(self.pos_att_type).split("|")
        object.__setattr__(self, "pos_att_type", tuple(sorted(terms, key=str)))
        if type(self.max_relative_positions) is not int:
            raise InputError(f"max_relative_positions is {self.max_relative_positions!r}, and must be a whole number")
        check_config(
            self,
            {
                "hidden_act": ("gelu",),
                "pooler_hidden_act": ("gelu", "tanh"),
                "pos_att_type": (("c2p", "p2c"), ("c2p",), ("p2c",)),
                "relative_attention": (True,),
                "position_biased_input": (False,),
                "talking_head": (False,),
                "share_att_key": (False,),
                "norm_rel_ebd": ("none",),
                "position_buckets": (-1,),
                "type_vocab_size": (0,),
                "embedding_size": (None, self.hidden_size),
                "pooler_hidden_size": (None, self.hidden_size),
            },
        )

    @property
    def relative_span(self) -> int:
        """k: distances i - j are told apart from -k to k - 1, and clamped beyond."""
        return self.max_relative_positions if self.max_relative_positions >= 1 else self.max_position_embeddings

    @property
    def head_dropout(self) -> float:
        """Dropout between an exit's pooler and its classifier."""
        return self.hidden_dropout_prob if self.cls_dropout is None else self.cls_dropout


def skew(scores: Tensor, column: int) -> Tensor:
    """Read scores per distance as scores per token: (..., T, 2T) to (..., T, T), out[i, j] = scores[i, column + j - i].

    For T = 3 and column 2 these are the marked ones, and they start 2T - 1 = 5 numbers apart in memory:
        . . x x x .
        . x x x . .
        x x x . . .
    So the answer is a view of the same memory, without an index tensor and a gather. `column` is T - 1 or T.
    """
    T = scores.shape[-2]
    return scores.flatten(-2)[..., column : column + T * (2 * T - 1)].unflatten(-1, (T, 2 * T - 1))[..., :T]


class DebertaLayer(nn.Module):
    """Disentangled self-attention and a feed-forward block, each with dropout, residual sum and LayerNorm."""

    def __init__(self, config: DebertaConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.scale = (D // self.num_heads * (1 + len(config.pos_att_type))) ** -0.5
        self.in_proj = nn.Linear(D, 3 * D, bias=False)  # rows ordered by head: q, k, v of the first, of the second, ...
        self.q_bias = nn.Parameter(torch.zeros(D))
        self.v_bias = nn.Parameter(torch.zeros(D))
        self.pos_proj = nn.Linear(D, D, bias=False) if "c2p" in config.pos_att_type else None
        self.pos_q_proj = nn.Linear(D, D) if "p2c" in config.pos_att_type else None
        self.attention_output = nn.Linear(D, D)
        self.attention_norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.intermediate = nn.Linear(D, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, D)
        self.output_norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.attention_dropout = Dropout(config.attention_probs_dropout_prob)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def heads(self, x: Tensor) -> Tensor:
        """(..., T, D) to (..., H, T, d)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)

    def attend(self, hidden: Tensor, bias: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Who looks at whom, and at what.

        Args:
            hidden: (B, T, D).
            bias: (B, 1, 1, T), what padding adds to the scores.
            positions: (2T, D), the rows of the relative table for the distances i - j from T-1 down to -T.

        Returns:
            The scores of queries on keys (B, H, T, T), and the values (B, H, T, d).
        """
        T = hidden.shape[1]
        query, key, value = self.heads(self.in_proj(hidden)).chunk(3, dim=-1)  # (B, H, T, d) each
        query = (query + self.q_bias.view(self.num_heads, 1, -1)) * self.scale
        value = value + self.v_bias.view(self.num_heads, 1, -1)
        positions = self.dropout(positions)
        scores = query @ key.mT + bias  # (B, H, T, T)
        if self.pos_proj is not None:
            pos_key = self.heads(self.pos_proj(positions))  # (H, 2T, d)
            scores = scores + skew(query @ pos_key.mT, T - 1)
        if self.pos_q_proj is not None:
            # Here rows are keys j: column T + i - j of row j is the distance i - j, and .mT puts it at [i, j].
            pos_query = self.heads(self.pos_q_proj(positions.flip(0))) * self.scale  # (H, 2T, d), from -T to T-1
            scores = scores + skew(key @ pos_query.mT, T).mT
        return scores, value

    def update(self, hidden: Tensor, scores: Tensor, value: Tensor) -> Tensor:
        """The rest of the layer, for R of the T tokens: hidden (B, R, D) before it to hidden (B, R, D) after it.

        Their scores are (B, H, R, T), the values of all tokens (B, H, T, d).
        """
        weights = self.attention_dropout(scores.softmax(-1))
        context = (weights.to(value.dtype) @ value).transpose(1, 2).flatten(2)  # (B, R, D)
        hidden = self.attention_norm(hidden + self.dropout(self.attention_output(context)))
        return self.output_norm(hidden + self.dropout(self.output(F.gelu(self.intermediate(hidden)))))

    def forward(self, hidden: Tensor, bias: Tensor, positions: Tensor) -> Tensor:
        """One layer: hidden (B, T, D) to hidden (B, T, D). For the arguments see `attend`."""
        return self.update(hidden, *self.attend(hidden, bias, positions))


class DebertaEncoder(nn.Module):
    """Embeddings, relative table and layers of DeBERTa, randomly initialised.

    `minisweet.load_encoder` fills in a checkpoint's weights.
    """

    def __init__(self, config: DebertaConfig) -> None:
        super().__init__()
        self.config = config
        self.pooler_start: tuple[Tensor, Tensor] | None = None  # weight and bias that exit heads start from
        D = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, D)
        self.embedding_norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.relative_table = nn.Embedding(2 * config.relative_span, D)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(DebertaLayer(config) for _ in range(config.num_hidden_layers))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def embed(self, input_ids: Tensor, token_type_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The stream that enters layer 1.

        Args:
            input_ids: (B, T), int64.
            token_type_ids: not read, since DeBERTa has no token types.

        Returns:
            The hidden states (B, T, D) and the relative table (2k, D).
        """
        return self.dropout(self.embedding_norm(self.word_embeddings(input_ids))), self.relative_table.weight

    def run_layers(
        self, stream: tuple[Tensor, Tensor], attention_mask: Tensor, start: int, stop: int
    ) -> tuple[Tensor, Tensor]:
        """Run the layers start+1 to stop, counted from 1: the stream after `start` layers to that after `stop`.

        Args:
            stream: the hidden states (B, T, D) and the relative table (2k, D).
            attention_mask: (B, T): 1 for tokens, 0 for padding.
            start, stop: 0 <= start <= stop <= L.
        """
        hidden, table = stream
        bias, positions = self.surroundings(stream, attention_mask)
        for layer in self.layers[start:stop]:
            hidden = layer(hidden, bias, positions)
        return hidden, table

    def run_exit_layer(
        self, stream: tuple[Tensor, Tensor], attention_mask: Tensor, n: int
    ) -> tuple[Tensor, Callable[..., tuple[Tensor, Tensor]]]:
        """Run layer n, counted from 1, for the first token alone, which is all that an exit reads.

        The other tokens need only be projected and compared for that: some third of the layer's products.

        Args:
            stream: the hidden states (B, T, D) after layer n-1, and the relative table (2k, D).
            attention_mask: (B, T): 1 for tokens, 0 for padding.
            n: 1 to L.

        Returns:
            The first token's hidden states (B, 1, D) after the layer, and a function that runs the other tokens and
            returns the stream after the layer. Its argument tells who of the batch goes on, (B,) bool; default: all.
        """
        (hidden, table), layer = stream, self.layers[n - 1]
        scores, value = layer.attend(hidden, *self.surroundings(stream, attention_mask))
        first = layer.update(hidden[:, :1], scores[:, :, :1], value)

        def finish(keep: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:  # noqa: B008
            others = layer.update(hidden[keep, 1:], scores[keep, :, 1:], value[keep])
            return torch.cat([first[keep], others], dim=1), table

        return first, finish

    def surroundings(self, stream: tuple[Tensor, Tensor], attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """What a layer reads beside the hidden states: the padding's bias (B, 1, 1, T) and the positions (2T, D)."""
        (hidden, table), k = stream, self.config.relative_span
        T = hidden.shape[1]
        bias = (1 - attention_mask[:, None, None, :].to(hidden.dtype)) * PADDING_SCORE  # (B, 1, 1, T)
        # Of the 2k rows, T tokens reach 2T - 1. One more, never read, gives skew() rows of the right length.
        distance = T - 1 - torch.arange(2 * T, device=hidden.device)
        return bias, table[(distance + k).clamp(0, 2 * k - 1)]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, ...]:
        """All hidden states: L+1 tensors (B, T, D), the embeddings first. Arguments: see `embed`, `run_layers`."""
        streams = [self.embed(input_ids, token_type_ids)]
        for n in range(len(self.layers)):
            streams.append(self.run_layers(streams[-1], attention_mask, n, n + 1))
        return tuple(hidden for hidden, _ in streams)


# Where a checkpoint holds each of the parameters above, the prefix "deberta." and LayerNorm's old names aside. {n}
# counts layers from 0.
CHECKPOINT_NAMES = {
    "word_embeddings.weight": ("embeddings.word_embeddings.weight",),
    "embedding_norm.*": ("embeddings.LayerNorm.*",),
    "relative_table.weight": ("encoder.rel_embeddings.weight",),
    "layers.{n}.in_proj.weight": ("encoder.layer.{n}.attention.self.in_proj.weight",),
    "layers.{n}.q_bias": ("encoder.layer.{n}.attention.self.q_bias",),
    "layers.{n}.v_bias": ("encoder.layer.{n}.attention.self.v_bias",),
    "layers.{n}.pos_proj.*": ("encoder.layer.{n}.attention.self.pos_proj.*",),
    "layers.{n}.pos_q_proj.*": ("encoder.layer.{n}.attention.self.pos_q_proj.*",),
    "layers.{n}.attention_output.*": ("encoder.layer.{n}.attention.output.dense.*",),
    "layers.{n}.attention_norm.*": ("encoder.layer.{n}.attention.output.LayerNorm.*",),
    "layers.{n}.intermediate.*": ("encoder.layer.{n}.intermediate.dense.*",),
    "layers.{n}.output.*": ("encoder.layer.{n}.output.dense.*",),
    "layers.{n}.output_norm.*": ("encoder.layer.{n}.output.LayerNorm.*",),
}

# What public checkpoints hold beside the encoder, dropped on purpose: the heads of pre-training, absolute positions
# that only the decoder of pre-training read, and a buffer that counts 0, 1, 2, ...
DROPPED = (
    "cls.*",
    "lm_predictions.*",
    "mask_predictions.*",
    "embeddings.position_embeddings.weight",
    "embeddings.position_ids",
)
