"""Notices go through logging, results through print; progress is a bar on a terminal alone."""

import io
import logging
import subprocess
import sys
import time

import pytest

from minisweet.base.commands import NOTICES, Progress, run_command
from minisweet.base.safe import LOG
from tests.conftest import CHECKOUT


class Terminal(io.StringIO):
    """What tqdm takes for a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def as_it_was():
    """Undo what `run_command` set for its process."""
    level, handlers = LOG.level, LOG.handlers[:]
    LOG.handlers.clear()
    yield
    LOG.setLevel(level)
    LOG.handlers[:] = handlers


def test_a_command_prints_results_and_shows_notices_each_on_one_line(capsys):
    def main() -> None:
        LOG.warning("a\nnotice of %d", 3)
        LOG.info("another")
        print("result")

    run_command(main)
    run_command(main)  # as from a notebook: nothing is told twice
    assert capsys.readouterr() == ("result\n" * 2, "a\\nnotice of 3\nanother\n" * 2)


def test_who_imports_minisweet_configures_logging():
    code = (
        "import minisweet, logging; log = logging.getLogger('minisweet'); assert (log.level, log.handlers) == (0, [])"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT).returncode == 0


def test_a_notice_tears_no_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    LOG.addHandler(NOTICES)
    with Progress(total=4, desc="train", miniters=1, mininterval=0, ncols=40, file=terminal) as bar:
        bar.update(2)
        LOG.warning("a notice")
        bar.update(2)
    lines = terminal.getvalue().replace("\r", "\n").split("\n")
    assert "a notice" in [line.strip() for line in lines]
    assert "train" in lines[-2]


@pytest.mark.parametrize("as_iterable", [True, False])
def test_without_a_terminal_progress_is_a_line_a_minute_and_one_at_the_end(capsys, monkeypatch, as_iterable):
    LOG.addHandler(NOTICES)
    LOG.setLevel(logging.INFO)
    clock = iter(range(0, 10**6, 25))  # a step takes 25 seconds
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    if as_iterable:
        assert list(Progress(range(7), desc="live", unit="threshold")) == list(range(7))
    else:
        with Progress(total=7, desc="live", unit="threshold") as bar:
            for _ in range(7):
                bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "live: 7 of 7 threshold"
    assert 2 <= len(lines) <= 4
    assert lines[0].endswith(" minutes left")
    assert all(line.startswith("live: ") for line in lines)


def test_a_bar_that_is_switched_off_says_nothing(capsys):
    LOG.addHandler(NOTICES)
    LOG.setLevel(logging.INFO)
    assert list(Progress(range(3), desc="x", disable=True)) == [0, 1, 2]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("stream", [None, "closed", "full"])
def test_a_notice_that_nobody_can_read_stops_nothing(monkeypatch, stream):
    if stream == "closed":
        stream = io.StringIO()
        stream.close()
    elif stream == "full":
        stream = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    monkeypatch.setattr(sys, "stderr", stream)
    run_command(lambda: LOG.warning("lost"))
