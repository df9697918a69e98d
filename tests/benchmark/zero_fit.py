"""Exit 0 fitted anew in the records of tests/benchmark/zero_layer.py, on the same rows; and on MNLI and own text.

    python -m tests.benchmark.zero_fit FOLDER/records --data-dir DIR --own TRAIN.csv TEST.csv [--tasks sst2] [--seeds 0]

The trained exits of the records stay as they are. MNLI has 6,000 rows to train on and the matched validation rows; own
text has 300, 1,200 and 5,000. The seed draws them. At the end zero_tables.py prints its tables of the new records.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minisweet import NgramExit, load_encoder
from minisweet.base.commands import Parser, run_command
from minisweet.base.files import home, read_json
from minisweet.data.rows import Examples, examples_of, read_rows
from minisweet.data.tasks import load_examples
from minisweet.data.text import Batch, TokenizedExamples, load_tokenizer, special_ids
from minisweet.evaluation.metrics import score
from minisweet.evaluation.operating import operating_point
from minisweet.evaluation.sweep import crossfit, curve_of, load_validation, save_evaluation
from minisweet.ngrams import fit_ngrams
from minisweet.paper.report import table
from minisweet.runs.folders import EVALUATION, read_evaluation, read_record
from minisweet.runs.hub import model_folder
from tests.benchmark.zero_layer import ROWS
from tests.benchmark.zero_tables import add_report_options, report

OWN_ROWS = (300, 1200, 5000)


@torch.no_grad()
def answer(train: Examples, rows: Examples, num_labels: int) -> Tensor:
    """The logits (N, C) of rows, by exit 0 with MiniLM's embeddings, fitted on `train` as train.py does it."""
    folder = model_folder("minilm-l6")
    words = load_encoder(folder).word_embeddings.weight
    tokenizer = load_tokenizer(folder, len(words), 256)
    exit = NgramExit(len(words), num_labels, special_ids(tokenizer), train.second is not None)
    batches = [batch.inputs for batch in in_order(TokenizedExamples(tokenizer, train))]
    fit_ngrams(exit, batches, torch.tensor(train.labels), words)
    return torch.cat([exit(*batch.inputs) for batch in in_order(TokenizedExamples(tokenizer, rows))])


def in_order(examples: TokenizedExamples) -> Iterator[Batch]:
    """All examples in batches, in their order."""
    for rows in np.array_split(np.arange(len(examples)), -(-len(examples) // 256)):
        yield examples.batch(rows)


def refit(run: Path, train: Examples, dev: Examples) -> None:
    """Put the answers of a new exit 0 in a record, in place of the old one's."""
    record, evaluation, old = read_record(run), read_evaluation(run), read_json(run / EVALUATION)
    validation = load_validation(run, evaluation, record)
    fitted = answer(train.take(record.subset), dev, record.num_labels)
    validation = validation._replace(logits=torch.cat([fitted[None], validation.logits[1:].float()]))
    rule, point = operating_point(validation, evaluation.operating_point.wish, None, None)
    new = curve_of(validation, crossfit(validation), evaluation.thresholds)
    new |= {"temperatures": rule.temperatures.tolist(), "operating_point": point}
    save_evaluation(run, old | new, validation._replace(logits=validation.logits.half()))


def main() -> None:
    """Fit exit 0 anew on all rows, and print the tables."""
    parser = Parser(__doc__)
    parser.add_argument("records", type=Path)
    parser.add_argument("--data-dir", type=Path, default=home() / "data")
    parser.add_argument("--own", type=Path, nargs=2, metavar=("TRAIN", "TEST"), required=True)
    add_report_options(parser)
    args = parser.parse_args()
    for task in args.tasks:
        train, dev = (load_examples(task, split, args.data_dir) for split in ("train", "dev"))
        for seed in args.seeds:
            refit(args.records / f"{task}-{seed}-branch", train, dev)
    mnli = [load_examples("mnli", split, args.data_dir) for split in ("train", "dev")]
    own, labels = [], None
    for path in args.own:
        rows, labels = examples_of(path, read_rows(path), ["text"], "label", labels)
        own.append(rows)
    cells = []
    for name, count, (train, dev) in [("MNLI", ROWS, mnli), *(("own text", count, own) for count in OWN_ROWS)]:
        scores = []
        for seed in args.seeds:
            subset = np.sort(np.random.default_rng(seed).permutation(len(train.first))[:count])
            said = answer(train.take(subset), dev, max(dev.labels) + 1).argmax(-1)
            scores.append(float(score(said, torch.tensor(dev.labels), "accuracy")))
        cells.append([name, f"{count:,}", len(scores), f"{np.mean(scores):.1f}"])
    print(table("n-grams on other rows, in accuracy", ["data", "rows", "seeds", "score"], cells))
    report(args.records, args.tasks, args.seeds, args.figure)


if __name__ == "__main__":
    run_command(main)
