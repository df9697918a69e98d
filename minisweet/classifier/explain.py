"""Show each exit's answer to a text, and where the text exits; or write a page that shows it for validation rows.

    minisweet explain RUN "The film was not superb."
    minisweet explain RUN --html page.html

Exit 0 is a sum over words and pairs of neighbours, so that the contribution of each is known exactly. The page shows
the labelled validation rows, or all if none is labelled, and applies the same exit rule as `predict`.
"""

import json
from collections import Counter
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from minisweet.adaptive import ExitRule, leaves
from minisweet.base.commands import Parser, path_to, progress
from minisweet.base.files import InputError, one_line, written_beside
from minisweet.classifier.deployed import Answer, Deployed, add_options, answers_of, ask_exits, deployed_of, tokenize
from minisweet.classifier.promise import METRIC_NAMES, scored
from minisweet.live import Decisions
from minisweet.sweep import sweep
from minisweet.texts import Texts

TEMPLATE = Path(__file__).with_name("page.html")
MOST_NGRAMS = 5  # on each side
MOST_ROWS = 10_000  # rows of the page that have n-grams, so that it stays small


def main(words: list[str]) -> None:
    """Explain one text, or write the page."""
    parser = Parser(__doc__, "minisweet explain")
    add_options(parser)
    option = parser.add_argument
    option("text", nargs="?", metavar="TEXT", help="a text")
    option("--html", type=path_to(".html"), metavar="FILE", help="write a page of the validation rows")
    args = parser.parse_args(words)
    if (args.text is None) == (args.html is None):
        raise InputError("TEXT: should be a text; or --html FILE and no text")
    parser.need(
        args, args.text is not None, "TEXT; the page shows saved answers", "threshold", "batch_size", "device", "amp"
    )
    if args.text is not None:
        deployed = deployed_of(args)
        print_exits(deployed, explain(deployed, args.text))
    else:
        write_page(args.html, deployed_of(args, "texts", "outputs"))
        print(f"written to {args.html}")


def explain(deployed: Deployed, text: str) -> list[tuple[Answer, bool]]:
    """Both exits' answers to a text, and whether the text may leave there, as always at the last one."""
    texts = tokenize(deployed, [text])
    rule = deployed.run.point.rule
    outputs = ask_exits(deployed.run.model, deployed.run.bag, texts, deployed.precision).by(rule)
    logits = outputs.logits[:, 0]  # (2, C)
    confidence = logits.softmax(-1).amax(-1)  # (2,)
    may_leave = leaves(confidence, deployed.threshold, rule.lowest)  # (2,)
    may_leave[-1] = True
    exits = torch.arange(len(logits), device="cpu")  # whatever the user's default device is
    answers = answers_of(deployed, Decisions(logits.argmax(-1), exits, logits, confidence))
    answers[0] = answers[0]._replace(words=word_scores(deployed, texts, 0))
    return list(zip(answers, may_leave.tolist(), strict=True))


def word_scores(deployed: Deployed, texts: Texts, row: int) -> tuple[dict[str, float], dict[str, float]]:
    """What speaks most for exit 0's answer to a text, and for its runner-up: five n-grams each, largest first.

    A number is what a word, or a pair of neighbours "a b", adds to the difference of the two logits, wherever it stands
    in the text.
    """
    inputs = texts.batch(np.array([row])).to(deployed.device).inputs
    answer, runner_up = deployed.run.bag(*inputs[:2])[0].argsort(descending=True, stable=True)[:2]
    added = deployed.run.bag.contributions(*inputs[:2])[0]  # (2T, C)
    tokens = list(map(deployed.run.tokenizer.id_to_token, inputs[0][0].tolist()))
    names = [*tokens, *map(" ".join, pairwise([*tokens, ""]))]
    total = Counter()
    for name, number in zip(names, (added[:, answer] - added[:, runner_up]).tolist(), strict=False):
        total[name] += number
    ranked = total.most_common()
    for_answer = {name: number for name, number in ranked[:MOST_NGRAMS] if number > 0}
    for_runner_up = {name: -number for name, number in ranked[: -MOST_NGRAMS - 1 : -1] if number < 0}
    return for_answer, for_runner_up


