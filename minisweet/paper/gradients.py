"""Measure whether the exits' gradients conflict (Sec. 3.1, Figs. 3 and 9), in a run of EE, such as the paper's.

    python train.py --model bert-base --method ee --task mnli --train-size 6400 --epochs 1 --lr 2e-5 --out runs/ee
    python -m minisweet gradients runs/ee

On training rows that the run did not see, each exit's loss is back-propagated alone, and the gradients that two exits
send to the same matrix are compared: the cosine similarity of their rows, averaged over the rows. The matrices are the
last feed-forward matrix of each layer that precedes an exit. The last exit's is left out, since no other exit updates
it. A similarity near 1 is agreement, below 0 conflict. Of several runs, such as three seeds, the mean is shown.

Dimension letters: K exits, M = K-1 matrices.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from minisweet.base.commands import Parser, whole_number
from minisweet.base.devices import choose_device
from minisweet.base.files import InputError, one_line, write_json
from minisweet.data.tasks import TASKS, load_examples
from minisweet.data.text import Batch, TokenizedExamples, load_tokenizer
from minisweet.evaluation.plots import new_figure, save_figure
from minisweet.exits import MultiExitModel, exit_loss
from minisweet.runs.folders import load_run, read_record
from minisweet.runs.hub import fetch_task, home
from minisweet.runs.records import Record


def exit_similarities(model: MultiExitModel, batch: Batch) -> np.ndarray:
    """Compare all exits' gradients on one batch: (M, K, K), NaN where an exit sends a matrix no gradient."""
    matrices = [model.encoder.layers[n - 1].output.weight for n in model.exit_layers[:-1]]
    losses = [exit_loss(*answer, batch.targets) for answer in model.exit_by_exit(*batch.inputs)]
    gradients = [torch.autograd.grad(loss, matrices, retain_graph=True, allow_unused=True) for loss in losses]
    similarity = np.full((len(matrices), len(losses), len(losses)), np.nan)
    for m, i, j in np.ndindex(similarity.shape):
        a, b = gradients[i][m], gradients[j][m]  # (D, 4D), or None
        if a is not None and b is not None:  # the default eps, 1e-8, is larger than some gradients
            similarity[m, i, j] = F.cosine_similarity(a.double(), b.double(), dim=1, eps=1e-30).mean()
    return similarity


def measure(run: Path, record: Record, batches: int, data_dir: Path) -> np.ndarray:
    """Compare the exits' gradients on some batches of rows that a run has not seen: (batches, M, K, K)."""
    model, _ = load_run(run)
    exits, size, device = list(model.head_layers), record.batch_size, choose_device("auto")
    if record.method != "ee" or len(exits) < 2 or record.task not in TASKS or record.text_columns:
        own = " (own text)" if record.text_columns else ""
        what = f"a run of {record.method} on {record.task}{own}, exits after layers {','.join(map(str, exits))}"
        raise InputError(f"{run}: {what}; should be of ee on a task, with two exits or more")
    fetch_task(record.task, data_dir)
    rows = load_examples(record.task, "train", data_dir)
    order = np.random.default_rng(record.seed).permutation(len(rows.labels))
    unseen = order[~np.isin(order, record.subset)]
    if len(unseen) < batches * size:
        raise InputError(f"--batches: {batches} of {size} rows, and {record.task} has {len(unseen)} other rows")
    tokenizer = load_tokenizer(run, record.vocab_size, record.max_length)
    examples = TokenizedExamples(tokenizer, rows.take(unseen[: batches * size]))
    model = model.keep_exits(exits).to(device)  # exit 0 sends no gradient to a layer; no dropout
    parts = np.arange(len(examples)).reshape(-1, size)
    return np.stack([exit_similarities(model, examples.batch(rows).to(device)) for rows in parts])


def main() -> None:
    """Measure, and write gradients.json and gradients.png."""
    parser = Parser(__doc__)
    option = parser.add_argument
    option("runs", nargs="+", type=Path, metavar="RUN", help="run of EE on one of the tasks; or several seeds of it")
    option("--batches", type=whole_number(2), default=10, help="new training batches to measure on (default: 10)")
    option("--out", type=Path, default=Path("gradients"), help="folder to write to (default: gradients)")
    option("--data-dir", type=Path, default=home() / "data", help="the GLUE tasks' folders (default: %(default)s)")
    args = parser.parse_args()
    record, *others = records = [read_record(run) for run in args.runs]
    if other := next((its for its in others if (its.task, its.exit_layers) != (record.task, record.exit_layers)), None):
        raise InputError(f"RUN: {other.task}, exits {other.exit_layers}, should be as {args.runs[0]}'s for one mean")
    pairs = zip(args.runs, records, strict=True)
    found = np.stack([measure(run, its, args.batches, args.data_dir) for run, its in pairs])  # (runs, batches, M, K, K)
    mean, parts = found.mean((0, 1)), found.mean(1) if others else found[0]
    exits = [n for n in record.exit_layers if n > 0]
    given = {"model": record.model, "task": record.task, "steps": len(record.losses), "learning_rate": record.lr}
    given |= {key: getattr(record, key) for key in ("method", "batch_size", "device", "precision")}
    given |= {"seeds": [its.seed for its in records], "batches": args.batches, "layers": exits[:-1], "exits": exits}
    # The deviation is over the runs' means, or over the batches of one run alone.
    for name, values in (("cosine", mean), ("deviation", parts.std(0, ddof=1))):
        given[name] = np.where(np.isnan(values), None, values.round(4)).tolist()  # JSON has no NaN
    write_json(args.out / "gradients.json", given)
    title = f"{record.model}, {record.method}, {record.task}" + f", mean of {len(records)} runs" * bool(others)
    draw_similarities(args.out / "gradients.png", mean, exits, title)
    print(f"written to {args.out / 'gradients.json'} and gradients.png")


def draw_similarities(path: Path, mean: np.ndarray, exits: list[int], title: str) -> None:
    """Draw a heat map with one panel per layer to a PNG: mean (M, K, K)."""
    M, K, _ = mean.shape
    figure = new_figure(3.2 * M + 1, 3.6)
    axes = figure.subplots(1, M, squeeze=False)[0]
    for m, axis in enumerate(axes):
        image = axis.imshow(mean[m, m:, m:], vmin=-1, vmax=1, cmap="RdBu")
        ticks, names = range(K - m), [f"C-{k + 1}" for k in range(m, K)]  # as in the paper
        axis.set(title=f"layer {exits[m]}", xticks=ticks, yticks=ticks, xticklabels=names, yticklabels=names)
        for (i, j), value in np.ndenumerate(mean[m, m:, m:]):
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if abs(value) > 0.6 else "black")
    figure.colorbar(image, ax=axes, shrink=0.8, label="cosine similarity")
    figure.suptitle(one_line(title, 100))
    save_figure(figure, path)
