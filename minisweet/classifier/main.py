"""Commands for own text. Each is a few lines around `EarlyExitClassifier`, and its docstring is its help."""

from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from inspect import getdoc
from itertools import islice
from pathlib import Path
from shlex import quote

from minisweet.base.commands import progress
from minisweet.base.files import InputError, one_line
from minisweet.classifier.cascade import Answers
from minisweet.classifier.estimator import TEXTS_AT_ONCE, THRESHOLD, EarlyExitClassifier
from minisweet.classifier.explain import print_exits, write_page
from minisweet.classifier.fit import FitOptions, Given
from minisweet.classifier.folder import save_choice, save_state
from minisweet.classifier.operating_point import measure
from minisweet.classifier.options import Parser, TrainingOptions, name_of, path_to
from minisweet.classifier.promise import Goal, texts_needed
from minisweet.classifier.rows import all_columns, cell, joined, read_rows, read_texts, row_writer, text_column
from minisweet.classifier.run import check_output
from minisweet.classifier.state import State
from minisweet.texts import Examples

WINDOW = 1024  # rows that `predict` reads, and sorts by length, at once


def fit(words: list[str]) -> None:
    """Train a classifier on your own text, choose what to deploy, and say what to expect of it.

        minisweet fit tickets.csv --out runs/tickets
        minisweet fit tickets.csv --text-columns body --label-column team --max-lost 2
        minisweet fit tickets.csv --unlabelled more.csv
        minisweet fit --trunk my-classifier --unlabelled texts.csv        # exit 0 for a classifier, without labels

    Files are .csv, .tsv or .jsonl. A model is fine-tuned, and exit 0, a bag of words, stands in front of it. Then `fit`
    does what `minisweet choose` does.
    """
    parser = parser_of(fit)
    option = parser.add_argument
    option("file", nargs="?", type=Path, metavar="FILE", help="labelled texts: .csv, .tsv or .jsonl")
    option("--unlabelled", type=Path, action="append", default=[], metavar="FILE", help="more texts; repeatable")
    option("--text-columns", type=name_of, help="the column of texts (default: text or sentence)")
    option("--label-column", type=name_of, metavar="NAME", help="(default: label)")
    option("--group-column", type=name_of, metavar="NAME", help="rows of one value, such as a thread, stay together")
    option("--dev-data", type=Path, metavar="FILE", help="validation rows (default: rows of FILE set aside)")
    option("--out", type=Path, help="run folder (default: runs/<the name of FILE>)")
    option("--overwrite", action="store_true", help="replace the run in --out when the new one is trained")
    parser.add_options(FitOptions, title="training")
    parser.add_options(Goal)
    args = parser.parse_args(words)
    options, goal = parser.make(FitOptions, args), parser.make(Goal, args)
    parser.need(args, args.file and not args.dev_data, "a split of FILE, not --dev-data", "dev_size")
    parser.need(args, args.file or args.dev_data, "FILE or --dev-data", "label_column")
    if not args.file and not (args.trunk and args.unlabelled):
        raise InputError("FILE: is missing; it may be left out with --trunk FOLDER --unlabelled FILE")
    name = (args.file or args.unlabelled[0]).stem
    out = args.out or Path("runs") / name
    check_output(out, args.overwrite)
    classify = EarlyExitClassifier(**vars(options), **vars(goal))
    classify.train_on(read_files(args, name))
    check_output(out, args.overwrite)  # again, since training takes a while
    save_state(out, classify.state, args.overwrite)
    print_choice(out, classify)


def read_files(args: Namespace, name: str) -> Given:
    """Read the files that `fit` names: the rows, those to validate on, and the unlabelled ones."""
    first = args.file or args.unlabelled[0]
    label = args.label_column or "label"
    column = text_column(first, args.text_columns)
    if args.file and label == column:
        raise InputError(f"{column}, should not be the label column", "text_columns")

    def read(file: Path, label: str | None) -> Examples:
        own = column if file is first else text_column(file, args.text_columns, [column])
        return read_texts(file, own, label, args.group_column)

    rows = read(first, label) if args.file else Examples([], None, None, names=[])
    validation = read(args.dev_data, label) if args.dev_data else None
    unlabelled = joined(*(read(file, None) for file in args.unlabelled)) if args.unlabelled else None
    label = label if args.file or validation else None
    return Given(name, rows, validation, unlabelled, "str", column, label, args.group_column)


