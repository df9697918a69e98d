"""The record of a run, run.json. Dimension letters: K exits, C classes."""

from dataclasses import dataclass, field
from typing import Literal

from minisweet.data.tasks import TASKS
from minisweet.exits import EXIT_STRATEGIES


@dataclass(frozen=True, kw_only=True)
class Record:
    """What others read of run.json. Its object `arguments`, of train.py, is merged into the rest."""

    model: str
    method: str  # one of METHODS; reports also read studies' runs of other methods, which have no weights
    exit_strategy: Literal[EXIT_STRATEGIES]
    task: str  # or the name of --data without its suffix
    seed: int
    lr: float
    epochs: int
    batch_size: int
    max_length: int
    train_size: int | None = None  # None for all rows
    trunk: str | None = None
    targets: str | None = None  # up to here they are arguments

    exit_layers: list[int]  # (K,), 0 first where there is exit 0
    labels: list[str]  # (C,)
    metric: str
    depth: int  # the encoder's layers, of which the model keeps those up to the last exit
    vocab_size: int | None = None
    device: str
    precision: str
    losses: list[list[float]] = field(default_factory=list)  # (steps, exits that are trained)
    diverged: int | None = None  # the step at which the loss became infinite or NaN; such a run has no weights
    ngrams: dict | None = None  # the settings of exit 0
    subset: list[int] | None = None  # the rows that were trained on
    text_columns: list[str] | None = None  # this and the next are of --data
    label_column: str | None = None
    train_digest: str | None = None
    dev_digest: str | None = None
    train_texts: list[str] | None = None  # digests of the texts that it and its trunk were trained on, if known

    @property
    def num_labels(self) -> int:
        """C."""
        return len(self.labels)

    @property
    def columns(self) -> list[str]:
        """The columns of the texts that it was trained on: of own data, or of a task of GLUE."""
        return list(self.text_columns or TASKS[self.task].columns[:-1])
