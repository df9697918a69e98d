"""Predict a file of any size, in bounded memory and in its order, or the lines of standard input as they come.

    python -m minisweet.predict RUN new.csv --out predicted.csv
    python -m minisweet.predict RUN new.jsonl --out predicted.tsv --text-columns subject,body --speed 0.5
    tail -f log | python -m minisweet.predict RUN -

Each row keeps its columns and gets `label`, `confidence`, `exit_layer` and each label's probability, `p_<label>`. Where
the input has such a column, ours is `predicted_<name>`. An empty text is predicted as any other. Of standard input a
line is a text; of a run that was trained on pairs, two texts with a tab between them.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from minisweet.data.rows import LONGEST_LINE, TEXT_COLUMNS, RowWriter, cell, decoded, find_columns, read_rows
from minisweet.data.tasks import TASKS
from minisweet.files.commands import Parser, list_of, run_command
from minisweet.files.safe import InputError
from minisweet.training.devices import reuse_freed_memory
from minisweet.use.classifier import WINDOW, Answer, EarlyExitClassifier, add_classifier_options, classifier_of

__all__ = ["main", "run_command"]
CHARACTERS = 2**22  # of the rows that are held at once, about: sooner than `WINDOW` rows of them


def main() -> None:
    """Predict one file."""
    about, examples, *_ = __doc__.split("\n\n")
    parser = Parser(description=about, epilog=f"examples:\n{examples}")
    option = parser.add_argument
    option("run", type=Path, metavar="RUN", help="run folder")
    option("file", type=Path, metavar="FILE", help=".csv, .tsv or .jsonl, or one of them in .gz; - is standard input")
    option("--out", type=Path, default=Path("-"), help="as FILE; replaced if it exists (default: -, standard output)")
    option("--text-columns", type=list_of(str), help="one or two (default: as in training, or text or sentence or ...)")
    add_classifier_options(parser)
    args = parser.parse_args()
    reuse_freed_memory()
    is_lines, to_screen = str(args.file) == "-", str(args.out) == "-"
    if not to_screen and (args.out.is_dir() or (not is_lines and args.out.resolve() == args.file.resolve())):
        raise InputError(f"--out: {args.out} is {'a folder' if args.out.is_dir() else 'the input'}; name another file")
    writer = RowWriter(args.out)
    classify = classifier_of(args)
    task = TASKS.get(classify.record.get("task"))
    trained = classify.record.get("text_columns") or (task.columns[:-1] if task else ())
    if is_lines:
        columns = TEXT_COLUMNS[2 if len(trained) == 2 else 0]
        chunks, names, total = read_lines_as_they_come(columns), set(columns), None
    else:
        usual, names, total = (trained, *TEXT_COLUMNS) if trained else TEXT_COLUMNS, set(), 0
        columns = find_columns("--text-columns", args.file, args.text_columns, usual)
        for line, row in read_rows(args.file):  # a broken row is found before hours of work
            for column in columns:
                cell(args.file, line, row, column)
            names.update(row)
            total += 1
        chunks = in_chunks(row for _, row in read_rows(args.file))
    left = Counter()
    with writer, tqdm(total=total, unit="row", desc="predict", disable=to_screen) as progress:
        for rows, answers in predict_rows(classify, chunks, columns):
            for row, answer in zip(rows, answers, strict=True):
                writer.write(row | {free_name(name, names): value for name, value in columns_of(answer).items()})
            left.update(answer.exit_layer for answer in answers)
            progress.update(len(rows))
    if not to_screen:
        where = ", ".join(f"{left[n]:,} after layer {n}" for n in classify.exit_layers)
        print(f"{args.out}: {left.total():,} rows at threshold {classify.threshold:.4g}; left {where}")


def predict_rows(
    classify: EarlyExitClassifier, chunks: Iterable[list[dict]], columns: Sequence[str]
) -> Iterator[tuple[list[dict], list[Answer]]]:
    """Yield each chunk of rows and its answers; the text, or the pair, stands in `columns`."""
    for rows in chunks:
        texts = [tuple(row[column] for column in columns) for row in rows]
        yield rows, classify(texts if len(columns) == 2 else [text for (text,) in texts])


def columns_of(answer: Answer) -> dict:
    """An answer as columns. Nine digits tell every float32 from its neighbours."""
    numbers = {"confidence": answer.confidence} | {f"p_{name}": p for name, p in answer.probabilities.items()}
    numbers = {name: float(f"{value:.9g}") for name, value in numbers.items()}
    return {"label": answer.label, "confidence": numbers["confidence"], "exit_layer": answer.exit_layer} | numbers


def free_name(name: str, taken: set[str]) -> str:
    """The name of one of our columns beside those that are there."""
    while name in taken:
        name = f"predicted_{name}"
    return name


def in_chunks(rows: Iterable[dict]) -> Iterator[list[dict]]:
    """Rows in lists of `WINDOW`, or fewer where they are long."""
    chunk, size = [], 0
    for row in rows:
        chunk.append(row)
        size += sum(len(value) for value in row.values() if isinstance(value, str))
        if len(chunk) == WINDOW or size > CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def read_lines_as_they_come(columns: Sequence[str]) -> Iterator[list[dict]]:
    """Yield the lines of standard input that have arrived, as rows: who writes one line has its answer at once.

    Raises InputError, with the line, for what is not UTF-8, too long, or no pair where `columns` are two.
    """
    rest, number = b"", 0

    def row(line: bytes) -> dict:
        nonlocal number
        number += 1
        text = decoded(line, number, "standard input").removesuffix("\r")
        parts = text.split("\t", 1) if len(columns) == 2 else [text]
        if len(parts) < len(columns):
            raise InputError(f"standard input, line {number}: {text!r:.60}, should be two texts with a tab between")
        return dict(zip(columns, parts, strict=True))

    with open(0, "rb", closefd=False) as file:
        while block := file.read1(2**16):
            *lines, rest = (rest + block).split(b"\n")
            if len(rest) > LONGEST_LINE:
                raise InputError(f"standard input, line {number + len(lines) + 1}: longer than {LONGEST_LINE} bytes")
            rows = []
            try:
                rows.extend(map(row, lines))
            finally:  # the lines before a broken one are answered
                if rows:
                    yield rows
    if rest:
        yield [row(rest)]
