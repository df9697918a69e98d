"""The paper's methods: SWEET, Early-Exit and Multi-Model.

For each method, this file says how its model is built and which parts of it are trained, in order. Two more lines tell
the methods apart: where SWEET's gradient stops (exits.py), and when backward() is called (training.py). The
paper's learning rates are in defaults.py. To add a method, add a row to METHODS; a new kind of model is a subclass of
those in exits.py.

Every model is built from a trunk, a model with one exit at its end: public weights with a new head.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from minisweet.checkpoint import load_encoder
from minisweet.exits import ExitModel, MultiExitModel, MultiModel
from minisweet.layers import TransformerEncoder


class Stage(NamedTuple):
    """A model, or a part of one, that is trained in one go."""

    name: str
    model: MultiExitModel


class Method(NamedTuple):
    """How a method builds and trains its model."""

    title: str  # for figures and tables
    build: Callable[..., ExitModel]  # takes an encoder, exit layers, C and exit_strategy, like `MultiExitModel`
    stages: Callable[[ExitModel], Iterator[Stage]]  # what to train of the model, in order


def slices(encoder: TransformerEncoder, exit_layers: Sequence[int], num_labels: int, **options) -> MultiModel:
    """MM's models: for each exit, a copy of the encoder's first layers."""
    models = []
    for n in exit_layers:
        part = copy.deepcopy(encoder)
        part.layers = part.layers[:n]
        part.config = replace(encoder.config, num_hidden_layers=n)
        models.append(MultiExitModel(part, (n,), num_labels, **options))
    return MultiModel(models)


def train_together(model: MultiExitModel) -> Iterator[Stage]:
    """All exits at once (EE, SWEET)."""
    yield Stage(model.method, model)


def train_one_by_one(model: MultiModel) -> Iterator[Stage]:
    """MM's models, the smallest first."""
    for part in model.models:
        yield Stage(f"layers {part.exit_layers[0]}", part)


EE, SWEET = (partial(MultiExitModel, method=name) for name in ("ee", "sweet"))
METHODS = {
    "sweet": Method("SWEET", SWEET, train_together),
    "ee": Method("Early-Exit", EE, train_together),
    "mm": Method("Multi-Model", slices, train_one_by_one),
}


def default_exit_layers(depth: int) -> list[int]:
    """The default exit layers for an encoder of `depth` layers, counted from 1.

    They are those of the paper for 12 and for 24 layers (Sec. 3.2). Other depths get the same shares as 12 layers.
    """
    early = [1, 6, 12] if depth == 24 else [max(1, round(depth * share)) for share in (1 / 12, 1 / 3, 1 / 2)]
    return sorted({*early, depth})


def add_exits(
    method: str, trunk: MultiExitModel, exit_layers: Sequence[int], exit_strategy: str = "confidence"
) -> ExitModel:
    """Build a method's model from a trunk. The model reuses the trunk's modules, so do not use the trunk afterwards.

    The last exit is initialised from the trunk's head: before training, both give identical logits. The heads of the
    other exits start from the trunk's pooler. Raises ValueError unless the exits end where the trunk does.
    """
    if trunk.exit_layers != tuple(exit_layers[-1:]):
        raise ValueError(f"exit_layers is {tuple(exit_layers)}, and the trunk has exits after {trunk.exit_layers}")
    head, encoder = trunk.heads[0], trunk.encoder.requires_grad_(True)
    model = METHODS[method].build(encoder, exit_layers, trunk.num_labels, exit_strategy=exit_strategy)
    for alone in model.models_alone:
        for new_head in alone.heads:
            new_head.pooler.load_state_dict(head.pooler.state_dict())
    last = model.models_alone[-1].heads[-1]
    last.load_state_dict(head.state_dict(), strict=False)  # one of the two may have no layer of learning-to-exit
    return model.train(trunk.training)


def new_trunk(folder: str | Path, n: int, num_labels: int, exit_strategy: str = "confidence") -> MultiExitModel:
    """The first n layers of a checkpoint, with one new exit at their end. Raises InputError like `load_encoder`."""
    return MultiExitModel(load_encoder(folder, n), (n,), num_labels, exit_strategy=exit_strategy)


def build_multi_model(
    folder: str | Path, exit_layers: Sequence[int], num_labels: int, exit_strategy: str = "confidence"
) -> MultiModel:
    """Build K independent models from one checkpoint. The model for n in `exit_layers` has its first n layers.

    For the arguments and errors see `MultiExitModel` and `load_encoder`.
    """
    return add_exits("mm", new_trunk(folder, exit_layers[-1], num_labels, exit_strategy), exit_layers, exit_strategy)
