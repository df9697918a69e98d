"""What each exit says of a text, and where the text leaves; or a page that shows it for all validation rows.

    python -m minisweet.explain RUN "The film was not superb."
    python -m minisweet.explain RUN "How old are you?" "What is your age?"
    python -m minisweet.explain RUN --html page.html

The page is one HTML file, page.html with the data of a saved evaluation. It decides by the rule that new text gets, and
as `minisweet.adaptive.leaves` does: in float32.
Dimension letters: C classes, K exits, N instances, P thresholds.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from minisweet.adaptive import ExitRule, leaves
from minisweet.base.commands import Parser, run_command
from minisweet.base.devices import autocast
from minisweet.base.safe import InputError, check_file, one_line, written_beside
from minisweet.data.load import load_dev
from minisweet.data.rows import Examples
from minisweet.data.toy import LEVELS
from minisweet.evaluation.sweep import Validation, load_validation, sweep
from minisweet.live import Answers
from minisweet.runs.folders import read_evaluation, read_record
from minisweet.runs.records import Evaluation, Record
from minisweet.use.classifier import Answer, EarlyExitClassifier, add_classifier_options, check_texts, classifier_of
from minisweet.use.plots import METRICS

__all__ = ["main", "run_command"]
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
    parser.need(args, args.max_change is not None, "--max-change", "sure")
    chosen = ("threshold", "speed", "max_loss", "max_change", "sure", "batch_size", "device", "amp")
    parser.need(args, args.text, "TEXT, and the page takes what evaluate.py saved", *chosen)
    if len(args.text) > 2 or not (args.text or args.html):
        raise InputError(f"TEXT: {len(args.text)} texts, should be one, or the two of a pair, or --html PAGE alone")
    if args.text:
        classify = classifier_of(args)
        if (trained := classify.record.columns) and len(args.text) != len(trained):
            raise InputError(f"TEXT: {len(args.text)} texts, should be {len(trained)}, as in training")
        print_exits(explain(classify, args.text[0] if len(args.text) == 1 else args.text), classify.threshold)
    if args.html:
        check_file("--html", args.html, ".html")
        record = read_record(args.run)
        evaluation = read_evaluation(args.run, record)
        if evaluation is None:
            raise InputError(f"{args.run}: has no evaluation.json; first: evaluate.py {args.run}")
        validation = load_validation(args.run, evaluation, record)
        write_page(args.html, evaluation, record, load_dev(vars(record), args.data, args.data_dir), validation)
        print(f"written to {args.html}")


@torch.no_grad()
def explain(classify: EarlyExitClassifier, text: str | Sequence[str]) -> list[tuple[Answer, bool]]:
    """What each exit says of a text or a pair, and whether that is enough to leave, as it always is at the last.

    The first such exit is taken. Raises InputError for what is neither text nor pair.
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
    """Print a row per exit, each with its five likeliest labels."""
    taken = next(answer for answer, is_enough in exits if is_enough)
    labels = [one_line(answer.label, 30) for answer, _ in exits]
    width = max(5, *map(len, labels))
    print(f"threshold {threshold:.4g}\n\n   layer  {'label':<{width}}  confidence  leaves  probabilities")
    for label, (answer, is_enough) in zip(labels, exits, strict=True):
        likeliest = sorted(answer.probabilities.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{one_line(name, 30)} {p:.3f}" for name, p in likeliest[:5])
        more = f", and {len(likeliest) - 5} more" if len(likeliest) > 5 else ""
        row = f"{'->' if answer is taken else '  '} {answer.exit_layer:>5}  {label:<{width}}"
        print(f"{row}  {answer.confidence:>10.3f}  {'yes' if is_enough else 'no':<6}  {shown}{more}")
    print(f"\n-> leaves after layer {taken.exit_layer} as {one_line(taken.label, 200)}")


def write_page(path: Path, evaluation: Evaluation, record: Record, rows: Examples, validation: Validation) -> None:
    """Write the page, or replace it, whole or not at all. `validation` is what the exits said of `rows`."""
    logits, certainty, labels, _, metric, exits = validation
    rule = ExitRule.from_evaluation(evaluation, record.num_labels)
    confidence, predictions = rule.confidences(logits, certainty), logits.argmax(-1)  # (K, N) each
    exact = {*evaluation.thresholds, evaluation.operating_point.threshold}
    hundredths = (n / 100 for n in range(101) if n / 100 > rule.lowest)  # of them those that are not there already
    thresholds = sorted(exact | {t for t in hundredths if np.abs(np.array([*exact]) - t).min() > 1e-9})  # (P)
    swept, _ = sweep([(rule, torch.arange(len(labels)))], validation, thresholds)
    data = {
        **{key: getattr(evaluation, key) for key in ("task", "method", "exit_layers")},
        **{key: getattr(record, key) for key in ("labels", "depth")},
        "thresholds": thresholds,
        **swept,
        "operating_point": vars(evaluation.operating_point),
        "model": Path(record.model).name,
        "metric": METRICS[metric],
        "exit_costs": exits.costs(),
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
        partial.write_text(TEMPLATE.read_text("utf-8").replace("{{data}}", text), encoding="utf-8")
