"""What each exit says of a text, and where the text leaves; or a page that shows it for all validation rows.

    python -m minisweet.explain RUN "The film was not superb."
    python -m minisweet.explain RUN "How old are you?" "What is your age?"
    python -m minisweet.explain RUN --html page.html

Dimension letters: C classes, K exits, N instances.
"""

from pathlib import Path
from typing import NamedTuple

import torch

from minisweet.adaptive import leaves
from minisweet.data.own import load_dev
from minisweet.evaluation.sweep import load_validation
from minisweet.files.commands import Parser, run_command
from minisweet.files.runs import read_evaluation, read_record
from minisweet.files.safe import InputError, check_file, one_line
from minisweet.training.devices import autocast
from minisweet.use.classifier import Answer, EarlyExitClassifier, add_classifier_options, check_texts, classifier_of
from minisweet.use.page import write_page

__all__ = ["main", "run_command"]
SHOWN = 5  # probabilities of an exit, the highest ones


class ExitAnswer(NamedTuple):
    """What one exit says of a text."""

    answer: Answer
    leaves: bool  # whether its confidence is enough; the last exit's always is
    taken: bool  # the first one that is enough


def main() -> None:
    """Explain one text, or write the page."""
    about, examples, *_ = __doc__.split("\n\n")
    parser = Parser(description=about, epilog=f"examples:\n{examples}")
    option = parser.add_argument
    option("run", type=Path, metavar="RUN", help="run folder")
    option("text", nargs="*", metavar="TEXT", help="a text, or the two of a pair")
    option("--html", type=Path, metavar="PAGE", help="write a page of all validation rows, from the saved evaluation")
    option("--data", type=Path, metavar="FILE", help="of --html: the validation rows, if the file moved since training")
    option("--data-dir", type=Path, help="of --html: where the GLUE tasks' folders lie, if they moved")
    add_classifier_options(parser)
    args = parser.parse_args()
    if len(args.text) > 2 or not (args.text or args.html):
        raise InputError(f"TEXT: {len(args.text)} texts, should be one, or the two of a pair, or --html PAGE alone")
    if args.html:
        check_file("--html", args.html, ".html")
    if args.text:
        classify = classifier_of(args)
        text = args.text[0] if len(args.text) == 1 else tuple(args.text)
        print_exits(explain(classify, text), classify.threshold)
    if args.html:
        write_html(args.run, args.html, args.data, args.data_dir)
        print(f"written to {args.html}")


@torch.no_grad()
def explain(classify: EarlyExitClassifier, text: str | tuple[str, str]) -> list[ExitAnswer]:
    """What all exits say of a text or a pair, whether they would be taken or not. Raises InputError for another."""
    inputs = next(classify.tokenize(check_texts([text])).by_length(1)).to(classify.device).inputs
    exits, found = [], False
    with autocast(classify.device, classify.precision):
        said = list(classify.model.exit_by_exit(*inputs))  # K of (1, C) and (1,) or None
    for k, (logits, certainty) in enumerate(said):
        confidence = classify.rule.confidence(k, logits, certainty)  # (1,)
        enough = k == len(said) - 1 or bool(leaves(confidence, classify.threshold, classify.rule.lowest))
        probabilities = classify.probabilities(logits.float(), torch.tensor([k]))[0].tolist()
        label, named = classify.labels[int(logits.argmax())], dict(zip(classify.labels, probabilities, strict=True))
        answer = Answer(label, float(confidence), classify.exit_layers[k], named)
        exits.append(ExitAnswer(answer, enough, enough and not found))
        found = found or enough
    return exits


def print_exits(exits: list[ExitAnswer], threshold: float) -> None:
    """Print a row per exit."""
    width = max(len(one_line(exit.answer.label, 30)) for exit in exits)
    print(f"threshold {threshold:.4g}\n\n   layer  {'label':<{max(5, width)}}  confidence  leaves  probabilities")
    for answer, enough, taken in exits:
        highest = sorted(answer.probabilities.items(), key=lambda item: -item[1])[:SHOWN]
        shown = ", ".join(f"{one_line(label, 30)} {p:.3f}" for label, p in highest)
        more = f", and {len(answer.probabilities) - SHOWN} more" if len(answer.probabilities) > SHOWN else ""
        row = f"{'->' if taken else '  '} {answer.exit_layer:>5}  {one_line(answer.label, 30):<{max(5, width)}}"
        print(f"{row}  {answer.confidence:>10.3f}  {'yes' if enough else 'no':<6}  {shown}{more}")
    taken = next(exit.answer for exit in exits if exit.taken)
    print(f"\n-> leaves after layer {taken.exit_layer} as {one_line(taken.label, 200)}")


def write_html(run: Path, page: Path, data: Path | None, data_dir: Path | None) -> None:
    """Write the page of a run from its saved evaluation, and its validation rows. Raises InputError."""
    record = read_record(run)
    evaluation, path = read_evaluation(run, record), run / "logits.safetensors"
    if evaluation is None or not path.exists():
        raise InputError(f"{run}: has no evaluation.json or no logits.safetensors; first: evaluate.py {run}")
    validation = load_validation(path, evaluation, record["num_labels"])
    rows = load_dev({"data_dir": record["arguments"].get("data_dir")} | record, data, data_dir)
    if len(rows.first) != len(validation.labels):
        raise InputError(f"{path}: of {len(validation.labels)} rows, and the validation data has {len(rows.first)}")
    labels = None if rows.labels is None else validation.labels.tolist()
    said = (validation.logits, validation.certainty, labels)
    write_page(page, evaluation, record, rows.texts(), *said, rows.difficulties)
