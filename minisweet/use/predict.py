"""Predict a file of any size, in bounded memory and in its order.

    python -m minisweet predict RUN new.csv --out predicted.csv
    python -m minisweet predict RUN new.jsonl --out predicted.tsv --text-columns subject,body --speed 0.5

Each row keeps its columns and gets `label`, `confidence` (`agreement`, with full depth, of a run that was made without
labels), `exit_layer` (0 is before the first layer) and each label's probability, `p_<label>`. Where the row has such a
column, ours is `predicted_<name>`.
"""

from collections import Counter
from collections.abc import Container
from itertools import islice
from pathlib import Path

from minisweet.base.commands import Parser, Progress, list_of
from minisweet.base.devices import tune_cpu
from minisweet.base.files import InputError
from minisweet.data.rows import cell, read_rows, row_writer, text_columns
from minisweet.use.classifier import Answer, add_classifier_options, classifier_of

WINDOW = 1024  # rows that are read, and sorted by length, at once


def main() -> None:
    """Predict one file."""
    parser = Parser(__doc__)
    option = parser.add_argument
    option("run", type=Path, metavar="RUN", help="run folder")
    option("file", type=Path, metavar="FILE", help=".csv, .tsv or .jsonl")
    option("--out", type=Path, help="as FILE; replaced if it exists (default: standard output, as CSV)")
    option("--text-columns", type=list_of(str), help="one or two (default: as in training, or text or sentence or ...)")
    add_classifier_options(parser)
    args = parser.parse_args()
    if args.out and args.out.resolve() == args.file.resolve():
        raise InputError(f"--out: {args.out} is the input; name another file")
    tune_cpu()
    classify, left, cut = classifier_of(args), Counter(), 0
    columns, rows = text_columns(args.file, args.text_columns, classify.record.columns), read_rows(args.file)
    with row_writer(args.out) as write, Progress(unit="row", desc="predict") as progress:
        while chunk := list(islice(rows, WINDOW)):
            texts = [[cell(args.file, line, row, column) for column in columns] for line, row in chunk]
            examples = classify.tokenize(texts)
            answers = classify.classify(examples)
            for (line, row), answer in zip(chunk, answers, strict=True):
                try:
                    write(row | columns_of(answer, row, classify.certainty_name))
                except ValueError as error:  # a row of JSON lines has a column that the first has not
                    raise InputError(f"{args.file}, line {line}: {error}; write such rows to .jsonl") from None
            left.update(answer.exit_layer for answer in answers)
            cut += examples.cut
            progress.update(len(chunk))
    if args.out:
        where = ", ".join(f"{left[n]:,} after layer {n}" for n in classify.exit_layers)
        print(f"{args.out}: {left.total():,} rows at threshold {classify.threshold:.4g}; left {where}", end="; ")
        print(f"cut to {classify.record.max_length} tokens: {cut:,}")


def columns_of(answer: Answer, taken: Container[str], certainty_name: str) -> dict:
    """An answer as columns. Where such a name is `taken`, ours is another."""
    numbers = {certainty_name: answer.confidence, "exit_layer": answer.exit_layer}
    numbers |= {f"p_{name}": p for name, p in answer.probabilities.items()}
    columns = {}
    for name, value in ({"label": answer.label} | {name: round(number, 9) for name, number in numbers.items()}).items():
        while name in taken:
            name = f"predicted_{name}"
        columns[name] = value
    return columns
