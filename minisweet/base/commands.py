"""What every command shares: options that are checked, and errors and notices of one line."""

import argparse
import logging
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from minisweet.base.files import LOG, InputError, one_line

progress = partial(tqdm, disable=None)  # a bar where standard error is a terminal, and nothing elsewhere


class Parser(argparse.ArgumentParser):
    """Takes no abbreviations and shows `doc`, the command's docstring, with --help. An error is a line and status 2."""

    def __init__(self, doc: str = "") -> None:
        prog, style = Path(sys.argv[0]).name, argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=doc, allow_abbrev=False, formatter_class=style)

    def need(self, args: argparse.Namespace, is_met: object, what: str, *names: str) -> None:
        """Raise InputError where one of the options `names` is given without `what` they need: `is_met` is false."""
        for name in () if is_met else names:
            if getattr(args, name) != self.get_default(name):
                raise InputError(f"--{name.replace('_', '-')}: needs {what}")

    def error(self, message: str) -> NoReturn:
        self.exit(2, one_line(f"{self.prog}: error: {message}") + "\n")


def _checked(convert: Callable, is_right: Callable[[object], bool], wanted: str) -> Callable[[str], object]:
    """An argparse type: what `convert` makes of an option's text, where that is right."""

    def parse(text: str) -> object:
        with suppress(ValueError):
            if is_right(value := convert(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is {wanted}")

    return parse


def whole_number(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """An argparse type: a whole number from `low` to `high`."""
    return _checked(int, lambda value: low <= value <= high, f"not a whole number from {low} to {high}")


def number(low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number from `low` to `high`."""
    return _checked(float, lambda value: low <= value <= high, f"not a number from {low:g} to {high:g}")


positive_float = _checked(float, lambda value: 0 < value < math.inf, "not a positive number")


def path_to(suffix: str) -> Callable[[str], Path]:
    """An argparse type: a file to write, which ends in `suffix`, so that no other file is replaced by mistake."""
    return _checked(Path, lambda path: path.suffix.lower() == suffix, f"no name that ends in {suffix}")


def list_of(parse: Callable[[str], object], known: object = None) -> Callable[[str], list]:
    """An argparse type: different values with commas between them, none of them empty, all of them `known` if given."""

    def parse_all(text: str) -> list:
        values = [parse(part) for part in text.split(",")]
        if len(set(values)) < len(values) or "" in values:
            raise argparse.ArgumentTypeError(f"{text!r} names one twice, or has an empty name")
        if known and (others := [value for value in values if value not in known]):
            raise argparse.ArgumentTypeError(f"{others[0]!r} is none of {', '.join(known)}")
        return values

    return parse_all


def run_command(main: Callable[[], None]) -> None:
    """Call `main`. Bad input, too little memory or a full disk prints one line and exits with status 2.

    Ctrl-C exits with 130. SIGTERM raises SystemExit, so that what is half-written is removed. Where nobody reads what
    is printed any more, as after `| head`, the command ends in silence, with 141.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    notices = logging.Handler()
    notices.emit = lambda record: tqdm.write(one_line(record.getMessage()), file=sys.stderr)  # above a progress bar
    LOG.handlers = [notices]  # only commands do this: whoever imports minisweet configures logging as they like
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
        print(one_line(f"{Path(sys.argv[0]).name}: error: {told(error)}"), file=sys.stderr)
        sys.exit(2)


def told(error: Exception) -> str:
    """What a user is told of bad input, of too little memory, or of a full disk. Raises any other error."""
    if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error)):
        return f"too little memory ({str(error):.100}); try a smaller --batch-size, --max-length or model"
    if not isinstance(error, InputError | OSError | UnicodeError):
        raise error
    return str(error)
