"""Score a run's exits, sweep thresholds for its speed-accuracy curve (Sec. 3.3), and recommend one to deploy.

    python evaluate.py                  # the newest run under runs/
    python evaluate.py runs/NAME --max-loss 0.5 --sure 90
    python evaluate.py runs/NAME --test FILE.csv
    python evaluate.py runs/A runs/B runs/C --plot compare.png

One forward pass over the run's validation rows gives every exit's logits, and with them all thresholds' decisions
exactly. Prints the scores, and writes logits.safetensors, curve.png and evaluation.json, which `predict` reads.
"""

import argparse
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from shlex import quote

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C while torch is imported; then see `run_command`

import numpy as np
import torch

from minisweet.adaptive import spaced_thresholds
from minisweet.base import devices
from minisweet.base.commands import Parser, list_of, path_to, run_command, whole_number
from minisweet.base.files import InputError, check_writable, counted, read_dataclass, write_json, written_beside
from minisweet.data.rows import all_columns, examples_of, read_rows, text_columns
from minisweet.data.tasks import digest
from minisweet.data.toy import LEVELS
from minisweet.evaluation import goals, operating
from minisweet.evaluation.answers import run_exits, save_answers
from minisweet.evaluation.metrics import METRICS, has_labels
from minisweet.evaluation.plots import draw_curves
from minisweet.evaluation.sweep import crossfit, curve_of
from minisweet.runs import folders
from minisweet.runs.records import Evaluation
from minisweet.use.classifier import EarlyExitClassifier

TIMED = 64  # texts


def main() -> None:
    """Draw the evaluations of several runs, test one run, or evaluate it."""
    parser = Parser(__doc__)
    option = parser.add_argument
    option("runs", nargs="*", type=Path, metavar="RUN", help="run folder (default: under runs/, the last written)")
    option("--plot", type=path_to(".png"), metavar="PNG", help="evaluate nothing: draw these runs' curves together")
    tried = "evaluate nothing: try the saved operating point on this file, next to what was stated for it"
    option("--test", type=Path, metavar="FILE", help=tried)
    option("--thresholds", type=whole_number(2, 10001), default=11, help="from 1/classes (lte: 0) to 1 (default: 11)")
    use = "evaluate and use only these exits, such as 0,6 (default: evaluate all, use those worth their cost)"
    option("--use-exits", type=list_of(whole_number(0)), help=use)
    default = "the goal of the run's last evaluation, else --max-loss 1, or without labels --max-change 3"
    goals.add_goal_options(parser, f"goal of the operating point, which others take (default: {default})")
    devices.add_device_options(parser)
    args = parser.parse_args()
    if len(args.runs) > 1 and not args.plot:
        raise InputError(f"{args.runs[1]}: a second run, and only --plot takes several")
    others = vars(args).keys() - {"runs", "plot"}
    parser.need(args, args.plot is None, "an evaluation, and --plot draws those that are there", *sorted(others))
    others -= {"test", "device", "amp"}
    parser.need(args, args.test is None, "an evaluation, and --test takes the one that is there", *sorted(others))
    runs = args.runs or [folders.newest_run()]
    if not args.runs:
        print(f"{runs[0]}: the newest run under runs/", flush=True)
    devices.tune_cpu()
    if args.plot:
        draw_curves(args.plot, {str(run): folders.read_evaluation(run) for run in runs})
        print(f"written to {args.plot}")
    elif args.test:
        test(runs[0], args)
    else:
        evaluate(runs[0], args)


