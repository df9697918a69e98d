"""What a training starts from: what train.py's options name, the model, the data, and the record of the run to come."""

import argparse
from math import ceil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from minisweet.base import devices
from minisweet.base.commands import Parser, list_of, whole_number
from minisweet.base.files import InputError
from minisweet.checkpoint import read_config
from minisweet.config import Config
from minisweet.data.rows import Examples
from minisweet.data.tasks import TASKS, digest, load_data
from minisweet.data.text import TokenizedExamples, load_tokenizer, special_ids
from minisweet.exits import MultiExitModel
from minisweet.methods import METHODS
from minisweet.ngrams import NgramExit, check_size
from minisweet.runs.folders import is_run, load_trunk, read_record, versions
from minisweet.runs.hub import REPOSITORIES, model_folder

# Table 2, in 1e-5: what gave the largest area under the speed-accuracy curve, by model type, hidden size and depth.
TABLE_2_TASKS = ("sst2", "mrpc", "cola", "mnli", "qqp", "qnli", "rte")
TABLE_2 = {
    ("bert", 768, 12): {"ee": (5, 5, 4, 5, 5, 5, 5), "mm": (5, 3, 4, 5, 5, 4, 5), "sweet": (5, 4, 5, 5, 5, 5, 4)},
    ("bert", 1024, 24): {"ee": (4, 4, 4, 4, 5, 4, 3), "mm": (2, 5, 3, 3, 3, 4, 3), "sweet": (2, 4, 4, 4, 4, 3, 3)},
    ("deberta", 768, 12): {"ee": (3, 4, 4, 2, 4, 3, 2), "mm": (3, 5, 5, 4, 5, 4, 1), "sweet": (3, 5, 4, 3, 5, 3, 4)},
    ("deberta", 1024, 24): {"ee": (2, 3, 3, 2, 2, 3, 1), "mm": (4, 2, 3, 2, 2, 2, 2), "sweet": (3, 1, 2, 2, 3, 1, 2)},
}
STEPS, EPOCHS = 300, 4  # own text is trained on for at least so many of both
MAX_LENGTH = 256  # tokens
SMALL = 512  # up to this hidden size a model needs larger rates, as MiniLM with its 384 does


class TrainingSetup(NamedTuple):
    """What a training starts from."""

    args: argparse.Namespace  # train.py's options, with nothing left open
    folder: Path  # of the model
    layers: list[int]  # the layers that exits stand after, without exit 0
    trunk: MultiExitModel | None
    examples: TokenizedExamples  # to train on
    validation: Examples
    exit_0: NgramExit | None  # to be fitted
    device: torch.device
    precision: torch.dtype | None  # to autocast to
    record: dict  # of run.json, as far as it is known before the training
    notes: list[str]  # for the user, a line each


def find_start(args: argparse.Namespace) -> TrainingSetup:
    """Fetch and read what the options name, and choose what they leave open. InputError where it does not fit."""
    trunk, labels = load_trunk(args.trunk) if args.trunk else (None, None)
    end = trunk.exit_layers[-1] if trunk else None
    if trunk and METHODS[args.method].keeps_start and args.exit_strategy == "lte" and trunk.heads[0].lte is None:
        wanted = "a trunk that was trained with it, since it stays as it is; or another --method"
        raise InputError(f"--exit-strategy: lte, and {args.trunk} has not learned when it is right; should be {wanted}")
    folder, config, exit_layers, batch_size = find_model(args, args.method, end)
    tokenizer = load_tokenizer(folder, config.vocab_size, args.max_length, config.max_tokens)
    train, dev, of_data = load_data(args, tokenizer, labels, need_labels=trunk is None or args.targets != "trunk")
    if train.second is not None and config.type_vocab_size == 1:
        raise InputError(f"{folder}: its type_vocab_size is 1, and pairs, as in {args.task}, need 2")
    device = devices.choose_device(args.device)
    precision = devices.choose_precision(args.amp, device, training=True)
    order = np.random.default_rng(args.seed).permutation(len(train.first))
    subset = np.sort(order[: args.train_size])  # with one seed, 500 rows are among the 6,000
    rows, labels, layers = train.take(subset), of_data["labels"], [n for n in exit_layers if n > 0]
    pairs, exit_0 = rows.second is not None, None
    if exit_layers[0] == 0:
        check_size(config.vocab_size, len(labels), pairs, len(subset))
        exit_0 = NgramExit(config.vocab_size, len(labels), special_ids(tokenizer), pairs)
    examples = TokenizedExamples(tokenizer, rows)

    known, is_trunk_known = [], trunk is None  # the keys of the trunk's texts; of one that cuts elsewhere they differ
    if trunk and is_run(args.trunk) and (before := read_record(args.trunk)).max_length == args.max_length:
        known, is_trunk_known = before.train_tokens or [], before.knows_all_texts
    # The paper's rates are for GLUE without a trunk. With one exit all methods train alike, and take MM's rate.
    task = None if args.data or args.trunk else args.task
    rates_of = args.method if len(layers) > 1 else "mm"
    found = {"batch_size": batch_size, "lr": args.lr or default_learning_rate(config, task, rates_of)}
    by_size = epochs_of(len(subset), batch_size) if args.data else TASKS[args.task].epochs
    args = argparse.Namespace(**vars(args) | found | {"epochs": args.epochs or by_size})
    record = {
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        **of_data,
        "exit_layers": exit_layers,
        "depth": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "device": devices.device_name(device),
        "precision": str(precision or torch.float32),
        "versions": versions(),
        "subset": subset.tolist(),
        "train_digest": digest(rows),
        "train_tokens": sorted({*known, *examples.keys().tolist()}),
        "is_trunk_known": is_trunk_known,
    }
    is_trained = trunk is None or len(layers) > 1
    trained = f"lr {args.lr:g}, epochs {args.epochs}" if is_trained else "no layer is trained: the trunk stays as it is"
    exits = f"exits after layers {','.join(map(str, exit_layers))} of {record['depth']}"
    notes = [
        f"method {args.method}, {trained}",
        f"{args.model}, {args.task}: {exits}, seed {args.seed}, {record['device']}, {record['precision']}",
        f"{len(subset):,} of {len(order):,} rows to train, {len(dev.first):,} to validate",
        f"empty texts, skipped: {train.empty + dev.empty:,}; cut to {args.max_length} tokens: {examples.cut:,}",
    ]
    return TrainingSetup(args, folder, layers, trunk, examples, dev, exit_0, device, precision, record, notes)


