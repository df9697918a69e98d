"""Do the exits' gradients conflict? The measurement of Sec. 3.1, Figs. 3 and 9.

    python -m minisweet.gradients --task mnli

train.py fine-tunes EE for some steps. Then, on training rows that it did not see, each exit's loss is back-propagated
alone, and the gradients that two exits send to the same matrix are compared: the cosine similarity of their rows,
averaged over the rows. The matrices are the last feed-forward matrix of each layer that precedes an exit; the last
exit's is left out, since no other exit updates it. A similarity near 1 is agreement, below 0 conflict.

Dimension letters: K exits, M = K-1 matrices.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minisweet.base.commands import Parser, positive_float, run_command, whole_number
from minisweet.base.devices import choose_device, tune_cpu
from minisweet.base.safe import InputError, home, write_json
from minisweet.data.tasks import TASKS, load_examples
from minisweet.data.text import Batch, TokenizedExamples, load_tokenizer
from minisweet.exits import MultiExitModel, exit_loss
from minisweet.paper.report import for_json, over_seeds
from minisweet.paper.reproduce import TRAINING, as_options, need_clone, run_script
from minisweet.runs.folders import load_run, versions
from minisweet.runs.options import SMALL, add_training_options, find_model
from minisweet.runs.records import Record
from minisweet.use.plots import new_figure, save_figure, shown


def row_similarity(a: Tensor, b: Tensor) -> tuple[float, int]:
    """The mean cosine similarity of the rows of two matrices (n, m), and how many rows were left out.

    A row that is all zero in either has no direction and is left out. If all are, the mean is NaN.
    """
    a, b = a.double(), b.double()
    norms = a.norm(dim=1) * b.norm(dim=1)  # (n,)
    cosine = ((a * b).sum(1) / norms)[norms > 0]
    return cosine.mean().item(), len(a) - len(cosine)


def exit_similarities(model: MultiExitModel, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Compare all exits' gradients on one batch, on the model's device. Dropout is off in evaluation mode.

    Returns similarities (M, K, K), NaN where an exit sends a matrix no gradient, and how many rows each leaves out.
    """
    matrices = [model.encoder.layers[n - 1].output.weight for n in model.exit_layers[:-1]]
    losses = [exit_loss(*answer, batch.targets) for answer in model.exit_by_exit(*batch.inputs)]
    gradients = [torch.autograd.grad(loss, matrices, retain_graph=True, allow_unused=True) for loss in losses]
    similarity = np.full((len(matrices), len(losses), len(losses)), np.nan)
    left_out = np.zeros(similarity.shape, dtype=int)
    for m, i, j in np.ndindex(similarity.shape):
        if gradients[i][m] is not None and gradients[j][m] is not None:
            similarity[m, i, j], left_out[m, i, j] = row_similarity(gradients[i][m], gradients[j][m])
    return similarity, left_out


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = Parser(description="Compare the gradients that exits send to the same layer.")
    option = parser.add_argument
    option("--method", choices=("ee", "sweet"), default="ee", help="how to fine-tune (default: ee)")
    option("--task", choices=list(TASKS), default="mnli", help="what to learn (default: mnli)")
    option("--steps", type=whole_number(1), default=400, help="of fine-tuning; small tasks need fewer (default: 400)")
    option("--batches", type=whole_number(1), default=10, help="new training batches to measure on (default: 10)")
    option("--seed", type=whole_number(0), default=0, help="of the examples, new weights, dropout (default: 0)")
    option("--lr", type=positive_float, help="first learning rate (default: 2e-5, the paper's; small models 2e-4)")
    option("--out", type=Path, default=Path("gradients"), help="folder to write to (default: gradients)")
    option("--overwrite", action="store_true", help="replace the measurement in --out")
    option("--data-dir", type=Path, default=home() / "data", help="the GLUE tasks' folders (default: %(default)s)")
    add_training_options(parser)
    return parser.parse_args()


def fine_tuned(args: argparse.Namespace) -> tuple[MultiExitModel, Record]:
    """The model that train.py makes of these options, and its record."""
    args.out.mkdir(parents=True, exist_ok=True)  # tried now, since it is needed after the training
    with tempfile.TemporaryDirectory(prefix=".training-", dir=args.out) as temporary:
        run = Path(temporary) / "run"
        if status := run_script("train.py", as_options(vars(args) | {"out": run, "epochs": 1}, TRAINING)):
            sys.exit(status if status > 0 else 128 - status)  # it has said why, or a signal ended it
        return load_run(run)


