"""The training loop: the backward passes of each method (Sec. 4.1), and AdamW with linear decay (App. A).

    for batch in batches:
        forward and backward: one backward() per exit, or for EE one on the summed loss
        clip the gradient, decay the learning rate, step

The loss is the unweighted sum of the exits' losses. As in the authors' code, there is no weight decay and no warm-up.

Dimension letters: B batch, K exits.
"""

from itertools import chain
from math import ceil

import numpy as np
import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_

from minisweet import fast
from minisweet.base.commands import progress
from minisweet.base.files import InputError
from minisweet.exits import MultiExitModel, exit_loss
from minisweet.texts import Batch, Texts

DIVERGED = "at {:g} the loss became infinite or NaN at step {}; try a lower one"


def fine_tune(
    model: MultiExitModel,
    texts: Texts,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int = 0,
    device: torch.device | str = "cpu",
    precision: torch.dtype | None = None,
    title: str = "training",
) -> list[list[float]]:
    """Train all parameters of a model. Returns the losses of each step, (steps, K).

    Args:
        model: is moved to the device, and back to the CPU at the end.
        texts: with targets.
        epochs: passes over the texts.
        batch_size: B.
        learning_rate: the initial rate, which decays linearly to zero.
        seed: the seed of the order and of dropout.
        device: to train on.
        precision: the type to autocast to; None means float32.
        title: the title of the progress bar.

    Raises InputError if a loss, or a trained parameter, is infinite or NaN.
    """
    model.to(device).train()
    steps = epochs * ceil(len(texts) / batch_size)
    batches = chain.from_iterable(texts.shuffled(batch_size, seed, epoch) for epoch in range(epochs))
    losses: list[list[float]] = []
    with (
        fast.used_rows(model.encoder.word_embeddings, np.concatenate([*texts.ids, [texts.pad_id]])) as row_of,
        progress(batches, total=steps, unit="step", desc=title) as bar,
    ):
        parameters = list(model.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)
        scaler = GradScaler(torch.device(device).type, enabled=precision is torch.float16)  # for float16 alone
        for step, batch in enumerate(bar):
            batch = batch._replace(input_ids=row_of[batch.input_ids]).to(device)
            torch.manual_seed(1_000_003 * seed + 1_009 * (step + 1))  # dropout, the same whatever ran before
            optimizer.zero_grad()
            step_losses = compute_gradients(model, batch, scaler, precision).tolist()  # (K,)
            losses.append(step_losses)
            if not np.isfinite(step_losses).all():
                raise InputError(DIVERGED.format(learning_rate, step + 1), "lr")
            scaler.unscale_(optimizer)
            clip_grad_norm_(parameters, 1.0)
            optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
            scaler.step(optimizer)
            scaler.update()
            bar.set_postfix_str("loss " + ", ".join(f"{loss:.2f}" for loss in step_losses), refresh=False)
        if not all(parameter.isfinite().all() for parameter in parameters):  # the last update, which no loss has seen
            raise InputError(DIVERGED.format(learning_rate, steps), "lr")
    model.cpu()
    return losses


def compute_gradients(model: MultiExitModel, batch: Batch, scaler: GradScaler, precision: torch.dtype | None) -> Tensor:
    """Accumulate the gradients of the losses of all exits. Returns these losses (K,)."""
    losses = []
    exits = model.exit_by_exit(*batch.inputs)
    for _ in model.exit_layers:  # next() runs the layers up to an exit, under autocast; backward() stays outside
        with torch.autocast(batch.input_ids.device.type, precision, enabled=precision is not None):
            losses.append(exit_loss(*next(exits), batch.targets))
        if model.method == "sweet":  # no later loss reaches this segment, so backward() now frees its activations
            scaler.scale(losses[-1]).backward()
    if model.method == "ee":
        scaler.scale(sum_losses(losses)).backward()
    return torch.stack(losses).detach()


def sum_losses(losses: list[Tensor]) -> Tensor:
    """EE's one loss: the sum of the losses of all exits."""
    return torch.stack(losses).sum()
