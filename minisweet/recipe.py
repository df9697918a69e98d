"""A training from its first stage to the run that it makes: what train.py, `minisweet fit` and Python's `fit` call.

    with claim_output(out) as saved:       # no other training writes there
        train_task(options, "rte", data_dir, saved)

Read `train`: the trunk, what it learns of texts without labels, the exits, exit 0, the run.

Dimension letters: N texts, K exits, C classes, V words, D hidden size.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from minisweet.base import devices
from minisweet.base.commands import progress
from minisweet.base.files import LOG, InputError, preview
from minisweet.classifier.bag_of_words import NgramExit, check_size, fit_ngrams
from minisweet.classifier.teacher import embed, regress, taught
from minisweet.checkpoint import WEIGHTS, read_config
from minisweet.config import Config
from minisweet.classifier.split import own_data
from minisweet.classifier.rows import Rows
from minisweet.tasks import task_data
from minisweet.texts import Data, Examples, Texts, load_tokenizer, special_ids
from minisweet.exits import ExitModel, MultiExitModel
from minisweet.methods import METHODS, Stage, add_exits, new_trunk
from minisweet.outputs import ask_all
from minisweet.hub import REPOSITORIES, fetch_task, model_folder
from minisweet.options import MAX_LENGTH, TrainingOptions, epochs_of, resolve
from minisweet.record import Record, versions
from minisweet.resume import SavedTraining
from minisweet.run import Run, load_trunk
from minisweet.training import fine_tune, used_rows

# Where more texts have no label, a plain model learns answers to them too: to at most so many, for so many epochs.
MOST_AGAIN, EPOCHS_AGAIN = 5000, 2
TIMED = 64  # unlabelled texts, to tell how long all of them will take


class Start(NamedTuple):
    """What a training starts from."""

    options: TrainingOptions  # with nothing left open but own text's epochs
    folder: Path  # of the model
    config: Config
    tokenizer: Tokenizer
    device: torch.device
    precision: torch.dtype | None  # to autocast to
    trunk: MultiExitModel | None  # a finished one
    trunk_classes: tuple[str, list[str], str] | None  # its name, classes and their type
    known_keys: Sequence[int]  # of texts that it has learnt from
    weigh: Callable[[np.ndarray], np.ndarray] = np.asarray  # what weights of classes make of targets; here nothing


def begin(options: TrainingOptions, task: str | None = None) -> Start:
    """Find the model, load a trunk, and choose what the options leave open; `task` is None for own text."""
    trunk, labels, before = None, [], None
    if options.trunk:
        trunk, labels, before = load_trunk(Path(options.trunk))
        length = before and before.arguments.max_length
        if options.max_length and length and options.max_length != length:  # keys of cut texts are no longer the same
            raise InputError(f"{options.max_length}, should be {length}, as of the trunk {options.trunk}", "max_length")
        name = f"./{options.trunk}" if options.trunk in REPOSITORIES else options.trunk  # a folder, not a preset
        options = replace(options, model=name, max_length=options.max_length or length)
    options = replace(options, max_length=options.max_length or MAX_LENGTH)
    folder = model_folder(options.model)
    config = read_config(folder)
    options = resolve(options, config, task, trunk and trunk.exit_layers[-1])
    device = devices.choose_device(options.device)
    return Start(
        options,
        folder,
        config,
        load_tokenizer(folder, config.vocab_size, options.max_length, config.max_tokens),
        device,
        devices.choose_precision(options.amp, device, training=True),
        trunk,
        trunk and (options.trunk, labels, before.label_type if before else "str"),
        before.trained_keys if before else (),
    )


def train_task(options: TrainingOptions, task: str, data_dir: Path, saved: SavedTraining) -> Run | None:
    """Train on a task's rows, which are fetched where they are missing. None where the run was finished before."""
    fetch_task(task, data_dir)
    start = begin(options, task)
    return train(start, task_data(task, data_dir, start.tokenizer, options.train_size, options.seed), saved)


