"""Multi-Model (MM): one model per exit, each trained for itself (Section 2).

    1        1 -- 2        1 -- 2 -- 3        no conflict, but an instance that goes on starts from the words again
    loss 1        loss 2             loss 3

Each model is the first n layers of one checkpoint with one exit at their end. Dimension letters: B batch, K exits.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from minisweet.checkpoint import load_encoder
from minisweet.exits import ExitHead, ExitModel, MultiExitModel, Said, check_exit_layers, encoder_to_grow


class MultiModel(ExitModel):
    """K independent models, smallest first: `models[k]` is a MultiExitModel with one exit, at its end."""

    method = "mm"

    def __init__(self, models: Sequence[MultiExitModel]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.head_layers, self.num_labels = tuple(model.head_layers[0] for model in models), models[0].num_labels

    def __len__(self) -> int:
        return len(self.models)

    def __getitem__(self, k: int) -> MultiExitModel:
        return self.models[k]

    def exit_by_exit(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Iterator[Said]:
        """As `MultiExitModel.exit_by_exit`: each model answers before the next one runs."""
        if self.ngrams is not None:
            yield self.ngrams(input_ids, attention_mask, token_type_ids), None
        for model in self:
            yield from model.exit_by_exit(input_ids, attention_mask, token_type_ids)

    def keep_exits(self, exit_layers: Sequence[int]) -> "MultiModel":
        """As `MultiExitModel.keep_exits`: only the models of these depths."""
        self.check_kept(exit_layers)
        kept = MultiModel([model for model in self if model.head_layers[0] in exit_layers])
        kept.ngrams, kept.training = self.ngrams if 0 in exit_layers else None, self.training
        return kept


def build_multi_model(
    folder: str | Path, exit_layers: Sequence[int], num_labels: int, exit_strategy: str = "confidence"
) -> MultiModel:
    """Slice the first n layers of one checkpoint, for each n of `exit_layers`, into K independent models.

    For the arguments see `MultiExitModel`. Raises ValueError for other exit layers, InputError as `load_encoder` does.
    """
    check_exit_layers(exit_layers)
    return MultiModel([build_alone(folder, n, num_labels, exit_strategy) for n in exit_layers])


def build_alone(folder: str | Path, n: int, num_labels: int, exit_strategy: str = "confidence") -> MultiExitModel:
    """The first n layers of a checkpoint with one exit at their end: one of MM's models, or a trunk for branches.

    Its random draws do not advance the global generator, so that its new weights do not depend on what is built before.
    """
    with torch.random.fork_rng(devices=[]):  # with one exit all methods are the same
        return MultiExitModel(load_encoder(folder, n), (n,), num_labels, "sweet", exit_strategy)


def slice_trunk(trunk: MultiExitModel, exit_layers: Sequence[int], exit_strategy: str = "confidence") -> MultiModel:
    """MM's models from a fine-tuned model of one exit: copies of its first n layers, and the trunk itself as the last.

    The copies' heads start as those of `grow_branches`. Raises ValueError as it does.
    """
    whole, models = encoder_to_grow(trunk, exit_layers), []
    for n in exit_layers[:-1]:
        encoder = copy.deepcopy(whole).requires_grad_(True)
        encoder.layers, encoder.config = encoder.layers[:n], replace(whole.config, num_hidden_layers=n)
        models.append(MultiExitModel(encoder, (n,), trunk.num_labels, exit_strategy=exit_strategy))
    head_to_keep(trunk, ExitHead(whole, trunk.num_labels, exit_strategy).lte)
    return MultiModel([*models, trunk]).train(trunk.training)


def head_to_keep(trunk: MultiExitModel, lte: nn.Linear | None) -> ExitHead:
    """The trunk's head. With `lte` it also tells whether it is right, by its own such layer if it has one."""
    head = trunk.heads[0]
    head.lte = lte and (head.lte or lte)
    return head
