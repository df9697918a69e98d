"""Score a run's exits, and sweep thresholds for its speed-accuracy curve (Sec. 3.3).

    python evaluate.py                  # the newest run under runs/
    python evaluate.py runs/NAME --thresholds 21

One forward pass over the validation set gives every exit's logits, and with them all thresholds' decisions exactly.
Prints the scores and writes them to evaluation.json in the run folder.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from minisweet.adaptive import area_under_curve, exit_costs, exits_taken, spaced_thresholds
from minisweet.cli import Parser, positive_int, run_command, write_json
from minisweet.devices import (
    add_device_options,
    autocast,
    choose_device,
    choose_precision,
    device_name,
    reuse_freed_memory,
)
from minisweet.live import measure_live
from minisweet.runs import load_run, newest_run, versions
from minisweet.tasks import TASKS, load_examples, score
from minisweet.text import TokenizedExamples, load_tokenizer
from minisweet.toy import LEVELS

BATCH_SIZE = 64


@torch.inference_mode()
def predict(model: torch.nn.Module, examples: TokenizedExamples, precision: torch.dtype | None) -> torch.Tensor:
    """All exits' logits (K, N, C), float32, on the CPU and in the order of `examples`."""
    model.eval()
    device = next(model.parameters()).device
    rows, logits = [], []
    with tqdm(total=len(examples), unit="ex", desc="evaluate") as progress, autocast(device, precision):
        for batch in examples.by_length(BATCH_SIZE):
            rows.append(batch.rows)
            logits.append(model(*batch.to(device).inputs).float().cpu())
            progress.update(len(batch.rows))
    order = torch.cat(rows).argsort()
    return torch.cat(logits, dim=1)[:, order]


def main() -> None:
    """Evaluate one run."""
    parser = Parser(description="Score a run's exits and sweep thresholds for its speed-accuracy curve.")
    option = parser.add_argument
    option("run", nargs="?", type=Path, metavar="RUN", help="run folder (default: under runs/, the last written)")
    option("--thresholds", type=threshold_count, default=11, help="how many, from 1/classes to 1 (default: 11)")
    option("--data-dir", type=Path, help="holds the GLUE tasks' folders (default: as in training)")
    option("--live", action="store_true", help="also run early exit live, and time it")
    option("--live-batch-size", type=positive_int, default=32, help="examples that run together (default: 32)")
    add_device_options(parser)
    args = parser.parse_args()
    reuse_freed_memory()
    run = args.run or newest_run()
    device = choose_device(args.device)
    precision = choose_precision(args.amp, device)
    model, record = load_run(run)
    task, method, exit_layers = TASKS[record["task"]], record["method"], record["exit_layers"]
    rows = load_examples(record["task"], "dev", args.data_dir or Path(record["arguments"]["data_dir"]))
    tokenizer = load_tokenizer(run, record["vocab_size"], record["arguments"]["max_length"])
    examples = TokenizedExamples(tokenizer, rows)

    start = time.perf_counter()
    logits = predict(model.to(device), examples, precision)  # (K, N, C)
    seconds = time.perf_counter() - start
    labels = examples.labels  # (N,)
    predictions = logits.argmax(-1)  # (K, N)
    costs = np.array(exit_costs(exit_layers, record["depth"], method))  # (K,)
    exit_scores = [score(predictions[k].numpy(), labels, task.metric) for k in range(len(exit_layers))]

    print(f"{run}: {record['model']}, {method}, {record['task']}, {len(examples)} validation examples")
    print(f"\n{'exit after layer':<18}" + "".join(f"{n:>8}" for n in exit_layers))
    print(f"{task.metric:<18}" + "".join(f"{value:8.1f}" for value in exit_scores))
    print(f"\n{'threshold':>9}{'score':>8}{'speedup ratio':>15}   layer:instances that leave after it")
    thresholds = spaced_thresholds(args.thresholds, len(task.labels))
    scores, ratios, counts = [], [], []
    for threshold in thresholds:
        taken = exits_taken(logits, threshold)  # (N,)
        chosen = predictions.gather(0, taken[None])[0]  # (N,) the prediction of the exit taken
        scores.append(score(chosen.numpy(), labels, task.metric))
        counts.append(taken.bincount(minlength=len(exit_layers)).tolist())
        ratios.append(float(np.dot(counts[-1], costs) / len(examples)))  # Eq. 1
        left = "".join(f"{n:>5}:{count:<6}" for n, count in zip(exit_layers, counts[-1], strict=True))
        print(f"{threshold:9.3f}{scores[-1]:8.1f}{ratios[-1]:15.3f}   {left}")
    area = area_under_curve(ratios, scores)
    print(f"\narea under the curve {area:.2f}; {len(examples)} examples through all exits in {seconds:.1f} s")

    evaluation = {
        "task": record["task"],
        "metric": task.metric,
        "method": method,
        "exit_layers": exit_layers,
        "exit_scores": exit_scores,
        "thresholds": thresholds,
        "scores": scores,
        "speedup_ratios": ratios,
        "exit_counts": counts,
        "area": area,
        "examples": len(examples),
        "seconds": round(seconds, 2),
        "device": device_name(device),
        "precision": str(precision or torch.float32),
        "versions": versions(),
    }
    if args.live:
        evaluation["live"] = run_live(model, examples, logits, thresholds, record["depth"], args, precision)
    if rows.difficulties is not None:
        evaluation["mean_exit_layers"] = print_difficulties(rows.difficulties, logits, thresholds, exit_layers)
    write_json(run / "evaluation.json", evaluation)
    print(f"\nwritten to {run / 'evaluation.json'}")


