"""Training, from top to bottom.

    probe          a logistic regression on the frozen embeddings of the labelled rows, from which the exit starts
    fine-tuning    all layers learn the labels
    once more      if more texts are unlabelled than labelled, also what the model answers to them
    bag of words   learns the labels, and what the model answers to unlabelled texts

A trunk, which is a finished classifier, is not trained; only a bag of words is put in front of it.
"""

import hashlib
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from minisweet.base.devices import choose_device, choose_precision, device_name
from minisweet.base.files import LOG, InputError
from minisweet.checkpoint import load_encoder
from minisweet.classifier.bag_of_words import NgramExit, fit_ngrams
from minisweet.classifier.options import CommonOptions, TrainingOptions, name_of, number, option, whole_number
from minisweet.classifier.probe import embed, fit_probe, with_linear_head
from minisweet.classifier.rows import LabelType, joined
from minisweet.classifier.run import Record, versions, weights_id
from minisweet.classifier.split import Split, class_numbers, classes_of, split_rows, warn_of_near_duplicates
from minisweet.classifier.state import FitRecord, Trained, in_groups
from minisweet.classifier.training import fine_tune, run_all
from minisweet.classifier.trunk import Trunk, load_trunk
from minisweet.config import Config
from minisweet.defaults import default_batch_size, default_epochs, default_learning_rate
from minisweet.exits import MultiExitModel
from minisweet.hub import model_folder
from minisweet.loading import WEIGHTS, read_config
from minisweet.texts import Examples, Texts, load_tokenizer, special_ids

EPOCHS, STEPS = 4, 200  # the least epochs and steps of fine-tuning (tried.md)
# Self-training, if more texts are unlabelled than labelled: the maximum number of unlabelled texts, and the epochs.
MOST_AGAIN, EPOCHS_AGAIN = 5000, 2


@dataclass(frozen=True, kw_only=True)
class FitOptions(CommonOptions):
    """The options of minisweet fit."""

    trunk: str | None = option(None, name_of, "run or classifier to start from; it is not trained")
    dev_size: float = option(0.2, number(0.0001, 0.9999), "share of the labelled texts, or groups, that is set aside")
    max_length: int | None = option(None, whole_number(8), "tokens; longer texts are cut (default: 256, or a trunk's)")


class Given(NamedTuple):
    """The data of a training, as it came in."""

    name: str  # for the record
    rows: Examples  # to learn from, with or without labels; some are set aside to validate on
    validation: Examples | None  # rows to validate on in their place
    unlabelled: Examples | None  # more rows without labels
    label_type: LabelType = "str"  # of the labels in Python
    text_column: str = "text"  # of the file of `rows`, like the next two
    label_column: str | None = None
    group_column: str | None = None


class Source(NamedTuple):
    """What the training starts from, and the options that follow from it."""

    options: FitOptions
    folder: Path
    config: Config
    trunk: Trunk | None
    tokenizer: Tokenizer
    lr: float
    batch_size: int
    max_length: int
    device: torch.device
    precision: torch.dtype | None  # to train in


def train(options: FitOptions, given: Given) -> Trained:
    """Train on your own text: a model, and a bag of words in front of it.

    Raises InputError if model, data and options do not fit, or training diverges.
    """
    source = start_from(options)
    split = split_data(given, source)
    trunk = source.trunk
    model = trunk.model if trunk else with_linear_head(load_encoder(source.folder, pooling="mean"), len(split.labels))
    embeddings = model.encoder.word_embeddings.weight.detach().clone()  # (V, D), before they are trained
    record, about = start_record(given, source, split)
    started = time.perf_counter()
    if trunk:
        LOG.info("no layer is trained: the trunk stays as it is")
    else:
        record.losses.update(train_model(model, split, source))
    bag = train_bag(model, split, embeddings, source)
    seconds = round(time.perf_counter() - started, 1)
    LOG.info("trained in %.0f s", seconds)
    record = replace(record, id=weights_id(model), seconds=seconds)
    return Trained(record, about, model.eval(), bag, source.tokenizer, split.validation.examples)


