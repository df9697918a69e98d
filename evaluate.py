"""Score a run's exits, sweep thresholds for its speed-accuracy curve (Sec. 3.3), and recommend one to deploy.

    python evaluate.py                  # the newest run under runs/
    python evaluate.py runs/NAME --max-loss 0.5
    python evaluate.py runs/NAME --use-exits 3,6 --live
    python evaluate.py runs/NAME --test FILE.csv
    python evaluate.py runs/A runs/B runs/C --plot compare.png

One forward pass over the validation set gives every exit's logits, and with them all thresholds' decisions exactly.
Prints the scores, and writes evaluation.json, logits.safetensors and curve.png into the run folder. predict and the
classifier take the operating point from there, so that each evaluation replaces the one that they use.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from minisweet import calibration
from minisweet.adaptive import ExitRule, spaced_thresholds
from minisweet.base import devices
from minisweet.base.commands import Parser, list_of, run_command, whole_number
from minisweet.base.safe import InputError, check_file, one_line
from minisweet.data.load import digest, load_dev
from minisweet.data.rows import Examples, columns_as_trained, examples_of, find_columns, read_rows, some
from minisweet.data.text import TokenizedExamples, load_tokenizer
from minisweet.data.toy import LEVELS
from minisweet.evaluation.metrics import classification_report, score
from minisweet.evaluation.operating import add_wish_options, not_certified, operating_point, shortfall, stated, wish_of
from minisweet.evaluation.sweep import Validation, folds_of, reliability, save_evaluation, sweep, validate
from minisweet.evaluation.timing import differences, measure_live
from minisweet.exits import MultiExitModel, MultiModel
from minisweet.live import GATHERED
from minisweet.runs.folders import load_run, method_name, newest_run, read_evaluation, read_record, run_digest, versions
from minisweet.runs.records import Record
from minisweet.use.plots import compare_curves, draw_curve


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = Parser(__doc__)
    option = parser.add_argument
    option("runs", nargs="*", type=Path, metavar="RUN", help="run folder (default: under runs/, the last written)")
    option("--plot", type=Path, metavar="PNG", help="evaluate nothing: draw the saved curves of these runs together")
    test = "evaluate nothing: score this labelled file at the operating point that is there, beside what it promised"
    option("--test", type=Path, metavar="FILE", help=test)
    option = parser.add_argument_group("data").add_argument
    option("--text-columns", type=list_of(str), help="of --test: one or two (default: as in training, or the usual)")
    option("--label-column", help="of --test (default: as in training, or label)")
    option("--data-dir", type=Path, help="holds the GLUE tasks' folders (default: as in training)")
    option("--data", type=Path, metavar="FILE", help="your own file of the validation rows, if it moved")
    option = parser.add_argument_group("exits").add_argument
    option("--thresholds", type=whole_number(2, 10001), default=11, help="from 1/classes (lte: 0) to 1 (default: 11)")
    option("--calibration", choices=calibration.CALIBRATIONS, default="crossfit", help="scaling (default: crossfit)")
    option("--use-exits", type=list_of(whole_number(1)), help="ask these exits alone, such as 3,6 (default: all)")
    default = "--max-loss 1.0; without labels --max-change 3"
    add_wish_options(parser, f"operating point (default: {default}); it replaces the one that predict uses")
    option = parser.add_argument_group("live early exit").add_argument
    option("--live", action="store_true", help="also run early exit live at each threshold, and time it")
    option("--live-batch-size", type=whole_number(1), default=32, help="examples that run together (default: 32)")
    devices.add_device_options(parser)
    args = parser.parse_args()
    if len(args.runs) > 1 and not args.plot:
        raise InputError(f"{args.runs[1]}: a second run, and only --plot takes several")
    parser.need(args, args.live, "--live", "live_batch_size")
    parser.need(args, args.max_change is not None, "--max-change", "sure")
    idle = vars(args).keys() - {"runs", "plot"}
    parser.need(args, args.plot is None, "an evaluation, and --plot draws those that are there", *sorted(idle))
    of_test = {"text_columns", "label_column"}
    parser.need(args, args.test, "--test", *sorted(of_test))
    idle -= {"test", "device", "amp"} | of_test
    parser.need(args, args.test is None, "an evaluation, and --test takes the one that is there", *sorted(idle))
    args.device = devices.choose_device(args.device)
    args.precision = devices.choose_precision(args.amp, args.device)
    args.runs = args.runs or [newest_run()]
    return args


def main() -> None:
    """Evaluate one run, test it, or draw the evaluations of several."""
    args = parse_arguments()
    if args.plot:
        check_file("--plot", args.plot, ".png")
        evaluations = {str(run): read_evaluation(run, read_record(run)) for run in args.runs}
        if missing := [run for run, evaluation in evaluations.items() if evaluation is None]:
            raise InputError(f"{missing[0]}: no evaluation.json; make it with evaluate.py")
        compare_curves(args.plot, evaluations)
        print(f"written to {args.plot}")
        return
    devices.keep_compiled_products()
    devices.tune_cpu()
    (run,) = args.runs
    model, record = load_run(run)
    if args.test:
        test(model, record, args)
        return
    validation, evaluation = evaluate(model, record, args)
    if devices.place().rank:  # the first process alone writes
        return
    if read_record(run).digests != record.digests:
        raise InputError(f"{run}: the run was replaced while it was evaluated; evaluate it again")
    method, examples = method_name(vars(record)), evaluation["examples"]
    try:  # first, since nobody may read what is printed, as after `| head`
        save_evaluation(run, evaluation | {"run_digest": run_digest(record)}, validation)
    finally:  # shown even where it cannot be written
        print(f"{run}: {record.model}, {method}, {record.task}, {examples} validation examples")
        print_evaluation(evaluation)
    print(f"\nwritten to {run / 'evaluation.json'} and logits.safetensors; predict takes this operating point now")
    try:  # last: nothing else waits for a picture
        draw_curve(run / "curve.png", read_evaluation(run, record))
    except Exception as error:  # matplotlib has many, of fonts, caches and backends
        print(one_line(f"{run / 'curve.png'}: not drawn, it is not of this evaluation ({error})"))


def answers_of(
    model: MultiExitModel | MultiModel, record: Record, rows: Examples, metric: str, args: argparse.Namespace
) -> tuple[TokenizedExamples, Validation]:
    """The rows as tokens, and what all exits say of them. Counts the texts that are cut."""
    title = "test" if args.test else "validation"
    examples = TokenizedExamples(load_tokenizer(args.runs[0], record.vocab_size, record.max_length), rows)
    if examples.cut:
        print(f"{title}: cut to {record.max_length} tokens: {examples.cut:,}")
    return examples, validate(model.to(args.device), record, rows, examples, metric, args.precision, title)


def evaluate(model: MultiExitModel | MultiModel, record: Record, args: argparse.Namespace) -> tuple[Validation, dict]:
    """Run all exits on the validation rows: what they said, and what evaluation.json will hold."""
    if args.use_exits:
        try:
            model = model.keep_exits(args.use_exits)
        except ValueError as error:
            raise InputError(f"--use-exits: {error}") from None
    with devices.in_turn():
        dev = load_dev(vars(record), args.data, args.data_dir)
    start = time.perf_counter()
    examples, validation = answers_of(model, record, dev, record.metric, args)
    seconds = time.perf_counter() - start
    wish = wish_of(record.metric != "agreement", args.max_loss, args.speed, args.max_change, args.sure)
    rule, point = operating_point(validation, args.calibration, wish)
    thresholds = spaced_thresholds(args.thresholds, rule.lowest)
    evaluation = {key: getattr(record, key) for key in ("task", "method", "exit_strategy")}
    evaluation |= {"metric": record.metric, "exit_layers": validation.exits.layers, "calibration": args.calibration}
    evaluation |= curve_of(validation, args.calibration, thresholds, dev.difficulties)
    evaluation |= {"operating_point": point, "warnings": warnings_of(validation, record.labels)}
    scaled = torch.ones(len(validation.logits)) if rule.temperatures is None else rule.temperatures
    evaluation["temperatures"] = scaled.tolist()  # of the rule for new text, (K,)
    if rule.ranges is not None:
        evaluation["certainty_ranges"] = rule.ranges.tolist()  # (K, 2)
    if args.live and devices.place().rank == 0:  # by the rule that new text gets
        setting = (thresholds, validation.exits, args.live_batch_size, rule)
        with devices.autocast(args.device, args.precision):
            evaluation["live"], *decided = measure_live(model, examples, *setting)
        differ, near = differences(*decided, rule, validation, thresholds, 2e-2 if args.precision else 1e-4)
        evaluation |= {"live_differs": differ, "live_differs_near": near}
        evaluation["live_batch_size"] = args.live_batch_size
    return validation, evaluation | {
        "examples": len(examples),
        "dev_digest": digest(dev),
        "seconds": round(seconds, 2),
        "device": devices.device_name(args.device),
        "precision": str(args.precision or torch.float32),
        "versions": versions(),
    }


def curve_of(validation: Validation, calibration: str, thresholds: list[float], difficulties: list | None) -> dict:
    """How the exits fare alone, and at each threshold; on the toy task also where each of its difficulties leaves."""
    folds, labels, C = folds_of(validation, calibration), validation.labels.numpy(), validation.logits.shape[-1]
    swept, taken = sweep(folds, validation, thresholds)  # taken: (P, N)
    predictions = validation.logits.argmax(-1)  # (K, N)
    swept |= {"thresholds": thresholds, **reliability(folds, validation)}
    # How often each exit predicts each class: (K, C)
    swept["class_counts"] = [row.bincount(minlength=C).tolist() for row in predictions]
    swept["per_class"] = [classification_report(row.numpy(), labels, C) for row in predictions]
    if difficulties is not None:  # for each, easy to hard, the mean layer after which it leaves: (P,)
        left, of_row = np.array(validation.exits.layers)[taken], np.array(difficulties)  # (P, N), (N,)
        swept["mean_exit_layers"] = {level: left[:, of_row == level].mean(1).tolist() for level in LEVELS}
    return swept


def warnings_of(validation: Validation, names: list[str]) -> list[str]:
    """What a user should know of the exits, and what to try, a line each. `names` are the classes'."""
    layers, predictions, labels = validation.exits.layers, validation.logits.argmax(-1), validation.labels
    support, longer, found = labels.bincount(minlength=len(names)), "train longer (--epochs) or at a higher --lr", []
    if (predictions[-1] == predictions[-1, 0]).all():  # full depth has learnt nothing, often since it was too fast
        longer = "train at a lower --lr, with another --seed, or longer (--epochs)"
    if (classes := int((support > 0).sum())) < 2 or len(labels) < 20:
        rows = f"{len(labels)} validation rows of {classes} classes tell little of temperatures and thresholds"
        found.append(f"{rows}: validate on more of them (--dev-data, --dev-size)")
    scores = score(predictions.numpy(), labels.numpy(), validation.metric)
    if len(layers) > 1 and max(scores) - scores[0] <= 1.0:
        level = f"early exit gains nothing, the first {layers[0]} of the layers alone would be as good a model"
        branches = ", or with --method branch" * (validation.exits.method != "branch")
        found.append(f"the exits are level, so {level}: {longer}{branches}")
    for n, said in zip(layers, predictions, strict=True):
        counts, agrees = said.bincount(minlength=len(names)), 100 * float((said == predictions[-1]).double().mean())
        if never := [name for name, there, count in zip(names, support, counts, strict=True) if there and not count]:
            advice = f"{longer}, or with --class-weights balanced"
            found.append(f"the exit after layer {n} never predicts {some(never)}: {advice}")
        if agrees < 70:
            share = f"agrees with full depth on {agrees:.0f}% of texts"
            found.append(f"the exit after layer {n} {share}: {longer}, or leave it out (--use-exits)")
    return found


