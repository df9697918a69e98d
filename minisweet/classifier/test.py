"""Try what is deployed on a file of labelled texts: what comes out, beside what was stated.

    minisweet test runs/tickets labelled.csv

Then each class's precision, recall and F1, and the milliseconds of a text. Of a text without a label it counts as lost
that early exit changes full depth's answer.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from minisweet.adaptive import in_float32
from minisweet.base.commands import Parser
from minisweet.base.files import InputError, one_line, preview
from minisweet.classifier.rows import Rows, all_columns, read_texts, text_columns
from minisweet.texts import Texts, one_of_each
from minisweet.classifier import promise as operating
from minisweet.metrics import METRICS
from minisweet.outputs import Outputs, ask_all
from minisweet.classifier.operating_point import texts_needed
from minisweet.classifier.estimator import Deployed, add_classifier_options, classifier_of, classify_tokens, tokenize

CLASSES, TIMED = 20, 64  # classes that are told, at most; texts that are timed


def main() -> None:
    """Test one run."""
    parser = Parser(__doc__)
    add_classifier_options(parser)
    parser.add_argument("file", type=Path, metavar="FILE", help=".csv, .tsv or .jsonl")
    args = parser.parse_args()
    its = classifier_of(args).deployed
    print_test(its, outputs_of(its, read_rows_of(its, args.file), args.file, print), max(its.run.examples.labels) >= 0)
    print_milliseconds(its)


def read_rows_of(its: Deployed, file: Path) -> Rows:
    """The rows of a file, by the columns that the run was trained on."""
    record = its.run.record
    columns, found = text_columns(file, None, record.columns, option=""), all_columns(file)
    column = next((name for name in (record.label_column, "label") if name in found), None)
    if column == "label" and "exit_layer" in found:
        raise InputError(f"{file}: its label is what predict answered, should be what is right")
    group = record.group_column if record.group_column in found else None
    return read_texts(file, columns, column, group)


def outputs_of(its: Deployed, rows: Rows, source: object, tell: Callable[[str], None]) -> Outputs:
    """What the exits that are asked say of rows, but of those that were trained on or set the threshold.

    What is left out is told. Raises InputError, which names their source, where no row is left.
    """
    record = its.run.record
    numbers = {name: number for number, name in enumerate(record.labels)} | {None: -1}
    if unknown := [name for name in rows.names if name not in numbers]:
        others = preview(sorted(set(unknown)))
        tell(f"rows with another label than the model's, left out: {len(unknown):,} ({others})")
    kept = [row for row, name in enumerate(rows.names) if name in numbers]
    labels = [numbers[rows.names[row]] for row in kept]
    if not kept:
        raise InputError(f"{source}: no row has a label of the model's: {preview(record.labels)}")
    texts = Texts(its.run.tokenizer, rows.examples.take(kept)._replace(labels=labels))
    learnt, aside = record.trained_keys, its.run.texts.keys
    for keys, what in ((learnt, "were trained on"), (aside, "are validation rows, which set the threshold")):
        if count := int(np.isin(texts.keys, keys).sum()):
            tell(f"{count:,} of these rows {what}, and do not count")
    texts = texts.take(np.flatnonzero(~np.isin(texts.keys, np.concatenate([learnt, aside]))))
    texts = texts.take(np.flatnonzero(one_of_each(texts.units, texts.keys)))  # of a group one text
    if not len(texts):
        raise InputError(f"{source}: no row is left to test on; name other rows")
    return ask_all(its.model, texts, its.precision, record.metric).by(its.rule)


def found_on(its: Deployed, outputs: Outputs) -> dict:
    """What comes out of what exits say of rows, under the names of an OperatingPoint."""
    return operating.stated(range(len(its.point.exits)), its.threshold, outputs.filled(), outputs.scored())


def print_test(its: Deployed, outputs: Outputs, stated_right: bool) -> None:
    """Print what comes out, what was stated (a score of labels if `stated_right`), and if the promise held here."""
    point, has_labels, found = its.point, bool((outputs.labels >= 0).any()), found_on(its, outputs)
    metric = outputs.metric if has_labels else "agreement"
    print(f"\n{len(outputs.labels):,} rows, threshold {its.threshold:.6g}")
    print(f"{'':<26}{'here':>8}   95% interval{'stated':>15}")
    titles = {"score": METRICS[metric], "full_depth": "full depth"} if has_labels else {}
    for key, title in (titles | {"lost": "lost, of 100 texts", "share": "share of the layers"}).items():
        ends = found[f"{key}_interval"]
        interval = "{:6.2f} to {:6.2f}".format(*ends) if ends else " " * 16
        is_stated = key in ("lost", "share") or stated_right
        print(f"{title:<26}{found[key]:8.2f}   {interval}" + f"{getattr(point, key):12.2f}" * is_stated)
    if (promised := point.goal.get("max_lost")) and its.threshold == in_float32(point.threshold) < 1:
        what, needed = f"at most {promised:g} of 100 lost, {point.goal['sure']:g}% sure", texts_needed(point.goal)[0]
        held = (
            "held here" if found["lost"] <= promised else "not held here: by chance, or these texts are drawn otherwise"
        )
        few = f"too few texts to tell whether it holds; some {needed:,} would do where none is lost"
        print(f"promised: {what}; {held if found['judging_texts'] >= needed else few}")
    if has_labels and len(its.labels) <= CLASSES:
        print(f"\n{'class':<25}{'precision':>10}{'recall':>8}{'F1':>8}{'rows':>8}")
        for name, *scores, rows in zip(its.labels, *found["per_class"].values(), strict=True):
            print(f"{one_line(name, 24):<25}" + "{:10.1f}{:8.1f}{:8.1f}{:8,}".format(*scores, rows))


def print_milliseconds(its: Deployed) -> None:
    """Print what a text takes, from text to label, as deployed and at full depth: one by one and in batches."""
    texts = its.run.examples.texts()[:TIMED]
    print(f"\n{f'milliseconds, {len(texts)} texts':<26}one by one  in batches")
    for title, at in (("as deployed", its), ("with all layers", its._replace(threshold=1.0))):
        taken = []
        for batches in ([[text] for text in texts], [texts]):
            for _ in range(2):  # the first time is slower, and not kept
                started = time.perf_counter()
                for batch in batches:
                    classify_tokens(at, tokenize(at, batch))
            taken.append(1000 * (time.perf_counter() - started) / len(texts))
        print(f"{title:<26}{taken[0]:10.2f}{taken[1]:12.2f}")
