"""Measure the deployed classifier on labelled texts, and compare with what was stated.

    minisweet test runs/tickets labelled.csv

Also prints the precision, recall and F1 of each class. A text without a label counts as
lost if early exit changes full depth's answer.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from minisweet.adaptive import in_float32
from minisweet.base.commands import Parser
from minisweet.base.files import InputError, one_line, preview
from minisweet.classifier import deployed as runs
from minisweet.classifier.deployed import Deployed, fitted_of
from minisweet.classifier.operating_point import measure
from minisweet.classifier.promise import METRIC_NAMES, texts_needed
from minisweet.classifier.rows import all_columns, read_texts, text_column
from minisweet.classifier.split import one_of_each, units_of
from minisweet.outputs import Outputs
from minisweet.texts import Examples, Texts

MOST_CLASSES = 20  # with more, classes are not listed


def main(words: list[str]) -> None:
    """Test one run."""
    parser = Parser(__doc__, "minisweet test")
    runs.add_options(parser)
    parser.add_argument("file", type=Path, metavar="FILE", help=".csv, .tsv or .jsonl")
    args = parser.parse_args(words)
    deployed = runs.deployed_of(args, "texts")
    fitted = fitted_of(deployed.run.record)
    there = all_columns(args.file)
    column = text_column(args.file, None, deployed.run.record.text_columns, option="")
    label = next((name for name in (fitted.label_column, "label") if name in there), None)
    if label == "label" and "exit_layer" in there and "predicted_label" not in there:
        raise InputError(f"{args.file}: its column label was written by predict, should hold the true labels")
    group = fitted.group_column if fitted.group_column in there else None
    if not label:
        print(f"{args.file}: no column {fitted.label_column or 'label'}, so all rows count as unlabelled")
    if fitted.group_column and not group:
        print(f"{args.file}: no column {fitted.group_column}, so each row counts by itself")
    print_test(deployed, new_outputs(deployed, read_texts(args.file, column, label, group), args.file, print))


def new_outputs(deployed: Deployed, rows: Examples, source: object, report: Callable[[str], None]) -> Outputs:
    """Run the deployed exits on rows, with calibrated logits.

    Rows and groups of the training and validation rows, and rows with unknown labels, are left out, and `report` is
    called with a line for each kind. Raises InputError, with the `source` of the rows, if no row is left.
    """
    record = deployed.run.record
    fitted = fitted_of(record)
    numbers = {name: number for number, name in enumerate(record.labels)} | {None: -1}
    kept = [row for row, name in enumerate(rows.names) if name in numbers]
    if unknown := [name for name in rows.names if name not in numbers]:
        labels = preview(sorted(set(unknown)))
        report(f"rows whose label the model does not know, left out: {len(unknown):,} ({labels})")
    if not kept:
        raise InputError(f"{source}: no row has a label of the model's: {preview(record.labels)}")
    rows = rows.take(kept)
    texts = Texts(deployed.run.tokenizer, rows._replace(labels=[numbers[name] for name in rows.names]))
    texts.units = units_of(texts)
    is_new = np.ones(len(texts), dtype=bool)
    for is_known, role in (
        (np.isin(texts.keys, record.trained_keys), "were trained on"),
        (np.isin(texts.keys, deployed.run.texts.keys), "are validation rows, which set the threshold"),
        (runs.in_groups(rows, fitted.trained_groups), "belong to groups that were trained on"),
        (runs.in_groups(rows, fitted.validated_groups), "belong to groups of validation rows"),
    ):
        if count := int((is_known & is_new).sum()):
            report(f"{count:,} of these rows {role}, and do not count")
        is_new &= ~is_known
    texts = texts.take(np.flatnonzero(is_new))
    texts = texts.take(np.flatnonzero(one_of_each(texts.units, texts.keys)))  # one text of each group
    if not len(texts):
        raise InputError(f"{source}: no row is left to test on; name other rows")
    outputs = runs.ask_exits(deployed.run.model, deployed.run.bag, texts, deployed.precision)
    return outputs.by(deployed.run.point.rule)


def print_test(deployed: Deployed, outputs: Outputs) -> None:
    """Print the measured values next to those stated, and whether the promise held."""
    point = deployed.run.point
    measured = measure(deployed.threshold, outputs)
    has_labels, was_labelled = ((part.labels >= 0).any() for part in (outputs, deployed.run.texts))
    print(f"\n{len(outputs.labels):,} rows, threshold {deployed.threshold:.6g}")
    print(f"{'':<26}{'here':>8}   95% interval{'stated':>15}")
    titles = {"score": METRIC_NAMES[outputs.metric], "full_depth": "full depth"} if has_labels else {}
    for key, title in (titles | {"lost": "lost, of 100 texts", "share": "share of the layers"}).items():
        ends = measured[f"{key}_interval"]
        interval = "{:6.2f} to {:6.2f}".format(*ends) if ends else " " * 16
        before = f"{getattr(point, key):12.2f}" if key in ("lost", "share") or was_labelled else ""
        print(f"{title:<26}{measured[key]:8.2f}   {interval}{before}")
    if deployed.threshold == in_float32(point.threshold) < 1:
        verdict = "held here"
        needed = texts_needed(point.goal)[0]
        if measured["judging_texts"] < needed:
            verdict = f"too few texts to tell whether it holds; about {needed:,} suffice if none is lost"
        elif measured["lost"] > point.goal.max_lost:
            missing = "because labels are missing, " if (outputs.labels < 0).any() else ""
            verdict = f"not held here: by chance, {missing}or these texts come from another source"
        print(f"promised: at most {point.goal.max_lost:g} of 100 lost, {point.goal.sure:g}% sure; {verdict}")
    if has_labels and len(deployed.labels) <= MOST_CLASSES:
        print(f"\n{'class':<25}{'precision':>10}{'recall':>8}{'F1':>8}{'rows':>8}")
        for name, *scores, rows in zip(deployed.labels, *measured["per_class"].values(), strict=True):
            print(f"{one_line(name, 24):<25}" + "{:10.1f}{:8.1f}{:8.1f}{:8,}".format(*scores, rows))