def train_own(
    options: TrainingOptions, name: str, rows: Rows, dev: Rows | None, unlabelled: Examples | None, saved: SavedTraining
) -> Run | None:
    """Train on own text; see `own_data`. None where the run was finished before."""
    start = begin(options)
    exits, keeps_trunk = start.options.exit_layers, METHODS[options.method].keeps_trunk
    may_learn = exits[0] == 0 or (keeps_trunk and len(exits) > 1)
    more = start.tokenizer, options.dev_size, may_learn, start.trunk_classes
    data = own_data(name, rows, dev, unlabelled, *more)
    if options.class_weights:
        start = start._replace(weigh=partial(weighted, weights_of(options.class_weights, data.labels)))
    return train(start, data, saved)


def train(start: Start, data: Data, saved: SavedTraining) -> Run | None:
    """Train a model, and write its run where `saved` says. None where it is there.

    Raises InputError where model and data do not fit, or the loss is not finite.
    """
    options, method, learn, others = start.options, METHODS[start.options.method], data.train, data.unlabelled
    layers, C, is_new = [n for n in options.exit_layers if n > 0], len(data.labels), start.trunk is None
    ngrams = new_exit_0(start, data) if options.exit_layers[0] == 0 else None
    torch.manual_seed(options.seed)
    trunk = start.trunk or new_trunk(start.folder, layers[-1], C, options.exit_strategy)
    embeddings = trunk.encoder.word_embeddings.weight.detach().clone()  # (V, D), before they are trained
    record = new_record(start, data)
    if saved.begin(record.training()):
        return None
    try:
        # 1. The trunk, a model with one exit: where branches or exit 0 alone are put on it, it is trained before.
        if is_new and method.keeps_trunk:
            more = others.take(some_of(len(others))) if others and len(learn) < len(others) else None
            second = more and saved.once("second answers", lambda: second_answers(start, trunk, learn, more))
            train_stage(start, saved, Stage("trunk", trunk), learn)
            if more:
                # It learns the labels again, and what it and its embeddings say of the others (teacher.py).
                answered = with_answers(start, saved, learn, "first answers", trunk, more, second)
                train_stage(start, saved, Stage("trunk again", trunk), answered, EPOCHS_AGAIN)
        elif others and not len(learn):  # no row is labelled: all exits learn what the trunk says
            learn, others = with_answers(start, saved, learn, "unlabelled", trunk, others), None

        # 2. The exits of the method. On a trunk that stays as it is they also learn its answers.
        torch.manual_seed(options.seed)  # so that new weights do not depend on where the trunk is from
        model = add_exits(options.method, trunk, layers, options.exit_strategy)
        if others and method.keeps_trunk:
            learn, others = with_answers(start, saved, learn, "unlabelled", model, others), None
        for stage in method.stages(model, is_new):
            train_stage(start, saved, stage, learn)
    except FloatingPointError as error:
        step = error.args[0]
        saved.finish(Run(replace(record, diverged=step)))
        where = f"at {options.lr:g} the loss became infinite or NaN at step {step}"
        raise InputError(f"{where}; try a lower one", "lr") from None

    # 3. Exit 0, which learns the last exit's answers too.
    if ngrams:
        if others:
            learn = with_answers(start, saved, learn, "unlabelled", model, others)
        saved.once("exit 0", lambda: fit_exit_0(ngrams, learn, embeddings, start.weigh))
        model.add_ngrams(ngrams)

    # 4. The run.
    stages = saved.stages
    losses = {name: np.round(its["losses"], 5).tolist() for name, its in stages.items() if its["losses"]}
    seconds = {name: round(its["seconds"], 1) for name, its in stages.items()}
    total = round(sum(its["seconds"] for its in stages.values()), 1)
    record = replace(record, losses=losses, stages=seconds, seconds=total)
    run = Run.made(record, model, start.tokenizer, data.validation)
    saved.finish(run)
    LOG.info("%s: trained in %.0f s", saved.out or "the classifier", total)
    return run


