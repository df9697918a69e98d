"""A run's speed-accuracy curve, computed, written and printed: what evaluate.py and `minisweet reproduce` call.

Dimension letters: N instances, P thresholds.
"""

import time
from dataclasses import asdict
from pathlib import Path
from shlex import quote

import numpy as np

from minisweet.base.devices import choose_device, device_name
from minisweet.base.files import write_json
from minisweet.toy import LEVELS
from minisweet.metrics import METRICS
from minisweet.plots import draw_curves
from minisweet.sweep import crossfit, spaced_thresholds, sweep
from minisweet.record import Evaluation, versions
from minisweet.run import CURVE, EVALUATION, Run


def evaluate(folder: Path, thresholds: int = 11, device: str = "auto", amp: str = "auto") -> None:
    """Run all exits on a run's validation rows, and write and print what comes out."""
    start, run = time.perf_counter(), Run.read(folder)
    record, examples = run.record, run.texts.examples
    run.outputs = outputs = run.ask(run.texts, device, amp)
    seconds = round(time.perf_counter() - start, 2)
    run.write_outputs(folder)
    outputs = outputs.scored()
    folds = crossfit(outputs, record.combines)
    points = spaced_thresholds(thresholds, folds[0][0].lowest)
    curve, taken = sweep(folds, outputs, points)
    evaluation = Evaluation(
        id=record.id,
        task=record.task,
        method=record.arguments.method,
        exit_strategy=record.arguments.exit_strategy,
        metric=outputs.metric,
        exit_layers=outputs.exits.layers,
        thresholds=points,
        **curve,
        examples=len(outputs.labels),
        dev_digest=examples.digest(),
        seconds=seconds,
        device=device_name(choose_device(device)),
        precision=outputs.precision,
        versions=versions(),
    )
    write_json(folder / EVALUATION, asdict(evaluation))
    draw_curves(folder / CURVE, {str(folder): evaluation})
    what = f"{record.arguments.model}, {record.arguments.method}, {record.task}"
    print(f"{folder}: {what}, {len(outputs.labels):,} validation rows")
    print_curve(evaluation)
    if examples.difficulties:  # of the toy task, in the middle of the curve
        print_difficulties(examples.difficulties, np.array(outputs.exits.layers)[taken], points)
    next_step = (
        ""
        if record.arguments.exit_strategy == "lte"
        else f"; to choose what to deploy: minisweet choose {quote(str(folder))}"
    )
    print(f"\nwritten to {folder / EVALUATION}{next_step}", flush=True)


def print_curve(its: Evaluation) -> None:
    """Print how the exits fare alone, and together at each threshold."""
    print(f"\n{'exit after layer':<25}" + "".join(f"{n:8}" for n in its.exit_layers))
    print(f"{METRICS[its.metric]:<25}" + "".join(f"{value:8.1f}" for value in its.exit_scores))
    if one := [str(n) for n, answers in zip(its.exit_layers, its.exit_answers, strict=True) if answers < 2]:
        print(f"gives all rows one answer: the exit after layer {', '.join(one)}")
    print(f"\n{'threshold':>9}{'score':>8}{'speedup ratio':>15}   rows that leave at each exit")
    rows = zip(its.thresholds, its.scores, its.speedup_ratios, its.exit_counts, strict=True)
    for threshold, value, ratio, counts in rows:
        print(f"{threshold:9.3f}{value:8.1f}{ratio:15.3f}   " + "".join(f"{count:7,}" for count in counts))
    print(f"area under the curve {its.area:.2f}; all exits of all rows in {its.seconds:.1f} s")


def print_difficulties(difficulties: list[str], left_after: np.ndarray, thresholds: list[float]) -> None:
    """Print after which layer rows (P, N) leave at a threshold of about 0.9, the mean of each difficulty."""
    p = int(np.abs(np.array(thresholds) - 0.9).argmin())
    print(f"\n{'difficulty':<25}mean layer that rows leave after at threshold {thresholds[p]:.3f}")
    for level in filter(difficulties.count, LEVELS):
        print(f"{level:<25}{left_after[p, np.array(difficulties) == level].mean():8.2f}")