def print_exits(deployed: Deployed, exits: list[tuple[Answer, bool]]) -> None:
    """Print a row per exit, each with its five likeliest labels, and the words that speak at exit 0."""
    taken = next(answer for answer, may_leave in exits if may_leave)
    print(f"threshold {deployed.threshold:.6g}\n\n   layer  confidence  leaves  label and probabilities")
    for answer, may_leave in exits:
        likeliest = Counter(answer.probabilities).most_common(5)
        probabilities = ", ".join(f"{one_line(label, 30)} {p:.3f}" for label, p in likeliest)
        row = f"{'->' if answer is taken else '  '} {answer.exit_layer:>5}  {answer.confidence:>10.3f}"
        print(f"{row}  {'yes' if may_leave else 'no':<6}  {probabilities}")
    words = exits[0][0].words
    (label, _), (runner_up, _) = Counter(exits[0][0].probabilities).most_common(2)
    print(f"\nexit 0 adds up words and pairs of neighbours. For {one_line(label, 30)}: {in_words(words[0])}")
    print(f"For {one_line(runner_up, 30)}, the runner-up: {in_words(words[1])}")
    place = f"after layer {taken.exit_layer}" if taken.exit_layer else "at exit 0, a bag of words"
    print(f"\n-> leaves {place} as {one_line(taken.label, 200)}")


def in_words(numbers: dict[str, float]) -> str:
    """N-grams and what each adds, in a line."""
    return ", ".join(f'"{one_line(name, 60)}" {number:+.2f}' for name, number in numbers.items()) or "nothing"


def write_page(path: Path, deployed: Deployed) -> None:
    """Write the page of a run's validation texts, whole or not at all. An old page is replaced.

    Rows without a label are shown only if no row has one.
    """
    record, point, texts, outputs = deployed.run.record, deployed.run.point, deployed.run.texts, deployed.run.outputs
    rule = point.rule
    outputs = outputs.by(rule)
    shown = np.flatnonzero(outputs.labels.numpy() >= 0)
    has_labels = len(shown) > 0
    outputs = scored(outputs)
    texts = texts.take(shown) if has_labels else texts
    thresholds = sorted({rule.lowest, point.threshold, *(n / 100 for n in range(101) if n / 100 > rule.lowest)})
    plain = ExitRule(len(record.labels))  # of calibrated logits
    curve, _ = sweep([(plain, np.arange(len(outputs.labels)))], outputs, thresholds)
    confidences = plain.confidences(outputs.logits).tolist()  # (2, N)
    rows = range(min(MOST_ROWS, len(texts)))
    words = (word_scores(deployed, texts, row) for row in progress(rows, desc="exit 0", unit="text"))
    data = {
        **{key: curve[key] for key in ("scores", "speedup_ratios", "exit_scores")},
        "task": record.task,
        "labels": record.labels,
        "depth": record.depth,
        "model": Path(record.arguments.model).name,
        "thresholds": thresholds,
        "lowest": rule.lowest,
        "point": asdict(point) | {"promise": point.promise},
        "metric": METRIC_NAMES[outputs.metric],
        "sentences": texts.examples.texts(),
        "predictions": outputs.logits.argmax(-1).tolist(),
        "confidences": [[float(f"{sure:.9g}") for sure in row] for row in confidences],  # enough for float32
        "words": [list(map(in_words, both)) for both in words],
        "right": outputs.labels.tolist() if has_labels else None,
    }
    # "<" could begin a tag or a comment that ends the script element. json escapes everything beyond ASCII.
    content = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    with written_beside(path) as partial:
        partial.write_text(TEMPLATE.read_text("utf-8").replace("{{data}}", content), encoding="utf-8")
