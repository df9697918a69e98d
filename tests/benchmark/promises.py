"""How often what is promised and stated comes true, end to end: draws of files of texts whose truth is known.

    python -m tests.benchmark.promises [--draws 1000] [--write]

A pool is all texts that there are: validation rows of three runs. A draw takes some with replacement, each as one of
its own. As in a run, some are set aside, and all is chosen by the default goal. At what is deployed then, the whole
pool says what comes true.

Dimension letters: N rows, U distinct texts, G units, C classes.
"""

from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open

from minisweet.base.commands import Parser, number, run_command
from minisweet.classifier.cascade import answers_of
from minisweet.classifier.promise import Goal, by_text, choose, lost_texts
from minisweet.classifier.split import UNLABELLED_PER_JUDGE, deal_roles, dealt
from tests.benchmark import CLASSIFIER, commit, write_rows

GOAL = Goal()
STATED = ("lost", "share", "score", "full_depth")
HEAD = "judges broken lost layers score full_depth held_lost held_layers held_score held_full_depth".split()
OFTEN = 50  # texts that are repeated


class Pool(NamedTuple):
    """N rows of texts, or of a file that is drawn of them."""

    logits: torch.Tensor  # (2, N, C), of the bag of words and of the model
    labels: np.ndarray  # (N,), -1 for a row without one
    keys: np.ndarray  # (N,), equal for rows of one text
    units: np.ndarray  # (N,), equal for rows of one group

    def take(self, rows: np.ndarray) -> "Pool":
        """Some of the rows (n,)."""
        return Pool(self.logits[:, rows], *(part[rows] for part in self[1:]))


class Line(NamedTuple):
    """A kind of draws. The texts of its pool are counted from 0 by its keys, and groups of them by its units."""

    name: str
    pool: Pool
    labelled: int  # units that are drawn with labels
    unlabelled: int = 0  # and without
    dev_size: float = 0.2
    combines: bool = False
    by_group: bool = True
    repeated: float = 0.0  # share of new texts that repeat some


def set_aside(line: Line, seed: int, rng: np.random.Generator, often: np.ndarray) -> Pool:
    """The rows of a drawn file that are set aside. One that has no label there has -1."""
    pool, count, sizes = line.pool, line.labelled + line.unlabelled, np.bincount(line.pool.units)
    again, nth = rng.random(count) < line.repeated, np.arange(count)
    drawn = np.where(again, rng.choice(often, count), rng.integers(len(sizes), size=count))
    copies = np.where(again, count + drawn, nth) + seed * (count + len(sizes))  # dealt anew in each draw
    places, starts, many = np.arange(sizes.max()), sizes.cumsum() - sizes, sizes[drawn]
    file = pool.take((starts[drawn, None] + places)[places < many[:, None]])
    units, is_labelled = np.repeat(copies, many), np.repeat(nth < line.labelled, many)
    keys, kept = units * len(pool.keys) + file.keys, np.zeros(len(units), dtype=bool)
    units = units if line.by_group else keys
    sides = {"set aside": (is_labelled, line.dev_size), "unlabelled": (~is_labelled, 1 / UNLABELLED_PER_JUDGE)}
    for purpose, (side, share) in sides.items():
        kept[side] = dealt(units[side], round(share * len(np.unique(units[side]))), purpose)
    labels = np.where(is_labelled, file.labels, -1)
    return file._replace(labels=labels, keys=keys, units=units).take(np.flatnonzero(kept))


