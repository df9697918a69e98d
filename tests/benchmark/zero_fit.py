"""Exit 0 fitted anew in the branches' records of zero_layer.py or eight_epochs.py, on the same rows.

    python -m tests.benchmark.zero_fit FOLDER/records --data-dir DIR --own TRAIN.csv TEST.csv

It is for records of an older exit 0. Their trained exits, and what else was found of them, stay as they are.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from minisweet import NgramExit, load_encoder
from minisweet.base.commands import Parser, run_command
from minisweet.base.files import home, read_json, write_json
from minisweet.data.rows import Examples
from minisweet.data.tasks import load_examples
from minisweet.data.text import TokenizedExamples, load_tokenizer, special_ids
from minisweet.evaluation.metrics import score
from minisweet.evaluation.sweep import LOGITS
from minisweet.ngrams import fit_ngrams
from minisweet.runs.folders import EVALUATION, read_record
from minisweet.runs.hub import model_folder
from tests.benchmark.choose import read_own


@torch.no_grad()
def refit(run: Path, train: Examples, dev: Examples) -> None:
    """Put the answers of a new exit 0 in a record, in place of the old one's."""
    record, folder, old = read_record(run), model_folder("minilm-l6"), read_json(run / EVALUATION)
    words, train = load_encoder(folder).word_embeddings.weight, train.take(record.subset)
    tokenizer = load_tokenizer(folder, len(words), record.max_length)
    parts = [TokenizedExamples(tokenizer, rows) for rows in (train, dev)]
    fitted, validated = (
        [part.batch(rows).inputs for rows in np.array_split(np.arange(len(part)), -(-len(part) // 256))]
        for part in parts
    )
    exit = NgramExit(len(words), record.num_labels, special_ids(tokenizer), train.second is not None)
    fit_ngrams(exit, fitted, torch.tensor(train.labels), words)
    tensors = load_file(run / LOGITS)
    tensors["logits"][0] = torch.cat([exit(*inputs) for inputs in validated])
    save_file(tensors, run / LOGITS)
    scores = score(tensors["logits"].argmax(-1), torch.tensor(dev.labels), record.metric)
    write_json(run / EVALUATION, old | {"exit_scores": scores.tolist()})


def main() -> None:
    """Fit exit 0 anew in all records of branches."""
    parser = Parser(__doc__)
    parser.add_argument("records", type=Path)
    parser.add_argument("--data-dir", type=Path, default=home() / "data")
    parser.add_argument("--own", type=Path, nargs=2, metavar=("TRAIN", "TEST"))
    args = parser.parse_args()
    for run in sorted(args.records.glob("*-branch*")):
        task = run.name.split("-")[0]
        parts = (
            read_own(args.own) if task == "own" else [load_examples(task, n, args.data_dir) for n in ("train", "dev")]
        )
        refit(run, *parts[:2])
        print(run, flush=True)


if __name__ == "__main__":
    run_command(main)
