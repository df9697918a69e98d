"""The methods, a row for each: the paper's SWEET, Early-Exit and Multi-Model, and ours, branches and the plain model.

Here stands how a method's model is built and what is trained of it, in turn. Two lines more tell methods apart: where
SWEET's gradient stops (exits.py), and EE's one backward pass (training.py). The paper's learning rates stand in
tasks.py. To add a method, add a row. A model of another kind is a subclass of those in exits.py, made with the
`method` that it trains as: "sweet", "ee" or "plain".

Every model is built from a trunk, a model with one exit at its end: public weights with a new head, or a finished
classifier.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch.nn import Parameter

from minisweet.branches import BranchModel
from minisweet.checkpoint import load_encoder
from minisweet.exits import ExitModel, MultiExitModel, MultiModel
from minisweet.layers import TransformerEncoder


class Stage(NamedTuple):
    """What is trained at once."""

    name: str
    model: MultiExitModel
    times_rate: float = 1.0  # in learning rates
    groups: list[list[Parameter]] | None = None  # of parameters, each clipped by itself; None for all of them together


class Method(NamedTuple):
    """A method: its name for people, its model, its training and its default exits."""

    words: str
    build: Callable[..., ExitModel]  # of an encoder, exit layers, C and exit_strategy, as `MultiExitModel`
    stages: Callable[..., Iterator[Stage]]  # of the model, in turn; the second argument: is the trunk new?
    keeps_trunk: bool = False  # a new trunk is first trained for its own exit, and then all of it stays as it is
    has_exit_0: bool = False  # by default
    exits_between: Callable[[int], Sequence[int]] | None = None  # by default, of L layers; None for no such exits


def exits_of_the_paper(depth: int) -> list[int]:
    """The exits before the last, of 12 and of 24 layers (Sec. 3.2). Other depths take the same shares as 12 layers."""
    return [1, 6, 12] if depth == 24 else [max(1, round(depth * share)) for share in (1 / 12, 1 / 3, 1 / 2)]


def slices(encoder: TransformerEncoder, exit_layers: Sequence[int], num_labels: int, **options) -> MultiModel:
    """MM's models, for each exit a copy of the encoder's first layers."""
    models = []
    for n in exit_layers:
        part = copy.deepcopy(encoder)
        part.layers = part.layers[:n]
        part.config = replace(encoder.config, num_hidden_layers=n)
        models.append(MultiExitModel(part, (n,), num_labels, "plain", **options))
    return MultiModel(models)


def train_together(model: MultiExitModel, is_new: bool) -> Iterator[Stage]:
    """All exits at once. A finished trunk is trained further, unless it gets no other exit."""
    if is_new or len(model.heads) > 1:
        yield Stage(model.method, model)


def train_one_by_one(model: MultiModel, is_new: bool) -> Iterator[Stage]:
    """MM's models, the smallest first. The last one is the trunk: a finished one stays as it is."""
    for part in model.models if is_new else model.models[:-1]:
        yield Stage(f"layers {part.exit_layers[0]}", part)


def train_branches(model: BranchModel, is_new: bool) -> Iterator[Stage]:
    """The branches alone, at twice the rate."""
    if model.branches:
        yield Stage("branches", model, 2.0, model.branch_parameters())


def train_nothing(model: MultiExitModel, is_new: bool) -> Iterator[Stage]:
    """The trunk is all."""
    yield from ()


EE, SWEET, PLAIN = (partial(MultiExitModel, method=name) for name in ("ee", "sweet", "plain"))
PAPERS, HALFWAY = {"exits_between": exits_of_the_paper}, {"exits_between": lambda depth: [depth // 2]}
BEYOND = {"keeps_trunk": True, "has_exit_0": True}
METHODS = {
    "sweet": Method("SWEET", SWEET, train_together, **PAPERS),
    "ee": Method("Early-Exit", EE, train_together, **PAPERS),
    "mm": Method("Multi-Model", slices, train_one_by_one, **PAPERS),
    "branch": Method("branches", BranchModel, train_branches, **BEYOND, **HALFWAY),
    "plain": Method("plain model with exit 0 in front", PLAIN, train_nothing, **BEYOND),
}


def exit_layers_for(depth: int, method: str = "sweet", exit_strategy: str = "confidence") -> tuple[int, ...]:
    """The default exit layers of an encoder of `depth` layers, counted from 1; 0 is exit 0."""
    row = METHODS[method]
    if exit_strategy == "lte" and row.has_exit_0 and row.exits_between:  # exit 0 learns no such thing
        row = METHODS["sweet"]
    between = row.exits_between(depth) if row.exits_between else []
    return tuple(sorted({*between, depth} | ({0} if row.has_exit_0 else set())))


def add_exits(
    method: str, trunk: MultiExitModel, exit_layers: Sequence[int], exit_strategy: str = "confidence"
) -> ExitModel:
    """A method's model, built from a trunk, which it takes over.

    The last exit is the trunk's: before training they answer alike, to the bit. The other exits' heads get the trunk's
    pooler. EE on a trunk is "mixed" training (https://arxiv.org/abs/2407.14320). Raises ValueError for exits that end
    elsewhere.
    """
    if trunk.head_layers != tuple(exit_layers[-1:]):
        raise ValueError(f"exit_layers is {tuple(exit_layers)}, and the trunk has exits after {trunk.head_layers}")
    head, encoder = trunk.heads[0], trunk.encoder.requires_grad_(True)
    model = METHODS[method].build(encoder, exit_layers, trunk.num_labels, exit_strategy=exit_strategy)
    for own in (own for alone in model.models_alone for own in alone.heads):
        own.pooler.load_state_dict(head.pooler.state_dict())
    last = model.models_alone[-1].heads[-1]
    last.load_state_dict(head.state_dict(), strict=False)  # one of the two may have no layer of learning-to-exit
    return model.train(trunk.training)


def new_trunk(folder: str | Path, n: int, num_labels: int, exit_strategy: str = "confidence") -> MultiExitModel:
    """The first n layers of a checkpoint, with one new exit at their end. Raises as `load_encoder` does."""
    return MultiExitModel(load_encoder(folder, n), (n,), num_labels, "plain", exit_strategy)


def build_multi_model(
    folder: str | Path, exit_layers: Sequence[int], num_labels: int, exit_strategy: str = "confidence"
) -> MultiModel:
    """Slice the first n layers of one checkpoint, for each n of `exit_layers`, into K independent models.

    For the arguments and errors see `MultiExitModel` and `load_encoder`.
    """
    return add_exits("mm", new_trunk(folder, exit_layers[-1], num_labels, exit_strategy), exit_layers, exit_strategy)
