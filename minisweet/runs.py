"""Run folders: all that made a fine-tuned model, next to the model.

run.json            arguments, versions, device, the training subset's row numbers, the loss of each step and exit
model.safetensors   the fine-tuned weights, encoder and heads
config.json, tokenizer files   copied from the model that was fine-tuned
evaluation.json     written by evaluate.py
"""

import platform
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minisweet.checkpoint import new_encoder, read_config
from minisweet.cli import InputError, read_json, write_json, written_beside
from minisweet.exits import MultiExitModel, MultiModel
from minisweet.text import TOKENIZER_FILES


def check_output(out: Path, overwrite: bool) -> None:
    """Raise InputError if a run must not be written to `out`."""
    if (out / "run.json").is_file():
        if not overwrite:
            raise InputError(f"--out: {out} holds a run already; name another folder, or pass --overwrite")
    elif out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"--out: {out} exists and is no run; name a folder that is new, empty, or a run")


def save_run(out: Path, model: torch.nn.Module, model_folder: Path, record: dict) -> None:
    """Write a run folder, whole or not at all. A run that stands at `out` is replaced."""
    with written_beside(out) as partial:
        partial.mkdir()
        save_file(
            {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, partial / "model.safetensors"
        )
        for name in ("config.json", *TOKENIZER_FILES):
            if (model_folder / name).is_file():
                shutil.copyfile(model_folder / name, partial / name)
        write_json(partial / "run.json", record)


def load_run(run: Path) -> tuple[MultiExitModel | MultiModel, dict]:
    """Load a run's model, and its run.json. Raises InputError for a folder that is no run, or a broken one."""
    if not (run / "run.json").is_file():
        raise InputError(f"{run}: no run here (it has no run.json); train one with train.py")
    record = read_json(run / "run.json")
    config = read_config(run)
    try:
        exit_layers, method, num_labels = (record[key] for key in ("exit_layers", "method", "num_labels"))
        with torch.device("meta"):  # shapes only, the weights follow
            if method == "mm":
                model = MultiModel(_model(config, (n,), num_labels, "sweet") for n in exit_layers)
            else:
                model = _model(config, exit_layers, num_labels, method)
        model.load_state_dict(load_file(run / "model.safetensors"), assign=True)
    except (KeyError, ValueError, OSError, SafetensorError, RuntimeError) as error:
        raise InputError(f"{run}: not a whole run ({' '.join(str(error).split())})") from None
    return model, record


def _model(config, exit_layers: tuple[int, ...], num_labels: int, method: str) -> MultiExitModel:
    """Make a model with random weights, or none, on the current device."""
    encoder = new_encoder(replace(config, num_hidden_layers=exit_layers[-1]))
    return MultiExitModel(encoder, exit_layers, num_labels, method)


def newest_run(runs: Path = Path("runs")) -> Path:
    """The run folder under `runs` that was written last. Raises InputError where there is none."""
    records = sorted(runs.glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    if not records:
        raise InputError(f"{runs}/: no run here; train one with train.py, or name a run folder")
    return records[-1].parent


def versions() -> dict[str, str]:
    """What made a run: the versions of Python, of the operating system's kernel and of the libraries."""
    libraries = {name: version(name) for name in ("torch", "tokenizers", "safetensors", "numpy")}
    return {"python": platform.python_version(), "system": platform.platform(), **libraries}
