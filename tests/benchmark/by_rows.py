"""What to use, by how many labelled rows there are: accuracies on other rows, of three draws of the rows.

    python -m tests.benchmark.by_rows --data-dir DIR --own TRAIN.csv TEST.csv --out FOLDER [--rows 300,1200] [--write]

Ours is what the defaults make of a CSV file with the rows: a fifth of them is set aside, and something is chosen to
deploy. Beside the default model stand the two of scikit-learn (linear.py), which learn from all of the rows. With
--unlabelled so many further rows of the draw go without their labels, and TF-IDF also learns from what full depth says
of them. FOLDER/rows keeps the numbers of each draw, and what is there is not made again.
"""

import csv
import shutil
from collections import defaultdict
from itertools import product
from pathlib import Path

import numpy as np

from minisweet import EarlyExitClassifier
from minisweet.base.commands import Parser, list_of, positive_float, whole_number
from minisweet.base.files import InputError, read_json, write_json
from minisweet.data.rows import Examples
from minisweet.data.tasks import TASKS, load_examples
from minisweet.evaluation.answers import all_logits
from minisweet.paper.report import cells, table
from minisweet.runs.folders import load_run
from tests.benchmark import run_study, show, study
from tests.benchmark.linear import LINEAR, fit_linear

TEST_ROWS = 2500  # at most
NAMES = {"own": "own text", "sst2": "SST-2", "qqp": "QQP"}
FULL, DEPLOYED, LAYERS = "full depth", "deployed", "layers run, %"
BESIDE = tuple(LINEAR.values())


def make_run(run: Path, labelled: Path, unlabelled: Path | None, columns: list[str], **options: object) -> None:
    """Fit our classifier to files, and choose what to deploy."""
    if unlabelled:
        raise InputError("--unlabelled: train.py takes labelled rows alone")
    study.make_run(run, data=labelled, text_columns=columns, **options)


def ask(run: Path, rows: Examples, labels: list[str]) -> tuple[dict[str, np.ndarray], float]:
    """What exit 0, full depth and what is deployed say of rows, as numbers of labels: (N,) each; and the share of the
    layers that are run.
    """
    (model, record), classify = load_run(run), EarlyExitClassifier(run)
    logits, _ = all_logits(model, classify.tokenize(rows.texts()), None)
    deployed = classify(rows.texts())
    order = np.array([labels.index(label) for label in record.labels])
    said = {"exit 0": order[logits[0].argmax(-1)], FULL: order[logits[-1].argmax(-1)]}
    said[DEPLOYED] = np.array([labels.index(answer.label) for answer in deployed])
    return said, np.mean([answer.exit_layer for answer in deployed]) / record.depth


def measure(folder: Path, drawn: Examples, count: int, test: Examples, labels: list[str], **options) -> dict:
    """Numbers of a draw, in percent. `count` of its rows are labelled, the others are not."""
    place = np.arange(len(drawn.first))
    labelled, others = drawn.take(place[:count].tolist()), drawn.take(place[count:].tolist())
    files = write(folder / "rows.csv", labelled, labels), others.first and write(folder / "more.csv", others, None)
    columns = ["text"] if drawn.second is None else ["text", "other"]
    make_run(folder / "run", files[0], files[1] or None, columns, **options)
    said, share = ask(folder / "run", test, labels)
    if options["model"] == study.SMALL:
        said |= {name: fit_linear(name, labelled)(test) for name in BESIDE}
        if others.first:
            answers, _ = ask(folder / "run", others, labels)
            taught = drawn._replace(labels=[*labelled.labels, *answers[FULL].tolist()])
            said["TF-IDF, taught by full depth"] = fit_linear("TF-IDF", taught)(test)
    right = {name: answers == np.array(test.labels) for name, answers in said.items()}
    found = {name: 100 * is_right.mean() for name, is_right in right.items()}
    found["exit 0 agrees"] = 100 * (said["exit 0"] == said[FULL]).mean()
    found["lost"] = 100 * (right[FULL] & ~right[DEPLOYED]).mean()
    return found | {LAYERS: 100 * share}


