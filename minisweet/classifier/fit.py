"""Train on your own text, choose what to deploy, and say what to expect of it.

    minisweet fit tickets.csv --out runs/tickets
    minisweet fit tickets.csv --text-columns subject,body --label-column team --max-lost 2
    minisweet fit tickets.csv --unlabelled more.csv
    minisweet fit --trunk my-classifier --unlabelled texts.csv        # exits for a classifier, without labels

Files are .csv, .tsv or .jsonl. By default a plain model is fine-tuned for its last exit alone, and exit 0, a bag of
words, stands in front of it. Then as `minisweet choose`.
"""

from argparse import Namespace
from pathlib import Path

from minisweet.base.commands import Parser, list_of, name_of
from minisweet.base.devices import tune_cpu
from minisweet.base.files import InputError
from minisweet.classifier.rows import Rows, find_columns, read_texts, text_columns
from minisweet.texts import Examples
from minisweet.options import OWN_TEXT, TrainingOptions
from minisweet.recipe import train_own
from minisweet.resume import add_output_options, claim_output
from minisweet.run import Run
from minisweet.classifier.choose import add_goal_options, choose_for, goal_of, print_choice


def main() -> None:
    """Train one run, and choose for it."""
    parser = Parser(__doc__)
    option = parser.add_argument
    option("file", nargs="?", type=Path, metavar="FILE", help="labelled texts: .csv, .tsv or .jsonl")
    option("--unlabelled", type=Path, action="append", default=[], metavar="FILE", help="more texts; may be repeated")
    names = list_of(name_of)
    option("--text-columns", type=names, help="one or two (default: text, sentence or sentence1,sentence2)")
    option("--label-column", metavar="NAME", help="(default: label)")
    option("--group-column", metavar="NAME", help="what a row belongs to, such as a thread; all its rows stay together")
    option("--dev-data", type=Path, metavar="FILE", help="to choose and judge on (default: rows of FILE set aside)")
    option("--out", type=Path, help="run folder (default: runs/<the name of FILE>)")
    parser.add_options(TrainingOptions, *OWN_TEXT)
    add_goal_options(parser)
    add_output_options(parser)
    args = parser.parse_args()
    options, goal = parser.make(TrainingOptions, args), goal_of(args)
    parser.need(args, args.dev_data is None, "rows of FILE, and --dev-data is given", "dev_size")
    if not args.file and not (args.trunk and args.unlabelled):
        raise InputError("FILE: is missing; without labels, --trunk FOLDER --unlabelled FILE will do")
    first = args.file or args.unlabelled[0]
    out, name = args.out or Path("runs") / first.name.split(".")[0], first.name.split(".")[0] or "texts"
    tune_cpu()
    with claim_output(out, args.resume, args.overwrite) as saved:
        run = train_own(options, name, *read_data(args, first), saved)
    if not run:
        run = Run.read(out)
        print(f"{out}: finished already")
    choose_for(run, goal, options.device, options.amp)
    run.write_point(out)
    print_choice(run)


def read_data(args: Namespace, first: Path) -> tuple[Rows, Rows | None, Examples | None]:
    """The labelled rows, those to validate on, and texts without labels, of the files that the options name."""
    columns, label, group = text_columns(first, args.text_columns), None, args.group_column

    def read(file: Path, label: str | None) -> Rows:
        its = columns if file is first else text_columns(file, args.text_columns, columns)
        return read_texts(file, its, label, *find_columns("--group-column", file, [group]) if group else ())

    rows, dev = Rows(Examples([], None if len(columns) == 1 else [], None), [], columns, None, group), None
    if args.file:
        (label,) = find_columns("--label-column", first, [args.label_column or "label"])
        if label in columns:
            raise InputError(f"--text-columns: {','.join(columns)}, should be one or two, and not the label column")
        rows = read(first, label)
    if args.dev_data:
        (label,) = find_columns("--label-column", args.dev_data, [label or args.label_column or "label"])
        dev = read(args.dev_data, label)
    more = [read(file, None).examples for file in args.unlabelled]
    return rows, dev, more[0].joined(*more[1:]) if more else None
