"""How `fit` trains, from top to bottom.

    probe          a logistic regression on the frozen embeddings of the labelled rows, from which the exit starts
    fine-tuning    all layers learn the labels
    again          if unlabelled texts outnumber labelled ones: all layers also learn the model's answers to them
    bag of words   learns the labels, and the model's answers to unlabelled texts

A trunk, which is a finished classifier, is not trained; only a bag of words is put in front of it.

`options` are the arguments of `EarlyExitClassifier`, and the `place` and `precision` to compute in (None for float32).

Dimension letters: B batch, T tokens, D hidden size, V vocabulary, C classes, N texts, n some of them.
"""

import time
from argparse import ArgumentTypeError, Namespace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_

from minisweet import fast
from minisweet.base.commands import checked, number, progress
from minisweet.base.devices import AMP_CHOICES, choose_device, choose_precision, device_name
from minisweet.base.files import LOG, InputError
from minisweet.checkpoint import load_encoder
from minisweet.classifier import report, run, split
from minisweet.classifier.bag_of_words import NgramExit, fit_ngrams
from minisweet.classifier.cascade import Cascade, run_all
from minisweet.classifier.probe import FullModel, fit_probe, load_classifier
from minisweet.classifier.rows import joined
from minisweet.defaults import default_batch_size, default_epochs, default_learning_rate
from minisweet.hub import model_folder
from minisweet.loading import WEIGHTS
from minisweet.texts import Examples, Texts, load_tokenizer, special_ids

MAX_LENGTH = 256  # tokens, by default
EPOCHS, STEPS = 4, 200  # the minimum epochs and steps of fine-tuning (tried.md)
# Self-training, if more texts are unlabelled than labelled: the maximum number of unlabelled texts, and the epochs.
MOST_AGAIN, EPOCHS_AGAIN = 5000, 2
STEP = 3  # how long a text takes to train on, in forward passes
KINDS = {  # the options that are not text, by what reads them in a shell
    "dev_size": number(float, 0.0001, 0.9999),
    "seed": number(int, 0),
    "lr": number(float, 1e-30, 1e300),
    "epochs": number(int, 1),
    "batch_size": number(int, 1),
    "max_length": number(int, 8),
    "max_lost": number(float, 0.01, 99.99),
    "sure": number(float, 50, 99.9),
    "threshold": number(float, 0, 1),
    "amp": checked(str, lambda word: word in AMP_CHOICES, f"one of {', '.join(AMP_CHOICES)}"),
}
DEPLOYMENT = {"threshold": None, "batch_size": 32, "device": "auto", "amp": "auto"}  # options of a run that is loaded
BY_DEFAULT_NONE = ("lr", "epochs", "batch_size", "max_length", "threshold")
BESIDE_TRUNK = "cannot be combined with a trunk: only the bag of words is trained then"
DIVERGED = "at {:g} the loss became infinite or NaN at step {}; try a lower one"


def check_options(**given: Any) -> Namespace:
    """Options as plain types, with the place and precision to compute in. Raises InputError, which names the option."""
    given = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    for name in ("model", "trunk"):
        value = given.get(name, "none is given")
        if not (value and isinstance(value, str)) and (name == "model" or value is not None):
            raise InputError(f"{given[name]!r:.80}, should be a name or a folder", name)
    for name in KINDS.keys() & given.keys():
        if given[name] is not None or name not in BY_DEFAULT_NONE:
            try:
                given[name] = KINDS[name](str(given[name]))
            except ArgumentTypeError as error:
                raise InputError(error, name) from None
    for name, default in (("model", "minilm-l6"), ("lr", None), ("epochs", None)) if given.get("trunk") else ():
        if given[name] != default:
            raise InputError(BESIDE_TRUNK, name)
    place = choose_device(given["device"])
    return Namespace(**given, place=place, precision=choose_precision(given["amp"], place))


