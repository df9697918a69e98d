"""A run of own text: what training produced, in a folder. RUNS.md says what each file and key holds.

Dimension letters: K exits, C classes.
"""

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor

from minisweet.base.files import InputError, read_dataclass, read_json, write_json, written_beside
from minisweet.classifier.options import TrainingOptions
from minisweet.exits import MultiExitModel
from minisweet.fast import no_initial_weights
from minisweet.loading import OURS, WEIGHTS, load_strict, open_weights
from minisweet.texts import Examples, load_tokenizer

RECORD, CONFIG, TOKENIZER, VALIDATION = "run.json", "config.json", "tokenizer.json", "validation.jsonl"
LOGITS = "logits.safetensors"


@dataclass(frozen=True, kw_only=True)
class Record:
    """The record of a run, as in run.json."""

    id: str = ""  # the SHA-256 of the weights
    arguments: TrainingOptions  # with defaults filled in; the epochs of `fit` depend on the stage
    task: str
    labels: list[str]  # (C,)
    metric: Literal["accuracy", "matthews"]
    text_columns: list[str]  # of the task's files; empty for the toy task
    header: list[str] = field(default_factory=list)  # all columns of these files, if they have no header line
    exit_layers: list[int]  # (K,)
    depth: int  # the number of layers of the original encoder
    vocab_size: int
    losses: dict = field(default_factory=dict)  # by stage: the losses of each step
    seconds: float = 0.0  # of training
    subset: list[int]  # the rows that were trained on
    weights: str  # the SHA-256 of the file that the training started from
    trained_keys: list[int]  # the keys of the texts that were trained on
    device: str
    precision: str
    versions: dict
    fit: dict | None = None  # what `minisweet fit` adds; None for a run of train.py


def run_name(options: TrainingOptions, task: str) -> str:
    """The default name of a run's folder."""
    name = f"{Path(os.path.realpath(options.model)).name}-{options.method}-{task}-seed{options.seed}"
    return name + "-lte" * (options.exit_strategy == "lte")


def versions() -> dict[str, str]:
    """The versions of Python, the operating system and the libraries."""
    libraries = {name: version(name) for name in ("torch", "tokenizers", "safetensors", "numpy")}
    return {"python": platform.python_version(), "system": platform.platform(), **libraries}


def weights_id(model: MultiExitModel) -> str:
    """The id of a run: the SHA-256 of its model's weights."""
    return hashlib.sha256(save(model.state_dict())).hexdigest()


def check_output(out: Path, overwrite: bool) -> None:
    """Raise InputError if `out` cannot be written, or holds anything but a run to `overwrite`."""
    if is_run(out):
        if not overwrite:
            raise InputError(f"{out} holds a run already; name another folder, or pass --overwrite", "out")
        if "arguments" not in read_json(out / RECORD):
            raise InputError(f"{out / RECORD} is not that of a run; name another folder", "out")
    elif os.path.lexists(out) and not (out.is_dir() and not os.listdir(out)):
        raise InputError(f"{out} exists and is not a run; name another folder", "out")
    target = Path(os.path.realpath(out))  # as `written_beside`
    if os.path.ismount(target):
        raise InputError(f"{out} is a mount point, which cannot be replaced; name a folder in it", "out")
    folder = next(path for path in target.parents if path.exists())
    try:
        os.rmdir(tempfile.mkdtemp(".partial", f".{out.name}.", folder))  # as `written_beside` will do
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror})", "out") from None


def save_run(
    out: Path,
    record: Record,
    model: MultiExitModel,
    tokenizer: Tokenizer,
    validation: Examples,
    more: Mapping[str, bytes] | None = None,
    overwrite: bool = True,
) -> None:
    """Write a run to a folder, whole or not at all. With `overwrite` an existing run is replaced.

    The record holds the id of the weights. `more` are further files, by name.
    """
    with written_beside(out, overwrite) as folder:
        folder.mkdir()
        write_json(folder / RECORD, asdict(record))
        (folder / WEIGHTS).write_bytes(save(model.state_dict(), {"id": record.id}))
        config = model.encoder.config
        content = asdict(config) | {"num_hidden_layers": record.depth}
        write_json(folder / CONFIG, content | {"model_type": OURS, "encoder_type": config.model_type})
        (folder / TOKENIZER).write_text(tokenizer.to_str(), encoding="utf-8")
        with (folder / VALIDATION).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows_of(validation, record.labels))
        for name, content_of_file in (more or {}).items():
            (folder / name).write_bytes(content_of_file)


def rows_of(examples: Examples, labels: list[str]) -> list[dict]:
    """The rows of validation.jsonl. The label of a row without one is null."""
    first = "text" if examples.second is None else "sentence1"
    columns: dict[str, Any] = {first: examples.first, "sentence2": examples.second, "group": examples.groups}
    names = [*labels, None]  # index -1 is None: no label
    columns["label"] = [names[label] for label in examples.labels or ()]
    columns = {name: values for name, values in columns.items() if values}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def is_run(folder: Path) -> bool:
    """Whether `folder` holds a run."""
    return os.path.isfile(folder / RECORD)


def read_record(folder: Path) -> Record:
    """Read the record of a run. Raises InputError if there is none, or it is not of this version."""
    if not is_run(folder):
        raise InputError(f"{folder}: no run here (it has no {RECORD}); train one with train.py or minisweet fit")
    content = read_json(folder / RECORD)
    if "dev_rows" in content:
        raise InputError(f"{folder}: a run of train.py, which is evaluated by: python evaluate.py {folder}")
    if "fit" not in content:
        raise InputError(f"{folder}: a run of an earlier version of minisweet; train it again")
    return read_dataclass(Record, folder / RECORD, content)


def load_weights(folder: Path, record: Record, make: Callable[[], Any]) -> Any:
    """Make a model and load the weights of a run into it, if they are those of its record; see `load_model`."""
    slices, metadata = open_weights(folder)
    if metadata.get("id") != record.id:
        raise InputError(f"{folder / WEIGHTS}: belongs to another run than {RECORD} beside it")
    with no_initial_weights():
        model = make()
    load_strict(model, slices, folder)
    return model.eval()


def load_run_tokenizer(folder: Path, record: Record) -> Tokenizer:
    """Load the tokenizer of a run, which cuts texts as the training did."""
    return load_tokenizer(folder, record.vocab_size, record.arguments.max_length)


def read_validation(folder: Path, record: Record) -> Examples:
    """Read the validation rows of a run. Raises InputError if they cannot be read."""
    numbers = {name: number for number, name in enumerate(record.labels)} | {None: -1}
    try:
        with (folder / VALIDATION).open(encoding="utf-8", newline="\n") as file:
            rows = [json.loads(line) for line in file]
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        first = columns["text" if "text" in columns else "sentence1"]
        labels = [numbers[label] for label in columns["label"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{folder / VALIDATION}: not readable ({error!r:.200})") from None
    return Examples(first, columns.get("sentence2"), labels, groups=columns.get("group"))


def read_tensors(path: Path, run_id: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a file.

    Raises InputError if it is missing, broken, or of another run than `run_id`.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            facts = file.metadata() or {}
    except Exception as error:  # of the disk or of safetensors, according to what is wrong with the file
        raise InputError(f"{path}: not readable ({error})") from None
    if facts.get("id") != run_id:
        raise InputError(f"{path}: belongs to other weights than the model beside it")
    return tensors, facts
