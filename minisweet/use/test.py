"""Try what is deployed on a file of labelled texts: what comes out, beside what was stated.

    minisweet test runs/tickets labelled.csv

Then each class's precision, recall and F1, and the milliseconds of a text. Without a column of labels it counts the
answers that early exit changes.
"""

import time
from pathlib import Path

import numpy as np

from minisweet.adaptive import in_float32
from minisweet.base.commands import Parser
from minisweet.base.files import InputError, one_line, preview
from minisweet.data.rows import all_columns, read_texts, text_columns
from minisweet.data.text import Examples
from minisweet.evaluation import operating
from minisweet.evaluation.metrics import METRICS
from minisweet.evaluation.outputs import Outputs, run_exits
from minisweet.runs.load import read_validation
from minisweet.use.classifier import EarlyExitClassifier, add_classifier_options, classifier_of

CLASSES, TIMED = 20, 64  # classes that are told, at most; texts that are timed


def main() -> None:
    """Test one run."""
    parser = Parser(__doc__)
    add_classifier_options(parser)
    parser.add_argument("file", type=Path, metavar="FILE", help=".csv, .tsv or .jsonl")
    args = parser.parse_args()
    classify = classifier_of(args)
    rows = read_validation(args.run, classify.record)
    print_test(classify, read_outputs(classify, args.run, args.file, rows), max(rows.labels) >= 0)
    print_milliseconds(classify, rows.texts()[:TIMED])


def read_outputs(classify: EarlyExitClassifier, run: Path, file: Path, validation: Examples) -> Outputs:
    """What the exits that are asked say of a file's rows, but those that were trained on or set the threshold."""
    record = classify.record
    columns, found = text_columns(file, None, record.columns, option=""), all_columns(file)
    column = next((name for name in (record.label_column, "label") if name in found), None)
    if column == "label" and "exit_layer" in found:
        raise InputError(f"{file}: its label is what predict answered, should be what is right")
    text = read_texts(file, columns, column)
    numbers = {name: number for number, name in enumerate(record.labels)} | {None: -1}
    if unknown := [name for name in text.names if name not in numbers]:
        print(f"rows with another label than the model's, left out: {len(unknown):,} ({preview(sorted(set(unknown)))})")
    kept = [row for row, name in enumerate(text.names) if name in numbers]
    labels = [numbers[text.names[row]] for row in kept]
    if not kept:
        raise InputError(f"{file}: no row has a label of the model's: {preview(record.labels)}")
    rows = text.rows.take(kept)._replace(labels=labels)
    outputs = run_exits(run, record, classify.model_, rows, classify.precision_)
    learnt, aside = record.trained_keys, classify.tokenize(validation.texts()).keys()
    for keys, what in ((learnt, "were trained on"), (aside, "are validation rows, which set the threshold")):
        if count := int(np.isin(outputs.keys, keys).sum()):
            print(f"{count:,} of these rows {what}, and do not count")
    outputs = outputs.take(np.flatnonzero(~np.isin(outputs.keys, np.concatenate([learnt, aside]))))
    if not len(outputs.labels):
        raise InputError(f"{file}: no row is left to test on; name other rows")
    return outputs


def print_test(classify: EarlyExitClassifier, outputs: Outputs, stated_right: bool) -> None:
    """Print what comes out, what was stated (a score of labels if `stated_right`), and if the promise held here."""
    point, has_labels = classify.operating_point, bool((outputs.labels >= 0).any())
    scored, means = (outputs.labelled(), point.lost_means) if has_labels else (outputs.against_full_depth(), "changed")
    judges = scored if means == "lost" else outputs.against_full_depth()
    exits = range(len(point.exits))
    found = operating.stated(classify.rule, exits, classify.threshold, judges, scored)
    print(f"\n{len(outputs.labels):,} rows, threshold {classify.threshold:.6g}")
    print(f"{'':<26}{'here':>8}   95% interval{'stated':>15}")
    titles = {"score": METRICS[scored.metric], "full_depth": "full depth"} if has_labels else {}
    for key, title in (titles | {"lost": f"{means}, of 100 texts", "share": "share of the layers"}).items():
        ends = found[f"{key}_interval"]
        interval = "{:6.2f} to {:6.2f}".format(*ends) if ends else " " * 16
        is_stated = key == "share" or (means == point.lost_means if key == "lost" else stated_right)
        print(f"{title:<26}{found[key]:8.2f}   {interval}" + f"{getattr(point, key):12.2f}" * is_stated)
    is_chosen = classify.threshold == in_float32(point.threshold) < 1
    if (promised := point.goal.get("max_lost")) and means == point.lost_means and is_chosen:
        what = f"at most {promised:g} of 100 {means}, {point.goal['sure']:g}% sure"
        by_chance = ": by chance, or these texts are drawn otherwise than those that judged"
        print(f"promised: {what}; " + ("held here" if found["lost"] <= promised else f"not held here{by_chance}"))
    if has_labels and len(classify.labels) <= CLASSES:
        print(f"\n{'class':<25}{'precision':>10}{'recall':>8}{'F1':>8}{'rows':>8}")
        for name, *scores, rows in zip(classify.labels, *found["per_class"].values(), strict=True):
            print(f"{one_line(name, 24):<25}" + "{:10.1f}{:8.1f}{:8.1f}{:8,}".format(*scores, rows))


def print_milliseconds(classify: EarlyExitClassifier, texts: list) -> None:
    """Print what a text takes, from text to label, as deployed and at full depth: one by one and in batches."""
    print(f"\n{f'milliseconds, {len(texts)} texts':<26}one by one  in batches")
    deployed = classify.threshold
    for title, classify.threshold in (("as deployed", deployed), ("with all layers", 1.0)):
        taken = []
        for batches in ([[text] for text in texts], [texts]):
            for _ in range(2):  # the first time is slower, and not kept
                started = time.perf_counter()
                list(map(classify.classify, batches))
            taken.append(1000 * (time.perf_counter() - started) / len(texts))
        print(f"{title:<26}{taken[0]:10.2f}{taken[1]:12.2f}")
    classify.threshold = deployed
