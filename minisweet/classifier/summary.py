"""What was chosen for a run, in a few lines."""

from dataclasses import replace
from pathlib import Path
from shlex import quote

from minisweet.classifier.deployed import OwnRun, fitted_of
from minisweet.classifier.operating_point import stated
from minisweet.classifier.promise import METRIC_NAMES, filled, scored
from minisweet.classifier.selection import choosers_and_judges, prepare
from minisweet.metrics import score


def summary(run: OwnRun, threshold: float | None = None, promise: str | None = None) -> str:
    """The scores of the bag of words, early exit and full depth, and what is promised of new text: a line each.

    For another threshold than the one that was chosen, early exit is measured again, and `promise` is the last line.
    """
    record, outputs, point, fitted = run.record, run.outputs, run.point, fitted_of(run.record)
    _, judging, known = choosers_and_judges(outputs, record.trained_keys)
    rows = scored(outputs.take(judging) if len(judging) else outputs)
    if threshold is not None:
        trial = prepare(outputs, point.goal, record.trained_keys, point.exits, fitted.combines)
        measured = stated(trial.places, threshold, filled(trial.judges, run.given), scored(trial.judges))
        point = replace(point, threshold=threshold, **measured)
    layers = outputs.exits.layers
    costs = outputs.exits.keep_exits([layers.index(n) for n in point.exits]).costs(point.threshold)
    table, is_as_good = [("deployed", point.score, point.share), ("full depth", point.full_depth, costs[-1])], False
    if layers[0] == 0:
        of_bag = float(score(rows.logits[0].argmax(-1).numpy(), rows.labels.numpy(), rows.metric))
        table.insert(0, ("a bag of words alone (exit 0)", of_bag, 0.0))
        is_as_good = of_bag >= point.full_depth and rows.metric != "agreement"
    lines = [f"{'on new texts':<42}{METRIC_NAMES[rows.metric]:>12}   share of the layers"]
    lines += [f"{name:<42}{value:12.1f}   {share:12.2f}" for name, value, share in table]
    if is_as_good:
        lines.append("the bag of words alone is as good: nothing need be sent to the model")
    gain, difference = point.score - point.full_depth, "as full depth"
    if gain:
        difference = f"{gain:+.1f} points" if gain > 0 else f"{-gain:.1f} points less than full depth"
    exits = ", ".join(map(str, point.exits))
    lines.append(f"early exit: {difference}, at threshold {point.threshold:.6g}, exits {exits}")
    if point.threshold == 1:
        lines.append("no text leaves early: all run to the last exit")
    elif point.share == costs[0]:
        lines.append(f"all texts leave at {'exit 0' if point.exits[0] == 0 else 'the first exit'}")
    if known:
        lines.append(f"{known:,} of the validation rows were trained on, and do not count")
    return "\n".join([*lines, promise or point.in_words(len(fitted.exit_layers), fitted.set_aside)])


def print_choice(folder: Path, run: OwnRun) -> None:
    """Print what was chosen for the run in a folder, and what to do next."""
    print(f"\n{folder}:\n{summary(run)}")
    print(f"next: minisweet predict {quote(str(folder))} FILE.csv --out predicted.csv")
