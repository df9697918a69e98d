"""Reading an encoder's config.json: what it says is honoured, or refused by name.

A key that changes the model must be a field of BertConfig or DebertaConfig, under the name that config.json gives it.
Other keys (architectures, use_cache, transformers_version, ...) describe the file, not the model, and are passed over.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from minisweet.files.safe import InputError

Config = TypeVar("Config")


def config_from_json(config_class: type[Config], content: Mapping[str, Any]) -> Config:
    """Build a config from config.json's content. Raises InputError for a missing or unusable value."""
    known = fields(config_class)
    missing = [field.name for field in known if field.default is MISSING and field.name not in content]
    if missing:
        raise InputError(f"{', '.join(missing)} missing, and {config_class.__name__} needs it")
    return config_class(**{field.name: content[field.name] for field in known if field.name in content})


def check_config(config: Any, implemented: Mapping[str, tuple]) -> None:
    """Check every field's type and range, and that it holds a value that the code implements.

    Args:
        config: a config dataclass.
        implemented: for some fields, the values that the encoder implements.

    Raises:
        InputError: names the field, its value and what would be right.
    """
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        is_number = type(value) in (int, float) and math.isfinite(value)
        if name in implemented:
            if value not in implemented[name]:
                choices = " or ".join(map(repr, implemented[name]))
                raise InputError(f"{name} is {value!r}, and only {choices} is implemented")
        elif field.type is int:
            if type(value) is not int or value < 1:
                raise InputError(f"{name} is {value!r}, and must be a positive whole number")
        elif name.endswith(("dropout", "dropout_prob")):
            if value is not None and (not is_number or not 0 <= value < 1):
                raise InputError(f"{name} is {value!r}, and must lie in [0, 1)")
        elif field.type is float and (not is_number or value <= 0):
            raise InputError(f"{name} is {value!r}, and must be a positive number")
    if config.hidden_size % config.num_attention_heads:
        raise InputError(
            f"hidden_size is {config.hidden_size}, and must be a multiple of "
            f"num_attention_heads, {config.num_attention_heads}"
        )
