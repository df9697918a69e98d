"""A run on your own text: load it, choose what to deploy, and classify texts.

The bag of words is asked about all texts, and the model about those that stay. RUNS.md lists the files of a run.
"""

import copy
import hashlib
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from safetensors.torch import save as to_bytes
from tokenizers import Tokenizer
from torch import Tensor

from minisweet import run as run_folder
from minisweet.adaptive import in_float32, leaves
from minisweet.base.commands import Parser, number, whole_number
from minisweet.base.devices import choose_device, choose_precision, tokens_at_once
from minisweet.base.files import LOG, InputError, read_dataclass, write_json
from minisweet.classifier.bag_of_words import NgramExit
from minisweet.classifier.operating_point import OperatingPoint
from minisweet.classifier.promise import Goal
from minisweet.classifier.rows import texts_of
from minisweet.classifier.selection import choose
from minisweet.classifier.split import units_of
from minisweet.exits import ExitModel
from minisweet.live import Decisions, early_exit
from minisweet.options import TrainingOptions
from minisweet.outputs import BATCH_SIZE, Outputs, ask_all, check_finite, read_outputs, read_tensors, write_outputs
from minisweet.run import LOGITS, Record
from minisweet.texts import Examples, Texts

BAG, OPERATING = "bag_of_words.safetensors", "operating.json"
ANSWERING = ("point", "model", "bag", "tokenizer")  # the parts of a run that answer
AT_ONCE = 1024  # texts that the bag of words is asked about, so that those that stay fill batches
TYPES = {"str": str, "int": int, "float": float, "bool": "True".__eq__}  # names of labels back to labels
THRESHOLD, AT_MOST = number(0, 1), whole_number(1)


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What `minisweet fit` adds to the record of a run: `fit` in run.json."""

    label_type: Literal["str", "int", "float", "bool"] = "str"  # of the labels that Python's `fit` got
    label_column: str | None = None
    group_column: str | None = None
    set_aside: float = 1.0  # the share of the labelled rows that validates; 1 if they come from a file of their own
    trunk: str | None = None  # the run or classifier that the training started from
    dev_size: float = 0.2
    combines: bool = False  # whether the bag of words contributes to full depth
    trained_groups: list[str] = field(default_factory=list)  # hashes of the groups that were learned from
    validated_groups: list[str] = field(default_factory=list)  # the same, of the groups that validate


class OwnRun(NamedTuple):
    """A run. Parts that were not loaded, or not made so far, are None."""

    record: Record
    model: ExitModel | None = None  # in evaluation mode, on the CPU
    bag: NgramExit | None = None  # exit 0
    tokenizer: Tokenizer | None = None
    texts: Texts | None = None  # the validation rows
    outputs: Outputs | None = None  # for the validation rows: of the bag of words, then of the model
    point: OperatingPoint | None = None


class Deployed(NamedTuple):
    """A run that is ready to answer. It is replaced as a whole, so that several threads may share a classifier."""

    run: OwnRun
    threshold: float  # that of the operating point, or another one
    device: torch.device  # of the run's bag and model
    amp: str  # as in the options
    precision: torch.dtype | None  # to autocast to
    batch_size: int  # texts that run at once
    labels: list  # (C,), of the type that was trained on


class Answer(NamedTuple):
    """The answer to one text, by the exit that was taken."""

    label: object  # of the type that was trained on
    confidence: float  # that the exit is right, or, if a run was made without labels, agrees with full depth
    exit_layer: int  # counted from 1; 0 for exit 0, the bag of words
    probabilities: dict  # of all labels, after temperature scaling
    words: tuple[dict[str, float], dict[str, float]] | None = None  # at exit 0, set by `explain` alone


def fitted_of(record: Record) -> Fitted:
    """What `fit` added to a record."""
    return read_dataclass(Fitted, "run.json: fit", record.fit)


def group_hash(group: str) -> str:
    """What a run keeps of a group's name."""
    return hashlib.sha256(group.encode()).hexdigest()[:16]


def in_groups(rows: Examples, known: Sequence[str]) -> np.ndarray:
    """Whether each row (N,) belongs to one of some groups, of which the hashes are known."""
    return np.isin([group_hash(group or "") for group in rows.groups or [None] * len(rows.first)], known)


