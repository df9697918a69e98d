"""The configs of BERT and DeBERTa: the keys of config.json that shape an encoder, honoured or refused by name.

A field's annotation says what it may hold (see base/fields.py); anything else raises ValueError, by name. Defaults are
the published format's; a field whose default is None may be None.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from minisweet.base.fields import Fields

Size = Annotated[int, 1, 2**31 - 1]
Share = Annotated[float, 0, 1 - 1e-9]
Positive = Annotated[float, 1e-38, 1e38]


@dataclass(frozen=True, kw_only=True)
class Config(Fields):
    """What BERT and DeBERTa share."""

    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    intermediate_size: Size
    max_position_embeddings: Size
    hidden_dropout_prob: Share = 0.1
    attention_probs_dropout_prob: Share = 0.1
    layer_norm_eps: Positive = 1e-12
    initializer_range: Positive = 0.02
    hidden_act: Literal["gelu"] = "gelu"
    head_dropout_key: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        D, H = self.hidden_size, self.num_attention_heads
        if D % H:
            raise ValueError(f"hidden_size is {D}, and must be a multiple of num_attention_heads, {H}")

    @property
    def head_dropout(self) -> float:
        """Dropout between an exit's pooler and its classifier."""
        own = getattr(self, self.head_dropout_key)
        return self.hidden_dropout_prob if own is None else own


@dataclass(frozen=True, kw_only=True)
class BertConfig(Config):
    """The keys of config.json that shape a BERT encoder."""

    type_vocab_size: Annotated[int, 2, 2**31 - 1]  # a pair has two types
    classifier_dropout: Share = None
    position_embedding_type: Literal["absolute"] = "absolute"
    is_decoder: Literal[False] = False
    add_cross_attention: Literal[False] = False
    model_type: ClassVar[str] = "bert"
    head_dropout_key: ClassVar[str] = "classifier_dropout"
    pooler_hidden_act: ClassVar[str] = "tanh"
    pooler_dropout: ClassVar[float] = 0.0


@dataclass(frozen=True, kw_only=True)
class DebertaConfig(Config):
    """The keys of config.json that shape a DeBERTa encoder, of its first version."""

    pos_att_type: Literal["c2p|p2c", "p2c|c2p", "c2p", "p2c"]  # or a list
    relative_attention: Literal[True]
    position_biased_input: Literal[False]
    max_relative_positions: Size = -1  # k; below 1: max_position_embeddings
    pooler_dropout: Share = 0.0
    cls_dropout: Share = None
    layer_norm_eps: Positive = 1e-7
    pooler_hidden_act: Literal["gelu", "tanh"] = "gelu"
    talking_head: Literal[False] = False
    share_att_key: Literal[False] = False  # this and the next two belong to DeBERTa's second version
    norm_rel_ebd: Literal["none"] = "none"
    position_buckets: Literal[-1] = -1
    type_vocab_size: Literal[0] = 0
    embedding_size: Size = None
    pooler_hidden_size: Size = None
    model_type: ClassVar[str] = "deberta"
    head_dropout_key: ClassVar[str] = "cls_dropout"

    def __post_init__(self) -> None:
        if isinstance(self.pos_att_type, list):
            object.__setattr__(self, "pos_att_type", "|".join(map(str, self.pos_att_type)))
        if type(self.max_relative_positions) is int and self.max_relative_positions < 1:
            object.__setattr__(self, "max_relative_positions", self.max_position_embeddings)
        super().__post_init__()
        for key in ("embedding_size", "pooler_hidden_size"):
            if getattr(self, key) not in (None, self.hidden_size):
                raise ValueError(f"{key} is {getattr(self, key)}, and must be hidden_size, {self.hidden_size}")
