"""The options of own text: a set of options is a frozen dataclass, whose fields are checked wherever it is made."""

import argparse
import math
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from minisweet.base import commands
from minisweet.base.devices import AMP_CHOICES, AMP_HELP
from minisweet.base.files import InputError
from minisweet.checkpoint import REPOSITORIES
from minisweet.exits import HEADS, METHODS

Made = TypeVar("Made", bound="Options")


@dataclass(frozen=True)
class Kind:
    """The values that an option takes. It serves as the type of an argparse argument."""

    words: str  # for messages: "should be ..."
    read: Callable[[str], object]  # of the text that was typed
    is_right: Callable[[Any], bool]

    def __call__(self, text: str) -> object:
        with suppress(ValueError):
            if self.is_right(value := self.read(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r:.80}, should be {self.words}")

    def check(self, name: str, value: object) -> object:
        """Convert a value to a plain type. Raises InputError, which names the option, if it is not allowed."""
        if isinstance(value, np.generic | np.ndarray):
            value = value.tolist()
        value = list(value) if isinstance(value, tuple | range) else value
        value = str(value) if isinstance(value, os.PathLike) else value
        if not self.is_right(value):
            raise InputError(f"{value!r:.80}, should be {self.words}", name)
        return value


def whole_number(low: int, high: int = 2**31 - 1) -> Kind:
    """Whole numbers from `low` to `high`."""
    return Kind(f"a whole number from {low} to {high}", int, lambda value: type(value) is int and low <= value <= high)


def number(low: float, high: float) -> Kind:
    """Numbers from `low` to `high`."""
    words = f"a number from {low:g} to {high:g}"
    return Kind(words, float, lambda value: type(value) in (int, float) and low <= value <= high)


positive_number = Kind("a positive number", float, lambda value: type(value) in (int, float) and 0 < value < math.inf)
name_of = Kind("text", str, lambda value: isinstance(value, str) and value != "")  # of a folder, a file or a column


def one_of(*values: str) -> Kind:
    """One of some words."""
    return Kind(f"one of {', '.join(values)}", str, lambda value: isinstance(value, str) and value in values)


def path_to(suffix: str) -> Kind:
    """A file to write, whose name must end in `suffix`, so that no other file is replaced by mistake."""
    return Kind(f"a name that ends in {suffix}", Path, lambda path: path.suffix.lower() == suffix)


def list_of(kind: Kind) -> Kind:
    """Different values of a kind, typed with commas between them."""
    words = f"different values, each {kind.words}"

    def is_right(values: object) -> bool:
        return isinstance(values, list) and all(map(kind.is_right, values)) and 0 < len(values) == len({*values})

    return Kind(words, lambda text: [kind.read(part) for part in text.split(",")], is_right)


def option(default: object, kind: Kind, help: str) -> Any:
    """A field of `Options`: its default, the values it takes, and its help. None is allowed if it is the default."""
    return field(default=default, metadata={"kind": kind, "help": help})


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base class of options. Raises InputError, which names the option, for a value that is not allowed."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if value is not None or item.default is not None:
                object.__setattr__(self, item.name, item.metadata["kind"].check(item.name, value))


class Parser(commands.Parser):
    """A parser that reads sets of options."""

    def add_options(self, kind: type[Options], *names: str, title: str = "", **defaults: object) -> None:
        """Add the options with these names, by default all of a kind, to the group of this title.

        `defaults` replace those of the kind in this command.
        """
        groups = {group.title: group for group in self._action_groups}
        add = (groups.get(title) or self.add_argument_group(title)).add_argument if title else self.add_argument
        for item in fields(kind):
            if not names or item.name in names:
                default = defaults.get(item.name, item.default)
                text = item.metadata["help"]
                about = text if default is None else f"{text.partition(' (default')[0]} (default: {default})"
                add(f"--{item.name.replace('_', '-')}", type=item.metadata["kind"], default=default, help=about)

    def make(self, kind: type[Made], args: argparse.Namespace) -> Made:
        """The options of a kind, as typed."""
        return kind(**{item.name: getattr(args, item.name) for item in fields(kind) if hasattr(args, item.name)})

    def need(self, args: argparse.Namespace, is_met: object, requirement: str, *names: str) -> None:
        """Raise InputError if one of the options `names` is given although the `requirement` for them is not met."""
        for name in () if is_met else names:
            if getattr(args, name) != self.get_default(name):
                raise InputError(f"needs {requirement}", name)


@dataclass(frozen=True, kw_only=True)
class CommonOptions(Options):
    """What train.py and minisweet fit both take. Raises InputError, which names the option, for a wrong value."""

    model: str = option("minilm-l6", name_of, f"{', '.join(REPOSITORIES)}, a folder or a hub id")
    seed: int = option(0, whole_number(0), "random seed of order and dropout; in train.py also of the rows and heads")
    lr: float | None = option(
        None, positive_number, "initial learning rate (default: by the model; for train.py also by the task)"
    )
    epochs: int | None = option(None, whole_number(1), "passes over the data (default: by the task or its rows)")
    batch_size: int | None = option(None, whole_number(1), "examples (default: 16, and 8 for a large DeBERTa)")
    device: str = option("auto", name_of, "auto, cpu, cuda or cuda:N")
    amp: str = option("auto", one_of(*AMP_CHOICES), AMP_HELP)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(CommonOptions):
    """The options of train.py."""

    method: str = option("sweet", one_of(*METHODS), ", ".join(METHODS))
    exit_layers: list[int] | None = option(
        None, list_of(whole_number(1)), "counted from 1, as in 1,4,6,12 (default: the paper's, by the model's depth)"
    )
    exit_strategy: str = option("confidence", one_of(*HEADS), "confidence, or lte for learning-to-exit")
    pooling: str | None = option(
        None, one_of("cls", "mean"), "what exits read: cls, or the mean of the tokens (default: the checkpoint's)"
    )
    train_size: int = option(6000, whole_number(1), "training rows, sampled with the seed")
    max_length: int = option(256, whole_number(8), "tokens; longer texts are cut")
