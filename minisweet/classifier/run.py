"""A run of own text: a folder with what `fit` produced. RUNS.md says what each file and key holds.

The id of a run is a hash of the model, the bag of words, the labels and the validation rows. Each file carries it, so
that the files of two runs cannot be mixed, even if both were made with one trunk.

Dimension letters: N validation rows, C classes.
"""

import hashlib
import json
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from minisweet.base.devices import choose_precision
from minisweet.base.files import LOG, InputError, json_lines, read_dataclass, read_json, write_json, written_beside
from minisweet.classifier import report
from minisweet.classifier.bag_of_words import NgramExit
from minisweet.classifier.cascade import Cascade, in_float32
from minisweet.classifier.probe import FullModel
from minisweet.classifier.promise import OperatingPoint
from minisweet.classifier.split import class_numbers
from minisweet.exits import ExitHead
from minisweet.fast import no_initial_weights
from minisweet.loading import OURS, WEIGHTS, load_strict, new_encoder, open_weights, read_config
from minisweet.run import environment
from minisweet.texts import Examples, Texts, load_tokenizer

RECORD, CONFIG, TOKENIZER, VALIDATION = "run.json", "config.json", "tokenizer.json", "validation.jsonl"
BAG, LOGITS, OPERATING = "bag_of_words.safetensors", "logits.safetensors", "operating.json"
ARGUMENTS = "model trunk dev_size seed lr epochs batch_size max_length device amp".split()  # that made a run
PROGRAM = "minisweet fit"  # `program` in run.json
OF_ANOTHER = f"belongs to another run than {RECORD} beside it"


class Validation(NamedTuple):
    """The validation rows."""

    texts: Texts  # N rows, with classes, -1 for none
    roles: np.ndarray  # (N,), see split.py
    logits: Tensor  # (2, N, C), of the bag of words and of the model, in float32


