"""A run: what train.py produced, in a folder. RUNS.md says what each file and key holds.

Dimension letters: C classes, K exits.
"""

import hashlib
import os
import platform
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import nn

from minisweet import fast
from minisweet.base.devices import device_name
from minisweet.base.files import InputError, read_dataclass, read_json, write_json, written_beside
from minisweet.config import Config
from minisweet.exits import MultiExitModel, build_models
from minisweet.loading import OURS, WEIGHTS, load_strict, new_encoder, open_weights
from minisweet.tasks import load_examples
from minisweet.texts import Examples

RECORD, CONFIG, TOKENIZER = "run.json", "config.json", "tokenizer.json"
LOGITS, EVALUATION, CURVE = "logits.safetensors", "evaluation.json", "curve.png"  # what evaluate.py adds


@dataclass(frozen=True, kw_only=True)
class Run:
    """What run.json holds: the options of a training, with defaults filled in, and what the training found."""

    model: str
    method: str
    exit_layers: list[int]  # (K,)
    exit_strategy: str
    task: str
    data_dir: str
    train_size: int
    max_length: int
    lr: float
    epochs: int
    batch_size: int
    seed: int
    amp: str
    labels: list[str]  # (C,)
    metric: str  # a key of METRICS
    text_columns: list[str]  # of the task's files; empty for the toy task
    header: list[str]  # all columns of these files, if they have no header line
    subset: list[int]  # the rows that were trained on
    train_rows: str  # `Examples.digest` of all training rows, like the next one
    dev_rows: str
    weights: str  # the SHA-256 of the file that the training started from
    losses: list[list[list[float]]]  # of each model, by step and exit
    seconds: float  # of training
    device: str
    precision: str
    versions: dict[str, str]
    id: str = ""  # the SHA-256 of the weights, also in their metadata

    def examples(self, split: str, data_dir: Path | None = None) -> Examples:
        """The "train" or "dev" rows of the run's task. Raises InputError if they are not those of the training."""
        folder = data_dir or Path(self.data_dir)
        rows = load_examples(self.task, split, folder)
        if rows.digest() != (self.train_rows if split == "train" else self.dev_rows):
            raise InputError(f"{folder}: its {split} rows of {self.task} are not those of the training", "data_dir")
        return rows


def run_name(args: Namespace) -> str:
    """The default name of a run's folder."""
    name = f"{Path(os.path.realpath(args.model)).name}-{args.method}-{args.task}-seed{args.seed}"
    return name + "-lte" * (args.exit_strategy == "lte")


def environment(device: torch.device, precision: torch.dtype | None) -> dict[str, Any]:
    """The environment of a computation: the device, the precision, and the versions of the software."""
    versions = {name: version(name) for name in ("torch", "tokenizers", "safetensors", "numpy")}
    versions |= {"python": platform.python_version(), "system": platform.platform()}
    return {"device": device_name(device), "precision": str(precision or torch.float32), "versions": versions}


def check_output(out: Path, overwrite: bool) -> None:
    """Raise InputError if `out` cannot be written, or holds anything but a run to `overwrite`."""
    if (out / RECORD).is_file():
        if not overwrite:
            raise InputError(f"{out} holds a run already; name another folder, or pass --overwrite", "out")
        if "id" not in read_json(out / RECORD):
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
    out: Path, run: Run, models: Sequence[MultiExitModel], config: Config, tokenizer: Tokenizer, overwrite: bool
) -> None:
    """Write a run to a folder, whole or not at all. With `overwrite` an existing run is replaced."""
    tensors = nn.ModuleList(models).state_dict()
    run_id = hashlib.sha256(save(tensors)).hexdigest()
    with written_beside(out, overwrite) as folder:
        folder.mkdir()
        (folder / WEIGHTS).write_bytes(save(tensors, {"id": run_id}))
        write_json(folder / RECORD, asdict(run) | {"id": run_id})
        write_json(folder / CONFIG, asdict(config) | {"model_type": OURS, "encoder_type": config.model_type})
        (folder / TOKENIZER).write_text(tokenizer.to_str(), encoding="utf-8")


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run of train.py, of this version."""
    return (folder / RECORD).is_file() and "dev_rows" in read_json(folder / RECORD)


def read_run(folder: Path) -> Run:
    """Read a run's record. Raises InputError if there is none, or it is of `minisweet fit` or an earlier version."""
    if not (folder / RECORD).is_file():
        raise InputError(f"{folder}: no run here (it has no {RECORD}); train one with train.py")
    if not is_run(folder):
        raise InputError(f"{folder}: a run of minisweet fit (see minisweet test --help) or of an earlier version")
    return read_dataclass(Run, folder / RECORD)


def load_models(folder: Path, run: Run, config: Config) -> list[MultiExitModel]:
    """Load the models of a run in float32, in evaluation mode and on the CPU.

    Raises InputError if the weights are missing, broken or of another run.
    """
    slices, metadata = open_weights(folder)
    if metadata.get("id") != run.id:
        raise InputError(f"{folder / WEIGHTS}: belongs to another run than {RECORD} beside it")
    with fast.no_initial_weights():
        first_layers = partial(new_encoder, config)
        models = build_models(run.method, first_layers, run.exit_layers, len(run.labels), run.exit_strategy)
    load_strict(nn.ModuleList(models), slices, folder)
    return [model.eval() for model in models]
