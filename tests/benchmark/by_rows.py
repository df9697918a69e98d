"""What to use, by how many labelled rows there are: how right it is on other rows, of three draws of the rows.

    python -m tests.benchmark.by_rows --data-dir DIR --own TRAIN.csv TEST.csv --list LIST.csv --out FOLDER
        [--tasks list,own,sst2,qqp,cola,mrpc] [--rows 300,1200,6000] [--unlabelled 0,5000] [--write]

Ours is what `EarlyExitClassifier().fit` makes of the rows: a fifth of them is set aside, and something is chosen to
deploy. Beside it stand those of linear.py, which learn from all of the rows. With --unlabelled so many further rows of
the draw go without their labels; then these are given, ten at a time, in the order in which `to_label` asks for them.
Rows of LIST, and those to test on, are drawn anew each time. FOLDER/rows keeps the numbers of each draw, FOLDER/runs
the first run of the list, and what is there is not made again.
"""

import csv
import time
from collections import defaultdict
from itertools import product
from pathlib import Path

import numpy as np

from minisweet import EarlyExitClassifier
from minisweet.base.commands import Parser, list_of, positive_number, whole_number
from minisweet.base.files import InputError, read_json, write_json
from minisweet.tasks import load_examples
from minisweet.texts import Examples
from minisweet.metrics import classification_report
from minisweet.outputs import Outputs, ask_all
from minisweet.paper.report import cells, table
from minisweet.classifier.estimator import tokenize
from tests.benchmark import run_study, show, study
from tests.benchmark.linear import LINEAR, fit_linear, is_there

TEST_ROWS, LIST_TEST_ROWS = 2500, 5000  # at most
NAMES = {"list": "Debian, 20 sections", "own": "own text", "sst2": "SST-2"}
NAMES |= {"qqp": "QQP", "cola": "CoLA", "mrpc": "MRPC"}
BESIDE_ON = ("list", "own", "sst2", "qqp")  # the rivals are asked there
FULL, DEPLOYED, LAYERS = "full depth", "deployed", "layers run, %"
OF_EXITS = ("exit 0 agrees", "lost", LAYERS)
LABELS, AT_ONCE = (0, 20, 50), 10
STRICT = 1  # of 100 texts may be lost by another goal than the default
OF_STRICT = (f"deployed with --max-lost {STRICT}", "its layers run, %")
MOST_TO_SETFIT = 400  # labelled rows; it takes long


def decide(classify: EarlyExitClassifier, outputs: Outputs) -> dict[str, np.ndarray]:
    """What exit 0, full depth and what is deployed say of rows, as numbers of labels, and the layers run: (N,) each."""
    its = classify.deployed
    asked = [outputs.exits.layers.index(n) for n in its.point.exits]
    answers = outputs._replace(logits=outputs.logits[asked], exits=outputs.exits.take(asked)).by(its.rule)
    _, (deployed,), (costs,) = answers.decide_at(range(len(asked)), [its.threshold])
    said = {"exit 0": outputs.logits[0].argmax(-1).numpy(), FULL: answers.logits[-1].argmax(-1).numpy()}
    return said | {DEPLOYED: deployed, LAYERS: costs}


def losses(said: dict[str, np.ndarray], right: np.ndarray) -> dict[str, float]:
    """Lost, layers run, and accuracies, in percent."""
    are = {name: said[name] == right for name in (DEPLOYED, FULL)}
    found = {"lost": are[FULL] & ~are[DEPLOYED], LAYERS: said[LAYERS], **are}
    return {name: 100 * float(values.mean()) for name, values in found.items()}


def measure(classify: EarlyExitClassifier, labelled: Examples, more: Examples, test: Examples, beside: bool) -> dict:
    """Numbers of a draw, in percent, and minutes; accuracies, and F1 (macro) of all that answers."""
    started = time.perf_counter()
    classify.fit(labelled.texts(), labelled.labels, unlabelled=more.texts() or None)
    minutes = {FULL: (time.perf_counter() - started) / 60}
    outputs = ask_all(classify.deployed.run.model, tokenize(classify.deployed, test.texts()))
    said, right, by_labels, given = decide(classify, outputs), np.array(test.labels), {}, 0
    found = losses(said, right) | {"exit 0 agrees": 100 * float((said["exit 0"] == said[FULL]).mean())}
    for name in LINEAR.values() if beside else ():
        if is_there(name) and (name != LINEAR["setfit"] or len(labelled.first) <= MOST_TO_SETFIT):
            started = time.perf_counter()
            answer = fit_linear(name, labelled)
            minutes[name] = (time.perf_counter() - started) / 60
            said[name] = answer(test)
    its = decide(classify.choose(max_lost=STRICT), outputs)
    classify.choose()
    said[f"deployed, at most {STRICT} lost"], strict = its[DEPLOYED], losses(its, right)
    hidden = dict(zip(more.texts(), more.labels, strict=True))
    for most in LABELS if more.first else ():
        while given < most and (texts := classify.to_label(min(AT_ONCE, most - given))):
            classify.choose(labels=(texts, [hidden[text] for text in texts]))
            given += len(texts)
        its = decide(classify, outputs)
        by_labels[str(most)] = [given, *losses(its, right).values()]
        said[f"deployed, {most} labels"] = its[DEPLOYED]
    del said[LAYERS]
    classes = int(max(right.max(), *(answers.max() for answers in said.values()))) + 1
    reports = {name: classification_report(answers, right, classes) for name, answers in said.items()}
    f1 = {name: float(np.mean(its["f1"])) for name, its in reports.items()}
    accuracy = {name: 100 * float((answers == right).mean()) for name, answers in said.items()}
    parts = {"accuracy": accuracy, "F1": f1, "minutes": minutes, "labels": by_labels, "strict": strict}
    return found | parts | {"unlabelled": len(more.first)}


