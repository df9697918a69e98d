"""Train a classifier on your own text, choose what to deploy, and say what to expect of it.

    minisweet fit tickets.csv --out runs/tickets
    minisweet fit tickets.csv --text-columns subject,body --label-column team --max-lost 2
    minisweet fit tickets.csv --unlabelled more.csv
    minisweet fit --trunk my-classifier --unlabelled texts.csv        # exits for a classifier, without labels

Files are .csv, .tsv or .jsonl. By default a plain model is fine-tuned for its last exit alone, and exit 0, a bag of
words, stands in front of it. Then `fit` does what `minisweet choose` does.
"""

import copy
import hashlib
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import compress
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
from minisweet.checkpoint import REPOSITORIES, WEIGHTS, read_config
from minisweet.classifier.bag_of_words import NgramExit, check_size, fit_ngrams
from minisweet.classifier.deployed import Fitted, OwnRun, choose_for, group_hash, in_groups, save
from minisweet.classifier.promise import Goal, goal_of
from minisweet.classifier.rows import Columns, find_columns, joined, read_texts, text_columns
from minisweet.classifier.split import class_numbers, classes_of, split_rows, warn_of_near_duplicates
from minisweet.classifier.summary import print_choice
from minisweet.classifier.teacher import embed, ensemble, regress
from minisweet.classifier.trunk import Trunk, load_trunk
from minisweet.config import Config
from minisweet.defaults import SMALL, default_batch_size
from minisweet.exits import ExitModel
from minisweet.hub import model_folder
from minisweet.methods import METHODS, Stage, add_exits, new_trunk
from minisweet.options import TrainingOptions
from minisweet.outputs import ask_all
from minisweet.run import Record, check_output, save_diverged, versions, weights_id
from minisweet.texts import Examples, Texts, load_tokenizer, special_ids
from minisweet.training import train_stage

# The least steps and epochs of a stage. Labelled single texts of three or more classes gain from eight epochs. Two
# classes do not, pairs lose, and texts with a model's answers are many anyway (tried.md).
STEPS, EPOCHS, EPOCHS_OF_OTHERS = 300, 8, 4
# If more texts are unlabelled than labelled, the trunk also learns answers to them: the most texts, and the epochs.
MOST_AGAIN, EPOCHS_AGAIN = 5000, 2
MAX_LENGTH = 256  # tokens
TITLES = {"trunk": "fine-tuning", "trunk again": "learning from its own answers"}  # of progress bars


