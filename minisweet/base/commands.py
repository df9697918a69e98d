"""What every command shares: a parser, option types that reject bad values, and one-line errors."""

import logging
import math
import os
import re
import signal
import sys
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable, Collection
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from minisweet.base.files import LOG, InputError, one_line, preview

BARS: ContextVar[dict | None] = ContextVar("bars", default=None)  # settings of progress bars; None for no bars


def progress(*args: Any, **options: Any) -> tqdm:
    """A progress bar on standard error, as BARS says."""
    return tqdm(*args, **(BARS.get() or {"disable": True}), **options)


class Notices(logging.Handler):
    """A handler that writes each notice as one line, above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(one_line(record.getMessage()), file=sys.stderr)


def checked(read: Callable[[str], Any], is_right: Callable[[Any], bool], words: str) -> Callable[[str], Any]:
    """The type of an argparse option. A text that cannot be read, or whose value is not right, "should be" `words`."""

    def of_text(text: str) -> Any:
        with suppress(ValueError):
            if is_right(value := read(text)):
                return value
        raise ArgumentTypeError(f"{text!r:.80}, should be {words}")

    return of_text


def number(kind: type[int] | type[float], low: float, high: float = 2**31 - 1) -> Callable[[str], Any]:
    """Whole numbers (int) or numbers (float) from `low` to `high`."""
    noun = "a whole number" if kind is int else "a number"
    return checked(kind, lambda value: low <= value <= high, f"{noun} from {low:g} to {high:g}")


positive_number = checked(float, lambda value: 0 < value < math.inf, "a positive number")


def list_of(kind: Callable[[str], Any], among: Collection[str] | None = None) -> Callable[[str], list]:
    """Distinct comma-separated values, each one of `among` if it is given."""
    words = f"different values{f' of {preview([*among], 24)}' if among else ''}, with commas between them"

    def is_right(values: list) -> bool:
        return len({*values}) == len(values) and (among is None or all(value in among for value in values))

    return checked(lambda text: [kind(part) for part in text.split(",")], is_right, words)


def path_to(suffix: str) -> Callable[[str], Path]:
    """A file to write, whose name must end in `suffix`, so that no other file is replaced by mistake."""
    return checked(Path, lambda path: path.suffix.lower() == suffix, f"a name that ends in {suffix}")


class Parser(ArgumentParser):
    """A parser without abbreviations. --help shows `doc`, the command's docstring. Errors are one line, status 2."""

    def __init__(self, doc: str = "", prog: str | None = None) -> None:
        name, style = prog or Path(sys.argv[0]).name, RawDescriptionHelpFormatter
        super().__init__(name, description=doc, allow_abbrev=False, formatter_class=style)

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
