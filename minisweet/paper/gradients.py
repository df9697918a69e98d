"""Measure whether the exits' gradients conflict (Sec. 3.1, Figs. 3 and 9), in a run of EE, such as the paper's.

    python train.py --model bert-base --method ee --task mnli --train-size 6400 --epochs 1 --lr 2e-5 --out runs/ee
    python -m minisweet gradients runs/ee

On training rows that the run did not see, each exit's loss is back-propagated alone, and the gradients that two exits
send to the same matrix are compared: the cosine similarity of their rows, averaged over the rows. The matrices are the
last feed-forward matrix of each exit layer except the last, which only its own loss updates. Near 1 the gradients
agree; near 0 they are orthogonal, which the paper calls conflicting. Several runs are averaged.

Dimension letters: K exits, M = K-1 matrices.
"""

import csv
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from minisweet.base.commands import Parser, path_to, whole_number
from minisweet.base.devices import choose_device
from minisweet.base.files import InputError, written_beside
from minisweet.exits import MultiExitModel, exit_loss
from minisweet.hub import fetch_task, home
from minisweet.run import load_model, load_run_tokenizer, read_record
from minisweet.tasks import TASKS, load_examples
from minisweet.texts import Batch, Texts


def exit_similarities(model: MultiExitModel, batch: Batch) -> np.ndarray:
    """Compare all exits' gradients on one batch: (M, K, K), NaN where an exit sends a matrix no gradient."""
    matrices = [model.encoder.get_parameter(f"layers.{n - 1}.output.weight") for n in model.exit_layers[:-1]]
    losses = [exit_loss(*answer, batch.targets) for answer in model.exit_by_exit(*batch.inputs)]
    gradients = [torch.autograd.grad(loss, matrices, retain_graph=True, allow_unused=True) for loss in losses]
    similarity = np.full((len(matrices), len(losses), len(losses)), np.nan)
    for m, i, j in np.ndindex(similarity.shape):
        a, b = gradients[i][m], gradients[j][m]  # (D, 4D), or None
        if a is not None and b is not None:  # the default eps, 1e-8, is larger than some gradients
            similarity[m, i, j] = F.cosine_similarity(a.double(), b.double(), dim=1, eps=1e-30).mean()
    return similarity


def similarities_of_run(folder: Path, batches: int, data_dir: Path) -> np.ndarray:
    """Compare the exits' gradients on some batches of rows that a run has not seen: (batches, M, K, K)."""
    record = read_record(folder)
    options, size = record.arguments, record.arguments.batch_size
    if options.method != "ee" or not size or len(record.exit_layers) < 2 or record.task not in TASKS or record.fit:
        layers = ",".join(map(str, record.exit_layers))
        found = f"a run of {options.method} on {record.task}, exits after layers {layers}"
        raise InputError(f"{folder}: {found}; should be of ee on a task, with two exits or more")
    fetch_task(record.task, data_dir)
    rows = load_examples(record.task, "train", data_dir)
    device = choose_device("auto")
    order = np.random.default_rng(options.seed).permutation(len(rows.first))
    unseen = order[~np.isin(order, record.subset)]
    if len(unseen) < batches * size:
        raise InputError(f"{batches} of {size} rows, and {record.task} has {len(unseen)} other rows", "batches")
    tokenizer = load_run_tokenizer(folder, record)
    seen = [row for row in record.subset if row < len(rows.first)]
    if not np.isin(Texts(tokenizer, rows.take(seen[:100])).keys, record.trained_keys).all():
        raise InputError(f"{data_dir} has other rows of {record.task} than {folder} was trained on", "data_dir")
    texts = Texts(tokenizer, rows.take(unseen[: batches * size].tolist()))
    (model,) = load_model(folder, record).to(device).models_alone  # in evaluation mode: no dropout
    parts = np.arange(len(texts)).reshape(-1, size)
    return np.stack([exit_similarities(model, texts.batch(rows).to(device)) for rows in parts])


def main(words: list[str]) -> None:
    """Measure, and print and write the cosine of each pair of exits at each layer."""
    parser = Parser(__doc__, "minisweet gradients")
    option = parser.add_argument
    option("runs", nargs="+", type=Path, metavar="RUN", help="run of EE on one of the tasks; or several seeds of it")
    option("--batches", type=whole_number(2), default=10, help="new training batches to measure on (default: 10)")
    option("--out", type=path_to(".csv"), default=Path("gradients.csv"), help="(default: gradients.csv)")
    option("--data-dir", type=Path, default=home() / "data", help="the GLUE tasks' folders (default: %(default)s)")
    args = parser.parse_args(words)
    records = [read_record(folder) for folder in args.runs]
    alike = [replace(record.arguments, seed=0, exit_layers=record.exit_layers) for record in records]
    for folder, record, own in zip(args.runs, records, alike, strict=True):
        if (record.task, own) != (records[0].task, alike[0]):
            raise InputError(f"RUN: {folder} is of another task or has other options than {args.runs[0]}")
    of_runs = [similarities_of_run(folder, args.batches, args.data_dir) for folder in args.runs]
    found = np.stack(of_runs)  # (runs, batches, M, K, K)
    mean = found.mean((0, 1))
    exits = records[0].exit_layers
    options = records[0].arguments
    deviation = (found.mean(1) if len(records) > 1 else found[0]).std(0, ddof=1)  # over runs, or batches of one run
    seeds = " ".join(str(record.arguments.seed) for record in records)
    rows = []
    for m, layer in enumerate(exits[:-1]):
        for i, j in combinations(range(m, len(exits)), 2):
            values = f"{mean[m, i, j]:.4f}", f"{deviation[m, i, j]:.4f}"
            run = Path(options.model).name, records[0].task, options.lr, options.pooling or "cls", seeds
            rows.append([*run, layer, exits[i], exits[j], *values])
            print(f"layer {layer}, exits {exits[i]} and {exits[j]}: cosine {values[0]} ±{values[1]}")
    with written_beside(args.out) as new, new.open("w", encoding="utf-8", newline="") as file:
        head = "model task rate pooling seeds layer exit other cosine deviation".split()
        csv.writer(file, lineterminator="\n").writerows([head, *rows])
    print(f"written to {args.out}")