def train(
    name: str, rows: Examples, given: Examples, unlabelled: Examples, options: Namespace, **columns: Any
) -> tuple[Namespace, Cascade, run.Validation]:
    """Train on your own text. Returns the record, a cascade without a rule, and the validation rows.

    Some of the `rows` are set aside to validate on, unless some are `given` for that. `unlabelled` are more rows. The
    `name` of the data and the `columns` of a file are for the record. Raises InputError if data and options do not fit,
    or training diverges.
    """
    # 1. What the training starts from: public weights, or a trunk, whose layers stay as they are.
    examples = joined(rows, unlabelled, given)
    classes = split.classes_of(rows.names or (), examples.names or ())
    model, tokenizer, labels, trunk = start_from(options, name, classes)

    # 2. Who learns, who chooses and who judges.
    numbers = split.class_numbers(examples.names or (), labels, options.trunk)
    texts = Texts(tokenizer, examples._replace(labels=numbers.tolist()))
    units, known = split.units_of(texts), np.zeros(len(texts), dtype=bool)
    if trunk:
        known = np.isin(texts.keys, trunk.trained_keys) | split.in_groups(examples, trunk.training_groups)
    sides = split.split_rows(name, texts, units, labels, len(given.first), options.dev_size, known)
    labelled, answered, validating = sides
    if unlabelled.first and not len(answered):
        raise InputError("no text is left: all of them are also labelled, or set aside", "unlabelled")
    learned, side = texts.take(np.concatenate([labelled, answered])), texts.take(validating)
    own_units = split.lowest(side.keys, np.unique(units[validating], return_inverse=True)[1])  # by a key that validates
    roles = split.deal_roles(side.keys, own_units, side.labels)
    if not (roles == split.JUDGES).any():
        raise InputError(f"{name}: too few validation texts: one has to choose, and another one to judge")
    about = columns | {"task": name, "set_aside": 1.0 if given.first else options.dev_size}
    about["rows_per_unit"] = [len(n) / max(1, len(np.unique(n))) for n in (units[numbers >= 0], units[numbers < 0])]
    record = run.new_record(options, model, labels, learned, side, trunk, **about)
    if examples.empty:
        LOG.warning("empty texts, skipped: %d", examples.empty)
    report.before_training(record, options, learned, side, roles)

    # 3. The model and the bag of words learn.
    started = time.perf_counter()
    embeddings = model.encoder.word_embeddings.weight.detach().clone()  # (V, D), before they are trained
    record.losses = {} if options.trunk else train_model(model, learned, len(labelled), options)
    bag = NgramExit(len(embeddings), len(labels), special_ids(tokenizer))
    train_bag(bag, model, learned, len(labelled), embeddings, options)
    record.seconds = round(time.perf_counter() - started, 1)

    # 4. Both answer the validation rows.
    record.id = run.id_of(model, bag, labels, record.validation)
    parts = tokenizer, labels, bag.to(options.place), model.eval().to(options.place)
    cascade = Cascade(*parts, (1.0, 1.0, 0.0), 1.0, options.place, options.precision)
    return record, cascade, run.Validation(side, roles, cascade.ask_both(side))


def start_from(options: Namespace, name: str, labels: list) -> tuple[FullModel, Tokenizer, list, Namespace | None]:
    """Load public weights or a trunk, and fill in the options that depend on it.

    Returns the model, its tokenizer, its labels (C,), which are the given ones or a trunk's, and a trunk's record.
    """
    trunk, record = options.trunk, None
    folder = Path(trunk) if trunk else model_folder(options.model)
    if trunk and (folder / run.RECORD).is_file():
        record = run.read_record(folder)
        model, labels = run.load_model(folder, record), record.labels
        LOG.info("no layer is trained: the trunk stays as it is, but its bag of words no longer adds to its answers")
    elif trunk:
        model, labels = load_classifier(folder)
        LOG.info("no layer is trained: the trunk stays as it is")
    elif labels:
        encoder = load_encoder(folder, pooling="mean")
        model = FullModel(encoder, nn.Linear(encoder.config.hidden_size, len(labels)))
        options.lr = options.lr or default_learning_rate(encoder.config)
    else:
        raise InputError(f"{name}: no row has a label")
    config, length = model.encoder.config, record and record.arguments["max_length"]
    if options.max_length and length and options.max_length != length:  # the keys of cut texts would change
        raise InputError(f"{options.max_length}, should be {length}, as of the trunk {trunk}", "max_length")
    options.max_length = options.max_length or length or min(MAX_LENGTH, config.max_tokens)
    options.batch_size = options.batch_size or default_batch_size(config)
    options.weights = run.hash_of((folder / WEIGHTS).read_bytes())
    return model, load_tokenizer(folder, config.vocab_size, options.max_length, config.max_tokens), labels, record


def train_model(model: FullModel, texts: Texts, n: int, options: Namespace) -> dict[str, list[float]]:
    """Train a model with a linear head: the probe, then all layers, and again if more than half are unlabelled.

    The first n of N texts have labels. The model is on the CPU before and after. Returns the losses of each step, by
    stage.
    """
    rows, size = np.arange(len(texts)), options.batch_size
    known, others = texts.take(rows[:n]), rows[n:]
    epochs = options.epochs or default_epochs(EPOCHS, STEPS, n, size)
    epochs_again = (options.epochs or EPOCHS_AGAIN) * (len(others) > n)
    again = np.sort(np.random.default_rng(0).permutation(others)[:MOST_AGAIN])

    started = time.perf_counter()
    model.eval().to(options.place)
    vectors = run_all(lambda *x: F.normalize(model.pooled(*x)), known, options.place, title="embeddings")  # (n, D)
    seconds = (time.perf_counter() - started) / n  # of a forward pass
    seconds *= STEP * (epochs * n + epochs_again * (n + len(again))) + len(others)
    LOG.info("training takes about %.1f minutes", seconds / 60)

    fit_probe(model.cpu().head, vectors, torch.from_numpy(known.labels))
    losses = {"fine-tuning": fine_tune(model, known, known.labels, epochs, options, "fine-tuning")}
    if epochs_again:
        title, both = "learning from its own answers", texts.take(np.r_[rows[:n], again])
        targets = with_answers(known.labels, answer_all(model, texts.take(again), options))
        losses[title] = fine_tune(model, both, targets, epochs_again, options, title)
    return losses


