"""What each exit says of a text, and where the text leaves; or a page that shows it for all validation rows.

    python -m minisweet.explain RUN "The film was not superb."
    python -m minisweet.explain RUN "How old are you?" "What is your age?"
    python -m minisweet.explain RUN --html page.html

The page is one HTML file, page.html with the data of a saved evaluation. It decides by the confidences that stand in it
as `minisweet.adaptive.leaves` does: in float32, so that it counts what evaluation.json counts.
Dimension letters: C classes, K exits, N instances, P thresholds.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from minisweet.adaptive import ExitRule, exit_costs, leaves
from minisweet.base.commands import Parser, run_command
from minisweet.base.devices import autocast
from minisweet.base.safe import InputError, check_file, one_line, written_beside
from minisweet.calibration import row_temperatures
from minisweet.data.load import load_dev
from minisweet.data.tasks import Examples
from minisweet.data.toy import LEVELS
from minisweet.evaluation.sweep import Validation, load_validation, sweep
from minisweet.live import Answers
from minisweet.runs.folders import read_evaluation, read_record
from minisweet.runs.records import Evaluation, Record
from minisweet.use.classifier import Answer, EarlyExitClassifier, add_classifier_options, check_texts, classifier_of
from minisweet.use.plots import METRICS

__all__ = ["main", "run_command"]
SHOWN = 5  # probabilities of an exit, the highest ones
TEMPLATE = Path(__file__).with_name("page.html")


def main() -> None:
    """Explain one text, or write the page."""
    parser = Parser(__doc__)
    option = parser.add_argument
    option("run", type=Path, metavar="RUN", help="run folder")
    option("text", nargs="*", metavar="TEXT", help="a text, or the two of a pair")
    option("--html", type=Path, metavar="PAGE", help="write a page of all validation rows, from the saved evaluation")
    option("--data", type=Path, metavar="FILE", help="of --html: the validation rows, if the file moved since training")
    option("--data-dir", type=Path, help="of --html: where the GLUE tasks' folders lie, if they moved")
    add_classifier_options(parser)
    args = parser.parse_args()
    parser.need(args, args.html, "--html", "data", "data_dir")
    chosen = ("threshold", "speed", "max_loss", "batch_size", "prepared", "device", "amp")
    parser.need(args, args.text, "TEXT, and the page takes what evaluate.py saved", *chosen)
    if len(args.text) > 2 or not (args.text or args.html):
        raise InputError(f"TEXT: {len(args.text)} texts, should be one, or the two of a pair, or --html PAGE alone")
    if args.text:
        classify = classifier_of(args)
        print_exits(explain(classify, args.text[0] if len(args.text) == 1 else args.text), classify.threshold)
    if args.html:
        check_file("--html", args.html, ".html")
        record, path = read_record(args.run), args.run / "logits.safetensors"
        evaluation = read_evaluation(args.run, record)
        if evaluation is None or not path.exists():
            raise InputError(f"{args.run}: has no evaluation.json or no {path.name}; first: evaluate.py {args.run}")
        validation = load_validation(path, evaluation, record.num_labels)
        rows = load_dev(vars(record), args.data, args.data_dir)
        if len(rows.first) != len(validation.labels):
            raise InputError(f"{path}: of {len(validation.labels)} rows, and the validation data has {len(rows.first)}")
        write_page(args.html, evaluation, record, rows, validation)
        print(f"written to {args.html}")


@torch.no_grad()
def explain(classify: EarlyExitClassifier, text: str | Sequence[str]) -> list[tuple[Answer, bool]]:
    """What each exit says of a text or a pair, and whether that is enough to leave: the first such exit is taken.

    At the last exit it always is. Raises InputError for what is neither text nor pair.
    """
    inputs = next(classify.tokenize(check_texts([text])).by_length(1)).to(classify.device).inputs
    with autocast(classify.device, classify.precision):
        said = list(classify.model.exit_by_exit(*inputs))  # K of (1, C) and (1,) or None
    logits = torch.cat([exit_logits for exit_logits, _ in said]).float()  # (K, C)
    confidence = torch.cat([classify.rule.confidence(k, *exit_said) for k, exit_said in enumerate(said)])  # (K,)
    enough = leaves(confidence, classify.threshold, classify.rule.lowest)  # (K,)
    enough[-1] = True
    answers = classify.answers(Answers(logits.argmax(-1), torch.arange(len(said)), logits, confidence))
    return list(zip(answers, enough.tolist(), strict=True))


def print_exits(exits: list[tuple[Answer, bool]], threshold: float) -> None:
    """Print a row per exit."""
    taken = next(answer for answer, is_enough in exits if is_enough)
    width = max(5, *(len(one_line(answer.label, 30)) for answer, _ in exits))
    print(f"threshold {threshold:.4g}\n\n   layer  {'label':<{width}}  confidence  leaves  probabilities")
    for answer, is_enough in exits:
        highest = sorted(answer.probabilities.items(), key=lambda item: -item[1])[:SHOWN]
        shown = ", ".join(f"{one_line(label, 30)} {p:.3f}" for label, p in highest)
        more = f", and {len(answer.probabilities) - SHOWN} more" if len(answer.probabilities) > SHOWN else ""
        row = f"{'->' if answer is taken else '  '} {answer.exit_layer:>5}  {one_line(answer.label, 30):<{width}}"
        print(f"{row}  {answer.confidence:>10.3f}  {'yes' if is_enough else 'no':<6}  {shown}{more}")
    print(f"\n-> leaves after layer {taken.exit_layer} as {one_line(taken.label, 200)}")


def write_page(path: Path, evaluation: Evaluation, record: Record, rows: Examples, validation: Validation) -> None:
    """Write the page, whole or not at all; what stands at `path` is replaced.

    `evaluation` and `record` are what evaluation.json and run.json hold, `validation` what the exits said of `rows`.
    Raises InputError where the evaluation counts other exits at its thresholds than these logits give.
    """
    logits, certainty, labels = validation
    if certainty is None:
        rule = ExitRule(record.num_labels, row_temperatures(logits, labels, evaluation.calibration))
    else:
        rule = ExitRule(record.num_labels, ranges=torch.tensor(evaluation.certainty_ranges))
    confidence, predictions = rule.confidences(logits, certainty), logits.argmax(-1)  # (K, N) each
    exact = {*evaluation.thresholds, evaluation.operating_point.threshold}
    hundredths = (n / 100 for n in range(101) if n / 100 > rule.lowest)  # of them those that are not there already
    thresholds = sorted(exact | {t for t in hundredths if np.abs(np.array([*exact]) - t).min() > 1e-9})  # (P)
    of_model, metric = (evaluation.exit_layers, record.depth, evaluation.method), evaluation.metric
    swept, _ = sweep(rule, validation, thresholds, metric, of_model)
    for key in ("exit_counts", "speedup_ratios"):
        found = dict(zip(thresholds, swept[key], strict=True))
        if not np.allclose([found[t] for t in evaluation.thresholds], getattr(evaluation, key), atol=1e-9):
            raise InputError(f"evaluation.json: its {key} are not what these logits give; run evaluate.py again")
    data = {
        **{key: getattr(evaluation, key) for key in ("task", "method", "exit_layers")},
        **{key: getattr(record, key) for key in ("labels", "depth")},
        "thresholds": thresholds,
        **swept,
        "operating_point": vars(evaluation.operating_point),
        "model": Path(record.model).name,
        "metric": METRICS[metric],
        "exit_costs": exit_costs(*of_model),
        "lowest": rule.lowest,
        "sentences": rows.texts(),
        "predictions": predictions.tolist(),
        # Nine digits tell every float32 from its neighbours.
        "confidences": [[float(f"{value:.9g}") for value in row] for row in confidence.tolist()],
        "right": None if metric == "agreement" else labels.tolist(),
        "levels": LEVELS if rows.difficulties else [],  # of the toy task
        "difficulties": rows.difficulties and [LEVELS.index(level) for level in rows.difficulties],
    }
    # What "<" could begin, a tag or a comment, must not end the script element; json escapes all beyond ASCII.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    with written_beside(path) as partial:
        partial.write_text(TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", text), encoding="utf-8")
