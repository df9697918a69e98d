"""Fine-tune BERT, DeBERTa or MPNet with early exits: SWEET, Early-Exit (ee) or Multi-Model (mm).

    python train.py                                   # minilm-l6, sweet, toy: a few minutes on two cores
    python train.py --model bert-base --method sweet --task rte

Writes a run folder for evaluate.py. The training loop is `fine_tune` in this file; the methods differ in the forward
pass of minisweet/exits.py.

Dimension letters: B batch, K exits, C classes.
"""

import hashlib
import time
from argparse import Namespace
from functools import partial
from math import ceil
from pathlib import Path
from shlex import quote

import numpy as np
import torch
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_

from minisweet.base.commands import Parser, number, positive_number, progress, run_command
from minisweet.base.devices import choose_device, choose_precision, device_name
from minisweet.base.files import LOG, InputError
from minisweet.checkpoint import load_layers
from minisweet.defaults import fill_in
from minisweet.exits import METHODS, MultiExitModel, build_models, exit_loss
from minisweet.fast import tune_cpu, used_rows
from minisweet.hub import fetch_task, model_folder
from minisweet.loading import WEIGHTS, read_config
from minisweet.options import WHAT, add_training_options
from minisweet.run import Run, check_output, environment, run_name, save_run
from minisweet.tasks import TASKS, find_task, load_examples
from minisweet.texts import Texts, load_tokenizer


def fine_tune(
    model: MultiExitModel,
    texts: Texts,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int = 0,
    device: torch.device | str = "cpu",
    precision: torch.dtype | None = None,
) -> list[list[float]]:
    """Train all parameters of a model on labelled texts (App. A). Returns the losses of each step, (steps, K).

    The loss is the unweighted sum of the exits' losses. The learning rate decays linearly from `lr` to zero. As in the
    authors' code, there is no weight decay and no warm-up, and the norm over all gradients is clipped to 1: a factor
    that SWEET's exits share. `precision` is the type to autocast to; None means float32. To add a score of dev rows
    between epochs, call `model.eval()`, `answer_all`, `model.train()`, and drop `used_rows`, which cuts the vocabulary.
    Raises InputError if a loss, or a trained parameter, is infinite or NaN.
    """
    device = torch.device(device)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    scaler = GradScaler(device.type, enabled=precision is torch.float16)  # for float16 alone
    steps = epochs * ceil(len(texts) / batch_size)
    batches = (batch for epoch in range(epochs) for batch in texts.shuffled(batch_size, seed, epoch))
    history: list[list[float]] = []
    for step, batch in enumerate(progress(batches, total=steps, unit="step", desc="training")):
        batch = batch.to(device)
        torch.manual_seed(1_000_003 * seed + 1_009 * (step + 1))  # dropout, the same whatever ran before
        with torch.autocast(device.type, precision, enabled=precision is not None):
            losses = torch.stack([exit_loss(answer, batch.labels) for answer in model(*batch.inputs)])  # (K,)
        optimizer.zero_grad()
        scaler.scale(losses.sum()).backward()
        losses = losses.detach()  # otherwise the graph lives on during the next step
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        scaler.step(optimizer)
        scaler.update()
        history.append(losses.tolist())
        if not losses.isfinite().all():
            raise InputError(f"at {lr:g} the loss became infinite or NaN at step {step + 1}; try a lower one", "lr")
    if not all(parameter.isfinite().all() for parameter in model.parameters()):  # the last update: no loss has seen it
        raise InputError(f"at {lr:g} the weights became infinite or NaN at step {steps}; try a lower one", "lr")
    model.cpu()
    return history


