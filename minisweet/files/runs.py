"""Run folders: all that made a fine-tuned model, next to the model.

run.json            arguments, versions, device, the training subset's row numbers, the loss of each step and exit
model.safetensors   the fine-tuned weights, encoder and heads
config.json, tokenizer files   copied from the model that was fine-tuned
evaluation.json     written by evaluate.py
diverged.json       alone, where the loss became infinite or NaN: the arguments, and when
"""

import math
import platform
import re
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from minisweet.data.tasks import TASKS
from minisweet.data.text import TOKENIZER_FILES
from minisweet.exits import EXIT_STRATEGIES, METHODS, MultiExitModel, MultiModel, check_exit_layers
from minisweet.files.checkpoint import new_encoder, read_config
from minisweet.files.safe import InputError, partial_path, read_json, write_json, written_beside

DIVERGED = "diverged.json"
FILES = {"run.json", "model.safetensors", "config.json", "evaluation.json", "logits.safetensors", *TOKENIZER_FILES}
# The suffixes of a method's name (sweet-flow0.5) to train.py's options.
BOUNDARIES = {"flow": "gradient_flow", "cap": "gradient_cap", "owner": "owner_cap"}
# What is needed of run.json, and when it is usable.
RECORD = {
    "model": lambda value: isinstance(value, str),
    "method": lambda value: value in METHODS,
    "exit_strategy": lambda value: value in EXIT_STRATEGIES,
    "depth": lambda value: type(value) is int,
    "device": lambda value: isinstance(value, str),
    "precision": lambda value: isinstance(value, str),
    "task": lambda value: isinstance(value, str) and value in TASKS,
    "exit_layers": lambda value: isinstance(value, list) and all(type(n) is int for n in value),
    "losses": lambda value: isinstance(value, list) and len(value) > 0,
    "arguments": lambda value: (
        isinstance(value, dict)
        and isinstance(value.get("data_dir"), str)
        and type(value.get("max_length")) is int
        and all(isinstance(value.get(option), float | int | None) for option in BOUNDARIES.values())
    ),
}


def method_name(arguments: dict) -> str:
    """The method of train.py's arguments with what passes its boundaries: ee, sweet, sweet-flow0.5, sweet-owner1."""
    values = {name: arguments.get(option) for name, option in BOUNDARIES.items()}
    return arguments["method"] + "".join(f"-{name}{value:.12g}" for name, value in values.items() if value is not None)


def run_name(arguments: dict) -> str:
    """The name of a run's folder, by train.py's arguments."""
    name = f"{Path(arguments['model']).resolve().name}-{method_name(arguments)}-{arguments['task']}"
    return f"{name}-seed{arguments['seed']}" + "-lte" * (arguments["exit_strategy"] == "lte")


def method_arguments(name: str) -> dict:
    """The arguments that `method_name` makes `name` of. Raises ValueError for another name."""
    method, _, boundary = name.partition("-")
    match = re.fullmatch(r"(flow|cap|owner)([0-9][0-9.e+-]*)", boundary)
    if method not in METHODS or (boundary and not (match and method == "sweet")):
        raise ValueError(name)
    arguments = {"method": method} | dict.fromkeys(BOUNDARIES.values())
    if match:
        arguments[BOUNDARIES[match[1]]] = float(match[2])
        if math.isinf(float(match[2])) or (arguments["gradient_flow"] or 0) > 1:
            raise ValueError(name)
    return arguments


def check_output(out: Path, overwrite: bool) -> None:
    """Raise InputError if a run must not, or cannot, be written to `out`."""
    try:
        names = {path.name for path in out.iterdir()} if out.exists() else set()
        if names == {DIVERGED}:
            names = set()
        if names and ("run.json" not in names or names - FILES):
            raise InputError(f"--out: {out} holds other files than a run's; name a folder that is new, empty, or a run")
        if names and not overwrite:
            raise InputError(f"--out: {out} holds a run already; name another folder, or pass --overwrite")
        partial = partial_path(out.resolve())
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()  # try it now, rather than after hours of training
        partial.rmdir()
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"--out: {out} cannot be written ({error})") from None


