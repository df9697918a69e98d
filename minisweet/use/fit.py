"""Train on your own text, choose what to deploy, and say what to expect of it.

    minisweet fit tickets.csv --out runs/tickets
    minisweet fit tickets.csv --text-columns subject,body --label-column team --max-lost 2
    minisweet fit tickets.csv --unlabelled more.csv
    minisweet fit --trunk my-classifier --unlabelled texts.csv        # exits for a classifier, without labels

Files are .csv, .tsv or .jsonl. By default a plain model is fine-tuned for its last exit alone, and exit 0, a bag of
words, stands in front of it. Then as `minisweet choose`.
"""

import argparse
from pathlib import Path

from minisweet.base import devices
from minisweet.base.commands import Parser, list_of, number
from minisweet.base.files import InputError
from minisweet.data.own import classes_of, with_labels
from minisweet.data.rows import OwnText, find_columns, read_texts, text_columns
from minisweet.data.text import Examples
from minisweet.methods import METHODS
from minisweet.runs.own import OwnData
from minisweet.runs.start import add_run_options, add_training_options
from minisweet.runs.train import train
from minisweet.use.choose import add_goal_options, choose_for, goal_of, print_choice


def main() -> None:
    """Train one run, and choose for it."""
    parser = Parser(__doc__)
    option = parser.add_argument
    option("file", nargs="?", type=Path, metavar="FILE", help="labelled texts: .csv, .tsv or .jsonl")
    option("--unlabelled", type=Path, action="append", default=[], metavar="FILE", help="more texts; may be repeated")
    option("--text-columns", type=list_of(str), help="one or two (default: text, sentence or sentence1,sentence2)")
    option("--label-column", metavar="NAME", help="(default: label)")
    option("--dev-data", type=Path, metavar="FILE", help="to choose and judge on (default: rows of FILE set aside)")
    option("--dev-size", type=number(0.0001, 0.9999), default=0.2, help="share of FILE set aside (default: 0.2)")
    option("--method", choices=list(METHODS), default="plain", help="default: plain; branch adds exits between")
    option(
        "--trunk",
        type=Path,
        metavar="FOLDER",
        help="run or classifier to start from, which plain and branch keep",
    )
    option("--class-weights", choices=("balanced",), help="each row weighs N / (classes x rows of its class)")
    option("--out", type=Path, help="run folder (default: runs/<the name of FILE>)")
    add_goal_options(parser)
    add_training_options(parser)
    add_run_options(parser)
    args = parser.parse_args()
    goal = goal_of(args, parser)
    parser.need(args, args.dev_data is None, "rows of FILE, and --dev-data is given", "dev_size")
    if not args.file and not (args.trunk and args.unlabelled):
        raise InputError("FILE: is missing; without labels, --trunk FOLDER --unlabelled FILE will do")
    args.out = args.out or Path("runs") / (args.file or args.unlabelled[0]).name.split(".")[0]
    args.train_size = None
    devices.tune_cpu()
    is_new = train(args, read_data(args))
    if not is_new:
        print(f"{args.out}: finished already")
    print_choice(args.out, choose_for(args.out, goal, args.device, args.amp))


def read_data(args: argparse.Namespace) -> OwnData:
    """The texts and labels of the files that the options name."""
    first = args.file or args.unlabelled[0]
    columns, label = text_columns(first, args.text_columns), None
    rows = OwnText(Examples([], None if len(columns) == 1 else [], None), [], columns)
    if args.file:
        (label,) = find_columns("--label-column", first, [args.label_column or "label"])
        if label in columns:
            raise InputError(f"--text-columns: {','.join(columns)}, should be one or two, and not the label column")
        rows = read_texts(first, columns, label)
    dev = None
    if args.dev_data:
        dev = read_texts(args.dev_data, text_columns(args.dev_data, args.text_columns, columns), label)
    labels = classes_of(rows.names + (dev.names if dev else []))
    more = [read_texts(file, text_columns(file, args.text_columns, columns)).rows for file in args.unlabelled]
    return OwnData(
        task=first.name.split(".")[0] or "texts",
        labels=labels,
        train=with_labels(rows, labels, first),
        dev=with_labels(dev, labels, args.dev_data) if dev else None,
        unlabelled=more[0].joined(*more[1:]) if more else None,
        text_columns=columns,
        label_column=label,
    )
