"""What to use, by how many labelled rows there are: scores on other rows, of three draws of the rows.

    python -m tests.benchmark.choose --data-dir DIR --own TRAIN.csv TEST.csv --out FOLDER [--rows 300,1200] [--write]

SST-2's and QQP's rows are handed to train.py as own text, as those of --own are. Ours has the defaults of train.py and
evaluate.py: a fifth of the rows is set aside. tests/benchmark/linear.py makes the two models of scikit-learn, on the
rows that ours was trained on. A run that is there is not made again.
"""

import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np

from minisweet import EarlyExitClassifier
from minisweet.base.commands import Parser, list_of, run_command, whole_number
from minisweet.data.rows import Examples, examples_of, read_rows, write_examples
from minisweet.data.tasks import TASKS, load_examples
from minisweet.evaluation.answers import all_logits
from minisweet.paper.report import cells, table
from minisweet.runs.folders import load_run, read_validation
from tests.benchmark import show
from tests.benchmark.linear import fit_linear

TEST_ROWS, DRAWS = 2500, range(3)  # at most; also the seeds of the trainings
WAYS = ("exit 0", "TF-IDF", "embeddings", "full depth", "the default", "layers of the default, %")


def compare(run: Path, rows: Examples, labels: list[str], test: Examples, seed: int) -> list[float]:
    """The numbers of WAYS, of these rows to train on and rows to test on. Makes `run` where it is not there."""
    if not (run / "evaluation.json").exists():
        write_examples(file := run.with_suffix(".jsonl"), rows, labels)
        train = ["train.py", "--data", file, "--out", run, "--seed", seed, "--overwrite"]
        for words in (train, ["evaluate.py", run]):
            subprocess.run([sys.executable, *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    model, record = load_run(run)
    aside = set(read_validation(run, record).texts())  # equal texts are on one side
    trained = rows.take([n for n, text in enumerate(rows.texts()) if text not in aside])
    order = np.array([record.labels.index(label) for label in labels])
    gold, classify = order[test.labels], EarlyExitClassifier(run)
    texts = classify.tokenize(test.texts())
    logits, _ = all_logits(model, texts, None)
    found, answers = classify.classify(texts), {"exit 0": logits[0].argmax(-1), "full depth": logits[-1].argmax(-1)}
    for name, kind in (("TF-IDF", "tfidf"), ("embeddings", "embeddings")):
        answers[name] = order[fit_linear(kind, trained)[0](test).argmax(-1)]
    answers["the default"] = np.array([record.labels.index(answer.label) for answer in found])
    share = np.mean([answer.exit_layer for answer in found]) / record.depth
    return [100 * float(np.mean(np.asarray(answers[way]) == gold)) for way in WAYS[:-1]] + [100 * share]


def read_own(files: list[Path]) -> tuple[Examples, Examples, list[str]]:
    """The rows to train and to test on, and the labels."""
    train, labels = examples_of(files[0], read_rows(files[0]), ["text"], "label", None)
    return train, examples_of(files[1], read_rows(files[1]), ["text"], "label", labels)[0], labels


def main() -> None:
    """Make what is missing, and print or write the table."""
    parser = Parser(__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--own", type=Path, nargs=2, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=list_of(whole_number(10)), default=[300, 1200, 6000])
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    data = {"own text": read_own(args.own)}
    for task in ("sst2", "qqp"):
        rows, test = (load_examples(task, split, args.data_dir) for split in ("train", "dev"))
        data[task] = rows, test, list(TASKS[task].labels)
    lines = []
    for (name, (rows, test, labels)), size in product(data.items(), args.rows):
        test = test.take(np.random.default_rng(0).permutation(len(test.first))[:TEST_ROWS].tolist())
        found = []
        for seed in DRAWS:
            drawn = rows.take(np.random.default_rng(seed).permutation(len(rows.first))[:size].tolist())
            found.append(compare(args.out / f"{name.replace(' ', '-')}-{size}-{seed}", drawn, labels, test, seed))
        lines.append([f"{name}, {len(drawn.first):,} rows", *cells(found, deviation=True)])
    title = f"Accuracy on new texts, mean ± deviation over {len(DRAWS)} draws"
    made = {"by number of rows": table(title, ["texts", *WAYS], lines)}
    few = [line for k, line in enumerate(lines, start=1) if k <= len(args.rows) or k % len(args.rows) == 0]
    made["what to use"] = table("", ["accuracy on new texts", *WAYS], few).rpartition("\n\n")[2]  # for README
    show(made, args.write)


if __name__ == "__main__":
    run_command(main)
