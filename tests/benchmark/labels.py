"""What a few labels buy: the layers run, what is lost, and accuracy on other rows, as `label` asks for more and more.

    python -m tests.benchmark.labels --data-dir DIR --own TRAIN.csv TEST.csv --out FOLDER [--tasks own,qqp] [--write]

Rows of by_rows.py go with and without their labels to `EarlyExitClassifier.fit`. Hidden labels are given in the order
in which `to_label` asks for them, ten at a time. FOLDER/labels keeps the numbers of each draw, and what is there is not
made again.
"""

from collections import defaultdict
from itertools import product

import numpy as np

from minisweet import EarlyExitClassifier
from minisweet.base.commands import Parser
from minisweet.base.files import read_json, write_json
from minisweet.data.text import Examples
from minisweet.paper.report import cells, table
from tests.benchmark import by_rows, run_study, show, study

LISTS = {"own": ((300, 4700), (1200, 3800)), "qqp": ((300, 5000),)}  # labelled rows, and others
LABELS, AT_ONCE = (0, 20, 50, 100), 10
COLUMNS = ("layers run, %", "lost", "accuracy", "full depth")


def measure(classify: EarlyExitClassifier, hidden: dict, test: Examples) -> dict[str, list[float]]:
    """At each number of labels: the labels that were given, and the columns, in percent."""
    full = EarlyExitClassifier.__new__(EarlyExitClassifier)
    full._deployed = classify.deployed._replace(threshold=1.0)
    right = np.array(test.labels)
    is_right, found, given = full.predict(test.texts()) == right, {}, 0
    for most in LABELS:
        while given < most and (texts := classify.to_label(min(AT_ONCE, most - given))):
            classify.choose(labels=(texts, [hidden[text] for text in texts]))
            given += len(texts)
        answers = classify.classify(test.texts())
        early = np.array([answer.label for answer in answers]) == right
        layers = np.mean([answer.exit_layer for answer in answers]) / classify.record.depth
        numbers = layers, (is_right & ~early).mean(), early.mean(), is_right.mean()
        found[str(most)] = [given, *(100 * float(number) for number in numbers)]
    return found


def main() -> None:
    """Make what is missing, and print or write the table."""
    parser = Parser(__doc__)
    parser.add_argument("--write", action="store_true")
    args = study.options_of(parser, list(LISTS))
    (args.out / "labels").mkdir(parents=True, exist_ok=True)
    rows = defaultdict(list)
    for task, seed in product(args.tasks, args.seeds):
        train, test, _ = by_rows.read(task, args.data_dir, args.own)
        order = np.random.default_rng(seed).permutation(len(train.first)).tolist()
        for count, more in LISTS[task]:
            numbers = args.out / "labels" / f"{task}-{count}-{more}-{seed}.json"
            if not numbers.exists():
                labelled, others = train.take(order[:count]), train.take(order[count : count + more])
                classify = EarlyExitClassifier(model=args.model, seed=seed)
                classify.fit(labelled.texts(), labelled.labels, unlabelled=others.texts())
                hidden = dict(zip(others.texts(), others.labels, strict=True))
                write_json(numbers, measure(classify, hidden, by_rows.draw(test, by_rows.TEST_ROWS, 0)))
            for most, values in read_json(numbers).items():
                rows[task, count, more, int(most)].append(values)
    lines = []
    for (task, count, more, most), values in sorted(rows.items()):
        name = f"{by_rows.NAMES[task]}, {count:,} and {more:,} others" if most == 0 else ""
        lines.append([name, most, *cells(np.array(values), deviation=True)])
    show({"labels": table("", ["labelled rows", "labels", "given", *COLUMNS], lines)}, args.write)


if __name__ == "__main__":
    run_study(main)
