"""Score a run's exits, sweep thresholds for its speed-accuracy curve (Sec. 3.3), and recommend one to deploy.

    python evaluate.py                  # the newest run under runs/
    python evaluate.py runs/NAME --max-loss 0.5
    python evaluate.py runs/NAME --use-exits 3,6 --live
    python evaluate.py runs/A runs/B runs/C --plot compare.png

One forward pass over the validation set gives every exit's logits, and with them all thresholds' decisions exactly.
Prints the scores, and writes evaluation.json, logits.safetensors and curve.png into the run folder.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from minisweet import calibration
from minisweet.adaptive import ExitRule, certainty_ranges, exit_costs, spaced_thresholds
from minisweet.base import devices
from minisweet.base.commands import Parser, Progress, list_of, number, run_command, whole_number
from minisweet.base.safe import InputError, check_file, write_json
from minisweet.data.load import digest, load_dev
from minisweet.data.text import TokenizedExamples, load_tokenizer
from minisweet.data.toy import LEVELS
from minisweet.evaluation.metrics import classification_report
from minisweet.evaluation.sweep import Validation, operating_point, predict, save_validation, sweep
from minisweet.evaluation.timing import GATHERED, measure_live
from minisweet.exits import MultiExitModel, MultiModel
from minisweet.runs.folders import (
    load_run,
    method_name,
    newest_run,
    read_evaluation,
    read_record,
    run_digest,
    versions,
)
from minisweet.runs.records import Record
from minisweet.use.plots import compare_curves, draw_curve
from minisweet.use.prepared import prepare


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = Parser(__doc__)
    option = parser.add_argument
    option("runs", nargs="*", type=Path, metavar="RUN", help="run folder (default: under runs/, the last written)")
    option("--plot", type=Path, metavar="PNG", help="evaluate nothing: draw the saved curves of these runs together")
    option = parser.add_argument_group("data").add_argument
    option("--data-dir", type=Path, help="holds the GLUE tasks' folders (default: as in training)")
    option("--data", type=Path, metavar="FILE", help="your own file of the validation rows, if it moved")
    option = parser.add_argument_group("exits").add_argument
    option("--thresholds", type=whole_number(2, 10001), default=11, help="from 1/classes (lte: 0) to 1 (default: 11)")
    option("--calibration", choices=calibration.CALIBRATIONS, default="crossfit", help="scaling (default: crossfit)")
    option("--use-exits", type=list_of(whole_number(1)), help="ask these exits alone, such as 3,6 (default: all)")
    wish = parser.add_argument_group("operating point").add_mutually_exclusive_group().add_argument
    loss = "the fastest at most so many points below full depth (default: 1.0)"
    wish("--max-loss", type=number(0, 200), default=1.0, help=loss)
    wish("--speed", type=number(0, 1), help="instead, the best score at no more than this share of the layers")
    option = parser.add_argument_group("live early exit").add_argument
    option("--live", action="store_true", help="also run early exit live at each threshold, and time it")
    option("--prepared", action="store_true", help="with --live: lay the weights out for the CPU first")
    option("--live-batch-size", type=whole_number(1), default=32, help="examples that run together (default: 32)")
    devices.add_device_options(parser)
    args = parser.parse_args()
    if len(args.runs) > 1 and not args.plot:
        raise InputError(f"{args.runs[1]}: a second run, and only --plot takes several")
    parser.need(args, args.live, "--live", "prepared", "live_batch_size")
    idle = vars(args).keys() - {"runs", "plot"}
    parser.need(args, args.plot is None, "an evaluation, and --plot draws those that are there", *sorted(idle))
    args.runs = args.runs or [newest_run()]
    return args


def main() -> None:
    """Evaluate one run, or draw the evaluations of several."""
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
    validation, evaluation = evaluate(model, record, args)
    if devices.place().rank:  # the first process alone writes
        return
    if read_record(run).digests != record.digests:
        raise InputError(f"{run}: the run was replaced while it was evaluated; evaluate it again")
    # The logits first: a stop between the two leaves an evaluation that tells of others.
    evaluation["logits_digest"] = save_validation(run / "logits.safetensors", validation)
    write_json(run / "evaluation.json", evaluation | {"run_digest": run_digest(record)})
    draw_curve(run / "curve.png", read_evaluation(run, record))
    name = method_name(vars(record))
    print(f"{run}: {record.model}, {name}, {record.task}, {evaluation['examples']} validation examples")
    print_evaluation(evaluation, record.labels)
    print(f"\nwritten to {run / 'evaluation.json'}, logits.safetensors and curve.png")


def evaluate(model: MultiExitModel | MultiModel, record: Record, args: argparse.Namespace) -> tuple[Validation, dict]:
    """Run all exits on the validation rows: what they said, and what evaluation.json will hold."""
    device = devices.choose_device(args.device)
    precision = devices.choose_precision(args.amp, device)
    if args.use_exits:
        try:
            model = model.keep_exits(args.use_exits)
        except ValueError as error:
            raise InputError(f"--use-exits: {error}") from None
    with devices.in_turn():
        dev = load_dev(vars(record), args.data, args.data_dir)
    max_length = record.max_length
    examples = TokenizedExamples(load_tokenizer(args.runs[0], record.vocab_size, max_length), dev)
    if examples.cut:
        print(f"validation: cut to {max_length} tokens: {examples.cut:,}")

    start = time.perf_counter()
    logits, certainty = predict(model.to(device), examples, precision)  # (K, N, C), and (K or K-1, N) or None
    seconds = time.perf_counter() - start
    predictions, C = logits.argmax(-1), record.num_labels  # (K, N)
    metric = "agreement" if dev.labels is None else record.metric
    labels = predictions[-1] if dev.labels is None else torch.from_numpy(examples.labels)  # (N,)
    validation = Validation(logits, certainty, labels)

    temperatures = calibration.row_temperatures(logits, labels, args.calibration)  # (K, N)
    ranges = None if certainty is None else certainty_ranges(certainty, len(logits))  # (K, 2)
    rule = ExitRule(C, temperatures if ranges is None else None, ranges)
    thresholds = spaced_thresholds(args.thresholds, rule.lowest)
    of_model = (list(model.exit_layers), record.depth, record.method)
    swept, taken = sweep(rule, validation, thresholds, metric, of_model)  # taken: (thresholds, N)
    wish = {"max_loss": args.max_loss} if args.speed is None else {"speed": args.speed}
    evaluation = {key: getattr(record, key) for key in ("task", "method", "exit_strategy")} | {
        "metric": metric,
        "exit_layers": of_model[0],
        "thresholds": thresholds,
        **swept,
        "operating_point": operating_point(validation, metric, args.calibration, of_model, wish),
        # How often each exit predicts each class: (K, C)
        "class_counts": [row.bincount(minlength=C).tolist() for row in predictions],
        "per_class": [classification_report(row.numpy(), labels.numpy(), C) for row in predictions],
        "calibration": args.calibration,
        # Fitted on all rows, to be kept for new text: (K,)
        "temperatures": [calibration.fit_temperature(exit_logits, labels) for exit_logits in logits],
    }
    scaled = {"before": logits, "after": logits / temperatures[..., None]}
    measures = {"ece": calibration.expected_calibration_error, "nll": calibration.negative_log_likelihood}
    for name, measure in measures.items():
        evaluation[name] = {when: [measure(part, labels) for part in exits] for when, exits in scaled.items()}
    if ranges is not None:
        evaluation["certainty_ranges"] = ranges.tolist()
    if dev.difficulties is not None:  # for each, easy to hard, the mean layer after which it leaves: (thresholds,)
        layers, of_row = np.array(of_model[0])[taken], np.array(dev.difficulties)  # (thresholds, N), (N,)
        evaluation["mean_exit_layers"] = {level: layers[:, of_row == level].mean(1).tolist() for level in LEVELS}
    if args.live and devices.place().rank == 0:
        progress = partial(Progress, desc="live", unit="threshold")
        live_model = prepare(model, precision) if args.prepared else model
        costs = np.array([exit_costs(*of_model, threshold) for threshold in thresholds])  # (thresholds, K)
        with devices.autocast(device, precision):
            live = measure_live(live_model, examples, thresholds, costs, args.live_batch_size, rule, progress)
        evaluation["live"], live_labels, live_exits = live
        differs = (live_exits != taken) | (live_labels != predictions.gather(0, taken))
        # Rounding may turn a decision where the earlier of the two exits is as sure as the threshold, and a label where
        # the two likeliest are as probable as each other. The rule of learning-to-exit stretches certainties.
        rounding, first = 1e-4 if precision is None else 2e-2, torch.minimum(live_exits, taken)  # (thresholds, N)
        confidence = rule.confidences(logits, certainty)  # (K, N)
        margins = (confidence.gather(0, first) - torch.tensor(thresholds)[:, None]).abs()
        if ranges is not None:
            margins = margins * (ranges[:, 1] - ranges[:, 0])[first]
        likeliest = logits.softmax(-1).topk(2).values  # (K, N, 2)
        gaps = (likeliest[..., 0] - likeliest[..., 1]).gather(0, first)
        near = differs & ((margins <= rounding) | ((live_exits == taken) & (gaps <= 2 * rounding)))
        evaluation |= {"live_batch_size": args.live_batch_size, "live_prepared": args.prepared}
        evaluation |= {"live_differs": int(differs.sum()), "live_differs_near": int(near.sum())}
    return validation, evaluation | {
        "examples": len(examples),
        "dev_digest": digest(dev),
        "seconds": round(seconds, 2),
        "device": devices.device_name(device),
        "precision": str(precision or torch.float32),
        "versions": versions(),
    }


def print_evaluation(evaluation: dict, names: list[str]) -> None:
    """Print what stands in evaluation.json as tables. `names` are the classes'."""
    exit_layers, thresholds, per_class = (evaluation[key] for key in ("exit_layers", "thresholds", "per_class"))
    softmax = "   (of the softmax, which lte does not use)" if evaluation["exit_strategy"] == "lte" else ""
    layers, scores, errors = ("{:<18}" + column * len(exit_layers) for column in ("{:8}", "{:8.1f}", "{:8.3f}"))
    print("\n" + layers.format("exit after layer", *exit_layers))
    print(scores.format(evaluation["metric"], *evaluation["exit_scores"]))
    print(scores.format("macro F1", *(report["macro_f1"] for report in per_class)))
    for name in ("ece", "nll"):
        for when, values in evaluation[name].items():
            print(errors.format(f"{name} {when}", *values) + softmax)
    for n, counts in zip(exit_layers, evaluation["class_counts"], strict=True):
        occurring = zip(names, counts, per_class[0]["support"], strict=True)
        if never := [name for name, count, support in occurring if support and not count]:
            print(f"the exit after layer {n} never predicts {', '.join(never)}")
    print(f"\n{'threshold':>9}{'score':>8}{'speedup ratio':>15}   layer:instances that leave after it")
    columns = (evaluation[key] for key in ("thresholds", "scores", "speedup_ratios", "exit_counts"))
    for threshold, value, ratio, counts in zip(*columns, strict=True):
        left = "".join(f"{n:>5}:{count:<6}" for n, count in zip(exit_layers, counts, strict=True))
        print(f"{threshold:9.3f}{value:8.1f}{ratio:15.3f}   {left}")
    point, seconds = evaluation["operating_point"], evaluation["seconds"]
    print(f"\narea under the curve {evaluation['area']:.2f}; all exits of all examples in {seconds:.1f} s")
    below = point["full_depth_score"] - point["score"]
    loss = f"{abs(below):.1f} {'below' if below >= 0 else 'above'} full depth"
    ((wish, value),) = point["wish"].items()
    missed = f" (no threshold gives --{wish.replace('_', '-')} {value:g}; this is the nearest)"
    share = f"with {100 * point['speedup_ratio']:.0f}% of the layers{'' if point['reached'] else missed}"
    print(f"operating point: threshold {point['threshold']:.6g}: {point['score']:.1f}, {loss}, {share}")
    if "mean_exit_layers" in evaluation:
        means = evaluation["mean_exit_layers"]
        print("\nmean exit layer per difficulty\nthreshold" + ("{:>16}" * len(means)).format(*means))
        for row in zip(thresholds, *means.values(), strict=True):
            print(("{:9.3f}" + "{:16.2f}" * len(means)).format(*row))
    if "live" in evaluation:
        together = f"{evaluation['live_batch_size']} at a time, gathered from {GATHERED} such batches"
        prepared = " with prepared weights" if evaluation["live_prepared"] else ""
        print(f"\nlive{prepared}, {together}; latency (p50, ...) of one at a time, milliseconds")
        print(f"{'threshold':>9}{'layer share':>13}{'wall share':>12}{'instances/s':>13}{'p50':>8}{'p90':>8}{'p99':>8}")
        for row in evaluation["live"]:
            print(f"{row['threshold']:9.3f}{row['layer_share']:13.3f}{row['wall_share']:12.3f}", end="")
            print("{:13.1f}{:8.1f}{:8.1f}{:8.1f}".format(row["instances_per_second"], *row["latency_ms"].values()))
        decisions = len(thresholds) * evaluation["examples"]
        differ, near = evaluation["live_differs"], evaluation["live_differs_near"]
        rounded = f", {near} of them as near to the threshold as rounding goes" if differ else ""
        print(f"exits or labels differ from the sweep's in {differ} of {decisions} decisions{rounded}")


if __name__ == "__main__":
    run_command(devices.together(main))
