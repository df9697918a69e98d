"""Branches on a frozen trunk: early exits for a finished model, which stays as it is. They go beyond the paper.

The trunk is fine-tuned for the last exit alone, then frozen. Each earlier exit has a branch: a private copy of its
layer, which runs for [CLS] in that layer's place.

The exit's loss trains the copy and the exit's head alone. So each parameter is updated by exactly one classifier, and
the trunk's own answers stay as they are. Texts without labels serve too (recipe.py). EE-Tuning (Pan et
al. 2024, https://arxiv.org/abs/2402.00518) does the like for language models that generate.
"""

import copy
from collections.abc import Sequence

from torch import nn

from minisweet.exits import MultiExitModel
from minisweet.layers import TransformerEncoder


class BranchModel(MultiExitModel):
    """A frozen trunk, encoder and last head, with a branch for each exit before the last; see `MultiExitModel`."""

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

    def cost_in_vain(self, n: int) -> float:
        """The branch's keys and values of all tokens: two of the twelve products of a layer."""
        return 1 / 6

    def layer_of_exit(self, n: int) -> nn.Module:
        """The exit's branch; at the last exit, which has none, the trunk's own layer."""
        if n == self.head_layers[-1]:
            return super().layer_of_exit(n)
        return self.branches[self.head_layers.index(n)]

    def train(self, mode: bool = True) -> "BranchModel":
        """As any module's `train`, but the trunk stays in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        self.heads[-1].eval()
        return self

    def branch_parameters(self) -> list[list[nn.Parameter]]:
        """A group for each branch and its head, in the order of the exits."""
        pairs = zip(self.branches, self.heads[:-1], strict=True)
        return [[*branch.parameters(), *head.parameters()] for branch, head in pairs]