def main() -> None:
    """Fine-tune, measure, and write gradients.json and gradients.png."""
    args = parse_arguments()
    need_clone()
    tune_cpu()
    if (args.out / "gradients.json").exists() and not args.overwrite:
        raise InputError(f"--out: {args.out} holds a measurement already; name another folder, or pass --overwrite")
    new_figure(args.out / "gradients.png")
    device = choose_device(args.device)
    folder, config, args.exit_layers = find_model(args)
    args.lr = args.lr or (2e-4 if config.hidden_size <= SMALL else 2e-5)
    if len(args.exit_layers) < 2:
        raise InputError(f"--exit-layers: {args.exit_layers[0]} is one exit, and there is nothing to compare it with")
    rows = load_examples(args.task, "train", args.data_dir)
    args.train_size, unseen, N = args.steps * args.batch_size, args.batches * args.batch_size, len(rows.labels)
    if (needed := args.train_size + unseen) > N:
        wish = f"{args.steps} steps and {args.batches} new batches of {args.batch_size}"
        raise InputError(f"--steps: {wish} need {needed} examples, and {args.task} has {N}")
    model, record = fine_tuned(args)
    order = np.random.default_rng(args.seed).permutation(N)
    tokenizer = load_tokenizer(folder, config.vocab_size, args.max_length, config.max_position_embeddings)
    new = TokenizedExamples(tokenizer, rows, order[~np.isin(order, record.subset)][:unseen])
    model.to(device).eval()
    batches = (new.batch(rows).to(device) for rows in np.arange(unseen).reshape(args.batches, -1))
    similarities, left_out = map(np.stack, zip(*(exit_similarities(model, batch) for batch in batches), strict=True))
    write_report(args, record, similarities, left_out.sum(0))


def write_report(args: argparse.Namespace, record: Record, similarities: np.ndarray, left_out: np.ndarray) -> None:
    """Write and print the mean of the batches' similarities (batches, M, K, K), and the rows left out (M, K, K)."""
    layers, exits = list(args.exit_layers[:-1]), list(args.exit_layers)
    mean, deviation, _ = over_seeds(similarities)  # of batches here: (M, K, K) each
    conflict = (~np.isnan(mean) & ~np.eye(len(exits), dtype=bool)).any()  # two exits update one matrix
    given = ("model", "method", "task", "steps", "batches", "batch_size", "seed")
    report = {key: getattr(args, key) for key in given} | {
        "learning_rate": args.lr,
        "device": record.device,
        "precision": record.precision,
        "versions": versions(),
        "layers": layers,
        "exits": exits,
        "nothing_to_conflict": not conflict,
        "cosine": for_json(mean),
        "deviation": for_json(deviation),
        "rows_left_out": left_out.tolist(),
    }
    write_json(args.out / "gradients.json", report)
    draw_similarities(args.out / "gradients.png", mean, args)
    for m, layer in enumerate(layers):
        print(f"\nlayer {layer}: cosine similarity of the gradients of the exits after {str(exits[m:])[1:-1]}")
        print(mean[m, m:, m:].round(3))
    if not conflict:
        print("\nNo two exits update the same matrix: there is nothing to conflict.")
    if left_out.any():
        print(f"\n{left_out.sum()} pairs of rows without a direction were left out")
    print(f"\nwritten to {args.out / 'gradients.json'} and gradients.png")


def draw_similarities(path: Path, mean: np.ndarray, args: argparse.Namespace) -> None:
    """Draw a heat map with one panel per layer to a PNG: mean (M, K, K). Raises InputError without matplotlib."""
    M, K, _ = mean.shape
    figure = new_figure(path, figsize=(3.2 * M + 1, 3.6), layout="constrained")
    axes = figure.subplots(1, M, squeeze=False)
    for m, axis in enumerate(axes[0]):
        image = axis.imshow(mean[m, m:, m:], vmin=-1, vmax=1, cmap="RdBu")
        ticks, names = range(K - m), [f"C-{k + 1}" for k in range(m, K)]  # as in the paper
        axis.set(title=f"layer {args.exit_layers[m]}", xticks=ticks, yticks=ticks, xticklabels=names, yticklabels=names)
        for (i, j), value in np.ndenumerate(mean[m, m:, m:]):
            text = "-" if np.isnan(value) else f"{value:.2f}"
            axis.text(j, i, text, ha="center", va="center", color="white" if abs(value) > 0.6 else "black")
    figure.colorbar(image, ax=axes, shrink=0.8, label="cosine similarity")
    figure.suptitle(shown(f"{args.model}, {args.method}, {args.task}", 100))
    save_figure(figure, path)


if __name__ == "__main__":
    run_command(main)
