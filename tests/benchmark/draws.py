"""How often what evaluate.py states and promises comes true: draws of rows from evaluated runs with many of them.

    python -m tests.benchmark.draws RUN [RUN ...] [--draws 600]

Prints the table of .github/results/promises.md. A run's validation rows are the pool: all texts that there are, so that
the truth of a threshold is known. Each draw chooses an operating point on a few of them, with replacement. Two standard
errors of 600 draws are 1.8 points at 95%, 2.4 at 90% and 3.7 at 70%.
"""

from pathlib import Path

import numpy as np
import torch

from minisweet.base.commands import Parser, whole_number
from minisweet.evaluation.answers import AnsweredRows, load_answers
from minisweet.evaluation.metrics import score
from minisweet.evaluation.operating import deal, limit_of, operating_point
from minisweet.paper.report import table
from minisweet.runs.folders import read_evaluation, read_record
from tests.benchmark import run_study

INTERVALS = {"score": "score_interval", "loss": "loss_interval", "speedup_ratio": "speedup_interval"}
LOSS, CHANGE, SPEED = {"max_loss": 1.0, "sure": 70.0}, {"max_change": 3.0, "sure": 90.0}, {"speed": 0.5}
SURER = [LOSS | {"sure": sure} for sure in (90.0, 95.0)]
CELLS = (  # which exits of all, rows, how often each text stands there, and whether other goals are tried too
    ([0, -1], 61, 1, True),
    ([0, -1], 239, 1, True),
    ([0, -1], 1001, 1, True),
    ([0, -1], 1001, 3, False),
    (None, 239, 1, False),
    (None, 1001, 1, False),
)
HEAD = "pool | exits | rows | `--max-loss 1 --sure 70`: layers | lost | broken | at 90, 95 | intervals held"
HEAD += " | `--max-change 3 --sure 90`: layers | broken | held | `--speed 0.5`: lost | held"


def outcome(pool: AnsweredRows, rows: int, times: int, goal: dict, seed: int) -> list[float]:
    """One draw: the true share of the layers and points lost; whether the goal is broken; which intervals held."""
    texts = np.random.default_rng(seed).integers(len(pool.labels), size=rows // times)
    keys = torch.arange(len(texts)).repeat_interleave(times)  # each that is drawn is a text of its own
    drawn = pool.take(texts.repeat(times))._replace(keys=keys)
    rule, point = operating_point(drawn, goal, deal(drawn))
    exits = [list(pool.exits.layers).index(n) for n in point["asked_exits"]]
    _, (answers,), (costs,) = pool.decide_at(rule, exits, [point["threshold"]])
    labels, full = pool.labels.numpy(), pool.logits[-1].argmax(-1).numpy()
    truth = {"score": score(answers, labels, pool.metric), "speedup_ratio": costs.mean()}
    truth["loss"] = score(full, labels, pool.metric) - truth["score"]
    held = [point[ends][0] - 1e-4 <= truth[key] <= point[ends][1] + 1e-4 for key, ends in INTERVALS.items()]
    missed = 100 * (answers != full).mean() if "max_change" in goal else truth["loss"]
    return [truth["speedup_ratio"], truth["loss"], "sure" in goal and missed > limit_of(goal) + 1e-9, *held]


def row_of(name: str, pool: AnsweredRows, rows: int, times: int, more: bool, draws: int) -> list[str]:
    """A row of the table."""

    def found(goal: dict) -> tuple[np.ndarray, str]:
        """The means over all draws, and the percentages of held intervals as text."""
        each = np.array([outcome(pool, rows, times, goal, seed) for seed in range(draws)], dtype=float).mean(0)
        return each, ", ".join(f"{100 * share:.1f}" for share in each[3:])

    (loss, held), (change, change_held) = found(LOSS), found(CHANGE)
    surer = [f"{100 * found(goal)[0][2]:.1f}" for goal in SURER] if more else []
    cells = [name, ",".join(map(str, pool.exits.layers)), f"{rows:,}" + f", {times} each" * (times > 1)]
    cells += [f"{loss[0]:.2f}", f"{loss[1]:.2f}", f"{100 * loss[2]:.1f}", ", ".join(surer), held]
    cells += [f"{change[0]:.2f}", f"{100 * change[2]:.1f}", change_held]
    if more:
        speed, speed_held = found(SPEED)
        cells += [f"{speed[1]:.2f}", speed_held]
    return cells


def main() -> None:
    """Print the table of some runs."""
    parser = Parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--draws", type=whole_number(1), default=600)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(table("", HEAD.split(" | "), []), end="")
    for run in args.runs:
        pool = load_answers(run, read_evaluation(run), read_record(run))
        for exits, *cell in CELLS:
            exits = exits or list(range(len(pool.logits)))
            layers = [pool.exits.layers[k] for k in exits]
            some = pool._replace(logits=pool.logits[exits], exits=pool.exits._replace(layers=layers))
            row = row_of(run.name, some, *cell, args.draws)
            print(table("", HEAD.split(" | "), [row]).splitlines()[-1], flush=True)


if __name__ == "__main__":
    run_study(main)
