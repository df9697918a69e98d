"""Kill trainings at random moments (kill -9), resume each, and compare byte for byte with one that was never stopped.

    python -m tests.benchmark.kill --kills 20

A training is a fork of this process, so that it starts at once. Prints a line per method, and exits with 1 if any
result differs or a resumed training fails.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401  AdamW imports it, which takes longer than these trainings

import evaluate
import train
from minisweet.base.commands import run_command
from tests.conftest import write_model

METHODS = [
    ("--method", "sweet"),
    ("--method", "ee", "--amp", "bf16"),
    ("--method", "mm", "--exit-strategy", "lte"),
    ("--method", "branch", "--exit-strategy", "lte", "--amp", "bf16"),
    ("--method", "ee", "--exit-strategy", "lte"),
    ("--method", "branch", "--targets", "half"),
]
TIMES = ("seconds", "finished", "examples_per_second", "stages")  # of run.json and evaluation.json


def result(run: str | Path) -> tuple:
    """What must be the same of two runs: the weights' bytes, and what was told but times, dates and options of both."""
    told = []
    for name in ("run.json", "evaluation.json"):
        path = Path(run, name)
        record = json.loads(path.read_text()) if path.exists() else {}
        record["arguments"] = {k: v for k, v in record.get("arguments", {}).items() if k not in ("out", "save_every")}
        told.append({key: value for key, value in record.items() if key not in (*TIMES, "run")})
    return Path(run, "model.safetensors").read_bytes(), told


def start(module, *arguments) -> int:
    """Fork a process that runs a command. Returns its id."""
    if child := os.fork():
        return child
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = [f"{module.__name__}.py", *map(str, arguments)]
    status = 0
    try:
        run_command(module.main)
    except SystemExit as exit_:
        status = exit_.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def finish(module, *arguments) -> None:
    """Run a command to its end, which must be a good one."""
    _, status = os.waitpid(start(module, *arguments), 0)
    if status:
        sys.exit(f"{' '.join(map(str, arguments))}: status {status}\n{Path('output.txt').read_text()}")


def kill_and_compare(options: tuple, kills: int, rng: random.Random) -> tuple[int, int, int]:
    """Train once without a stop, then with kills. Returns how many kills hit, hit with a checkpoint there, differed."""
    words = ["--model", "tiny", "--train-size", 160, "--batch-size", 8, "--exit-layers", "1,2,4", "--max-length", 32]
    words += ["--save-every", 0.0005, *options]
    begun = time.perf_counter()
    finish(train, *words, "--out", "whole")
    length = time.perf_counter() - begun
    hits = with_checkpoint = differing = 0
    trial = 0
    while hits < kills:
        out = f"run{(trial := trial + 1)}"
        for _ in range(rng.randint(1, 3)):  # one training is killed up to three times
            child = start(train, *words, "--out", out, "--resume")
            time.sleep(rng.uniform(0, 1.1 * length))
            os.kill(child, signal.SIGKILL)
            hits += os.WIFSIGNALED(os.waitpid(child, 0)[1])
            with_checkpoint += any(Path(f".{out}.checkpoint").glob("*.pt"))
        finish(train, *words, "--out", out, "--resume")
        differing += result(out) != result("whole") or any(Path().glob(f".{out}.*"))
    for run in (out, "whole"):  # the same model has the same evaluation, which one pair shows
        finish(evaluate, run, "--thresholds", 3)
    differing += result(out) != result("whole")
    return hits, with_checkpoint, differing


def main() -> None:
    """Kill and compare for each method."""
    parser = argparse.ArgumentParser(description="Kill trainings at random moments, resume and compare them.")
    parser.add_argument("--kills", type=int, default=20, help="of each method at least (default: 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model-type", choices=("bert", "deberta"), default="bert")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng, failed = random.Random(args.seed), 0
    for options in METHODS:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            write_model(Path("tiny"), args.model_type)
            hits, with_checkpoint, differing = kill_and_compare(options, args.kills, rng)
        failed += differing
        print(
            f"{' '.join(options)}: {hits} kills, {with_checkpoint} found a checkpoint, {differing} differ", flush=True
        )
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
