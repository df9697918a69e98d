"""Score the exits of a run, and sweep thresholds for its speed-accuracy curve (Sec. 3.3).

    python evaluate.py                          # the newest run under runs/
    python evaluate.py runs/NAME --thresholds 101
    python evaluate.py runs/A runs/B runs/C --plot compare.png
    python evaluate.py runs/NAME --predict new.tsv --threshold 0.9

One pass of each model over the validation rows gives the answers of all exits, which determine the decisions at all
thresholds. Each fifth of the rows is scored with temperatures fitted on the other four (minisweet/confidence.py).
Prints the scores and the curve, and writes evaluation.json, curve.png and logits.safetensors (to try other criteria)
into the run folder.

With --predict it answers new texts by live early exit instead: for each line of the file, which has the columns of the
task's files (no label is needed), it prints label, confidence and exit layer, with tabs between them.

Dimension letters: K exits, N texts, C classes, P thresholds.
"""

import time
from itertools import islice
from pathlib import Path
from shlex import quote

import numpy as np
import torch
from safetensors.torch import save

from minisweet.base.commands import Parser, number, path_to, run_command
from minisweet.base.devices import AMP_CHOICES, AMP_HELP, amp_of, choose_device, choose_precision
from minisweet.base.files import InputError, read_json, write_json, written_beside
from minisweet.confidence import CRITERIA, crossfit, exits_taken
from minisweet.exits import Answer, exit_costs
from minisweet.fast import tune_cpu
from minisweet.inference import answer_all, early_exit
from minisweet.loading import read_config
from minisweet.metrics import METRICS, area_under_curve, score
from minisweet.plots import draw_curves
from minisweet.run import CURVE, EVALUATION, LOGITS, RECORD, environment, is_run, load_models, read_run
from minisweet.texts import Examples, Texts, load_tokenizer, read_cells

WINDOW = 1024  # new texts that are read, and sorted by length, at once


def evaluate(
    folder: Path,
    count: int = 11,
    criterion: str | None = None,
    data_dir: Path | None = None,
    device: str = "auto",
    amp: str = "auto",
) -> None:
    """Run all exits on the validation rows of a run's task. Writes and prints the scores and the curve."""
    run, config = read_run(folder), read_config(folder)
    criterion = criterion or run.exit_strategy
    place = choose_device(device)
    precision = choose_precision(amp, place)

    # 1. The answers of all exits to all rows.
    texts = Texts(load_tokenizer(folder, config.vocab_size, run.max_length), run.examples("dev", data_dir))
    models = [model.to(place) for model in load_models(folder, run, config)]
    start = time.perf_counter()
    answers = answer_all(models, texts, precision)  # K of them
    seconds = round(time.perf_counter() - start, 2)

    # 2. Their confidences, and the exit that each row takes at each threshold.
    confidences = crossfit(criterion, answers, texts.labels, texts.keys)  # (K, N)
    K, N = confidences.shape
    thresholds = np.linspace(CRITERIA[criterion].lowest(len(run.labels)), 1, count).tolist()  # (P,)
    taken = np.stack([exits_taken(confidences, threshold) for threshold in thresholds])  # (P, N)

    # 3. Scores and costs.
    predictions = np.stack([answer.logits.argmax(-1) for answer in answers])  # (K, N)
    scores = score(predictions[taken, np.arange(N)], texts.labels, run.metric).tolist()  # (P,)
    counts = np.stack([np.bincount(row, minlength=K) for row in taken])  # (P, K)
    ratios = (counts @ exit_costs(models) / N).tolist()  # (P,), Eq. 1
    majority = np.full(N, np.bincount(texts.labels).argmax())  # always the same answer
    evaluation = {
        "id": run.id,
        "task": run.task,
        "method": run.method,
        "criterion": criterion,
        "metric": run.metric,
        "exit_layers": run.exit_layers,
        "exit_scores": score(predictions, texts.labels, run.metric).tolist(),  # (K,), each exit alone
        "exit_answers": [len(np.unique(row)) for row in predictions],  # (K,), how many classes each exit predicts
        "thresholds": thresholds,
        "scores": scores,
        "speedup_ratios": ratios,
        "exit_counts": counts.tolist(),
        "area": area_under_curve(ratios, scores, 1 / models[-1].encoder.depth),
        "majority": float(score(majority, texts.labels, run.metric)),
        "fitted": [CRITERIA[criterion].fit(answer, torch.from_numpy(texts.labels)) for answer in answers],  # all rows
        "examples": N,
        "seconds": seconds,
        **environment(place, precision),
    }
    write_logits(folder / LOGITS, answers, texts, run.id)
    write_json(folder / EVALUATION, evaluation)

    # 4. What a person reads.
    print(f"{folder}: {run.model}, {run.method}, {run.task}, {N:,} validation rows")
    print_curve(evaluation)
    draw_curves(folder / CURVE, {str(folder): evaluation})


