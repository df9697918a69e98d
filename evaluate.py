"""Score the exits of a run, and sweep thresholds for its speed-accuracy curve (Sec. 3.3).

    python evaluate.py                          # the newest run under runs/
    python evaluate.py runs/NAME --thresholds 101
    python evaluate.py runs/A runs/B runs/C --plot compare.png
    python evaluate.py runs/NAME --predict new.tsv --threshold 0.9

One forward pass over all validation rows gives the logits of every exit, which determine the decisions at all
thresholds. No threshold is chosen, and temperatures are cross-fitted on the same rows (minisweet/sweep.py).
Prints the scores and the curve, and writes logits.safetensors, evaluation.json and curve.png into the run folder.

With --predict it answers new texts by live early exit instead: for each line of the file, which has the columns of the
task's files (no label is needed), it prints label, confidence and exit layer, with tabs between them.
"""

import time
from contextlib import suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from shlex import quote

import numpy as np
import torch

from minisweet.base.commands import Parser, number, path_to, run_command, whole_number
from minisweet.base.devices import choose_device, choose_precision, device_name
from minisweet.base.files import InputError, read_dataclass, read_json, write_json
from minisweet.calibration import fit_rule
from minisweet.fast import tune_cpu
from minisweet.live import early_exit
from minisweet.metrics import METRICS
from minisweet.options import TrainingOptions
from minisweet.outputs import ask_all, read_outputs, write_outputs
from minisweet.plots import draw_curves
from minisweet.run import (
    CURVE,
    EVALUATION,
    LOGITS,
    RECORD,
    Record,
    load_model,
    load_run_tokenizer,
    read_record,
    read_validation,
    versions,
)
from minisweet.sweep import Evaluation, crossfit, spaced_thresholds, sweep
from minisweet.texts import Examples, Texts, read_cells

WINDOW = 1024  # new texts that are read, and sorted by length, at once


def main() -> None:
    """Evaluate one run, draw the evaluations of several, or answer new texts."""
    parser = Parser(__doc__)
    option = parser.add_argument
    option("runs", nargs="*", type=Path, metavar="RUN", help="run folder (default: the newest under runs/)")
    option("--plot", type=path_to(".png"), metavar="PNG", help="draw the curves of evaluated runs in one picture")
    about = "how many, from 1/classes (lte: 0) to 1 (default: 11)"
    option("--thresholds", type=whole_number(2, 10001), default=11, help=about)
    option("--predict", type=Path, metavar="TSV", help="new texts to answer, in the columns of the task's files")
    option("--threshold", type=number(0, 1), help="for --predict: the confidence at which a text exits")
    parser.add_options(TrainingOptions, "device", "amp")
    args = parser.parse_args()
    if len(args.runs) > 1 and not args.plot:
        raise InputError(f"{args.runs[1]}: a second run, and only --plot takes several")
    parser.need(args, not args.plot, "a run to evaluate, and --plot only draws", "thresholds", "device", "amp")
    parser.need(args, not args.predict, "a command without --predict", "thresholds", "plot")
    parser.need(args, args.predict, "--predict FILE.tsv", "threshold")
    if args.predict and args.threshold is None:
        raise InputError("is required by --predict (a number from 0 to 1)", "threshold")
    runs = args.runs or [newest_run()]
    tune_cpu()
    if args.plot:
        draw_curves(args.plot, {str(folder): read_evaluation(folder) for folder in runs})
        print(f"written to {args.plot}")
    elif args.predict:
        predict(runs[0], args.predict, args.threshold, args.device, args.amp)
    else:
        evaluate(runs[0], args.thresholds, args.device, args.amp)


def evaluate(folder: Path, count: int = 11, device: str = "auto", amp: str = "auto") -> None:
    """Run all exits on the validation rows of a run. Writes and prints the scores and the curve."""
    record = record_of(folder)
    place = choose_device(device)
    options = record.arguments

    # 1. The outputs of all exits for all rows.
    texts = Texts(load_run_tokenizer(folder, record), read_validation(folder, record))
    model = load_model(folder, record).to(place)
    start = time.perf_counter()
    outputs = ask_all(model, texts, choose_precision(amp, place), record.metric)
    seconds = round(time.perf_counter() - start, 2)
    write_outputs(folder / LOGITS, outputs, record.id)

    # 2. The decisions at all thresholds.
    folds = crossfit(outputs)
    thresholds = spaced_thresholds(count, folds[0][0].lowest)  # the lowest confidence, the same for all rules
    curve, _ = sweep(folds, outputs, thresholds)
    evaluation = Evaluation(
        id=record.id,
        task=record.task,
        method=options.method,
        exit_strategy=options.exit_strategy,
        metric=outputs.metric,
        exit_layers=record.exit_layers,
        thresholds=thresholds,
        **curve,
        examples=len(texts),
        seconds=seconds,
        device=device_name(place),
        precision=outputs.precision,
        versions=versions(),
    )
    write_json(folder / EVALUATION, asdict(evaluation))

    # 3. What a person reads.
    print(f"{folder}: {options.model}, {options.method}, {record.task}, {len(texts):,} validation rows")
    print_curve(evaluation)
    draw_curves(folder / CURVE, {str(folder): evaluation})
    next_step = f"python evaluate.py {quote(str(folder))} --predict FILE.tsv --threshold 0.9"
    print(f"\nwritten to {folder / EVALUATION}; to answer new texts: {next_step}", flush=True)


