"""The defaults that depend on the model and the task: exits, batch size, learning rate, epochs."""

from argparse import Namespace
from math import ceil

from minisweet.base.files import InputError
from minisweet.config import Config
from minisweet.tasks import Task

# Table 2 of the paper, in 1e-5: the rates with the largest area under the curve, by model type, hidden size and depth.
TABLE_2_TASKS = ("sst2", "mrpc", "cola", "mnli", "qqp", "qnli", "rte")
TABLE_2 = {
    ("bert", 768, 12): {"ee": (5, 5, 4, 5, 5, 5, 5), "mm": (5, 3, 4, 5, 5, 4, 5), "sweet": (5, 4, 5, 5, 5, 5, 4)},
    ("bert", 1024, 24): {"ee": (4, 4, 4, 4, 5, 4, 3), "mm": (2, 5, 3, 3, 3, 4, 3), "sweet": (2, 4, 4, 4, 4, 3, 3)},
    ("deberta", 768, 12): {"ee": (3, 4, 4, 2, 4, 3, 2), "mm": (3, 5, 5, 4, 5, 4, 1), "sweet": (3, 5, 4, 3, 5, 3, 4)},
    ("deberta", 1024, 24): {"ee": (2, 3, 3, 2, 2, 3, 1), "mm": (4, 2, 3, 2, 2, 2, 2), "sweet": (3, 1, 2, 2, 3, 1, 2)},
}
SMALL = 512  # models up to this hidden size, such as MiniLM (384), need larger rates


def fill_in(args: Namespace, config: Config, task: Task, rows: int) -> None:
    """Fill in the training options that are None, from the model, the task and its number of training rows.

    Raises InputError if the model cannot have these exits.
    """
    args.exit_layers = args.exit_layers or default_exit_layers(config.num_hidden_layers)
    check_exit_layers(args.exit_layers, config)
    rates_of = args.method if len(args.exit_layers) > 1 else "mm"  # with one exit all methods train like MM's models
    args.batch_size = args.batch_size or default_batch_size(config)
    args.lr = args.lr or default_learning_rate(config, args.task, rates_of)
    args.epochs = args.epochs or default_epochs(task.epochs, task.steps, rows, args.batch_size)


def check_exit_layers(layers: list[int] | None, config: Config) -> None:
    """Raise InputError if the model cannot have exits after these layers."""
    if layers and (layers != sorted(layers) or layers[-1] > config.num_hidden_layers):
        right = f"should increase and end at one of the layers 1 to {config.num_hidden_layers}"
        raise InputError(f"{','.join(map(str, layers))}, {right}", "exit_layers")


def default_exit_layers(depth: int) -> list[int]:
    """The default exit layers for an encoder of `depth` layers, counted from 1.

    They are those of the paper for 12 and for 24 layers (Sec. 3.2). Other depths get the same shares as 12 layers.
    """
    early = [1, 6, 12] if depth == 24 else [max(1, round(depth * share)) for share in (1 / 12, 1 / 3, 1 / 2)]
    return sorted({*early, depth})


def default_batch_size(config: Config) -> int:
    """The paper's batch size: 16, and 8 for a large DeBERTa (App. A)."""
    return 8 if config.model_type == "deberta" and config.hidden_size >= 1024 else 16


def default_epochs(least: int, steps: int, rows: int, batch_size: int) -> int:
    """The number of epochs: at least `least`, and enough for at least `steps` steps."""
    return max(least, ceil(steps / ceil(rows / batch_size)))


def default_learning_rate(config: Config, task: str = "", method: str = "") -> float:
    """The paper's learning rate if it has one (Table 2), or else 1e-4 up to a hidden size of 512, and 5e-5 above."""
    rates = TABLE_2.get((config.model_type, config.hidden_size, config.num_hidden_layers))
    if rates is None or task not in TABLE_2_TASKS or method not in rates:
        return 1e-4 if config.hidden_size <= SMALL else 5e-5
    return rates[method][TABLE_2_TASKS.index(task)] / 1e5


def search_rates(config: Config) -> list[float]:
    """The learning rates to choose from: the paper's five (App. A), and larger ones for small models."""
    return [5e-5, 1e-4, 2e-4, 4e-4] if config.hidden_size <= SMALL else [1e-5, 2e-5, 3e-5, 4e-5, 5e-5]
