"""Score a run's exits, and sweep thresholds for its speed-accuracy curve (Sec. 3.3).

    python evaluate.py                  # the newest run under runs/
    python evaluate.py runs/NAME --thresholds 21

One forward pass over the validation set gives every exit's logits, and with them all thresholds' decisions exactly.
Prints the scores and writes them to evaluation.json in the run folder.
"""

import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from tqdm import tqdm

from minisweet.adaptive import (
    ExitRule,
    area_under_curve,
    certainty_ranges,
    exit_costs,
    exits_taken,
    spaced_thresholds,
)
from minisweet.calibration import (
    CALIBRATIONS,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    row_temperatures,
)
from minisweet.data.tasks import TASKS, load_examples, score
from minisweet.data.text import TokenizedExamples, load_tokenizer
from minisweet.data.toy import LEVELS
from minisweet.files.commands import Parser, list_of, run_command, whole_number
from minisweet.files.runs import load_run, method_name, newest_run, versions
from minisweet.files.safe import InputError, write_json, written_beside
from minisweet.live import GATHERED, measure_live
from minisweet.paper.report import one_class_layers
from minisweet.training.devices import (
    add_device_options,
    autocast,
    choose_device,
    choose_precision,
    device_name,
    place,
    reuse_freed_memory,
)
from minisweet.training.distributed import in_turn, predict, together


def main() -> None:
    """Evaluate one run."""
    parser = Parser(description="Score a run's exits and sweep thresholds for its speed-accuracy curve.")
    option = parser.add_argument
    option("run", nargs="?", type=Path, metavar="RUN", help="run folder (default: under runs/, the last written)")
    option(
        "--thresholds",
        type=whole_number(2, 10001),
        default=11,
        help="from 1/classes (lte: 0) to 1 (default: 11)",
    )
    option("--data-dir", type=Path, help="holds the GLUE tasks' folders (default: as in training)")
    option("--calibration", choices=CALIBRATIONS, default="crossfit", help="of confidence (default: crossfit)")
    option("--use-exits", type=list_of(whole_number(1)), help="ask these exits alone, such as 3,6 (default: all)")
    option("--live", action="store_true", help="also run early exit live, and time it")
    option("--live-batch-size", type=whole_number(1), default=32, help="examples that run together (default: 32)")
    add_device_options(parser)
    args = parser.parse_args()
    reuse_freed_memory()
    run = args.run or newest_run()
    device = choose_device(args.device)
    precision = choose_precision(args.amp, device)
    model, record = load_run(run)
    if args.use_exits:
        try:
            model = model.keep_exits(args.use_exits)
        except ValueError as error:
            raise InputError(f"--use-exits: {error}") from None
    task, method, exit_layers = TASKS[record["task"]], record["method"], list(model.exit_layers)
    with in_turn():
        rows = load_examples(record["task"], "dev", args.data_dir or Path(record["arguments"]["data_dir"]))
    tokenizer = load_tokenizer(run, record["vocab_size"], record["arguments"]["max_length"])
    examples = TokenizedExamples(tokenizer, rows)

    start = time.perf_counter()
    logits, certainty = predict(model.to(device), examples, precision)  # (K, N, C), and (K or K-1, N) or None
    seconds = time.perf_counter() - start
    if place().rank:  # the first process alone scores and writes
        return
    temperatures = row_temperatures(logits, torch.from_numpy(examples.labels), args.calibration)  # (K, N)
    ranges = None if certainty is None else certainty_ranges(certainty, len(logits))  # (K, 2)
    rule = ExitRule(logits.shape[-1], temperatures if ranges is None else None, ranges)
    confidence = rule.confidences(logits, certainty)  # (K, N)
    thresholds = spaced_thresholds(args.thresholds, rule.lowest)
    # What leaving at each exit costs, and which exit each instance takes, at each threshold: (thresholds, K or N)
    costs = np.array([exit_costs(exit_layers, record["depth"], method, threshold) for threshold in thresholds])
    taken = torch.stack([exits_taken(confidence, threshold, rule.lowest) for threshold in thresholds])
    evaluation = {
        "task": record["task"],
        "metric": task.metric,
        "method": method,
        "exit_layers": exit_layers,
        "exit_strategy": record["exit_strategy"],
        **sweep(logits.argmax(-1), taken, examples.labels, thresholds, costs, task.metric),
        # How often each exit predicts each class: (K, C)
        "class_counts": [row.argmax(-1).bincount(minlength=len(task.labels)).tolist() for row in logits],
        "calibration": args.calibration,
        **calibration_report(logits, examples.labels, temperatures),
    }
    if ranges is not None:
        evaluation["certainty_ranges"] = ranges.tolist()
    if rows.difficulties is not None:
        evaluation["mean_exit_layers"] = mean_exit_layers(rows.difficulties, taken, exit_layers)
    if args.live:
        progress = partial(tqdm, desc="live", unit="threshold")
        with autocast(device, precision):
            live = measure_live(model, examples, thresholds, costs, args.live_batch_size, rule, progress)
        evaluation["live"], live_labels, live_exits = live
        differs = (live_exits != taken) | (live_labels != logits.argmax(-1).gather(0, taken))
        evaluation |= {"live_batch_size": args.live_batch_size, "live_differs": int(differs.sum())}
    evaluation |= {
        "examples": len(examples),
        "seconds": round(seconds, 2),
        "device": device_name(device),
        "precision": str(precision or torch.float32),
        "versions": versions(),
    }
    save_logits(run / "logits.safetensors", logits, certainty, examples.labels)
    write_json(run / "evaluation.json", evaluation)
    name = method_name(record["arguments"] | {"method": method})  # of old runs with what passes their boundaries
    print(f"{run}: {record['model']}, {name}, {record['task']}, {len(examples)} validation examples")
    print_evaluation(evaluation)
    print(f"\nwritten to {run / 'evaluation.json'}")


