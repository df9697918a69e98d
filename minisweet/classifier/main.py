"""Commands for own text. Each is a few lines around `EarlyExitClassifier`, and its docstring is its help."""

from argparse import SUPPRESS, Namespace
from collections import Counter
from collections.abc import Callable
from inspect import getdoc
from itertools import islice
from pathlib import Path
from shlex import quote

from minisweet.base.commands import Parser, path_to, progress
from minisweet.base.devices import AMP_HELP
from minisweet.base.files import LOG, InputError
from minisweet.checkpoint import REPOSITORIES
from minisweet.classifier import report
from minisweet.classifier.estimator import EarlyExitClassifier
from minisweet.classifier.explain import print_exits, write_page
from minisweet.classifier.rows import all_columns, cell, joined, read_rows, read_texts, row_writer, text_column
from minisweet.classifier.run import ARGUMENTS, load_cascade, save_choice
from minisweet.classifier.training import BESIDE_TRUNK, DEPLOYMENT, KINDS, check_options
from minisweet.run import check_output
from minisweet.texts import Examples

WINDOW = 1024  # rows that `predict` reads, and sorts by length, at once
OPTIONS = {  # arguments of `EarlyExitClassifier` and its `load`, with their help
    "model": f"{', '.join(REPOSITORIES)}, a folder or a hub id (default: minilm-l6)",
    "trunk": "run or classifier to start from; it is not trained",
    "dev_size": "share of the labelled texts, or groups, that is set aside (default: 0.2)",
    "seed": "random seed of order and dropout (default: 0)",
    "lr": "initial learning rate (default: by the model)",
    "epochs": "passes over the data (default: by its rows)",
    "batch_size": "texts at once (default: 16 in training, and 8 for a large DeBERTa; otherwise 32)",
    "max_length": "tokens; longer texts are cut (default: 256, or a trunk's)",
    "device": "auto, cpu, cuda or cuda:N (default: auto)",
    "amp": f"{AMP_HELP} (default: auto)",
    "max_lost": "lose at most this many of 100 texts (default: 3.0)",
    "sure": "confidence in that, in percent (default: 90.0)",
    "threshold": "exit at this confidence; at 1 all texts run all layers (default: the one that was chosen)",
}


def fit(words: list[str]) -> None:
    """Train a classifier on your own text, choose what to deploy, and say what to expect of it.

        minisweet fit tickets.csv --out runs/tickets
        minisweet fit tickets.csv --text-columns body --label-column team --max-lost 2
        minisweet fit tickets.csv --unlabelled more.csv
        minisweet fit --trunk my-classifier --unlabelled texts.csv        # exit 0 for a classifier, without labels

    Files are .csv, .tsv or .jsonl. Fine-tunes a model and fits exit 0, a bag of words, in front of it. Then chooses a
    threshold, like `minisweet choose`.
    """
    parser = parser_of(fit, *ARGUMENTS, "max_lost", "sure")
    option = parser.add_argument
    option("file", nargs="?", type=Path, metavar="FILE", help="labelled texts: .csv, .tsv or .jsonl")
    option("--unlabelled", type=Path, action="append", default=[], metavar="FILE", help="more texts; repeatable")
    option("--text-columns", help="the column of texts (default: text or sentence)")
    option("--label-column", metavar="NAME", help="(default: label)")
    option("--group-column", metavar="NAME", help="rows of one value, such as a thread, stay together")
    option("--dev-data", type=Path, metavar="FILE", help="validation rows (default: rows of FILE set aside)")
    option("--out", type=Path, help="run folder (default: runs/<the name of FILE>)")
    option("--overwrite", action="store_true", help="replace the run in --out when the new one is trained")
    args = parser.parse_args(words)
    options = typed(args)
    classify = EarlyExitClassifier(**options)
    for name in ("model", "lr", "epochs"):
        if name in options and "trunk" in options:
            raise InputError(BESIDE_TRUNK, name)
    if "dev_size" in options and (args.dev_data or not args.file):
        raise InputError("needs a split of FILE, not --dev-data", "dev_size")
    if args.label_column is not None and not (args.file or args.dev_data):
        raise InputError("needs FILE or --dev-data", "label_column")
    if not args.file and not ("trunk" in options and args.unlabelled):
        raise InputError("FILE: is missing; it may be left out with --trunk FOLDER --unlabelled FILE")
    out = args.out or Path("runs") / (args.file or args.unlabelled[0]).stem
    check_output(out, args.overwrite)
    fit_files(classify, args)
    check_output(out, args.overwrite)  # again, since training takes a while
    classify.save(out, args.overwrite)
    print_choice(out, classify)


