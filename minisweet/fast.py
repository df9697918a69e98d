"""Speed-ups for CPUs. Read the other files first: nothing here changes more than the random draws.

To remove this file, replace each name by what its docstring says, or by nothing. Training then takes about 1.5 times
as long, and other random numbers are drawn, from the same distributions.

Dimension letters: B batch, T tokens, H heads, d head size, V words.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Dropout(nn.Dropout):
    """`nn.Dropout`, with fewer random numbers.

    On a CPU, torch draws one random number per element on one core, which makes dropout 10 to 30% of a training step.
    Here one 64-bit number serves four elements, which takes a sixth of the time. The probability is rounded to a
    multiple of 1/65536.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Zero each element of `x` (...) with probability p, and scale the others by 1/(1-p)."""
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return super().forward(x)
        dropped = round(self.p * 65536)  # of the 65,536 values that 16 bits have
        if dropped == 65536:
            return x * 0
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 32768
        return x * (kept.to(x.dtype) * (65536 / (65536 - dropped)))


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, dropout: nn.Dropout) -> Tensor:
    """`F.scaled_dot_product_attention`: three tensors (B, H, T, d) and a bias (B, 1 or H, 1 or T, T) to (B, H, T, d).

    In training on a CPU, plain matrix products are used, to which the faster dropout applies.
    """
    if dropout.training and query.device.type == "cpu":
        scores = (query * query.shape[-1] ** -0.5) @ key.mT + bias  # (B, H, T, T)
        return dropout(scores.softmax(-1)).to(value.dtype) @ value
    dropout_p = dropout.p if dropout.training else 0.0
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype), dropout_p=dropout_p)


@contextmanager
def used_rows(embedding: nn.Embedding, ids: np.ndarray) -> Iterator[Tensor]:
    """Cut word embeddings to the rows of the `ids` in use, which makes a training step 10 to 12% faster.

    These rows are trained as in the whole table, because the others get no gradient and there is no weight decay.
    Yields the row of each id, (V,). Without this, the row of an id is the id.
    """
    whole = embedding.weight
    used = torch.from_numpy(np.unique(ids)).to(whole.device)
    embedding.weight = nn.Parameter(whole.detach()[used], whole.requires_grad)
    try:
        yield torch.zeros(len(whole), dtype=torch.int64).index_copy(0, used.cpu(), torch.arange(len(used)))
    finally:
        with torch.no_grad():
            whole[used] = embedding.weight
        embedding.weight = whole


@contextmanager
def no_initial_weights() -> Iterator[None]:
    """Make modules without allocating or initialising weights, for a loader that replaces their whole state dicts."""
    with torch.device("meta"), _NoInit():
        yield


class _NoInit(TorchFunctionMode):
    """A mode in which torch.nn.init does nothing. On the meta device it would import torch's compiler, for a second."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return None if getattr(func, "__module__", "") == nn.init.__name__ else func(*args, **(kwargs or {}))


def tune_cpu() -> None:
    """Make this process faster on a CPU, with the same results. Call it before the first model.

    oneDNN caches 1,024 compiled matrix products, one per shape, and texts of all lengths need more: with 8,192, early
    exit in batches takes 20% less time. On Linux the process also keeps the memory that it frees. Otherwise the kernel
    zeroes it again, which takes 10 to 20% of a training step.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")
    if sys.platform == "linux":
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from malloc.h
        ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
