"""Evaluate a run: what evaluate.py and `minisweet reproduce` call.

Dimension letters: N instances, P thresholds.
"""

import time
from pathlib import Path
from shlex import quote

import numpy as np

from minisweet.base import devices
from minisweet.base.files import write_json
from minisweet.data.toy import LEVELS
from minisweet.evaluation.metrics import METRICS
from minisweet.evaluation.outputs import run_exits, save_outputs
from minisweet.evaluation.plots import draw_curves
from minisweet.evaluation.sweep import crossfit, spaced_thresholds, sweep
from minisweet.runs.folders import CURVE, EVALUATION, versions
from minisweet.runs.load import load_run, read_evaluation, read_validation


def evaluate(run: Path, thresholds: int = 11, device: str = "auto", amp: str = "auto") -> None:
    """Run all exits on a run's validation rows, and write and print what comes out."""
    start, where = time.perf_counter(), devices.choose_device(device)
    precision, (model, record) = devices.choose_precision(amp, where), load_run(run)
    rows = read_validation(run, record)
    outputs = run_exits(run, record, model.to(where), rows, precision)
    seconds = time.perf_counter() - start
    save_outputs(run, outputs, precision)
    outputs = outputs.against_full_depth() if outputs.metric == "agreement" else outputs.labelled()
    folds = crossfit(outputs)
    points = spaced_thresholds(thresholds, folds[0][0].lowest)
    curve, taken = sweep(folds, outputs, points)
    evaluation = {
        "id": record.id,
        **{key: getattr(record, key) for key in ("task", "method", "exit_strategy")},
        "metric": outputs.metric,
        "exit_layers": outputs.exits.layers,
        "thresholds": points,
        **curve,
        "examples": len(outputs.labels),
        "dev_digest": rows.digest(),
        "seconds": round(seconds, 2),
        "device": devices.device_name(where),
        "precision": str(precision),
        "versions": versions(),
    }
    write_json(run / EVALUATION, evaluation)
    draw_curves(run / CURVE, {str(run): read_evaluation(run)})
    print(f"{run}: {record.model}, {record.method}, {record.task}, {len(outputs.labels):,} validation rows")
    print_curve(evaluation)
    if rows.difficulties:  # of the toy task, in the middle of the curve
        print_difficulties(rows.difficulties, np.array(outputs.exits.layers)[taken], points)
    print(f"\nwritten to {run / EVALUATION}; to choose what to deploy: minisweet choose {quote(str(run))}", flush=True)


def print_curve(evaluation: dict) -> None:
    """Print how the exits fare alone, and together at each threshold."""
    layers = evaluation["exit_layers"]
    print(f"\n{'exit after layer':<25}" + "".join(f"{n:8}" for n in layers))
    print(f"{METRICS[evaluation['metric']]:<25}" + "".join(f"{value:8.1f}" for value in evaluation["exit_scores"]))
    if one := [str(n) for n, answers in zip(layers, evaluation["exit_answers"], strict=True) if answers < 2]:
        print(f"gives all rows one answer: the exit after layer {', '.join(one)}")
    print(f"\n{'threshold':>9}{'score':>8}{'speedup ratio':>15}   rows that leave at each exit")
    columns = (evaluation[key] for key in ("thresholds", "scores", "speedup_ratios", "exit_counts"))
    for threshold, value, ratio, counts in zip(*columns, strict=True):
        print(f"{threshold:9.3f}{value:8.1f}{ratio:15.3f}   " + "".join(f"{count:7,}" for count in counts))
    print("area under the curve {area:.2f}; all exits of all rows in {seconds:.1f} s".format(**evaluation))


def print_difficulties(difficulties: list[str], left_after: np.ndarray, thresholds: list[float]) -> None:
    """Print after which layer rows (P, N) leave at a threshold of about 0.9, the mean of each difficulty."""
    p = int(np.abs(np.array(thresholds) - 0.9).argmin())
    print(f"\n{'difficulty':<25}mean layer that rows leave after at threshold {thresholds[p]:.3f}")
    for level in filter(difficulties.count, LEVELS):
        print(f"{level:<25}{left_after[p, np.array(difficulties) == level].mean():8.2f}")
