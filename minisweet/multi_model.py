"""Multi-Model (MM): one model per exit, each trained for itself (Section 2).

    1        1 -- 2        1 -- 2 -- 3        no conflict, but an instance that goes on starts from the words again
    loss 1        loss 2             loss 3

Each model is the first n layers of one checkpoint with one exit at their end. Dimension letters: B batch, K exits.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from minisweet.checkpoint import load_encoder
from minisweet.exits import ExitModel, MultiExitModel, Said


class MultiModel(ExitModel):
    """K independent models, smallest first: `models[k]` is a MultiExitModel with one exit, at its end."""

    method = "mm"

    def __init__(self, models: Sequence[MultiExitModel]) -> None:
        exit_layers = [model.head_layers[-1] for model in models]
        super().__init__(exit_layers, models[-1].num_labels, exit_layers[-1])
        self.models = nn.ModuleList(models)

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


def build_multi_model(
    folder: str | Path, exit_layers: Sequence[int], num_labels: int, exit_strategy: str = "confidence"
) -> MultiModel:
    """Slice the first n layers of one checkpoint, for each n of `exit_layers`, into K independent models.

    For the arguments see `MultiExitModel`. Raises ValueError for other exit layers, InputError as `load_encoder` does.
    """
    return MultiModel([build_alone(folder, n, num_labels, exit_strategy) for n in exit_layers])


def build_alone(folder: str | Path, n: int, num_labels: int, exit_strategy: str = "confidence") -> MultiExitModel:
    """The first n layers of a checkpoint with one exit at their end: one of MM's models, or a trunk."""
    with torch.random.fork_rng(devices=[]):  # new weights depend on the seed, and not on what was built before
        return MultiExitModel(load_encoder(folder, n), (n,), num_labels, exit_strategy=exit_strategy)