def predict(folder: Path, file: Path, threshold: float, device: str = "auto", amp: str = "auto") -> None:
    """Answer the texts of a file by live early exit, with confidences that are calibrated on all validation rows.

    Prints a line for each text, in order: label, confidence and exit layer. Raises InputError for a file without the
    task's columns, and for a line with too many or too few cells.
    """
    record = record_of(folder)
    place = choose_device(device)
    precision = choose_precision(amp, place)
    tokenizer, model = load_run_tokenizer(folder, record), load_model(folder, record).to(place)
    outputs = None
    with suppress(InputError):  # not evaluated yet, or with other weights
        outputs = read_outputs(folder / LOGITS, record.id)
    if not outputs or outputs.precision != str(precision or torch.float32):
        validation = Texts(tokenizer, read_validation(folder, record))
        outputs = ask_all(model, validation, precision, record.metric)
    rule = fit_rule(outputs)
    lines = read_cells(file, record.text_columns or ["sentence"], record.header)  # the toy task has no columns
    while chunk := list(islice(lines, WINDOW)):
        texts = Texts(tokenizer, Examples.of([cells for _, cells in chunk]))
        inputs = texts.batch(np.arange(len(texts))).to(place).inputs
        with torch.autocast(place.type, precision, enabled=precision is not None):
            answers = early_exit(model, *inputs, threshold, rule)
        if not answers.confidence.isfinite().all():
            raise InputError(f"{file}: the exits give infinite numbers or NaN; try --amp off")
        labels, exits, _, confidence = (part.tolist() for part in answers)
        for label, k, sure in zip(labels, exits, confidence, strict=True):
            print(record.labels[label], f"{sure:.6f}", record.exit_layers[k], sep="\t")


def record_of(folder: Path) -> Record:
    """The record of a run of train.py. Raises InputError if there is none, or it is of `minisweet fit`."""
    record = read_record(folder)
    if record.fit is not None:
        raise InputError(f"{folder}: a run of minisweet fit; evaluate it by: minisweet test {quote(str(folder))} FILE")
    return record


def newest_run(runs: Path = Path("runs")) -> Path:
    """The run of train.py under `runs` that was written last. Raises InputError if there is none."""
    records = runs.glob(f"[!.]*/{RECORD}")  # a dot: a run that is being written
    for path in sorted(records, key=lambda path: -path.stat().st_mtime):
        if not read_json(path).get("fit"):
            return path.parent
    raise InputError(f"{runs}/: no run of train.py here; train one, or name a run folder")


def read_evaluation(folder: Path) -> Evaluation:
    """Read the evaluation of a run. Raises InputError if it is missing, broken or of other weights."""
    record = record_of(folder)
    if not (folder / EVALUATION).is_file():
        raise InputError(f"{folder}: has no {EVALUATION}; first: python evaluate.py {quote(str(folder))}")
    evaluation = read_dataclass(Evaluation, folder / EVALUATION)
    if evaluation.id != record.id:
        raise InputError(f"{folder / EVALUATION}: belongs to other weights than the model beside it; evaluate again")
    return evaluation


def print_curve(evaluation: Evaluation) -> None:
    """Print the score of each exit alone, and of all exits together at each threshold."""
    layers, answers = evaluation.exit_layers, evaluation.exit_answers
    print(f"\n{'exit after layer':<25}" + "".join(f"{n:8}" for n in layers))
    print(f"{METRICS[evaluation.metric]:<25}" + "".join(f"{value:8.1f}" for value in evaluation.exit_scores))
    if constant := [str(n) for n, count in zip(layers, answers, strict=True) if count < 2]:
        advice = "train with more --epochs, at another --lr or on more rows"
        print(f"predicts one class for all rows: the exit after layer {', '.join(constant)}; {advice}")
    print(f"\n{'threshold':>9}{'score':>8}{'speedup ratio':>15}   rows that take each exit")
    points = evaluation.thresholds, evaluation.scores, evaluation.speedup_ratios, evaluation.exit_counts
    for threshold, value, ratio, counts in zip(*points, strict=True):
        print(f"{threshold:9.3f}{value:8.1f}{ratio:15.3f}   " + "".join(f"{count:7,}" for count in counts))
    print(f"area under the curve {evaluation.area:.2f}; all exits of all rows took {evaluation.seconds:.1f} s")


if __name__ == "__main__":
    run_command(main)
