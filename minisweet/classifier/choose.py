"""Choose what to deploy of a run: by what may be lost, or by what it may cost. From saved answers, in a second.

    minisweet choose runs/tickets                     # at most 3 in 100 texts are lost, 90% sure
    minisweet choose runs/tickets --max-lost 1 --sure 95
    minisweet choose runs/tickets --max-share 0.3     # at most 30% of the layers run
    minisweet choose runs/tickets --labels ask.csv    # with labels that `minisweet label` asked for

A text is lost where the whole model, full depth, is right and the early exit is wrong. Each goal is reached as surely
as it says; of several that were tried, the fastest is not. Writes operating.json, which test, predict, explain and
export take.
"""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from shlex import quote

import torch

from minisweet.base.commands import Parser
from minisweet.base.devices import choose_device, choose_precision
from minisweet.base.files import LOG, InputError, preview
from minisweet.classifier.rows import Rows, find_columns, read_texts, text_columns
from minisweet.texts import Texts
from minisweet.classifier import promise as operating
from minisweet.metrics import METRICS, score
from minisweet.classifier.operating_point import Goal
from minisweet.options import TrainingOptions
from minisweet.run import LOGITS, OPERATING, Run


def main() -> None:
    """Choose for one run."""
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    add_goal_options(parser)
    parser.add_argument("--labels", type=Path, metavar="FILE", help="filled in, as `minisweet label` wrote it")
    parser.add_options(TrainingOptions, "device", "amp")
    args = parser.parse_args()
    run, goal = Run.read(args.run), goal_of(args)
    if args.labels:
        if args.max_lost is args.sure is args.max_share is None and (args.run / OPERATING).is_file():
            goal = Goal(**run.point.goal)  # that of the run
        run.labels = run.labels | labels_of(run, read_answers(run, args.labels))
        run.write_labels(args.run)
    choose_for(run, goal, args.device, args.amp)
    run.write_point(args.run)
    print_choice(run)


def add_goal_options(parser: Parser) -> None:
    """Add the options that `goal_of` reads."""
    parser.add_options(Goal, max_lost=None, sure=None)


def goal_of(args: Namespace) -> Goal:
    """The goal that a command's options name."""
    if args.sure is not None and args.max_share is not None:
        raise InputError("needs --max-lost", "sure")
    return Goal().changed(args.max_lost, args.sure, args.max_share)


def choose_for(run: Run, goal: Goal, device: str = "auto", amp: str = "auto") -> None:
    """Choose what to deploy of a run. Where its answers are not saved in this precision, its exits are asked."""
    if run.record.arguments.exit_strategy == "lte":
        raise InputError(
            f"{run.folder}: its exits learned when to be taken (lte), which is for train.py and evaluate.py alone"
        )
    wanted = str(choose_precision(amp, choose_device(device)) or torch.float32)
    is_there = "outputs" in vars(run)
    if not is_there and run.folder and (run.folder / LOGITS).is_file():
        try:
            is_there = run.outputs is not None
        except InputError as error:
            LOG.warning("%s", error)
    if not is_there or run.outputs.precision != wanted:
        run.outputs = run.ask(run.texts, device, amp)
        if run.folder:
            run.write_outputs(run.folder)
    its = run.record
    found = operating.choose(run.outputs, goal.as_json(), its.trained_keys, None, run.labels, its.combines)
    run.point = replace(found, id=run.id)


def read_answers(run: Run, file: Path) -> Rows:
    """The rows of a file that `minisweet label` wrote, and somebody filled in."""
    columns, label = text_columns(file, None, run.record.columns, option=""), run.record.label_column or "label"
    return read_texts(file, columns, *find_columns("", file, [label]))


def labels_of(run: Run, rows: Rows) -> dict[int, int]:
    """Classes of judging texts that had none, by their keys. Rows that are others, or have no such label, are told."""
    classes = {name: number for number, name in enumerate(run.record.labels)}
    keys, may_ask = (
        Texts(run.tokenizer, rows.examples).keys.tolist(),
        set(run.texts.keys[run.texts.labels < 0].tolist()),
    )
    given = [(key, name, row) for row, (key, name) in enumerate(zip(keys, rows.names, strict=True)) if name is not None]
    if strange := [rows.examples.texts()[row] for key, _, row in given if key not in may_ask]:
        LOG.warning("texts that this run does not ask about, or that were edited, left out: %s", preview(strange))
    if unknown := sorted({name for _, name, _ in given if name not in classes}):
        LOG.warning("labels that the run does not know, left out: %s", preview(unknown))
    return {key: classes[name] for key, name, _ in given if key in may_ask and name in classes}


def print_choice(run: Run) -> None:
    """Print what was chosen, and what to do next."""
    print(f"\n{run.folder}:\n{summary(run)}")
    print(f"next: minisweet predict {quote(str(run.folder))} FILE.csv --out predicted.csv")


def summary(run: Run, threshold: float | None = None, promise: str | None = None) -> str:
    """What the bag of words, early exit and the whole model give, and what is promised of new text, a line each.

    At another threshold than the one that was chosen the judges are asked again, and `promise` is said of it.
    """
    record, outputs, point = run.record, run.outputs, run.point
    _, judging, trained = operating.split(outputs, record.trained_keys)
    rows = (outputs.take(judging) if len(judging) else outputs).scored()
    if threshold is not None:
        its = operating.prepare(outputs, point.goal, record.trained_keys, point.exits, record.combines)
        found = operating.stated(its.asked, threshold, its.judges.filled(run.labels), its.judges.scored())
        point = replace(point, threshold=threshold, **found)
    costs = outputs.exits.take([outputs.exits.layers.index(n) for n in point.exits]).costs(point.threshold)
    gives = [("deployed", point.score, point.share), ("full depth", point.full_depth, costs[-1])]
    has_exit_0 = outputs.exits.layers[0] == 0
    if has_exit_0:
        alone = float(score(rows.logits[0].argmax(-1).numpy(), rows.labels.numpy(), rows.metric))
        gives.insert(0, ("a bag of words alone (exit 0)", alone, 0.0))
    lines = [f"{'on new texts':<42}{METRICS[rows.metric]:>12}   share of the layers"]
    lines += [f"{name:<42}{value:12.1f}   {share:12.2f}" for name, value, share in gives]
    if has_exit_0 and alone >= point.full_depth and rows.metric != "agreement":
        lines.append("the bag of words alone is as good: nothing need be sent to the model")
    gain = point.score - point.full_depth
    than = (
        f"{gain:+.1f} points" if gain > 0 else f"{-gain:.1f} points less than full depth" if gain else "as full depth"
    )
    lines.append(f"early exit: {than}, at threshold {point.threshold:.6g}, exits {', '.join(map(str, point.exits))}")
    if point.threshold == 1:
        lines.append("no text leaves early: all run to the last exit")
    elif point.share == costs[0]:
        lines.append(f"all texts leave at {'exit 0' if point.exits[0] == 0 else 'the first exit'}")
    if trained:
        lines.append(f"{trained:,} of the validation rows were trained on, and do not count")
    return "\n".join([*lines, promise or point.in_words(len(record.exit_layers), record.set_aside)])