def train_bag(bag: NgramExit, model: FullModel, texts: Texts, n: int, embeddings: Tensor, options: Namespace) -> None:
    """Fit a bag of words in place to N texts: to the labels of the first n, and to the model's answers to the others.

    `embeddings` (V, D) are the word embeddings before they were trained.
    """
    targets, rows = texts.labels[:n], np.arange(len(texts))
    if n < len(texts):
        targets = with_answers(targets, answer_all(model, texts.take(rows[n:]), options))
    batches = [texts.batch(part).inputs[:2] for part in np.array_split(rows, ceil(len(rows) / 256))]
    fit_ngrams(bag, batches, torch.from_numpy(targets), embeddings)


def answer_all(model: FullModel, texts: Texts, options: Namespace) -> Tensor:
    """The probabilities (N, C) that a model gives for N texts. It is on the CPU afterwards."""
    model.eval().to(options.place)
    logits = run_all(model, texts, options.place, options.precision, title="unlabelled texts")
    model.cpu()
    return logits.softmax(-1)


def with_answers(labels: np.ndarray, answers: Tensor) -> np.ndarray:
    """Targets (N+n, C) in float32: one-hot labels (N,) of labelled texts, then a model's answers (n, C) to others."""
    return np.concatenate([np.eye(answers.shape[1], dtype=np.float32)[labels], answers.numpy()])


def fine_tune(
    model: FullModel, texts: Texts, targets: np.ndarray, epochs: int, options: Namespace, title: str
) -> list[float]:
    """Train all parameters of a model on labels (N,) or probabilities (N, C). Returns the loss of each step.

    The learning rate decays linearly to zero. The model is moved to the device, and back to the CPU at the end. Raises
    InputError if a loss, or a trained parameter, is infinite or NaN.
    """
    device, rate, of_row, losses = options.place, options.lr, torch.from_numpy(targets), list[float]()
    precision = choose_precision(options.amp, device, training=True)
    steps = epochs * ceil(len(texts) / options.batch_size)
    LOG.info("%s: %d epochs, lr %g, %s, %s", title, epochs, rate, device_name(device), precision or torch.float32)
    model.to(device).train()
    with fast.used_rows(model.encoder.word_embeddings, texts) as few, progress(total=steps, desc=title) as bar:
        started, parameters = time.perf_counter(), list(model.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)
        scaler = GradScaler(device.type, enabled=precision is torch.float16)  # for float16 alone
        for epoch in range(epochs):
            for batch in few.shuffled(options.batch_size, options.seed, epoch):
                torch.manual_seed(1_000_003 * options.seed + 1_009 * (len(losses) + 1))  # dropout, whatever ran before
                optimizer.param_groups[0]["lr"] = rate * (1 - len(losses) / steps)
                optimizer.zero_grad()
                with torch.autocast(device.type, precision, enabled=precision is not None):
                    logits = model(*batch.to(device).inputs)
                    loss = F.cross_entropy(logits.float(), of_row[batch.rows].to(device))
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                clip_grad_norm_(parameters, 1.0)
                scaler.step(optimizer)
                scaler.update()
                losses.append(round(loss.item(), 5))
                if not np.isfinite(losses[-1]):
                    raise InputError(DIVERGED.format(rate, len(losses)), "lr")
                bar.set_postfix_str(f"loss {losses[-1]:.2f}", refresh=False)
                bar.update()
            if bar.disable:  # in a log a line per epoch stands for the bar
                left = (time.perf_counter() - started) / 60 * (epochs / (epoch + 1) - 1)
                mean = np.mean(losses[len(losses) * epoch // (epoch + 1) :])
                LOG.info("%s: epoch %d of %d, loss %.3f, %.1f minutes left", title, epoch + 1, epochs, mean, left)
        if not all(part.isfinite().all() for part in parameters):  # the last update, which no loss has seen
            raise InputError(DIVERGED.format(rate, steps), "lr")
    model.cpu()
    return losses