def read(task: str, args) -> tuple[Examples, Examples | None]:
    """The rows to train and to test on; None where both are drawn of the same."""
    if task not in ("own", "list"):
        return tuple(load_examples(task, split, args.data_dir) for split in ("train", "dev"))
    if not (paths := args.own if task == "own" else args.list and [args.list]):
        raise InputError(f"--tasks: {task} needs --{task}")
    both = [list(csv.DictReader(path.open(encoding="utf-8", newline=""))) for path in paths]
    labels = sorted({row["label"] for row in both[0]})
    made = [Examples([row["text"] for row in its], None, [labels.index(row["label"]) for row in its]) for its in both]
    return made[0], made[1] if made[1:] else None


def draws(task: str, args, seed: int) -> tuple[Examples, Examples]:
    """The rows of a draw in their order, and those to test on."""
    rows, test = read(task, args)
    order = np.random.default_rng(seed).permutation(len(rows.first)).tolist()
    if test is None:
        return rows.take(order[LIST_TEST_ROWS:]), rows.take(order[:LIST_TEST_ROWS])
    return rows.take(order), test.take(np.random.default_rng(0).permutation(len(test.first))[:TEST_ROWS].tolist())


def tables(folder: Path, model: str = study.SMALL) -> dict[str, str]:
    """The tables of a folder of numbers: accuracies, macro F1, and what a few labels buy."""
    groups, lines = defaultdict(list), defaultdict(list)
    for path in folder.glob("*.json"):
        task, count, more, _ = path.stem.split("-")
        groups[[*NAMES].index(task), int(count), int(more)].append(read_json(path))
    if not groups:
        return {}
    there = {name for its in groups.values() for one in its for name in one["accuracy"]}
    head = [name for name in ("exit 0", FULL, DEPLOYED, *LINEAR.values()) if name in there]
    for (place, count, more), its in sorted(groups.items()):
        some = np.mean([one["unlabelled"] for one in its])
        name = f"{[*NAMES.values()][place]}, {count:,} rows" + f" and {some:,.0f} unlabelled" * (more > 0)
        for kind in ("accuracy", "F1"):
            columns = [[one[kind][key] for one in its if key in one[kind]] for key in head]
            if kind == "accuracy":
                columns += [[one[key] for one in its] for key in OF_EXITS]
                columns += [[one["strict"][key] for one in its if "strict" in one] for key in (DEPLOYED, LAYERS)]
            known = [cells(np.array(values)[:, None], deviation=True)[0] if values else "" for values in columns]
            lines[kind].append([name, len(its), *known])
        for most in its[0]["labels"] if more else ():
            values = cells(np.array([one["labels"][most] for one in its]), deviation=True)
            lines["labels"].append([name if most == "0" else "", most, *values])
    suffix = "" if model == study.SMALL else f": {model}"
    titles = {"accuracy": "Accuracy on new texts, mean ± deviation over draws", "F1": "Macro F1 of the same"}
    made = {
        f"by number of rows{', F1' * (kind == 'F1')}{suffix}": table(
            title, ["texts", "draws", *head, *(OF_EXITS + OF_STRICT if kind == "accuracy" else ())], lines[kind]
        )
        for kind, title in titles.items()
    }
    if lines["labels"]:
        columns = ["labelled rows", "labels", "given", "lost", LAYERS, DEPLOYED, FULL]
        made[f"labels{suffix}"] = table("", columns, lines["labels"])
    return made


def main() -> None:
    """Make what is missing, and print or write the tables."""
    parser = Parser(__doc__)
    parser.add_argument("--list", type=Path)
    parser.add_argument("--lr", type=positive_number, help="(default: the usual)")
    parser.add_argument("--rows", type=list_of(whole_number(10)), default=[300, 1200, 6000])
    parser.add_argument("--unlabelled", type=list_of(whole_number(0)), default=[0])
    parser.add_argument("--write", action="store_true")
    args = study.options_of(parser, list(NAMES))
    (args.out / "rows").mkdir(parents=True, exist_ok=True)
    for task, seed in product(args.tasks, args.seeds):
        rows, test = draws(task, args, seed)
        for count, more in product((min(count, len(rows.first)) for count in args.rows), args.unlabelled):
            labelled, some = (
                rows.take([*range(len(rows.first))[at]]) for at in (slice(count), slice(count, count + more))
            )
            name = f"{task}-{count}-{more}-{seed}"
            numbers, run = args.out / "rows" / f"{name}.json", args.out / "runs" / name
            if not numbers.exists() and (some.first or not more):
                classify = EarlyExitClassifier(model=args.model, lr=args.lr, seed=seed)
                beside = args.model == study.SMALL and task in BESIDE_ON
                found = measure(classify, labelled, some, test, beside)
                if task == "list" and seed == 0 and not run.exists():
                    classify.save(run)
                write_json(numbers, found)
    show(tables(args.out / "rows", args.model), args.write)


if __name__ == "__main__":
    run_study(main)
