"""Branches: early exits for a finished model, which stays as it is. They go beyond the paper.

The trunk, a model with one exit at its end, is fine-tuned first and then frozen. Each earlier exit gets a branch: its
own copy of the layer it stands after, which runs for [CLS] in place of that layer. The exit's loss only trains this
copy and the exit's head. So, as in SWEET, each parameter is updated by exactly one classifier, and the trunk's own
answers do not change. EE-Tuning (Pan et al. 2024, https://arxiv.org/abs/2402.00518) does the same for generative
language models.
"""

import copy
from collections.abc import Sequence

from torch import nn

from minisweet.exits import MultiExitModel
from minisweet.layers import TransformerEncoder


class BranchModel(MultiExitModel):
    """A frozen encoder and last head, with a branch for each earlier exit. For the arguments see `MultiExitModel`."""

    def __init__(
        self,
        encoder: TransformerEncoder,
        exit_layers: Sequence[int],
        num_labels: int,
        exit_strategy: str = "confidence",
    ) -> None:
        super().__init__(encoder, exit_layers, num_labels, "plain", exit_strategy)
        self.method = "branch"
        self.branches = nn.ModuleList(copy.deepcopy(encoder.layers[n - 1]) for n in exit_layers[:-1])
        self.encoder.requires_grad_(False)
        self.heads[-1].requires_grad_(False)
        self.train()

    def layer_of_exit(self, n: int) -> nn.Module:
        """The exit's branch, or the trunk's own layer at the last exit, which has no branch."""
        if n == self.exit_layers[-1]:
            return super().layer_of_exit(n)
        return self.branches[self.exit_layers.index(n)]

    def train(self, mode: bool = True) -> "BranchModel":
        """Like `nn.Module.train`, but the trunk stays in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        self.heads[-1].eval()
        return self