def save_logits(path: Path, logits: torch.Tensor, certainty: torch.Tensor | None, labels: np.ndarray) -> None:
    """Write `logits` (K, N, C), `certainty` (K or K-1, N) of learning-to-exit and `labels` (N,), for rules to try."""
    tensors = {"logits": logits.contiguous(), "labels": torch.from_numpy(labels)}
    if certainty is not None:
        tensors["certainty"] = certainty.contiguous()
    with written_beside(path) as partial:
        partial.write_bytes(save(tensors))


def sweep(
    predictions: torch.Tensor,
    taken: torch.Tensor,
    labels: np.ndarray,
    thresholds: list[float],
    costs: np.ndarray,
    metric: str,
) -> dict:
    """Score the exits, and what leaves where at each threshold.

    Args:
        predictions: (K, N), all exits' classes.
        taken: (thresholds, N), the exit that each instance takes, counted from 0.
        labels: (N,).
        thresholds: increasing.
        costs: (thresholds, K) of leaving at each exit, as a share of the encoder's layers.
        metric: "accuracy" or "matthews".

    Returns:
        exit_scores (K), thresholds, scores, speedup_ratios, exit_counts (thresholds, K) and area; scores in percent.
    """
    scores, ratios, counts = [], [], []
    for exits, cost in zip(taken, costs, strict=True):
        chosen = predictions.gather(0, exits[None])[0]  # (N,) the prediction of the exit taken
        scores.append(score(chosen.numpy(), labels, metric))
        counts.append(exits.bincount(minlength=len(cost)).tolist())
        ratios.append(float(np.dot(counts[-1], cost) / len(labels)))  # Eq. 1
    return {
        "exit_scores": score(predictions.numpy(), labels, metric).tolist(),
        "thresholds": thresholds,
        "scores": scores,
        "speedup_ratios": ratios,
        "exit_counts": counts,
        "area": area_under_curve(ratios, scores),
    }


