"""Each exit's answer to a text, and where the text exits; and a page that shows it for validation rows.

Exit 0 is a sum over tokens and pairs of neighbours, so that the contribution of each is known exactly. The page shows
the labelled validation rows, or all if none is labelled, and applies the same exit rule as `predict`.
"""

import json
from argparse import Namespace
from collections import Counter
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minisweet.base.commands import progress
from minisweet.base.files import one_line, written_beside
from minisweet.classifier import report
from minisweet.classifier.cascade import Answer, Cascade, answers_of, at_exit_0, at_full_depth, leaves
from minisweet.classifier.promise import OperatingPoint
from minisweet.classifier.run import Validation
from minisweet.texts import Texts

TEMPLATE = Path(__file__).with_name("page.html")
MOST_NGRAMS = 5  # on each side
MOST_ROWS = 10_000  # rows of the page that have n-grams, so that it stays small


def explain(cascade: Cascade, text: str) -> list[tuple[Answer, bool]]:
    """Both exits' answers to a text, and whether the text may leave there, as always at the last one."""
    texts = cascade.tokenize([text])
    both, rule = cascade.ask_both(texts), cascade.rule
    logits = torch.cat([at_exit_0(both[0], rule), at_full_depth(both[0], both[1], rule)])  # (2, C)
    first, last = cascade.as_answers(logits, (0, cascade.model.encoder.depth))
    may_leave = leaves(logits[0].softmax(-1).amax(), cascade.threshold, 1 / logits.shape[1])
    return [(first._replace(words=word_scores(cascade, texts, 0)), bool(may_leave)), (last, True)]


def word_scores(cascade: Cascade, texts: Texts, row: int) -> tuple[dict[str, float], dict[str, float]]:
    """The n-grams that add most to exit 0's answer and to its runner-up: at most five each, largest first.

    A number is what a token, or a pair of neighbours "a b", adds to the difference of the two logits, summed
    over its occurrences in the text.
    """
    bag, (ids, mask, _) = cascade.bag, texts.batch(np.array([row])).to(cascade.device).inputs
    answer, runner_up = bag(ids, mask)[0].argsort(descending=True, stable=True)[:2]
    added = bag.contributions(ids, mask)[0]  # (2T, C)
    tokens = [str(cascade.tokenizer.id_to_token(token)) for token in ids[0].tolist()]
    names = [*tokens, *map(" ".join, pairwise([*tokens, ""]))]
    total: Counter = Counter()
    for name, number in zip(names, (added[:, answer] - added[:, runner_up]).tolist(), strict=False):
        total[name] += number
    ranked = total.most_common()
    for_answer = {name: float(number) for name, number in ranked[:MOST_NGRAMS] if number > 0}
    return for_answer, {name: -number for name, number in ranked[: -MOST_NGRAMS - 1 : -1] if number < 0}


def print_exits(cascade: Cascade, text: str) -> None:
    """Print a row per exit, each with its five likeliest labels, and the n-grams that contribute most at exit 0."""
    exits = explain(cascade, text)
    taken = next(answer for answer, may_leave in exits if may_leave)
    print(f"threshold {cascade.threshold:.6g}\n\n   layer  confidence  leaves  label and probabilities")
    for answer, may_leave in exits:
        likeliest = Counter(answer.probabilities).most_common(5)
        probabilities = ", ".join(f"{one_line(label, 30)} {p:.3f}" for label, p in likeliest)
        row = f"{'->' if answer is taken else '  '} {answer.exit_layer:>5}  {answer.confidence:>10.3f}"
        print(f"{row}  {'yes' if may_leave else 'no':<6}  {probabilities}")
    (label, _), (runner_up, _) = Counter(exits[0][0].probabilities).most_common(2)
    for_answer, for_runner_up = map(in_words, exits[0][0].words or ({}, {}))
    print("\nexit 0 adds up tokens (words, ##pieces of words, and punctuation) and pairs of neighbours.")
    print(f"For {one_line(label, 30)}: {for_answer}\nFor {one_line(runner_up, 30)}, the runner-up: {for_runner_up}")
    place = f"after layer {taken.exit_layer}" if taken.exit_layer else "at exit 0, a bag of words"
    print(f"\n-> leaves {place} as {one_line(taken.label, 200)}")


def in_words(numbers: dict[str, float]) -> str:
    """N-grams and what each adds, in a line."""
    return ", ".join(f'"{one_line(name, 60)}" {number:+.2f}' for name, number in numbers.items()) or "nothing"


def write_page(path: Path, cascade: Cascade, point: OperatingPoint, record: Namespace, validation: Validation) -> None:
    """Write the page of a run's validation texts, whole or not at all. An old page is replaced.

    Rows without a label are shown only if no row has one.
    """
    is_labelled = validation.texts.labels >= 0
    has_labels = is_labelled.any()
    shown = np.flatnonzero(is_labelled | ~has_labels)
    texts, logits, lowest = validation.texts.take(shown), validation.logits[:, shown], 1 / len(record.labels)
    answers = answers_of(logits, point.rule, texts.labels, texts.keys)
    full = at_full_depth(logits[0], logits[1], point.rule).softmax(-1).amax(-1)
    thresholds = sorted({lowest, point.threshold, *(n / 100 for n in range(101) if n / 100 > lowest)})
    right = answers.scored().labels
    classes = np.stack([answers.early, answers.full])  # (2, N)
    rows = range(min(MOST_ROWS, len(texts)))
    words = (word_scores(cascade, texts, row) for row in progress(rows, desc="exit 0", unit="text"))
    data: dict[str, Any] = {
        "scores": (100 * (answers.decide_at(thresholds) == right).mean(1)).tolist(),
        "speedup_ratios": answers.stay_at(thresholds).mean(1).tolist(),
        "task": record.task,
        "labels": list(map(str, record.labels)),
        "depth": record.depth,
        "model": Path(record.arguments["trunk"] or record.arguments["model"]).name,
        "thresholds": thresholds,
        "point": asdict(point) | {"promise": report.what_is_promised(point), "metric": report.metric_of(point)},
        "metric": "accuracy" if has_labels else "agreement with full depth",
        "sentences": texts.examples.first,
        "predictions": classes.tolist(),
        "confidences": [[float(f"{sure:.9g}") for sure in row] for row in (answers.confidence.tolist(), full.tolist())],
        "words": [list(map(in_words, both)) for both in words],
        "right": right.tolist() if has_labels else None,
    }
    # "<" could begin a tag or a comment that ends the script element. json escapes everything beyond ASCII.
    content = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    with written_beside(path) as partial:
        partial.write_text(TEMPLATE.read_text("utf-8").replace("{{data}}", content), encoding="utf-8")
