"""Predict a file of any size, in bounded memory and in its order, or the lines of standard input as they come.

    python -m minisweet.predict RUN new.csv --out predicted.csv
    python -m minisweet.predict RUN new.jsonl --out predicted.tsv --text-columns subject,body --speed 0.5
    tail -f log | python -m minisweet.predict RUN -

Each row keeps its columns and gets `label`, `confidence`, `exit_layer` and each label's probability, `p_<label>`. Where
the input has such a column, ours is `predicted_<name>`. An empty text is predicted as any other. Of standard input a
line is a text; of a run that was trained on pairs, two texts with a tab between them.
"""

import os
import sys
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from itertools import islice
from operator import itemgetter
from pathlib import Path

from minisweet.adaptive import Exits
from minisweet.base.commands import Parser, Progress, list_of, run_command
from minisweet.base.devices import keep_compiled_products, tune_cpu
from minisweet.base.safe import InputError
from minisweet.data.rows import LONGEST_LINE, TEXT_COLUMNS, RowWriter, cell, columns_as_trained, decoded, read_rows
from minisweet.use.classifier import WINDOW, Answer, add_classifier_options, classifier_of

__all__ = ["main", "run_command"]


def main() -> None:
    """Predict one file."""
    parser = Parser(__doc__)
    option = parser.add_argument
    option("run", type=Path, metavar="RUN", help="run folder")
    option("file", type=Path, metavar="FILE", help=".csv, .tsv or .jsonl, or one of them in .gz; - is standard input")
    option("--out", type=Path, default=Path("-"), help="as FILE; replaced if it exists (default: -, standard output)")
    option("--text-columns", type=list_of(str), help="one or two (default: as in training, or text or sentence or ...)")
    add_classifier_options(parser)
    args = parser.parse_args()
    parser.need(args, args.max_change is not None, "--max-change", "sure")
    keep_compiled_products()
    tune_cpu()
    is_lines, to_screen = str(args.file) == "-", str(args.out) == "-"
    if args.text_columns and is_lines:
        raise InputError(f"--text-columns: {','.join(args.text_columns)}, should be left out: lines have no columns")
    if not to_screen and (args.out.is_dir() or os.path.realpath(args.out) == os.path.realpath(args.file)):
        raise InputError(f"--out: {args.out} is a folder, or the input; name another file")
    writer = RowWriter(args.out)
    classify = classifier_of(args)
    trained = classify.record.columns
    if is_lines:
        columns = TEXT_COLUMNS[2 if len(trained) == 2 else 0]
        chunks, names, total = read_lines_as_they_come(columns), columns, None
    else:
        columns, names, total = columns_as_trained(args.file, args.text_columns, trained), {}, 0
        for line, row in read_rows(args.file):  # a broken row is found before hours of work
            for column in columns:
                cell(args.file, line, row, column)
            if total and writer.delimiter and (extra := [column for column in row if column not in names]):
                raise InputError(f"{args.file}, line {line}: line 1 has no {extra[0]!r:.60}; write such rows to .jsonl")
            names |= row
            total += 1
        rows = (row for _, row in read_rows(args.file))
        chunks = iter(lambda: list(islice(rows, WINDOW)), [])  # lists of rows, until there are none
    left, empty, cut = Counter(), 0, 0
    with writer, Progress(total=total, unit="row", desc="predict", disable=to_screen or None) as progress:
        for chunk in chunks:
            texts = list(map(itemgetter(*columns), chunk))  # of one column texts, of two pairs
            examples = classify.tokenize(texts)
            answers = classify.classify(examples)
            empty += sum(not "".join(text).strip() for text in texts)
            cut += examples.cut
            for row, answer in zip(chunk, answers, strict=True):
                writer.write(row | columns_of(answer, names))
            left.update(answer.exit_layer for answer in answers)
            progress.update(len(chunk))
    if not to_screen:
        where = ", ".join(f"{left[n]:,} after layer {n}" for n in classify.exit_layers)
        costs = Exits(classify.exit_layers, classify.record.depth, classify.record.method).costs(classify.threshold)
        share = sum(left[n] * cost for n, cost in zip(classify.exit_layers, costs, strict=True)) / max(1, left.total())
        noticed = f"; empty: {empty:,}; cut to {classify.tokenizer.truncation['max_length']} tokens: {cut:,}"
        counted = f"{left.total():,} rows at threshold {classify.threshold:.4g}"
        print(f"{args.out}: {counted}; left {where}; {share:.0%} of the layers{noticed}")


def columns_of(answer: Answer, taken: Container[str]) -> dict:
    """An answer as columns, under names that are not `taken`. Nine digits tell every float32 from its neighbours."""
    named, columns = {}, answer._asdict()
    columns |= {f"p_{name}": p for name, p in columns.pop("probabilities").items()}
    for name, value in columns.items():
        while name in taken:
            name = f"predicted_{name}"
        named[name] = float(f"{value:.9g}") if isinstance(value, float) else value
    return named


def read_lines_as_they_come(columns: Sequence[str]) -> Iterator[list[dict]]:
    """Yield the lines of standard input that have arrived, as rows: who writes one line has its answer at once."""
    rest, number = b"", 1
    if sys.stdin is None:
        raise InputError("standard input: it is closed, should be lines of text")
    with open(0, "rb", closefd=False) as file:
        while block := file.read1(2**16):
            *lines, rest = (rest + block).split(b"\n")
            lines += [rest] if len(rest) > LONGEST_LINE else []  # which is refused
            rows = []
            try:
                for line in lines:
                    rows.append(row_of(line, number, columns))
                    number += 1
            finally:  # the lines before a broken one are answered
                yield rows
    if rest:
        yield [row_of(rest, number, columns)]


def row_of(line: bytes, number: int, columns: Sequence[str]) -> dict:
    """A line of standard input, counted from 1, as a row. Raises InputError for no text, or no pair."""
    text = decoded(line, number, "standard input").removesuffix("\r")
    parts = text.split("\t") if len(columns) == 2 else [text]
    if len(parts) != len(columns):
        raise InputError(f"standard input, line {number}: {text!r:.60}, should be two texts with one tab between")
    return dict(zip(columns, parts, strict=True))
