"""Own text's training loop, for a model with one exit and targets that may be probabilities; and its inference.

Dimension letters: B batch, T tokens, C classes, N texts.
"""

from collections.abc import Callable
from itertools import chain
from math import ceil

import numpy as np
import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_

from minisweet import fast
from minisweet.base.commands import progress
from minisweet.base.devices import tokens_at_once
from minisweet.base.files import InputError
from minisweet.exits import MultiExitModel, exit_loss
from minisweet.texts import Texts

BATCH_SIZE = 64
DIVERGED = "at {:g} the loss became infinite or NaN at step {}; try a lower one"


def fine_tune(
    model: MultiExitModel,
    texts: Texts,
    targets: np.ndarray,
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
        texts: N texts.
        targets: labels (N,) or probabilities (N, C).
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
    steps, of_row = epochs * ceil(len(texts) / batch_size), torch.from_numpy(targets)
    losses: list[list[float]] = []
    with fast.used_rows(model.encoder.word_embeddings, texts) as few:
        batches = chain.from_iterable(few.shuffled(batch_size, seed, epoch) for epoch in range(epochs))
        parameters = list(model.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)
        scaler = GradScaler(torch.device(device).type, enabled=precision is torch.float16)  # for float16 alone
        for step, batch in enumerate(bar := progress(batches, total=steps, unit="step", desc=title)):
            batch, wanted = batch.to(device), of_row[batch.rows].to(device)
            torch.manual_seed(1_000_003 * seed + 1_009 * (step + 1))  # dropout, the same whatever ran before
            optimizer.zero_grad()
            with torch.autocast(batch.input_ids.device.type, precision, enabled=precision is not None):
                loss = exit_loss(model(*batch.inputs)[0], wanted)  # of the one exit
            scaler.scale(loss).backward()
            losses.append([loss.item()])
            if not np.isfinite(losses[-1]).all():
                raise InputError(DIVERGED.format(learning_rate, step + 1), "lr")
            scaler.unscale_(optimizer)
            clip_grad_norm_(parameters, 1.0)
            optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
            scaler.step(optimizer)
            scaler.update()
            bar.set_postfix_str(f"loss {losses[-1][0]:.2f}", refresh=False)
        if not all(parameter.isfinite().all() for parameter in parameters):  # the last update, which no loss has seen
            raise InputError(DIVERGED.format(learning_rate, steps), "lr")
    model.cpu()
    return losses


@torch.no_grad()  # inference_mode would make autocast cast the weights anew for each product
def run_all(
    step: Callable[[Tensor, Tensor, Tensor], Tensor],
    texts: Texts,
    device: torch.device,
    precision: torch.dtype | None = None,
    batch_size: int = BATCH_SIZE,
    title: str = "evaluate",
) -> Tensor:
    """Run a step on all texts. Returns its outputs (N, ...) in the order of the texts, in float32 and on the CPU.

    Args:
        step: maps input_ids, attention_mask and token_type_ids, (B, T) each on the device, to an output (B, ...).
        texts: N texts.
        device: to run on.
        precision: the type to autocast to; None means float32.
        batch_size: the largest B.
        title: the title of the progress bar.

    Raises InputError if an output is infinite or NaN.
    """
    rows, found = [], []
    with (
        torch.autocast(device.type, precision, enabled=precision is not None),
        progress(total=len(texts), unit="text", desc=title, leave=False) as bar,
    ):
        for batch in texts.by_length(batch_size, tokens_at_once(device)):
            rows.append(batch.rows)
            found.append(step(*batch.to(device).inputs).float().cpu())
            bar.update(len(batch.rows))
    whole = torch.cat(found)[torch.cat(rows).argsort()]
    if not whole.isfinite().all():
        raise InputError("the exits give infinite numbers or NaN; try --amp off, or train at a lower --lr")
    return whole


def in_float32(threshold: float) -> float:
    """Round a threshold to float32, the type of confidences, so that 0.99999998 is 1 everywhere."""
    return float(np.float32(threshold))


def leaves(confidence: Tensor, threshold: float, lowest: float) -> Tensor:
    """Whether an instance exits, at any exit but the last: confidence (...) to bool (...).

    At threshold 1 no instance exits, not even with a confidence of 1.0; at `lowest` (1/C, or 0) every instance does.
    Both cases are explicit, because in float32 a probability can round to 1, or to just below 1/C.
    """
    threshold, lowest = in_float32(threshold), in_float32(lowest)
    if threshold <= lowest:
        return torch.ones_like(confidence, dtype=torch.bool)
    if threshold >= 1:
        return torch.zeros_like(confidence, dtype=torch.bool)
    return confidence >= threshold
