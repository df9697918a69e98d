"""What every command shares: options that are checked, errors and notices of one line, and progress."""

import argparse
import errno
import logging
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from minisweet.base.safe import LOG, InputError, is_text, one_line


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations. An error is one line and status 2.

    `doc` is a command's docstring: what it is for and, after an empty line, examples, whose lines are kept.
    """

    def __init__(self, doc: str = "", **options) -> None:
        if doc:
            about, examples, *_ = doc.split("\n\n")
            options |= {"description": about, "epilog": f"examples:\n{examples}"}
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.register("type", Path, _path)

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's, but no word may hold what neither a path nor a name can: NUL, or half a character."""
        for word in sys.argv[1:] if args is None else args:
            if not is_text(word):
                self.error(f"{word!r}: holds a character that no path and no name can have")
        namespace, rest = super().parse_known_args(args, namespace)
        for action in self._actions:  # argparse makes an empty list of "--" where an option's value should stand
            if action.nargs is None and getattr(namespace, action.dest, None) == []:
                self.error(f"argument {'/'.join(action.option_strings)}: '--' where a value should stand")
        return namespace, rest

    def need(self, args: argparse.Namespace, is_met: object, what: str, *names: str) -> None:
        """Raise InputError where an option of these names is given, and would do nothing since `what` is not met."""
        for name in () if is_met else names:
            if (value := getattr(args, name)) != self.get_default(name):
                text = ",".join(map(str, value)) if isinstance(value, list) else "" if value is True else str(value)
                raise InputError(f"--{name.replace('_', '-')}: {text[:60]}{' ' * bool(text)}needs {what}")

    def error(self, message: str) -> NoReturn:
        """Print the message as one line and exit with status 2."""
        self.exit(2, one_line(f"{self.prog}: error: {message}") + "\n")


def _path(text: str) -> Path:
    """An argparse type: a path, of what is there or not. Not "", which Path takes for the folder at hand."""
    try:
        os.stat(f"{text}/.")  # of a folder, whether it may be searched
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise argparse.ArgumentTypeError(f"{text!r} cannot be reached ({error.strerror})") from None
    if not text:
        raise argparse.ArgumentTypeError("'' is no path")
    return Path(text)


def _checked(convert: Callable, is_right: Callable[[object], bool], wanted: str) -> Callable[[str], object]:
    """An argparse type: what `convert` makes of an option's text, where that is right. Not 1_000, nor other digits."""

    def parse(text: str) -> object:
        with suppress(ValueError):
            if text.isascii() and not re.search(r"\d_", text) and is_right(value := convert(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is {wanted}")

    return parse


def whole_number(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """An argparse type: a whole number from `low` to `high`."""
    wanted = f"not a whole number from {low} to {high}"
    return _checked(lambda text: int(text) if text.isdecimal() else -1, lambda value: low <= value <= high, wanted)


def number(low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a number from `low` to `high`, finite."""
    wanted = f"not a number from {low:g} {'on' if math.isinf(high) else f'to {high:g}'}"
    # Adding 0.0 makes 0.0 of -0.0.
    return _checked(lambda text: float(text) + 0.0, lambda value: low <= value <= high and value < math.inf, wanted)


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    """An argparse type: one of some names."""
    return _checked(str, lambda text: text in names, f"none of {', '.join(names)}")


# Further out nothing is left of a learning rate in float32.
positive_float = _checked(float, lambda x: 1e-30 <= x <= 1e30, "not a positive number, 1e-30 to 1e30")


def list_of(parse: Callable[[str], object]) -> Callable[[str], list]:
    """An argparse type: values that differ, with commas between them."""

    def parse_all(text: str) -> list:
        parts = text.split(",")
        try:
            values = [parse(part) for part in parts]
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{error}; values are separated by commas") from None
        if len(set(values)) < len(values) or not all(map(str.strip, parts)):
            raise argparse.ArgumentTypeError(f"{text!r} names a value twice, or none")
        return values

    return parse_all


class Progress(tqdm):
    """A progress bar where standard error is a terminal; elsewhere a notice at the end, and each minute until then."""

    def __init__(self, *args, disable: bool | None = None, **options) -> None:
        super().__init__(*args, disable=disable, **options)
        self.is_told = self.disable and not disable
        self.words, self.told = (options.get("desc"), options.get("unit", "it")), time.monotonic()
        self.counted = 0  # by then

    def __iter__(self) -> Iterator:
        for item in self.iterable:
            yield item
            self.update()
        self.close()

    def update(self, n: int = 1) -> None:
        """Count `n` more."""
        if not self.disable:
            super().update(n)
            return
        self.n += n
        if self.is_told and (self.n == self.total or time.monotonic() > self.told + 60):
            (desc, unit), now = self.words, time.monotonic()
            of_total = f" of {self.total:,}" if self.total else ""
            more = f", {text}" if (text := getattr(self, "postfix", None)) else ""
            if self.total and self.n < self.total:
                # At the pace since the last notice: a resumed training skips many at once.
                each = (now - self.told) / max(1, self.n - self.counted)
                more += f", {each * (self.total - self.n) / 60:.0f} minutes left"
            self.told, self.counted = now, self.n
            LOG.info("%s: %s%s %s%s", desc, f"{self.n:,}", of_total, unit, more)


class Notices(logging.Handler):
    """Prints notices on standard error, one line each, above the progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one; where nobody can read it, it is lost."""
        with suppress(OSError, ValueError):
            tqdm.write(one_line(record.getMessage()), file=sys.stderr)


NOTICES = Notices()


def run_command(main: Callable[[], None]) -> None:
    """Call `main`. Bad input, or too little memory, prints its one line and exits with status 2, Ctrl-C with 130,
    SIGTERM with 143.

    Where nobody reads what is printed any more, as after `| head`, the command ends in silence, with 141.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half-written is removed then too
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is None:  # closed by the shell: >&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):  # an ASCII terminal shows \\xe9 for what it does not know
            stream.reconfigure(errors="backslashreplace")
    LOG.addHandler(NOTICES)  # here alone: who imports minisweet configures logging as they like
    LOG.setLevel(logging.INFO)
    try:
        main()
        sys.stdout.flush()
        return
    except KeyboardInterrupt:
        message, status = "interrupted\n", 130
    except BrokenPipeError:
        message, status = "", 141
    except (InputError, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
            error = f"standard output: cannot be written ({error.strerror})"  # every other file is named
        message, status = one_line(f"{Path(sys.argv[0]).name}: error: {error}") + "\n", 2
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        reason = f"too little memory ({str(error):.100}); try a smaller --batch-size, --max-length or model"
        message, status = one_line(f"{Path(sys.argv[0]).name}: error: {reason}") + "\n", 2
    try:
        sys.stderr.write(message)
        sys.stdout.flush()
    except (OSError, ValueError):  # what is still unwritten goes nowhere: Python would complain of it at its end
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)
