"""How often what is promised and stated comes true: draws of texts from runs with many validation rows.

    python -m tests.benchmark.promises RECORD [RECORD ...] [--draws 1000]

Prints the table of .github/results/promises.md. The records are of the archive. A run's validation rows are the pool:
all texts that there are, so that the truth is known. A draw takes some, with replacement and each as a text of its own,
and chooses by the default goal among the first and the last exit. Two standard errors of 1,000 draws are 1.9 points at
10%, and 1.4 at 95%.
"""

from pathlib import Path

import numpy as np
import torch

from minisweet.base.commands import Parser, whole_number
from minisweet.evaluation.operating import choose, stated
from minisweet.outputs import Outputs
from minisweet.paper.report import table
from tests.benchmark import run_study
from tests.benchmark.archive import read_outputs

GOAL = {"max_lost": 3.0, "sure": 90.0}
ROWS = {240: 320, 1000: 1334}  # texts that judge, and all that are drawn
STATED = ("score", "full_depth", "lost", "share")
HEAD = ("pool", "judging", "broken", "intervals held: score", "full depth", "lost", "share", "layers", "net loss")


def outcome(pool: Outputs, rows: int, seed: int) -> list[float]:
    """One draw: whether the promise is broken, which intervals held, the share of the layers and the net loss."""
    drawn = pool.take(np.random.default_rng(seed).integers(len(pool.keys), size=rows))
    point = choose(drawn._replace(keys=torch.arange(rows)), GOAL)
    asked = [pool.exits.layers.index(n) for n in point.exits]
    some = pool._replace(logits=pool.logits[asked], exits=pool.exits.take(asked), keys=torch.arange(len(pool.keys)))
    truth = stated(point.rule, range(len(asked)), point.threshold, some, some)
    ends = [getattr(point, f"{name}_interval") for name in STATED]
    held = [low - 1e-9 <= truth[name] <= high + 1e-9 for name, (low, high) in zip(STATED, ends, strict=True)]
    return [truth["lost"] > GOAL["max_lost"], *held, truth["share"], truth["full_depth"] - truth["score"]]


def main() -> None:
    """Print the table of some runs."""
    parser = Parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RECORD")
    parser.add_argument("--draws", type=whole_number(1), default=1000)
    args, lines = parser.parse_args(), []
    torch.set_num_threads(1)
    for run in args.runs:
        pool = read_outputs(run)
        pool = pool._replace(logits=pool.logits[[0, -1]], exits=pool.exits.take([0, -1]))
        for judging, rows in ROWS.items():
            broken, *held, share, loss = np.mean([outcome(pool, rows, seed) for seed in range(args.draws)], axis=0)
            percent = [f"{100 * value:.1f}" for value in (broken, *held)]
            lines.append([run.name, f"{judging:,}", *percent, f"{share:.2f}", f"{loss:.2f}"])
    print(table("", HEAD, lines), end="")


if __name__ == "__main__":
    run_study(main)