def test(model: MultiExitModel | MultiModel, record: Record, args: argparse.Namespace) -> None:
    """Score a labelled file at the run's operating point, and print it beside what was promised."""
    (run,) = args.runs
    evaluation = read_evaluation(run, record)
    if evaluation is None:
        raise InputError(f"{run}: has no evaluation.json, so no operating point; first: evaluate.py {run}")
    columns = columns_as_trained(args.test, args.text_columns, record.columns)
    usual = [[record.label_column or "label"], ["label"]]
    (column,) = find_columns("--label-column", args.test, args.label_column, usual)
    if column in columns:
        raise InputError(f"--text-columns: {','.join(columns)}, should not be the label column, {column!r:.60}")
    rows, _ = examples_of(args.test, read_rows(args.test), columns, column, record.labels)
    promised = record.metric != "agreement"  # which was measured without labels, and promises nothing of them
    metric, point = record.metric if promised else "accuracy", evaluation.operating_point
    _, said = answers_of(model.keep_exits(evaluation.exit_layers), record, rows, metric, args)
    rule, full_depth = ExitRule.from_evaluation(evaluation, record.num_labels), said.logits[-1].argmax(-1)
    found = stated(rule, said, point.threshold)
    changed = stated(rule, said._replace(labels=full_depth, metric="agreement"), point.threshold)["loss"]
    print(f"{run} at threshold {point.threshold:.6g}: {len(rows.first):,} rows of {args.test}\n")
    if rows.empty:
        print(f"test: empty texts, skipped: {rows.empty:,}\n")
    print(f"{'':<24}{'here':>8}   as promised by {evaluation.examples:,} validation rows, and 95% interval")
    names = {"score": metric, "macro_f1": "macro F1", "full_depth_score": "full depth", "loss": "points lost"}
    for key, name in (names | {"speedup_ratio": "share of the layers"}).items():
        interval = getattr(point, key.removesuffix("_ratio") + "_interval", ())
        promise = f"{getattr(point, key):8.2f} " + "".join(f" {end:8.2f}" for end in interval)
        print(f"{name:<24}{found[key]:8.2f}   {promise if promised or key == 'speedup_ratio' else ''}")
    most = "at most {max_change:g}, with {sure:g}% confidence".format(**point.wish) if "sure" in point.wish else ""
    print(f"{'percent changed':<24}{changed:8.2f}   {most}")
    if line := not_certified(point.wish, point.threshold, evaluation, args.precision):
        print(f"warning: {line}")


