"""What all commands that train have in common: defaults of exit layers (Sec. 3.2), rates, epochs, batch sizes."""

import argparse
from math import ceil
from pathlib import Path

from minisweet.base.commands import Parser, list_of, whole_number
from minisweet.base.devices import add_device_options
from minisweet.base.files import InputError
from minisweet.checkpoint import read_config
from minisweet.config import Config
from minisweet.runs.hub import REPOSITORIES, model_folder

# Table 2, in 1e-5: what gave the largest area under the speed-accuracy curve, by model type, hidden size and depth.
TABLE_2_TASKS = ("sst2", "mrpc", "cola", "mnli", "qqp", "qnli", "rte")
TABLE_2 = {
    ("bert", 768, 12): {"ee": (5, 5, 4, 5, 5, 5, 5), "mm": (5, 3, 4, 5, 5, 4, 5), "sweet": (5, 4, 5, 5, 5, 5, 4)},
    ("bert", 1024, 24): {"ee": (4, 4, 4, 4, 5, 4, 3), "mm": (2, 5, 3, 3, 3, 4, 3), "sweet": (2, 4, 4, 4, 4, 3, 3)},
    ("deberta", 768, 12): {"ee": (3, 4, 4, 2, 4, 3, 2), "mm": (3, 5, 5, 4, 5, 4, 1), "sweet": (3, 5, 4, 3, 5, 3, 4)},
    ("deberta", 1024, 24): {"ee": (2, 3, 3, 2, 2, 3, 1), "mm": (4, 2, 3, 2, 2, 2, 2), "sweet": (3, 1, 2, 2, 3, 1, 2)},
}
STEPS, EPOCHS = 300, 4  # own text is trained on for so many, at least
SMALL = 512  # up to this hidden size a model needs larger rates, as MiniLM with its 384 does


def exit_layers_for(depth: int, method: str = "sweet", exit_strategy: str = "confidence") -> tuple[int, ...]:
    """The default exit layers of an encoder of `depth` layers, counted from 1; exit 0 is in front of the embeddings.

    Branches take exits 0 and L, and L/2 in more than six layers. Other methods, and exits that learn when to be taken,
    have the paper's for 12 and 24 layers (Sec. 3.2). Other depths follow the rule that gives 12's: the layers next to
    1/12, 1/3, 1/2 and 1 of the depth.
    """
    if method == "branch" and exit_strategy == "confidence":
        return (0, depth) if depth <= 6 else (0, depth // 2, depth)
    if depth == 24:
        return (1, 6, 12, 24)
    return tuple(sorted({max(1, round(depth * share)) for share in (1 / 12, 1 / 3, 1 / 2, 1)}))


def default_learning_rate(config: Config, task: str | None, method: str) -> float:
    """The paper's rate where it has one (Table 2); else 2e-4 where the hidden size is at most 512, and 5e-5 above."""
    rates = TABLE_2.get((config.model_type, config.hidden_size, config.num_hidden_layers), {})
    if not rates or task not in TABLE_2_TASKS:
        return 2e-4 if config.hidden_size <= SMALL else 5e-5
    of_method = rates.get(method, rates["mm"])  # the trunk of branches is MM's last model
    return of_method[TABLE_2_TASKS.index(task)] / 1e5


def epochs_of(examples: int, batch_size: int) -> int:
    """How many epochs a training on own text takes (.github/results/epochs.md)."""
    return max(EPOCHS, ceil(STEPS / ceil(examples / batch_size)))


def search_rates(config: Config) -> list[float]:
    """The learning rates to choose from: the paper's five (App. A), and larger ones for small models."""
    return [5e-5, 1e-4, 2e-4, 4e-4] if config.hidden_size <= SMALL else [1e-5, 2e-5, 3e-5, 4e-5, 5e-5]


def add_training_options(parser: Parser) -> None:
    """Add what every command that trains takes: the model, and how batches are made and computed."""
    option = parser.add_argument
    option("--model", default="minilm-l6", help=f"{', '.join(REPOSITORIES)}, or a folder (default: minilm-l6)")
    option("--batch-size", type=whole_number(1), help="examples (default: 16, and 8 for a large DeBERTa)")
    option("--max-length", type=whole_number(8), default=256, help="tokens; longer examples are cut (default: 256)")
    counted = "counted from 1, such as 1,4,6,12; 0 is a bag of words before them (default: by depth)"
    option("--exit-layers", type=list_of(whole_number(0)), help=counted)
    add_device_options(parser)


def find_model(
    args: argparse.Namespace, method: str = "sweet", exit_strategy: str = "confidence", end: int | None = None
) -> tuple[Path, Config, list[int]]:
    """The folder of --model, its config, and the exit layers: the method's where --exit-layers is not given.

    `end` is where a trunk ends. --batch-size gets its default. Raises InputError for exits that cannot be.
    """
    folder = model_folder(args.model)
    config = read_config(folder)
    is_large_deberta = config.model_type == "deberta" and config.hidden_size >= 1024
    args.batch_size = args.batch_size or (8 if is_large_deberta else 16)  # App. A
    depth = end or config.num_hidden_layers
    exit_layers = list(args.exit_layers or exit_layers_for(depth, method, exit_strategy))
    if exit_layers != sorted(set(exit_layers)) or not (end or 1) <= exit_layers[-1] <= depth:
        where = f"at layer {end}, as the trunk does" if end else f"at one of the layers 1 to {depth}"
        raise InputError(f"--exit-layers: {','.join(map(str, exit_layers))}, should increase and end {where}")
    if exit_strategy == "lte" and exit_layers[0] == 0:
        raise InputError("--exit-layers: exit 0 cannot learn when to be taken; leave 0 out, or --exit-strategy lte")
    return folder, config, exit_layers
