"""Dataclasses that are read from a JSON object, each field checked by its annotation.

seed: Annotated[int, 0, 99]              a whole number from 0 to 99
share: Annotated[float, 0, 1] = None     a number from 0 to 1, or null, or left out
name: Annotated[str, 1, 80]              text of 1 to 80 characters
kind: Literal["a", "b"]                  one of these
counts: Annotated[Count, "P", 2]         a list of P lists of two Counts; all lists of length P are equally long
digests: Annotated[Text, dict]           an object of texts
point: Point                             an object of its own
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Literal, get_args, get_origin

from minisweet.base.safe import as_written, is_text

NOUNS = {int: "a whole number from", float: "a number from", str: "text of"}


@dataclass(frozen=True, kw_only=True)
class Fields:
    """What a JSON object holds; keys that are no fields are left out."""

    @classmethod
    def from_json(cls, content: Mapping[str, object]):
        """Take the fields of a file's content. Raises ValueError, by name, where one is missing or wrong."""
        if missing := [one.name for one in fields(cls) if one.default is MISSING and one.name not in content]:
            raise ValueError(f"{', '.join(missing)} missing, and {cls.__name__} needs it")
        values = {field.name: content[field.name] for field in fields(cls) if field.name in content}
        for field in fields(cls):
            if isinstance(field.type, type) and isinstance(values[field.name], Mapping):
                values[field.name] = field.type.from_json(values[field.name])
        return cls(**values)

    def __post_init__(self) -> None:
        found: dict[str, int] = {}  # the length of each letter's lists
        for field in fields(self):
            value, allowed = getattr(self, field.name), get_args(field.type)
            if isinstance(field.type, type):
                right, wanted = isinstance(value, field.type), "an object"
            elif get_origin(field.type) is Literal:
                right = any(value == one and type(value) is type(one) for one in allowed)
                wanted = f"{' or '.join(map(repr, allowed))}, since nothing else is implemented"
            else:
                kind, low, high, *lengths = allowed
                right = _fits(value, kind, low, high, lengths, found)
                wanted = f"{NOUNS[kind]} {low} to {high}{' characters' * (kind is str)}"
                wanted = f"lists ({', '.join(map(str, lengths))}) of {wanted}" if lengths else wanted
            if not (right or value is field.default is None):
                raise ValueError(f"{field.name} is {as_written(value)}, and must be {wanted}")


def _fits(value: object, kind: type, low: float, high: float, lengths: Sequence, found: dict[str, int]) -> bool:
    if lengths:
        length, *inner = lengths
        if not isinstance(value, dict if length is dict else list):
            return False
        if length is dict:
            value = list(value.values())
        elif len(value) != (length if isinstance(length, int) else found.setdefault(length, len(value))):
            return False
        return all(_fits(part, kind, low, high, inner, found) for part in value)
    if kind is str:
        return is_text(value) and low <= len(value) <= high
    return type(value) in (int, kind) and low <= value <= high