def print_evaluation(evaluation: dict) -> None:
    """Print what stands in evaluation.json as tables."""
    exit_layers, thresholds = evaluation["exit_layers"], evaluation["thresholds"]
    softmax = "   (of the softmax, which lte does not use)" if evaluation["exit_strategy"] == "lte" else ""
    layers, scores, errors = ("{:<18}" + column * len(exit_layers) for column in ("{:8}", "{:8.1f}", "{:8.3f}"))
    print("\n" + layers.format("exit after layer", *exit_layers))
    print(scores.format(evaluation["metric"], *evaluation["exit_scores"]))
    print(scores.format("macro F1", *(report["macro_f1"] for report in evaluation["per_class"])))
    for name in ("ece", "nll"):
        for when, values in evaluation[name].items():
            print(errors.format(f"{name} {when}", *values) + softmax)
    print(f"\n{'threshold':>9}{'score':>8}{'speedup ratio':>15}   layer:instances that leave after it")
    columns = (evaluation[key] for key in ("thresholds", "scores", "speedup_ratios", "exit_counts"))
    for threshold, value, ratio, counts in zip(*columns, strict=True):
        left = "".join(f"{n:>5}:{count:<6}" for n, count in zip(exit_layers, counts, strict=True))
        print(f"{threshold:9.3f}{value:8.1f}{ratio:15.3f}   {left}")
    print("\narea under the curve {area:.2f}; all exits of all examples in {seconds:.1f} s".format(**evaluation))
    point = evaluation["operating_point"]
    loss = f"{abs(point['loss']):.1f} {'below' if point['loss'] >= 0 else 'above'} full depth"
    chosen = "threshold {threshold:.6g}: {score:.1f} (macro F1 {macro_f1:.1f})".format(**point)
    print(f"operating point: {chosen}, {loss}, with {point['speedup_ratio']:.0%} of the layers")
    (low, high), (least, most) = point["loss_interval"], point["speedup_interval"]
    print(f"on new text, 95% intervals: {low:.1f} to {high:.1f} points lost, {least:.0%} to {most:.0%} of the layers")
    if "certified_rows" in point and point["threshold"] < 1:
        sure = "at most {max_change:g}% of answers change, with {sure:g}% confidence".format(**point["wish"])
        print(f"certified: {sure}; of {point['certified_rows']:,} rows {point['certified_changes']:,} did")
    for line in filter(None, [shortfall(point, len(exit_layers)), *evaluation["warnings"]]):
        print(f"warning: {line}")
    if means := evaluation.get("mean_exit_layers"):
        print("\nmean exit layer per difficulty\nthreshold" + ("{:>16}" * len(means)).format(*means))
        for row in zip(thresholds, *means.values(), strict=True):
            print(("{:9.3f}" + "{:16.2f}" * len(means)).format(*row))
    if "live" in evaluation:
        together = f"{evaluation['live_batch_size']} at a time, gathered from {GATHERED} such batches"
        print(f"\nlive, {together}; latency (p50, ...) of one at a time, milliseconds")
        print(f"{'threshold':>9}{'layer share':>13}{'wall share':>12}{'instances/s':>13}{'p50':>8}{'p90':>8}{'p99':>8}")
        form = "{threshold:9.3f}{layer_share:13.3f}{wall_share:12.3f}{instances_per_second:13.1f}{:8.1f}{:8.1f}{:8.1f}"
        for row in evaluation["live"]:
            print(form.format(*row["latency_ms"].values(), **row))
        decisions = len(thresholds) * evaluation["examples"]
        differ, near = evaluation["live_differs"], evaluation["live_differs_near"]
        rounded = f", {near} of them as near to the threshold as rounding goes" if differ else ""
        print(f"exits or labels differ from the sweep's in {differ} of {decisions} decisions{rounded}")


if __name__ == "__main__":
    run_command(devices.together(main))