def run_live(model, examples, logits, thresholds: list[float], depth: int, args, precision) -> list[dict]:
    """Run early exit live at each threshold, print what it costs, and return it."""
    device = next(model.parameters()).device
    progress = partial(tqdm, desc="live", unit="threshold")
    with autocast(device, precision):
        report, labels, exits = measure_live(model, examples, thresholds, depth, args.live_batch_size, progress)
    print(f"\nlive, {args.live_batch_size} at a time; latency is that of one at a time, in milliseconds")
    print(f"{'threshold':>9}{'layer share':>13}{'wall share':>12}{'instances/s':>13}{'p50':>8}{'p90':>8}{'p99':>8}")
    for row in report:
        print(f"{row['threshold']:9.3f}{row['layer_share']:13.3f}{row['wall_share']:12.3f}", end="")
        print(f"{row['instances_per_second']:13.1f}" + "".join(f"{ms:8.1f}" for ms in row["latency_ms"].values()))
    swept = torch.stack([exits_taken(logits, threshold) for threshold in thresholds])  # (number of thresholds, N)
    same = (exits == swept) & (labels == logits.argmax(-1).gather(0, swept))
    print(f"exits and labels differ from the sweep's in {(~same).sum()} of {same.numel()} decisions")
    return report


def print_difficulties(difficulties: list[str], logits, thresholds: list[float], exit_layers: list[int]) -> dict:
    """Print and return the mean layer at which each difficulty's instances leave, per threshold."""
    layers, levels = np.array(exit_layers), np.array(difficulties)
    names = [level for level in LEVELS if level in difficulties]  # easy to hard
    taken = [layers[exits_taken(logits, threshold).numpy()] for threshold in thresholds]
    means = {name: [float(exits[levels == name].mean()) for exits in taken] for name in names}
    print("\nmean exit layer per difficulty\nthreshold" + "".join(f"{name:>16}" for name in names))
    for index, threshold in enumerate(thresholds):
        print(f"{threshold:9.3f}" + "".join(f"{means[name][index]:16.2f}" for name in names))
    return means


def threshold_count(text: str) -> int:
    """An argparse type: 2 to 10,001."""
    if not text.isdecimal() or not 2 <= int(text) <= 10001:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 2 to 10001")
    return int(text)


if __name__ == "__main__":
    run_command(main)
