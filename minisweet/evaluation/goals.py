"""Goals of an operating point: how a person names one, and what he is told of it."""

import argparse
import math
from collections.abc import Sequence

from minisweet.base.commands import Parser, number
from minisweet.base.files import InputError, counted, one_line, preview
from minisweet.evaluation.metrics import METRICS, has_labels
from minisweet.evaluation.operating import PARTS, limit_of
from minisweet.runs.records import GOALS, Record

STATED = (  # of an operating point: a title, the key of the value, and the key of its interval
    ("", "score", "score_interval"),  # the title is the metric's
    ("macro F1", "macro_f1", None),
    ("full depth", "full_depth_score", "full_depth_interval"),
    ("points lost", "loss", "loss_interval"),
    ("share of the layers", "speedup_ratio", "speedup_interval"),
)
FEW = "so few texts tell little: see how wide the intervals are"
NOBODY = "too few new texts: all of this is of texts that also chose, or were trained on"
UNCHECKED = "whether the model, or its trunk, was trained on these texts cannot be checked"
CLASSES = 20  # are printed, at most
SURE = {"max_loss": 70.0, "max_change": 90.0}  # by default, in percent


def add_goal_options(parser: Parser, title: str) -> None:
    """Add the options that `goal_of` reads."""
    group = parser.add_argument_group(title)
    option = group.add_mutually_exclusive_group().add_argument
    option("--max-loss", type=number(*GOALS["max_loss"]), metavar="P", help="the fastest that loses at most P points")
    option("--speed", type=number(*GOALS["speed"]), metavar="S", help="the slowest within this share of the layers")
    change = "the fastest that changes at most P percent of full depth's answers"
    option("--max-change", type=number(*GOALS["max_change"]), metavar="P", help=change)
    sure = "how sure, in percent, that P holds on new text (--max-loss: 70, --max-change: 90)"
    group.add_argument("--sure", type=number(*GOALS["sure"]), metavar="S", help=sure)


def goal_of(args: argparse.Namespace, metric: str, former: dict[str, float] | None = None) -> dict[str, float]:
    """The goal: {"speed": S}, {"max_loss": P, "sure": S} or {"max_change": P, "sure": S}.

    It is the one that `args` name, else the `former` one; else that at most one point is lost, 70% sure, or without
    labels that at most 3% of the answers change, 90% sure. Raises InputError where --sure would go with a speed.
    """
    named = {name: getattr(args, name) for name in ("speed", *SURE) if getattr(args, name) is not None}
    goal = named or former or ({"max_loss": 1.0} if has_labels(metric) else {"max_change": 3.0})
    if "speed" not in goal:
        return goal | {"sure": args.sure or goal.get("sure") or SURE[next(iter(goal))]}
    if args.sure:
        whose = "" if named else " of the last evaluation"
        raise InputError(f"--sure: needs --max-loss or --max-change, since the goal{whose} is {options_of(goal)}")
    return goal


def options_of(goal: dict[str, float]) -> str:
    """A goal as evaluate.py takes it."""
    return " ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in goal.items())


def promise_of(goal: dict[str, float]) -> str:
    """What a goal promises, in words."""
    what = "{:g}% of the answers change" if "max_change" in goal else "{:g} points are lost"
    what = "1 point is lost" if goal.get("max_loss") == 1 else what.format(limit_of(goal))
    return f"at most {what}, {goal['sure']:g}% sure"


