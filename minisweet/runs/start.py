"""What a training starts from: its options, the model, the data, and the record of the run to come."""

import argparse
import json
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from minisweet.base import devices
from minisweet.base.commands import Parser, list_of, positive_float, whole_number
from minisweet.base.files import LOG, InputError, preview
from minisweet.beyond.ngrams import NgramExit, check_size
from minisweet.checkpoint import read_config
from minisweet.config import Config
from minisweet.data.own import ENOUGH_JUDGES, stratified_split
from minisweet.data.tasks import TASKS, default_learning_rate
from minisweet.data.text import Examples, TokenizedExamples, load_tokenizer, special_ids
from minisweet.exits import EXIT_STRATEGIES, MultiExitModel
from minisweet.methods import METHODS, exit_layers_for
from minisweet.runs.folders import is_run, load_trunk, read_record, versions
from minisweet.runs.hub import REPOSITORIES, model_folder

STEPS, EPOCHS = 300, 4  # own text is trained on for at least so many of both
MAX_LENGTH = 256  # tokens
MOST_JUDGES, JUDGES = 2000, 5  # at most so many unlabelled texts judge, and one of so many


class Data(NamedTuple):
    """What a training learns from, and validates on."""

    task: str
    labels: list[str]  # (C,), what labels are called
    train: Examples  # a row whose label is -1 is unlabelled
    dev: Examples | None = None  # None: a share of `train` is set aside
    unlabelled: Examples | None = None
    metric: str = "accuracy"
    text_columns: list[str] | None = None  # of own text
    label_column: str | None = None
    label_type: str = "str"


class Setup(NamedTuple):
    """What a training starts from."""

    args: argparse.Namespace  # the options, with nothing left open
    folder: Path  # of the model
    layers: list[int]  # the layers that exits stand after, without exit 0
    trunk: MultiExitModel | None  # a finished one
    examples: TokenizedExamples  # to train on
    unlabelled: TokenizedExamples | None  # for exit 0
    validation: Examples
    ngrams: NgramExit | None  # exit 0, to be fitted
    device: torch.device
    precision: torch.dtype | None  # to autocast to
    record: dict  # of run.json, as far as it is known before the training


def prepare(args: argparse.Namespace, data: Data) -> Setup:
    """Read what the options name, and choose what they leave open. InputError where it does not fit."""
    trunk, known = None, []
    if args.trunk:
        trunk, labels = load_trunk(args.trunk)
        before = read_record(args.trunk) if is_run(args.trunk) else None
        if len(data.labels) < len(labels):  # the others are of the trunk's type
            data = data._replace(label_type=before.label_type if before else "str")
        data = with_labels_of(data, labels, args.trunk)
        args.model = f"./{args.trunk}" if str(args.trunk) in REPOSITORIES else str(args.trunk)  # a folder, not a preset
        if before:
            args.max_length, known = args.max_length or before.max_length, before.trained_keys
    args.max_length = args.max_length or MAX_LENGTH
    end = trunk.exit_layers[-1] if trunk else None
    if trunk and METHODS[args.method].keeps_trunk and args.exit_strategy == "lte" and trunk.heads[0].lte is None:
        raise InputError(f"--exit-strategy: lte, and {args.trunk} stays as it is and has not learned when it is right")
    folder, config, exit_layers, batch_size = find_model(args, args.method, end)
    tokenizer = load_tokenizer(folder, config.vocab_size, args.max_length, config.max_tokens)
    if data.train.second is not None and config.type_vocab_size == 1:
        raise InputError(f"{folder}: its type_vocab_size is 1, and pairs, as in {data.task}, need 2")
    train, dev, unlabelled = set_aside(args, data, tokenizer)
    device = devices.choose_device(args.device)
    precision = devices.choose_precision(args.amp, device, training=True)
    order = np.random.default_rng(args.seed).permutation(len(train.first))
    subset = np.sort(order[: args.train_size])  # with one seed, 500 rows are among the 6,000
    rows, layers = train.take(subset), [n for n in exit_layers if n > 0]
    pairs, ngrams, C = rows.second is not None, None, len(data.labels)
    if exit_layers[0] == 0:
        check_size(config.vocab_size, C, pairs, len(subset) + (len(unlabelled) if unlabelled else 0))
        ngrams = NgramExit(config.vocab_size, C, special_ids(tokenizer), pairs)
    elif data.unlabelled:
        raise InputError(f"--unlabelled: exit 0 learns from it, and --exit-layers is {','.join(map(str, exit_layers))}")
    else:  # rows without a label may judge, and teach nobody
        unlabelled = None
    examples = TokenizedExamples(tokenizer, rows)

    # The paper's rates are for GLUE without a finished trunk. With one exit all methods train alike, and take MM's.
    task = None if data.text_columns or args.trunk else data.task
    rates_of = args.method if len(layers) > 1 else "mm"
    epochs = epochs_of(len(subset), batch_size) if data.text_columns else TASKS[data.task].epochs
    found = {"batch_size": batch_size, "lr": args.lr or default_learning_rate(config, task, rates_of)}
    found |= {"epochs": args.epochs or epochs, "dev_size": None if data.dev else args.dev_size}
    args = argparse.Namespace(**vars(args) | found)
    learnt = [*known, *examples.keys().tolist(), *(unlabelled.keys().tolist() if unlabelled else [])]
    record = {
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
        "rows_digest": rows.digest() + dev.digest(),
        "trained_keys": sorted(set(learnt)),
    }
    is_trained = trunk is None or len(layers) > 1
    trained = f"lr {args.lr:g}, epochs {args.epochs}" if is_trained else "no layer is trained: the trunk stays as it is"
    exits = f"exits after layers {','.join(map(str, exit_layers))} of {record['depth']}"
    where = f"{exits}, seed {args.seed}, {record['device']}, {record['precision']}"
    counts = f"{len(subset):,} of {len(order):,} rows to train on, {len(dev.first):,} to validate"
    skipped = f"empty texts, skipped: {data.train.empty:,}; cut to {args.max_length} tokens: {examples.cut:,}"
    for line in (f"method {args.method}, {trained}", f"{args.model}, {data.task}: {where}", counts, skipped):
        LOG.info("%s", line)
    return Setup(args, folder, layers, trunk, examples, unlabelled, dev, ngrams, device, precision, record)


