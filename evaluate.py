"""Score a run's exits, sweep thresholds for its speed-accuracy curve (Sec. 3.3), and recommend one to deploy.

    python evaluate.py                  # the newest run under runs/
    python evaluate.py runs/NAME --max-loss 0.5 --sure 90
    python evaluate.py runs/NAME --use-exits 0,6
    python evaluate.py runs/NAME --test FILE.csv
    python evaluate.py runs/A runs/B runs/C --plot compare.png

One forward pass over the run's validation rows gives every exit's logits, and with them all thresholds' decisions
exactly. Prints the scores, and writes logits.safetensors, curve.png and evaluation.json into the run folder. predict
and the classifier take the operating point from there, so that each evaluation replaces the one that they use.
"""

import argparse
import time
from pathlib import Path

import torch

from minisweet.adaptive import ExitRule, spaced_thresholds
from minisweet.base import devices
from minisweet.base.commands import Parser, list_of, path_to, run_command, whole_number
from minisweet.base.files import InputError, read_dataclass
from minisweet.data.rows import examples_of, find_columns, read_rows, text_columns
from minisweet.data.tasks import digest
from minisweet.evaluation import operating, sweep
from minisweet.evaluation.metrics import METRICS, interval_of_a_file
from minisweet.runs.folders import (
    CURVE,
    EVALUATION,
    Evaluation,
    Record,
    load_run,
    method_name,
    newest_run,
    read_evaluation,
    read_validation,
    versions,
)
from minisweet.use.plots import draw_curves

STATED = (  # what evaluation.json states: a title, the key of the value, and the key of its interval
    ("", "score", "score_interval"),  # the title is the metric's
    ("macro F1", "macro_f1", "macro_f1_interval"),
    ("full depth", "full_depth_score", "full_depth_interval"),
    ("points lost", "loss", "loss_interval"),
    ("share of the layers", "speedup_ratio", "speedup_interval"),
)
FEW = "so few rows tell little: of 61 rows, such intervals held in 89 to 100% of draws"  # .github/results/promises.md


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = Parser(__doc__)
    option = parser.add_argument
    option("runs", nargs="*", type=Path, metavar="RUN", help="run folder (default: under runs/, the last written)")
    option("--plot", type=path_to(".png"), metavar="PNG", help="evaluate nothing: draw these runs' curves together")
    test = "evaluate nothing: score this labelled file at the saved operating point, next to what was stated for it"
    option("--test", type=Path, metavar="FILE", help=test)
    option("--thresholds", type=whole_number(2, 10001), default=11, help="from 1/classes (lte: 0) to 1 (default: 11)")
    use = "evaluate and use only these exits, such as 0,6 (default: evaluate all, use those worth their cost)"
    option("--use-exits", type=list_of(whole_number(0)), help=use)
    default = "--max-loss 1; without labels --max-change 3"
    operating.add_wish_options(parser, f"operating point (default: {default}); it replaces the one that predict uses")
    devices.add_device_options(parser)
    args = parser.parse_args()
    if len(args.runs) > 1 and not args.plot:
        raise InputError(f"{args.runs[1]}: a second run, and only --plot takes several")
    parser.need(args, args.speed is None, "--max-loss or --max-change", "sure")
    others = vars(args).keys() - {"runs", "plot"}
    parser.need(args, args.plot is None, "an evaluation, and --plot draws those that are there", *sorted(others))
    others -= {"test", "device", "amp"}
    parser.need(args, args.test is None, "an evaluation, and --test takes the one that is there", *sorted(others))
    args.runs = args.runs or [newest_run()]
    args.device = devices.choose_device(args.device)
    args.precision = devices.choose_precision(args.amp, args.device)
    return args


def main() -> None:
    """Draw the evaluations of several runs, test one run, or evaluate it."""
    args = parse_arguments()
    devices.tune_cpu()
    if args.plot:
        draw_curves(args.plot, {str(run): read_evaluation(run) for run in args.runs})
        print(f"written to {args.plot}")
    elif args.test:
        test(args)
    else:
        evaluate(args)


