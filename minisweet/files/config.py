"""The configs of BERT and DeBERTa: the keys of config.json that shape an encoder, honoured or refused by name.

A config raises ValueError, which names the field, its value and what would be right. Defaults are those of the
published format.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


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


@dataclass(frozen=True)
class DebertaConfig:
    """The keys of config.json that shape a DeBERTa encoder. Defaults are those of the published format.

    Raises ValueError, which names the field, for a value that is not implemented.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    pos_att_type: str | list[str] | tuple[str, ...]  # "c2p|p2c", or a list
    relative_attention: bool
    position_biased_input: bool
    max_relative_positions: int | None = -1  # below 1: max_position_embeddings
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
        check_common(self)
        span = self.max_relative_positions
        if type(span) is not int or not -(2**31) <= span < 2**31:
            raise ValueError(f"max_relative_positions is {span!r}, and must be a whole number below 2^31")
        check_probabilities(self, ("pooler_dropout",))
        if self.cls_dropout is not None:
            check_probabilities(self, ("cls_dropout",))
        check_implemented(self, "pooler_hidden_act", ("gelu", "tanh"))
        check_implemented(self, "pos_att_type", (("c2p", "p2c"), ("c2p",), ("p2c",)))
        check_implemented(self, "relative_attention", (True,))
        for name in ("position_biased_input", "talking_head", "share_att_key"):
            check_implemented(self, name, (False,))
        check_implemented(self, "norm_rel_ebd", ("none",))
        check_implemented(self, "position_buckets", (-1,))
        check_implemented(self, "type_vocab_size", (0,))
        for name in ("embedding_size", "pooler_hidden_size"):
            check_implemented(self, name, (None, self.hidden_size))

    @property
    def relative_span(self) -> int:
        """k: distances i - j are told apart from -k to k - 1, and clamped beyond."""
        return self.max_relative_positions if self.max_relative_positions >= 1 else self.max_position_embeddings

    @property
    def head_dropout(self) -> float:
        """Dropout between an exit's pooler and its classifier."""
        return self.hidden_dropout_prob if self.cls_dropout is None else self.cls_dropout


def check_common(config) -> None:
    """Check what both configs hold. Raises ValueError, which names the field, its value and what would be right."""
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        check_whole(config, name)
    check_whole(config, "max_position_embeddings")
    check_implemented(config, "hidden_act", ("gelu",))
    for name in ("layer_norm_eps", "initializer_range"):
        if not is_number(value := getattr(config, name)) or value <= 0:
            raise ValueError(f"{name} is {value!r}, and must be a positive number")
    check_probabilities(config, ("hidden_dropout_prob", "attention_probs_dropout_prob"))
    if config.hidden_size % config.num_attention_heads:
        heads = config.num_attention_heads
        raise ValueError(f"hidden_size is {config.hidden_size}, and must be a multiple of num_attention_heads, {heads}")


def check_whole(config, name: str) -> None:
    """Raise ValueError unless the field is a positive whole number that a tensor's size can be."""
    value = getattr(config, name)
    if type(value) is not int or not 1 <= value < 2**31:
        raise ValueError(f"{name} is {value!r}, and must be a positive whole number below 2^31")


def check_probabilities(config, names: Sequence[str]) -> None:
    """Raise ValueError unless these fields lie in [0, 1)."""
    for name in names:
        if not is_number(value := getattr(config, name)) or not 0 <= value < 1:
            raise ValueError(f"{name} is {value!r}, and must lie in [0, 1)")


def check_implemented(config, name: str, values: Sequence) -> None:
    """Raise ValueError unless the field holds one of the values that the code implements."""
    value = getattr(config, name)
    if not any(value == known and type(value) is type(known) for known in values):
        raise ValueError(f"{name} is {value!r}, and only {' or '.join(map(repr, values))} is implemented")


def is_number(value: object) -> bool:
    """Whether the value is a finite number (True and False are none)."""
    return type(value) in (int, float) and math.isfinite(value)
