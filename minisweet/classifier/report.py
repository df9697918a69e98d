"""All text about an `OperatingPoint` is generated here, from its numbers."""

import logging
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil

import numpy as np
import torch

from minisweet.base.commands import BARS, Notices
from minisweet.base.devices import amp_of
from minisweet.base.files import LOG, one_line
from minisweet.classifier import promise, split
from minisweet.classifier.cascade import Answers, Cascade
from minisweet.classifier.promise import Goal, OperatingPoint
from minisweet.texts import Texts

NOTHING = "nothing faster than full depth can be promised"
MANY = 2 / 3  # if a larger share of texts reaches the model, early exit is hardly worth it


@contextmanager
def telling(verbose: bool) -> Iterator[None]:
    """Write notices to standard error if `verbose`, with progress bars on a terminal; otherwise no progress bar."""
    handler, level, bars = Notices(), LOG.level, BARS.set({"disable": None} if verbose else None)
    if verbose:
        LOG.addHandler(handler)
        LOG.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOG.removeHandler(handler)
        LOG.setLevel(level)
        BARS.reset(bars)


def before_training(record: Namespace, options: Namespace, learned: Texts, side: Texts, roles: np.ndarray) -> None:
    """Tell what is known before training: the rows, how many texts judge, and whether anything can be promised."""
    LOG.info("%s: %d rows to train on, %d to validate", record.task, (learned.labels >= 0).sum(), len(side))
    LOG.info("texts cut to %d tokens: %d", options.max_length, learned.is_cut.sum())
    if not learned.examples.groups:  # whoever names groups knows what belongs together
        split.warn_of_near_duplicates(side, learned)
    goal, judges = Goal(max_lost=options.max_lost, sure=options.sure), side.take(np.flatnonzero(roles == split.JUDGES))
    a, b = (len(np.unique(judges.keys[there])) for there in (judges.labels >= 0, judges.labels < 0))
    count = promise.count_judges(a, b, goal)
    if (most := promise.most_lost(count, goal)) < 0:
        LOG.warning("%d texts will judge, so %s: %s", count, NOTHING, rows_needed(goal, count == a, record))
    else:
        LOG.info("%d texts will judge, of which early exit may lose %d", count, most)


def rows_needed(goal: Goal, are_labelled: bool, record: Namespace) -> str:
    """How many rows, or groups of rows, it takes before anything can be promised."""
    share = record.set_aside if are_labelled or record.set_aside == 1 else 1 / split.UNLABELLED_PER_JUDGE
    units = [ceil(ceil(n * split.CHOOSING / (split.CHOOSING - 1)) / share) for n in promise.texts_needed(goal)]
    kind, per_unit = "labelled rows" if are_labelled else "rows without a label", record.rows_per_unit[not are_labelled]
    has_groups, rows = record.training_groups + record.validation_groups, [ceil(n * per_unit) for n in units]
    (one, *others), kind = (units, f"groups of {kind}") if has_groups else (rows, kind)
    words = "it takes about {:,} {} if none is lost, {:,} if one is, and {:,} if two are".format(one, kind, *others)
    in_rows = " (at {:.1f} rows a group, as here: {:,}, {:,} and {:,} rows)".format(per_unit, *rows)
    return words + in_rows * bool(has_groups)


def promise_of(cascade: Cascade, point: OperatingPoint, record: Namespace) -> str:
    """The promise about new text, or why there is none."""
    if point.precision != (now := str(cascade.precision or torch.float32)):
        return f"the promise was made in {point.precision}, and this is {now}: choose again with --amp {amp_of(now)}"
    if cascade.threshold != point.threshold:
        return f"threshold {cascade.threshold:g} is not the one that was chosen, so nothing is promised"
    if point.threshold < 1:
        return what_is_promised(point)
    if point.judging_texts >= promise.texts_needed(point.goal)[-1]:
        return f"{NOTHING}: too many of {point.judging_texts:,} texts are lost; allow more"
    enough = rows_needed(point.goal, point.labelled_judges == point.judging_texts, record)
    return f"{NOTHING}: only {point.judging_texts:,} texts judged; {enough}"


def what_is_promised(point: OperatingPoint) -> str:
    """What the judges saw and what is promised; "" if all texts run to the last exit."""
    if point.threshold == 1:
        return ""
    count = round(point.lost * point.judging_texts / 100)
    at_most = "at most " * (point.judging_texts > point.labelled_judges)  # a missing label only adds to the count
    words = f"On {point.judging_texts:,} of your texts that the model had not seen, early exit lost {at_most}"
    words += f"{count:,} answer{'s' * (count != 1)} that full depth had right."
    words += f" In the long run at most {point.goal.max_lost:g} in 100 new texts like these are lost,"
    words += f" {point.goal.sure:g}% sure."
    if point.labelled_judges:
        words += f" Of {point.labelled_judges:,} labelled texts full depth got {point.full_depth:.1f}% right,"
        words += f" early exit {point.score:.1f}%."
    return words


