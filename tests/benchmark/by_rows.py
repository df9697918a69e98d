"""What to use, by how many labelled rows there are: how right it is on other rows, of three draws of the rows.

    python -m tests.benchmark.by_rows --tasks list,long,own,sst2 [--rows 300,1200,6000] [--unlabelled 0,5000]
        [--list LIST.csv] [--long LONG.csv] [--own TRAIN.csv TEST.csv]

Ours is what `EarlyExitClassifier().fit` makes of the rows. With --unlabelled so many further rows of the draw go
without their labels. Each draw adds rows to the page's results.csv, and is not made again where it has them. Long texts
have groups: one text of each is tested, and none of such a group is learned from.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import numpy as np

from minisweet import EarlyExitClassifier
from minisweet.base.commands import Parser, list_of, number, run_command
from minisweet.base.files import InputError
from minisweet.classifier.cascade import answers_of, at_full_depth
from minisweet.classifier.promise import classification_report
from minisweet.hub import home
from minisweet.tasks import load_examples
from minisweet.texts import Examples
from tests.benchmark import CLASSIFIER, commit, read_rows, write_rows
from tests.benchmark.linear import RIVALS, TFIDF, fit_rival

SMALL = "minilm-l6"
TEST_ROWS, LIST_TEST_ROWS, LONG_TEST_ROWS = 2500, 5000, 2000  # at most
BINS = 10  # of the calibration error, with the same number of texts each
GOAL, STRICT = 3, 1  # of 100 texts may be lost; the first is the default


def calibration(confidence: np.ndarray, is_right: np.ndarray) -> dict[str, float]:
    """The expected calibration error of N answers, and the mean confidence, in percent."""
    parts = np.array_split(np.argsort(confidence, kind="stable"), BINS)
    gaps = [len(part) * abs(confidence[part].mean() - is_right[part].mean()) for part in parts if len(part)]
    return {"ece": 100 * sum(gaps) / len(confidence), "confidence": 100 * float(confidence.mean())}


def measure(
    classify: EarlyExitClassifier, labelled: Examples, more: Examples, test: Examples, rivals: Sequence[str] = RIVALS
) -> Iterator[dict]:
    """The rows of a draw, a way each."""
    right, C = np.array(test.labels), max(test.labels + labelled.labels) + 1

    def row(way: str, answers: np.ndarray, share: float, **about: object) -> dict:
        found = {"way": way, "goal": "", "score": 100 * float((answers == right).mean())}
        found["macro_f1"] = float(np.mean(classification_report(answers, right, C)["f1"]))
        found |= {"share": share, "lost": "", "ece": "", "confidence": ""}
        precision = "float32" if way in RIVALS else classify.record.precision.removeprefix("torch.")
        return found | {"minutes": "", "precision": precision, "commit": commit()} | about

    def deployed(**about: object) -> dict:
        (early,), (stays,) = (choice([classify.cascade.threshold]) for choice in (answers.decide_at, answers.stay_at))
        lost = 100 * float(((answers.full == right) & (early != right)).mean())
        told = calibration(np.where(stays, sure, answers.confidence.numpy()), early == right)
        return row("deployed", early, float(stays.mean()), lost=lost, **about, **told)

    started = time.perf_counter()
    unlabelled = {"unlabelled": more.first, "unlabelled_groups": more.groups} if more.first else {}
    classify.fit(labelled.first, labelled.labels, groups=labelled.groups, **unlabelled)
    minutes = (time.perf_counter() - started) / 60
    cascade = classify.cascade
    logits, rule = cascade.ask_both(texts := cascade.tokenize(test.first)), cascade.rule
    sure = at_full_depth(logits[0], logits[1], rule).softmax(-1).amax(-1).numpy()
    answers, names = answers_of(logits, rule, right, texts.keys), np.array(cascade.labels)  # few rows may lack a class
    answers = answers._replace(early=names[answers.early], full=names[answers.full])
    yield row("exit 0", answers.early, 0.0, **calibration(answers.confidence.numpy(), answers.early == right))
    yield row("full depth", answers.full, 1.0, minutes=minutes, **calibration(sure, answers.full == right))
    for goal in (STRICT, GOAL):
        classify.choose(max_lost=goal)
        yield deployed(goal=goal)
    for name in rivals:
        started = time.perf_counter()
        answer = fit_rival(name, labelled)
        yield row(name, answer(test), float(name != TFIDF), minutes=(time.perf_counter() - started) / 60)


def draw(task: str, args: argparse.Namespace, seed: int) -> tuple[Examples, Examples]:
    """The rows of a draw in their order, and those to test on."""
    if task == "sst2":
        rows, test = (load_examples(task, split, home() / "data") for split in ("train", "dev"))
    elif not (paths := {"own": args.own, "list": args.list, "long": args.long}[task]):
        raise InputError(f"--tasks: {task} needs --{task}")
    else:
        files = [read_rows(path.resolve(strict=True)) for path in paths]
        labels = sorted({row["label"] for row in files[0]})
        parts = [([row["text"] for row in file], None, [labels.index(row["label"]) for row in file]) for file in files]
        rows, test = Examples(*parts[0]), Examples(*parts[1]) if parts[1:] else None
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(rows.first)).tolist()
    if task == "long":
        groups = [row["group"] for row in files[0]]
        tested = dict.fromkeys(rng.permutation(sorted({*groups}))[:LONG_TEST_ROWS].tolist())
        tested |= {groups[row]: row for row in order if groups[row] in tested}  # one of each
        learned = [row for row in order if groups[row] not in tested]
        return rows._replace(groups=groups).take(learned), rows.take([*tested.values()])
    if test is None:  # both are drawn of the same
        return rows.take(order[LIST_TEST_ROWS:]), rows.take(order[:LIST_TEST_ROWS])
    return rows.take(order), test.take(np.random.default_rng(0).permutation(len(test.first))[:TEST_ROWS].tolist())


def main() -> None:
    """Make what is missing."""
    parser = Parser(__doc__)
    option = parser.add_argument
    option("--tasks", type=list_of(str, ("list", "long", "own", "sst2")), required=True)
    for name in ("--list", "--long"):
        option(name, type=Path, nargs=1)
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
            same = {name: str(key[name]) for name in ("texts", "labelled", "draw")}  # what rivals learn
            known = {row["way"] for row in there if same.items() <= row.items()}
            rivals = [name for name in RIVALS if name not in known]
            found = [key | row for row in measure(classify, labelled, some, test, rivals)]
            write_rows(results, [*there, *found])


if __name__ == "__main__":
    run_command(main)
