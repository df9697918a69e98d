"""Choose the exits and the threshold of a run, by the loss or the cost that you allow, from saved logits.

    minisweet choose runs/tickets                     # at most 3 in 100 texts are lost, 90% sure
    minisweet choose runs/tickets --max-lost 1 --sure 95
    minisweet choose runs/tickets --max-share 0.3     # at most 30% of the layers run
    minisweet choose runs/tickets --labels ask.csv    # with labels that `minisweet label` asked for

A text is lost if full depth, which runs all layers, is right and early exit is wrong. The promise holds for one goal
that is fixed in advance, not for the best of several. Writes operating.json, which test, predict, explain and export
read.
"""

from pathlib import Path

from minisweet.base.commands import Parser
from minisweet.base.files import LOG, InputError, preview
from minisweet.classifier.deployed import OPERATING, OwnRun, choose_for, fitted_of, load_run, read_point, write_chosen
from minisweet.classifier.promise import Goal, goal_of
from minisweet.classifier.rows import find_columns, read_texts, text_columns
from minisweet.classifier.summary import print_choice
from minisweet.options import TrainingOptions
from minisweet.outputs import read_outputs
from minisweet.run import LOGITS
from minisweet.texts import Examples, Texts


def main() -> None:
    """Choose for one run."""
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_options(Goal, max_lost=None, sure=None)
    parser.add_argument("--labels", type=Path, metavar="FILE", help="filled in, as `minisweet label` wrote it")
    parser.add_options(TrainingOptions, "device", "amp")
    args = parser.parse_args()
    folder = args.run
    goal = goal_of(args)
    run = load_run(folder, "given", *(("tokenizer", "texts") if args.labels else ()))
    if run.record.arguments.exit_strategy == "lte":
        message = "its exits learned when to be taken (lte), which is for train.py and evaluate.py alone"
        raise InputError(f"{folder}: {message}")
    if args.labels:
        columns = text_columns(args.labels, None, run.record.text_columns, option="")
        label = find_columns("", args.labels, [fitted_of(run.record).label_column or "label"])
        run = run._replace(given=run.given | given_labels(run, read_texts(args.labels, columns, *label)))
        if args.max_lost is args.sure is args.max_share is None and (folder / OPERATING).is_file():
            goal = read_point(folder, run.record).goal  # labels alone keep the goal
    if (folder / LOGITS).is_file():
        try:
            run = run._replace(outputs=read_outputs(folder / LOGITS, run.record.id))
        except InputError as error:
            LOG.warning("%s; it is made again", error)
    run = choose_for(run, goal, args.device, args.amp, folder)
    write_chosen(folder, run)
    print_choice(folder, run)


def given_labels(run: OwnRun, rows: Examples) -> dict[int, int]:
    """The classes, by key, that rows give to validation texts without a label. Logs the rows that are left out."""
    classes = {name: number for number, name in enumerate(run.record.labels)}
    texts = run.texts
    keys = Texts(run.tokenizer, rows).keys.tolist()
    open_keys = {*texts.keys[texts.labels < 0].tolist()}
    all_rows = list(zip(keys, rows.names, rows.texts(), strict=True))
    named = [row for row in all_rows if row[1] is not None]
    if emptied := [text for key, name, text in all_rows if name is None and key in run.given]:
        LOG.warning("cells that are empty now; their earlier labels are kept: %s", preview(emptied))
    names = {key: name for key, name, _ in named}
    if twice := [text for key, name, text in named if names[key] != name]:
        raise InputError(f"{twice[0]!r:.120} has two labels, should have one", "labels")
    if strange := [text for key, _, text in named if key not in open_keys]:
        LOG.warning("left out, as this run does not ask about them, or they were edited: %s", preview(strange))
    if unknown := sorted({name for _, name, _ in named if name not in classes}):
        LOG.warning("labels that the run does not know, left out: %s", preview(unknown))
    return {key: classes[name] for key, name, _ in named if key in open_keys and name in classes}
