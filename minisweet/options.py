"""All that a training can be told, and what model and task decide where it is left open."""

from dataclasses import dataclass, replace
from math import ceil

from minisweet.base.commands import (
    Kind,
    Options,
    list_of,
    name_of,
    number,
    one_of,
    option,
    positive_number,
    whole_number,
)
from minisweet.base.devices import AMP_CHOICES
from minisweet.base.files import InputError
from minisweet.config import Config
from minisweet.tasks import TASKS, default_learning_rate
from minisweet.exits import EXIT_STRATEGIES
from minisweet.methods import METHODS, exit_layers_for
from minisweet.hub import REPOSITORIES

# Own text is trained on for at least so many steps and epochs. Labelled single texts of three classes or more gain by
# eight epochs. Two classes gain nothing, pairs lose, and texts that the model has answered itself are many.
STEPS, EPOCHS, EPOCHS_OF_OTHERS = 300, 8, 4
MAX_LENGTH = 256  # tokens
METHOD = one_of(*METHODS)._replace(is_right=lambda name: isinstance(name, str) and name in METHODS)  # new rows too


def _are_weights(value: object) -> bool:
    return value == "balanced" or (
        isinstance(value, dict) and value != {} and all(map(positive_number.is_right, value.values()))
    )


WEIGHTS = Kind("balanced, or from Python a dictionary of labels and positive numbers", str, _are_weights)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Options):
    """The options of a training. Raises InputError, which names the option, for a value that cannot be."""

    model: str = option("minilm-l6", name_of, f"{', '.join(REPOSITORIES)}, a folder or a hub id")
    method: str = option("plain", METHOD, f"{', '.join(METHODS)}")
    exit_layers: list[int] | None = option(
        None, list_of(whole_number(0)), "counted from 1, as 1,4,6,12; 0 is exit 0, a bag of words (default: by depth)"
    )
    exit_strategy: str = option("confidence", one_of(*EXIT_STRATEGIES), "or learning-to-exit, lte")
    trunk: str | None = option(None, name_of, "run or classifier to start from, which plain and branch keep")
    class_weights: str | dict[str, float] | None = option(
        None, WEIGHTS, "balanced: each row weighs N / (classes x rows of its class)"
    )
    dev_size: float = option(0.2, number(0.0001, 0.9999), "share of the labelled rows that is set aside")
    train_size: int | None = option(None, whole_number(1), "examples, drawn by the seed")
    seed: int = option(0, whole_number(0), "of the subset, new weights, order, dropout")
    lr: float | None = option(
        None, positive_number, "first learning rate (default: the paper's, or by the model's size)"
    )
    epochs: int | None = option(None, whole_number(1), "(default: 2; toy 3; own text: by its rows and classes)")
    batch_size: int | None = option(None, whole_number(1), "examples (default: 16, and 8 for a large DeBERTa)")
    max_length: int | None = option(None, whole_number(8), "tokens; longer texts are cut (default: 256, or a trunk's)")
    device: str = option("auto", name_of, "auto, cpu, cuda or cuda:N")
    amp: str = option("auto", one_of(*AMP_CHOICES), f"mixed precision: {', '.join(AMP_CHOICES)}; auto: where it pays")


COMMON = "model method exit_layers seed lr epochs batch_size max_length device amp".split()
OF_TASKS, OWN_TEXT = [*COMMON, "exit_strategy", "train_size"], [*COMMON, "trunk", "class_weights", "dev_size"]


def resolve(
    options: TrainingOptions, config: Config, task: str | None = None, end: int | None = None
) -> TrainingOptions:
    """The options with exits, batch size and rate, for a task of GLUE or the toy, else None for own text.

    So are a task's epochs; those of own text stay open, since each stage has its own number of rows (`epochs_of`).
    `end` is where a trunk ends. Raises InputError for exits that cannot be.
    """
    method, depth = METHODS[options.method], end or config.num_hidden_layers
    layers = options.exit_layers or list(exit_layers_for(depth, options.method, options.exit_strategy))
    typed = ",".join(map(str, layers))
    if layers != sorted(layers) or not (end or 1) <= layers[-1] <= depth:
        where = f"at layer {end}, as the trunk does" if end else f"at one of the layers 1 to {depth}"
        raise InputError(f"{typed}, should increase and end {where}", "exit_layers")
    if method.exits_between is None and any(layers[:-1]):
        what = f"{typed}, and the method {options.method} has exits 0 and {depth} alone; take the method branch"
        raise InputError(what, "exit_layers")
    if options.exit_strategy == "lte" and layers[0] == 0:
        advice = "leave 0 out of the exits" if options.exit_layers else "take the method branch"
        raise InputError(f"lte, and exit 0 learns no such thing; {advice}", "exit_strategy")
    is_large_deberta = config.model_type == "deberta" and config.hidden_size >= 1024
    # With one exit beside exit 0 all methods train alike, and take MM's rate.
    rates_of = options.method if sum(n > 0 for n in layers) > 1 else "mm"
    return replace(
        options,
        exit_layers=layers,
        batch_size=options.batch_size or (8 if is_large_deberta else 16),  # App. A
        lr=options.lr or default_learning_rate(config, task, rates_of),
        epochs=options.epochs or (TASKS[task].epochs if task else None),
    )


def epochs_of(rows: int, batch_size: int, classes: int, are_single: bool = True) -> int:
    """How many epochs a stage on own text takes, by its number of texts and classes (.github/results/tried.md).

    `are_single`: labelled texts, no pairs.
    """
    least = EPOCHS if are_single and classes > 2 else EPOCHS_OF_OTHERS
    return max(least, ceil(STEPS / ceil(max(1, rows) / batch_size)))