def start_from(options: FitOptions) -> Source:
    """Find public weights or a trunk, and fill in what depends on them.

    Raises InputError if `max_length` is not the trunk's, or too long for the model.
    """
    trunk = load_trunk(Path(options.trunk)) if options.trunk else None
    folder = Path(options.trunk) if options.trunk else model_folder(options.model)
    config = read_config(folder, "cls" if options.trunk else "mean")
    length = trunk.max_length if trunk else None
    if options.max_length and length and options.max_length != length:  # the keys of cut texts would change
        raise InputError(f"{options.max_length}, should be {length}, as of the trunk {options.trunk}", "max_length")
    max_length = options.max_length or length or min(TrainingOptions.max_length, config.max_tokens)
    tokenizer = load_tokenizer(folder, config.vocab_size, max_length, config.max_tokens)
    lr = options.lr or default_learning_rate(config)
    batch_size = options.batch_size or default_batch_size(config)
    device = choose_device(options.device)
    precision = choose_precision(options.amp, device, training=True)
    return Source(options, folder, config, trunk, tokenizer, lr, batch_size, max_length, device, precision)


def split_data(given: Given, source: Source) -> Split:
    """Tokenise and split the rows, and log warnings about them."""
    parts = [part for part in (given.rows, given.unlabelled, given.validation) if part]
    labels = source.trunk.labels if source.trunk else classes_of(given.rows.names or [])
    if not labels:
        raise InputError(f"{given.name}: no row has a label")
    examples = joined(*parts)
    count = len(given.validation.first) if given.validation else 0
    numbers = class_numbers(examples.names or [], labels, source.options.trunk)
    texts = Texts(source.tokenizer, examples._replace(labels=numbers.tolist()))
    split = split_rows(given.name, texts, labels, count, source.options.dev_size)
    if given.unlabelled and given.unlabelled.first and not len(split.unlabelled):
        raise InputError("no text is left: all of them are also labelled, or set aside", "unlabelled")
    if not examples.groups:  # whoever names groups knows what belongs together
        warn_of_near_duplicates(split.validation, texts.take(split.learning))
    LOG.info("%s: %d rows to train on, %d to validate", given.name, len(split.labelled), len(split.validation))
    if examples.empty:
        LOG.warning("empty texts, skipped: %d", examples.empty)
    LOG.info("texts cut to %d tokens: %d", source.max_length, texts.is_cut[split.learning].sum())
    return split


def start_record(given: Given, source: Source, split: Split) -> tuple[Record, FitRecord]:
    """The record of the training, as known before it starts."""
    options, trunk, texts, depth = source.options, source.trunk, split.texts, source.config.num_hidden_layers
    groups, validated = (
        {group for group in texts.examples.take(rows).groups or () if group}
        for rows in (split.learning, split.validating)
    )
    trained_keys, trained_groups = (trunk.trained_keys, trunk.trained_groups) if trunk else ((), ())
    in_trained_group = texts.keys[in_groups(texts.examples, trained_groups)]  # of a trunk's groups: these never judge
    about = FitRecord(
        head=trunk.head if trunk else "linear",
        label_type=trunk.label_type if trunk else given.label_type,
        label_column=given.label_column,
        group_column=given.group_column,
        set_aside=1.0 if given.validation else options.dev_size,
        trunk=options.trunk,
        dev_size=options.dev_size,
        training_groups=sorted({*trained_groups, *groups}),
        validation_groups=sorted(validated - groups),
    )
    common = {item.name: getattr(options, item.name) for item in fields(CommonOptions)}
    arguments = TrainingOptions(
        **common | {"model": options.trunk or options.model, "lr": source.lr, "batch_size": source.batch_size},
        exit_layers=[depth],
        pooling=trunk.model.encoder.config.pooling if trunk else "mean",
        train_size=len(split.labelled) or len(split.unlabelled),
        max_length=source.max_length,
    )
    record = Record(
        arguments=arguments,
        task=given.name,
        labels=list(split.labels),
        metric="accuracy",
        text_columns=[given.text_column],
        exit_layers=[depth],
        depth=depth,
        vocab_size=source.config.vocab_size,
        subset=split.labelled.tolist(),
        weights=hashlib.sha256((source.folder / WEIGHTS).read_bytes()).hexdigest(),
        trained_keys=sorted({*trained_keys, *in_trained_group.tolist(), *texts.keys[split.learning].tolist()}),
        device=device_name(source.device),
        precision=str(source.precision or torch.float32),
        versions=versions(),
        fit=asdict(about),
    )
    return record, about