def train(args: Namespace) -> Path:
    """Train a model on a task and write the run to a folder, which is returned.

    Raises InputError if the folder cannot be written or replaced (before training), if model and data do not match, and
    if training diverges.
    """
    # 1. Options: those that are left open depend on the model, the task and its rows.
    out = args.out or Path("runs") / run_name(args)
    check_output(out, args.overwrite)
    fetch_task(args.task, args.data_dir)
    task = find_task(args.task, args.data_dir)
    folder = model_folder(args.model)
    config = read_config(folder, args.pooling)
    rows, dev = (load_examples(args.task, split, args.data_dir) for split in ("train", "dev"))
    fill_in(args, config, task, min(len(rows.first), args.train_size))
    device = choose_device(args.device)
    precision = choose_precision(args.amp, device, training=True)

    # 2. Data: at most `train_size` rows to train on, sampled with the seed, the same for all methods.
    tokenizer = load_tokenizer(folder, config.vocab_size, args.max_length, config.max_tokens)
    order = np.random.default_rng(args.seed).permutation(len(rows.first))
    subset = np.sort(order[: args.train_size]).tolist()  # for one seed, a smaller subset is part of a larger one
    texts = Texts(tokenizer, rows.take(subset))

    # 3. Models: public weights, with new exits.
    torch.manual_seed(args.seed)
    first_layers = partial(load_layers, folder, config)
    models = build_models(args.method, first_layers, args.exit_layers, len(task.labels), args.exit_strategy)
    if rows.second is not None and models[0].encoder.reads_token_types and config.type_vocab_size < 2:
        raise InputError(f"{folder}: its type_vocab_size is 1, and pairs, as in {args.task}, need 2")
    counts = len(texts), len(order), args.max_length, texts.is_cut.sum(), len(dev.first)
    LOG.info("%s: %d of %d rows to train on (cut to %d tokens: %d), %d dev rows", args.task, *counts)
    announce(args, config.num_hidden_layers, device, precision)

    # 4. Training.
    start, losses = time.perf_counter(), []
    settings = {name: getattr(args, name) for name in ("epochs", "batch_size", "lr", "seed")}
    for model in models:
        with used_rows(model.encoder.word_embeddings, texts) as renumbered:  # for speed alone
            losses.append(fine_tune(model, renumbered, **settings, device=device, precision=precision))

    # 5. Save.
    check_output(out, args.overwrite)  # once more, since training takes a while
    run = Run(
        **{name: getattr(args, name) for name in ("method", "task", "lr", "seed", *WHAT) if name != "pooling"},
        data_dir=str(args.data_dir.resolve()),
        labels=list(task.labels),
        metric=task.metric,
        text_columns=list(task.columns[:-1]),
        header=list(task.header or ()),
        subset=subset,
        train_rows=rows.digest(),
        dev_rows=dev.digest(),
        weights=hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
        losses=[np.round(of_model, 5).tolist() for of_model in losses],
        seconds=round(time.perf_counter() - start, 1),
        **environment(device, precision),
    )
    save_run(out, run, models, config, tokenizer, args.overwrite)
    return out


def announce(args: Namespace, depth: int, device: torch.device, precision: torch.dtype | None) -> None:
    """Say how and where a model is about to be trained."""
    exits = ",".join(map(str, args.exit_layers))
    LOG.info("%s, %s, exits after layers %s of %d", METHODS[args.method], args.model, exits, depth)
    where = device_name(device), precision or torch.float32
    LOG.info("lr %g, epochs %d, seed %d, %s, %s", args.lr, args.epochs, args.seed, *where)


def main() -> None:
    """Train one run, and say what to do next."""
    parser = Parser(__doc__)
    option = parser.add_argument
    option("--method", choices=METHODS, default="sweet", help="(default: %(default)s)")
    option("--task", default="toy", help=f"{', '.join(TASKS)}, or a folder in --data-dir (default: %(default)s)")
    add_training_options(parser)
    option("--lr", type=positive_number, help="initial learning rate (default: by the model and the task)")
    option("--seed", type=number(int, 0), default=0, help="of rows, order, heads and dropout (default: %(default)s)")
    option("--out", type=Path, help="run folder (default: runs/<model>-<method>-<task>-seed<k>[-lte])")
    option("--overwrite", action="store_true", help="replace the run in --out when the new one is trained")
    args = parser.parse_args()
    tune_cpu()
    out = train(args)
    print(f"{out}: trained; next: python evaluate.py {quote(str(out))}")


if __name__ == "__main__":
    run_command(main)
