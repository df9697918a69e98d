"""Predict a file of any size, in bounded memory and in its order.

    minisweet predict RUN new.csv --out predicted.csv
    minisweet predict RUN new.jsonl --out predicted.tsv --text-columns subject,body --threshold 0.9

Each row keeps its columns and gets `label`, `confidence`, `exit_layer` (0 is before the first layer) and each label's
probability, `p_<label>`. Where the file has such a column, ours is `predicted_<name>`, in all rows.
"""

from collections import Counter
from itertools import islice
from pathlib import Path

from minisweet.base.commands import Parser, list_of, name_of, progress
from minisweet.base.files import InputError
from minisweet.classifier.rows import all_columns, cell, read_rows, row_writer, text_columns
from minisweet.classifier.estimator import add_classifier_options, classifier_of, classify_tokens, tokenize

WINDOW = 1024  # rows that are read, and sorted by length, at once


def main() -> None:
    """Predict one file."""
    parser = Parser(__doc__)
    option = parser.add_argument
    add_classifier_options(parser)
    option("file", type=Path, metavar="FILE", help=".csv, .tsv or .jsonl")
    option("--out", type=Path, help="as FILE; replaced if it exists (default: standard output, as CSV)")
    option(
        "--text-columns", type=list_of(name_of), help="one or two (default: as in training, or text or sentence or ...)"
    )
    args = parser.parse_args()
    if args.out and args.out.resolve() == args.file.resolve():
        raise InputError(f"--out: {args.out} is the input; name another file")
    its, left, empty, cut = classifier_of(args).deployed, Counter(), 0, 0
    record = its.run.record
    columns, rows = text_columns(args.file, args.text_columns, record.columns), read_rows(args.file)
    theirs = all_columns(args.file)
    ours = ["label", "confidence", "exit_layer", *(f"p_{name}" for name in its.labels)]
    while clash := {*ours} & {*theirs}:
        ours = [f"predicted_{name}" if name in clash else name for name in ours]
    with row_writer(args.out, theirs + ours) as write, progress(unit="row", desc="predict") as bar:
        while chunk := list(islice(rows, WINDOW)):
            texts = [[cell(args.file, line, row, column) for column in columns] for line, row in chunk]
            tokens = tokenize(its, texts)
            for (_, row), answer in zip(chunk, classify_tokens(its, tokens), strict=True):
                numbers = [round(number, 9) for number in (answer.confidence, *answer.probabilities.values())]
                values = [answer.label, numbers[0], answer.exit_layer, *numbers[1:]]
                write(row | dict(zip(ours, values, strict=True)))
                left[answer.exit_layer] += 1
            empty, cut = empty + sum(not "".join(text).strip() for text in texts), cut + int(tokens.is_cut.sum())
            bar.update(len(chunk))
    if args.out:
        where = ", ".join(f"{left[n]:,} after layer {n}" for n in its.model.exit_layers)
        print(f"{args.out}: {left.total():,} rows at threshold {its.threshold:.6g}; left {where}", end="; ")
        print(f"empty: {empty:,}; cut to {record.arguments.max_length} tokens: {cut:,}")
