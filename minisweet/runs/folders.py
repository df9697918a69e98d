"""Run folders: all that made a fine-tuned model, next to the model. README.md beside this file tells what each holds.

Dimension letter: C classes.
"""

import hashlib
import os
import platform
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from safetensors.torch import save
from torch import nn

from minisweet.base.files import InputError, read_dataclass, read_json, regular_file, write_json, written_beside
from minisweet.checkpoint import OURS, WEIGHTS, load_classifier, load_strict, new_encoder, read_config
from minisweet.data.rows import Examples, read_examples, write_examples
from minisweet.data.tasks import digest
from minisweet.data.text import TOKENIZER_FILES
from minisweet.exits import ExitModel, MultiExitModel
from minisweet.methods import METHODS
from minisweet.ngrams import NgramExit
from minisweet.runs.records import Evaluation, Record, check

VALIDATION = "validation.jsonl"
EVALUATION, LOGITS, CURVE = "evaluation.json", "logits.safetensors", "curve.png"  # evaluate.py writes them
PAGE, PAGES = 4096, 4096  # bytes, and how many of them at most `run_digest` reads of the weights
FILES = {"run.json", WEIGHTS, "config.json", VALIDATION, *TOKENIZER_FILES, EVALUATION, LOGITS, CURVE}


def run_name(arguments: dict, in_grid: bool = False) -> str:
    """The name of a run's folder, by train.py's arguments; a grid's runs also differ in their rate and their size."""
    name = f"{Path(os.path.realpath(arguments['model'])).name}-{arguments['method']}-{arguments['task']}"
    if in_grid:
        name += f"-lr{arguments['lr']:g}-n{arguments['train_size']}"
    return f"{name}-seed{arguments['seed']}" + "-lte" * (arguments["exit_strategy"] == "lte")


def save_run(out: Path, model: nn.Module | None, model_folder: Path, record: dict, validation: Examples) -> None:
    """Write a run folder, whole or not at all; what is there is replaced.

    `model` is None for a training that diverged, and `model_folder` is what was fine-tuned.
    """
    with written_beside(out) as folder:
        folder.mkdir()
        write_json(folder / "run.json", record)
        if model is None:
            return
        (folder / WEIGHTS).write_bytes(save(model.state_dict()))
        ours = {"model_type": OURS, "encoder_type": read_config(model_folder).model_type}
        write_json(folder / "config.json", read_json(model_folder / "config.json") | ours)
        for name in TOKENIZER_FILES:
            if (model_folder / name).is_file():
                shutil.copyfile(model_folder / name, folder / name)
        write_examples(folder / VALIDATION, validation, record["labels"])


def is_run(folder: Path) -> bool:
    """Whether `folder` is a run."""
    return (folder / "run.json").is_file()


def record_path(run: Path) -> Path:
    """A run's run.json. Raises InputError where there is none."""
    if not is_run(run):
        raise InputError(f"{run}: no run here (it has no run.json); train one with train.py")
    return run / "run.json"


def read_record(run: Path) -> Record:
    """Read a run's run.json. Raises InputError for a folder that is no run, and a key that is missing or wrong."""
    path = record_path(run)
    content = read_json(path)
    arguments = content.get("arguments") or {}
    if not isinstance(arguments, dict):
        raise InputError(f"{path}: arguments is {arguments!r:.80}, should be an object")
    return read_dataclass(Record, path, arguments | content)