def deploy(
    run: OwnRun, threshold: float | None = None, device: str = "auto", amp: str = "auto", batch_size: int = 32
) -> Deployed:
    """Prepare a run to answer. `threshold` is None for the one that was chosen."""
    point = run.point
    place = choose_device(device)
    precision = choose_precision(amp, place)
    if threshold is None and point.precision != str(precision or torch.float32) and point.threshold < 1:
        message = "the promise was made in %s, and this is %s: choose again with this --amp"
        LOG.warning(message, point.precision, precision or torch.float32)
    threshold = in_float32(point.threshold if threshold is None else threshold)
    labels = [TYPES[fitted_of(run.record).label_type](name) for name in run.record.labels]
    run.bag.to(place), run.model.to(place)
    return Deployed(run, threshold, place, amp, precision, batch_size, labels)


def add_options(parser: Parser) -> None:
    """Add the options that `deployed_of` reads."""
    option = parser.add_argument
    option("run", type=Path, metavar="RUN", help="run folder")
    about = "exit at this confidence; at 1 all texts run to the last exit (default: the one that was chosen)"
    option("--threshold", type=THRESHOLD, help=about)
    option("--batch-size", type=AT_MOST, default=32, help="texts that run at once (default: 32)")
    parser.add_options(TrainingOptions, "device", "amp")


def deployed_of(args: Namespace, *parts: str) -> Deployed:
    """Load and deploy the run that a command's options name. `parts` are loaded in addition."""
    return deploy(load_run(args.run, *ANSWERING, *parts), args.threshold, args.device, args.amp, args.batch_size)


def tokenize(deployed: Deployed, texts: Iterable[str]) -> Texts:
    """Tokenise texts. Raises InputError, naming the item, for anything else."""
    return Texts(deployed.run.tokenizer, texts_of(texts))


def classify(deployed: Deployed, texts: Texts) -> list[Answer]:
    """Answer texts, in their order."""
    answers: dict[int, Answer] = {}
    for pool in texts.by_length(max(AT_ONCE, deployed.batch_size)):
        decisions = decide(deployed, *pool.to(deployed.device).inputs)
        answers.update(zip(pool.rows.tolist(), answers_of(deployed, decisions), strict=True))
    return [answers[row] for row in range(len(texts))]


@torch.no_grad()
def decide(deployed: Deployed, ids: Tensor, mask: Tensor, types: Tensor) -> Decisions:
    """Ask the bag of words about B texts, and the model about those that stay."""
    batch_size, precision, rule = deployed.batch_size, deployed.precision, deployed.run.point.rule
    lengths = mask.sum(1).clamp(min=1)  # (B,)
    confidence = torch.zeros_like(lengths, dtype=torch.float32)  # (B,)
    logits = confidence.new_zeros(len(lengths), rule.num_labels)  # (B, C)
    for rows in lengths.argsort(descending=True, stable=True).split(batch_size):  # similar lengths together
        logits[rows] = rule.calibrated(0, deployed.run.bag(*(x[rows, : lengths[rows[0]]] for x in (ids, mask))))
        confidence[rows] = rule.confidence(0, logits[rows], None)
    stay = (~leaves(confidence, deployed.threshold, rule.lowest)).nonzero().squeeze(1)  # (R,), those that go on
    with torch.autocast(deployed.device.type, precision, enabled=precision is not None):
        later = early_exit(deployed.run.model, *(x[stay] for x in (ids, mask, types)), 1.0, batch_size=batch_size)
    logits[stay] = rule.full_depth(later.logits, logits[stay])
    confidence[stay] = rule.confidence(1, logits[stay], None)
    exits = torch.zeros_like(lengths)
    exits[stay] = 1
    return Decisions(logits.argmax(-1), exits, logits, confidence)


def answers_of(deployed: Deployed, decisions: Decisions) -> list[Answer]:
    """Decisions about N texts as answers."""
    names, layers = deployed.labels, (0, deployed.run.record.depth)
    labels, exits, logits, confidence = (tensor.cpu() for tensor in decisions)
    columns = map(Tensor.tolist, (labels, confidence, exits, logits.softmax(-1)))
    return [
        Answer(names[label], sure, layers[k], dict(zip(names, probabilities, strict=True)))
        for label, sure, k, probabilities in zip(*columns, strict=True)
    ]


