"""What was chosen for a run, in a few lines."""

from dataclasses import replace
from pathlib import Path
from shlex import quote

from minisweet.adaptive import in_float32
from minisweet.classifier.deployed import OwnRun, fitted_of
from minisweet.classifier.operating_point import measure
from minisweet.classifier.promise import METRIC_NAMES, scored
from minisweet.classifier.selection import prepare


def summary(run: OwnRun, threshold: float | None = None, promise: str | None = None) -> str:
    """The scores of the bag of words, early exit and full depth, and the promise about new text: a line each.

    For another threshold than the one that was chosen, early exit is measured again, and `promise` is the last line.
    """
    outputs, point, fitted = run.outputs, run.point, fitted_of(run.record)
    trial = prepare(outputs, point.goal, run.record.trained_keys, fitted.combines)
    if threshold not in (None, in_float32(point.threshold)):
        point = replace(point, threshold=threshold, **measure(threshold, trial.judges))
    table = [("a bag of words alone (exit 0)", measure(0.0, trial.judges)["score"], 0.0)]
    table += [("deployed", point.score, point.share), ("full depth", point.full_depth, 1.0)]
    metric = scored(trial.judges).metric
    title = "on new texts" if trial.has_judges else "on all validation rows, even if trained on"
    lines = [f"{title:<42}{METRIC_NAMES[metric]:>12}   share of the layers"]
    lines += [f"{name:<42}{value:12.1f}   {share:12.2f}" for name, value, share in table]
    gain = point.score - point.full_depth
    difference = f"{gain:+.1f} points compared with full depth" if gain else "the same score as full depth"
    lines.append(f"early exit: {difference}, at threshold {point.threshold:.6g}")
    support = point.per_class["support"]
    most = 100 * max(support) / max(1, sum(support))
    if metric == "accuracy" and point.full_depth <= most:
        lines.append(f"full depth is no better than the most frequent class ({most:.1f}): the promise is worth nothing")
    if point.threshold == 1:
        lines.append("no text leaves early: all run to the last exit")
    elif not point.share:
        lines.append("all texts leave at exit 0: nothing need be sent to the model")
    reasons = {
        "a quarter chooses the thresholds to try": trial.has_judges,
        "one text of each group judges": outputs.units is not None,
        "unlabelled texts do not": (outputs.labels < 0).any() and point.labelled_judges == point.judging_texts,
        f"{trial.left_out:,} were trained on": trial.left_out,
    }
    why = ", ".join(reason for reason, holds in reasons.items() if holds)
    lines.append(f"{point.judging_texts:,} of {len(outputs.labels):,} validation rows judge" + f": {why}" * (why != ""))
    return "\n".join([*lines, promise or point.in_words(fitted.set_aside)])


def print_choice(folder: Path, run: OwnRun) -> None:
    """Print what was chosen for the run in a folder, and what to do next."""
    print(f"\n{folder}:\n{summary(run)}")
    print(f"next: minisweet predict {quote(str(folder))} FILE.csv --out predicted.csv")
