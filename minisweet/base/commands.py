"""What every command shares: options that are checked, errors and notices of one line, and progress bars."""

import argparse
import logging
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from minisweet.base.files import LOG, InputError, one_line

PAUSE = 30.0  # seconds
STOPS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP


class Progress(tqdm):
    """A progress bar, with tqdm's arguments. Where standard error is no terminal, a line every half minute instead."""

    def __init__(self, iterable: Iterable | None = None, **options) -> None:
        self.has_terminal = sys.stderr.isatty()
        if not self.has_terminal:
            options |= {"mininterval": PAUSE, "maxinterval": PAUSE, "delay": PAUSE, "ncols": 0, "leave": False}
        super().__init__(iterable, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Show how far the work is. Once it is over, tqdm asks for an empty message, to clear the bar."""
        if self.has_terminal:
            super().display(msg, pos)
        elif msg is None:
            print(self, file=sys.stderr, flush=True)


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


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    """An argparse type: one of some names."""
    return _checked(str, lambda text: text in names, f"none of {', '.join(names)}")


def path_to(suffix: str) -> Callable[[str], Path]:
    """An argparse type: a file to write, which ends in `suffix`, so that no other file is replaced by mistake."""
    return _checked(Path, lambda path: path.suffix.lower() == suffix, f"no name that ends in {suffix}")


def list_of(parse: Callable[[str], object]) -> Callable[[str], list]:
    """An argparse type: different values with commas between them, none of them empty."""

    def parse_all(text: str) -> list:
        values = [parse(part) for part in text.split(",")]
        if len(set(values)) < len(values) or "" in values:
            raise argparse.ArgumentTypeError(f"{text!r} names one twice, or has an empty name")
        return values

    return parse_all


def run_command(main: Callable[[], None]) -> None:
    """Call `main`. Bad input, or too little memory, prints one line and exits with status 2.

    Ctrl-C exits with 130, SIGTERM with 143, and SIGHUP with 129, so that what is half-written is removed. Where nobody
    reads what is printed any more, as after `| head`, the command ends in silence, with 141.
    """
    stopped: list[int] = []  # the signals that came

    def stop(number: int, _: object) -> None:
        stopped.append(number)
        sys.exit(128 + number)

    for number in STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup has SIGHUP ignored
            signal.signal(number, stop)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("stdout", "stderr"):  # one that was closed before the start is None: what is printed there is dropped
        setattr(sys, name, getattr(sys, name) or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    sys.stdout.reconfigure(errors="backslashreplace")  # shows \\xe9 for what the terminal's encoding does not know
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
    except Exception as error:
        if stopped:  # libraries that read weights make another error of SystemExit
            sys.exit(128 + stopped[0])
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains of it at its end
            sys.exit(141)
        if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error)):
            error = f"too little memory ({str(error):.100}); try a smaller --batch-size, --max-length or model"
        elif not isinstance(error, InputError | OSError | UnicodeError):
            raise
        with suppress(OSError):  # nobody reads it, or its disk is full
            print(one_line(f"{Path(sys.argv[0]).name}: error: {error}"), file=sys.stderr)
        sys.exit(2)
