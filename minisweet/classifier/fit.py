"""Train a classifier on your own text, choose what to deploy, and say what to expect of it.

    minisweet fit tickets.csv --out runs/tickets
    minisweet fit tickets.csv --text-columns body --label-column team --max-lost 2
    minisweet fit tickets.csv --unlabelled more.csv
    minisweet fit --trunk my-classifier --unlabelled texts.csv        # exit 0 for a classifier, without labels

Files are .csv, .tsv or .jsonl. A model is fine-tuned, and exit 0, a bag of words, stands in front of it. Then `fit`
does what `minisweet choose` does.
"""

import copy
import hashlib
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path

import numpy as np
import torch

from minisweet.base.commands import (
    Options,
    Parser,
    list_of,
    name_of,
    number,
    one_of,
    option,
    positive_number,
    whole_number,
)
from minisweet.base.devices import AMP_CHOICES, AMP_HELP, choose_device, choose_precision, device_name
from minisweet.base.files import LOG, InputError
from minisweet.checkpoint import REPOSITORIES, WEIGHTS, load_encoder, read_config
from minisweet.classifier.bag_of_words import NgramExit, check_size, fit_ngrams
from minisweet.classifier.deployed import Fitted, OwnRun, choose_for, group_hash, in_groups, save
from minisweet.classifier.promise import Goal
from minisweet.classifier.rows import Columns, find_column, joined, read_texts, text_column
from minisweet.classifier.split import class_numbers, classes_of, split_rows, warn_of_near_duplicates
from minisweet.classifier.summary import print_choice
from minisweet.classifier.teacher import embed, ensemble, regress
from minisweet.classifier.trunk import Trunk, load_trunk
from minisweet.config import Config
from minisweet.defaults import SMALL, default_batch_size
from minisweet.exits import ExitModel, MultiExitModel
from minisweet.hub import model_folder
from minisweet.options import TrainingOptions
from minisweet.outputs import ask_all
from minisweet.run import Record, check_output, save_diverged, versions, weights_id
from minisweet.texts import Examples, Texts, load_tokenizer, special_ids
from minisweet.training import fine_tune

# The least steps and epochs of fine-tuning. Three classes or more gain from eight epochs, two do not (tried.md).
STEPS, EPOCHS, EPOCHS_OF_TWO = 300, 8, 4
# If more texts are unlabelled than labelled, the model also learns answers to them: the most texts, and the epochs.
MOST_AGAIN, EPOCHS_AGAIN = 5000, 2
MAX_LENGTH = 256  # tokens


@dataclass(frozen=True, kw_only=True)
class FitOptions(Options):
    """The options for training on your own text. Raises InputError, which names the option, for a wrong value."""

    model: str = option("minilm-l6", name_of, f"{', '.join(REPOSITORIES)}, a folder or a hub id")
    trunk: str | None = option(None, name_of, "run or classifier to start from; it is not trained")
    dev_size: float = option(0.2, number(0.0001, 0.9999), "share of the labelled texts, or groups, that is set aside")
    seed: int = option(0, whole_number(0), "random seed of new weights, order and dropout")
    lr: float | None = option(None, positive_number, "initial learning rate (default: by the model's size)")
    epochs: int | None = option(None, whole_number(1), "passes over the data (default: by rows and classes)")
    batch_size: int | None = option(None, whole_number(1), "examples (default: 16, and 8 for a large DeBERTa)")
    max_length: int | None = option(None, whole_number(8), "tokens; longer texts are cut (default: 256, or a trunk's)")
    device: str = option("auto", name_of, "auto, cpu, cuda or cuda:N")
    amp: str = option("auto", one_of(*AMP_CHOICES), AMP_HELP)


