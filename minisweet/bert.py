"""BERT's encoder (Devlin et al. 2019, https://arxiv.org/abs/1810.04805), by hand.

Embeddings and L post-norm Transformer layers. There is no pooler here: each exit has its own, see exits.py.

The contract that BERT and DeBERTa share, so that nothing above them knows which one it holds:
    encoder(input_ids, attention_mask, token_type_ids)          -> L+1 hidden states
    encoder.embed(input_ids, token_type_ids)                    -> the stream that enters layer 1
    encoder.run_layers(stream, attention_mask, start, stop)     -> the stream that leaves layer `stop`
    encoder.run_exit_layer(stream, attention_mask, n)           -> layer n's first token, and the rest on demand
The stream is the tuple of all that passes from layer to layer. For BERT that is the hidden states alone.

Dimension letters, here and everywhere: B batch, T tokens, D hidden size, H heads, d = D/H head size, L layers,
K exits, C classes, N instances.
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
class BertConfig:
    """The keys of config.json that shape a BERT encoder. Defaults are those of the published format."""

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
        check_config(
            self,
            {
                "hidden_act": ("gelu",),
                "position_embedding_type": ("absolute",),
                "is_decoder": (False,),
                "add_cross_attention": (False,),
            },
        )
        if self.type_vocab_size < 2:
            raise InputError(f"type_vocab_size is {self.type_vocab_size}, and must be 2 or more: a pair has two types")

    @property
    def head_dropout(self) -> float:
        """Dropout between an exit's pooler and its classifier."""
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout


