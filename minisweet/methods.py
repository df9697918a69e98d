"""The methods, a row for each: the paper's SWEET, Early-Exit and Multi-Model, and ours, branches and the plain model.

All that tells one method from another stands here, but for two lines, where SWEET's gradient stops (exits.py) and EE's
one backward pass (train.py), and for the paper's learning rates (runs/start.py). To add a method, add a row. A model of
another kind is a subclass of those in exits.py, made with the `method` that it trains as: "sweet", "ee" or "plain".

Every model is built from a start, a model with one exit at its end. The start is public weights with a new head, or a
trunk: a finished classifier that gets exits.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from minisweet.branches import BranchModel
from minisweet.checkpoint import load_encoder
from minisweet.exits import ExitModel, MultiExitModel, MultiModel
from minisweet.layers import TransformerEncoder

Stages = Iterator[tuple[str, MultiExitModel, float]]  # a name, what is trained, and its rate in learning rates


class Method(NamedTuple):
    """A method: its name for people, its model and training, and what its exits cost."""

    words: str
    colour: str  # in all pictures; Okabe and Ito's, which the colour-blind can tell apart
    build: Callable[..., ExitModel]  # of an encoder, exit layers, C and exit_strategy, as `MultiExitModel`
    stages: Callable[..., Stages]  # what is trained of the model, in turn; its second argument: is the start new?
    keeps_start: bool = False  # a new start is first trained for its own exit, and then all of it stays as it is
    has_exit_0: bool = False  # by default
    exits_between: Callable[[int], Sequence[int]] | None = None  # by default, of L layers; None for no such exits
    is_one_model: bool = True  # else each exit's model starts from the words, and all of them run, even at threshold 1
    cost_in_vain: float = 0.0  # in layers, of each exit that is asked and not taken


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


def train_together(model: MultiExitModel, is_new: bool) -> Stages:
    """All exits at once. A trunk's layers are trained further, unless it gets no other exit."""
    if is_new or len(model.heads) > 1:
        yield model.method, model, 1.0


def train_one_by_one(model: MultiModel, is_new: bool) -> Stages:
    """MM's models, the smallest first. The last one is the start: a trunk stays as it is."""
    for part in model.models if is_new else model.models[:-1]:
        yield f"layers {part.exit_layers[0]}", part, 1.0


def train_branches(model: BranchModel, is_new: bool) -> Stages:
    """The branches alone, at twice the rate."""
    if model.branches:
        yield "branches", model, 2.0


def train_nothing(model: MultiExitModel, is_new: bool) -> Stages:
    """The start is all."""
    yield from ()


EE, SWEET, PLAIN = (partial(MultiExitModel, method=name) for name in ("ee", "sweet", "plain"))
PAPERS, HALFWAY = {"exits_between": exits_of_the_paper}, {"exits_between": lambda depth: [depth // 2]}
FINISHED = {"keeps_start": True, "has_exit_0": True}
METHODS = {
    "sweet": Method("SWEET", "#D55E00", SWEET, train_together, **PAPERS),
    "ee": Method("Early-Exit", "#0072B2", EE, train_together, **PAPERS),
    "mm": Method("Multi-Model", "#009E73", slices, train_one_by_one, **PAPERS, is_one_model=False),
    "branch": Method("branches", "#CC79A7", BranchModel, train_branches, **FINISHED, **HALFWAY, cost_in_vain=1 / 6),
    "plain": Method("plain model with exit 0 in front", "#000000", PLAIN, train_nothing, **FINISHED),
}


def grow(
    method: str, start: MultiExitModel, exit_layers: Sequence[int], exit_strategy: str = "confidence"
) -> ExitModel:
    """A method's model, built from a start, which it takes over.

    The last exit is the start's: before training they answer alike, to the bit. The other exits' heads get the start's
    pooler. EE on a trunk is "mixed" training (https://arxiv.org/abs/2407.14320). Raises ValueError for exits that end
    elsewhere, and where branches shall learn when to be taken and their trunk's exit has not.
    """
    if start.head_layers != tuple(exit_layers[-1:]):
        raise ValueError(f"exit_layers is {tuple(exit_layers)}, and the start has exits after {start.head_layers}")
    head, encoder = start.heads[0], start.encoder.requires_grad_(True)
    model = METHODS[method].build(encoder, exit_layers, start.num_labels, exit_strategy=exit_strategy)
    for own in (own for part in model.parts for own in part.heads):
        own.pooler.load_state_dict(head.pooler.state_dict())
    last = model.parts[-1].heads[-1]
    if METHODS[method].keeps_start and last.lte is not None and head.lte is None:
        raise ValueError("exit_strategy is lte, and the trunk, which stays as it is, has not learned when it is right")
    last.load_state_dict(head.state_dict(), strict=False)  # one of the two may have no layer of learning-to-exit
    return model.train(start.training)


def build_alone(folder: str | Path, n: int, num_labels: int, exit_strategy: str = "confidence") -> MultiExitModel:
    """A new start: the first n layers of a checkpoint, with one exit at their end. Raises as `load_encoder` does."""
    return MultiExitModel(load_encoder(folder, n), (n,), num_labels, "plain", exit_strategy)


def build_multi_model(
    folder: str | Path, exit_layers: Sequence[int], num_labels: int, exit_strategy: str = "confidence"
) -> MultiModel:
    """Slice the first n layers of one checkpoint, for each n of `exit_layers`, into K independent models.

    For the arguments and errors see `MultiExitModel` and `load_encoder`.
    """
    return grow("mm", build_alone(folder, exit_layers[-1], num_labels, exit_strategy), exit_layers, exit_strategy)