def fit_texts(
    options: FitOptions,
    name: str,
    rows: Examples,
    validation: Examples | None,
    unlabelled: Examples | None,
    columns: Columns,
    label_type: str = "str",
    out: Path | None = None,
) -> OwnRun:
    """Train on your own text: a model, and a bag of words in front of it.

    Args:
        options: what is left open follows from the model and the data.
        name: of the data, for the record.
        rows: to learn from, with or without labels. Some are set aside to validate on.
        validation: rows to validate on in their place, or None.
        unlabelled: more rows without labels, or None.
        columns: of the file of `rows`, for the record.
        label_type: of the labels in Python: "str", "int", "float" or "bool".
        out: where to write the record if training diverges, or None.

    Raises InputError if model, data and options do not fit, or training diverges.
    """
    # 1. The model to start from: public weights, or a finished trunk.
    trunk = load_trunk(Path(options.trunk)) if options.trunk else None
    folder = Path(options.trunk) if options.trunk else model_folder(options.model)
    config = read_config(folder)
    options = resolve(options, config, trunk)
    tokenizer = load_tokenizer(folder, config.vocab_size, options.max_length, config.max_tokens)
    device = choose_device(options.device)
    precision = choose_precision(options.amp, device, training=True)

    # 2. The data: training and validation rows.
    labels = trunk.labels if trunk else classes_of(rows.names)
    examples = joined(rows, *(part for part in (unlabelled, validation) if part))
    texts = Texts(tokenizer, examples._replace(labels=class_numbers(examples.names, labels, options.trunk).tolist()))
    given = len(validation.first) if validation else 0
    split = split_rows(name, texts, labels, given, options.dev_size)
    if unlabelled and unlabelled.first and not len(split.unlabelled):
        raise InputError("no text is left: all of them are also labelled, or set aside", "unlabelled")
    labelled, answered = texts.take(split.labelled), texts.take(split.unlabelled)
    learned = texts.take(np.concatenate([split.labelled, split.unlabelled]))
    check_size(config.vocab_size, len(labels), len(learned))
    warn_of_near_duplicates(split.validation, learned)

    # 3. The model, with one exit at its end, and the record, as far as it is known before the training.
    torch.manual_seed(options.seed)
    depth = config.num_hidden_layers
    model = trunk.model if trunk else MultiExitModel(load_encoder(folder), (depth,), len(labels))
    embeddings = model.encoder.word_embeddings.weight.detach().clone()  # (V, D), before they are trained
    arguments = {key: value for key, value in vars(options).items() if key not in ("trunk", "dev_size")}
    arguments |= {"model": options.trunk or options.model, "exit_layers": [depth]}
    arguments["pooling"] = model.encoder.config.pooling
    arguments["train_size"] = len(labelled) or len(answered)
    validating = examples.take(np.flatnonzero(np.isin(texts.keys, split.validation.keys)))
    groups, validated = ({*map(group_hash, filter(None, x.groups or ()))} for x in (learned.examples, validating))
    trained_keys, trained_groups = (trunk.trained_keys, trunk.trained_groups) if trunk else ((), ())
    in_trained_group = texts.keys[in_groups(examples, trained_groups)]  # of a trunk's groups: these never judge
    digests = "".join(part.examples.digest() for part in (split.validation, labelled, answered) if len(part))
    record = Record(
        arguments=TrainingOptions(**arguments),
        task=name,
        labels=labels,
        metric="accuracy",
        text_columns=[columns.text],
        exit_layers=[depth],
        depth=depth,
        vocab_size=config.vocab_size,
        subset=split.labelled.tolist(),
        digest=hashlib.sha256(digests.encode()).hexdigest(),
        weights=hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
        trained_keys=sorted({*trained_keys, *in_trained_group.tolist(), *learned.keys.tolist()}),
        device=device_name(device),
        precision=str(precision or torch.float32),
        versions=versions(),
        fit=asdict(
            Fitted(
                label_type=trunk.label_type if trunk else label_type,
                label_column=columns.label,
                group_column=columns.group,
                set_aside=1.0 if validation else options.dev_size,
                trunk=options.trunk,
                dev_size=options.dev_size,
                combines=not trunk,
                trained_groups=sorted({*trained_groups, *groups}),
                validated_groups=sorted(validated - groups),
            )
        ),
    )
    LOG.info("%s, %d layers", folder, depth)
    LOG.info("%s: %d rows to train on, %d to validate", name, len(labelled), len(split.validation))
    if examples.empty:
        LOG.warning("empty texts, skipped: %d", examples.empty)
    LOG.info("texts cut to %d tokens: %d", options.max_length, labelled.is_cut.sum())

    # 4. The model learns the labels. If more texts are unlabelled than labelled, it then learns the labels again,
    # together with what two teachers answer to these texts (teacher.py).
    training = Training(record, device, precision, out)
    if trunk:
        LOG.info("no layer is trained: the trunk stays as it is")
    else:
        again = np.random.default_rng(0).permutation(len(answered))[:MOST_AGAIN]
        again = split.unlabelled[np.sort(again)] if len(labelled) < len(answered) else split.unlabelled[:0]
        known = texts.take(np.concatenate([split.labelled, again]))
        rule = epochs_of(len(labelled), options.batch_size, len(labels))
        epochs, epochs_again = options.epochs or rule, options.epochs or EPOCHS_AGAIN
        steps = epochs * ceil(len(labelled) / options.batch_size)
        steps += epochs_again * ceil(len(known) / options.batch_size) * (len(again) > 0)
        about = options.lr, options.seed, record.device, record.precision
        LOG.info("%s steps, lr %g, seed %d, %s, %s", f"{steps:,}", *about)
        if epochs < rule:
            LOG.warning("epochs: %d, fewer than the default of %d; the model may learn nothing", epochs, rule)
        if len(again):
            with training.timed("regression"):
                vectors = embed(model.encoder.eval().to(device), known)
                second = regress(vectors, torch.eye(len(labels))[labelled.labels])[len(labelled) :]
                model.cpu()
        training.train("fine-tuning", model, labelled, epochs)
        if len(again):
            answers = ensemble(training.ask("model answers", model, texts.take(again)), second)
            training.train("learning from its own answers", model, with_answers(known, answers), epochs_again)

    # 5. The bag of words in front of the model learns the labels, and the model's answers to other texts.
    if len(answered):
        learned = with_answers(learned, training.ask("unlabelled", model, answered).softmax(-1))
    bag = NgramExit(config.vocab_size, len(labels), special_ids(tokenizer))
    with training.timed("exit 0"):
        chunks = np.array_split(np.arange(len(learned)), -(-len(learned) // 256))
        batches = [learned.batch(rows).inputs[:2] for rows in chunks]
        fit_ngrams(bag, batches, torch.from_numpy(learned.targets), embeddings)

    # 6. The record of what was trained.
    seconds = sum(training.seconds.values())
    LOG.info("trained in %.0f s", seconds)
    record = replace(
        record,
        id=weights_id(model),
        losses=training.losses,
        stages={stage: round(value, 1) for stage, value in training.seconds.items()},
        seconds=round(seconds, 1),
    )
    return OwnRun(record, model.eval(), bag, tokenizer, split.validation)


def resolve(options: FitOptions, config: Config, trunk: Trunk | None) -> FitOptions:
    """Fill in the defaults that depend on the model. The epochs stay open, as each stage has its own rows.

    Raises InputError if the trunk cannot have texts of this length.
    """
    length = trunk.max_length if trunk else None
    if options.max_length and length and options.max_length != length:  # the keys of cut texts would change
        raise InputError(f"{options.max_length}, should be {length}, as of the trunk {options.trunk}", "max_length")
    return replace(
        options,
        lr=options.lr or (1e-4 if config.hidden_size <= SMALL else 5e-5),  # minisweet/tried.md
        batch_size=options.batch_size or default_batch_size(config),
        max_length=options.max_length or length or MAX_LENGTH,
    )


def epochs_of(rows: int, batch_size: int, classes: int) -> int:
    """How many epochs the first stage takes, by its number of rows and classes."""
    least = EPOCHS if classes > 2 else EPOCHS_OF_TWO
    return max(least, ceil(STEPS / ceil(max(1, rows) / batch_size)))


def with_answers(texts: Texts, answers: torch.Tensor) -> Texts:
    """Labelled texts, then unlabelled ones. Their targets are the labels, and the `answers` (n, C) of a model."""
    labels = np.eye(answers.shape[1], dtype=np.float32)[texts.labels[: len(texts) - len(answers)]]
    same = copy.copy(texts)
    same.targets = np.concatenate([labels, answers.numpy()])
    return same


class Training:
    """Runs the stages one by one, and keeps their losses and seconds."""

    def __init__(self, record: Record, device: torch.device, precision: torch.dtype | None, out: Path | None) -> None:
        self.record, self.device, self.precision, self.out = record, device, precision, out
        self.losses, self.seconds = {}, {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Measure the seconds that the stage `name` takes."""
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    def train(self, name: str, model: MultiExitModel, texts: Texts, epochs: int) -> None:
        """Train the model in the stage `name`."""
        options = self.record.arguments
        settings = options.batch_size, options.lr, options.seed, self.device, self.precision
        try:
            with self.timed(name):
                losses = fine_tune(model, texts, epochs, *settings, title=name)
        except FloatingPointError as error:
            step = error.args[0]
            if self.out:
                save_diverged(self.out, replace(self.record, diverged=step))
            message = f"at {options.lr:g} the loss became infinite or NaN at step {step}; try a lower one"
            raise InputError(message, "lr") from None
        self.losses[name] = np.round(losses, 5).tolist()

    def ask(self, name: str, model: ExitModel, texts: Texts) -> torch.Tensor:
        """The logits (N, C) that a model gives for N texts."""
        model.eval().to(self.device)
        precision = choose_precision(self.record.arguments.amp, self.device)  # as in evaluation: float32 on a CPU
        with self.timed(name):
            (logits,) = ask_all(model, texts, precision, title="answering unlabelled texts").logits
        model.cpu()
        return logits


def main(words: list[str]) -> None:
    """Train one run, and choose for it."""
    parser = Parser(__doc__, "minisweet fit")
    option = parser.add_argument
    option("file", nargs="?", type=Path, metavar="FILE", help="labelled texts: .csv, .tsv or .jsonl")
    option("--unlabelled", type=Path, action="append", default=[], metavar="FILE", help="more texts; repeatable")
    names = list_of(name_of)
    option("--text-columns", type=names, help="the column of texts (default: text or sentence)")
    option("--label-column", metavar="NAME", help="(default: label)")
    option("--group-column", metavar="NAME", help="what a row belongs to, such as a thread; all its rows stay together")
    option("--dev-data", type=Path, metavar="FILE", help="validation rows (default: rows of FILE set aside)")
    option("--out", type=Path, help="run folder (default: runs/<the name of FILE>)")
    option("--overwrite", action="store_true", help="replace the run in --out when the new one is trained")
    parser.add_options(FitOptions, title="training")
    parser.add_options(Goal)
    args = parser.parse_args(words)
    options = parser.make(FitOptions, args)
    goal = parser.make(Goal, args)
    parser.need(args, args.dev_data is None, "a split of FILE, not --dev-data", "dev_size")
    if not args.file and not (args.trunk and args.unlabelled):
        raise InputError("FILE: is missing; it may be left out with --trunk FOLDER --unlabelled FILE")
    name = (args.file or args.unlabelled[0]).name.split(".")[0]
    out = args.out or Path("runs") / name
    check_output(out, args.overwrite)
    run = fit_texts(options, name or "texts", *read_files(args), out=out)
    run = choose_for(run, goal, options.device, options.amp)
    check_output(out, args.overwrite)  # once more, since training takes a while
    save(out, run, args.overwrite)
    print_choice(out, run)


def read_files(args: Namespace) -> tuple[Examples, Examples | None, Examples | None, Columns]:
    """Read the files that a command names: the rows, those to validate on, the unlabelled ones; and FILE's columns."""
    first = args.file or args.unlabelled[0]
    label = args.label_column or "label"
    column = text_column(first, args.text_columns)
    if args.file and label == column:
        raise InputError(f"--text-columns: {column}, should not be the label column")

    def read(file: Path, label: str | None) -> Examples:
        own = column if file is first else text_column(file, args.text_columns, [column])
        for typed, named in (("--label-column", label), ("--group-column", args.group_column)):
            if named:
                find_column(typed, file, named)
        return read_texts(file, own, label, args.group_column)

    rows = read(first, label) if args.file else Examples([], None, None, names=[])
    validation = read(args.dev_data, label) if args.dev_data else None
    unlabelled = joined(*(read(file, None) for file in args.unlabelled)) if args.unlabelled else None
    return rows, validation, unlabelled, Columns(column, label if args.file else None, args.group_column)
