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
from minisweet.base.files import InputError, write_json
from minisweet.tasks import TASKS, load_examples
from minisweet.texts import Batch, Texts
from minisweet.exits import MultiExitModel, exit_loss
from minisweet.hub import fetch_task, home
from minisweet.run import Run


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


def measure(run: Run, batches: int, data_dir: Path) -> np.ndarray:
    """Compare the exits' gradients on some batches of rows that a run has not seen: (batches, M, K, K)."""
    record, options = run.record, run.record.arguments
    exits, size = [n for n in record.exit_layers if n > 0], options.batch_size
    if options.method != "ee" or len(exits) < 2 or record.task not in TASKS or record.text_columns:
        own = " (own text)" if record.text_columns else ""
        what = f"a run of {options.method} on {record.task}{own}, exits after layers {','.join(map(str, exits))}"
        raise InputError(f"{run.folder}: {what}; should be of ee on a task, with two exits or more")
    fetch_task(record.task, data_dir)
    rows, device = load_examples(record.task, "train", data_dir), choose_device("auto")
    order = np.random.default_rng(options.seed).permutation(len(rows.labels))
    unseen = order[~np.isin(order, record.subset)]
    if len(unseen) < batches * size:
        raise InputError(f"--batches: {batches} of {size} rows, and {record.task} has {len(unseen)} other rows")
    texts = Texts(run.tokenizer, rows.take(unseen[: batches * size]))
    model = run.model.keep_exits(exits).to(device)  # exit 0 sends no gradient to a layer; no dropout
    parts = np.arange(len(texts)).reshape(-1, size)
    return np.stack([exit_similarities(model, texts.batch(rows).to(device)) for rows in parts])


def main() -> None:
    """Measure, print a table for each matrix, and write gradients.json."""
    parser = Parser(__doc__)
    option = parser.add_argument
    option("runs", nargs="+", type=Path, metavar="RUN", help="run of EE on one of the tasks; or several seeds of it")
    option("--batches", type=whole_number(2), default=10, help="new training batches to measure on (default: 10)")
    option("--out", type=Path, default=Path("gradients.json"), help="(default: gradients.json)")
    option("--data-dir", type=Path, default=home() / "data", help="the GLUE tasks' folders (default: %(default)s)")
    args = parser.parse_args()
    runs = [Run.read(folder) for folder in args.runs]
    its = runs[0].record
    if len({(run.record.task, *run.record.exit_layers) for run in runs}) > 1:
        raise InputError(f"RUN: {args.runs[-1]} is of another task or other exits, should be as {args.runs[0]}")
    found = np.stack([measure(run, args.batches, args.data_dir) for run in runs])  # (runs, batches, M, K, K)
    exits, mean = [n for n in its.exit_layers if n > 0], found.mean((0, 1))
    deviation = (found.mean(1) if len(runs) > 1 else found[0]).std(0, ddof=1)  # over runs, or batches of one run
    seeds = [run.record.arguments.seed for run in runs]
    given = {"model": its.arguments.model, "task": its.task, "seeds": seeds, "learning_rate": its.arguments.lr}
    given |= {"batches": args.batches, "layers": exits[:-1], "exits": exits}
    for name, values in (("cosine", mean), ("deviation", deviation)):
        given[name] = np.where(np.isnan(values), None, values.round(4)).tolist()  # JSON has no NaN
    write_json(args.out, given)
    for layer, cosines in zip(exits, mean, strict=False):
        print(f"\nlayer {layer}: cosines of the gradients of two exits\n{'exit':>6}" + "".join(f"{n:8}" for n in exits))
        for n, row in zip(exits, cosines, strict=True):
            print(f"{n:6}" + "".join(" " * 8 if np.isnan(value) else f"{value:8.2f}" for value in row))
    print(f"written to {args.out}")