def exit_layers_for(depth: int, method: str = "sweet", exit_strategy: str = "confidence") -> tuple[int, ...]:
    """The default exit layers of an encoder of `depth` layers, counted from 1; 0 is exit 0."""
    row = METHODS[method]
    if exit_strategy == "lte" and row.has_exit_0 and row.exits_between:  # exit 0 learns no such thing
        row = METHODS["sweet"]
    between = row.exits_between(depth) if row.exits_between else []
    return tuple(sorted({*between, depth} | ({0} if row.has_exit_0 else set())))


def default_learning_rate(config: Config, task: str | None, method: str) -> float:
    """The paper's rate where it has one (Table 2), else 5e-5. Where the hidden size is at most 512 it is 2e-4, and 1e-4
    where the task is None: own text, and a trunk (.github/results/tried.md).
    """
    rates = TABLE_2.get((config.model_type, config.hidden_size, config.num_hidden_layers), {})
    if not rates or task not in TABLE_2_TASKS:
        small = 1e-4 if task is None else 2e-4
        return small if config.hidden_size <= SMALL else 5e-5
    of_method = rates.get(method, rates["mm"])  # the trunk of branches is MM's last model
    return of_method[TABLE_2_TASKS.index(task)] / 1e5


def epochs_of(examples: int, batch_size: int) -> int:
    """How many epochs a training on own text takes (.github/results/tried.md)."""
    return max(EPOCHS, ceil(STEPS / ceil(examples / batch_size)))


def search_rates(config: Config) -> list[float]:
    """The learning rates to choose from: the paper's five (App. A), and larger ones for small models."""
    return [5e-5, 1e-4, 2e-4, 4e-4] if config.hidden_size <= SMALL else [1e-5, 2e-5, 3e-5, 4e-5, 5e-5]


def add_training_options(parser: Parser) -> None:
    """Add what every command that trains takes: the model, and how batches are made and computed."""
    option = parser.add_argument
    option("--model", default="minilm-l6", help=f"{', '.join(REPOSITORIES)}, or a folder (default: minilm-l6)")
    option("--batch-size", type=whole_number(1), help="examples (default: 16, and 8 for a large DeBERTa)")
    option(
        "--max-length",
        type=whole_number(8),
        default=MAX_LENGTH,
        help="tokens; longer examples are cut (default: 256, or the trunk's)",
    )
    counted = "counted from 1, such as 1,4,6,12; 0 is exit 0, a bag of words (default: by depth)"
    option("--exit-layers", type=list_of(whole_number(0)), help=counted)
    devices.add_device_options(parser)


def find_model(args: argparse.Namespace, method: str, end: int | None = None) -> tuple[Path, Config, list[int], int]:
    """The folder of --model, its config, the exit layers and the batch size: the defaults where none is given.

    `end` is where a trunk ends. Raises InputError for exits that cannot be.
    """
    folder = model_folder(args.model)
    config = read_config(folder)
    is_large_deberta = config.model_type == "deberta" and config.hidden_size >= 1024
    batch_size = args.batch_size or (8 if is_large_deberta else 16)  # App. A
    depth = end or config.num_hidden_layers
    exit_layers = list(args.exit_layers or exit_layers_for(depth, method, args.exit_strategy))
    wanted = f"--exit-layers: {','.join(map(str, exit_layers))}"
    if exit_layers != sorted(set(exit_layers)) or not (end or 1) <= exit_layers[-1] <= depth:
        where = f"at layer {end}, as the trunk does" if end else f"at one of the layers 1 to {depth}"
        raise InputError(f"{wanted}, should increase and end {where}")
    if METHODS[method].exits_between is None and any(exit_layers[:-1]):
        raise InputError(f"{wanted}, and the method {method} has exits 0 and {depth} alone; add --method branch")
    if args.exit_strategy == "lte" and exit_layers[0] == 0:
        wanted = "leave 0 out" if args.exit_layers else "add --method branch"
        raise InputError(f"--exit-strategy: lte, and exit 0 learns no such thing; {wanted}")
    return folder, config, exit_layers, batch_size