def fit_files(classify: EarlyExitClassifier, args: Namespace) -> None:
    """Train on the files that `fit` names."""
    first = args.file or args.unlabelled[0]
    label = "label" if args.label_column is None else args.label_column
    column = text_column(first, args.text_columns)
    if args.file and column == label:
        raise InputError(f"{column}, should not be the label column", "text_columns")

    def read(file: Path | None, label: str | None) -> Examples:
        if file is None:
            return joined()
        return read_texts(file, text_column(file, args.text_columns, column), label, args.group_column)

    rows, given = (read(file, label) for file in (args.file, args.dev_data))
    unlabelled = joined(*(read(file, None) for file in args.unlabelled))
    columns = {"text_column": column, "label_column": label if args.file or args.dev_data else None}
    classify.fit_rows(first.stem, rows, given, unlabelled, **columns, group_column=args.group_column)


def choose(words: list[str]) -> None:
    """Choose the threshold of a run by the loss that you allow, without training.

        minisweet choose runs/tickets                     # at most 3 in 100 texts are lost, 90% sure
        minisweet choose runs/tickets --max-lost 1 --sure 95

    A text is lost if full depth, which runs all layers, is right and early exit is wrong. The promise holds for one
    goal that is fixed in advance, not for the best of several. If the precision has changed, the validation texts
    run again. Writes operating.json and logits.safetensors, which the other commands read.
    """
    args = parser_of(choose, "max_lost", "sure", "device", "amp").parse_args(words)
    goal = {"max_lost": 3.0, "sure": 90.0} | typed(args, "max_lost", "sure")
    # threshold=1.0 avoids a warning about the precision of the old promise, which is about to be replaced.
    classify = EarlyExitClassifier.load(args.run, threshold=1.0, **typed(args, "device", "amp")).choose(**goal)
    save_choice(args.run, classify.operating_point, classify.validation)
    print_choice(args.run, classify)


def test(words: list[str]) -> None:
    """Measure the deployed classifier on labelled texts, and compare with what was stated.

        minisweet test runs/tickets labelled.csv

    Also prints the precision, recall and F1 of each class. A text without a label counts as lost if early exit changes
    full depth's answer.
    """
    parser = parser_of(test, *DEPLOYMENT)
    parser.add_argument("file", type=Path, metavar="FILE", help=".csv, .tsv or .jsonl")
    parser.add_argument("--text-columns", help="(default: as in training, or text or sentence)")
    args = parser.parse_args(words)
    classify = EarlyExitClassifier.load(args.run, **typed(args))
    record, there = classify.record, all_columns(args.file)
    column = text_column(args.file, args.text_columns, record.text_column)
    label = next((name for name in (record.label_column, "label") if name in there), None)
    group = record.group_column if record.group_column in there else None
    if label == "label" and "exit_layer" in there and "predicted_label" not in there:
        raise InputError(f"{args.file}: its column label was written by predict, should hold the true labels")
    if label != (named := record.label_column or "label"):
        others = "the labels are those of column label" if label else "all rows count as unlabelled"
        print(f"{args.file}: no column {named}, so {others}")
    if record.training_groups + record.validation_groups and not group:
        print(f"{args.file}: no column {record.group_column or 'of groups'}, so each row counts by itself")
    answers, told = classify.ask_new(read_texts(args.file, column, label, group), args.file)
    print(f"{args.file}: {told}\n")
    print(*report.comparison(*classify.deployed, answers), sep="\n")