def metric_of(point: OperatingPoint) -> str:
    """The metric of an operating point's scores, set by its judging texts; these may lack labels that others have."""
    return "agreement with full depth" if point.majority is None else "accuracy"


def summary(cascade: Cascade, point: OperatingPoint, record: Namespace) -> list[str]:
    """Lines on the bag of words, early exit and full depth: scores, warnings, who judges, advice, what is promised."""
    lines = [f"{f'on new texts, {metric_of(point)}':<42}{'in percent':>12}   95% interval   share of the layers"]
    for name, score, interval, share in (
        ("a bag of words alone (exit 0)", point.exit_0, point.exit_0_interval, 0.0),
        ("deployed", point.score, point.score_interval, point.share),
        ("full depth", point.full_depth, point.full_depth_interval, 1.0),
    ):
        ends = "{:.1f} to {:.1f}".format(*interval) if interval else ""
        lines.append(f"{name:<42}{score:12.1f}{ends:>15}   {share:12.2f}")
    lines.append(f"early exit at threshold {point.threshold:.6g}")
    if point.majority is not None and point.full_depth_interval and point.full_depth_interval[0] <= point.majority:
        always = f"always answering the most frequent label ({point.majority:.1f})"
        lines.append(f"full depth may be no better than {always}: the promise, relative to it, may be worth nothing")
    if not point.share:
        lines.append("all texts leave at exit 0: nothing need be sent to the model")
    if point.share > MANY:
        saved = f"only {100 * (1 - point.share):.0f}% of the layers" if point.share < 1 else "nothing"
        more = "more rows, texts without labels (--unlabelled) or a larger --max-lost let more texts leave"
        lines.append(f"early exit saves {saved}: {more}; full depth alone loses no answer and takes about as long")
    judges = f"{point.judging_texts:,} of {record.validation_rows:,} validation rows judge, one of each text and group"
    return [*lines, f"{judges}; a quarter proposes thresholds", promise_of(cascade, point, record)]


def comparison(cascade: Cascade, point: OperatingPoint, answers: Answers) -> list[str]:
    """Lines that compare other texts' results with those stated, say if the promise held, and score each class."""
    measured = promise.measure(cascade.threshold, answers)
    has_labels, was_labelled = answers.is_labelled.any(), point.majority is not None
    is_chosen = cascade.threshold == point.threshold
    lines = [f"{len(answers.labels):,} rows, threshold {cascade.threshold:.6g}"]
    lines.append(f"{'':<26}{'here':>8}   95% interval{'stated':>15}")
    titles = {"score": "accuracy", "full_depth": "full depth", "macro_f1": "macro F1"} if has_labels else {}
    for key, title in (titles | {"lost": "lost, of 100 texts", "share": "share of the layers"}).items():
        ends = measured.get(f"{key}_interval")
        interval = "{:6.2f} to {:6.2f}".format(*ends) if ends else " " * 16
        is_stated = is_chosen and (key in ("lost", "share") or was_labelled)
        lines.append(f"{title:<26}{measured[key]:8.2f}   {interval}" + f"{getattr(point, key):12.2f}" * is_stated)
    if is_chosen and point.threshold < 1 and point.precision == str(cascade.precision or torch.float32):
        verdict, needed = "held here", promise.texts_needed(point.goal)[0]
        if measured["judging_texts"] < needed:
            verdict = f"too few texts to tell whether it holds; about {needed:,} suffice if none is lost"
        elif measured["lost"] > point.goal.max_lost:
            missing = "" if answers.is_labelled.all() else "because labels are missing, "
            verdict = f"not held here: by chance, {missing}or these texts come from another source"
        lines.append(f"promised: at most {point.goal.max_lost:g} of 100 lost, {point.goal.sure:g}% sure; {verdict}")
    if has_labels:
        lines += ["", f"{'class':<25}{'precision':>10}{'recall':>8}{'F1':>8}{'rows':>8}"]
        for label, *scores, count in zip(cascade.labels, *measured["per_class"].values(), strict=True):
            lines.append(f"{one_line(label, 24):<25}" + "{:10.1f}{:8.1f}{:8.1f}{:8,}".format(*scores, count))
    return lines