def evaluate(run: Path, args: argparse.Namespace) -> None:
    """Run all exits on the validation rows, and write and print what comes out."""
    start, device, run_digest = time.perf_counter(), devices.choose_device(args.device), folders.run_digest(run)
    check_writable(run)
    precision, (model, record) = devices.choose_precision(args.amp, device), folders.load_run(run)
    former = None
    with suppress(InputError):  # there is none, or it cannot be read
        former = folders.read_evaluation(run).operating_point
    goal = goals.goal_of(args, record.metric, former and former.goal)
    if args.use_exits:
        try:
            model = model.keep_exits(args.use_exits)
        except ValueError as error:
            raise InputError(f"--use-exits: {error}") from None
    rows = folders.read_validation(run, record)
    answered = run_exits(run, record, model.to(device), rows, record.metric, precision)
    if devices.process_rank():  # the first process alone writes
        return
    seconds, layers, folds = time.perf_counter() - start, list(answered.exits.layers), crossfit(answered)
    sides = operating.deal(answered, record.train_tokens)
    rule, point = operating.operating_point(answered, goal, sides, args.use_exits)
    thresholds = spaced_thresholds(args.thresholds, rule.lowest)
    evaluation = {
        **{key: getattr(record, key) for key in ("task", "method", "exit_strategy", "metric")},
        "exit_layers": layers,
        "thresholds": thresholds,
        **curve_of(answered, folds, thresholds),
        "temperatures": rule.temperatures.tolist(),
        "certainty_ranges": None if rule.ranges is None else rule.ranges.tolist(),
        "operating_point": point,
        "examples": len(rows.first),
        "dev_digest": digest(rows),
        "run_digest": run_digest,
        "seconds": round(seconds, 2),
        "device": devices.device_name(device),
        "precision": str(precision or torch.float32),
        "versions": folders.versions(),
    }
    warnings = [goals.shortfall(point, record, layers), *goals.never_right(evaluation, record.labels)]
    evaluation["warnings"] = list(filter(None, warnings))
    # Both are written before one is replaced. All this comes before anything is printed, since `| head` may end this
    # process.
    with written_beside(run / folders.EVALUATION) as new, written_beside(run / folders.LOGITS) as logits:
        save_answers(logits, answered, run_digest)
        write_json(new, evaluation)
        folders.check_digest(run / folders.EVALUATION, folders.run_digest(run), run_digest)  # it may be another by now
    written = read_dataclass(Evaluation, run / folders.EVALUATION, evaluation)
    failed = None
    try:
        draw_curves(run / folders.CURVE, {str(run): written})
    except InputError as error:  # is told after all else
        failed = error
    print(f"{run}: {record.model}, {record.method}, {record.task}, {counted(len(rows.first), 'validation row')}")
    print_curve(evaluation)
    goals.print_point(point, record, layers)
    if rows.difficulties:  # of the toy task
        asked = [layers.index(n) for n in point["asked_exits"]]
        (taken,), *_ = answered.decide_at(rule, asked, [point["threshold"]])
        print_difficulties(rows.difficulties, np.array(layers)[taken])
    print_milliseconds(EarlyExitClassifier.of(run, device, precision, model, record, written), rows.texts())
    for line in evaluation["warnings"]:
        print(f"warning: {line}")
    kept = " (that of the last evaluation)" if former and former.goal == goal else ""
    print(f"\nwritten to {run / folders.EVALUATION}, by the goal {goals.options_of(goal)}{kept}")
    if former:
        asked, by = ", ".join(map(str, former.asked_exits)), goals.options_of(former.goal)
        print(f"it replaces threshold {former.threshold:.6g}, exits {asked}, by the goal {by}")
    print("predict takes this operating point now. Next:")
    print(f"  python -m minisweet predict {quote(str(run))} FILE.csv --out predicted.csv")
    print(f"  python evaluate.py {quote(str(run))} --test FILE.csv")
    print(f"  python -m minisweet explain {quote(str(run))} TEXT", flush=True)
    if failed:
        raise failed


def print_curve(evaluation: dict) -> None:
    """Print how the exits fare alone, and together at each threshold."""
    lines = {METRICS[evaluation["metric"]]: evaluation["exit_scores"]}
    lines["macro F1"] = [report["macro_f1"] for report in evaluation["per_class"]]
    for key, name in (("ece", "calibration error"), ("nll", "log loss")):
        lines |= {f"{name} {when}": values for when, values in evaluation[key].items()}
    print(f"\n{'exit after layer':<25}" + "".join(f"{n:8}" for n in evaluation["exit_layers"]))
    for name, values in lines.items():
        print(f"{name:<25}" + "".join(f"{value:8.3f}" for value in values))
    print("(errors of the confidences, before and after temperature scaling: 0 is best)")
    print(f"\n{'threshold':>9}{'score':>8}{'speedup ratio':>15}   rows that leave at each exit")
    columns = (evaluation[key] for key in ("thresholds", "scores", "speedup_ratios", "exit_counts"))
    for threshold, value, ratio, counts in zip(*columns, strict=True):
        print(f"{threshold:9.3f}{value:8.1f}{ratio:15.3f}   " + "".join(f"{count:7,}" for count in counts))
    print("area under the curve {area:.2f}; all exits of all rows in {seconds:.1f} s".format(**evaluation))


