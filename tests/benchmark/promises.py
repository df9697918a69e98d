"""How often what is promised and stated comes true, end to end: draws of files of texts whose truth is known.

    python -m tests.benchmark.promises FOLDER [--draws 1000] [--write]

FOLDER is an unpacked zero.tar.xz. A pool is all texts that there are: rows of the archive's runs, or made-up ones. A
draw takes some with replacement, each as one of its own. As in a run, some are set aside, all is chosen by the default
goal, and labels are asked for. At what is deployed then, the whole pool says what comes true. Letters: N rows, T
distinct texts, U units, K exits, C classes.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from minisweet.adaptive import Exits
from minisweet.base.commands import Parser, whole_number
from minisweet.classifier.split import JUDGE_IN
from minisweet.texts import dealt
from minisweet.classifier.promise import choose, lost_texts
from minisweet.outputs import Outputs
from minisweet.paper.report import table
from minisweet.classifier.label import to_ask
from tests.benchmark import run_study, show
from tests.benchmark.archive import read_outputs

GOAL = {"max_lost": 3.0, "sure": 90.0}
STATED = ("lost", "share", "score", "full_depth")
HEAD = "texts|judges|broken|lost|layers|score|full depth|held: lost|layers|score|full depth".split("|")
_, _, HELPFUL, ALL = GIVEN = ("", ", 20 labels by `label`", ", the 20 labels that help most", ", all labels")
OFTEN = 50  # texts that are repeated


class Line(NamedTuple):
    """A line of the table. The texts of its pool are counted from 0 by its keys, and groups of them by its units."""

    name: str
    pool: Outputs
    labelled: int  # units that are drawn with labels
    others: int = 0  # and without
    dev_size: float = 0.2
    given: str = ""  # of GIVEN: which labels are given on request
    combine: bool = False
    by_group: bool = True
    repeated: float = 0.0  # share of new texts that repeat some


def set_aside(line: Line, seed: int, rng: np.random.Generator, often: np.ndarray) -> Outputs:
    """The rows of a drawn file that are set aside. One that has no label there has -2 - its label."""
    pool, count, sizes = line.pool, line.labelled + line.others, np.bincount(line.pool.units)
    again, nth = rng.random(count) < line.repeated, np.arange(count)
    drawn = np.where(again, rng.choice(often, count), rng.integers(len(sizes), size=count))
    copies = np.where(again, count + drawn, nth) + seed * (count + len(sizes))  # dealt anew in each draw
    places, starts, many = np.arange(sizes.max()), sizes.cumsum() - sizes, sizes[drawn]
    file = pool.take((starts[drawn, None] + places)[places < many[:, None]])
    units, is_labelled = np.repeat(copies, many), np.repeat(nth < line.labelled, many)
    keys, kept = units * len(pool.keys) + file.keys.numpy(), np.zeros(len(units), dtype=bool)
    units = units if line.by_group else keys
    sides = {"set aside": (is_labelled, line.dev_size), "unlabelled": (~is_labelled, 1 / JUDGE_IN)}
    for purpose, (side, share) in sides.items():
        kept[side] = dealt(units[side], round(share * len(np.unique(units[side]))), purpose)
    keys, units, is_labelled = map(torch.from_numpy, (keys, units, is_labelled))
    labels = file.labels.where(is_labelled, -2 - file.labels)
    return file._replace(labels=labels, keys=keys, units=units).take(np.flatnonzero(kept))


def outcome(line: Line, seed: int) -> list[float]:
    """One draw: the judges; in percent whether the promise is broken, what comes true, and which intervals held."""
    pool, labels, rng = line.pool, {}, np.random.default_rng(seed)
    units = (pool.units if line.by_group else pool.keys)[np.unique(pool.keys, return_index=True)[1]]  # of texts: (T,)
    sizes = np.bincount(units)  # (U,)
    file = set_aside(line, seed, rng, often := rng.permutation(len(sizes))[:OFTEN])
    outputs, hidden = file._replace(labels=file.labels.clamp(min=-1)), -2 - file.labels
    if line.given:
        record = SimpleNamespace(trained_keys=[], combines=line.combine)
        run = SimpleNamespace(point=SimpleNamespace(goal=GOAL, share=1.0), outputs=outputs, labels={}, record=record)
        rows = torch.tensor(to_ask(run, len(hidden))[0], dtype=torch.int64)
        rows = rows[(file.logits[-1].argmax(-1) != hidden)[rows]] if line.given == HELPFUL else rows
        rows = hidden >= 0 if line.given == ALL else rows[:20]
        labels = dict(zip(file.keys[rows].tolist(), hidden[rows].tolist(), strict=True))
    point = choose(outputs, GOAL, labels=labels, combine=line.combine)
    asked = [pool.exits.layers.index(n) for n in point.exits]
    its = pool._replace(logits=point.rule.all_calibrated(pool.logits[asked]), exits=pool.exits.take(asked))
    _, (answers,), (costs,) = its.decide_at(range(len(asked)), [point.threshold])
    right = its.of_texts(np.stack([answers, its.logits[-1].argmax(-1)]) == its.labels.numpy())
    values = 100 * np.stack([lost_texts(its, answers), its.of_texts(costs), *right])  # (4, T)
    weights = np.full(len(sizes), (1 - line.repeated) / len(sizes))
    weights[often] += line.repeated / OFTEN
    truth = values @ (weights / sizes)[units]
    ends = np.array([getattr(point, f"{name}_interval") for name in STATED]).T * [1, 100, 1, 1]
    held = (ends[0] - 1e-6 <= truth) & (truth <= ends[1] + 1e-6)
    return [point.judging_texts, 100 * (truth[0] > GOAL["max_lost"]), *truth, *(100 * held)]


def repeated_rows(pool: Outputs, rng: np.random.Generator, are_groups: bool) -> Outputs:
    """Up to eight rows of groups that may be lost and of texts that may not, else four; one in ten is as another's."""
    differ = (pool.logits[0].argmax(-1) != pool.logits[-1].argmax(-1)).numpy()
    units = np.repeat(np.arange(len(differ)), rng.integers(1, np.where(differ == are_groups, 9, 5)))
    rows = np.where(rng.random(len(units)) < 0.1, rng.integers(len(differ), size=len(units)), units)
    groups = pool.take(rows)._replace(keys=torch.arange(len(rows)), units=torch.from_numpy(units))
    return groups if are_groups else pool.take(units)._replace(labels=groups.labels)


