"""Time several sides in turns, each in a process of its own, so that a machine whose speed drifts is fair to all."""

import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
LOOP = """
import sys, time
for _ in sys.stdin:
    start = time.perf_counter()
    unit()
    print("seconds", time.perf_counter() - start, flush=True)
"""


def take_turns(sides: dict[str, str], turns: int, folders: dict[str, Path] | None = None) -> dict[str, list[float]]:
    """Let each side run its unit in turn. Returns the seconds of each turn after the first, which warms up.

    `sides` are Python source that defines `unit()`. Each runs in its side's folder of `folders`, by default this clone.
    """
    workers, seconds = {}, {name: [] for name in sides}
    for name, source in sides.items():
        folder = (folders or {}).get(name, CHECKOUT)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        environment = os.environ | {"PYTHONPATH": str(folder)}
        workers[name] = subprocess.Popen([sys.executable, "-c", source + LOOP], cwd=folder, env=environment, **pipes)
    for turn in range(turns + 1):
        for name, worker in workers.items():
            print(turn, file=worker.stdin, flush=True)
            line = next((line for line in worker.stdout if line.startswith("seconds ")), None)
            if line is None:
                raise RuntimeError(f"{name} failed")
            seconds[name].append(float(line.split()[1]))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return {name: values[1:] for name, values in seconds.items()}


def call_in_turns(sides: dict[str, Callable[[], float]], turns: int) -> dict[str, list[float]]:
    """Call each side in turn. Returns the seconds that they return."""
    seconds = {name: [] for name in sides}
    for _ in range(turns):
        for name, call in sides.items():
            seconds[name].append(call())
    return seconds


def ratio_of(seconds: dict[str, list[float]], side: str, other: str) -> float:
    """Return the median, over the turns, of one side's seconds divided by the other's."""
    return statistics.median(a / b for a, b in zip(seconds[side], seconds[other], strict=True))


def say(title: str, seconds: dict[str, list[float]], side: str, other: str, count: int = 1) -> None:
    """Print the median milliseconds of two sides, for each of `count` examples, and their ratio."""
    ours, theirs = (1000 * statistics.median(seconds[name]) / count for name in (side, other))
    print(
        f"{title:<48}{side} {ours:9.2f} ms   {other} {theirs:9.2f} ms   {ratio_of(seconds, side, other):.2f}",
        flush=True,
    )
