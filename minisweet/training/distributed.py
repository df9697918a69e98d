"""One training on several processes: `torchrun --nproc-per-node N train.py ...`, on one machine or more.

Each process holds the whole model and takes a share of every batch's rows. The gradient of the batch's mean loss is the
sum of the processes' own, each weighted by its share: one all-reduce of one flat tensor, between backward and clipping.
So all have the same gradient, loss and overflow, and N processes do what one does. What is read here of a process,
`place()`, is (0, 0, 1) without torchrun, and then nothing of this module does anything.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
from torch import Tensor, nn

from minisweet.data.text import Batch
from minisweet.files.safe import InputError
from minisweet.training.devices import place


def together(main: Callable[[], None]) -> Callable[[], None]:
    """`main` as one of several processes, of which the first alone prints; `main` itself without torchrun."""
    rank, local_rank, processes = place()

    def run() -> None:
        if rank:  # the others have nothing to say but what nobody foresaw
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.__stderr__)
        if cuda := torch.cuda.is_available():
            torch.cuda.set_device(local_rank % torch.cuda.device_count())
        backends = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        torch.distributed.init_process_group(backends, timeout=timedelta(hours=2))  # as long as a download may take
        farewell = torch.distributed.new_group(backend="gloo", timeout=timedelta(minutes=1))
        try:
            main()
            of_all(0)
        except (InputError, OSError, SystemExit):
            if rank:  # torchrun ends the first one, which may be writing, with us
                with suppress(RuntimeError):
                    torch.distributed.barrier(farewell)
            raise
        torch.distributed.destroy_process_group()

    return run if processes > 1 else main


@contextmanager
def in_turn() -> Iterator[None]:
    """Within, models and data are fetched: by the first process, then by each machine's first, then the others."""
    turn = 0 if place().rank == 0 else 1 if place().local_rank == 0 else 2
    for _ in range(turn):
        of_all(0)
    yield
    for _ in range(2 - turn):
        of_all(0)


def share(batch: Batch) -> tuple[Batch, float]:
    """This process's rows of a batch, and their share of it. Without a row of its own it takes one that counts none."""
    rank, _, processes = place()
    has_rows = rank < len(batch.rows)
    rows = slice(rank, None, processes) if has_rows else slice(1)
    mine = Batch(*(tensor[rows] for tensor in batch))
    return mine, len(mine.rows) / len(batch.rows) if has_rows else 0.0


def add_up(parameters: Sequence[nn.Parameter], losses: Tensor, weight: float) -> Tensor:
    """Make the gradients, in place, and the losses (K,) those of the whole batch; returns the losses."""
    if place().processes == 1:
        return losses
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), losses])
    flat = flat * weight if weight else torch.zeros_like(flat)  # a row that counts nothing may give NaN
    with_others(torch.distributed.all_reduce, flat)
    *gradients, losses = flat.split([*(p.numel() for p in parameters), len(losses)])
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.view_as(parameter)
    return losses


def with_others(operation: Callable, *arguments: object) -> None:
    """Call what all processes must call. Raises InputError where one of them has ended."""
    try:
        operation(*arguments)
    except RuntimeError:
        raise InputError("torchrun: another process has ended, and so does this one") from None


def of_all(value: object) -> list:
    """All processes' values, of anything that can be pickled, in the order of their ranks. They wait for each other."""
    values = [value] * place().processes
    if len(values) > 1:
        with_others(torch.distributed.all_gather_object, values, value)
    return values
