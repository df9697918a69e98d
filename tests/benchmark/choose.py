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
from minisweet.base.commands import Parser, list_of, one_of, positive_float, whole_number
from minisweet.base.files import InputError
from minisweet.data.rows import Examples, examples_of, read_rows, write_examples
from minisweet.data.tasks import TASKS, load_examples
from minisweet.evaluation.answers import all_logits
from minisweet.paper.report import cells, table
from minisweet.runs.folders import load_run, read_validation
from tests.benchmark import run_study, show
from tests.benchmark.linear import LINEAR, fit_linear
from tests.benchmark.zero_layer import SMALL, train_and_evaluate

TEST_ROWS, DRAWS = 2500, range(3)  # at most; also the seeds of the trainings
NAMES = dict(zip(LINEAR, ("TF-IDF", "embeddings"), strict=True))


def compare(run: Path, rows: Examples, labels: list[str], test: Examples, options: list, beside: list) -> dict:
    """Accuracies, and the share of the layers, in percent, of rows to train on and rows to test on, by the way.

    Makes `run` where it is not there. `beside` are of LINEAR.
    """
    if not (run / "evaluation.json").exists():
        write_examples(file := run.with_name(f"{run.name}.jsonl"), rows, labels)
        train_and_evaluate(run, "--data", file, *options)
    model, record = load_run(run)
    aside = set(read_validation(run, record).texts())  # equal texts are on one side
    trained = rows.take([n for n, text in enumerate(rows.texts()) if text not in aside])
    order = np.array([record.labels.index(label) for label in labels])
    gold, classify = order[test.labels], EarlyExitClassifier(run)
    texts = classify.tokenize(test.texts())
    logits, _ = all_logits(model, texts, None)
    found, answers = classify.classify(texts), {"exit 0": logits[0].argmax(-1)}
    answers |= {NAMES[kind]: order[fit_linear(kind, trained)[0](test).argmax(-1)] for kind in beside}
    answers["full depth"] = logits[-1].argmax(-1)
    answers["the default"] = np.array([record.labels.index(answer.label) for answer in found])
    share = np.mean([answer.exit_layer for answer in found]) / record.depth
    numbers = {way: 100 * float(np.mean(np.asarray(given) == gold)) for way, given in answers.items()}
    return numbers | {"layers of the default, %": 100 * share}


def read_own(files: list[Path]) -> tuple[Examples, Examples, list[str]]:
    """The rows to train and to test on, and the labels."""
    train, labels = examples_of(files[0], read_rows(files[0]), ["text"], "label", None)
    return train, examples_of(files[1], read_rows(files[1]), ["text"], "label", labels)[0], labels


def main() -> None:
    """Make what is missing, and print or write the table."""
    parser = Parser(__doc__)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--own", type=Path, nargs=2, metavar=("TRAIN", "TEST"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default=SMALL)
    parser.add_argument("--lr", type=positive_float, help="(default: train.py's)")
    parser.add_argument("--tasks", type=list_of(one_of(("own", "sst2", "qqp"))), default=["own", "sst2", "qqp"])
    parser.add_argument("--rows", type=list_of(whole_number(10)), default=[300, 1200, 6000])
    parser.add_argument("--write", action="store_true")
    args, lines, head = parser.parse_args(), [], []
    for name, value in (("own", "own" in args.tasks), ("data_dir", args.tasks != ["own"])):
        if value and getattr(args, name) is None:
            raise InputError(f"--tasks: {','.join(args.tasks)} needs --{name.replace('_', '-')}")
    args.out.mkdir(parents=True, exist_ok=True)
    options, suffix = ["--model", args.model], "" if args.model == SMALL else f": {args.model}"
    options += ["--lr", args.lr] if args.lr else []
    for task, size in product(args.tasks, args.rows):
        if task == "own":
            rows, test, labels = read_own(args.own)
        else:
            rows, test = (load_examples(task, split, args.data_dir) for split in ("train", "dev"))
            labels = list(TASKS[task].labels)
        test, found = test.take(np.random.default_rng(0).permutation(len(test.first))[:TEST_ROWS].tolist()), []
        for seed in DRAWS:
            drawn = rows.take(np.random.default_rng(seed).permutation(len(rows.first))[:size].tolist())
            run = args.out / (f"rows-{task}-{size}-{seed}" + (f"-lr{args.lr:g}" if args.lr else ""))
            beside = LINEAR if args.model == SMALL else ()
            found.append(compare(run, drawn, labels, test, [*options, "--seed", seed], beside))
        head = list(found[0])
        name = "own text" if task == "own" else task
        lines.append([f"{name}, {len(drawn.first):,} rows", *cells([[*one.values()] for one in found], deviation=True)])
    title = f"Accuracy on new texts, {args.model}, mean ± deviation over {len(DRAWS)} draws"
    made = {f"by number of rows{suffix}": table(title, ["texts", *head], lines)}
    few = [line for k, line in enumerate(lines, start=1) if k <= len(args.rows) or k % len(args.rows) == 0]
    made[f"what to use{suffix}"] = table("", ["accuracy on new texts", *head], few).rpartition("\n\n")[2]  # for README
    show(made, args.write)


if __name__ == "__main__":
    run_study(main)