def train_model(model: MultiExitModel, split: Split, source: Source) -> dict[str, list]:
    """The probe, then all layers; and once more if more texts are unlabelled than labelled. Returns the losses."""
    options, labelled = source.options, split.texts.take(split.labelled)
    epochs = options.epochs or default_epochs(EPOCHS, STEPS, len(labelled), source.batch_size)
    vectors = embed(model.encoder.eval().to(source.device), labelled)
    fit_probe(model.cpu().heads[0], vectors, torch.from_numpy(labelled.labels))
    losses = {"fine-tuning": tune(model, labelled, labelled.labels, epochs, source, "fine-tuning")}
    if len(labelled) < len(split.unlabelled):
        again = np.sort(np.random.default_rng(0).permutation(split.unlabelled)[:MOST_AGAIN])
        answers = answers_of(source, model, split.texts.take(again))
        known = split.texts.take(np.concatenate([split.labelled, again]))
        title = "learning from its own answers"
        targets = with_answers(known, answers)
        losses[title] = tune(model, known, targets, options.epochs or EPOCHS_AGAIN, source, title)
    return losses


def tune(model: MultiExitModel, texts: Texts, targets: np.ndarray, epochs: int, source: Source, title: str) -> list:
    """Train all layers. Returns the losses of each step."""
    where, precision = device_name(source.device), source.precision
    LOG.info("%s: %d epochs, lr %g, %s, %s", title, epochs, source.lr, where, precision or torch.float32)
    settings = epochs, source.batch_size, source.lr, source.options.seed, source.device, precision
    losses = fine_tune(model, texts, targets, *settings, title=title)
    return np.round(losses, 5).tolist()


def answers_of(source: Source, model: MultiExitModel, texts: Texts) -> Tensor:
    """The probabilities (N, C) that a model gives for N texts."""
    model.eval().to(source.device)
    precision = choose_precision(source.options.amp, source.device)  # as in evaluation: float32 on a CPU
    logits = run_all(
        lambda *inputs: model(*inputs)[0].logits, texts, source.device, precision, title="unlabelled texts"
    )
    model.cpu()
    return logits.softmax(-1)


def train_bag(model: MultiExitModel, split: Split, embeddings: Tensor, source: Source) -> NgramExit:
    """A bag of words that learns the labels, and the model's answers to texts without one."""
    learned = split.texts.take(split.learning)
    targets = learned.labels
    if len(split.unlabelled):
        targets = with_answers(learned, answers_of(source, model, split.texts.take(split.unlabelled)))
    bag = NgramExit(source.config.vocab_size, len(split.labels), special_ids(source.tokenizer))
    chunks = np.array_split(np.arange(len(learned)), -(-len(learned) // 256))
    batches = [learned.batch(rows).inputs[:2] for rows in chunks]
    fit_ngrams(bag, batches, torch.from_numpy(targets), embeddings)
    return bag


def with_answers(texts: Texts, answers: Tensor) -> np.ndarray:
    """The targets (N, C) of labelled texts, then unlabelled ones: the labels, and the `answers` (n, C) of a model."""
    labels = np.eye(answers.shape[1], dtype=np.float32)[texts.labels[: len(texts) - len(answers)]]
    return np.concatenate([labels, answers.numpy()])