def choose(words: list[str]) -> None:
    """Choose the threshold of a run by the loss that you allow, without training.

        minisweet choose runs/tickets                     # at most 3 in 100 texts are lost, 90% sure
        minisweet choose runs/tickets --max-lost 1 --sure 95

    A text is lost if full depth, which runs all layers, is right and early exit is wrong. The promise holds for one
    goal that is fixed in advance, not for the best of several. In another precision than before, the validation texts
    run again. Writes operating.json and logits.safetensors, which the other commands read.
    """
    parser = parser_of(choose)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_options(Goal)
    parser.add_options(TrainingOptions, "device", "amp")
    args = parser.parse_args(words)
    goal = parser.make(Goal, args)
    # At threshold 1 nothing is promised yet, so that no warning speaks of the precision of an old promise.
    classify = EarlyExitClassifier.load(args.run, threshold=1.0, device=args.device, amp=args.amp)
    classify.choose(goal.max_lost, goal.sure)
    save_choice(args.run, classify.state)
    print_choice(args.run, classify)


def test(words: list[str]) -> None:
    """Measure the deployed classifier on labelled texts, and compare with what was stated.

        minisweet test runs/tickets labelled.csv

    Also prints the precision, recall and F1 of each class. A text without a label counts as lost if early exit changes
    full depth's answer.
    """
    parser = parser_of(test)
    add_options(parser)
    parser.add_argument("file", type=Path, metavar="FILE", help=".csv, .tsv or .jsonl")
    parser.add_argument("--text-columns", type=name_of, help="(default: as in training, or text or sentence)")
    args = parser.parse_args(words)
    state = load(args)
    about, there = state.trained.about, all_columns(args.file)
    column = text_column(args.file, args.text_columns, state.trained.record.text_columns)
    label = next((name for name in (about.label_column, "label") if name in there), None)
    if label == "label" and "exit_layer" in there and "predicted_label" not in there:
        raise InputError(f"{args.file}: its column label was written by predict, should hold the true labels")
    group = about.group_column if about.group_column in there else None
    if label != (named := about.label_column or "label"):
        others = "the labels are those of column label" if label else "all rows count as unlabelled"
        print(f"{args.file}: no column {named}, so {others}")
    if about.training_groups + about.validation_groups and not group:
        print(f"{args.file}: no column {about.group_column or 'of groups'}, so each row counts by itself")
    texts, told = state.new_texts(read_texts(args.file, column, label, group), args.file)
    print(f"{args.file}: {told}")
    print_test(state, state.ask(texts))


def print_test(state: State, answers: Answers) -> None:
    """Print the measured values next to those stated, and whether the promise held."""
    point, measured = state.point, measure(state.threshold, answers)
    has_labels, was_labelled = answers.is_labelled.any(), state.metric == "accuracy"
    is_stated = state.threshold == point.threshold
    print(f"\n{len(answers.labels):,} rows, threshold {state.threshold:.6g}")
    print(f"{'':<26}{'here':>8}   95% interval{'stated':>15}")
    titles = {"score": "accuracy", "full_depth": "full depth", "macro_f1": "macro F1"} if has_labels else {}
    for key, title in (titles | {"lost": "lost, of 100 texts", "share": "share of the layers"}).items():
        ends = measured.get(f"{key}_interval")
        interval = "{:6.2f} to {:6.2f}".format(*ends) if ends else " " * 16
        before = f"{getattr(point, key):12.2f}" if is_stated and (key in ("lost", "share") or was_labelled) else ""
        print(f"{title:<26}{measured[key]:8.2f}   {interval}{before}")
    if state.promise == point.promise:  # not at another threshold or in another precision
        verdict = "held here"
        needed = texts_needed(point.goal)[0]
        if measured["judging_texts"] < needed:
            verdict = f"too few texts to tell whether it holds; about {needed:,} suffice if none is lost"
        elif measured["lost"] > point.goal.max_lost:
            missing = "" if answers.is_labelled.all() else "because labels are missing, "
            verdict = f"not held here: by chance, {missing}or these texts come from another source"
        print(f"promised: at most {point.goal.max_lost:g} of 100 lost, {point.goal.sure:g}% sure; {verdict}")
    if has_labels:
        print(f"\n{'class':<25}{'precision':>10}{'recall':>8}{'F1':>8}{'rows':>8}")
        for name, *scores, rows in zip(state.labels, *measured["per_class"].values(), strict=True):
            print(f"{one_line(name, 24):<25}" + "{:10.1f}{:8.1f}{:8.1f}{:8,}".format(*scores, rows))


