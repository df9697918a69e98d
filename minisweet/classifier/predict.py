"""Predict a file of any size, in order and with bounded memory.

    minisweet predict RUN new.csv --out predicted.csv
    minisweet predict RUN new.jsonl --out predicted.tsv --text-columns body --threshold 0.9

Each row keeps its columns and gets `label`, `confidence`, `exit_layer` (0 is before the first layer) and each label's
probability, `p_<label>`. If the file has a column of that name, the new one is `predicted_<name>`.
"""

from collections import Counter
from itertools import islice
from pathlib import Path

from minisweet.base.commands import Parser, list_of, name_of, progress
from minisweet.base.files import InputError
from minisweet.classifier.deployed import add_options, classify, deployed_of, tokenize
from minisweet.classifier.rows import all_columns, cell, read_rows, row_writer, text_column

WINDOW = 1024  # rows that are read, and sorted by length, at once


def main(words: list[str]) -> None:
    """Predict one file."""
    parser = Parser(__doc__, "minisweet predict")
    option = parser.add_argument
    add_options(parser)
    option("file", type=Path, metavar="FILE", help=".csv, .tsv or .jsonl")
    option("--out", type=Path, help="as FILE; replaced if it exists (default: standard output, as CSV)")
    names = list_of(name_of)
    option("--text-columns", type=names, help="(default: as in training, or text or sentence)")
    args = parser.parse_args(words)
    if args.out and args.out.resolve() == args.file.resolve():
        raise InputError(f"--out: {args.out} is the input; name another file")
    deployed = deployed_of(args)
    record = deployed.run.record
    column = text_column(args.file, args.text_columns, record.text_columns)
    rows = read_rows(args.file)
    there = all_columns(args.file)
    added = ["label", "confidence", "exit_layer", *(f"p_{name}" for name in deployed.labels)]
    while clash := {*added} & {*there}:
        added = [f"predicted_{name}" if name in clash else name for name in added]

    left = Counter()
    empty, cut = 0, 0
    with row_writer(args.out, there + added) as write, progress(unit="row", desc="predict") as bar:
        while chunk := list(islice(rows, WINDOW)):
            texts = [cell(args.file, line, row, column) for line, row in chunk]
            tokens = tokenize(deployed, texts)
            for (_, row), answer in zip(chunk, classify(deployed, tokens), strict=True):
                numbers = [round(p, 9) for p in (answer.confidence, *answer.probabilities.values())]
                cells = [answer.label, numbers[0], answer.exit_layer, *numbers[1:]]
                write(row | dict(zip(added, cells, strict=True)))
                left[answer.exit_layer] += 1
            empty += sum(not text.strip() for text in texts)
            cut += int(tokens.is_cut.sum())
            bar.update(len(chunk))
    if args.out:
        exits = ", ".join(f"{left[n]:,} at exit {n}" for n in (0, record.depth))
        print(f"{args.out}: {left.total():,} rows at threshold {deployed.threshold:.6g}; {exits}", end="; ")
        print(f"empty: {empty:,}; cut to {record.arguments.max_length} tokens: {cut:,}")
