"""What to use, by how many labelled rows there are: accuracies on other rows, of three draws of the rows.

    python -m tests.benchmark.by_rows --data-dir DIR --own TRAIN.csv TEST.csv --out FOLDER [--rows 300,1200] [--write]

Ours is what `EarlyExitClassifier().fit` makes of the rows: a fifth of them is set aside, and something is chosen to
deploy. Beside it stand those of linear.py, which learn from all of the rows. With
--unlabelled so many further rows of the draw go without their labels, and TF-IDF also learns from what full depth says
of them. FOLDER/rows keeps the numbers of each draw, and what is there is not made again.
"""

import csv
from collections import defaultdict
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from minisweet import EarlyExitClassifier
from minisweet.base.commands import Parser, list_of, positive_number, whole_number
from minisweet.base.files import read_json, write_json
from minisweet.data.tasks import TASKS, load_examples
from minisweet.data.text import Examples
from minisweet.outputs import ask_all
from minisweet.paper.report import cells, table
from minisweet.runs.run import Run
from minisweet.use.classifier import classify_tokens, tokenize
from tests.benchmark import run_study, show, study
from tests.benchmark.linear import LINEAR, fit_linear

TEST_ROWS = 2500  # at most
NAMES = {"own": "own text", "sst2": "SST-2", "qqp": "QQP", "cola": "CoLA", "mrpc": "MRPC"}
BESIDE_ON = ("own", "sst2", "qqp")  # the rivals are asked there
FULL, DEPLOYED, LAYERS, TAUGHT = "full depth", "deployed", "layers run, %", "TF-IDF, taught by full depth"
OF_EXITS = ("exit 0 agrees", "lost", "changed", LAYERS)
BESIDE = tuple(name for name in LINEAR.values() if name != "model2vec" or find_spec("model2vec"))


def ask(classify: EarlyExitClassifier, run: Path, rows: Examples) -> dict[str, np.ndarray]:
    """What exit 0, full depth and what is deployed say of rows, as numbers of labels, and the layers run: (N,) each."""
    its = classify.deployed
    texts = tokenize(its, rows.texts())
    outputs, deployed = ask_all(Run.read(run).model, texts), classify_tokens(its, texts)
    full = its.rule.all_calibrated(outputs.logits[[outputs.exits.layers.index(n) for n in its.point.exits]])[-1]
    said = {"exit 0": outputs.logits[0].argmax(-1).numpy(), FULL: full.argmax(-1).numpy()}
    said[DEPLOYED] = np.array([answer.label for answer in deployed])
    return said | {LAYERS: np.array([answer.exit_layer for answer in deployed]) / its.run.record.depth}


def measure(run: Path, labelled: Examples, more: Examples, test: Examples, beside: bool, **options) -> dict:
    """Numbers of a draw, in percent. The run is written."""
    classify = EarlyExitClassifier(**options)
    classify.fit(labelled.texts(), labelled.labels, unlabelled=more.texts() or None).save(run)
    said = ask(classify, run, test)
    layers = said.pop(LAYERS)
    if beside:
        said |= {name: fit_linear(name, labelled)(test) for name in BESIDE}
        if more.first:
            taught = labelled.joined(more._replace(labels=ask(classify, run, more)[FULL].tolist()))
            said[TAUGHT] = fit_linear("TF-IDF", taught)(test)
    right = {name: answers == np.array(test.labels) for name, answers in said.items()}
    found = {name: 100 * is_right.mean() for name, is_right in right.items()}
    found["exit 0 agrees"] = 100 * (said["exit 0"] == said[FULL]).mean()
    found["lost"] = 100 * (right[FULL] & ~right[DEPLOYED]).mean()
    found["changed"] = 100 * (said[FULL] != said[DEPLOYED]).mean()
    return found | {LAYERS: 100 * layers.mean()}


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


def tables(folder: Path, model: str = study.SMALL) -> dict[str, str]:
    """The tables of a folder of numbers: of all of them, and of the small model README's two."""
    groups, whole, expected, largest = defaultdict(list), [], [], {}
    for path in folder.glob("*.json"):
        task, count, more, _ = path.stem.split("-")
        groups[[*NAMES].index(task), int(count), int(more)].append(read_json(path))
    there = {name for its in groups.values() for one in its for name in one}
    head = [name for name in ("exit 0", FULL, DEPLOYED, *LINEAR.values(), TAUGHT, *OF_EXITS) if name in there]
    for (place, count, more), its in sorted(groups.items()):
        values = np.array([[one.get(name, np.nan) for name in head] for one in its])
        mean, task = dict(zip(head, values.mean(0), strict=True)), [*NAMES][place]
        some = np.mean([one["unlabelled"] for one in its])
        name = f"{NAMES[task]}, {count:,} rows"
        name += f" and {some:,.0f} unlabelled" * (more > 0)
        whole.append([name, *cells(values, deviation=True)])
        shown = [key for key in ("TF-IDF", "embeddings", FULL, DEPLOYED) if key in mean]
        row = [f"{mean[key]:.1f}" for key in shown] + [f"{mean[LAYERS]:.0f}"]
        few = task == "own" or (task in BESIDE_ON and count < 1000)
        expected += [[name, *row]] if few and (more == 0 or (task, count, more) == ("own", 300, 5000)) else []
        if more == 0 and task in BESIDE_ON:  # the most labelled rows
            largest[task] = [name, *row[-3:]]
    if not groups:
        return {}
    title = f"Accuracy on new texts, mean ± deviation over {max(map(len, groups.values()))} draws"
    if model != study.SMALL:
        return {f"by number of rows: {model}": table(title, ["texts", *head], whole)}
    made = {"by number of rows": table(title, ["texts", *head], whole)}
    made["what to expect"] = table(
        "", ["accuracy on new texts", "TF-IDF", "embeddings", FULL, "early exit", LAYERS], expected
    )
    made["three data sets"] = table("", ["accuracy on new texts", "all layers", "early exit", LAYERS], largest.values())
    return made


def main() -> None:
    """Make what is missing, and print or write the tables."""
    parser = Parser(__doc__)
    parser.add_argument("--lr", type=positive_number, help="(default: the usual)")
    parser.add_argument("--rows", type=list_of(whole_number(10)), default=[300, 1200, 6000])
    parser.add_argument("--unlabelled", type=list_of(whole_number(0)), default=[0])
    parser.add_argument("--write", action="store_true")
    args = study.options_of(parser, list(NAMES))
    (args.out / "rows").mkdir(parents=True, exist_ok=True)
    for task, count, seed in product(args.tasks, args.rows, args.seeds):
        rows, test, _ = read(task, args.data_dir, args.own)
        order, test = np.random.default_rng(seed).permutation(len(rows.first)).tolist(), draw(test, TEST_ROWS, 0)
        count = min(count, len(order))
        labelled, options = rows.take(order[:count]), {"model": args.model, "lr": args.lr, "seed": seed}
        for more in args.unlabelled:
            some = rows.take(order[count : count + more])
            numbers = args.out / "rows" / f"{task}-{count}-{more}-{seed}.json"
            if not numbers.exists() and (some.first or not more):
                beside = args.model == study.SMALL and task in BESIDE_ON
                with TemporaryDirectory() as folder:
                    found = measure(Path(folder, "run"), labelled, some, test, beside, **options)
                write_json(numbers, found | {"unlabelled": len(some.first)})
    show(tables(args.out / "rows", args.model), args.write)


if __name__ == "__main__":
    run_study(main)
