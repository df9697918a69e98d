"""Branches on a frozen trunk: early exits for a finished model, which stays as it is. They go beyond the paper.

The trunk is fine-tuned for the last exit alone, then frozen. Each earlier exit has a branch: a private copy of its
layer, which runs for [CLS] in that layer's place.

The exit's loss trains the copy and the exit's head, and nothing else. So each parameter is updated by exactly one
classifier, and the trunk's own answers are those of the plain fine-tuned model. EE-Tuning (Pan et al. 2024,
https://arxiv.org/abs/2402.00518) does the like for language models that generate.

Here is also `grow`, which makes the model of every method.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from minisweet.checkpoint import load_encoder
from minisweet.exits import ExitModel, MultiExitModel, MultiModel
from minisweet.layers import TransformerEncoder

METHODS = ("sweet", "ee", "mm", "branch", "plain")


class BranchModel(MultiExitModel):
    """A frozen trunk, which is the encoder and the last head, with a branch for each exit before the last.

    The trunk gets no gradient and stays in evaluation mode. For the arguments and errors see `MultiExitModel`.
    """

    def __init__(
        self,
        encoder: TransformerEncoder,
        exit_layers: Sequence[int],
        num_labels: int,
        exit_strategy: str = "confidence",
    ) -> None:
        super().__init__(encoder, exit_layers, num_labels, exit_strategy=exit_strategy)
        self.method = "branch"
        self.branches = nn.ModuleList(copy.deepcopy(encoder.layers[n - 1]) for n in exit_layers[:-1])
        self.heads[-1].lte = None  # nobody asks the last exit whether it is right
        self.encoder.requires_grad_(False)
        self.heads[-1].requires_grad_(False)
        self.train()

    def layer_of_exit(self, n: int) -> nn.Module:
        """The exit's branch; at the last exit, which has none, the trunk's own layer."""
        if n == self.head_layers[-1]:
            return super().layer_of_exit(n)
        return self.branches[self.head_layers.index(n)]

    @property
    def trained_exits(self) -> int:
        """The number of exits that have a branch."""
        return len(self.branches)

    def train(self, mode: bool = True) -> "BranchModel":
        """As any module's `train`, but the trunk stays in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        self.heads[-1].eval()
        return self

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """A group for each branch and its head, in the order of the exits: each is clipped by itself."""
        pairs = zip(self.branches, self.heads[:-1], strict=True)
        return [[*branch.parameters(), *head.parameters()] for branch, head in pairs]


def grow(
    method: str, trunk: MultiExitModel, exit_layers: Sequence[int], exit_strategy: str = "confidence"
) -> ExitModel:
    """The model of one of `METHODS`, made of a trunk: a model with one exit at its end, fine-tuned or new.

    The last exit is the trunk's: before training they answer alike, to the bit. The other exits' heads start from the
    trunk's pooler. The encoder is taken over; MM's models are slices, copies of its first layers. EE on a finished
    trunk is "mixed" training (https://arxiv.org/abs/2407.14320). Raises ValueError for exits that end elsewhere.
    """
    if trunk.head_layers != tuple(exit_layers[-1:]):
        raise ValueError(f"exit_layers is {tuple(exit_layers)}, and the trunk has exits after {trunk.head_layers}")
    encoder, head, C = trunk.encoder.requires_grad_(True), trunk.heads[0], trunk.num_labels
    if method == "mm":
        slices = [(first_layers(encoder, n), n) for n in exit_layers]
        model = MultiModel([MultiExitModel(part, (n,), C, exit_strategy=exit_strategy) for part, n in slices])
    elif method == "branch":
        model = BranchModel(encoder, exit_layers, C, exit_strategy)
    else:
        model = MultiExitModel(encoder, exit_layers, C, method, exit_strategy)
    models = model.models if method == "mm" else [model]
    for part in models:
        for own in part.heads:
            own.pooler.load_state_dict(head.pooler.state_dict())
    models[-1].heads[-1].load_state_dict(head.state_dict(), strict=False)  # one of the two may have no layer of lte
    return model.train(trunk.training)


def first_layers(encoder: TransformerEncoder, n: int) -> TransformerEncoder:
    """A copy of an encoder's first n layers."""
    part = copy.deepcopy(encoder)
    part.layers, part.config = part.layers[:n], replace(encoder.config, num_hidden_layers=n)
    return part


def build_alone(folder: str | Path, n: int, num_labels: int, exit_strategy: str = "confidence") -> MultiExitModel:
    """The first n layers of a checkpoint with one exit at their end. Raises InputError as `load_encoder` does."""
    return MultiExitModel(load_encoder(folder, n), (n,), num_labels, exit_strategy=exit_strategy)


def build_multi_model(
    folder: str | Path, exit_layers: Sequence[int], num_labels: int, exit_strategy: str = "confidence"
) -> MultiModel:
    """Slice the first n layers of one checkpoint, for each n of `exit_layers`, into K independent models.

    For the arguments and errors see `MultiExitModel` and `load_encoder`.
    """
    return grow("mm", build_alone(folder, exit_layers[-1], num_labels, exit_strategy), exit_layers, exit_strategy)
