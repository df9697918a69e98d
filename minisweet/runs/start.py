"""What a training starts from: its options, the model, the data, and run.json as far as it is known."""

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from minisweet.base import devices
from minisweet.base.commands import Parser, list_of, positive_float, whole_number
from minisweet.base.files import LOG, InputError
from minisweet.beyond.ngrams import NgramExit, check_size
from minisweet.checkpoint import read_config
from minisweet.config import Config
from minisweet.data.tasks import TASKS, default_learning_rate, load_examples
from minisweet.data.text import Examples, TokenizedExamples, load_tokenizer, special_ids
from minisweet.exits import EXIT_STRATEGIES, MultiExitModel
from minisweet.methods import METHODS, exit_layers_for
from minisweet.runs.folders import versions
from minisweet.runs.hub import REPOSITORIES, fetch_task, model_folder

STEPS, EPOCHS = 300, 4  # own text is trained on for at least so many of both
MAX_LENGTH = 256  # tokens


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a training learns from, and validates on: here a task's rows. Own text is an `OwnData` (own.py)."""

    task: str
    labels: list[str]  # (C,), what labels are called
    train: Examples
    dev: Examples | None
    metric: str = "accuracy"
    text_columns: list[str] | None = None  # all from here on are own text's
    label_column: str | None = None
    label_type: str = "str"
    trunk: MultiExitModel | None = None  # a finished one
    known_keys: Sequence[int] = ()  # of texts that the trunk has learnt from

    def begin(self, args: argparse.Namespace) -> "Data":
        """Called first: own text may have a trunk, whose labels it takes."""
        return self

    def split(
        self, args: argparse.Namespace, tokenizer: Tokenizer, may_learn: bool
    ) -> tuple[Examples, Examples, TokenizedExamples | None]:
        """The rows to train on; the rows to validate on; and unlabelled texts, where an exit may learn from them."""
        return self.train, self.dev, None


def task_data(name: str, data_dir: Path) -> Data:
    """A task's rows, which are fetched where they are missing."""
    fetch_task(name, data_dir)
    task, (train, dev) = TASKS[name], (load_examples(name, split, data_dir) for split in ("train", "dev"))
    return Data(task=name, labels=list(task.labels), train=train, dev=dev, metric=task.metric)


class Setup(NamedTuple):
    """What a training starts from."""

    args: argparse.Namespace  # the options, with nothing left open
    epochs: int | None  # as the options had them
    data: Data
    folder: Path  # of the model
    layers: list[int]  # the layers that exits stand after, without exit 0
    examples: TokenizedExamples  # to train on
    unlabelled: TokenizedExamples | None  # to learn the trained model's answers
    validation: Examples
    ngrams: NgramExit | None  # exit 0, to be fitted
    device: torch.device
    precision: torch.dtype | None  # to autocast to
    run_json: dict  # as far as it is known before the training


