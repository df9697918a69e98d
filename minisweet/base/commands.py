"""What every command shares: options that are checked, and errors and notices of one line.

A set of options is a frozen dataclass, whose fields are made by `option`: each has its default, the values that it
takes, and its help. `Parser.add_options` and `Parser.make` read one from the command line. Wherever one is made, in
Python too, its values are checked, and made plain: numpy's integer 3 is 3.
"""

import argparse
import logging
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
from tqdm import tqdm

from minisweet.base.files import LOG, InputError, one_line

Made = TypeVar("Made", bound="Options")
_BARS: ContextVar[dict | None] = ContextVar("bars", default=None)


def progress(*args, **options) -> tqdm:
    """A progress bar on standard error, where it is a terminal or `telling` is on."""
    return tqdm(*args, **(_BARS.get() or {"disable": None}), **options)


@contextmanager
def telling(verbose: int) -> Iterator[None]:
    """Within it all notices and progress bars are written to standard error, unless `verbose` is 0."""
    if not verbose:
        yield
        return
    its, level, bars = notices(), LOG.level, _BARS.set({"mininterval": 0.1 if sys.stderr.isatty() else 10})  # seconds
    LOG.addHandler(its)
    LOG.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOG.removeHandler(its)
        LOG.setLevel(level)
        _BARS.reset(bars)


def notices() -> logging.Handler:
    """What writes each notice in a line, above a progress bar."""
    its = logging.Handler()
    its.emit = lambda record: tqdm.write(one_line(record.getMessage()), file=sys.stderr)
    return its


class Kind(NamedTuple):
    """The values that an option takes. Called with what was typed, it is an argparse type."""

    words: str  # which they are
    read: Callable[[str], object]  # from what was typed
    is_right: Callable[[object], bool]

    def __call__(self, text: str) -> object:
        with suppress(ValueError):
            if self.is_right(value := self.read(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not {self.words}")

    def check(self, name: str, value: object) -> object:
        """A value from Python, made plain. Raises InputError, naming the option, where it is none of these."""
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
    """A file to write, which ends in `suffix`, so that no other file is replaced by mistake."""
    return Kind(f"a name that ends in {suffix}", Path, lambda path: path.suffix.lower() == suffix)


def list_of(kind: Kind) -> Kind:
    """Different values of a kind; as they are typed with commas between them."""
    words = f"different values, each {kind.words}"

    def is_right(values: object) -> bool:
        return isinstance(values, list) and 0 < len(values) and all(map(kind.is_right, values)) and _differ(values)

    return Kind(words, lambda text: [kind.read(part) for part in text.split(",")], is_right)


def _differ(values: list) -> bool:
    return len(set(values)) == len(values)


def option(default: object, kind: Kind, help: str) -> Any:
    """A field of `Options`: its default, the values it takes, and what --help says. None is one where it is default."""
    return field(default=default, metadata={"kind": kind, "help": help})


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options, checked where they are made; see the head of this file. Raises InputError, which names the option."""

    def __post_init__(self) -> None:
        for its in fields(self):
            value = getattr(self, its.name)
            if value is not None or its.default is not None:
                object.__setattr__(self, its.name, its.metadata["kind"].check(its.name, value))


class Parser(argparse.ArgumentParser):
    """Takes no abbreviations and shows `doc`, the command's docstring, with --help. An error is a line and status 2."""

    def __init__(self, doc: str = "") -> None:
        prog, style = Path(sys.argv[0]).name, argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=doc, allow_abbrev=False, formatter_class=style)

    def add_options(self, kind: type[Options], *names: str, **defaults: object) -> None:
        """Add options by their names, by default all of a kind; `defaults` are of this command alone."""
        for its in fields(kind):
            if not names or its.name in names:
                typed, default = f"--{its.name.replace('_', '-')}", defaults.get(its.name, its.default)
                about = its.metadata["help"] + ("" if default is None else f" (default: {default})")
                self.add_argument(typed, type=its.metadata["kind"], default=default, help=about)

    def make(self, kind: type[Made], args: argparse.Namespace, **others: object) -> Made:
        """The options of a kind as they were typed; `others` are not typed here, or resolved."""
        return kind(**{its.name: getattr(args, its.name) for its in fields(kind) if hasattr(args, its.name)} | others)

    def need(self, args: argparse.Namespace, is_met: object, what: str, *names: str) -> None:
        """Raise InputError where one of the options `names` is given without `what` they need: `is_met` is false."""
        for name in () if is_met else names:
            if getattr(args, name) != self.get_default(name):
                raise InputError(f"needs {what}", name)

    def error(self, message: str) -> NoReturn:
        self.exit(2, one_line(f"{self.prog}: error: {message}") + "\n")


def run_command(main: Callable[[], None]) -> None:
    """Call `main`. Bad input, too little memory or a full disk prints one line and exits with status 2.

    Ctrl-C exits with 130. SIGTERM raises SystemExit, so that what is half-written is removed. Where nobody reads what
    is printed any more, as after `| head`, the command ends in silence, with 141.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    LOG.handlers = [notices()]  # only commands do this: whoever imports minisweet configures logging as they like
    LOG.setLevel(logging.INFO)
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains of it at its end
        sys.exit(141)
    except Exception as error:
        print(one_line(f"{Path(sys.argv[0]).name}: error: {what_to_tell(error)}"), file=sys.stderr)
        sys.exit(2)


def what_to_tell(error: Exception) -> str:
    """What a user is told of bad input, of too little memory, or of a full disk. Raises any other error."""
    if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error)):
        return f"too little memory ({str(error):.100}); try a smaller --batch-size, --max-length or model"
    if not isinstance(error, InputError | OSError | UnicodeError):
        raise error
    return error.as_typed() if isinstance(error, InputError) else str(error)