def outcome(line: Line, seed: int) -> list[float]:
    """One draw: the judges; in percent whether the promise is broken, what comes true, and which intervals held."""
    pool, rng = line.pool, np.random.default_rng(seed)
    units = (pool.units if line.by_group else pool.keys)[np.unique(pool.keys, return_index=True)[1]]  # of texts: (U,)
    sizes = np.bincount(units)  # (G,)
    aside = set_aside(line, seed, rng, often := rng.permutation(len(sizes))[:OFTEN])
    roles = deal_roles(aside.keys, aside.units, aside.labels)
    point = choose(aside.logits, aside.labels, aside.keys, roles, GOAL, line.combines)
    answers, at = answers_of(pool.logits, point.rule, pool.labels, pool.keys), [point.threshold]
    right = by_text(pool.keys, np.concatenate([answers.decide_at(at), [answers.full]]) == pool.labels)
    values = 100 * np.stack([*lost_texts(answers, at), *by_text(pool.keys, answers.stay_at(at)), *right])  # (4, U)
    weights = np.full(len(sizes), (1 - line.repeated) / len(sizes))
    weights[often] += line.repeated / OFTEN
    truth = values @ (weights / sizes)[units]
    ends = np.array([getattr(point, f"{name}_interval") for name in STATED]).T * [1, 100, 1, 1]
    held = (ends[0] - 1e-6 <= truth) & (truth <= ends[1] + 1e-6)
    return [point.judging_texts, 100 * (truth[0] > GOAL.max_lost), *truth, *(100 * held)]


def repeated_rows(pool: Pool, rng: np.random.Generator, are_groups: bool) -> Pool:
    """Up to eight rows of groups that may be lost and of texts that may not, else four; one in ten is as another's."""
    differ = (pool.logits[0].argmax(-1) != pool.logits[1].argmax(-1)).numpy()
    units = np.repeat(np.arange(len(differ)), rng.integers(1, np.where(differ == are_groups, 9, 5)))
    rows = np.where(rng.random(len(units)) < 0.1, rng.integers(len(differ), size=len(units)), units)
    groups = pool.take(rows)._replace(keys=np.arange(len(rows)), units=units)
    return groups if are_groups else pool.take(units)._replace(labels=groups.labels)


def lines() -> list[Line]:
    """All kinds of draws."""
    two, some, found = {}, (300, 4700), []
    with safe_open(CLASSIFIER / "pools.safetensors", "pt") as file:
        for key, name in (("sst2", "SST-2"), ("qqp", "QQP"), ("own", "Debian-12")):
            logits, labels = file.get_tensor(f"{key}.logits"), file.get_tensor(f"{key}.labels").long().numpy()
            texts = np.arange(len(labels))
            two[name] = Pool(logits.float(), labels, texts, texts)  # a text a row
    for name, pool in two.items():
        found += [Line(f"{name}, {n:,}", pool, n) for n in (1600, 6000)]
        found.append(Line(f"{name}, 300 and 4,700 unlabelled", pool, *some))
    own, rng = two["Debian-12"], np.random.default_rng(0)
    rows, own_groups = (repeated_rows(own, rng, are_groups) for are_groups in (False, True))
    found.append(Line("Debian-12, 1,200 and 3,800 unlabelled", own, 1200, 3800))
    say, groups = "Debian-12, with the bag's logits, ", "Debian-12, groups, "
    found.append(Line(f"{say}1,600", own, 1600, combines=True))
    found.append(Line("Debian-12, several rows of a text, 1,600 texts", rows, 1600))
    found.append(Line(f"{groups}`--group-column`, 1,600 groups", own_groups, 1600))
    found.append(Line(f"{groups}without the option, 1,600 groups", own_groups, 1600, by_group=False))
    dev_data = f"{groups}without the option, 300 by `--dev-data`"
    found.append(Line(dev_data, own_groups, 300, dev_size=1.0, by_group=False))
    often = "a fifth repeats 50 texts, 6,000"
    return [*found, *(Line(f"{name}, {often}", pool, 6000, repeated=0.2) for name, pool in two.items())]


def main() -> None:
    """Print what came out of each kind of draws, or write promises.csv."""
    parser = Parser(__doc__)
    parser.add_argument("--draws", type=number(int, 1), default=1000)
    parser.add_argument("--write", action="store_true")
    args, rows = parser.parse_args(), []
    torch.set_num_threads(1)
    for line in lines():
        means = np.mean([outcome(line, seed) for seed in range(args.draws)], axis=0).round(1).tolist()
        row = {"texts": line.name, "draws": args.draws} | dict(zip(HEAD, means, strict=True))
        rows.append(row | {"commit": commit()})
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    if args.write:
        write_rows(CLASSIFIER / "promises.csv", rows)


if __name__ == "__main__":
    run_command(main)
