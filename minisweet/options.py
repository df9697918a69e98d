"""The options for training. defaults.py fills in those that are left open."""

from dataclasses import dataclass
from typing import Literal

from minisweet.base.commands import Options, list_of, name_of, one_of, option, positive_number, whole_number
from minisweet.base.devices import AMP_CHOICES, AMP_HELP
from minisweet.checkpoint import REPOSITORIES
from minisweet.exits import EXIT_STRATEGIES
from minisweet.methods import METHODS


@dataclass(frozen=True, kw_only=True)
class CommonOptions(Options):
    """What train.py and minisweet fit both take. Raises InputError, which names the option, for a wrong value."""

    model: str = option("minilm-l6", name_of, f"{', '.join(REPOSITORIES)}, a folder or a hub id")
    seed: int = option(0, whole_number(0), "random seed of order and dropout; in train.py also of the rows and heads")
    lr: float | None = option(
        None, positive_number, "initial learning rate (default: by the model; for train.py also by the task)"
    )
    epochs: int | None = option(None, whole_number(1), "passes over the data (default: by the task or its rows)")
    batch_size: int | None = option(None, whole_number(1), "examples (default: 16, and 8 for a large DeBERTa)")
    device: str = option("auto", name_of, "auto, cpu, cuda or cuda:N")
    amp: str = option("auto", one_of(*AMP_CHOICES), AMP_HELP)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(CommonOptions):
    """The options of train.py."""

    method: str = option("sweet", one_of(*METHODS), ", ".join(METHODS))
    exit_layers: list[int] | None = option(
        None, list_of(whole_number(1)), "counted from 1, as in 1,4,6,12 (default: the paper's, by the model's depth)"
    )
    exit_strategy: str = option("confidence", one_of(*EXIT_STRATEGIES), "confidence, or lte for learning-to-exit")
    pooling: str | None = option(
        None, one_of("cls", "mean"), "what exits read: cls, or the mean of the tokens (default: the checkpoint's)"
    )
    train_size: int = option(6000, whole_number(1), "training rows, sampled with the seed")
    max_length: int = option(256, whole_number(8), "tokens; longer texts are cut")


class Resolved(TrainingOptions):
    """The options once `resolve` (defaults.py) has filled in those that were left open."""

    exit_layers: list[int]
    pooling: Literal["cls", "mean"]
    lr: float
    epochs: int
    batch_size: int