def calibration_report(logits: torch.Tensor, labels: np.ndarray, temperatures: torch.Tensor) -> dict:
    """How far each exit's confidence can be trusted.

    Args:
        logits: (K, N, C).
        labels: (N,).
        temperatures: (K, N), those in use.

    Returns:
        temperatures (K), fitted on all rows, to be kept for new text; ece and nll (K), each before and after scaling.
    """
    targets = torch.from_numpy(labels)
    scaled = logits / temperatures[..., None]
    return {
        "temperatures": [fit_temperature(exit_logits, targets) for exit_logits in logits],
        "ece": {
            "before": [expected_calibration_error(exit_logits, targets) for exit_logits in logits],
            "after": [expected_calibration_error(exit_logits, targets) for exit_logits in scaled],
        },
        "nll": {
            "before": [negative_log_likelihood(exit_logits, targets) for exit_logits in logits],
            "after": [negative_log_likelihood(exit_logits, targets) for exit_logits in scaled],
        },
    }


def mean_exit_layers(difficulties: list[str], taken: torch.Tensor, exit_layers: list[int]) -> dict:
    """The mean layer at which each difficulty's instances leave, at each threshold.

    Args:
        difficulties: (N), each of `LEVELS`.
        taken: (thresholds, N), the exit that each instance takes, counted from 0.
        exit_layers: (K).

    Returns:
        For each difficulty, easy to hard, a list (thresholds).
    """
    layers, levels = np.array(exit_layers)[taken.numpy()], np.array(difficulties)  # (thresholds, N), (N,)
    return {level: layers[:, levels == level].mean(1).tolist() for level in LEVELS}


def print_evaluation(evaluation: dict) -> None:
    """Print what stands in evaluation.json as tables."""
    exit_layers, thresholds = evaluation["exit_layers"], evaluation["thresholds"]
    softmax = "   (of the softmax, which lte does not use)" if evaluation["exit_strategy"] == "lte" else ""
    print(f"\n{'exit after layer':<18}" + "".join(f"{n:>8}" for n in exit_layers))
    print(f"{evaluation['metric']:<18}" + "".join(f"{value:8.1f}" for value in evaluation["exit_scores"]))
    if failed := one_class_layers(evaluation):
        print(f"{'predicts one class':<18}" + "".join(f"{'yes' if n in failed else '':>8}" for n in exit_layers))
    for name in ("ece", "nll"):
        for when in ("before", "after"):
            values = "".join(f"{value:8.3f}" for value in evaluation[name][when])
            print(f"{name + ' ' + when:<18}{values}{softmax}")
    print(f"\n{'threshold':>9}{'score':>8}{'speedup ratio':>15}   layer:instances that leave after it")
    columns = (evaluation[key] for key in ("thresholds", "scores", "speedup_ratios", "exit_counts"))
    for threshold, value, ratio, counts in zip(*columns, strict=True):
        left = "".join(f"{n:>5}:{count:<6}" for n, count in zip(exit_layers, counts, strict=True))
        print(f"{threshold:9.3f}{value:8.1f}{ratio:15.3f}   {left}")
    print(
        f"\narea under the curve {evaluation['area']:.2f}; all exits of all examples in {evaluation['seconds']:.1f} s"
    )
    if "mean_exit_layers" in evaluation:
        means = evaluation["mean_exit_layers"]
        print("\nmean exit layer per difficulty\nthreshold" + "".join(f"{name:>16}" for name in means))
        for threshold, *row in zip(thresholds, *means.values(), strict=True):
            print(f"{threshold:9.3f}" + "".join(f"{value:16.2f}" for value in row))
    if "live" in evaluation:
        together = f"{evaluation['live_batch_size']} at a time, gathered from {GATHERED} such batches"
        print(f"\nlive, {together}; latency (p50, ...) of one at a time, milliseconds")
        print(f"{'threshold':>9}{'layer share':>13}{'wall share':>12}{'instances/s':>13}{'p50':>8}{'p90':>8}{'p99':>8}")
        for row in evaluation["live"]:
            print(f"{row['threshold']:9.3f}{row['layer_share']:13.3f}{row['wall_share']:12.3f}", end="")
            print(f"{row['instances_per_second']:13.1f}" + "".join(f"{ms:8.1f}" for ms in row["latency_ms"].values()))
        decisions = len(thresholds) * evaluation["examples"]
        print(f"exits or labels differ from the sweep's in {evaluation['live_differs']} of {decisions} decisions")


if __name__ == "__main__":
    run_command(together(main))