def evaluate(args: argparse.Namespace) -> None:
    """Run all exits on the validation rows, and write and print what comes out."""
    (run,), start = args.runs, time.perf_counter()
    model, record = load_run(run)
    if args.use_exits:
        try:
            model = model.keep_exits(args.use_exits)
        except ValueError as error:
            raise InputError(f"--use-exits: {error}") from None
    rows = read_validation(run, record)
    validation = sweep.run_exits(run, record, model.to(args.device), rows, record.metric, args.precision)
    if devices.process_rank():  # the first process alone writes
        return
    seconds, layers, folds = time.perf_counter() - start, list(validation.exits.layers), sweep.crossfit(validation)
    wish = operating.wish_of(record.metric != "agreement", args.max_loss, args.speed, args.max_change, args.sure)
    rule, point = operating.operating_point(validation, wish, args.use_exits, record.train_texts)
    thresholds = spaced_thresholds(args.thresholds, rule.lowest)
    evaluation = {
        **{key: getattr(record, key) for key in ("task", "method", "exit_strategy", "metric")},
        "exit_layers": layers,
        "thresholds": thresholds,
        **sweep.curve_of(validation, folds, thresholds),
        "temperatures": [1.0] * len(layers) if rule.temperatures is None else rule.temperatures.tolist(),
        "certainty_ranges": None if rule.ranges is None else rule.ranges.tolist(),
        "operating_point": point,
        "examples": len(rows.first),
        "effective_examples": validation.effective_rows(),
        "dev_digest": digest(rows),
        "seconds": round(seconds, 2),
        "device": devices.device_name(args.device),
        "precision": str(args.precision or torch.float32),
        "versions": versions(),
    }
    (run / EVALUATION).unlink(missing_ok=True)  # so that no old one stands beside new files; the new one comes last
    draw_curves(run / CURVE, {str(run): read_dataclass(Evaluation, run / EVALUATION, evaluation)})
    # Before anything is printed, since `| head` may end this process.
    sweep.save_evaluation(run, evaluation, validation)
    print(f"{run}: {record.model}, {method_name(vars(record))}, {record.task}, {len(rows.first):,} validation rows")
    print_curve(evaluation)
    print_point(point, record, evaluation)
    for line in filter(None, [operating.shortfall(point), *sweep.never_predicted(validation, record.labels)]):
        print(f"warning: {line}")
    print(f"\nwritten to {run / EVALUATION}; predict takes this operating point now")


def print_curve(evaluation: dict) -> None:
    """Print how the exits fare alone, and together at each threshold."""
    lines = {METRICS[evaluation["metric"]]: evaluation["exit_scores"]}
    lines["macro F1"] = [report["macro_f1"] for report in evaluation["per_class"]]
    lines |= {f"{name} {when}": values for name in ("ece", "nll") for when, values in evaluation[name].items()}
    print(f"\n{'exit after layer':<25}" + "".join(f"{n:8}" for n in evaluation["exit_layers"]))
    for name, values in lines.items():
        print(f"{name:<25}" + "".join(f"{value:8.3f}" for value in values))
    print(f"\n{'threshold':>9}{'score':>8}{'speedup ratio':>15}   rows that leave at each exit")
    columns = (evaluation[key] for key in ("thresholds", "scores", "speedup_ratios", "exit_counts"))
    for threshold, value, ratio, counts in zip(*columns, strict=True):
        print(f"{threshold:9.3f}{value:8.1f}{ratio:15.3f}   " + "".join(f"{count:7,}" for count in counts))
    print("area under the curve {area:.2f}; all exits of all rows in {seconds:.1f} s".format(**evaluation))


