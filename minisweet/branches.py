"""Branches on a frozen trunk: early exits for a finished model, which stays as it is. They go beyond the paper.

The trunk is trained for the last exit alone, then frozen. Each earlier exit has a branch: a private copy of its layer,
which runs in that layer's place. The exit's loss trains the copy and the exit's head, and nothing else. So each
parameter is updated by exactly one classifier, and the trunk's own answers are those of the plain fine-tuned model.
EE-Tuning (Pan et al. 2024, https://arxiv.org/abs/2402.00518) does the like for language models that generate: a frozen
backbone, and exit layers that start as copies. Here a branch classifies and so runs for [CLS] alone, its confidence is
calibrated, and batches regroup after each exit (live.py).

Dimension letters: B batch, T tokens, D hidden size, K exits, C classes.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from minisweet.checkpoint import Encoder
from minisweet.exits import ExitHead, MultiExitModel, MultiModel

METHODS = ("sweet", "ee", "mm", "branch")


class BranchModel(MultiExitModel):
    """A frozen trunk, the encoder and the last head, with a branch for each exit before the last.

    The trunk gets no gradient: it runs under no_grad, and `parameter_groups` lacks it. It stays in evaluation mode.
    `grow_branches` makes one of a fine-tuned model. For the arguments and errors see `MultiExitModel`.
    """

    methods = ("branch",)

    def __init__(
        self, encoder: Encoder, exit_layers: Sequence[int], num_labels: int, exit_strategy: str = "confidence"
    ) -> None:
        super().__init__(encoder, exit_layers, num_labels, "branch", exit_strategy)
        self.branches = nn.ModuleList(copy.deepcopy(encoder.layers[n - 1]) for n in exit_layers[:-1])
        self.heads[-1].lte = None  # nobody asks the last exit whether it is right
        self.train(self.training)

    def exit_by_exit(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """As `MultiExitModel.exit_by_exit`, but each stretch of the trunk starts with its layer at the last exit."""
        with torch.no_grad():
            hidden = self.encoder.embed(input_ids, token_type_ids)  # (B, T, D)
            context = self.encoder.context(attention_mask)
        for k, (start, stop) in enumerate(pairwise((0, *(n - 1 for n in self.exit_layers)))):
            with torch.no_grad():
                hidden = self.encoder.run_layers(hidden, context, start, stop)
            with torch.set_grad_enabled(torch.is_grad_enabled() and k < len(self.branches)):
                said = self.heads[k](self.cls_at_exit(k, hidden, context))
            yield said  # out here, since a generator's settings reach its caller

    def cls_at_exit(self, k: int, hidden: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        """As `MultiExitModel.cls_at_exit`, by the exit's branch, and at the last exit, which has none, by the trunk."""
        if k == len(self.branches):
            return super().cls_at_exit(k, hidden, context)
        return self.branches[k].forward_cls(hidden, context)

    def cross_exit(
        self, k: int, hidden: Tensor, context: tuple[Tensor, ...], cls: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As `MultiExitModel.cross_exit`, for live.py alone: the trunk's own layer, and nothing of the branch's."""
        with torch.no_grad():
            return self.encoder.layers[self.exit_layers[k] - 1](hidden, context), context

    def train(self, mode: bool = True) -> "BranchModel":
        """As any module's, but for the trunk, which stays in evaluation mode."""
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
        model.branches = nn.ModuleList(self.branches[self.exit_layers.index(n)] for n in exit_layers[:-1])
        return model


def grow_branches(trunk: MultiExitModel, exit_layers: Sequence[int], exit_strategy: str = "confidence") -> BranchModel:
    """A branch model on a fine-tuned model of one exit, at its end, whose encoder and head it takes over as they are.

    Each branch is a copy of the trunk's layer; its head has the trunk's pooler to start from, and a fresh classifier.
    Raises ValueError for exit layers that do not end where the trunk does.
    """
    model = BranchModel(_encoder_to_grow(trunk, exit_layers), exit_layers, trunk.num_labels, exit_strategy)
    model.heads[-1] = trunk.heads[0]
    model.heads[-1].lte = None
    return model.train(trunk.training)


def add_exits(
    trunk: MultiExitModel, exit_layers: Sequence[int], method: str = "ee", exit_strategy: str = "confidence"
) -> MultiExitModel:
    """EE or SWEET that starts from a fine-tuned model of one exit: before training the last exit is its, bit for bit.

    EE so started is "mixed" training (https://arxiv.org/abs/2407.14320). The other exits' heads start as those of
    `grow_branches`. The trunk's weights are taken over, not copied. Raises ValueError as `grow_branches` does.
    """
    model = MultiExitModel(_encoder_to_grow(trunk, exit_layers), exit_layers, trunk.num_labels, method, exit_strategy)
    head = trunk.heads[0]
    head.lte = model.heads[-1].lte
    model.heads[-1] = head
    return model.train(trunk.training)


def slice_trunk(trunk: MultiExitModel, exit_layers: Sequence[int], exit_strategy: str = "confidence") -> MultiModel:
    """MM's models from a fine-tuned model of one exit: copies of its first n layers, and the trunk itself as the last.

    The copies' heads start as those of `grow_branches`. Raises ValueError as it does.
    """
    whole, models = _encoder_to_grow(trunk, exit_layers), MultiModel()
    for n in exit_layers[:-1]:
        encoder = copy.deepcopy(whole)
        encoder.layers, encoder.config = encoder.layers[:n], replace(whole.config, num_hidden_layers=n)
        models.append(MultiExitModel(encoder, (n,), trunk.num_labels, exit_strategy=exit_strategy))
    trunk.heads[0].lte = ExitHead(whole, trunk.num_labels, exit_strategy).lte  # untrained, and never asked
    return models.append(trunk).train(trunk.training)


def _encoder_to_grow(trunk: MultiExitModel, exit_layers: Sequence[int]) -> Encoder:
    """A trunk's encoder, which is told that new heads start from the trunk's pooler.

    Raises ValueError unless exits end where the trunk does.
    """
    if len(trunk.heads) != 1 or exit_layers[-1] != trunk.exit_layers[0]:
        ends = ",".join(map(str, trunk.exit_layers))
        raise ValueError(f"exit_layers is {','.join(map(str, exit_layers))!r}, and the trunk has its exit after {ends}")
    pooler = trunk.heads[0].pooler
    trunk.encoder.pooler_start = (pooler.weight.detach(), pooler.bias.detach())
    return trunk.encoder
