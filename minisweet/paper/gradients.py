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
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from minisweet.base.commands import Parser, number, path_to
from minisweet.base.devices import choose_device
from minisweet.base.files import InputError, written_beside
from minisweet.exits import MultiExitModel, exit_loss
from minisweet.loading import read_config
from minisweet.run import load_models, read_run
from minisweet.texts import Batch, Texts, load_tokenizer


def exit_similarities(model: MultiExitModel, batch: Batch) -> np.ndarray:
    """Compare all exits' gradients on one batch: (M, K, K), NaN where an exit sends a matrix no gradient."""
    matrices = [model.encoder.get_parameter(f"layers.{n - 1}.output.weight") for n in model.exit_layers[:-1]]
    losses = [exit_loss(answer, batch.labels) for answer in model(*batch.inputs)]
    gradients = [torch.autograd.grad(loss, matrices, retain_graph=True, allow_unused=True) for loss in losses]
    similarity = np.full((len(matrices), len(losses), len(losses)), np.nan)
    for m, i, j in np.ndindex(similarity.shape):
        a, b = gradients[i][m], gradients[j][m]  # (D, 4D), or None
        if a is not None and b is not None:  # the default eps, 1e-8, is larger than some gradients
            similarity[m, i, j] = F.cosine_similarity(a.double(), b.double(), dim=1, eps=1e-30).mean()
    return similarity


def similarities_of_run(folder: Path, batches: int, data_dir: Path | None) -> np.ndarray:
    """Compare the exits' gradients on some batches of rows that a run has not seen: (batches, M, K, K)."""
    run, config, size = read_run(folder), read_config(folder), read_run(folder).batch_size
    if run.method != "ee" or len(run.exit_layers) < 2:
        found = f"a run of {run.method} on {run.task}, exits after layers {','.join(map(str, run.exit_layers))}"
        raise InputError(f"{folder}: {found}; should be of ee, with two exits or more")
    rows = run.examples("train", data_dir)
    order = np.random.default_rng(run.seed).permutation(len(rows.first))
    unseen = order[~np.isin(order, run.subset)]
    if len(unseen) < batches * size:
        raise InputError(f"{batches} of {size} rows, and {run.task} has {len(unseen)} other rows", "batches")
    tokenizer = load_tokenizer(folder, config.vocab_size, run.max_length)
    texts = Texts(tokenizer, rows.take(unseen[: batches * size].tolist()))
    device = choose_device("auto")
    (model,) = load_models(folder, run, config)  # in evaluation mode: no dropout
    model.to(device)
    parts = np.arange(len(texts)).reshape(-1, size)
    return np.stack([exit_similarities(model, texts.batch(rows).to(device)) for rows in parts])


def main(words: list[str]) -> None:
    """Measure, and print and write the cosine of each pair of exits at each layer."""
    parser = Parser(__doc__, "minisweet gradients")
    option = parser.add_argument
    option("runs", nargs="+", type=Path, metavar="RUN", help="run of EE on one of the tasks; or several seeds of it")
    option("--batches", type=number(int, 2), default=10, help="new training batches to measure on (default: 10)")
    option("--out", type=path_to(".csv"), default=Path("gradients.csv"), help="is replaced (default: gradients.csv)")
    option("--data-dir", type=Path, help="the folder of the tasks (default: that of the training)")
    args = parser.parse_args(words)
    runs = [read_run(folder) for folder in args.runs]
    poolings = [read_config(folder).pooling for folder in args.runs]
    alike = [(run.model, run.task, run.lr, run.batch_size, run.train_size, run.exit_layers) for run in runs]
    for folder, pooling, own in zip(args.runs, poolings, alike, strict=True):
        if (pooling, own) != (poolings[0], alike[0]):
            raise InputError(f"RUN: {folder} is of another task or has other options than {args.runs[0]}")
    of_runs = [similarities_of_run(folder, args.batches, args.data_dir) for folder in args.runs]
    found = np.stack(of_runs)  # (runs, batches, M, K, K)
    mean = found.mean((0, 1))
    exits = runs[0].exit_layers
    deviation = (found.mean(1) if len(runs) > 1 else found[0]).std(0, ddof=1)  # over runs, or batches of one run
    seeds = " ".join(str(run.seed) for run in runs)
    rows = []
    for m, layer in enumerate(exits[:-1]):
        for i, j in combinations(range(m, len(exits)), 2):
            values = f"{mean[m, i, j]:.4f}", f"{deviation[m, i, j]:.4f}"
            of_all = Path(runs[0].model).name, runs[0].task, runs[0].lr, poolings[0], seeds
            rows.append([*of_all, layer, exits[i], exits[j], *values])
            print(f"layer {layer}, exits {exits[i]} and {exits[j]}: cosine {values[0]} ±{values[1]}")
    with written_beside(args.out) as new, new.open("w", encoding="utf-8", newline="") as file:
        head = "model task rate pooling seeds layer exit other cosine deviation".split()
        csv.writer(file, lineterminator="\n").writerows([head, *rows])
    print(f"written to {args.out}")