def with_labels_of(data: Data, labels: Sequence[str], trunk: Path) -> Data:
    """The data with a trunk's classes, in its order. Raises InputError for a label that the trunk does not know."""
    if others := [name for name in data.labels if name not in labels]:
        raise InputError(f"--trunk: {trunk} does not know the label {others[0]!r:.60}; its labels: {preview(labels)}")
    numbers = [labels.index(name) for name in data.labels] + [-1]  # the last is that of -1

    def renamed(rows: Examples | None) -> Examples | None:
        return rows and rows.labels and rows._replace(labels=[numbers[label] for label in rows.labels]) or rows

    return data._replace(labels=list(labels), train=renamed(data.train), dev=renamed(data.dev))


def set_aside(
    args: argparse.Namespace, data: Data, tokenizer: Tokenizer
) -> tuple[Examples, Examples, TokenizedExamples | None]:
    """The labelled rows to train on; those to validate on; and the tokens of unlabelled texts for exit 0, if any.

    Texts of the same tokens are one text, and stay on one side. An unlabelled text that is also labelled is left out.
    Where too few labelled texts would judge what is deployed, a fifth of the unlabelled ones is set aside for it.
    """
    if data.text_columns is None:  # a task
        return data.train, data.dev, None
    labels = np.array(data.train.labels, dtype=int)
    rows, dev = data.train.take(np.flatnonzero(labels >= 0)), data.dev
    extra = [data.train.take(np.flatnonzero(labels < 0)), *([data.unlabelled] if data.unlabelled else [])]
    second = None if rows.second is None else sum((more.second for more in extra), [])
    texts = Examples(sum((more.first for more in extra), []), second, None)
    if not rows.first and not (args.trunk and texts.first):
        raise InputError(f"{data.task}: no row has a label")
    keys = TokenizedExamples(tokenizer, rows).keys()
    train, of_dev = rows, TokenizedExamples(tokenizer, dev).keys() if dev else keys[:0]
    if dev is None and rows.first:
        if len(set(rows.labels)) < 2:
            only = data.labels[rows.labels[0]]
            raise InputError(f"{data.task}: all rows have the label {only!r:.60}, needs two or more")
        kept, aside = stratified_split(rows.labels, args.dev_size, 0, keys.tolist())
        if not aside:
            raise InputError(f"{data.task}: no row can be set aside: no label has two different texts")
        train, dev, of_dev = rows.take(kept), rows.take(aside), keys[aside]
    dev = dev or rows
    if lacking := [data.labels[n] for n in sorted(set(rows.labels) - set(dev.labels))]:
        LOG.warning("no row to validate on has the label %s", preview(lacking))
    if not texts.first:
        return train, dev, None
    tokens = TokenizedExamples(tokenizer, texts)
    distinct, first = np.unique(tokens.keys(), return_index=True)
    new = np.sort(first[~np.isin(distinct, np.concatenate([keys, of_dev]))])
    if not len(new) and data.unlabelled:
        raise InputError("--unlabelled: no text is left: all of them are also labelled, or set aside")
    new = np.random.default_rng(0).permutation(new)
    judges, labelled = min(MOST_JUDGES, len(new) // JUDGES), len(set(of_dev.tolist()))
    if labelled >= min(judges, ENOUGH_JUDGES * 4 // 3):  # three quarters of both would judge
        judges = 0
    if judges:
        some = texts.take(new[:judges])
        second = None if second is None else dev.second + some.second
        dev = Examples(dev.first + some.first, second, dev.labels + [-1] * judges)
    if not dev.first:
        raise InputError(f"{data.task}: too few texts to choose and to judge on: one in {JUDGES} of {len(new)}")
    counts = [f"{n:,}" for n in (len(new) - judges, judges, len(texts.first) - len(new))]
    LOG.info("unlabelled texts: %s for exit 0, %s to judge; left out, labelled too or there twice: %s", *counts)
    return train, dev, tokens.take(np.sort(new[judges:]))


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
        wanted = "leave 0 out" if args.exit_layers else "add --method branch"
        raise InputError(f"--exit-strategy: lte, and exit 0 learns no such thing; {wanted}")
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