def predict(words: list[str]) -> None:
    """Predict the labels of a file's texts, in order, with bounded memory for any file size.

        minisweet predict RUN new.csv --out predicted.csv
        minisweet predict RUN new.jsonl --out predicted.tsv --text-columns body --threshold 0.9

    Each row keeps its columns and gets `label`, `confidence`, `exit_layer` (0 is before the first layer) and each
    label's probability, `p_<label>`. If the file has a column of that name, the new one is `predicted_<name>`.
    """
    parser = parser_of(predict, *DEPLOYMENT)
    option = parser.add_argument
    option("file", type=Path, metavar="FILE", help=".csv, .tsv or .jsonl")
    option("--out", type=Path, help="as FILE; replaced if it exists (default: standard output, as CSV)")
    option("--text-columns", help="(default: as in training, or text or sentence)")
    args = parser.parse_args(words)
    if args.out and (args.out.is_dir() or args.out.resolve() == args.file.resolve()):
        raise InputError(f"{args.out} is {'a folder' if args.out.is_dir() else 'the input'}; name another file", "out")
    record, cascade, _ = load_cascade(args.run, check_options(**DEPLOYMENT | typed(args)))
    column = text_column(args.file, args.text_columns, record.text_column)
    rows, there = read_rows(args.file), all_columns(args.file)
    added = ["label", "confidence", "exit_layer", *(f"p_{label}" for label in record.labels)]
    while clash := {*added} & {*there}:
        added = [f"predicted_{name}" if name in clash else name for name in added]

    left: Counter[int] = Counter()
    empty = cut = 0
    with row_writer(args.out, there + added) as write, progress(unit="row", desc="predict") as bar:
        while chunk := list(islice(rows, WINDOW)):
            texts = cascade.tokenize([cell(args.file, line, row, column) for line, row in chunk])
            for (_, row), answer in zip(chunk, cascade.answer(texts), strict=True):
                confidence, *each = (round(p, 9) for p in (answer.confidence, *answer.probabilities.values()))
                write(row | dict(zip(added, [answer.label, confidence, answer.exit_layer, *each], strict=True)))
                left[answer.exit_layer] += 1
            empty += sum(not text.strip() for text in texts.examples.first)
            cut += int(texts.is_cut.sum())
            bar.update(len(chunk))
    exits = ", ".join(f"{left[n]:,} at exit {n}" for n in (0, record.depth))
    told = f"{left.total():,} rows at threshold {cascade.threshold:.6g}; {exits}; empty: {empty:,}"
    told += f"; cut to {record.arguments['max_length']} tokens: {cut:,}"
    if args.out:
        print(f"{args.out}: {told}")
    else:
        LOG.info(told)  # on standard error, beside the rows


def explain(words: list[str]) -> None:
    """Show each exit's answer to a text, and where the text exits; or write a page that shows it for validation rows.

    minisweet explain RUN "The film was not superb."
    minisweet explain RUN --html page.html
    """
    parser = parser_of(explain, *DEPLOYMENT)
    parser.add_argument("text", nargs="?", metavar="TEXT", help="a text")
    parser.add_argument("--html", type=path_to(".html"), metavar="FILE", help="write a page of the validation rows")
    args = parser.parse_args(words)
    if (args.text is None) == (args.html is None):
        raise InputError("TEXT: should be a text; or --html FILE and no text")
    if args.text is not None:
        print_exits(load_cascade(args.run, check_options(**DEPLOYMENT | typed(args)))[1], args.text)
        return
    for name in typed(args):
        raise InputError("needs TEXT; the page shows saved answers", name)
    classify = EarlyExitClassifier.load(args.run)
    write_page(args.html, *classify.deployed, classify.record, classify.validation)
    print(f"written to {args.html}")


def export(words: list[str]) -> None:
    """Write a run as one ONNX file with early exit.

    minisweet export RUN --onnx file.onnx --int8
    """
    parser = parser_of(export)
    option = parser.add_argument
    option("--onnx", type=Path, required=True, metavar="FILE.onnx", help="a file that does not exist yet")
    option("--int8", action="store_true", help="eight-bit weights, and a promise of its own")
    args = parser.parse_args(words)
    classify = EarlyExitClassifier.load(args.run, threshold=1.0, device="cpu", amp="off")
    print(*classify.export(args.onnx, int8=args.int8), sep="\n")


def parser_of(command: Callable[[list[str]], None], *names: str) -> Parser:
    """The parser of a command, which shows its docstring, with some of the OPTIONS."""
    parser = Parser(getdoc(command) or "", f"minisweet {command.__name__}")
    if command is not fit:
        parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    for name in names:
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=KINDS.get(name, str), default=SUPPRESS, help=OPTIONS[name])
    return parser


def typed(args: Namespace, *names: str) -> dict:
    """The OPTIONS that were typed, or some of them."""
    return {name: value for name, value in vars(args).items() if name in (names or OPTIONS)}


def print_choice(folder: Path, classify: EarlyExitClassifier) -> None:
    """Print what was chosen for the run in a folder, and what to do next."""
    print(f"\n{folder}:\n{classify.summary()}")
    print(f"next: minisweet predict {quote(str(folder))} FILE.csv --out predicted.csv")