def write_logits(path: Path, answers: list[Answer], texts: Texts, run_id: str) -> None:
    """Write logits (K, N, C), certainty (K, N) if there is one, labels and keys (N,), for whoever tries a criterion."""
    tensors = {"labels": torch.from_numpy(texts.labels), "keys": torch.tensor(texts.keys)}
    tensors["logits"] = torch.stack([answer.logits for answer in answers])
    if certainty := [answer.certainty for answer in answers if answer.certainty is not None]:
        tensors["certainty"] = torch.stack(certainty)
    with written_beside(path) as new:
        new.write_bytes(save(tensors, {"id": run_id}))


def predict(folder: Path, file: Path, threshold: float, device: str = "auto", amp: str = "auto") -> None:
    """Answer the texts of a file by live early exit, with the evaluation's precision, criterion and `fitted`.

    Prints a line for each text, in order: label, confidence and exit layer. Raises InputError for a file without the
    task's columns, for a line with too many or too few cells, and for another precision.
    """
    run, config, evaluation = read_run(folder), read_config(folder), read_evaluation(folder)
    if evaluation["criterion"] not in CRITERIA:
        raise InputError(f"{folder}: evaluated by {evaluation['criterion']}, and CRITERIA has {', '.join(CRITERIA)}")
    place, own = choose_device(device), amp_of(evaluation["precision"])
    if amp not in ("auto", own):
        raise InputError(f"{amp}, but {folder} was evaluated with {own}; evaluate it again with --amp {amp}", "amp")
    precision = choose_precision(own, place)
    tokenizer = load_tokenizer(folder, config.vocab_size, run.max_length)
    models = [model.to(place) for model in load_models(folder, run, config)]
    lines = read_cells(file, run.text_columns or ["sentence"], run.header)  # the toy task has no columns
    while chunk := list(islice(lines, WINDOW)):
        texts = Texts(tokenizer, Examples.of([cells for _, cells in chunk]))
        printed = [""] * len(texts)
        for batch in texts.by_length(32):
            inputs = batch.to(place).inputs
            with torch.autocast(place.type, precision, enabled=precision is not None):
                found = early_exit(models, *inputs, threshold, evaluation["fitted"], evaluation["criterion"])
            if not found.confidence.isfinite().all():
                raise InputError(f"{file}: the exits give infinite numbers or NaN; try --amp off")
            for row, label, k, confidence in zip(batch.rows.tolist(), *map(torch.Tensor.tolist, found), strict=True):
                printed[row] = f"{run.labels[label]}\t{confidence:.6f}\t{run.exit_layers[k]}"
        print("\n".join(printed))


def newest_run(runs: Path = Path("runs")) -> Path:
    """The run of train.py under `runs` that was written last. Raises InputError if there is none."""
    folders = [path.parent for path in runs.glob(f"[!.]*/{RECORD}") if is_run(path.parent)]  # a dot: being written
    if not folders:
        raise InputError(f"{runs}/: no run of train.py here; train one, or name a run folder")
    return max(folders, key=lambda folder: (folder / RECORD).stat().st_mtime)


