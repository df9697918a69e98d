"""What others read of a run's run.json and evaluation.json, checked where it is made.

Keys that are for people alone are no fields here. A value that cannot be raises InputError, which names the key.
Dimension letters: K exits, C classes, P thresholds. Scores are in percent, losses in points, speedup ratios in shares
of the layers; each interval is a 95% interval, its lower and its upper end.
"""

from dataclasses import dataclass, field
from typing import Literal

from minisweet.base.files import InputError
from minisweet.data.tasks import TASKS
from minisweet.exits import EXIT_STRATEGIES

GOALS = {"max_loss": (0, 200), "speed": (0, 1), "max_change": (0.01, 99.99), "sure": (50, 99.9)}  # lowest, highest


def check(name: str, value: object, is_right: bool, wanted: str) -> None:
    """Raise InputError, which names a key, its value and what would be right, unless it is right."""
    if not is_right:
        raise InputError(f"{name} is {value!r:.80}, should be {wanted}")


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
    dev_data: str | None = None
    dev_size: float = 0.2  # up to here they are arguments

    exit_layers: list[int]  # (K,), 0 first where there is exit 0
    labels: list[str]  # (C,)
    metric: Literal["accuracy", "agreement", "matthews"]
    depth: int  # the encoder's layers, of which the model keeps those up to the last exit
    vocab_size: int | None = None
    device: str
    precision: str
    losses: list[list[float]] = field(default_factory=list)  # (steps, exits that are trained)
    diverged: int | None = (
        None  # the step at which a loss or a weight became infinite or NaN; then no weights are there
    )
    subset: list[int] | None = None  # the rows that were trained on
    text_columns: list[str] | None = None  # this and the next are of --data
    label_column: str | None = None
    # Keys of the texts that it was trained on, and its trunk if that is known. Old runs have `train_texts`, of strings.
    train_tokens: list[int] | None = None
    is_trunk_known: bool = True

    def __post_init__(self) -> None:
        layers = self.exit_layers or [0]
        is_right = layers == sorted({*layers}) and 0 <= layers[0] and 0 < layers[-1] <= self.depth
        within = f"increasing layers up to {self.depth}, after 0 where there is exit 0"
        check("exit_layers", self.exit_layers, is_right, within)
        check("labels", self.labels, 0 < len(set(self.labels)) == len(self.labels), "different names")
        check("seed", self.seed, self.seed >= 0, "0 or more")
        check("batch_size", self.batch_size, self.batch_size >= 1, "1 or more")
        check("dev_size", self.dev_size, 0 < self.dev_size < 1, "a share between 0 and 1")
        columns = self.text_columns
        check("text_columns", columns, columns is None or 1 <= len(columns) <= 2, "one or two columns")
        check("task", self.task, columns is not None or self.task in TASKS, f"one of {', '.join(TASKS)}")
        keys = self.train_tokens or [0]
        check("train_tokens", keys, -(2**63) <= min(keys) <= max(keys) < 2**63, "integers of 64 bits")

    @property
    def num_labels(self) -> int:
        """C."""
        return len(self.labels)

    @property
    def knows_all_texts(self) -> bool:
        """Whether it can be told of every text if it or its trunk was trained on it."""
        return self.train_tokens is not None and self.is_trunk_known

    @property
    def columns(self) -> list[str]:
        """The columns of the texts that it was trained on: of own data, or of a task of GLUE."""
        return list(self.text_columns or TASKS[self.task].columns[:-1])


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """The threshold to deploy, the exits to ask, and what may be expected of both on new text."""

    threshold: float
    asked_exits: list[int]  # layers, the last exit's among them; the other exits cost more than they give
    score: float
    score_interval: list[float]
    macro_f1: float
    full_depth_score: float
    full_depth_interval: list[float]
    loss: float  # the full-depth score less the score
    loss_interval: list[float]
    speedup_ratio: float
    speedup_interval: list[float]
    reached: bool  # False where no threshold is as fast as `goal` asks
    goal: dict[str, float]  # {"speed": S}, {"max_loss": P, "sure": S} or {"max_change": P, "sure": S}
    choosing_texts: int | None = None  # how many distinct texts chose; this and the next: None in old evaluations
    judging_texts: int | None = None  # of how many distinct texts all of this is stated
    trained_rows: int | None = None  # how many rows were left out as trained on; None where that cannot be checked

    def __post_init__(self) -> None:
        check("threshold", self.threshold, 0 <= self.threshold <= 1, "a number from 0 to 1")
        for name, ends in vars(self).items():
            check(name, ends, not name.endswith("_interval") or len(ends) == 2, "the two ends of an interval")
        are_named = {*self.goal} in ({"speed"}, {"max_loss", "sure"}, {"max_change", "sure"})
        is_goal = are_named and all(GOALS[name][0] <= value <= GOALS[name][1] for name, value in self.goal.items())
        check("goal", self.goal, is_goal, "one of max_loss and max_change with sure, or of speed")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What others read of evaluation.json: the curve of all exits, cross-fitted, and what is deployed."""

    task: str
    method: str
    metric: Literal["accuracy", "agreement", "matthews"]
    exit_layers: list[int]  # (K,), all that were evaluated
    exit_scores: list[float]  # (K,), each exit alone
    per_class: list[dict]  # (K,), of `classification_report`
    scores: list[float]  # (P,)
    speedup_ratios: list[float]  # (P,)
    area: float
    precision: str
    examples: int
    temperatures: list[float]  # (K,)
    certainty_ranges: list[list[float]] | None = None  # (K, 2), of learning-to-exit
    operating_point: OperatingPoint
    dev_digest: str
    run_digest: str | None = None  # see `run_digest`; None in old evaluations

    def __post_init__(self) -> None:
        layers, asked, ranges = self.exit_layers, self.operating_point.asked_exits, self.certainty_ranges
        check("exit_layers", layers, len(layers) > 0, "layers")
        is_asked = asked == [n for n in layers if n in asked] and layers[-1] in asked
        check("asked_exits", asked, is_asked, f"some of {layers}, in order, and the last one among them")
        fit = len(self.temperatures) == len(layers) and all(1e-4 < value < 1e4 for value in self.temperatures)
        check("temperatures", self.temperatures, fit, "a number from 0.0001 to 10000 for each exit")
        are_pairs = ranges is None or [len(ends) for ends in ranges] == [2] * len(layers)
        check("certainty_ranges", ranges, are_pairs, "two numbers for each exit")
        check("exit_scores", self.exit_scores, len(self.exit_scores) == len(layers), "a number for each exit")
        have_confusions = all({"confusions", "confusion_matrix"} & {*report} for report in self.per_class)  # new or old
        are_reports = len(self.per_class) == len(layers) and have_confusions
        check("per_class", self.per_class, are_reports, "for each exit an object with its confusions")
        check("scores", self.scores, 0 < len(self.scores) == len(self.speedup_ratios), "as many as speedup_ratios")