def made_up(chances: np.ndarray, rng: np.random.Generator, exits: int = 1) -> Outputs:
    """Texts of which full depth has 95 of 100 right in the first five classes, and 5 in the others. The surer an early
    exit is, the more often it says the same. Of several exits each does, but in a class of its own.
    """
    N, C, layers = 4000, len(chances), [*range(exits), 24]
    labels, sure, texts = rng.choice(C, N, p=chances / chances.sum()), rng.uniform(0.5, 0.99, N), torch.arange(N)
    full_depth = np.where(rng.random(N) < np.where(labels < 5, 0.95, 0.05), labels, rng.integers(5, size=N))
    same = [labels != k for k in range(exits)] if exits > 1 else [rng.random(N) < sure]
    answers = np.stack([*(np.where(its, full_depth, 4) for its in same), full_depth])  # (K, N)
    certain = torch.from_numpy(np.log(sure / (1 - sure) * (C - 1))).float()[:, None]
    logits, its = F.one_hot(torch.from_numpy(answers), C) * certain, Exits(layers, [0.0] * (exits + 1), 24, False)
    return Outputs(logits, None, torch.from_numpy(labels), texts, "accuracy", its, units=texts)


def lines_of(folder: Path) -> list[Line]:
    """The lines of the table."""
    rng, two, more, some = np.random.default_rng(0), {}, {}, (300, 4700)
    for name, path in (("SST-2", "records/sst2"), ("QQP", "records/qqp"), ("own text", "base/records/own")):
        its = read_outputs(folder / f"{path}-0-branch")
        its = its._replace(keys=torch.arange(len(its.keys)), units=torch.arange(len(its.keys)))  # a text a row
        for kept, exits in ((two, [0, -1]), (more, [0, 2, 3, -1])):
            kept[name] = its._replace(logits=its.logits[exits], exits=its.exits.take(exits))
    own, found = two["own text"], []
    for name, its in two.items():
        found += [Line(f"{name}, {n:,}", its, n) for n in (1600, 6000)]
        found += [Line(f"{name}, 300 and 4,700 others{given}", its, *some, given=given) for given in GIVEN]
    rows, groups = (repeated_rows(own, rng, are_groups) for are_groups in (False, True))
    few, many = (made_up(np.repeat([n / 5, 1], [5, n]), rng) for n in (200, 700))  # half of the texts are rare
    zipf, four = made_up(1 / np.arange(1, 151), rng), made_up(np.repeat([0.04, 0.84], [4, 1]), rng, exits=4)
    return [
        *found,
        Line("own text, 1,200 and 3,800 others", own, 1200, 3800),
        *(Line(f"{name}, three early exits, 1,600", its, 1600) for name, its in more.items()),
        Line("own text, exit 0 has a say, 1,600", own, 1600, combine=True),
        Line(f"own text, exit 0 has a say, 300 and 4,700 others{ALL}", own, *some, given=ALL, combine=True),
        Line("own text, several rows of a text, 1,600 texts", rows, 1600),
        Line("own text, groups, `--group-column`, 1,600 groups", groups, 1600),
        Line(f"own text, groups, `--group-column`, 300 and 4,700 others{ALL}", groups, *some, given=ALL),
        Line("own text, groups, without the option, 1,600 groups", groups, 1600, by_group=False),
        Line("own text, groups, without the option, 300 by `--dev-data`", groups, 300, dev_size=1.0, by_group=False),
        *(Line(f"{name}, a fifth repeats 50 texts, 6,000", its, 6000, repeated=0.2) for name, its in two.items()),
        *(Line(f"200 rare classes, 1,000, `--dev-size {n}`", few, 1000, dev_size=n) for n in (0.1, 0.2)),
        *(Line(f"150 classes by Zipf's law, 2,000, `--dev-size {n}`", zipf, 2000, dev_size=n) for n in (0.05, 0.2)),
        Line("700 rare classes, 2,200, `--dev-size 0.2`", many, 2200),
        Line("four early exits made up, 1,200 by `--dev-data`", four, 1200, dev_size=1.0),
    ]


def main() -> None:
    """Print the table, or write it to its page."""
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--draws", type=whole_number(1), default=1000)
    parser.add_argument("--write", action="store_true")
    args, rows = parser.parse_args(), []
    torch.set_num_threads(1)
    for line in lines_of(args.folder):
        judges, *found = np.mean([outcome(line, seed) for seed in range(args.draws)], axis=0)
        rows.append([line.name, f"{judges:,.0f}", *(f"{value:.1f}" for value in found)])
    show({"promises": table("", HEAD, rows)}, args.write)


if __name__ == "__main__":
    run_study(main)