def read_evaluation(folder: Path) -> dict:
    """Read the evaluation of a run. Raises InputError if it is missing, or of other weights."""
    run = read_run(folder)
    if not (folder / EVALUATION).is_file():
        raise InputError(f"{folder}: has no {EVALUATION}; first: python evaluate.py {quote(str(folder))}")
    evaluation = read_json(folder / EVALUATION)
    if evaluation.get("id") != run.id:
        raise InputError(f"{folder / EVALUATION}: belongs to other weights than the model beside it; evaluate again")
    return evaluation


def print_curve(evaluation: dict) -> None:
    """Print the score of each exit alone, and of all exits together at each threshold."""
    layers, answers = evaluation["exit_layers"], evaluation["exit_answers"]
    print(f"\n{'exit after layer':<25}" + "".join(f"{n:8}" for n in layers))
    print(f"{METRICS[evaluation['metric']]:<25}" + "".join(f"{value:8.1f}" for value in evaluation["exit_scores"]))
    if constant := [str(n) for n, count in zip(layers, answers, strict=True) if count < 2]:
        advice = "train with more --epochs, at another --lr or on more rows"
        print(f"predicts one class for all rows: the exit after layer {', '.join(constant)}; {advice}")
    print(f"\n{'threshold':>9}{'score':>8}{'speedup ratio':>15}   rows that take each exit")
    points = [evaluation[key] for key in ("thresholds", "scores", "speedup_ratios", "exit_counts")]
    for threshold, value, ratio, counts in zip(*points, strict=True):
        print(f"{threshold:9.3f}{value:8.1f}{ratio:15.3f}   " + "".join(f"{count:7,}" for count in counts))
    print(f"area under the curve {evaluation['area']:.2f}; all exits of all rows took {evaluation['seconds']:.1f} s")


def main() -> None:
    """Evaluate one run, draw the evaluations of several, or answer new texts."""
    parser = Parser(__doc__)
    option = parser.add_argument
    option("runs", nargs="*", type=Path, metavar="RUN", help="run folder (default: the newest under runs/)")
    option("--plot", type=path_to(".png"), metavar="PNG", help="draw evaluated runs' curves; replaced if it exists")
    about = "how many, from the criterion's lowest confidence to 1 (default: 11)"
    option("--thresholds", type=number(int, 2, 10001), help=about)
    option("--criterion", choices=CRITERIA, help="what the confidence is (default: the run's --exit-strategy)")
    option("--predict", type=Path, metavar="TSV", help="new texts to answer, in the columns of the task's files")
    option("--threshold", type=number(float, 0, 1), help="for --predict: the confidence at which a text exits")
    option("--data-dir", type=Path, help="the folder of the tasks (default: that of the training)")
    option("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    option(
        "--amp", choices=AMP_CHOICES, default="auto", help=f"{AMP_HELP}; --predict: as evaluated (default: %(default)s)"
    )
    args = parser.parse_args()
    if (args.predict is None) != (args.threshold is None):
        raise InputError("--predict FILE.tsv and --threshold go together")
    if (args.plot or args.predict) and (args.thresholds or args.criterion or (args.plot and args.predict)):
        raise InputError("--plot and --predict use an evaluation as it is: not both, no --thresholds, no --criterion")
    if len(args.runs) > 1 and not args.plot:
        raise InputError(f"{args.runs[1]}: a second run, and only --plot takes several")
    runs = args.runs or [newest_run()]
    tune_cpu()
    if args.plot:
        draw_curves(args.plot, {str(folder): read_evaluation(folder) for folder in runs})
        print(f"written to {args.plot}")
    elif args.predict:
        predict(runs[0], args.predict, args.threshold, args.device, args.amp)
    else:
        evaluate(runs[0], args.thresholds or 11, args.criterion, args.data_dir, args.device, args.amp)
        next_step = f"python evaluate.py {quote(str(runs[0]))} --predict FILE.tsv --threshold 0.9"
        print(f"\nwritten to {runs[0] / EVALUATION}; to answer new texts: {next_step}")


if __name__ == "__main__":
    run_command(main)