@torch.no_grad()
def ask_exits(model: ExitModel, bag: NgramExit, texts: Texts, precision: torch.dtype | None) -> Outputs:
    """Run both exits on all texts: the bag of words in float32, and the model (see `ask_all`)."""
    outputs = ask_all(model, texts, precision)
    device = next(model.parameters()).device
    rows, logits = [], []
    for batch in texts.by_length(BATCH_SIZE, tokens_at_once(device)):
        rows.append(batch.rows)
        logits.append(bag(*batch.to(device).inputs[:2]).cpu())
    of_bag = torch.cat(logits)[torch.cat(rows).argsort()]  # (N, C)
    exits = outputs.exits._replace(layers=[0, *outputs.exits.layers])
    outputs = outputs._replace(logits=torch.cat([of_bag[None], outputs.logits]), exits=exits)
    if cut := int(texts.is_cut.sum()):
        LOG.info("cut to %d tokens: %s texts", texts.lengths.max(), f"{cut:,}")
    return outputs if (outputs.labels >= 0).any() else outputs._replace(metric="agreement")


def choose_for(run: OwnRun, goal: Goal, device: str, amp: str, folder: Path | None = None) -> OwnRun:
    """Choose what to deploy of a run. Both exits are run first, unless there are outputs in this precision.

    A run that was loaded without its model is read from `folder`. Raises InputError if logits are infinite or NaN.
    """
    record, outputs = run.record, run.outputs
    place = choose_device(device)
    precision = choose_precision(amp, place)
    if outputs is None or outputs.precision != str(precision or torch.float32):
        asked = run if run.model else load_run(folder, "model", "bag", "texts")
        model, bag = asked.model, asked.bag
        if next(model.parameters()).device != place:
            model, bag = copy.deepcopy((model, bag))  # other threads may answer with these weights
        outputs = ask_exits(model.to(place), bag.to(place), asked.texts, precision)
        check_finite(outputs, folder or "the run")
    point = choose(outputs, goal, record.trained_keys, combines=fitted_of(record).combines)
    return run._replace(outputs=outputs, point=replace(point, id=record.id))


def load_run(folder: Path, *parts: str) -> OwnRun:
    """Load the record of a run and the named parts. Raises InputError if one is missing, broken or of another run."""
    record = run_folder.read_record(folder)
    if record.fit is None:
        raise InputError(f"{folder}: a run of train.py, which is evaluated by: python evaluate.py {folder}")
    readers = {"model": run_folder.load_model, "bag": load_bag, "tokenizer": run_folder.load_run_tokenizer}
    readers |= {"texts": load_texts, "outputs": load_outputs, "point": read_point}
    return OwnRun(record, **{part: readers[part](folder, record) for part in parts})


def load_bag(folder: Path, record: Record) -> NgramExit:
    """Load the bag of words of a run."""
    bag = NgramExit(record.vocab_size, len(record.labels), [])
    bag.load_state_dict(read_tensors(folder / BAG, record.id)[0])
    return bag


def load_texts(folder: Path, record: Record) -> Texts:
    """Load the validation rows of a run, tokenised."""
    texts = Texts(run_folder.load_run_tokenizer(folder, record), run_folder.read_validation(folder, record))
    texts.units = units_of(texts) if texts.examples.groups else None
    return texts


def load_outputs(folder: Path, record: Record) -> Outputs:
    """Load the outputs of both exits for the validation rows."""
    try:
        return read_outputs(folder / LOGITS, record.id)
    except InputError as error:
        raise InputError(f"{error}; make it again: minisweet choose {folder}") from None


def read_point(folder: Path, record: Record) -> OperatingPoint:
    """Read the operating point of a run."""
    path = folder / OPERATING
    if not path.is_file():
        raise InputError(f"{folder}: has no {OPERATING}; first: minisweet choose {folder}")
    point = read_dataclass(OperatingPoint, path)
    if point.id != record.id:
        raise InputError(f"{path}: belongs to other weights than the model beside it; first: minisweet choose {folder}")
    return point


def write_chosen(folder: Path, run: OwnRun) -> None:
    """Write what `choose` may change: the outputs and the operating point."""
    write_outputs(folder / LOGITS, run.outputs, run.record.id)
    write_json(folder / OPERATING, asdict(run.point))


def save(out: Path, run: OwnRun, overwrite: bool = True) -> None:
    """Write a whole run to a folder, whole or not at all. An existing run is replaced, or refused."""

    def add_files(folder: Path) -> None:
        write_chosen(folder, run)
        (folder / BAG).write_bytes(to_bytes(run.bag.state_dict(), {"id": run.record.id}))

    run_folder.save_run(out, run.record, run.model, run.tokenizer, run.texts.examples, add_files, overwrite)
