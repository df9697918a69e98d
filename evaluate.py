"""Score a run's exits, and sweep thresholds for its speed-accuracy curve (Sec. 3.3).

    python evaluate.py                          # the newest run under runs/
    python evaluate.py runs/NAME --thresholds 11
    python evaluate.py runs/A runs/B runs/C --plot compare.png

One forward pass over the run's validation rows gives every exit's logits, and with them all thresholds' decisions
exactly. Prints the scores and the curve, and writes logits.safetensors, evaluation.json and curve.png. What to deploy
is another question: minisweet choose RUN.
"""

import argparse
import time
from pathlib import Path
from shlex import quote

import numpy as np

from minisweet.base import devices
from minisweet.base.commands import Parser, path_to, run_command, whole_number
from minisweet.base.files import InputError, write_json
from minisweet.data.toy import LEVELS
from minisweet.evaluation.metrics import METRICS
from minisweet.evaluation.outputs import run_exits, save_outputs
from minisweet.evaluation.plots import draw_curves
from minisweet.evaluation.sweep import crossfit, spaced_thresholds, sweep
from minisweet.runs import folders, load


def main() -> None:
    """Draw the evaluations of several runs, or evaluate one."""
    parser = Parser(__doc__)
    option = parser.add_argument
    option("runs", nargs="*", type=Path, metavar="RUN", help="run folder (default: under runs/, the last written)")
    option("--plot", type=path_to(".png"), metavar="PNG", help="evaluate nothing: draw these runs' curves together")
    option("--thresholds", type=whole_number(2, 10001), default=11, help="from 1/classes (lte: 0) to 1 (default: 11)")
    devices.add_device_options(parser)
    args = parser.parse_args()
    if len(args.runs) > 1 and not args.plot:
        raise InputError(f"{args.runs[1]}: a second run, and only --plot takes several")
    runs = args.runs or [load.newest_run()]
    devices.tune_cpu()
    if args.plot:
        draw_curves(args.plot, {str(run): load.read_evaluation(run) for run in runs})
        print(f"written to {args.plot}")
    else:
        evaluate(runs[0], args)


def evaluate(run: Path, args: argparse.Namespace) -> None:
    """Run all exits on the validation rows, and write and print what comes out."""
    start, device = time.perf_counter(), devices.choose_device(args.device)
    precision, (model, record) = devices.choose_precision(args.amp, device), load.load_run(run)
    rows = load.read_validation(run, record)
    outputs = run_exits(run, record, model.to(device), rows, precision)
    seconds = time.perf_counter() - start
    save_outputs(run, outputs, precision)
    outputs = outputs.against_full_depth() if outputs.metric == "agreement" else outputs.labelled()
    folds = crossfit(outputs)
    thresholds = spaced_thresholds(args.thresholds, folds[0][0].lowest)
    curve, taken = sweep(folds, outputs, thresholds)
    evaluation = {
        "id": record.id,
        **{key: getattr(record, key) for key in ("task", "method", "exit_strategy")},
        "metric": outputs.metric,
        "exit_layers": outputs.exits.layers,
        "thresholds": thresholds,
        **curve,
        "examples": len(outputs.labels),
        "dev_digest": rows.digest(),
        "seconds": round(seconds, 2),
        "device": devices.device_name(device),
        "precision": str(precision),
        "versions": folders.versions(),
    }
    write_json(run / folders.EVALUATION, evaluation)
    draw_curves(run / folders.CURVE, {str(run): load.read_evaluation(run)})
    print(f"{run}: {record.model}, {record.method}, {record.task}, {len(outputs.labels):,} validation rows")
    print_curve(evaluation)
    if rows.difficulties:  # of the toy task, in the middle of the curve
        print_difficulties(rows.difficulties, np.array(outputs.exits.layers)[taken], thresholds)
    print(f"\nwritten to {run / folders.EVALUATION}; to choose what to deploy: minisweet choose {quote(str(run))}")


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


if __name__ == "__main__":
    run_command(main)
