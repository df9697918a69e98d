"""The encoders' configs: the keys of config.json that shape an encoder, with the published format's defaults.

A `Literal` lists all values that are implemented: any other is refused, since to ignore it would build another model.
"""

from dataclasses import MISSING, dataclass, fields
from typing import ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class Config:
    """What all of them share. Raises ValueError for sizes and shares that cannot be."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    hidden_act: Literal["gelu"] = "gelu"
    is_decoder: Literal[False] = False
    first_position: ClassVar[int] = 0
    model_type: ClassVar[str]

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value, high = field.name, getattr(self, field.name), 1000 if "layers" in field.name else 10**6
            low = 32 if "buckets" in name else 1
            if field.type is int and (field.default is MISSING or low > 1) and not low <= value <= high:
                raise ValueError(f"{name} is {value}, should be from {low} to {high}")
            if field.type in (float, float | None) and value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}, should be from 0 to 1")
        D, H = self.hidden_size, self.num_attention_heads
        if D % H:
            raise ValueError(f"hidden_size is {D}, should be a multiple of num_attention_heads, {H}")

    @property
    def head_dropout(self) -> float:
        """The dropout probability between an exit's pooler and its classifier."""
        own = getattr(self, "classifier_dropout" if self.model_type == "bert" else "cls_dropout", None)
        return self.hidden_dropout_prob if own is None else own

    @property
    def max_tokens(self) -> int:
        """How many tokens a text may have."""
        return self.max_position_embeddings - self.first_position


@dataclass(frozen=True, kw_only=True)
class BertConfig(Config):
    """The keys of config.json that shape a BERT encoder."""

    type_vocab_size: int
    classifier_dropout: float | None = None
    position_embedding_type: Literal["absolute"] = "absolute"
    model_type: ClassVar[str] = "bert"
    pooler_hidden_act: ClassVar[str] = "tanh"
    pooler_dropout: ClassVar[float] = 0.0


@dataclass(frozen=True, kw_only=True)
class DebertaConfig(Config):
    """The keys of config.json that shape a DeBERTa encoder, of its first version."""

    pos_att_type: Literal["c2p|p2c"]
    relative_attention: Literal[True]
    position_biased_input: Literal[False]
    max_relative_positions: int = -1
    pooler_dropout: float = 0.0
    cls_dropout: float | None = None
    layer_norm_eps: float = 1e-7
    pooler_hidden_act: Literal["gelu"] = "gelu"
    type_vocab_size: Literal[0] = 0
    model_type: ClassVar[str] = "deberta"

    @property
    def relative_span(self) -> int:
        """The largest relative distance that attention tells from others, k."""
        return self.max_relative_positions if self.max_relative_positions > 0 else self.max_position_embeddings


@dataclass(frozen=True, kw_only=True)
class MPNetConfig(Config):
    """The keys of config.json that shape an MPNet encoder."""

    relative_attention_num_buckets: int = 32  # or more, which stay unused, see mpnet.py
    type_vocab_size: Literal[0] = 0
    first_position: ClassVar[int] = 2  # 0 and 1 are padding's
    model_type: ClassVar[str] = "mpnet"
    pooler_hidden_act: ClassVar[str] = "tanh"

    @property
    def pooler_dropout(self) -> float:
        """The dropout probability before an exit's pooler."""
        return self.hidden_dropout_prob