@dataclass(frozen=True, kw_only=True)
class FitOptions(Options):
    """The options for training on your own text. Raises InputError, which names the option, for a wrong value."""

    model: str = option("minilm-l6", name_of, f"{', '.join(REPOSITORIES)}, a folder or a hub id")
    method: str = option("plain", one_of("plain", "branch"), "plain, or branch for exits between 0 and the last")
    exit_layers: list[int] | None = option(
        None, list_of(whole_number(0)), "as 0,6, or with branch 0,3,6; 0 is a bag of words (default: by depth)"
    )
    trunk: str | None = option(None, name_of, "run or classifier to start from; its last exit is not trained")
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
    """Train on your own text: a trunk, branches on it, and a bag of words in front of it, as the options say.

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
    has_bag = options.exit_layers[0] == 0
    exit_layers = [n for n in options.exit_layers if n > 0]
    tokenizer = load_tokenizer(folder, config.vocab_size, options.max_length, config.max_tokens)
    device = choose_device(options.device)
    precision = choose_precision(options.amp, device, training=True)

    # 2. The data: training and validation rows. Without any label, all exits learn what the trunk answers.
    learns_unlabelled = has_bag or len(exit_layers) > 1 or not any(rows.names)
    if unlabelled and not learns_unlabelled:
        raise InputError("without exit 0 or branches nothing learns from it; add 0 to the exit layers", "unlabelled")
    labels = trunk.labels if trunk else classes_of(rows.names)
    examples = joined(rows, *(part for part in (unlabelled, validation) if part))
    texts = Texts(tokenizer, examples._replace(labels=class_numbers(examples.names, labels, options.trunk).tolist()))
    given = len(validation.first) if validation else 0
    split = split_rows(name, texts, labels, given, options.dev_size, learns_unlabelled)
    if unlabelled and unlabelled.first and not len(split.unlabelled):
        raise InputError("no text is left: all of them are also labelled, or set aside", "unlabelled")
    labelled, answered = texts.take(split.labelled), texts.take(split.unlabelled)
    learned = texts.take(np.concatenate([split.labelled, split.unlabelled]))
    are_pairs = examples.second is not None
    if are_pairs and config.type_vocab_size == 1:
        raise InputError(f"{folder}: takes single texts (type_vocab_size 1), and {name} has pairs; use another model")
    if has_bag:
        check_size(config.vocab_size, len(labels), are_pairs, len(learned))
    warn_of_near_duplicates(split.validation, learned)

    # 3. The trunk, a model with one exit at its end, and the record, as far as it is known before the training.
    torch.manual_seed(options.seed)
    base = trunk.model if trunk else new_trunk(folder, exit_layers[-1], len(labels))
    embeddings = base.encoder.word_embeddings.weight.detach().clone()  # (V, D), before they are trained
    arguments = {key: value for key, value in vars(options).items() if key not in ("trunk", "dev_size")}
    arguments |= {"model": options.trunk or options.model, "exit_layers": exit_layers}
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
        text_columns=columns.texts,
        exit_layers=exit_layers,
        depth=config.num_hidden_layers,
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
                exit_layers=options.exit_layers,
                combines=has_bag and not trunk,
                trained_groups=sorted({*trained_groups, *groups}),
                validated_groups=sorted(validated - groups),
            )
        ),
    )
    exits = ",".join(map(str, options.exit_layers))
    LOG.info("%s, exits after layers %s of %d, method %s", folder, exits, record.depth, options.method)
    LOG.info("%s: %d rows to train on, %d to validate", name, len(labelled), len(split.validation))
    if examples.empty:
        LOG.warning("empty texts, skipped: %d", examples.empty)
    LOG.info("texts cut to %d tokens: %d", options.max_length, labelled.is_cut.sum())

    # 4. The stages: how many rows each learns from, and for how many epochs by rule.
    again = split.unlabelled[:0]  # the rows that the trunk learns again with
    if not trunk and len(labelled) < len(answered):
        again = split.unlabelled[np.sort(np.random.default_rng(0).permutation(len(answered))[:MOST_AGAIN])]
    known = texts.take(np.concatenate([split.labelled, again]))
    size = options.batch_size
    is_single = not are_pairs
    stages = [
        ("trunk", len(labelled), epochs_of(len(labelled), size, len(labels), is_single)),
        ("trunk again", len(known), EPOCHS_AGAIN),
        ("branches", len(learned), epochs_of(len(learned), size, len(labels), is_single and not len(answered))),
    ]
    stages = list(compress(stages, (not trunk, len(again), len(exit_layers) > 1)))
    epochs = {stage: options.epochs or rule for stage, _, rule in stages}
    if stages:
        steps = sum(epochs[stage] * ceil(rows / size) for stage, rows, _ in stages)
        work = f"{len(stages)} stage{'s' * (len(stages) > 1)}, {steps:,} steps"
        LOG.info("%s, lr %g, seed %d, %s, %s", work, options.lr, options.seed, record.device, record.precision)
        if (rule := stages[0][2]) > (options.epochs or rule):
            message = "epochs: %d, fewer than the default of %d; the model may learn nothing"
            LOG.warning(message, options.epochs, rule)
    else:
        LOG.info("no layer is trained: the trunk stays as it is")

    # 5. The trunk learns the labels. If more texts are unlabelled than labelled, it then learns the labels again,
    # together with what two teachers answer to these texts (teacher.py).
    training = Training(record, device, precision, out)
    if len(again):
        with training.timed("regression"):
            vectors = embed(base.encoder.eval().to(device), tokenizer, known.examples)
            second = regress(vectors, torch.eye(len(labels))[labelled.labels])[len(labelled) :]
            base.cpu()
    if not trunk:
        training.train(Stage("trunk", base), labelled, epochs["trunk"])
    if len(again):
        answers = ensemble(training.ask("model answers", base, texts.take(again)), second)
        training.train(Stage("trunk again", base), with_answers(known, answers), epochs["trunk again"])

    # 6. The exits before the last are branches on the trunk, which stays as it is. They also learn its answers.
    torch.manual_seed(options.seed)  # so that new weights do not depend on where the trunk is from
    model = add_exits(options.method, base, exit_layers)
    if len(answered):
        learned = with_answers(learned, training.ask("unlabelled", model, answered).softmax(-1))
    for stage in METHODS[options.method].stages(model):
        training.train(stage, learned, epochs[stage.name])

    # 7. The bag of words in front of the model learns the same as the branches.
    bag = None
    if has_bag:
        bag = NgramExit(config.vocab_size, len(labels), special_ids(tokenizer), are_pairs)
        with training.timed("exit 0"):
            chunks = np.array_split(np.arange(len(learned)), -(-len(learned) // 256))
            batches = [learned.batch(rows).inputs for rows in chunks]
            fit_ngrams(bag, batches, torch.from_numpy(learned.targets), embeddings)

    # 8. The record of what was trained.
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

    Raises InputError if model or trunk cannot have these exits, or texts of this length.
    """
    end, length = (trunk.model.exit_layers[-1], trunk.max_length) if trunk else (None, None)
    if options.max_length and length and options.max_length != length:  # the keys of cut texts would change
        raise InputError(f"{options.max_length}, should be {length}, as of the trunk {options.trunk}", "max_length")
    depth = end or config.num_hidden_layers
    layers = options.exit_layers or sorted({0, depth // 2, depth} if options.method == "branch" else {0, depth})
    typed = ",".join(map(str, layers))
    if layers != sorted(layers) or not (end or 1) <= layers[-1] <= depth:
        where = f"at layer {end}, as the trunk does" if end else f"at one of the layers 1 to {depth}"
        raise InputError(f"{typed}, should increase and end {where}", "exit_layers")
    if options.method == "plain" and any(layers[:-1]):
        raise InputError(f"{typed}, and exits between 0 and the last need the method branch", "exit_layers")
    return replace(
        options,
        exit_layers=layers,
        lr=options.lr or (1e-4 if config.hidden_size <= SMALL else 5e-5),  # minisweet/tried.md
        batch_size=options.batch_size or default_batch_size(config),
        max_length=options.max_length or length or MAX_LENGTH,
    )


def epochs_of(rows: int, batch_size: int, classes: int, are_single: bool = True) -> int:
    """How many epochs a stage takes, by its number of rows and classes.

    `are_single`: whether the rows are single texts with labels, neither pairs nor texts with a model's answers.
    """
    least = EPOCHS if are_single and classes > 2 else EPOCHS_OF_OTHERS
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

    def train(self, stage: Stage, texts: Texts, epochs: int) -> None:
        """Train a stage. The progress bar says what it does."""
        name = stage.name
        options = self.record.arguments
        stage = stage._replace(name=TITLES.get(name, name))
        settings = options.batch_size, options.lr, options.seed, self.device, self.precision
        try:
            with self.timed(name):
                losses = train_stage(stage, texts, epochs, *settings)
        except FloatingPointError as error:
            step = error.args[0]
            if self.out:
                save_diverged(self.out, replace(self.record, diverged=step))
            message = f"at {options.lr:g} the loss became infinite or NaN at step {step}; try a lower one"
            raise InputError(message, "lr") from None
        self.losses[name] = np.round(losses, 5).tolist()

    def ask(self, name: str, model: ExitModel, texts: Texts) -> torch.Tensor:
        """The logits (N, C) that the last exit of a model gives for N texts."""
        model = model.keep_exits([len(model.exit_layers) - 1]).eval().to(self.device)
        precision = choose_precision(self.record.arguments.amp, self.device)  # as in evaluation: float32 on a CPU
        with self.timed(name):
            logits = ask_all(model, texts, precision, title="answering unlabelled texts").logits[-1]
        model.cpu()
        return logits


def main() -> None:
    """Train one run, and choose for it."""
    parser = Parser(__doc__)
    option = parser.add_argument
    option("file", nargs="?", type=Path, metavar="FILE", help="labelled texts: .csv, .tsv or .jsonl")
    option("--unlabelled", type=Path, action="append", default=[], metavar="FILE", help="more texts; repeatable")
    names = list_of(name_of)
    option("--text-columns", type=names, help="one or two columns (default: text, sentence or sentence1,sentence2)")
    option("--label-column", metavar="NAME", help="(default: label)")
    option("--group-column", metavar="NAME", help="what a row belongs to, such as a thread; all its rows stay together")
    option("--dev-data", type=Path, metavar="FILE", help="validation rows (default: rows of FILE set aside)")
    option("--out", type=Path, help="run folder (default: runs/<the name of FILE>)")
    option("--overwrite", action="store_true", help="replace the run in --out when the new one is trained")
    parser.add_options(FitOptions, title="training")
    parser.add_options(Goal, max_lost=None, sure=None)
    args = parser.parse_args()
    options = parser.make(FitOptions, args)
    goal = goal_of(args)
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
    columns = text_columns(first, args.text_columns)
    if args.file and label in columns:
        raise InputError(f"--text-columns: {','.join(columns)}, should be one or two without the label column")

    def read(file: Path, label: str | None) -> Examples:
        own = columns if file is first else text_columns(file, args.text_columns, columns)
        for typed, column in (("--label-column", label), ("--group-column", args.group_column)):
            if column:
                find_columns(typed, file, [column])
        return read_texts(file, own, label, args.group_column)

    rows = read(first, label) if args.file else Examples([], None if len(columns) == 1 else [], None, names=[])
    validation = read(args.dev_data, label) if args.dev_data else None
    unlabelled = joined(*(read(file, None) for file in args.unlabelled)) if args.unlabelled else None
    return rows, validation, unlabelled, Columns(columns, label if args.file else None, args.group_column)
