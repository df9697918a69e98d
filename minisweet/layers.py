"""Dropout that draws its masks fast on the CPU.

There torch draws one random number per element, on one core: 4.7 ns, which makes dropout 20 to 30% of a training step.
Here an element takes 16 bits of a 64-bit draw: 0.8 ns. The probability is so rounded to a multiple of 1/65536. On
other devices this is torch's own dropout.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def dropout(x: Tensor, p: float) -> Tensor:
    """Zero each element of `x` with probability `p` and scale the others by 1/(1-p)."""
    if p == 0 or x.device.type != "cpu":
        return F.dropout(x, p)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    dropped = min(round(p * 65536), 65535)
    kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 32768
    return x * (kept.to(x.dtype) * (65536 / (65536 - dropped)))


class Dropout(nn.Module):
    """`dropout` in training mode, nothing in evaluation mode."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """(...) to (...)."""
        return dropout(x, self.p) if self.training else x
