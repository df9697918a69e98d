"""What each exit says of a text, and where the text leaves; or a page that shows it for all validation rows.

    python -m minisweet explain RUN "The film was not superb."
    python -m minisweet explain RUN "How old are you?" "What is your age?"
    python -m minisweet explain RUN --html page.html

The page is page.html with the data of a saved evaluation. It decides as new text is decided: by the exits that the
operating point asks, in float32, as `minisweet.adaptive.leaves` does.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from minisweet.adaptive import ExitRule, leaves
from minisweet.base.commands import Parser, path_to
from minisweet.base.files import InputError, one_line, written_beside
from minisweet.data.rows import Examples
from minisweet.evaluation.answers import AnsweredRows, all_logits, load_answers
from minisweet.evaluation.metrics import METRICS, has_labels
from minisweet.evaluation.sweep import sweep
from minisweet.live import Answers
from minisweet.methods import METHODS
from minisweet.runs.folders import read_evaluation, read_record, read_validation
from minisweet.runs.records import Evaluation, Record
from minisweet.use.classifier import Answer, EarlyExitClassifier, add_classifier_options, classifier_of

TEMPLATE = Path(__file__).with_name("page.html")


def main() -> None:
    """Explain one text, or write the page."""
    parser = Parser(__doc__)
    option = parser.add_argument
    option("run", type=Path, metavar="RUN", help="run folder")
    option("text", nargs="*", metavar="TEXT", help="a text, or the two of a pair")
    option("--html", type=path_to(".html"), metavar="FILE", help="write a page of all validation rows")
    add_classifier_options(parser)
    args = parser.parse_args()
    if bool(args.text) == bool(args.html):
        raise InputError("TEXT: should be a text, or the two of a pair; or --html FILE and no text")
    others = sorted(vars(args).keys() - {"run", "text", "html"})
    parser.need(args, args.text, "TEXT; the page shows what evaluate.py saved", *others)
    if args.text:
        classify = classifier_of(args)
        print_exits(classify, explain(classify, args.text))
        return
    record, evaluation = read_record(args.run), read_evaluation(args.run)
    answered, rows = load_answers(args.run, evaluation, record), read_validation(args.run, record, evaluation)
    write_page(args.html, evaluation, record, rows, answered)
    print(f"written to {args.html}")


def explain(classify: EarlyExitClassifier, text: str | Sequence[str]) -> list[tuple[Answer, bool]]:
    """What each exit says of a text or a pair, and whether that is enough to leave, as it always is at the last."""
    logits, certainty = all_logits(classify.model, classify.tokenize([text]), classify.precision)  # (K, 1, C), (K, 1)
    confidence = classify.rule.confidences(logits, certainty)[:, 0]  # (K,)
    enough = leaves(confidence, classify.threshold, classify.rule.lowest)  # (K,)
    enough[-1] = True
    exits, logits = torch.arange(len(logits), device="cpu"), logits[:, 0]  # whatever the user's default device is
    answers = classify.answers(Answers(logits.argmax(-1), exits, logits, confidence))
    return list(zip(answers, enough.tolist(), strict=True))


def print_exits(classify: EarlyExitClassifier, exits: list[tuple[Answer, bool]]) -> None:
    """Print a row per exit, each with its five likeliest labels."""
    taken = next(answer for answer, is_enough in exits if is_enough)
    name = classify.certainty_name
    print(f"threshold {classify.threshold:.6g}, to be compared with the {METRICS.get(name, name)}\n")
    print(f"   layer  {name:>10}  leaves  label and probabilities")
    for answer, is_enough in exits:
        likeliest = Counter(answer.probabilities).most_common(5)
        probabilities = ", ".join(f"{one_line(label, 30)} {p:.3f}" for label, p in likeliest)
        row = f"{'->' if answer is taken else '  '} {answer.exit_layer:>5}  {answer.confidence:>10.3f}"
        print(f"{row}  {'yes' if is_enough else 'no':<6}  {probabilities}")
    where = f"after layer {taken.exit_layer}" if taken.exit_layer else "at exit 0, a bag of words"
    print(f"\n-> leaves {where} as {one_line(taken.label, 200)}")


def write_page(path: Path, evaluation: Evaluation, record: Record, rows: Examples, answered: AnsweredRows) -> None:
    """Write the page, or replace it, whole or not at all. `answered` is what all exits said of `rows`."""
    point, rule = evaluation.operating_point, ExitRule.from_evaluation(evaluation, record.num_labels)
    asked = [evaluation.exit_layers.index(layer) for layer in point.asked_exits]
    confidence = rule.confidences(answered.logits, answered.certainty)[asked]  # (asked exits, N)
    thresholds = sorted({rule.lowest, point.threshold, *(n / 100 for n in range(101) if n / 100 > rule.lowest)})
    swept, _ = sweep([(rule, np.arange(len(answered.labels)))], answered, thresholds, asked)
    data = {
        **{key: swept[key] for key in ("scores", "speedup_ratios")},
        **{key: getattr(record, key) for key in ("task", "method", "depth", "labels")},
        "is_one_model": METHODS[record.method].is_one_model,
        "has_branches": METHODS[record.method].cost_in_vain > 0,
        "model": Path(record.model).name,
        "exit_layers": point.asked_exits,
        "exit_scores": [swept["exit_scores"][k] for k in asked],
        "thresholds": thresholds,
        "lowest": rule.lowest,
        "operating_point": vars(point),
        "metric": METRICS[answered.metric],
        "sentences": rows.texts(),
        "predictions": answered.logits[asked].argmax(-1).tolist(),
        "confidences": [[float(f"{sure:.9g}") for sure in row] for row in confidence.tolist()],  # as float32 tells them
        "right": answered.labels.tolist() if has_labels(answered.metric) else None,
        "difficulties": rows.difficulties,  # of the toy task
    }
    # What "<" could begin, a tag or a comment, must not end the script element; json escapes all beyond ASCII.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    with written_beside(path) as partial:
        partial.write_text(TEMPLATE.read_text("utf-8").replace("{{data}}", text), encoding="utf-8")
