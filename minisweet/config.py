"""The configs of the encoders: the keys of config.json that define an encoder, with the defaults of the public format.

A value that a `Literal` does not list is refused, because ignoring it would silently build another model.
"""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args

Pooling = Literal["cls", "mean"]  # what exits read; another one is a name here and a case of `pool` in exits.py
POOLINGS = get_args(Pooling)


def size(low: int = 1, high: int = 10**6) -> Any:
    """A field without a default, from `low` to `high`."""
    return field(metadata={"range": (low, high)})


def share(default: float | None) -> Any:
    """A field from 0 to 1. None is allowed if it is the default."""
    return field(default=default, metadata={"range": (0, 1)})


@dataclass(frozen=True, kw_only=True)
class Config:
    """The keys that all encoders share. Raises ValueError for a value out of range."""

    vocab_size: int = size()
    hidden_size: int = size()
    num_hidden_layers: int = size(1, 1000)
    num_attention_heads: int = size()
    intermediate_size: int = size()
    max_position_embeddings: int = size()
    type_vocab_size: int = size()
    hidden_dropout_prob: float = share(0.1)
    attention_probs_dropout_prob: float = share(0.1)
    layer_norm_eps: float = share(1e-12)
    initializer_range: float = share(0.02)
    hidden_act: Literal["gelu"] = "gelu"
    is_decoder: Literal[False] = False
    pooling: Pooling = "cls"
    first_position: ClassVar[int] = 0
    model_type: ClassVar[str]

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            low, high = item.metadata.get("range", (None, None))
            if None not in (value, low) and not low <= value <= high:
                raise ValueError(f"{item.name} is {value}, should be from {low} to {high}")
        D, H = self.hidden_size, self.num_attention_heads
        if D % H:
            raise ValueError(f"hidden_size is {D}, should be a multiple of num_attention_heads, {H}")

    @property
    def pooler_hidden_act(self) -> str:
        """The activation of an exit's pooler."""
        return "tanh"

    @property
    def pooler_dropout(self) -> float:
        """The dropout probability before an exit's pooler."""
        return 0.0

    @property
    def head_dropout(self) -> float:
        """The dropout probability between an exit's pooler and its classifier."""
        own = getattr(self, "classifier_dropout" if self.model_type == "bert" else "cls_dropout", None)
        return self.hidden_dropout_prob if own is None else own

    @property
    def max_tokens(self) -> int:
        """The largest number of tokens of a text."""
        return self.max_position_embeddings - self.first_position


@dataclass(frozen=True, kw_only=True)
class BertConfig(Config):
    """The config of a BERT encoder."""

    classifier_dropout: float | None = share(None)
    position_embedding_type: Literal["absolute"] = "absolute"
    model_type: ClassVar[str] = "bert"


@dataclass(frozen=True, kw_only=True)
class DebertaConfig(Config):
    """The config of a DeBERTa encoder, version 1."""

    pos_att_type: Literal["c2p|p2c"]
    relative_attention: Literal[True]
    position_biased_input: Literal[False]
    max_relative_positions: int = -1
    pooler_dropout: float = share(0.0)
    cls_dropout: float | None = share(None)
    layer_norm_eps: float = share(1e-7)
    pooler_hidden_act: Literal["gelu"] = "gelu"
    type_vocab_size: Literal[0] = 0
    model_type: ClassVar[str] = "deberta"

    @property
    def relative_span(self) -> int:
        """k: relative distances are clamped to -k and k - 1."""
        return self.max_relative_positions if self.max_relative_positions > 0 else self.max_position_embeddings


@dataclass(frozen=True, kw_only=True)
class MPNetConfig(Config):
    """The config of an MPNet encoder."""

    relative_attention_num_buckets: int = field(default=32, metadata={"range": (32, 10**6)})  # above 32: see mpnet.py
    type_vocab_size: Literal[0] = 0
    first_position: ClassVar[int] = 2  # 0 and 1 are for padding
    model_type: ClassVar[str] = "mpnet"

    @property
    def pooler_dropout(self) -> float:
        """The dropout probability before an exit's pooler."""
        return self.hidden_dropout_prob
