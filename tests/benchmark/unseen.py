"""Evaluate runs on training rows that none of them has seen, to choose a learning rate on rows that no table scores.

    python -m tests.benchmark.unseen RUN... [--data-dir DIR]

For each RUN of one task it writes RUN-unseen, the same run with 2,000 such rows to validate on, and evaluates it.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from evaluate import evaluate
from minisweet.base.commands import Parser, run_command
from minisweet.hub import home
from minisweet.run import check_output, load_model, load_run_tokenizer, read_record, save_run
from minisweet.tasks import load_examples

ROWS = 2000


def main() -> None:
    """Write and evaluate a copy of each run."""
    parser = Parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--data-dir", type=Path, default=home() / "data")
    args = parser.parse_args()
    records = {folder: read_record(folder) for folder in args.runs}
    task = next(iter(records.values())).task
    rows = load_examples(task, "train", args.data_dir)
    texts = np.array(rows.texts())
    seen = texts[sorted({row for record in records.values() for row in record.subset})]
    unseen = np.flatnonzero(~np.isin(texts, seen))
    rows = rows.take(np.random.default_rng(0).permutation(unseen)[:ROWS])
    for folder, record in records.items():
        out = Path(f"{folder}-unseen")
        check_output(out, overwrite=False)
        model, tokenizer = load_model(folder, record), load_run_tokenizer(folder, record)
        save_run(out, replace(record, task=f"{task}-unseen"), model, tokenizer, rows)
        evaluate(out)


if __name__ == "__main__":
    run_command(main)
