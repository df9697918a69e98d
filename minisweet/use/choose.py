"""Choose what to deploy of a run: by what may be lost, or by what it may cost. From saved answers, in a second.

    minisweet choose runs/tickets                     # at most 3 in 100 texts are lost, 90% sure
    minisweet choose runs/tickets --max-lost 1 --sure 95
    minisweet choose runs/tickets --max-share 0.3     # at most 30% of the layers run

A text is lost where the whole model, full depth, is right and the early exit is wrong. Writes operating.json, which
test, predict, explain and export take.
"""

from pathlib import Path
from shlex import quote

import torch

from minisweet.base import devices
from minisweet.base.commands import Parser
from minisweet.base.files import LOG, InputError, read_dataclass, write_json
from minisweet.evaluation import operating
from minisweet.evaluation.metrics import METRICS, score
from minisweet.evaluation.outputs import Outputs, load_outputs, run_exits, save_outputs
from minisweet.runs.folders import LOGITS, OPERATING
from minisweet.runs.load import load_run, read_record, read_validation
from minisweet.runs.records import OperatingPoint, Record

GOALS = {"max_lost": (0.01, 99.99), "max_share": (0, 1), "sure": (50, 99.9)}  # lowest and highest


def main() -> None:
    """Choose for one run."""
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    add_goal_options(parser)
    devices.add_device_options(parser)
    args = parser.parse_args()
    goal = goal_of(args, parser)
    print_choice(args.run, choose_for(args.run, goal, args.device, args.amp))


def add_goal_options(parser: Parser) -> None:
    """Add the options that `goal_of` reads."""
    group = parser.add_argument_group("goal: what to deploy")
    either = group.add_mutually_exclusive_group().add_argument
    either("--max-lost", type=float, default=3.0, metavar="P", help="at most P of 100 texts are lost (default: 3)")
    either("--max-share", type=float, metavar="SHARE", help="at most this share of the layers, from 0 to 1")
    group.add_argument("--sure", type=float, default=90.0, metavar="S", help="how sure of P, in percent (default: 90)")


def goal_of(options: object, parser: Parser | None = None) -> dict[str, float]:
    """The goal that options name: {"max_lost": P, "sure": S}, or {"max_share": s}, which goes first.

    `options` has these attributes. Raises InputError for values that cannot be.
    """
    goal = {"max_lost": options.max_lost, "sure": options.sure}
    if options.max_share is not None:
        goal = {"max_share": options.max_share}
        if parser:
            parser.need(options, False, "--max-lost", "sure")
    for name, value in goal.items():
        low, high = GOALS[name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and low <= value <= high):
            raise InputError(f"{name}: {value!r:.60}, should be a number from {low:g} to {high:g}")
    return {name: float(value) for name, value in goal.items()}


def outputs_of(run: Path, device: str = "auto", amp: str = "auto") -> tuple[Outputs, str]:
    """What a run's exits say of its validation rows, and in which precision: as saved, or made and saved."""
    record = read_record(run)
    wanted = devices.choose_precision(amp, chosen := devices.choose_device(device))
    if (run / LOGITS).is_file():
        try:
            outputs, precision = load_outputs(run)
            if amp == "auto" or precision == str(wanted or torch.float32):
                return outputs, precision
        except InputError as error:
            LOG.warning("%s", error)
    model, _ = load_run(run)
    outputs = run_exits(run, record, model.to(chosen), read_validation(run, record), wanted)
    save_outputs(run, outputs, wanted)
    return outputs, str(wanted or torch.float32)


def choose_for(
    run: Path, goal: dict[str, float], device: str = "auto", amp: str = "auto", write: bool = True
) -> OperatingPoint:
    """Choose what to deploy of a run, and write operating.json unless told not to."""
    outputs, precision = outputs_of(run, device, amp)
    record = read_record(run)
    _, point = operating.choose(outputs, goal, record.trained_keys)
    point |= {"id": record.id, "precision": precision}
    if write:
        write_json(run / OPERATING, point)
    return read_dataclass(OperatingPoint, "the choice", point)


def print_choice(run: Path, point: OperatingPoint) -> None:
    """Print what the bag of words, early exit and the whole model give, and what is promised of new text."""
    record, (outputs, _) = read_record(run), outputs_of(run)
    _, judging, trained = operating.split(outputs, record.trained_keys)
    rows = outputs.take(judging) if len(judging) else outputs
    rows = rows.against_full_depth() if (rows.labels < 0).all() else rows.labelled()
    costs = outputs.exits.take([outputs.exits.layers.index(n) for n in point.exits]).costs(point.threshold)
    lines = [("deployed", point.score, point.share), ("full depth", point.full_depth, costs[-1])]
    if outputs.exits.layers[0] == 0:
        alone = float(score(rows.logits[0].argmax(-1).numpy(), rows.labels.numpy(), rows.metric))
        lines.insert(0, ("a bag of words alone (exit 0)", alone, 0.0))
    print(f"\n{f'{run}: on new texts':<42}{METRICS[rows.metric]:>12}   share of the layers")
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
    print(in_words(point, record))
    print(f"next: minisweet predict {quote(str(run))} FILE.csv --out predicted.csv")


def in_words(point: OperatingPoint, record: Record) -> str:
    """What is promised of new text; or why nothing faster than full depth can be, and how many rows would do."""
    if len(record.exit_layers) == 1:
        return "the model has one exit alone"
    set_aside = record.dev_size if record.text_columns and record.dev_size else 1.0
    return operating.promise(vars(point)) or operating.shortfall(vars(point), set_aside)