def train_stage(start: Start, saved: SavedTraining, stage: Stage, learn: Texts, epochs: int | None = None) -> None:
    """Fine-tune a model, or a part of one. Own text's epochs are `epochs`, or follow from the texts (`epochs_of`)."""
    options, model = start.options, stage.model.to(start.device)
    are_single = learn.targets.ndim == 1 and learn.examples.second is None
    epochs = options.epochs or epochs or epochs_of(len(learn), options.batch_size, model.num_labels, are_single)
    learn = learn.with_targets(start.weigh(learn.targets))
    with used_rows(model, learn) as row_of:
        batches = (
            batch for epoch in range(epochs) for batch in learn.shuffled(options.batch_size, options.seed, epoch)
        )
        batches = (batch._replace(input_ids=row_of[batch.input_ids]) for batch in batches)
        steps, rate = epochs * -(-len(learn) // options.batch_size), stage.times_rate * options.lr
        with progress(batches, total=steps, unit="step", desc=stage.name) as bar:
            checkpoint = saved.stage(stage.name, bar)
            fine_tune(model, bar, steps, rate, options.seed, start.precision, stage.groups, checkpoint)
    model.cpu()  # frees the device for the next stage


def some_of(texts: int) -> np.ndarray:
    """Which of so many texts the model learns again with: at most MOST_AGAIN rows, in order."""
    return np.sort(np.random.default_rng(0).permutation(texts)[:MOST_AGAIN])


def second_answers(start: Start, trunk: MultiExitModel, labelled: Texts, others: Texts) -> torch.Tensor:
    """The logits (N, C) of others, by a regression on the embeddings of a trunk that is not trained yet."""
    encoder = trunk.encoder.eval().to(start.device)
    vectors = embed(encoder, start.tokenizer, labelled.examples.joined(others.examples))
    encoder.cpu()
    targets = start.weigh(np.eye(trunk.num_labels, dtype=np.float32)[labelled.targets])
    return regress(vectors, torch.from_numpy(targets))[len(labelled) :].clone()  # to be saved without the labelled


def with_answers(
    start: Start,
    saved: SavedTraining,
    labelled: Texts,
    name: str,
    model: ExitModel,
    others: Texts,
    second: torch.Tensor | None = None,
) -> Texts:
    """Labelled texts and others, with probabilities to learn: those of labels, and what a model's last exit says.

    `second` are another teacher's logits (N, C) of the others, to be added to the model's.
    """

    def ask() -> torch.Tensor:
        alone = model.models_alone[-1]
        alone = alone.keep_exits(alone.head_layers[-1:]).eval().to(start.device)
        precision = devices.choose_precision(start.options.amp, start.device)  # as in evaluation: on a CPU float32
        started, some = time.perf_counter(), others.take(np.arange(len(others))[:TIMED])
        ask_all(alone, some, precision)
        minutes = (time.perf_counter() - started) / len(some) * len(others) / 60
        LOG.info("the model answers %s unlabelled texts: some %.1f minutes", f"{len(others):,}", minutes)
        logits = ask_all(alone, others, precision, title=name).logits[-1]
        alone.cpu()
        return logits.softmax(-1) if second is None else taught(logits, second)

    answers = saved.once(name, ask).numpy()  # (N, C)
    labels = np.eye(answers.shape[1], dtype=np.float32)[labelled.targets]
    return labelled.joined(others).with_targets(np.concatenate([labels, answers]))


def new_exit_0(start: Start, data: Data) -> NgramExit:
    """Exit 0, before it is fitted. Raises InputError for too many classes."""
    texts = len(data.train) + (len(data.unlabelled) if data.unlabelled else 0)
    pairs, V, C = data.validation.examples.second is not None, start.config.vocab_size, len(data.labels)
    check_size(V, C, pairs, texts)
    return NgramExit(V, C, special_ids(start.tokenizer), pairs)


def fit_exit_0(ngrams: NgramExit, learn: Texts, embeddings: torch.Tensor, weigh: Callable) -> None:
    """Fit exit 0 to what texts have to learn, with the embeddings (V, D) before training."""
    chunks = np.array_split(np.arange(len(learn)), -(-len(learn) // 256))
    batches = [learn.batch(rows).inputs for rows in chunks]
    with progress(desc="exit 0", unit="fit") as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        fit_ngrams(ngrams, batches, torch.from_numpy(weigh(learn.targets)), embeddings, report)


def weights_of(class_weights: str | dict[str, float], labels: Sequence[str]) -> np.ndarray:
    """The weight of each class (C,), 1 where none is named; NaN for what balances it."""
    if class_weights == "balanced":
        return np.full(len(labels), np.nan)
    if unknown := sorted(class_weights.keys() - {*labels}):
        raise InputError(f"{unknown[0]!r:.60} is no label, should be some of {preview(labels)}", "class_weights")
    return np.array([class_weights.get(label, 1.0) for label in labels])


def weighted(weights: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Labels (N,) or probabilities (N, C) to (N, C), each row times the weight of its class (C,).

    Where that is NaN it is N / (classes that occur x rows of the class).
    """
    targets = np.eye(len(weights), dtype=np.float32)[targets] if targets.ndim == 1 else targets
    classes, of_row, counts = np.unique(targets.argmax(1), return_inverse=True, return_counts=True)
    weights = np.where(np.isnan(weights[classes]), len(targets) / (len(counts) * counts), weights[classes])
    return targets * weights[of_row, None].astype(np.float32)


def new_record(start: Start, data: Data) -> Record:
    """The record of a training, as far as it is known before; and tell of it."""
    options, config, parts = start.options, start.config, [data.train, *([data.unlabelled] if data.unlabelled else [])]
    if data.validation.examples.second is not None and config.type_vocab_size == 1:
        raise InputError(f"{start.folder}: its type_vocab_size is 1, and pairs, as in {data.task}, need 2")
    learnt = {*start.known_keys, *(key for part in parts for key in part.keys.tolist())}
    digests = "".join(part.examples.digest() for part in (data.validation, *parts))
    are_single = bool(len(data.train)) and data.train.examples.second is None
    rule = epochs_of(len(data.train) or len(parts[-1]), options.batch_size, len(data.labels), are_single)
    if data.text_columns and options.epochs and options.epochs < rule:
        LOG.warning("epochs: %d, and %d are the rule here; with few the model may learn nothing", options.epochs, rule)
    record = Record(
        arguments=options,
        **{name: getattr(data, name) for name in ("task", "labels", "label_type", "metric", "subset", "set_aside")},
        **{name: getattr(data, name) for name in ("text_columns", "label_column", "group_column")},
        exit_layers=options.exit_layers,
        depth=config.num_hidden_layers,
        vocab_size=config.vocab_size,
        digest=hashlib.sha256(digests.encode()).hexdigest(),
        weights=hashlib.sha256((start.folder / WEIGHTS).read_bytes()).hexdigest(),
        trained_keys=sorted(learnt),
        device=devices.device_name(start.device),
        precision=str(start.precision or torch.float32),
        versions=versions(),
    )
    is_trained = start.trunk is None or sum(n > 0 for n in options.exit_layers) > 1
    trained = f"lr {options.lr:g}, epochs {options.epochs or rule}"
    trained = trained if is_trained else "no layer is trained: the trunk stays as it is"
    exits = f"exits after layers {','.join(map(str, options.exit_layers))} of {record.depth}"
    LOG.info("method %s, %s", options.method, trained)
    LOG.info(
        "%s, %s: %s, seed %d, %s, %s", options.model, data.task, exits, options.seed, record.device, record.precision
    )
    LOG.info(
        "%s of %s rows to train on, %s to validate",
        *(f"{n:,}" for n in (len(data.train), data.rows, len(data.validation))),
    )
    if data.empty:
        LOG.warning("empty texts, skipped: %s", f"{data.empty:,}")
    LOG.info("texts cut to %d tokens: %s", options.max_length, f"{data.train.is_cut.sum():,}")
    return record