def prepare(args: argparse.Namespace, data: Data) -> Setup:
    """Read what the options name, and choose what they leave open. InputError where it does not fit."""
    data = data.begin(args)
    args.max_length, end = args.max_length or MAX_LENGTH, data.trunk and data.trunk.exit_layers[-1]
    folder, config, exit_layers, batch_size = find_model(args, args.method, end)
    tokenizer = load_tokenizer(folder, config.vocab_size, args.max_length, config.max_tokens)
    if data.train.second is not None and config.type_vocab_size == 1:
        raise InputError(f"{folder}: its type_vocab_size is 1, and pairs, as in {data.task}, need 2")
    may_learn = exit_layers[0] == 0 or (METHODS[args.method].keeps_trunk and len(exit_layers) > 1)
    train, dev, unlabelled = data.split(args, tokenizer, may_learn)
    device = devices.choose_device(args.device)
    precision = devices.choose_precision(args.amp, device, training=True)
    order = np.random.default_rng(args.seed).permutation(len(train.first))
    subset = np.sort(order[: args.train_size])  # with one seed, 500 rows are among the 6,000
    rows, layers = train.take(subset), [n for n in exit_layers if n > 0]
    pairs, ngrams, C = rows.second is not None, None, len(data.labels)
    if exit_layers[0] == 0:
        check_size(config.vocab_size, C, pairs, len(subset) + (len(unlabelled) if unlabelled else 0))
        ngrams = NgramExit(config.vocab_size, C, special_ids(tokenizer), pairs)
    examples = TokenizedExamples(tokenizer, rows)

    # The paper's rates are for GLUE without a finished trunk. With one exit all methods train alike, and take MM's.
    task = None if data.text_columns else data.task
    rates_of = args.method if len(layers) > 1 else "mm"
    count = len(subset) or len(unlabelled or [])
    epochs = epochs_of(count, batch_size) if data.text_columns else TASKS[data.task].epochs
    found = {"batch_size": batch_size, "lr": args.lr or default_learning_rate(config, task, rates_of)}
    found |= {"epochs": args.epochs or epochs, "dev_size": None if data.dev else args.dev_size}
    epochs, args = args.epochs, argparse.Namespace(**vars(args) | found)
    learnt = [*data.known_keys, *examples.keys().tolist(), *(unlabelled.keys().tolist() if unlabelled else [])]
    order = hashlib.sha256(unlabelled.keys().tobytes()).hexdigest() if unlabelled else ""
    run_json = {
        "arguments": json.loads(json.dumps(vars(args), default=str)),  # a path as it is written
        **{name: getattr(data, name) for name in ("task", "labels", "label_type", "metric")},
        **{name: getattr(data, name) for name in ("text_columns", "label_column")},
        "exit_layers": exit_layers,
        "depth": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "device": devices.device_name(device),
        "precision": str(precision or torch.float32),
        "versions": versions(),
        "subset": subset.tolist(),
        "rows_digest": rows.digest() + dev.digest() + order,
        "trained_keys": sorted(set(learnt)),
    }
    is_trained = data.trunk is None or len(layers) > 1
    trained = f"lr {args.lr:g}, epochs {args.epochs}" if is_trained else "no layer is trained: the trunk stays as it is"
    exits = f"exits after layers {','.join(map(str, exit_layers))} of {run_json['depth']}"
    where = f"{exits}, seed {args.seed}, {run_json['device']}, {run_json['precision']}"
    counts = f"{len(subset):,} of {len(order):,} rows to train on, {len(dev.first):,} to validate"
    skipped = f"empty texts, skipped: {data.train.empty:,}; cut to {args.max_length} tokens: {examples.cut:,}"
    for line in (f"method {args.method}, {trained}", f"{args.model}, {data.task}: {where}", counts, skipped):
        LOG.info("%s", line)
    return Setup(args, epochs, data, folder, layers, examples, unlabelled, dev, ngrams, device, precision, run_json)


def epochs_of(examples: int, batch_size: int) -> int:
    """How many epochs a training on own text takes (.github/results/tried.md)."""
    return max(EPOCHS, ceil(STEPS / ceil(max(1, examples) / batch_size)))


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
        advice = "leave 0 out" if args.exit_layers else "add --method branch"
        raise InputError(f"--exit-strategy: lte, and exit 0 learns no such thing; {advice}")
    return folder, config, exit_layers, batch_size


def add_training_options(parser: Parser) -> None:
    """Add what every command that trains takes: the model, and how it is trained and computed."""
    option = parser.add_argument_group("training").add_argument
    option("--model", default="minilm-l6", help=f"{', '.join(REPOSITORIES)}, a folder or a hub id (default: minilm-l6)")
    option("--exit-strategy", choices=EXIT_STRATEGIES, default="confidence", help="or learning-to-exit, lte")
    counted = "counted from 1, such as 1,4,6,12; 0 is exit 0, a bag of words (default: by depth)"
    option("--exit-layers", type=list_of(whole_number(0)), help=counted)
    option("--batch-size", type=whole_number(1), help="examples (default: 16, and 8 for a large DeBERTa)")
    option("--max-length", type=whole_number(8), help="tokens; longer texts are cut (default: 256, or a trunk's)")
    option("--epochs", type=whole_number(1), help="(default: 2; toy 3; own text: by the number of rows)")
    devices.add_device_options(parser)


def add_run_options(parser: Parser) -> None:
    """Add what tells one run of a model from others."""
    option = parser.add_argument_group("run").add_argument
    option("--seed", type=whole_number(0), default=0, help="of the subset, new weights, order, dropout (default: 0)")
    option("--lr", type=positive_float, help="first learning rate (default: the paper's, or by the model's size)")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--resume", action="store_true", help="go on from the checkpoint of a training that was stopped")
    either("--overwrite", action="store_true", help="replace the run, or a stopped training, in --out")
