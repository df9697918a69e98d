"""What to use, by how many labelled rows there are: scores on other rows, and milliseconds of one text at a time.

    python -m tests.benchmark.choose --data-dir DIR --own TRAIN.csv TEST.csv --out FOLDER [--rows 300,1200,6000]

SST-2's and QQP's rows are handed to train.py as own text, as those of --own are. Ours has the defaults of train.py and
evaluate.py. A slice of two layers learns from the trunk of ours, at the default rate. tests/benchmark/linear.py makes
the two models of scikit-learn. Milliseconds are of ONNX files in float32 and in int8, on an idle machine; those of
TF-IDF are scikit-learn's. Embeddings take full depth's time.
"""

import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np

from minisweet import EarlyExitClassifier
from minisweet.base.commands import Parser, list_of, run_command, whole_number
from minisweet.data.rows import Examples, examples_of, read_rows, write_examples
from minisweet.data.tasks import TASKS, load_examples
from minisweet.data.text import TokenizedExamples
from minisweet.evaluation.sweep import all_logits
from minisweet.exits import MultiExitModel
from minisweet.paper.report import table
from minisweet.runs.folders import load_run, read_evaluation
from minisweet.use.onnx import one_by_one
from minisweet.use.onnx_graph import export_graph
from tests.benchmark.linear import fit_linear

TIMED = 400  # texts, from the first of the test rows on
TEST_ROWS = 2500  # at most


def call(*words: object) -> None:
    """Run a script of this clone."""
    subprocess.run([sys.executable, *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def train(file: Path) -> tuple[Path, Path]:
    """Our run of a file, with its operating point, and the run with a taught slice; made where they are not there."""
    run, slices = file.with_suffix(".run"), file.with_suffix(".slices")
    if not run.exists():
        call("train.py", "--data", file, "--out", run)
        call("evaluate.py", run)
    if not slices.exists():
        options = ["--method", "mm", "--targets", "trunk", "--exit-layers", "2,6"]
        call("train.py", "--trunk", run, "--data", file, *options, "--out", slices)
    return run, slices


def milliseconds(model: MultiExitModel, temperatures: list[float], texts: TokenizedExamples, thresholds: list) -> list:
    """Of one text, at each threshold: in float32 and in int8."""
    files = [export_graph(model, 1.0, temperatures, int8) for int8 in (False, True)]
    return [
        "{:.2f}, {:.2f}".format(*(one_by_one(file, texts, threshold=np.array(value, np.float32))[1] for file in files))
        for value in thresholds
    ]


def compare(file: Path, rows: Examples, labels: list[str], test: Examples) -> dict[str, tuple[float, str]]:
    """The score and the milliseconds of each way: `rows` to train on, which `file` gets, and rows to test on."""
    if not file.exists():
        write_examples(file, rows, labels)
    run, slices = train(file)
    (model, record), (taught, _), evaluation = load_run(run), load_run(slices), read_evaluation(run)
    order = [record.labels.index(label) for label in labels]
    gold = np.array([order[label] for label in test.labels])
    classify = EarlyExitClassifier(run)
    texts, few = (classify.tokenize(part) for part in (test.texts(), test.texts()[:TIMED]))
    found, point = {}, evaluation.operating_point

    def add(name: str, answers: np.ndarray, took: str) -> None:
        found[name] = (100 * float(np.mean(answers == gold)), took)

    predict, _ = fit_linear("tfidf", rows)
    start = time.perf_counter()
    for n in range(TIMED):
        predict(test.take([n]))
    took = f"{1000 * (time.perf_counter() - start) / TIMED:.2f}"
    add("TF-IDF", np.array(order)[predict(test).argmax(-1)], took)
    took = milliseconds(model, evaluation.temperatures, few, [0, point.threshold, 1])
    logits, _ = all_logits(model, texts, None)
    add("n-grams", logits[0].argmax(-1).numpy(), took[0])
    answers = classify.classify(texts)
    share = np.mean([answer.exit_layer for answer in answers]) / record.depth
    early = np.array([record.labels.index(answer.label) for answer in answers])
    add(f"default, at {share:.2f} of the layers", early, took[1])
    small = taught.models[0]
    add("slice of 2", all_logits(small, texts, None)[0][0].argmax(-1).numpy(), milliseconds(small, [1.0], few, [1])[0])
    predict, _ = fit_linear("embeddings", rows)
    add("embeddings", np.array(order)[predict(test).argmax(-1)], took[2])
    add("full depth", logits[-1].argmax(-1).numpy(), took[2])
    return found


def read_own(files: list[Path]) -> tuple[Examples, Examples, list[str]]:
    """The rows to train and to test on, and the labels."""
    train, labels = examples_of(files[0], read_rows(files[0]), ["text"], "label", None)
    return train, examples_of(files[1], read_rows(files[1]), ["text"], "label", labels)[0], labels


def main() -> None:
    """Make what is missing, and print a table for each number of rows."""
    parser = Parser(__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--own", type=Path, nargs=2, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=list_of(whole_number(10)), default=[300, 1200, 6000])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    data = {"own text": read_own(args.own)}
    for task in ("sst2", "qqp"):
        rows, test = (load_examples(task, split, args.data_dir) for split in ("train", "dev"))
        data[task] = rows, test, list(TASKS[task].labels)
    for size, (name, (rows, test, labels)) in product(args.rows, data.items()):
        train_rows, test_rows = (
            part.take(np.random.default_rng(0).permutation(len(part.first))[:count].tolist())
            for part, count in ((rows, size), (test, TEST_ROWS))
        )
        file = args.out / f"{name.replace(' ', '-')}-{size}.jsonl"
        found = compare(file, train_rows, labels, test_rows)
        lines = [[way, f"{score:.1f}", took] for way, (score, took) in found.items()]
        title = f"{name}, {len(train_rows.first):,} rows, {len(test_rows.first):,} to test on"
        print(table(title, ["way", "score", "ms: float32, int8"], lines), flush=True)


if __name__ == "__main__":
    run_command(main)
