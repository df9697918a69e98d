"""What is read of a run's JSON files: run.json, evaluation.json, diverged.json. Every value that is used is checked;
what is for people alone, as each class's F1, is no field here.

Dimension letters: K exits, C classes, P thresholds.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from minisweet.base.fields import Fields
from minisweet.calibration import CALIBRATIONS
from minisweet.data.tasks import TASKS
from minisweet.exits import EXIT_STRATEGIES

Count = Annotated[int, 0, 2**31 - 1]
Size = Annotated[int, 1, 2**31 - 1]
Layer = Annotated[int, 1, 10**6]
Share = Annotated[float, 0, 1]
Score = Annotated[float, -100, 100]
Points = Annotated[float, -200, 200]  # between two scores
Amount = Annotated[float, 0, 1e38]
Positive = Annotated[float, 1e-300, 1e300]
Text = Annotated[str, 0, 10**6]
Strategy = Literal[EXIT_STRATEGIES]
Metric = Literal["accuracy", "agreement", "matthews"]
WISHES = ({"max_loss"}, {"speed"}, {"max_change", "sure"})


@dataclass(frozen=True, kw_only=True)
class Arguments(Fields):
    """The arguments of train.py that others read; all of diverged.json."""

    model: Text
    method: Text  # of a run one of METHODS; reports take any
    exit_strategy: Strategy
    task: Text
    seed: Count
    lr: Positive
    epochs: Size
    batch_size: Size
    max_length: Annotated[int, 8, 2**31 - 1]
    train_size: Size = None  # None for all rows
    trunk: Text = None
    targets: Text = None


@dataclass(frozen=True, kw_only=True)
class Record(Arguments):
    """run.json."""

    exit_layers: Annotated[Layer, "K"]
    labels: Annotated[Text, "C"]
    depth: Layer
    metric: Metric
    device: Text
    precision: Text
    losses: Annotated[Amount, "steps", "exits that are trained"]
    seconds: Amount = None
    subset: Annotated[Count, "rows"] = None
    digests: Annotated[Text, dict] = None  # of the files; records without a model have none
    train_digest: Text = None
    dev_digest: Text = None
    data_dir: Text = None  # of the task's validation rows; what follows is of rows of the user's own
    data: Text = None
    dev_data: Text = None
    dev_rows: Annotated[Count, "rows of dev"] = None
    text_columns: Annotated[Text, "columns"] = None
    label_column: Text = None
    vocab_size: Size = None  # of config.json

    @property
    def num_labels(self) -> int:
        """C."""
        return len(self.labels)

    @property
    def columns(self) -> list[str]:
        """The columns of the texts that it was trained on: of own data, or of a task of GLUE; of the toy none."""
        return list(self.text_columns or TASKS.get(self.task, TASKS["toy"]).columns[:-1])


@dataclass(frozen=True, kw_only=True)
class OperatingPoint(Fields):
    """The threshold to deploy."""

    threshold: Share
    score: Score
    macro_f1: Score
    full_depth_score: Score
    loss: Points
    loss_interval: Annotated[Points, 2]
    speedup_ratio: Positive
    speedup_interval: Annotated[Positive, 2]
    reached: Literal[True, False]
    wish: Annotated[Amount, dict]  # one of WISHES


@dataclass(frozen=True, kw_only=True)
class Curve(Fields):
    """What reports read of evaluation.json: the exits' scores and the speed-accuracy curve."""

    task: Text
    method: Text
    exit_strategy: Strategy
    metric: Metric
    exit_layers: Annotated[Layer, "K"]
    exit_scores: Annotated[Score, "K"]
    class_counts: Annotated[Count, "K", "C"]
    thresholds: Annotated[Share, "P"]
    scores: Annotated[Score, "P"]
    speedup_ratios: Annotated[Positive, "P"]
    area: Score
    calibration: Literal[CALIBRATIONS]
    precision: Text
    run_digest: Text = None


@dataclass(frozen=True, kw_only=True)
class Evaluation(Curve):
    """evaluation.json."""

    exit_counts: Annotated[Count, "P", "K"]
    examples: Size
    temperatures: Annotated[float, 1e-9, 1e9, "K"]
    certainty_ranges: Annotated[Share, "K", 2] = None  # of learning-to-exit
    mean_exit_layers: Annotated[Amount, dict, "P"] = None  # of the toy task
    operating_point: OperatingPoint
    logits_digest: Text
    dev_digest: Text
