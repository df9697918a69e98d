"""The training loop: AdamW, a linear decay, and the gradients of each method (App. A of the paper).

    for step, batch in enumerate(batches):
        forward exit by exit, backward: one loss per exit, or EE's one sum
        clip the gradient, step, decay the learning rate

With CUDA, or with bfloat16 instructions, products run in half precision (AMP).

Dimension letters: B batch, K exits, V words, D hidden size, L layers.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_

from minisweet.texts import Batch, Texts
from minisweet.exits import MultiExitModel, exit_loss


def fine_tune(
    model: MultiExitModel,
    batches: Iterable[Batch],
    steps: int,
    learning_rate: float,
    seed: int = 0,
    precision: torch.dtype | None = None,
    groups: Sequence[list[nn.Parameter]] | None = None,
    checkpoint=None,
) -> list[list[float]]:
    """Train a model's parameters. Returns each step's losses, (steps, K), of branches (steps, K-1).

    The learning rate decays linearly towards zero. The gradient is clipped to norm 1, or that of each of some `groups`
    of parameters, which then are all that is trained. `seed` is that of dropout. A `checkpoint` restores what an
    earlier process had done, and is told of each step (`SavedTraining` of runs/resume.py). Raises FloatingPointError,
    with the step, where a loss, or a parameter at the end, is not finite.
    """
    groups, device = groups or [list(model.parameters())], next(model.train().parameters()).device
    parameters = list(chain.from_iterable(groups))
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)
    scaler = GradScaler(device.type, enabled=precision is torch.float16)
    losses = checkpoint.restore(parameters, optimizer, scaler) if checkpoint else []
    for step, batch in enumerate(batches, start=1):
        if step <= len(losses):  # the step was done before the training was stopped
            continue
        # Seeds dropout by step, so that no random state has to be saved.
        torch.manual_seed(1_000_003 * seed + 1_009 * step)
        optimizer.zero_grad()
        losses.append(compute_gradients(model, batch.to(device), scaler, precision).tolist())
        if not np.isfinite(losses[-1]).all():
            raise FloatingPointError(step)
        scaler.unscale_(optimizer)
        for group in groups:
            clip_grad_norm_(group, 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - (step - 1) / steps)
        scaler.step(optimizer)
        scaler.update()
        if checkpoint:
            checkpoint.keep(losses, steps, parameters, optimizer, scaler)
    if not all(parameter.isfinite().all() for parameter in parameters):  # by the last step, after its loss
        raise FloatingPointError(steps)
    return losses


def compute_gradients(model: MultiExitModel, batch: Batch, scaler: GradScaler, precision: torch.dtype | None) -> Tensor:
    """Add up the gradients of the trained exits' losses. Returns these losses: (K,), of branches (K-1,)."""
    losses, exits, is_ee = [], model.exit_by_exit(*batch.inputs), model.method == "ee"
    for _ in (head for head in model.heads if head.classifier.weight.requires_grad):  # a trunk's is frozen
        with torch.autocast(batch.input_ids.device.type, precision, enabled=precision is not None):
            losses.append(exit_loss(*next(exits), batch.targets))
        if not is_ee:  # no later loss sends a gradient to this segment, so its activations are freed
            scaler.scale(losses[-1]).backward()
    if is_ee:
        scaler.scale(model.sum_losses(losses)).backward()
    return torch.stack(losses).detach()


@contextmanager
def used_rows(model: MultiExitModel, examples: Texts) -> Iterator[Tensor]:
    """Within, the word embeddings are cut to the rows in use: a step takes 10 to 12% less. Gives each id's row (V,)."""
    embedding, whole = model.encoder.word_embeddings, model.encoder.word_embeddings.weight
    used = torch.from_numpy(np.unique(np.concatenate([*examples.ids, [examples.pad_id]]))).to(whole.device)
    embedding.weight = nn.Parameter(whole.detach()[used], whole.requires_grad)
    try:
        yield torch.zeros(len(whole), dtype=torch.int64).index_copy(0, used.cpu(), torch.arange(len(used)))
    finally:
        with torch.no_grad():
            whole[used] = embedding.weight
        embedding.weight = whole