def print_difficulties(difficulties: list[str], left_after: np.ndarray) -> None:
    """Print after which layer rows (N,) leave, the mean of each difficulty."""
    print(f"\n{'difficulty':<25}mean layer that rows leave after")
    for level in filter(difficulties.count, LEVELS):
        print(f"{level:<25}{left_after[np.array(difficulties) == level].mean():8.2f}")


def print_milliseconds(classify: EarlyExitClassifier, texts: list) -> None:
    """Print what a text takes at the operating point and at full depth, from text to label; of some of the texts."""
    texts = texts[:: -(-len(texts) // TIMED)]
    titles = {"at the operating point": classify.threshold, "at full depth": 1.0}
    for _ in range(2):  # the first runs are slower, and not the ones that are kept
        found = {}
        for title, classify.threshold in titles.items():
            times = [time.perf_counter()]
            for batches in ([[text] for text in texts], [texts]):
                list(map(classify, batches))
                times.append(time.perf_counter())
            found[title] = 1000 * np.diff(times) / len(texts)
    title = f"milliseconds, {counted(len(texts), 'text')}"
    print(f"\n{title:<25}one by one  in batches of {classify.batch_size}")
    for title, (one_by_one, in_batches) in found.items():
        print(f"{title:<25}{one_by_one:10.2f}{in_batches:12.2f}")


def test(run: Path, args: argparse.Namespace) -> None:
    """Try the run's operating point on a file, beside what was stated and promised. Without labels, count changes."""
    classify = EarlyExitClassifier(run, device=args.device, amp=args.amp)
    record, point, exits = classify.record, classify.evaluation.operating_point, range(len(classify.exit_layers))
    columns, found = text_columns(args.test, None, record.columns, option=""), all_columns(args.test)
    column = next((name for name in (record.label_column, "label") if name in found), None)
    if column == "label" and "exit_layer" in found and "predicted_label" not in found:
        raise InputError(f"{args.test}: its label is what predict answered, should be what is right")
    rows, _ = examples_of(args.test, read_rows(args.test), columns, column, record.labels)
    labelled = has_labels(record.metric)  # else agreement with full depth is stated, and nothing of labels
    metric = "agreement" if column is None else record.metric if labelled else "accuracy"
    answers = run_exits(run, record, classify.model, rows, metric, classify.precision)
    is_known, total = operating.trained_on(answers, record.train_tokens), counted(len(rows.first), "row")
    if is_known.all():
        raise InputError(f"{args.test}: {total}, all of which were trained on, and do not count; name other rows")
    answers = answers.take(np.flatnonzero(~is_known))
    found = operating.stated(classify.rule, answers, exits, point.threshold)
    changes = operating.stated(classify.rule, answers.against_full_depth(), exits, point.threshold)
    skipped = f", empty and skipped: {rows.empty:,}" if rows.empty else ""
    print(f"{run} at threshold {point.threshold:.6g}: {total} of {args.test}{skipped}")
    if not record.knows_all_texts:
        print(goals.UNCHECKED)
    if count := is_known.sum():
        were, do = ("was", "does") if count == 1 else ("were", "do")
        print(f"{count:,} of these {total} {were} trained on, and {do} not count")
    if count := np.isin(answers.keys, classify.tokenize(folders.read_validation(run, record).texts()).keys()).sum():
        which = "is a validation row" if count == 1 else "are validation rows"
        print(f"{count:,} of those that count {which} of the run, which set the threshold and so test nothing")
    print(f"\n{'with 95% intervals':<25}{'here':>8}{'':21}{'stated':>8}")
    for title, key, interval in goals.STATED if column else goals.STATED[-1:]:
        stated = goals.with_interval(vars(point), key, interval) if labelled or key == "speedup_ratio" else ""
        print(f"{title or METRICS[metric]:<25}{goals.with_interval(found, key, interval)}{stated}".rstrip())
    print(f"{'percent changed':<25}{goals.with_interval(changes, 'loss', 'loss_interval')}")
    if column is None:
        print(f"no column {record.label_column or 'label'}: without labels, only the changes and the share are known")
    of_promise = changes if "max_change" in point.goal or not labelled else found if column else None
    if "sure" in point.goal and of_promise and point.threshold < 1:
        held = "which holds here"
        if of_promise["loss"] > operating.limit_of(point.goal) + operating.ROUNDING:
            held = "which does not hold here: by chance, or such texts are drawn otherwise than the validation rows"
        print(f"promised: {goals.promise_of(point.goal)}, {held}")


if __name__ == "__main__":
    run_command(devices.distributed(main))
