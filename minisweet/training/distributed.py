"""One training on several processes: `torchrun --nproc-per-node N train.py ...`, on one machine or more.

Each process holds the whole model and takes a share of every batch's rows. The gradient of the batch's mean loss is the
sum of the processes' own, each weighted by its share: one all-reduce of one flat tensor, between backward and clipping.
So all have the same gradient, loss and overflow, and N processes do what one does. What is read here of a process,
`place()`, is (0, 0, 1) without torchrun, and then nothing of this module does anything.
"""

import copy
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import numpy as np
import torch
from torch import Tensor, nn

from minisweet.data.text import Batch, TokenizedExamples
from minisweet.evaluation import sweep
from minisweet.files.safe import InputError
from minisweet.training.devices import place


class LostError(InputError):
    """Another process has ended, so that this one waits in vain."""


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
            largest(0)
        except (InputError, OSError, SystemExit) as error:
            if rank and not isinstance(error, LostError):  # torchrun ends the first one, which may be writing, with us
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
        largest(0)
    yield
    for _ in range(2 - turn):
        largest(0)


def share(batch: Batch, rank: int, processes: int) -> tuple[Batch, float]:
    """A process's rows of a batch, and their share of it. Without a row of its own it takes one that counts nothing."""
    rows = slice(rank, None, processes) if rank < len(batch.rows) else slice(1)
    mine = Batch(*(tensor[rows] for tensor in batch))
    return mine, len(mine.rows) / len(batch.rows) if rank < len(batch.rows) else 0.0


def add_up(parameters: Sequence[nn.Parameter], losses: Tensor, weight: float) -> Tensor:
    """Make the gradients, in place, and the losses (K,) those of the whole batch; returns the losses."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), losses])
    flat = all_reduce(flat * weight if weight else torch.zeros_like(flat))
    *gradients, losses = flat.split([*(p.numel() for p in parameters), len(losses)])
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.view_as(parameter)
    return losses


def all_reduce(tensor: Tensor, how: str = "SUM") -> Tensor:
    """The sum, or the maximum, of all processes' tensors, in place. Raises LostError where one of them has ended."""
    together_with_others(torch.distributed.all_reduce, tensor, getattr(torch.distributed.ReduceOp, how))
    return tensor


def together_with_others(operation: Callable, *arguments: object) -> None:
    """Call what all processes must call; raises LostError where one of them has ended."""
    try:
        operation(*arguments)
    except RuntimeError:
        raise LostError("torchrun: another process has ended, and so does this one") from None


def largest(*values: float) -> list[float]:
    """The largest of all processes' values, each by itself. They wait here for each other."""
    return list(values) if place().processes == 1 else all_reduce(torch.tensor(values).double(), "MAX").tolist()


def of_all(value: object) -> list:
    """All processes' values, of anything that can be pickled, in the order of their ranks."""
    values = [value] * place().processes
    if len(values) > 1:
        together_with_others(torch.distributed.all_gather_object, values, value)
    return values


def own_seed(seed: int) -> int:
    """The seed of a process's dropout, which differs over the processes; the first one's is `seed`."""
    rank = place().rank
    return int(np.random.SeedSequence((seed, rank)).generate_state(1, np.uint32)[0]) if rank else seed


def predict(model: nn.Module, examples: TokenizedExamples, precision: torch.dtype | None, title: str = "evaluate"):
    """`sweep.predict`, for which each process takes a share of the rows; all get the answers for all rows."""
    rank, _, processes = place()
    if processes == 1:
        return sweep.predict(model, examples, precision, title)
    rows = np.arange(rank, len(examples), processes)
    mine, part = rows if len(rows) else np.zeros(1, dtype=int), copy.copy(examples)
    part.ids = [examples.ids[row] for row in mine]
    for name in ("targets", "lengths", "first_lengths"):
        values = getattr(examples, name)
        setattr(part, name, None if values is None else values[mine])

    def whole(answers: Tensor) -> Tensor:  # (K, n, ...) to (K, N, ...)
        of_all_rows = answers.new_zeros(len(answers), len(examples), *answers.shape[2:])
        of_all_rows[:, rows] = answers[:, : len(rows)]
        return all_reduce(of_all_rows)

    logits, certainty = sweep.predict(model, part, precision, title)
    return whole(logits), None if certainty is None else whole(certainty)