def run_digest(run: Path) -> str:
    """What tells a run from others, in hexadecimal: the SHA-256 of run.json, and of the size and pages of the weights.

    Of up to 16 MiB of weights it reads all, of more 4,096 pages, evenly spaced, so that it takes 0.05 seconds and not
    one of 440 MB. Another training is another digest; single weights that were changed by hand may not be. Raises
    InputError for a folder that is no run, or cannot be read.
    """
    try:
        digest = hashlib.sha256(record_path(run).read_bytes())
        with regular_file(run / WEIGHTS).open("rb", buffering=0) as weights:
            size = weights.seek(0, os.SEEK_END)
            digest.update(str(size).encode())
            for place in range(0, size, max(PAGE, size // PAGES)):
                weights.seek(place)
                digest.update(weights.read(PAGE))
    except FileNotFoundError:  # a training that diverged has no weights
        pass
    except OSError as error:
        raise InputError(f"{run}: not readable ({error})") from None
    return digest.hexdigest()


def check_digest(file: Path, found: str | None, wanted: str | None) -> None:
    """Raise InputError where a file of a run has another digest than it should have."""
    if found != wanted:
        raise InputError(f"{file}: is not of the model beside it; evaluate again: evaluate.py {file.parent}")


def read_evaluation(run: Path) -> Evaluation:
    """Read a run's evaluation.json.

    Raises InputError where there is none, for a missing or wrong key, and where it is of another run than the one
    beside it. Old evaluations, which have no digest, and records without weights pass.
    """
    if not (run / EVALUATION).is_file():
        raise InputError(f"{run}: has no {EVALUATION}; first: evaluate.py {run}")
    content = read_json(run / EVALUATION)
    point = content.get("operating_point")
    if isinstance(point, dict) and "wish" in point:  # the goal's name in old evaluations
        point["goal"] = point["wish"]
    evaluation = read_dataclass(Evaluation, run / EVALUATION, content)
    if evaluation.run_digest and (run / WEIGHTS).is_file():
        check_digest(run / EVALUATION, evaluation.run_digest, run_digest(run))
    record, layers = read_record(run), evaluation.exit_layers
    try:
        is_of = [n for n in record.exit_layers if n in layers] == layers and layers[-1] == record.exit_layers[-1]
        check("exit_layers", layers, is_of, f"some of the run's, {record.exit_layers}, and the last one among them")
        for name in ("method", "metric"):
            check(name, getattr(evaluation, name), getattr(evaluation, name) == getattr(record, name), "as in run.json")
        ranges, has_learned = evaluation.certainty_ranges, record.exit_strategy == "lte"
        check("certainty_ranges", ranges, (ranges is not None) == has_learned, "there for learning-to-exit alone")
    except ValueError as error:
        raise InputError(f"{run / EVALUATION}: {error}; evaluate again: evaluate.py {run}") from None
    return evaluation


def load_run(run: Path) -> tuple[ExitModel, Record]:
    """A run's model in float32, in evaluation mode and on the CPU; and its record.

    Raises InputError for a folder that is no run, a training that diverged, and files that are broken or do not fit.
    """
    record = read_record(run)
    if record.diverged is not None:
        raise InputError(f"{run}: its training diverged at step {record.diverged}; it has no weights")
    config, C, layers = read_config(run), record.num_labels, [n for n in record.exit_layers if n > 0]
    file, length, most = f"{run / 'run.json'}: ", record.max_length, config.max_tokens
    check(f"{file}method", record.method, record.method in METHODS, f"one of {', '.join(METHODS)}")
    for name, key in (("depth", "num_hidden_layers"), ("vocab_size", "vocab_size")):
        value, wanted = getattr(record, name), getattr(config, key)
        check(f"{file}{name}", value, value == wanted, f"{wanted}, as {key} of config.json")
    check(f"{file}max_length", length, 8 <= length <= most, f"from 8 to {most}, the positions of the model")

    def make() -> ExitModel:
        encoder = new_encoder(replace(config, num_hidden_layers=layers[-1]))
        model = METHODS[record.method].build(encoder, layers, C, exit_strategy=record.exit_strategy)
        if record.exit_layers[0] == 0:
            model.add_ngrams(NgramExit(config.vocab_size, C, [], pairs=len(record.columns) == 2))
        return model

    return load_strict(run / WEIGHTS, make).eval(), record


def read_validation(run: Path, record: Record, evaluation: Evaluation | None = None) -> Examples:
    """The validation rows in a run. Raises InputError for missing, broken, and other ones than an evaluation's."""
    rows = read_examples(run / VALIDATION, record.labels)
    if evaluation:
        check_digest(run / VALIDATION, digest(rows), evaluation.dev_digest)
    return rows


def load_trunk(folder: Path) -> tuple[MultiExitModel, list[str]]:
    """A run's model with its last exit alone, or a classifier in the Hugging Face layout; and its labels."""
    if is_run(folder):
        model, record = load_run(folder)
        model = model.parts[-1]
        return model.keep_exits(model.head_layers[-1:]), record.labels
    if not folder.is_dir():
        raise InputError(f"--trunk: {folder} is no folder; should be a run, or a classifier in the Hugging Face layout")
    encoder, classifier, labels = load_classifier(folder)
    trunk = MultiExitModel(encoder, (len(encoder.layers),), len(labels), "plain")  # its pooler is the checkpoint's
    trunk.heads[0].classifier.load_state_dict(classifier.state_dict())
    return trunk.eval(), labels


def newest_run(runs: Path = Path("runs")) -> Path:
    """The run under `runs` that was written last. Raises InputError for none; and if a newer one is unfinished."""
    records = [*runs.glob("[!.]*/run.json"), *runs.glob(".*.checkpoint")]  # other dots: runs that are being written
    newest = max(records, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        raise InputError(f"{runs}/: no run here; train one with train.py, or name a run folder")
    if newest.name != "run.json":
        name = runs / newest.name[1:].removesuffix(".checkpoint")
        raise InputError(f"{name}: its training is not finished; finish it (train.py --resume), or name another run")
    return newest.parent


def versions() -> dict[str, str]:
    """The versions of Python, of the operating system and of the libraries."""
    libraries = {name: version(name) for name in ("torch", "tokenizers", "safetensors", "numpy")}
    return {"python": platform.python_version(), "system": platform.platform(), **libraries}