def save_run(out: Path, model: torch.nn.Module, model_folder: Path, record: dict, overwrite: bool) -> None:
    """Write a run folder, whole or not at all. Raises InputError as `check_output` does."""
    check_output(out, overwrite)
    with written_beside(out.resolve()) as partial:
        partial.mkdir()
        (partial / "model.safetensors").write_bytes(save(model.state_dict()))
        for name in ("config.json", *TOKENIZER_FILES):
            if (model_folder / name).is_file():
                shutil.copyfile(model_folder / name, partial / name)
        write_json(partial / "run.json", record)


def read_record(run: Path) -> dict:
    """Read a run's run.json. Raises InputError for a folder that is no run, or a broken one."""
    path = run / "run.json"
    if not path.is_file():
        raise InputError(f"{run}: no run here (it has no run.json); train one with train.py")
    record = read_json(path)
    arguments = record.get("arguments")
    if isinstance(arguments, dict):  # new runs say these in their arguments alone, older ones twice
        said = {key: arguments[key] for key in ("model", "method", "task", "seed", "exit_strategy") if key in arguments}
        record = said | {"learning_rate": arguments.get("lr")} | record
    record = {"exit_strategy": "confidence"} | record  # runs made before there was another do not tell it
    for key, is_right in RECORD.items():
        if not is_right(record.get(key)):
            raise InputError(f"{path}: {key} is {record.get(key)!r:.200}, which is nothing that train.py writes")
    return record


def load_run(run: Path) -> tuple[MultiExitModel | MultiModel, dict]:
    """Load a run's model to predict with, in float32 and on the CPU, and its run.json.

    `depth` and `vocab_size` in it are those of config.json.
    Raises InputError for a folder that is no run, or a broken one.
    """
    record = read_record(run)
    config = read_config(run)
    strategy = record["exit_strategy"]
    exit_layers, method, num_labels = record["exit_layers"], record["method"], len(TASKS[record["task"]].labels)
    try:
        check_exit_layers(exit_layers, config.num_hidden_layers)
        with torch.device("meta"):  # shapes only, the weights follow
            if method == "mm":
                model = MultiModel(_model(config, (n,), num_labels, "sweet", strategy) for n in exit_layers)
            else:
                model = _model(config, exit_layers, num_labels, method, strategy)
        model.load_state_dict(load_file(run / "model.safetensors"), assign=True)
    except (ValueError, OSError, SafetensorError) as error:
        raise InputError(f"{run}: not a whole run ({' '.join(str(error).split())})") from None
    except RuntimeError:
        raise InputError(
            f"{run / 'model.safetensors'}: not the weights that run.json and config.json tell of"
        ) from None
    return model.float().eval(), record | {"depth": config.num_hidden_layers, "vocab_size": config.vocab_size}


def load_trunk(folder: Path) -> tuple[MultiExitModel, dict]:
    """A run's model as a trunk for branches: its only exit must be at its end, or it is MM, or has branches itself."""
    model, record = load_run(folder)
    if isinstance(model, MultiModel):
        model = model[-1]
    elif record["method"] == "branch":
        head = model.heads[-1]
        model = MultiExitModel(model.encoder, model.exit_layers[-1:], model.num_labels, "sweet")
        model.heads[0] = head
    if len(model.heads) > 1:
        raise InputError(f"--trunk: {folder} has exits after layers {','.join(map(str, model.exit_layers))}, not one")
    return model, record


def _model(config, exit_layers: tuple[int, ...], num_labels: int, method: str, strategy: str) -> MultiExitModel:
    """Make a model with random weights, or none, on the current device."""
    encoder = new_encoder(replace(config, num_hidden_layers=exit_layers[-1]))
    return MultiExitModel(encoder, exit_layers, num_labels, method, strategy)


def newest_run(runs: Path = Path("runs")) -> Path:
    """The run folder under `runs` that was written last. Raises InputError where there is none."""
    # A name that starts with a dot is of a half-written run.
    records = [path for path in runs.glob("[!.]*/run.json") if path.is_file()]
    records.sort(key=lambda path: path.stat().st_mtime)
    if not records:
        raise InputError(f"{runs}/: no run here; train one with train.py, or name a run folder")
    return records[-1].parent


def versions() -> dict[str, str]:
    """What made a run: the versions of Python, of the operating system's kernel and of the libraries."""
    libraries = {name: version(name) for name in ("torch", "tokenizers", "safetensors", "numpy")}
    return {"python": platform.python_version(), "system": platform.platform(), **libraries}
