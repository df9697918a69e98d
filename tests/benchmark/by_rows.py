"""What to use, by how many labelled rows there are: how right it is on other rows, of three draws of the rows.

    python -m tests.benchmark.by_rows --tasks list,own,sst2 [--rows 300,1200,6000] [--unlabelled 0,5000]
        [--list LIST.csv] [--own TRAIN.csv TEST.csv]

Ours is what `EarlyExitClassifier().fit` makes of the rows. With --unlabelled so many further rows of the draw go
without their labels. Each draw adds rows to the page's results.csv, and is not made again where it has them.
"""

import argparse
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np

from minisweet import EarlyExitClassifier
from minisweet.base.commands import Parser, list_of, number, run_command
from minisweet.base.files import InputError
from minisweet.classifier.operating_point import classification_report
from minisweet.hub import home
from minisweet.tasks import load_examples
from minisweet.texts import Examples
from tests.benchmark import CLASSIFIER, commit, read_rows, write_rows
from tests.benchmark.linear import RIVALS, TFIDF, fit_rival

SMALL = "minilm-l6"
TEST_ROWS, LIST_TEST_ROWS = 2500, 5000  # at most
GOAL, STRICT = 3, 1  # of 100 texts may be lost; the first is the default


def measure(classify: EarlyExitClassifier, labelled: Examples, more: Examples, test: Examples) -> Iterator[dict]:
    """The rows of a draw, a way each."""
    right, C = np.array(test.labels), max(test.labels + labelled.labels) + 1

    def row(way: str, answers: np.ndarray, share: float, **about: object) -> dict:
        found = {"way": way, "goal": "", "score": 100 * float((answers == right).mean())}
        found["macro_f1"] = float(np.mean(classification_report(answers, right, C)["f1"]))
        found |= {"share": share, "lost": ""}
        precision = "float32" if way in RIVALS else classify.state.trained.record.precision.removeprefix("torch.")
        return found | {"minutes": "", "precision": precision, "commit": commit()} | about

    def deployed(**about: object) -> dict:
        (early,), (stays,) = (choice([classify.state.threshold]) for choice in (answers.decide_at, answers.stay_at))
        lost = 100 * float(((answers.full == right) & (early != right)).mean())
        return row("deployed", early, float(stays.mean()), lost=lost, **about)

    started = time.perf_counter()
    classify.fit(labelled.first, labelled.labels, unlabelled=more.first or None)
    minutes = (time.perf_counter() - started) / 60
    state = classify.state
    answers = state.ask(state.tokenize(test.first))
    yield row("exit 0", answers.early, 0.0)
    yield row("full depth", answers.full, 1.0, minutes=minutes)
    for goal in (STRICT, GOAL):
        classify.choose(max_lost=goal)
        yield deployed(goal=goal)
    for name in RIVALS:
        started = time.perf_counter()
        answer = fit_rival(name, labelled)
        yield row(name, answer(test), float(name != TFIDF), minutes=(time.perf_counter() - started) / 60)


def draw(task: str, args: argparse.Namespace, seed: int) -> tuple[Examples, Examples]:
    """The rows of a draw in their order, and those to test on."""
    if task not in ("own", "list"):
        rows, test = (load_examples(task, split, home() / "data") for split in ("train", "dev"))
    elif not (paths := args.own if task == "own" else args.list and [args.list]):
        raise InputError(f"--tasks: {task} needs --{task}")
    else:
        files = [read_rows(path.resolve(strict=True)) for path in paths]
        labels = sorted({row["label"] for row in files[0]})
        parts = [([row["text"] for row in file], None, [labels.index(row["label"]) for row in file]) for file in files]
        rows, test = Examples(*parts[0]), Examples(*parts[1]) if parts[1:] else None
    order = np.random.default_rng(seed).permutation(len(rows.first)).tolist()
    if test is None:  # both are drawn of the same
        return rows.take(order[LIST_TEST_ROWS:]), rows.take(order[:LIST_TEST_ROWS])
    return rows.take(order), test.take(np.random.default_rng(0).permutation(len(test.first))[:TEST_ROWS].tolist())


def main() -> None:
    """Make what is missing."""
    parser = Parser(__doc__)
    option = parser.add_argument
    option("--tasks", type=list_of(str, ("list", "own", "sst2")), required=True)
    option("--list", type=Path)
    option("--own", type=Path, nargs=2, metavar=("TRAIN", "TEST"))
    option("--rows", type=list_of(number(int, 10)), default=[300, 1200, 6000])
    option("--unlabelled", type=list_of(number(int, 0)), default=[0])
    option("--seeds", type=list_of(number(int, 0)), default=[0, 1, 2])
    args, results = parser.parse_args(), CLASSIFIER / "results.csv"
    for task, seed in product(args.tasks, args.seeds):
        rows, test = draw(task, args, seed)
        for count, more in product((min(count, len(rows.first)) for count in args.rows), args.unlabelled):
            labelled, some = rows.take(range(count)), rows.take(range(len(rows.first))[count : count + more])
            key = {"texts": task, "labelled": count, "unlabelled": len(some.first), "draw": seed, "model": SMALL}
            there = read_rows(results)
            if any({name: str(value) for name, value in key.items()}.items() <= row.items() for row in there):
                continue
            classify = EarlyExitClassifier(model=SMALL, seed=seed)
            found = [key | row for row in measure(classify, labelled, some, test)]
            write_rows(results, [*there, *found])


if __name__ == "__main__":
    run_command(main)
