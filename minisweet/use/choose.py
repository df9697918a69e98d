"""Choose what to deploy of a run: by what may be lost, or by what it may cost. From saved answers, in a second.

    minisweet choose runs/tickets                     # at most 3 in 100 texts are lost, 90% sure
    minisweet choose runs/tickets --max-lost 1 --sure 95
    minisweet choose runs/tickets --max-share 0.3     # at most 30% of the layers run

A text is lost where the whole model, full depth, is right and the early exit is wrong. Writes operating.json, which
test, predict, explain and export take.
"""

from argparse import Namespace
from pathlib import Path
from shlex import quote

import torch

from minisweet.base.commands import Parser
from minisweet.base.devices import choose_device, choose_precision
from minisweet.base.files import LOG, InputError
from minisweet.evaluation import operating
from minisweet.evaluation.metrics import METRICS, score
from minisweet.runs.deployed import Goal
from minisweet.runs.options import TrainingOptions
from minisweet.runs.run import LOGITS, Run


def main() -> None:
    """Choose for one run."""
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    add_goal_options(parser)
    parser.add_options(TrainingOptions, "device", "amp")
    args = parser.parse_args()
    run, goal = Run.read(args.run), goal_of(args)
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
    if not is_there or (amp != "auto" and run.outputs.precision != wanted):
        run.outputs = run.ask(run.texts, device, amp)
        if run.folder:
            run.write_outputs(run.folder)
    run.point = operating.choose(run.outputs, goal.as_json(), run.record.trained_keys, run_id=run.id)


def print_choice(run: Run) -> None:
    """Print what the bag of words, early exit and the whole model give, and what is promised of new text."""
    record, outputs, point = run.record, run.outputs, run.point
    _, judging, trained = operating.split(outputs, record.trained_keys)
    rows = outputs.take(judging) if len(judging) else outputs
    rows = rows.against_full_depth() if (rows.labels < 0).all() else rows.labelled()
    costs = outputs.exits.take([outputs.exits.layers.index(n) for n in point.exits]).costs(point.threshold)
    lines = [("deployed", point.score, point.share), ("full depth", point.full_depth, costs[-1])]
    if outputs.exits.layers[0] == 0:
        alone = float(score(rows.logits[0].argmax(-1).numpy(), rows.labels.numpy(), rows.metric))
        lines.insert(0, ("a bag of words alone (exit 0)", alone, 0.0))
    print(f"\n{f'{run.folder}: on new texts':<42}{METRICS[rows.metric]:>12}   share of the layers")
    for name, value, share in lines:
        print(f"{name:<42}{value:12.1f}   {share:12.2f}")
    gain = point.score - point.full_depth
    than = (
        f"{gain:+.1f} points" if gain > 0 else f"{-gain:.1f} points less than full depth" if gain else "as full depth"
    )
    print(f"early exit: {than}, at threshold {point.threshold:.6g}, exits {', '.join(map(str, point.exits))}")
    if point.threshold == 1:
        print("no text leaves early: all run to the last exit")
    elif point.share == costs[0]:
        print("all texts leave at " + ("exit 0: the layers add nothing" if point.exits[0] == 0 else "the first exit"))
    if trained:
        print(f"{trained:,} of the validation rows were trained on, and do not count")
    print(point.in_words(len(record.exit_layers), record.set_aside))
    print(f"next: minisweet predict {quote(str(run.folder))} FILE.csv --out predicted.csv")