def hash_of(content: str | bytes) -> str:
    """The SHA-256 of a text or of bytes."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def id_of(model: FullModel, bag: NgramExit, labels: list, validation: str) -> str:
    """The id of a run, from its parts and the hash of its validation rows."""
    parts = [hash_of(save(model.state_dict())), hash_of(save(bag.state_dict())), json.dumps(labels), validation]
    return hash_of("\n".join(parts))


def new_record(
    options: Namespace, model: FullModel, labels: list, learned: Texts, validating: Texts, trunk: Any, **about: Any
) -> Namespace:
    """The record of a training that is about to start: the keys of run.json. `about` are further keys."""
    groups, validated = ({*filter(None, part.examples.groups or ())} for part in (learned, validating))
    return Namespace(
        program=PROGRAM,
        arguments={name: value for name, value in vars(options).items() if name in ARGUMENTS},
        labels=labels,
        depth=model.encoder.depth,
        validation_rows=len(validating),
        validation=hash_of(lines_of(validating.examples, labels)),
        weights=options.weights,
        trained_keys=sorted({*learned.keys.tolist(), *(trunk.trained_keys if trunk else ())}),
        training_groups=sorted({*groups, *(trunk.training_groups if trunk else ())}),
        validation_groups=sorted(validated - groups),
        **environment(options.place, choose_precision(options.amp, options.place, training=True)),
        **about,
    )


def save_run(
    out: Path, cascade: Cascade, point: OperatingPoint, record: Namespace, validation: Validation, overwrite: bool
) -> None:
    """Write a run to a folder, whole or not at all. An existing run is replaced, or refused."""
    with written_beside(out, overwrite) as folder:
        folder.mkdir()
        write_json(folder / RECORD, vars(record))
        for name, module in ((WEIGHTS, cascade.model), (BAG, cascade.bag)):
            (folder / name).write_bytes(save(module.state_dict(), {"id": record.id}))
        config = cascade.model.encoder.config
        write_json(folder / CONFIG, asdict(config) | {"model_type": OURS, "encoder_type": config.model_type})
        (folder / TOKENIZER).write_text(cascade.tokenizer.to_str(), encoding="utf-8")
        (folder / VALIDATION).write_text(lines_of(validation.texts.examples, record.labels), encoding="utf-8")
        save_choice(folder, point, validation)


def save_choice(folder: Path, point: OperatingPoint, validation: Validation) -> None:
    """Write what was chosen into the folder of the run."""
    tensors = {"logits": validation.logits, "roles": torch.from_numpy(validation.roles)}
    for name, content in ((LOGITS, save(tensors, {"id": point.id})), (OPERATING, json_lines(asdict(point)).encode())):
        with written_beside(folder / name) as new:
            new.write_bytes(content)


def lines_of(examples: Examples, labels: list) -> str:
    """The lines of validation.jsonl. The label of a row without one is null."""
    names = [*labels, None]  # index -1 is None
    columns: dict[str, Any] = {"text": examples.first, "label": [names[label] for label in examples.labels or ()]}
    if examples.groups:
        columns["group"] = examples.groups
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_record(folder: Path) -> Namespace:
    """Read the record of a run. Raises InputError if there is none, or it is not of `minisweet fit` in this version."""
    if not (folder / RECORD).is_file():
        raise InputError(f"{folder}: no run here (it has no {RECORD}); train one with minisweet fit")
    content = read_json(folder / RECORD)
    if content.get("program") == PROGRAM:
        return Namespace(**content)
    if content.get("fit"):
        raise InputError(f"{folder}: a run of an earlier version of minisweet; train it again")
    raise InputError(f"{folder}: a run of train.py, which is evaluated by: python evaluate.py {folder}")


def check_id(path: Path, run_id: str) -> Path:
    """The path of a file of tensors. Raises InputError if it is missing, broken, or of another run."""
    try:
        with safe_open(path, "pt") as file:
            found = (file.metadata() or {}).get("id")
    except Exception as error:  # of the disk or of safetensors, according to what is wrong with the file
        raise InputError(f"{path}: not readable ({error})") from None
    if found != run_id:
        raise InputError(f"{path}: {OF_ANOTHER}")
    return path


def load_model(folder: Path, record: Namespace) -> FullModel:
    """Load the model of a run, in evaluation mode and on the CPU."""
    slices, _ = open_weights(check_id(folder / WEIGHTS, record.id).parent)
    with no_initial_weights():
        encoder, C = new_encoder(read_config(folder), record.depth), len(record.labels)
        is_linear = "head.weight" in slices
        model = FullModel(encoder, nn.Linear(encoder.config.hidden_size, C) if is_linear else ExitHead(encoder, C))
    load_strict(model, slices, folder)
    return model.eval()


def load_cascade(folder: Path, options: Namespace) -> tuple[Namespace, Cascade, OperatingPoint]:
    """Load the record of a run, its cascade and its operating point.

    The options are a threshold (None for the one that was chosen), place, precision and batch_size. Raises InputError
    if a file is missing, broken or of another run.
    """
    record, point = read_record(folder), read_dataclass(OperatingPoint, folder / OPERATING)
    if point.id != record.id:
        raise InputError(f"{folder / OPERATING}: {OF_ANOTHER}")
    model = load_model(folder, record).to(options.place)
    size = model.encoder.config.vocab_size
    bag = NgramExit(size, len(record.labels), [])
    bag.load_state_dict(load_file(check_id(folder / BAG, record.id)))
    tokenizer = load_tokenizer(folder, size, record.arguments["max_length"])
    threshold = point.threshold if options.threshold is None else in_float32(options.threshold)
    parts = tokenizer, record.labels, bag.to(options.place), model, point.rule, threshold
    cascade = Cascade(*parts, options.place, options.precision, options.batch_size)
    if options.threshold is None and point.threshold < 1 and point.precision != str(cascade.precision or torch.float32):
        LOG.warning(report.promise_of(cascade, point, record))
    return record, cascade, point


def load_validation(folder: Path, record: Namespace, cascade: Cascade) -> Validation:
    """Load the validation rows. Raises InputError if they are not exactly the rows of this run."""
    path = folder / VALIDATION
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise InputError(f"{path}: not readable ({error})") from None
    if hash_of(text) != record.validation:
        count = text.count("\n")
        raise InputError(f"{path}: {OF_ANOTHER}, or changed: {count:,} rows, should be {record.validation_rows:,}")
    rows = [json.loads(line) for line in text.split("\n")[:-1]]
    labels = class_numbers([row["label"] for row in rows], record.labels).tolist()
    groups = [row.get("group") for row in rows]
    examples = Examples([row["text"] for row in rows], None, labels, groups=groups if any(groups) else None)
    tensors = load_file(check_id(folder / LOGITS, record.id))
    return Validation(Texts(cascade.tokenizer, examples), tensors["roles"].numpy(), tensors["logits"])
