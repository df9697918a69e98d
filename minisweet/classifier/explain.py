"""What each exit says of a text, and where the text leaves; or a page that shows it for all validation rows.

    minisweet explain RUN "The film was not superb."
    minisweet explain RUN "How old are you?" "What is your age?"
    minisweet explain RUN --html page.html

Exit 0 is a sum over words and pairs of neighbours, and so what spoke for its answer is exact. The page is page.html
with the saved answers. It decides as new text is decided: by the exits that are asked, in float32, as
`minisweet.adaptive.leaves` does.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from minisweet.adaptive import ExitRule, leaves
from minisweet.base.commands import Parser, path_to, progress
from minisweet.base.files import InputError, one_line, written_beside
from minisweet.texts import Texts
from minisweet.metrics import METRICS
from minisweet.sweep import sweep
from minisweet.live import Decisions
from minisweet.outputs import ask_all
from minisweet.classifier.estimator import Answer, Deployed, add_classifier_options, answers_of, classifier_of, tokenize

TEMPLATE = Path(__file__).with_name("page.html")
WORDS, MOST = 5, 10_000  # n-grams on each side; rows of the page that have them, so that it stays small
MET = ("(first text met in the second)", "(second text met in the first)")  # of `NgramExit.find_met`


def main() -> None:
    """Explain one text, or write the page."""
    parser = Parser(__doc__)
    add_classifier_options(parser)
    option = parser.add_argument
    option("text", nargs="*", metavar="TEXT", help="a text, or the two of a pair")
    option("--html", type=path_to(".html"), metavar="FILE", help="write a page of all validation rows")
    args = parser.parse_args()
    if bool(args.text) == bool(args.html):
        raise InputError("TEXT: should be a text, or the two of a pair; or --html FILE and no text")
    parser.need(args, args.text, "TEXT; the page shows saved answers", "threshold", "batch_size", "device", "amp")
    its = classifier_of(args).deployed
    if args.text:
        print_exits(its, explain(its, args.text))
        return
    write_page(args.html, its)
    print(f"written to {args.html}")


def explain(its: Deployed, text: str | Sequence[str]) -> list[tuple[Answer, bool]]:
    """What each exit says of a text or a pair, and whether that is enough to leave, as it always is at the last."""
    texts = tokenize(its, [text])
    logits = ask_all(its.model, texts, its.precision).by(its.rule).logits[:, 0]  # (K, C)
    confidence = ExitRule(len(its.labels)).confidences(logits[:, None])[:, 0]  # (K,)
    enough = leaves(confidence, its.threshold, its.rule.lowest)  # (K,)
    enough[-1] = True
    exits = torch.arange(len(logits), device="cpu")  # whatever the user's default device is
    answers = answers_of(its, Decisions(logits.argmax(-1), exits, logits, confidence))
    for words in word_scores(its, texts):
        answers[0] = answers[0]._replace(words=words)
    return list(zip(answers, enough.tolist(), strict=True))


def word_scores(its: Deployed, texts: Texts) -> Iterator[tuple[dict[str, float], ...]]:
    """What spoke most at exit 0 for each text's answer, and what for the runner-up: five n-grams each, largest first.

    A number is what a word, or a pair of neighbours "a b", adds to the one's logit more than to the other's, wherever
    it stands in the text. Of pairs of texts it may be how well one is met in the other. Without exit 0 nothing comes.
    """
    for row in range(len(texts)) if its.model.ngrams is not None else ():
        inputs = texts.batch(np.array([row])).to(its.device).inputs
        answer, other = its.model.ngrams(*inputs)[0].argsort(descending=True, stable=True)[:2]
        added = its.model.ngrams.contributions(*inputs)[0]  # (2T or 2T+2, C)
        tokens = list(map(its.run.tokenizer.id_to_token, inputs[0][0].tolist()))
        names = [*tokens, *map(" ".join, pairwise([*tokens, ""])), *MET]
        total = Counter()
        for name, number in zip(names, (added[:, answer] - added[:, other]).tolist(), strict=False):
            total[name] += number
        ranked = total.most_common()
        yield (
            {name: number for name, number in ranked[:WORDS] if number > 0},
            {name: -number for name, number in ranked[: -WORDS - 1 : -1] if number < 0},
        )


def print_exits(its: Deployed, exits: list[tuple[Answer, bool]]) -> None:
    """Print a row per exit, each with its five likeliest labels, and the words that spoke at exit 0."""
    taken = next(answer for answer, is_enough in exits if is_enough)
    print(f"threshold {its.threshold:.6g}\n\n   layer  confidence  leaves  label and probabilities")
    for answer, is_enough in exits:
        likeliest = Counter(answer.probabilities).most_common(5)
        probabilities = ", ".join(f"{one_line(label, 30)} {p:.3f}" for label, p in likeliest)
        row = f"{'->' if answer is taken else '  '} {answer.exit_layer:>5}  {answer.confidence:>10.3f}"
        print(f"{row}  {'yes' if is_enough else 'no':<6}  {probabilities}")
    if words := exits[0][0].words:
        (one, _), (other, _) = Counter(exits[0][0].probabilities).most_common(2)
        print(f"\nexit 0 adds up words and pairs of neighbours. For {one_line(one, 30)}: {in_words(words[0])}")
        print(f"For {one_line(other, 30)}, the runner-up: {in_words(words[1])}")
    where = f"after layer {taken.exit_layer}" if taken.exit_layer else "at exit 0, a bag of words"
    print(f"\n-> leaves {where} as {one_line(taken.label, 200)}")


def in_words(numbers: dict[str, float]) -> str:
    """N-grams and what each adds, in a line."""
    return ", ".join(f'"{one_line(name, 60)}" {number:+.2f}' for name, number in numbers.items()) or "nothing"


def write_page(path: Path, its: Deployed) -> None:
    """Write the page of a run's saved answers, or replace it, whole or not at all.

    Rows without a label are on it only where no row has one.
    """
    record, point, rule, outputs, rows = its.run.record, its.point, its.rule, its.run.outputs, its.run.texts
    asked = [outputs.exits.layers.index(n) for n in point.exits]
    outputs = outputs._replace(logits=outputs.logits[asked], exits=outputs.exits.take(asked)).by(rule)
    kept = np.flatnonzero(outputs.labels.numpy() >= 0)
    has_labels = len(kept) > 0
    outputs, rows = (outputs.take(kept), rows.take(kept)) if has_labels else (outputs.filled(), rows)
    thresholds = sorted({rule.lowest, point.threshold, *(n / 100 for n in range(101) if n / 100 > rule.lowest)})
    plain = ExitRule(len(its.labels))  # of calibrated logits
    swept, _ = sweep([(plain, np.arange(len(outputs.labels)))], outputs, thresholds)
    confidences = plain.confidences(outputs.logits).tolist()  # (K, N)
    words = word_scores(its, rows.take(np.arange(min(MOST, len(rows)))))
    data = {
        **{key: swept[key] for key in ("scores", "speedup_ratios", "exit_scores")},
        "task": record.task,
        "method": record.arguments.method,
        "labels": record.labels,
        **outputs.exits._asdict(),
        "model": Path(record.arguments.model).name,
        "thresholds": thresholds,
        "lowest": rule.lowest,
        "point": asdict(point) | {"promise": point.promise},
        "metric": METRICS[outputs.metric],
        "sentences": rows.examples.texts(),
        "predictions": outputs.logits.argmax(-1).tolist(),
        "confidences": [[float(f"{sure:.9g}") for sure in row] for row in confidences],  # as float32 tells them
        "words": [list(map(in_words, both)) for both in progress(words, desc="exit 0", unit="text")],
        "right": outputs.labels.tolist() if has_labels else None,
        "difficulties": rows.examples.difficulties,  # of the toy task
    }
    # What "<" could begin, a tag or a comment, must not end the script element; json escapes all beyond ASCII.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    with written_beside(path) as partial:
        partial.write_text(TEMPLATE.read_text("utf-8").replace("{{data}}", text), encoding="utf-8")