def print_point(point: dict, record: Record, layers: list[int]) -> None:
    """Print the operating point of exits after these `layers`, what is stated, by how many texts, and promised."""
    asked, goal = point["asked_exits"], point["goal"]
    costly = [str(n) for n in layers if n not in asked]
    left_out = f" (left out: {', '.join(costly)}, not worth the cost)" if costly else ""
    print(f"\noperating point: threshold {point['threshold']:.6g}, exits {', '.join(map(str, asked))}{left_out}")
    print(f"{'on new text':<25}{'stated':>8}   95% interval")
    for title, *keys in STATED:
        print(f"{title or METRICS[record.metric]:<25}" + with_interval(point, *keys))
    if has_labels(record.metric) and len(record.labels) <= CLASSES:
        print(f"\n{'class':<25}{'precision':>10}{'recall':>8}{'F1':>8}{'rows':>8}")
        for name, *scores, rows in zip(record.labels, *point["per_class"].values(), strict=True):
            print(f"{one_line(name, 24):<25}" + "{:10.1f}{:8.1f}{:8.1f}{:8,}".format(*scores, rows))
    judging, choosing = counted(point["judging_texts"], "distinct text"), counted(point["choosing_texts"], "other")
    print(f"\n{judging} judged, {choosing} chose")
    if point["judging_texts"] < 75:
        print(FEW if point["judging_texts"] else NOBODY)
    if "sure" in goal and point["threshold"] < 1:
        print(f"promised, of texts drawn like these: {promise_of(goal)}")
    if not record.knows_all_texts:
        print(UNCHECKED)
    if point["trained_rows"]:
        were = "was" if point["trained_rows"] == 1 else "were"
        print(f"{point['trained_rows']:,} of the rows {were} trained on, and neither chose nor judged")


def with_interval(point: dict, key: str, interval: str | None) -> str:
    """A statistic of an operating point, and its 95% interval where it has one."""
    ends = "   {:7.2f} to {:7.2f}".format(*point[interval]) if interval else " " * 21
    return f"{point[key]:8.2f}{ends}"


def shortfall(point: dict, record: Record, layers: Sequence[int]) -> str:
    """A line where a goal is out of reach, or full depth is all that can be promised; else "".

    `point` is `operating_point`'s, of exits after these `layers`: with one exit nobody could leave. The line says how
    many rows would do if early exit changed no answer: n texts are then sure of a share p if (1 - p)^n is at most what
    is not sure. A point of Matthews correlation is half a percent.
    """
    goal, texts, share = point["goal"], point["judging_texts"], point["speedup_ratio"]
    if not point["reached"]:
        return f"--speed {goal['speed']:g} is out of reach; the fastest takes {100 * share:.3g}% of the layers"
    if "sure" not in goal or point["threshold"] < 1 or len(layers) == 1:
        return ""
    p = min(1 - 1e-9, limit_of(goal) / (200 if record.metric == "matthews" and "max_loss" in goal else 100))
    needed = math.log1p(-goal["sure"] / 100) / math.log1p(-p) if p else math.inf
    reason = "too many answers change" if needed < math.inf else "no number of texts would do"
    if texts < needed < math.inf:
        needed = math.ceil(needed)
        rows, what = math.ceil(needed * PARTS / (PARTS - 1)), "validation rows"
        if record.text_columns and not record.dev_data:  # of its own text a share is set aside
            rows, what = math.ceil(rows / record.dev_size), "rows in --data"
        what = f"labelled {what}" if has_labels(record.metric) else what
        reason = f"{counted(texts, 'text')} judged, and {needed:,} would do if no answer changed: about {rows:,} {what}"
    return f"nothing faster than full depth can be promised ({promise_of(goal)}); {reason}"


def never_right(evaluation: dict, names: list[str]) -> list[str]:
    """A line on each exit that is never right about a class of five rows or more. `names` are the classes'."""
    lines = []
    for n, report in zip(evaluation["exit_layers"], evaluation["per_class"], strict=True):
        recalls = zip(names, report["recall"], report["support"], strict=True)
        if missed := [name for name, recall, support in recalls if recall == 0 and support >= 5]:
            name, advice = "exit 0", "train with --class-weights balanced, or on more rows"
            if n > 0:
                name, advice = f"the exit after layer {n}", f"{advice}, longer (--epochs), or at another --lr"
            lines.append(f"{name} never predicts {preview(missed)} rightly: {advice}")
    return lines if has_labels(evaluation["metric"]) else []  # without labels the classes are full depth's own
