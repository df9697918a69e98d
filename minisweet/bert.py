"""BERT's encoder (Devlin et al. 2019, https://arxiv.org/abs/1810.04805), by hand.

Embeddings and L post-norm Transformer layers. There is no pooler here: each exit has its own, see exits.py. What BERT
and DeBERTa share, and the contract that both keep, is in layers.py, where the dimension letters are explained too.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisweet.layers import (
    ALL,
    Dropout,
    TransformerEncoder,
    TransformerLayer,
    check_common,
    check_implemented,
    check_probabilities,
    check_whole,
    padding_bias,
)


@dataclass(frozen=True)
class BertConfig:
    """The keys of config.json that shape a BERT encoder. Defaults are those of the published format.

    Raises ValueError, which names the field, for a value that is not implemented.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    hidden_act: str = "gelu"
    position_embedding_type: str = "absolute"
    is_decoder: bool = False
    add_cross_attention: bool = False
    model_type: ClassVar[str] = "bert"
    pooler_hidden_act: ClassVar[str] = "tanh"
    pooler_dropout: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        check_common(self)
        check_whole(self, "type_vocab_size")
        if self.type_vocab_size < 2:
            raise ValueError(f"type_vocab_size is {self.type_vocab_size}, and must be 2 or more: a pair has two types")
        if self.classifier_dropout is not None:
            check_probabilities(self, ("classifier_dropout",))
        check_implemented(self, "position_embedding_type", ("absolute",))
        check_implemented(self, "is_decoder", (False,))
        check_implemented(self, "add_cross_attention", (False,))

    @property
    def head_dropout(self) -> float:
        """Dropout between an exit's pooler and its classifier."""
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, dropout: Dropout) -> Tensor:
    """Scaled dot-product attention with dropout on its weights: to (B, H, R, d).

    Args:
        query: (B, H, R, d).
        key, value: (B, H, T, d).
        bias: (B, 1, 1, T), what padding adds to the scores.
    """
    if fused_is_faster(key, dropout.training):
        p = dropout.p if dropout.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype), dropout_p=p)
    scores = (query * query.shape[-1] ** -0.5) @ key.mT + bias  # (B, H, R, T)
    return dropout(scores.softmax(-1)) @ value


def fused_is_faster(key: Tensor, training: bool) -> bool:
    """Whether torch's fused attention is. On the CPU it is slow with dropout, and with fewer than some 128 tokens."""
    return key.device.type != "cpu" or not (training or torch.compiler.is_compiling() or key.shape[2] < 128)


class BertLayer(TransformerLayer):
    """Self-attention and a feed-forward block."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, H, T, d)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def look(self, hidden: Tensor, context: tuple[Tensor], rows: slice = ALL) -> tuple[Tensor, ...]:
        """Queries of the tokens `rows` (B, H, R, d), keys and values of all (B, H, T, d), and the padding's bias."""
        if rows == ALL:
            query, key, value = self.query_key_value(hidden).chunk(3, dim=-1)  # (B, T, D) each
        else:
            weight, bias, D = self.query_key_value.weight, self.query_key_value.bias, hidden.shape[-1]
            query = F.linear(hidden[:, rows], weight[:D], bias[:D])  # (B, R, D)
            key, value = F.linear(hidden, weight[D:], bias[D:]).chunk(2, dim=-1)
        return self.heads(query), self.heads(key), self.heads(value), *context

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """See `attention`."""
        return attention(query, key, value, bias, self.attention_dropout)


class BertEncoder(TransformerEncoder):
    """Embeddings and layers of BERT, randomly initialised. `minisweet.load_encoder` fills in a checkpoint's weights."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.draw_weights()

    def embed(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        """The hidden states that enter layer 1.

        Args:
            input_ids: (B, T), int64.
            token_type_ids: (B, T), int64: 0 in the first sentence, 1 in the second.

        Returns:
            The hidden states (B, T, D).

        Raises:
            ValueError: T is more than `max_position_embeddings`.
        """
        T = input_ids.shape[1]
        if T > self.config.max_position_embeddings:
            raise ValueError(f"{T} tokens, but max_position_embeddings is {self.config.max_position_embeddings}")
        hidden = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        hidden = hidden + self.position_embeddings.weight[:T]  # (T, D) is broadcast over the batch
        return self.dropout(self.embedding_norm(hidden))

    def context(self, attention_mask: Tensor) -> tuple[Tensor]:
        """What padding adds to the scores, (B, 1, 1, T), of a mask (B, T): 1 for tokens, 0 for padding."""
        return (padding_bias(attention_mask, self.embedding_norm.weight.dtype),)


def checkpoint_names(num_layers: int) -> dict[str, tuple[str, ...]]:
    """Each parameter of the encoder to its names in a checkpoint, the prefix "bert." and LayerNorm's old names aside.

    Several names are joined along the first dimension.
    """
    names = {f"{part}_embeddings.weight": (f"embeddings.{part}_embeddings.weight",) for part in EMBEDDINGS}
    for kind in ("weight", "bias"):
        names[f"embedding_norm.{kind}"] = (f"embeddings.LayerNorm.{kind}",)
        for n in range(num_layers):
            ours, theirs = f"layers.{n}", f"encoder.layer.{n}"
            parts = tuple(f"{theirs}.attention.self.{part}.{kind}" for part in ("query", "key", "value"))
            names[f"{ours}.query_key_value.{kind}"] = parts
            names[f"{ours}.attention_output.{kind}"] = (f"{theirs}.attention.output.dense.{kind}",)
            names[f"{ours}.attention_norm.{kind}"] = (f"{theirs}.attention.output.LayerNorm.{kind}",)
            names[f"{ours}.intermediate.{kind}"] = (f"{theirs}.intermediate.dense.{kind}",)
            names[f"{ours}.output.{kind}"] = (f"{theirs}.output.dense.{kind}",)
            names[f"{ours}.output_norm.{kind}"] = (f"{theirs}.output.LayerNorm.{kind}",)
    return names


EMBEDDINGS = ("word", "position", "token_type")
# What names in public checkpoints begin with that are dropped on purpose: the heads of pre-training, and a buffer that
# counts 0, 1, 2, ... The pooler is not dropped: each exit head starts from it.
DROPPED = ("cls.", "embeddings.position_ids")
