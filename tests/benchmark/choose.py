"""What to use, by how many labelled rows there are: scores on other rows, of three draws of the rows.

    python -m tests.benchmark.choose --data-dir DIR --own TRAIN.csv TEST.csv --out FOLDER [--rows 300,1200] [--write]
    python -m tests.benchmark.choose --model mpnet-base --lr 2e-5 --tasks own --own TRAIN.csv TEST.csv --out FOLDER

SST-2's and QQP's rows are handed to train.py as own text, as those of --own are. Ours has the defaults of train.py and
evaluate.py, and the model and the rate that are named: a fifth of the rows is set aside. Beside the default model stand
the two of scikit-learn (linear.py), on the rows that ours was trained on. A run that is there is not made again.
"""

from itertools import product
from pathlib import Path

import numpy as np

from minisweet import EarlyExitClassifier
from minisweet.base.commands import Parser, list_of, positive_float, whole_number
from minisweet.data.rows import Examples, examples_of, read_rows, write_examples
from minisweet.data.tasks import TASKS, load_examples
from minisweet.evaluation.answers import all_logits
from minisweet.paper.report import cells, table
from minisweet.runs.folders import EVALUATION, load_run, read_validation
from tests.benchmark import run_study, show, training
from tests.benchmark.linear import LINEAR, fit_linear

TEST_ROWS = 2500  # at most
NAMES = dict(zip(LINEAR, ("TF-IDF", "embeddings"), strict=True))


def compare(run: Path, rows: Examples, labels: list[str], test: Examples, beside: list[str]) -> dict[str, float]:
    """Accuracies of a run and of the models `beside` it, of LINEAR, on rows to test on, by the way; and the share of
    the layers. All are in percent. `rows` are those that the run was made of.
    """
    model, record = load_run(run)
    aside = set(read_validation(run, record).texts())  # equal texts are on one side
    trained = rows.take([n for n, text in enumerate(rows.texts()) if text not in aside])
    order = np.array([record.labels.index(label) for label in labels])
    classify = EarlyExitClassifier(run)
    texts = classify.tokenize(test.texts())
    logits, _ = all_logits(model, texts, None)
    found, answers = classify.classify(texts), {"exit 0": logits[0].argmax(-1).numpy()}
    answers |= {NAMES[kind]: order[fit_linear(kind, trained)[0](test).argmax(-1)] for kind in beside}
    answers["full depth"] = logits[-1].argmax(-1).numpy()
    answers["the default"] = np.array([record.labels.index(answer.label) for answer in found])
    numbers = {way: 100 * (given == order[test.labels]).mean() for way, given in answers.items()}
    return numbers | {"layers of the default, %": 100 * np.mean([answer.exit_layer for answer in found]) / record.depth}


def read(task: str, data_dir: Path, own: list[Path]) -> tuple[Examples, Examples, list[str]]:
    """The rows to train and to test on, and the labels."""
    if task != "own":
        return *(load_examples(task, split, data_dir) for split in ("train", "dev")), list(TASKS[task].labels)
    train, labels = examples_of(own[0], read_rows(own[0]), ["text"], "label", None)
    return train, examples_of(own[1], read_rows(own[1]), ["text"], "label", labels)[0], labels


def draw(rows: Examples, count: int, seed: int) -> Examples:
    """At most so many rows."""
    return rows.take(np.random.default_rng(seed).permutation(len(rows.first))[:count].tolist())


def main() -> None:
    """Make what is missing, and print or write the table."""
    parser = Parser(__doc__)
    parser.add_argument("--model", default=training.SMALL)
    parser.add_argument("--lr", type=positive_float, help="(default: train.py's)")
    parser.add_argument("--rows", type=list_of(whole_number(10)), default=[300, 1200, 6000])
    parser.add_argument("--write", action="store_true")
    args = training.options_of(parser, ["own", "sst2", "qqp"])
    args.out.mkdir(parents=True, exist_ok=True)
    is_small, lines = args.model == training.SMALL, []
    for task, size in product(args.tasks, args.rows):
        rows, test, labels = read(task, args.data_dir, args.own)
        found, test = [], draw(test, TEST_ROWS, 0)
        for seed in args.seeds:
            drawn = draw(rows, size, seed)
            run = args.out / (f"rows-{task}-{size}-{seed}" + (f"-lr{args.lr:g}" if args.lr else ""))
            if not (run / EVALUATION).exists():
                write_examples(file := run.with_name(f"{run.name}.jsonl"), drawn, labels)
                training.train_and_evaluate(run, data=file, model=args.model, lr=args.lr, seed=seed)
            found.append(compare(run, drawn, labels, test, LINEAR if is_small else ()))
        head, name = list(found[0]), "own text" if task == "own" else task
        lines.append([f"{name}, {len(drawn.first):,} rows", *cells([[*one.values()] for one in found], deviation=True)])
    suffix = "" if is_small else f": {args.model}"
    title = f"Accuracy on new texts, {args.model}, mean ± deviation over {len(args.seeds)} draws"
    made = {f"by number of rows{suffix}": table(title, ["texts", *head], lines)}
    few = lines[: len(args.rows)]
    made[f"what to use{suffix}"] = table("", ["accuracy on new texts", *head], few)  # for README
    show(made, args.write)


if __name__ == "__main__":
    run_study(main)