def predict(words: list[str]) -> None:
    """Predict a file of any size, in order and with bounded memory.

        minisweet predict RUN new.csv --out predicted.csv
        minisweet predict RUN new.jsonl --out predicted.tsv --text-columns body --threshold 0.9

    Each row keeps its columns and gets `label`, `confidence`, `exit_layer` (0 is before the first layer) and each
    label's probability, `p_<label>`. If the file has a column of that name, the new one is `predicted_<name>`.
    """
    parser = parser_of(predict)
    option = parser.add_argument
    add_options(parser)
    option("file", type=Path, metavar="FILE", help=".csv, .tsv or .jsonl")
    option("--out", type=Path, help="as FILE; replaced if it exists (default: standard output, as CSV)")
    option("--text-columns", type=name_of, help="(default: as in training, or text or sentence)")
    args = parser.parse_args(words)
    if args.out and (args.out.is_dir() or args.out.resolve() == args.file.resolve()):
        raise InputError(f"{args.out} is {'a folder' if args.out.is_dir() else 'the input'}; name another file", "out")
    state = load(args)
    record = state.trained.record
    column = text_column(args.file, args.text_columns, record.text_columns)
    rows, there = read_rows(args.file), all_columns(args.file)
    added = ["label", "confidence", "exit_layer", *(f"p_{name}" for name in state.labels)]
    while clash := {*added} & {*there}:
        added = [f"predicted_{name}" if name in clash else name for name in added]

    left: Counter[int] = Counter()
    empty, cut = 0, 0
    with row_writer(args.out, there + added) as write, progress(unit="row", desc="predict") as bar:
        while chunk := list(islice(rows, WINDOW)):
            texts = state.tokenize([cell(args.file, line, row, column) for line, row in chunk])
            for (_, row), answer in zip(chunk, state.classify(texts), strict=True):
                numbers = [round(p, 9) for p in (answer.confidence, *answer.probabilities.values())]
                cells = [answer.label, numbers[0], answer.exit_layer, *numbers[1:]]
                write(row | dict(zip(added, cells, strict=True)))
                left[answer.exit_layer] += 1
            empty += sum(not text.strip() for text in texts.examples.first)
            cut += int(texts.is_cut.sum())
            bar.update(len(chunk))
    if args.out:
        exits = ", ".join(f"{left[n]:,} at exit {n}" for n in (0, record.depth))
        print(f"{args.out}: {left.total():,} rows at threshold {state.threshold:.6g}; {exits}", end="; ")
        print(f"empty: {empty:,}; cut to {record.arguments.max_length} tokens: {cut:,}")


def explain(words: list[str]) -> None:
    """Show each exit's answer to a text, and where the text exits; or write a page that shows it for validation rows.

    minisweet explain RUN "The film was not superb."
    minisweet explain RUN --html page.html
    """
    parser = parser_of(explain)
    add_options(parser)
    parser.add_argument("text", nargs="?", metavar="TEXT", help="a text")
    parser.add_argument("--html", type=path_to(".html"), metavar="FILE", help="write a page of the validation rows")
    args = parser.parse_args(words)
    if (args.text is None) == (args.html is None):
        raise InputError("TEXT: should be a text; or --html FILE and no text")
    of_text = "threshold", "batch_size", "device", "amp"
    parser.need(args, args.text is not None, "TEXT; the page shows saved answers", *of_text)
    state = load(args)
    if args.text is not None:
        print_exits(state, args.text)
    else:
        write_page(args.html, state)
        print(f"written to {args.html}")


def export(words: list[str]) -> None:
    """Write a run as one ONNX file with early exit.

    minisweet export RUN --onnx file.onnx --int8
    """
    parser = parser_of(export)
    option = parser.add_argument
    option("run", type=Path, metavar="RUN", help="run folder")
    option("--onnx", type=path_to(".onnx"), required=True, metavar="FILE.onnx", help="a file that does not exist yet")
    option("--int8", action="store_true", help="eight-bit weights, and a promise of its own")
    args = parser.parse_args(words)
    classify = EarlyExitClassifier.load(args.run, threshold=1.0, device="cpu", amp="off")
    print(*classify.export(args.onnx, int8=args.int8), sep="\n")


# --- What several commands share


def parser_of(command: Callable[[list[str]], None]) -> Parser:
    """The parser of a command, which shows its docstring."""
    return Parser(getdoc(command) or "", f"minisweet {command.__name__}")


def add_options(parser: Parser) -> None:
    """Add the options that `load` reads."""
    option = parser.add_argument
    option("run", type=Path, metavar="RUN", help="run folder")
    about = "exit at this confidence; at 1 all texts run to the last exit (default: the one that was chosen)"
    option("--threshold", type=THRESHOLD, help=about)
    option("--batch-size", type=TEXTS_AT_ONCE, default=32, help="the most texts that run at once (default: 32)")
    parser.add_options(TrainingOptions, "device", "amp")


def load(args: Namespace) -> State:
    """Load the run that a command's options name."""
    options = {name: getattr(args, name) for name in ("threshold", "device", "amp", "batch_size")}
    return EarlyExitClassifier.load(args.run, **options).state


def print_choice(folder: Path, classify: EarlyExitClassifier) -> None:
    """Print what was chosen for the run in a folder, and what to do next."""
    print(f"\n{folder}:\n{classify.summary()}")
    print(f"next: minisweet predict {quote(str(folder))} FILE.csv --out predicted.csv")
