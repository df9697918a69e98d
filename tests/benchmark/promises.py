"""Whether operating points keep what they promise: chosen on some validation rows of a run, and scored on the others.

    python evaluate.py RUN
    python -m tests.benchmark.promises RUN [--rows 240,872] [--draws 400]

For each wish, over random draws of so many rows: what is lost and run on the other rows; how often their loss and share
lie within the 95% intervals; how often a wish is broken there; and how often full depth is taken.
"""

from pathlib import Path

import numpy as np
import torch

from minisweet.base.commands import Parser, list_of, run_command, whole_number
from minisweet.base.safe import InputError
from minisweet.evaluation.operating import operating_point, stated
from minisweet.evaluation.sweep import Validation, load_validation
from minisweet.runs.folders import read_evaluation, read_record

WISHES = (
    {"max_loss": 1.0},
    {"speed": 0.5},
    {"max_change": 3.0, "sure": 90.0},
    {"max_change": 5.0, "sure": 90.0},
)


def some(validation: Validation, rows: np.ndarray) -> Validation:
    """These rows (n,) alone."""
    index = torch.from_numpy(rows)
    certainty = None if validation.certainty is None else validation.certainty[:, index]
    parts = {"logits": validation.logits[:, index], "labels": validation.labels[index], "keys": validation.keys[index]}
    return validation._replace(certainty=certainty, **parts)


def within(interval: list[float], value: float) -> bool:
    """Whether a value lies in an interval, but for rounding."""
    return interval[0] - 1e-9 <= value <= interval[1] + 1e-9


def kept(validation: Validation, wish: dict, size: int, draws: int) -> list[float]:
    """Mean loss and share elsewhere, and in percent of draws: loss within, share within, wish broken, full depth."""
    found, rng = [], np.random.default_rng(0)
    for _ in range(draws):
        order = rng.permutation(len(validation.labels))
        rule, point = operating_point(some(validation, order[:size]), "crossfit", wish)
        rest = some(validation, order[size:])
        there = stated(rule, rest, point["threshold"])
        own = rest._replace(labels=rest.logits[-1].argmax(-1), metric="agreement")
        loss, share, changed = there["loss"], there["speedup_ratio"], stated(rule, own, point["threshold"])["loss"]
        name, most = next(iter(wish.items()))
        percents = [within(point["loss_interval"], loss), within(point["speedup_interval"], share)]
        percents += [{"max_loss": loss, "speed": share, "max_change": changed}[name] > most, point["threshold"] == 1]
        found.append([loss, changed, share, *(100 * percent for percent in percents)])
    return np.mean(found, axis=0).tolist()


def main() -> None:
    """Print a row for each number of rows and wish."""
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, evaluated")
    parser.add_argument("--rows", type=list_of(whole_number(2)), default=[240, 872], help="drawn (default: 240,872)")
    parser.add_argument("--draws", type=whole_number(1), default=400, help="(default: 400)")
    args = parser.parse_args()
    record = read_record(args.run)
    if (evaluation := read_evaluation(args.run, record)) is None:
        raise InputError(f"{args.run}: has no evaluation.json; first: evaluate.py {args.run}")
    validation = load_validation(args.run, evaluation, record)
    N = len(validation.labels)
    print(f"{args.run}: {N:,} validation rows, {args.draws} draws\n")
    print("| rows | wish | points lost | percent changed | share | loss within | share within | broken | at 1 |")
    print("|---" * 9 + "|")
    for size in args.rows:
        if size >= N:
            raise InputError(f"--rows: {size}, should be fewer than the {N} validation rows")
        for wish in WISHES:
            lost, changed, share, *percents = kept(validation, wish, size, args.draws)
            name = ", ".join(f"{key} {value:g}" for key, value in wish.items())
            cells = " | ".join(f"{value:.0f}%" for value in percents)
            print(f"| {size} | {name} | {lost:.2f} | {changed:.2f} | {share:.3f} | {cells} |", flush=True)


if __name__ == "__main__":
    run_command(main)