def write(path: Path, rows: Examples, labels: list[str] | None) -> Path:
    """Write rows as CSV, with their labels or without. Returns the path."""
    columns = {"text": rows.first, "other": rows.second, "label": labels and [labels[n] for n in rows.labels]}
    columns = {name: values for name, values in columns.items() if values is not None}
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *zip(*columns.values(), strict=True)])
    return path


def read(task: str, data_dir: Path, own: list[Path]) -> tuple[Examples, Examples, list[str]]:
    """The rows to train and to test on, and the labels."""
    if task != "own":
        return *(load_examples(task, split, data_dir) for split in ("train", "dev")), list(TASKS[task].labels)
    both = [list(csv.DictReader(path.open(encoding="utf-8", newline=""))) for path in own]
    labels = sorted({row["label"] for row in both[0]})
    made = [Examples([row["text"] for row in its], None, [labels.index(row["label"]) for row in its]) for its in both]
    return *made, labels


def draw(rows: Examples, count: int, seed: int) -> Examples:
    """At most so many rows."""
    return rows.take(np.random.default_rng(seed).permutation(len(rows.first))[:count].tolist())


def tables(folder: Path, suffix: str = "") -> dict[str, str]:
    """The tables of FOLDER/rows: of all numbers, and README's two."""
    groups, whole, expected, largest = defaultdict(list), [], [], {}
    for path in folder.glob("*.json"):
        task, count, more, _ = path.stem.split("-")
        groups[[*NAMES].index(task), int(count), int(more)].append(read_json(path))
    head = list(dict.fromkeys(name for its in groups.values() for one in its for name in one))
    for (place, count, more), its in sorted(groups.items()):
        values = np.array([[one.get(name, np.nan) for name in head] for one in its])
        mean, task = dict(zip(head, values.mean(0), strict=True)), [*NAMES][place]
        name = f"{NAMES[task]}, {count:,} rows" + f" and {more:,} unlabelled" * (more > 0)
        whole.append([name, *cells(values, deviation=True)])
        row = [f"{mean[key]:.1f}" for key in (*BESIDE, FULL, DEPLOYED) if key in mean] + [f"{mean[LAYERS]:.0f}"]
        expected += [[name, *row]] if task == "own" or count < 1000 else []
        if not more:
            largest[task] = [name, *row[-3:]]
    if not groups:
        return {}
    title = f"Accuracy on new texts, mean ± deviation over {max(map(len, groups.values()))} draws"
    made = {"by number of rows": table(title, ["texts", *head], whole)}
    made["what to expect"] = table("", ["accuracy on new texts", *BESIDE, FULL, "early exit", LAYERS], expected)
    made["three data sets"] = table("", ["accuracy on new texts", "all layers", "early exit", LAYERS], largest.values())
    return {name + suffix: block for name, block in made.items()}


def main() -> None:
    """Make what is missing, and print or write the tables."""
    parser = Parser(__doc__)
    parser.add_argument("--lr", type=positive_float, help="(default: the usual)")
    parser.add_argument("--rows", type=list_of(whole_number(10)), default=[300, 1200, 6000])
    parser.add_argument("--unlabelled", type=list_of(whole_number(0)), default=[0])
    parser.add_argument("--write", action="store_true")
    args = study.options_of(parser, list(NAMES))
    (args.out / "rows").mkdir(parents=True, exist_ok=True)
    for task, count, more, seed in product(args.tasks, args.rows, args.unlabelled, args.seeds):
        rows, test, labels = read(task, args.data_dir, args.own)
        count = min(count, len(rows.first))
        if not (numbers := args.out / "rows" / f"{task}-{count}-{more}-{seed}.json").exists():
            (folder := args.out / numbers.stem).mkdir(exist_ok=True)
            options = {"model": args.model, "lr": args.lr, "seed": seed}
            drawn, test = draw(rows, count + more, seed), draw(test, TEST_ROWS, 0)
            write_json(numbers, measure(folder, drawn, count, test, labels, **options))
            shutil.rmtree(folder)
    show(tables(args.out / "rows", "" if args.model == study.SMALL else f": {args.model}"), args.write)


if __name__ == "__main__":
    run_study(main)
