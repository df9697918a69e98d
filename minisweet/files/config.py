"""The configs of BERT and DeBERTa: the keys of config.json that shape an encoder, honoured or refused by name.

A config raises ValueError, which names the field, its value and what would be right. Defaults are the published
format's. A field that is no number may hold its default alone, unless `check` is told of other values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class Config:
    """What BERT and DeBERTa share."""

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
    hidden_act: str = "gelu"

    @classmethod
    def from_json(cls, content: Mapping[str, object]):
        """Build a config from config.json's content. Raises ValueError where a field is missing or wrong."""
        missing = [field.name for field in fields(cls) if field.default is MISSING and field.name not in content]
        if missing:
            raise ValueError(f"{', '.join(missing)} missing, and {cls.__name__} needs it")
        return cls(**{field.name: content[field.name] for field in fields(cls) if field.name in content})

    def check(self, **implemented: Sequence) -> None:
        """Raise ValueError for a field that is not of its kind, or is none of the values implemented."""
        for field in fields(self):
            value = getattr(self, field.name)
            is_number = type(value) in (int, float)
            if field.name in implemented or field.type in (str, bool):
                known = implemented.get(field.name, (field.default,))
                right = any(value == one and type(value) is type(one) for one in known)
                wanted = f"{' or '.join(map(repr, known))}, since nothing else is implemented"
            elif field.type is int:
                right, wanted = type(value) is int and 1 <= value < 2**31, "a positive whole number below 2^31"
            elif "dropout" in field.name:
                right = (is_number and 0 <= value < 1) or (value is None and field.default is None)
                wanted = "from 0 to below 1"
            else:
                right, wanted = is_number and 0 < value < 1e38, "a positive number"
            if not right:
                raise ValueError(f"{field.name} is {value!r}, and must be {wanted}")
        if self.hidden_size % (heads := self.num_attention_heads):
            raise ValueError(
                f"hidden_size is {self.hidden_size}, and must be a multiple of num_attention_heads, {heads}"
            )


@dataclass(frozen=True, kw_only=True)
class BertConfig(Config):
    """The keys of config.json that shape a BERT encoder."""

    type_vocab_size: int
    classifier_dropout: float | None = None
    position_embedding_type: str = "absolute"
    is_decoder: bool = False
    add_cross_attention: bool = False
    model_type: ClassVar[str] = "bert"
    pooler_hidden_act: ClassVar[str] = "tanh"
    pooler_dropout: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        self.check()
        if self.type_vocab_size < 2:
            raise ValueError(f"type_vocab_size is {self.type_vocab_size}, and must be 2 or more: a pair has two types")

    @property
    def head_dropout(self) -> float:
        """Dropout between an exit's pooler and its classifier."""
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout


@dataclass(frozen=True, kw_only=True)
class DebertaConfig(Config):
    """The keys of config.json that shape a DeBERTa encoder, of its first version."""

    pos_att_type: str | Sequence[str]  # "c2p|p2c", or a list
    relative_attention: bool
    position_biased_input: bool
    max_relative_positions: int = -1  # below 1: max_position_embeddings
    pooler_dropout: float = 0.0
    cls_dropout: float | None = None
    layer_norm_eps: float = 1e-7
    pooler_hidden_act: str = "gelu"
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
        if type(self.max_relative_positions) is int and self.max_relative_positions < 1:
            object.__setattr__(self, "max_relative_positions", self.max_position_embeddings)
        self.check(
            pos_att_type=(("c2p", "p2c"), ("c2p",), ("p2c",)),
            relative_attention=(True,),
            position_biased_input=(False,),
            pooler_hidden_act=("gelu", "tanh"),
            position_buckets=(-1,),
            type_vocab_size=(0,),
            embedding_size=(None, self.hidden_size),
            pooler_hidden_size=(None, self.hidden_size),
        )

    @property
    def relative_span(self) -> int:
        """k: distances i - j are told apart from -k to k - 1, and clamped beyond."""
        return self.max_relative_positions

    @property
    def head_dropout(self) -> float:
        """Dropout between an exit's pooler and its classifier."""
        return self.hidden_dropout_prob if self.cls_dropout is None else self.cls_dropout
