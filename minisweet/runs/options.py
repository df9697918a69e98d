"""What all commands that train have in common: defaults of exit layers (Sec. 3.2), rates, epochs, batch sizes."""

import argparse
from collections.abc import Sequence
from math import ceil
from pathlib import Path

from minisweet.base.commands import Parser, list_of, whole_number
from minisweet.base.devices import add_device_options
from minisweet.base.safe import InputError
from minisweet.checkpoint import read_config
from minisweet.config import Config
from minisweet.exits import check_exit_layers
from minisweet.runs.hub import REPOSITORIES, model_folder

# Table 2, in 1e-5: what gave the largest area under the speed-accuracy curve, by model type, hidden size and depth.
TABLE_2_TASKS = ("sst2", "mrpc", "cola", "mnli", "qqp", "qnli", "rte")
TABLE_2 = {
    ("bert", 768, 12): {"ee": (5, 5, 4, 5, 5, 5, 5), "mm": (5, 3, 4, 5, 5, 4, 5), "sweet": (5, 4, 5, 5, 5, 5, 4)},
    ("bert", 1024, 24): {"ee": (4, 4, 4, 4, 5, 4, 3), "mm": (2, 5, 3, 3, 3, 4, 3), "sweet": (2, 4, 4, 4, 4, 3, 3)},
    ("deberta", 768, 12): {"ee": (3, 4, 4, 2, 4, 3, 2), "mm": (3, 5, 5, 4, 5, 4, 1), "sweet": (3, 5, 4, 3, 5, 3, 4)},
    ("deberta", 1024, 24): {"ee": (2, 3, 3, 2, 2, 3, 1), "mm": (4, 2, 3, 2, 2, 2, 2), "sweet": (3, 1, 2, 2, 3, 1, 2)},
}
STEPS, EPOCHS = 300, 4  # that a training on own text takes at least
SMALL = 512  # the hidden size up to which a model wants larger rates, as MiniLM's 384 does


def exit_layers_for(depth: int) -> tuple[int, ...]:
    """The default exit layers of an encoder of `depth` layers, counted from 1: the paper's for 12 and 24 (Sec. 3.2).

    Others follow the rule that gives 12's: the layers next to 1/12, 1/3, 1/2 and 1 of the depth, none of them twice.
    """
    if depth == 24:
        return (1, 6, 12, 24)
    return tuple(sorted({max(1, round(depth * share)) for share in (1 / 12, 1 / 3, 1 / 2, 1)}))


def default_learning_rate(config: Config, task: str | None, method: str, on_trunk: bool = False) -> float:
    """The paper's rate where it has one (Table 2); else 2e-4 where the hidden size is at most 512, and 5e-5 above.

    `task` is None for own data, which is none of Table 2's tasks. Branches give the rate of their trunk, which is
    trained as MM's last model is. `on_trunk`: nobody knows how that trunk was trained, so its size decides.
    """
    rates = TABLE_2.get((config.model_type, config.hidden_size, config.num_hidden_layers), {})
    if on_trunk or not rates or task not in TABLE_2_TASKS:
        return 2e-4 if config.hidden_size <= SMALL else 5e-5
    return rates["mm" if method == "branch" else method][TABLE_2_TASKS.index(task)] / 1e5


def epochs_of(steps: int, examples: int, batch_size: int, least: int = EPOCHS) -> int:
    """As many epochs as make so many steps, and at least so many (.github/results/epochs.md)."""
    steps_of_one = ceil(examples / batch_size)
    return max(least, ceil(steps / steps_of_one))


def search_rates(config: Config) -> list[float]:
    """The learning rates to choose from: the paper's five (App. A), and larger ones for small models."""
    return [5e-5, 1e-4, 2e-4, 4e-4] if config.hidden_size <= SMALL else [1e-5, 2e-5, 3e-5, 4e-5, 5e-5]


def default_batch_size(config: Config) -> int:
    """16, and 8 for a large DeBERTa, as in App. A."""
    return 8 if config.model_type == "deberta" and config.hidden_size >= 1024 else 16


def add_training_options(parser: Parser) -> None:
    """Add what every command that trains takes: the model, and how batches are made and computed."""
    option = parser.add_argument
    option("--model", default="minilm-l6", help=f"{', '.join(REPOSITORIES)}, or a folder (default: minilm-l6)")
    option("--batch-size", type=whole_number(1), help="examples (default: 16, and 8 for a large DeBERTa)")
    option("--max-length", type=whole_number(8), default=256, help="tokens; longer examples are cut (default: 256)")
    option("--exit-layers", type=list_of(whole_number(1)), help="counted from 1, such as 1,4,6,12 (default: by depth)")
    add_device_options(parser)


def find_model(args: argparse.Namespace) -> tuple[Path, Config, Sequence[int]]:
    """The folder of --model, its config, the exit layers; --batch-size gets its default. InputError for a misfit."""
    folder = model_folder(args.model)
    config = read_config(folder)
    args.batch_size = args.batch_size or default_batch_size(config)
    exit_layers = args.exit_layers or exit_layers_for(config.num_hidden_layers)
    try:
        check_exit_layers(exit_layers, config.num_hidden_layers)
    except ValueError as error:
        raise InputError(f"--exit-layers: {error}") from None
    if args.max_length > (positions := config.max_position_embeddings):
        raise InputError(f"--max-length: {args.max_length}, and {args.model} has {positions} positions")
    return folder, config, exit_layers
