"""What evaluate.py writes into evaluation.json, and others read. Keys that are for people alone are no fields here.

Dimension letters: K exits, C classes, P thresholds. Scores are in percent, losses in points, speedup ratios in shares
of the layers; each interval is a 95% interval, its lower and its upper end.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minisweet.base.files import InputError, read_dataclass
from minisweet.runs.folders import EVALUATION


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """The threshold to deploy, the exits to ask, and what may be expected of both on new text."""

    threshold: float
    asked_exits: list[int]  # layers, the last exit's among them; the other exits cost more than they give
    score: float
    score_interval: list[float]
    macro_f1: float
    macro_f1_interval: list[float]
    full_depth_score: float
    full_depth_interval: list[float]
    loss: float  # the full-depth score less the score
    loss_interval: list[float]
    speedup_ratio: float
    speedup_interval: list[float]
    reached: bool  # False where no threshold is as fast as `wish` asks
    wish: dict[str, float]  # {"speed": S}, {"max_loss": P, "sure": S} or {"max_change": P, "sure": S}
    # Only for a wish with "sure":
    certified_rows: int | None = None  # how many rows certify it
    certified_texts: int | None = None  # how many distinct texts these rows are
    effective_rows: float | None = None  # how many rows without a repeated text tell as much
    certified_changes: int | None = None  # how many of the rows get another answer than at full depth
    trained_rows: int | None = None  # how many rows were left out as trained on; None where that cannot be checked


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The exits' scores and the speed-accuracy curve of all of them, cross-fitted: all that reports read."""

    task: str
    method: str
    exit_strategy: str
    metric: Literal["accuracy", "agreement", "matthews"]
    exit_layers: list[int]  # (K,), all that were evaluated
    exit_scores: list[float]  # (K,)
    class_counts: list[list[int]]  # (K, C), how often each exit predicts each class
    thresholds: list[float]  # (P,)
    scores: list[float]  # (P,)
    speedup_ratios: list[float]  # (P,)
    area: float
    precision: str


@dataclass(frozen=True, kw_only=True)
class Evaluation(Curve):
    """The whole evaluation, with the rule and the operating point that are deployed."""

    examples: int
    effective_examples: float  # how many rows without a repeated text tell as much
    temperatures: list[float]  # (K,)
    certainty_ranges: list[list[float]] | None = None  # (K, 2), of learning-to-exit
    operating_point: OperatingPoint
    dev_digest: str


def read_evaluation(run: Path, kind: type[Curve] = Evaluation) -> Curve | Evaluation:
    """Read a run's evaluation.json, all of it or the `Curve` alone.

    Raises InputError where there is none, and for a missing or mistyped key.
    """
    if not (run / EVALUATION).is_file():
        raise InputError(f"{run}: has no {EVALUATION}; first: evaluate.py {run}")
    return read_dataclass(kind, run / EVALUATION)
