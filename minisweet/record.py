"""What run.json and evaluation.json hold. README.md beside this file tells each key.

Dimension letters: K exits, C classes, P thresholds.
"""

import os
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from minisweet.tasks import TASKS
from minisweet.methods import METHODS
from minisweet.options import TrainingOptions


@dataclass(frozen=True, kw_only=True)
class Record:
    """A training, as run.json has it."""

    id: str | None = None  # the SHA-256 of the weights; None for a training that diverged
    arguments: TrainingOptions  # with nothing left open but own text's epochs, which follow from each stage's rows
    task: str  # or the name of own text's file without its suffix
    labels: list[str]  # (C,)
    label_type: Literal["str", "int", "float", "bool"] = "str"  # of the labels that were handed to Python's `fit`
    metric: Literal["accuracy", "matthews"]
    text_columns: list[str] | None = None  # this and the next two are of own text
    label_column: str | None = None
    group_column: str | None = None
    set_aside: float = 1.0  # the share of the labelled rows that validates; 1 where these rows have their own file
    exit_layers: list[int]  # (K,), 0 first where there is exit 0
    depth: int  # the encoder's layers, of which the model keeps those up to the last exit
    vocab_size: int
    losses: dict = field(default_factory=dict)  # by stage: each step's, of each exit
    stages: dict = field(default_factory=dict)  # seconds by stage
    seconds: float = 0.0
    diverged: int | None = None  # the step at which a loss or a weight became infinite or NaN; no weights are there
    subset: list[int] = field(default_factory=list)  # the rows that were trained on
    digest: str = ""  # of all texts and labels
    weights: str = ""  # the SHA-256 of the file that the training started from
    trained_keys: list[int] = field(default_factory=list)  # of texts that it, and a trunk that is a run, learnt from
    device: str
    precision: str
    versions: dict = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """The columns of the texts that it was trained on: of own text, or of a task of GLUE; the toy has none."""
        return list(self.text_columns or TASKS[self.task].columns[:-1])

    @property
    def combines(self) -> bool:
        """Whether exit 0 has a say at later exits: of own text, where no --trunk was given."""
        its = self.arguments
        return (
            bool(self.text_columns) and self.exit_layers[0] == 0 and METHODS[its.method].keeps_trunk and not its.trunk
        )

    def training(self) -> dict:
        """What must be equal where a training goes on."""
        return asdict(self.arguments) | {
            name: getattr(self, name) for name in ("labels", "digest", "weights", "precision")
        }


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The curve of all exits, cross-fitted, as evaluation.json has it."""

    id: str | None = None  # of the run
    task: str
    method: str
    exit_strategy: str
    metric: Literal["accuracy", "agreement", "matthews"]
    exit_layers: list[int]  # (K,)
    thresholds: list[float]  # (P,)
    exit_scores: list[float]  # (K,), each exit alone, in percent
    exit_answers: list[int]  # (K,), in how many classes each exit answers
    scores: list[float]  # (P,), in percent
    speedup_ratios: list[float]  # (P,)
    exit_counts: list[list[int]]  # (P, K)
    area: float
    examples: int
    dev_digest: str
    seconds: float
    device: str
    precision: str
    versions: dict


def run_name(options: TrainingOptions, task: str, in_grid: bool = False) -> str:
    """The name of a run's folder; a grid's runs also differ in their rate and their size."""
    name = f"{Path(os.path.realpath(options.model)).name}-{options.method}-{task}"
    if in_grid:
        name += f"-lr{options.lr:g}-n{options.train_size}"
    return f"{name}-seed{options.seed}" + "-lte" * (options.exit_strategy == "lte")


def versions() -> dict[str, str]:
    """The versions of Python, of the operating system and of the libraries."""
    libraries = {name: version(name) for name in ("torch", "tokenizers", "safetensors", "numpy")}
    return {"python": platform.python_version(), "system": platform.platform(), **libraries}
