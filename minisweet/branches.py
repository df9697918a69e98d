"""Branches on a frozen trunk: early exits for a finished model, which stays as it is. They go beyond the paper.

    trunk         1 -------- 2 -------- 3          fine-tuned for the last exit alone, then frozen
              x /        x /            |
    branches  1'         2'             loss 3     each earlier exit has a private copy of its layer,
              loss 1     loss 2                    which runs for [CLS] in that layer's place

The exit's loss trains the copy and the exit's head, and nothing else. So each parameter is updated by exactly one
classifier, and the trunk's own answers are those of the plain fine-tuned model. EE-Tuning (Pan et al. 2024,
https://arxiv.org/abs/2402.00518) does the like for language models that generate: a frozen backbone, and exit layers
that start as copies.
"""

import copy
from collections.abc import Sequence
from functools import partial

from torch import nn

from minisweet.checkpoint import Encoder
from minisweet.exits import ExitHead, MultiExitModel, encoder_to_grow
from minisweet.multi_model import head_to_keep, slice_trunk


class BranchModel(MultiExitModel):
    """A frozen trunk, which is the encoder and the last head, with a branch for each exit before the last.

    The trunk gets no gradient and stays in evaluation mode. `grow_branches` makes a BranchModel of a fine-tuned model.
    For the arguments and errors see `MultiExitModel`.
    """

    methods = ("branch",)

    def __init__(
        self, encoder: Encoder, exit_layers: Sequence[int], num_labels: int, exit_strategy: str = "confidence"
    ) -> None:
        super().__init__(encoder, exit_layers, num_labels, "branch", exit_strategy)
        self.branches = nn.ModuleList(copy.deepcopy(encoder.layers[n - 1]) for n in exit_layers[:-1])
        self.branches.requires_grad_(True)
        self.freeze_trunk(self.heads[-1])

    def freeze_trunk(self, head: ExitHead) -> None:
        """Use `head` as the last exit's, and freeze it and the encoder."""
        head.lte = None  # nobody asks the last exit whether it is right
        self.heads[-1] = head.requires_grad_(False)
        self.encoder.requires_grad_(False)
        self.train(self.training)

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

    @property
    def trained_exits(self) -> int:
        """All but the last."""
        return len(self.branches)

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """A group for each branch and its head, in the order of the exits: each is clipped by itself."""
        pairs = zip(self.branches, self.heads[:-1], strict=True)
        return [[*branch.parameters(), *head.parameters()] for branch, head in pairs]

    def keep_exits(self, exit_layers: Sequence[int]) -> "BranchModel":
        """As `MultiExitModel.keep_exits`."""
        model = super().keep_exits(exit_layers)
        model.branches = nn.ModuleList(self.layer_of_exit(n) for n in model.head_layers[:-1])
        return model


def grow_branches(trunk: MultiExitModel, exit_layers: Sequence[int], exit_strategy: str = "confidence") -> BranchModel:
    """A branch model on a fine-tuned model of one exit, at its end, whose encoder and head it takes over as they are.

    Each branch is a copy of the trunk's layer; its head has the trunk's pooler to start from, and a fresh classifier.
    Raises ValueError for exit layers that do not end where the trunk does.
    """
    model = BranchModel(encoder_to_grow(trunk, exit_layers), exit_layers, trunk.num_labels, exit_strategy)
    model.freeze_trunk(trunk.heads[0])
    return model.train(trunk.training)


def add_exits(
    trunk: MultiExitModel, exit_layers: Sequence[int], method: str = "ee", exit_strategy: str = "confidence"
) -> MultiExitModel:
    """EE or SWEET that starts from a fine-tuned model of one exit: before training the last exit is its, bit for bit.

    EE so started is "mixed" training (https://arxiv.org/abs/2407.14320). The other exits' heads start as those of
    `grow_branches`. The trunk's weights are taken over, not copied. Raises ValueError as `grow_branches` does.
    """
    model = MultiExitModel(encoder_to_grow(trunk, exit_layers), exit_layers, trunk.num_labels, method, exit_strategy)
    model.heads[-1] = head_to_keep(trunk, model.heads[-1].lte)
    return model.requires_grad_(True).train(trunk.training)


# All methods, and how the model of each grows on a fine-tuned one of one exit: (trunk, exit_layers, exit_strategy=...).
METHODS = {
    "sweet": partial(add_exits, method="sweet"),
    "ee": partial(add_exits, method="ee"),
    "mm": slice_trunk,
    "branch": grow_branches,
}