def padding_bias(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask (B, T), 1 for tokens and 0 for padding, to what is added to the scores (B, H, T, T): (B, 1, 1, T)."""
    return (1 - attention_mask[:, None, None, :].to(dtype)) * PADDING_SCORE


class BertLayer(nn.Module):
    """Self-attention and a feed-forward block, each followed by dropout, residual sum and LayerNorm."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.attention_dropout = Dropout(config.attention_probs_dropout_prob)
        self.query_key_value = nn.Linear(D, 3 * D)
        self.attention_output = nn.Linear(D, D)
        self.attention_norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.intermediate = nn.Linear(D, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, D)
        self.output_norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states (B, T, D) to queries, keys and values (B, H, T, d)."""
        projected = self.query_key_value(hidden).unflatten(-1, (3, self.num_heads, -1))  # (B, T, 3, H, d)
        query, key, value = projected.permute(2, 0, 3, 1, 4)  # (B, H, T, d) each
        return query, key, value

    def update(self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """The rest of the layer, for R of the T tokens.

        Args:
            hidden, query: of those tokens, (B, R, D) and (B, H, R, d).
            key, value: of all tokens, (B, H, T, d).
            bias: (B, 1, 1, T), what padding adds to the scores.

        Returns:
            Their hidden states (B, R, D) after the layer.
        """
        # On the CPU torch's attention is slow with dropout, and up to twice as slow without on short sentences.
        if hidden.device.type == "cpu" and (self.training or key.shape[2] < 128):
            scores = (query * (query.shape[-1] ** -0.5)) @ key.mT + bias  # (B, H, R, T)
            context = self.attention_dropout(scores.softmax(-1)) @ value  # (B, H, R, d)
        else:
            p = self.attention_dropout.p if self.training else 0.0
            context = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=p)
        context = context.transpose(1, 2).flatten(2)  # (B, R, D)
        hidden = self.attention_norm(hidden + self.dropout(self.attention_output(context)))
        return self.output_norm(hidden + self.dropout(self.output(F.gelu(self.intermediate(hidden)))))

    def forward(self, hidden: Tensor, bias: Tensor) -> Tensor:
        """One layer: hidden (B, T, D) and the padding's bias (B, 1, 1, T) to hidden (B, T, D)."""
        return self.update(hidden, *self.project(hidden), bias)


class BertEncoder(nn.Module):
    """Embeddings and layers of BERT, randomly initialised. `minisweet.load_encoder` fills in a checkpoint's weights."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.pooler_start: tuple[Tensor, Tensor] | None = None  # weight and bias that exit heads start from
        D = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, D)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, D)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, D)
        self.embedding_norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=config.initializer_range)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def embed(self, input_ids: Tensor, token_type_ids: Tensor) -> tuple[Tensor]:
        """The stream that enters layer 1.

        Args:
            input_ids: (B, T), int64.
            token_type_ids: (B, T), int64: 0 in the first sentence, 1 in the second.

        Returns:
            The hidden states (B, T, D), in a tuple.

        Raises:
            ValueError: T is more than `max_position_embeddings`.
        """
        T = input_ids.shape[1]
        if T > self.config.max_position_embeddings:
            raise ValueError(f"{T} tokens, but max_position_embeddings is {self.config.max_position_embeddings}")
        hidden = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        hidden = hidden + self.position_embeddings.weight[:T]  # (T, D) is broadcast over the batch
        return (self.dropout(self.embedding_norm(hidden)),)

    def run_layers(self, stream: tuple[Tensor], attention_mask: Tensor, start: int, stop: int) -> tuple[Tensor]:
        """Run the layers start+1 to stop, counted from 1: the stream after `start` layers to that after `stop`.

        Args:
            stream: the hidden states (B, T, D), in a tuple.
            attention_mask: (B, T): 1 for tokens, 0 for padding.
            start, stop: 0 <= start <= stop <= L.
        """
        (hidden,) = stream
        bias = padding_bias(attention_mask, hidden.dtype)  # (B, 1, 1, T)
        for layer in self.layers[start:stop]:
            hidden = layer(hidden, bias)
        return (hidden,)

    def run_exit_layer(
        self, stream: tuple[Tensor], attention_mask: Tensor, n: int
    ) -> tuple[Tensor, Callable[..., tuple[Tensor]]]:
        """Run layer n, counted from 1, for the first token alone, which is all that an exit reads.

        The other tokens need only be projected for that: a quarter of the layer's products.

        Args:
            stream: the hidden states (B, T, D) after layer n-1, in a tuple.
            attention_mask: (B, T): 1 for tokens, 0 for padding.
            n: 1 to L.

        Returns:
            The first token's hidden states (B, 1, D) after the layer, and a function that runs the other tokens and
            returns the stream after the layer. Its argument tells who of the batch goes on, (B,) bool; default: all.
        """
        (hidden,), layer = stream, self.layers[n - 1]
        bias = padding_bias(attention_mask, hidden.dtype)
        query, key, value = layer.project(hidden)
        first = layer.update(hidden[:, :1], query[:, :, :1], key, value, bias)

        def finish(keep: Tensor | slice = slice(None)) -> tuple[Tensor]:  # noqa: B008
            others = layer.update(hidden[keep, 1:], query[keep, :, 1:], key[keep], value[keep], bias[keep])
            return (torch.cat([first[keep], others], dim=1),)

        return first, finish

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, ...]:
        """All hidden states: L+1 tensors (B, T, D), the embeddings first. Arguments: see `embed`, `run_layers`."""
        streams = [self.embed(input_ids, token_type_ids)]
        for n in range(len(self.layers)):
            streams.append(self.run_layers(streams[-1], attention_mask, n, n + 1))
        return tuple(hidden for (hidden,) in streams)


# Where a checkpoint holds each of the parameters above, the prefix "bert." and LayerNorm's old names aside. {n} counts
# layers from 0. Several names are joined along the first dimension.
CHECKPOINT_NAMES = {
    "word_embeddings.weight": ("embeddings.word_embeddings.weight",),
    "position_embeddings.weight": ("embeddings.position_embeddings.weight",),
    "token_type_embeddings.weight": ("embeddings.token_type_embeddings.weight",),
    "embedding_norm.*": ("embeddings.LayerNorm.*",),
    "layers.{n}.query_key_value.*": tuple(
        f"encoder.layer.{{n}}.attention.self.{part}.*" for part in ("query", "key", "value")
    ),
    "layers.{n}.attention_output.*": ("encoder.layer.{n}.attention.output.dense.*",),
    "layers.{n}.attention_norm.*": ("encoder.layer.{n}.attention.output.LayerNorm.*",),
    "layers.{n}.intermediate.*": ("encoder.layer.{n}.intermediate.dense.*",),
    "layers.{n}.output.*": ("encoder.layer.{n}.output.dense.*",),
    "layers.{n}.output_norm.*": ("encoder.layer.{n}.output.LayerNorm.*",),
}

# What public checkpoints hold beside the encoder, dropped on purpose: the heads of pre-training, and a buffer that
# counts 0, 1, 2, ... The pooler is not dropped: each exit head starts from it.
DROPPED = ("cls.*", "embeddings.position_ids")