def print_point(point: dict, record: Record, evaluation: dict) -> None:
    """Print the operating point, what is stated of it, and what is promised."""
    asked, wish = point["asked_exits"], point["wish"]
    costly = [str(n) for n in evaluation["exit_layers"] if n not in asked]
    left_out = f" (left out: {', '.join(costly)}, which cost more than they give)" if costly else ""
    print(f"\noperating point: threshold {point['threshold']:.6g}, exits {', '.join(map(str, asked))}{left_out}")
    print(f"{'on new text':<25}{'stated':>8}   95% interval")
    for title, *keys in STATED:
        print(f"{title or METRICS[evaluation['metric']]:<25}" + with_interval(point, *keys))
    if evaluation["effective_examples"] < 100:
        print(FEW)
    if "sure" not in wish:
        return
    if point["threshold"] < 1:
        what = "{max_change:g}% of the answers change" if "max_change" in wish else "{max_loss:g} points are lost"
        print(("promised, {sure:g}% sure, of texts drawn like these: at most " + what).format(**wish))
        changes = f", of which {point['certified_changes']:,} change" if "max_change" in wish else ""
        print("by {certified_rows:,} rows, worth {effective_rows:,.0f} distinct texts".format(**point) + changes)
    if record.train_texts is None:
        print("whether the model, or its trunk, was trained on these texts cannot be checked")
    elif point["trained_rows"]:
        print(f"{point['trained_rows']:,} of these rows were trained on, and promise nothing")


def with_interval(point: dict, key: str, interval: str) -> str:
    """A statistic of an operating point, and its 95% interval."""
    return "{:8.2f}   {:7.2f} to {:7.2f}".format(point[key], *point[interval])


def test(args: argparse.Namespace) -> None:
    """Score a labelled file at the run's operating point, and print it beside what was stated and promised."""
    (run,) = args.runs
    model, record = load_run(run)
    evaluation = read_evaluation(run)
    point = evaluation.operating_point
    columns = text_columns(args.test, None, record.columns)
    (column,) = find_columns("--test", args.test, [record.label_column or "label"], ["label"])
    rows, _ = examples_of(args.test, read_rows(args.test), columns, column, record.labels)
    labelled = record.metric != "agreement"  # else agreement with full depth is stated, and nothing of labels
    metric = record.metric if labelled else "accuracy"
    model = model.keep_exits(point.asked_exits).to(args.device)
    answers = sweep.run_exits(run, record, model, rows, metric, args.precision)
    rule = ExitRule.from_evaluation(evaluation, record.num_labels)
    rule = rule.kept([evaluation.exit_layers.index(n) for n in point.asked_exits])
    decisions = answers.decide(rule, range(len(point.asked_exits)), point.threshold)
    measured, changed = (
        operating.at_the_ends(operating.statistics_of(them, *decisions), point.threshold, rule.lowest)
        for them in (answers, answers.against_full_depth())
    )
    skipped = f", {rows.empty:,} empty ones skipped" if rows.empty else ""
    print(f"{run} at threshold {point.threshold:.6g}: {len(rows.first):,} rows of {args.test}{skipped}\n")
    stated = f"stated of {evaluation.examples:,} validation rows"
    print(f"{'with 95% intervals':<25}{'here':>8}{'':23}{stated:<31}a file of so many rows")
    for title, key, interval in STATED:
        line = f"{title or METRICS[metric]:<25}{with_interval(measured, key, interval)}"
        if labelled or key == "speedup_ratio":
            sizes = evaluation.effective_examples, answers.effective_rows()
            least = -100 if key == "loss" or metric == "matthews" else 0
            ends = interval_of_a_file(getattr(point, key), getattr(point, interval), *sizes, least)
            line += f"   {with_interval(vars(point), key, interval)}" + "   {:7.2f} to {:7.2f}".format(*ends)
        print(line)
    most = "   at most {max_change:g}, {sure:g}% sure".format(**point.wish) if "max_change" in point.wish else ""
    print(f"{'percent changed':<25}{with_interval(changed, 'loss', 'loss_interval')}{most}")
    if line := operating.not_certified(point.wish, point.threshold, evaluation, args.precision):
        print(f"warning: {line}")


if __name__ == "__main__":
    run_command(devices.distributed(main))
