"""What every command shares: options that are checked, and errors and notices of one line.

A set of options is a frozen dataclass whose fields are made by `option`: each has a default, the values that it takes,
and a help text. `Parser.add_options` and `Parser.make` read them from the command line. They are checked wherever they
are made, in Python too, and converted to plain types: numpy's integer 3 becomes 3.
"""

import argparse
import logging
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
from tqdm import tqdm

from minisweet.base.files import LOG, InputError, one_line

Made = TypeVar("Made", bound="Options")
BARS: ContextVar[dict | None] = ContextVar("bars", default=None)  # settings of progress bars; None for no bars


def progress(*args: Any, **options: Any) -> tqdm:
    """A progress bar on standard error, as BARS says."""
    return tqdm(*args, **(BARS.get() or {"disable": True}), **options)


class Notices(logging.Handler):
    """A handler that writes each notice as one line, above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(one_line(record.getMessage()), file=sys.stderr)


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


class Parser(argparse.ArgumentParser):
    """A parser without abbreviations. --help shows `doc`, the command's docstring. Errors are one line, status 2."""

    def __init__(self, doc: str = "", prog: str | None = None) -> None:
        style = argparse.RawDescriptionHelpFormatter
        super().__init__(prog or Path(sys.argv[0]).name, description=doc, allow_abbrev=False, formatter_class=style)

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

    def error(self, message: str) -> NoReturn:
        self.exit(2, one_line(f"{self.prog}: error: {message}") + "\n")


def run_command(main: Callable[[], None], prog: str | None = None) -> None:
    """Call `main`. For bad input, too little memory or a full disk, print one line and exit with status 2.

    Ctrl-C exits with 130. SIGTERM raises SystemExit, so that half-written files are removed. If standard output is
    closed, as after `| head`, the command ends silently with 141.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    LOG.handlers = [Notices()]  # only commands do this: a program that imports minisweet configures logging itself
    LOG.setLevel(logging.INFO)
    BARS.set({"disable": None})  # only on a terminal
    try:
        main()
        print(end="", flush=True)  # also where sys.stdout is None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python reports it at exit
        sys.exit(141)
    except Exception as error:
        print(one_line(f"{prog or Path(sys.argv[0]).name}: error: {message_of(error)}"), file=sys.stderr)
        sys.exit(2)


def message_of(error: Exception) -> str:
    """The message for bad input, too little memory or a full disk. Raises any other error."""
    if re.search("out of memory|t allocate memory|MemoryError", repr(error)) and not isinstance(error, InputError):
        return f"too little memory ({str(error):.100}); try a smaller --batch-size, --max-length or model"
    if not isinstance(error, InputError | OSError | UnicodeError):
        raise error
    return error.as_typed() if isinstance(error, InputError) else str(error)
