"""Run folders: all that made a fine-tuned model, next to the model. README.md beside this file tells what each holds.

Here they are named and written; load.py reads them.
"""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from safetensors.torch import save
from torch import nn

from minisweet.base.files import read_json, write_json, written_beside
from minisweet.checkpoint import OURS, WEIGHTS, read_config
from minisweet.data.text import TOKENIZER_FILES, Examples

VALIDATION = "validation.jsonl"
LOGITS = "logits.safetensors"  # what all exits say of the validation rows
EVALUATION, CURVE = "evaluation.json", "curve.png"  # evaluate.py writes them
OPERATING = "operating.json"  # `minisweet fit` and `choose` write it
FILES = {"run.json", WEIGHTS, "config.json", VALIDATION, *TOKENIZER_FILES, LOGITS, EVALUATION, CURVE, OPERATING}


def run_name(arguments: dict, in_grid: bool = False) -> str:
    """The name of a run's folder, by train.py's arguments; a grid's runs also differ in their rate and their size."""
    name = f"{Path(os.path.realpath(arguments['model'])).name}-{arguments['method']}-{arguments['task']}"
    if in_grid:
        name += f"-lr{arguments['lr']:g}-n{arguments['train_size']}"
    return f"{name}-seed{arguments['seed']}" + "-lte" * (arguments["exit_strategy"] == "lte")


def save_run(out: Path, model: nn.Module | None, model_folder: Path, run_json: dict, validation: Examples) -> None:
    """Write a run folder, whole or not at all; what is there is replaced.

    `model` is None for a training that diverged, and `model_folder` is what was fine-tuned.
    """
    with written_beside(out) as folder:
        folder.mkdir()
        if model is None:
            write_json(folder / "run.json", run_json)
            return
        tensors = model.state_dict()
        digest = hashlib.sha256(save(tensors)).hexdigest()
        write_json(folder / "run.json", run_json | {"id": digest})
        (folder / WEIGHTS).write_bytes(save(tensors, {"id": digest}))
        ours = {"model_type": OURS, "encoder_type": read_config(model_folder).model_type}
        write_json(folder / "config.json", read_json(model_folder / "config.json") | ours)
        for name in TOKENIZER_FILES:
            if (model_folder / name).is_file():
                shutil.copyfile(model_folder / name, folder / name)
        with (folder / VALIDATION).open("w", encoding="utf-8") as file:
            for row in rows_of(validation, run_json["labels"]):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def rows_of(examples: Examples, labels: Sequence[str]) -> Iterator[dict]:
    """Each row as validation.jsonl has it; its label is null where it has none."""
    names = [*labels, None]  # the last is that of -1
    for n, text in enumerate(examples.texts()):
        row = {"text": text} if examples.second is None else dict(zip(("sentence1", "sentence2"), text, strict=True))
        level = {"difficulty": examples.difficulties[n]} if examples.difficulties else {}
        yield row | {"label": names[examples.labels[n]]} | level


def is_run(folder: Path) -> bool:
    """Whether `folder` is a run."""
    return (folder / "run.json").is_file()


def versions() -> dict[str, str]:
    """The versions of Python, of the operating system and of the libraries."""
    libraries = {name: version(name) for name in ("torch", "tokenizers", "safetensors", "numpy")}
    return {"python": platform.python_version(), "system": platform.platform(), **libraries}
