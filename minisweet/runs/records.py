"""What others read of a run's run.json, evaluation.json and operating.json.

Keys that are for people alone are no fields here. Dimension letters: K exits, C classes, P thresholds. Scores are in
percent, shares of the layers from 0 to 1; each interval is a 95% interval, its lower and its upper end.
"""

from dataclasses import dataclass, field
from typing import Literal

from minisweet.data.tasks import TASKS


@dataclass(frozen=True, kw_only=True)
class Record:
    """What others read of run.json. Its object `arguments`, the options of the training, is merged into the rest."""

    model: str
    method: str  # one of METHODS
    exit_strategy: str
    task: str  # or the name of own text's file without its suffix
    seed: int
    lr: float
    epochs: int
    batch_size: int
    max_length: int
    train_size: int | None = None  # None for all rows
    dev_size: float | None = None  # the share that is set aside; None where validation rows are given
    # up to here they are arguments

    id: str | None = None  # the SHA-256 of the weights; None for a training that diverged
    exit_layers: list[int]  # (K,), 0 first where there is exit 0
    labels: list[str]  # (C,)
    label_type: Literal["str", "int", "float", "bool"] = "str"  # of the labels that were handed to Python's `fit`
    metric: Literal["accuracy", "agreement", "matthews"]
    depth: int  # the encoder's layers, of which the model keeps those up to the last exit
    vocab_size: int
    device: str
    precision: str
    diverged: int | None = None  # the step at which a loss or a weight became infinite or NaN; no weights are there
    subset: list[int] | None = None  # the rows that were trained on
    text_columns: list[str] | None = None  # this and the next are of own text
    label_column: str | None = None
    trained_keys: list[int] = field(default_factory=list)  # of texts that it, and a trunk that is a run, learnt from

    @property
    def num_labels(self) -> int:
        """C."""
        return len(self.labels)

    @property
    def columns(self) -> list[str]:
        """The columns of the texts that it was trained on: of own text, or of a task of GLUE."""
        return list(self.text_columns or TASKS[self.task].columns[:-1])


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What others read of evaluation.json: the curve of all exits, cross-fitted."""

    id: str | None = None  # of the run
    method: str
    metric: Literal["accuracy", "agreement", "matthews"]
    task: str
    examples: int
    dev_digest: str
    exit_layers: list[int]  # (K,)
    exit_scores: list[float]  # (K,), each exit alone
    exit_answers: list[int]  # (K,), in how many classes each exit answers
    scores: list[float]  # (P,)
    speedup_ratios: list[float]  # (P,)
    area: float


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """What is deployed, and what may be expected of it on new text: operating.json."""

    id: str | None = None  # of the run
    threshold: float
    exits: list[int]  # the layers of those that are asked, the last exit's among them
    goal: dict[str, float]  # {"max_lost": P, "sure": S} or {"max_share": s}
    lost_means: Literal["lost", "changed"]  # full depth is right and early exit wrong; or their answers differ
    choosing_texts: int
    judging_texts: int
    score: float | None
    score_interval: list[float] | None
    full_depth: float | None
    full_depth_interval: list[float] | None
    lost: float | None  # of 100 judging texts
    lost_interval: list[float] | None
    share: float  # of the layers
    share_interval: list[float] | None
    temperatures: list[float]  # of `exits`
    certainty_ranges: list[list[float]] | None  # of `exits`, with learning-to-exit
    per_class: dict | None  # precision, recall, f1, support: (C,) each
    precision: str  # in which its logits were computed
