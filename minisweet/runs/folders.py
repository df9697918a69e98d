"""Run folders: all that made a fine-tuned model, next to the model.

run.json            arguments, versions, device, the rows of training and validation, each step's loss at each exit, and
                    `digests`: the SHA-256 of the files below up to the tokenizer's, which `load_run` compares
model.safetensors   the fine-tuned weights, encoder and heads
config.json, tokenizer files   of the model that was fine-tuned; model_type is ours, so that nothing takes it for a BERT
evaluation.json, logits.safetensors, curve.png   written by evaluate.py; the first names the run (`run_digest`, compared
                    in `read_evaluation`) and the second (`logits_digest`, in `load_validation`)
diverged.json       the only file, where the loss became infinite or NaN: the error, with the step, and the arguments;
                    written where nothing else is

By default a run is runs/<model>-<method>-<task>-seed<k>, see `run_name`. It is written in a hidden folder beside,
and renamed at the end (`written_beside` in base/safe.py); until then a file beside it is locked (`claim_output`).
Every number that is used is checked where it is read, see records.py. Dimension letter: K exits.
"""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save

from minisweet import checkpoint
from minisweet.base import safe
from minisweet.base.fields import Fields
from minisweet.base.safe import InputError, as_written, listed, read_json, sha256, write_json, written_beside
from minisweet.base.weights import WEIGHTS, check_sizes, filled, open_weights
from minisweet.branches import METHODS, BranchModel
from minisweet.checkpoint import OURS, read_config
from minisweet.config import Config
from minisweet.data.tasks import TASKS
from minisweet.data.text import TOKENIZER_FILES
from minisweet.exits import MultiExitModel, MultiModel
from minisweet.runs.records import WISHES, Arguments, Curve, Evaluation, Record

DIVERGED = "diverged.json"
FILES = {"run.json", WEIGHTS, "config.json", *TOKENIZER_FILES, "evaluation.json", "logits.safetensors", "curve.png"}
FILES |= {"logits.next.safetensors"}  # what a stopped evaluate.py left


def method_name(arguments: dict) -> str:
    """The method as reports name it: from a finished trunk, ee is mixed training, and mm's models are taught by it."""
    method = arguments["method"]
    on_trunk = {"ee": "ee-mixed", "sweet": "sweet-mixed", "mm": "mm-taught"}
    return on_trunk.get(method, method) if arguments.get("trunk") else method


def run_name(arguments: dict, in_grid: bool = False) -> str:
    """The name of a run's folder, by train.py's arguments; a grid's runs also differ in their rate and their size."""
    name = f"{Path(os.path.realpath(arguments['model'])).name}-{method_name(arguments)}-{arguments['task']}"
    if in_grid:
        name += f"-lr{arguments['lr']:g}-n{arguments['train_size']}"
    return f"{name}-seed{arguments['seed']}" + "-lte" * (arguments["exit_strategy"] == "lte")


@contextmanager
def claim_output(out: Path, overwrite: bool) -> Iterator[None]:
    """Hold `out`, so that no other training writes to it within. A file beside it is locked.

    Raises InputError at once where a run must not, or cannot, be written to `out`, and where another training holds it.
    """
    with ExitStack() as claim:
        try:
            target = Path(os.path.realpath(out))
            if target.is_symlink():
                raise OSError("a link to itself")
            str(out).encode()  # raises UnicodeEncodeError, a ValueError
            target.parent.mkdir(parents=True, exist_ok=True)
            path = target.with_name(f".{target.name}.claimed-by-another-training")  # no name beside it will be longer
            is_ours = claim.enter_context(safe.hold(path))
        except (OSError, ValueError) as error:
            raise InputError(f"--out: {out} cannot be written ({error})") from None
        if not is_ours:
            raise InputError(f"--out: {out} is being written by another training; wait for it, or name another folder")
        safe.clear_leftovers(target)
        check_output(out, overwrite)
        yield


def check_output(out: Path, overwrite: bool) -> bool:
    """Whether a folder stands at `out` that a run may replace. Raises InputError where a run must not be written."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out: {out} is a file; name a folder that is new, empty, or a run")
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    found = {name for name in names if not safe.PARTIAL.fullmatch(name)}  # what a killed evaluate.py left
    of_a_run = FILES if "run.json" in found else set()  # --overwrite replaces runs, and nothing else
    if foreign := listed(sorted(found - of_a_run - {DIVERGED})):
        raise InputError(f"--out: {out} holds other files than a run's ({foreign}); name a folder that is new or empty")
    if "run.json" in found and not overwrite:
        raise InputError(f"--out: {out} holds a run already; name another folder, or pass --overwrite")
    return bool(names)


def save_run(out: Path, model: torch.nn.Module, model_folder: Path, record: dict, overwrite: bool) -> None:
    """Write a run folder, whole or not at all, within `claim_output`. InputError as there, and for NaN or infinity."""
    if names := [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]:
        raise InputError(f"--out: {out} is not written, these weights hold NaN or infinity: {listed(names)}")
    may_replace = check_output(out, overwrite)
    with written_beside(out, overwrite=may_replace) as folder:
        folder.mkdir()
        (folder / WEIGHTS).write_bytes(save(model.state_dict()))
        ours = {"model_type": OURS, "encoder_type": read_config(model_folder).model_type}
        write_json(folder / "config.json", read_json(model_folder / "config.json") | ours)
        for name in TOKENIZER_FILES:
            if (model_folder / name).is_file():
                shutil.copyfile(model_folder / name, folder / name)
        digests = {path.name: sha256(path) for path in sorted(folder.iterdir())}
        write_json(folder / "run.json", record | {"digests": digests})


def is_run(folder: Path) -> bool:
    """Whether `folder` is a run. One that a killed training was replacing is put back first."""
    try:
        if not (folder / "run.json").is_file():
            safe.clear_leftovers(Path(os.path.realpath(folder)))
        return (folder / "run.json").is_file()
    except OSError as error:  # the name is too long
        raise InputError(f"{as_written(str(folder))}: no run here ({error.strerror})") from None


def read_record(run: Path) -> Record:
    """Read a run's run.json. Raises InputError for a folder that is no run, or a broken one."""
    path = run / "run.json"
    if not is_run(run):
        raise InputError(f"{run}: no run here (it has no run.json); train one with train.py")
    content = read_json(path, finite=True)
    record = _taken(Record, path, content | vars(_taken(Arguments, path, content.get("arguments"))))
    K = len(record.exit_layers)
    fits = {
        "exit_layers": _rises(record.exit_layers),
        "losses": {len(row) for row in record.losses or [[]]} <= {K, K - (record.trunk is not None)},  # no trunk's
        "labels": 1 < record.num_labels == len(set(record.labels)),
        "task": record.data is not None or record.task in TASKS,
        "text_columns": record.text_columns is None or len(record.text_columns) in (1, 2),
    }
    return _agreeing(path, record, fits)


def read_evaluation(run: Path, record: Record, kind: type[Curve] = Evaluation) -> Curve | Evaluation | None:
    """Read a run's evaluation.json, all of it or the `Curve` alone; None where there is none.

    Raises InputError for a value that evaluate.py does not write, a missing one, and an evaluation of another run.
    """
    path = run / "evaluation.json"
    if not path.exists():
        return None
    found = _taken(kind, path, read_json(path, finite=True))
    if found.run_digest != run_digest(record):
        raise InputError(f"{path}: is of another run, its run_digest is not this one's; run evaluate.py again")
    layers, all_layers = found.exit_layers, record.exit_layers  # --use-exits asks some alone, the last among them
    fits = {key: getattr(found, key) == getattr(record, key) for key in ("task", "method", "exit_strategy", "metric")}
    fits |= {
        "exit_layers": _rises(layers) and {*layers} <= {*all_layers} and layers[-1] == all_layers[-1],
        "thresholds": _rises(found.thresholds),
        "scores": found.metric == "matthews" or min(*found.scores, *found.exit_scores, found.area) >= 0,
        "speedup_ratios": all(ratio <= 1 + len(layers) for ratio in found.speedup_ratios),
        "class_counts": all(len(row) == record.num_labels for row in found.class_counts),
    }
    if kind is Evaluation:  # each row counts all examples
        fits["exit_counts"] = all(sum(row) == found.examples for row in found.exit_counts)
        fits["class_counts"] &= all(sum(row) == found.examples for row in found.class_counts)
        fits["operating_point"] = {*found.operating_point.wish} in WISHES
        fits["certainty_ranges"] = found.exit_strategy != "lte" or found.certainty_ranges is not None
    return _agreeing(path, found, fits)


def read_diverged(run: Path) -> Arguments | None:
    """The arguments of a training whose loss became infinite or NaN, which left no run. None where there is none."""
    path = run / DIVERGED
    return _taken(Arguments, path, read_json(path, finite=True).get("arguments")) if path.exists() else None


def _rises(values: list) -> bool:
    """Whether there are values, each above the one before."""
    return len(values) > 0 and values == sorted(set(values))


def _taken(kind: type[Fields], path: Path, content: object) -> Fields:
    """What a file holds."""
    try:
        return kind.from_json(content if isinstance(content, dict) else {})
    except ValueError as error:
        script = "evaluate.py" if path.name == "evaluation.json" else "train.py"
        raise InputError(f"{path}: {error}; {script} writes another") from None


def _agreeing(path: Path, found: Fields, fits: dict[str, bool]) -> Fields:
    """`found`, unless a value of it does not fit the others."""
    for key in (key for key in fits if not fits[key]):
        value = as_written(getattr(found, key))
        raise InputError(f"{path}: {key} is {value}, which does not fit what else is known of this run")
    return found


def run_digest(record: Record) -> str | None:
    """What tells a run's model from another one: the SHA-256 over its digests. None for records without a model."""
    return record.digests and hashlib.sha256(json.dumps(record.digests, sort_keys=True).encode()).hexdigest()


def load_run(run: Path) -> tuple[MultiExitModel | MultiModel, Record]:
    """A run's model to predict with, in float32, in evaluation mode and on the CPU, and its record, with config.json's
    `depth` and `vocab_size`. Raises InputError for no run, a broken one, and files that are not those that were saved.
    """
    record, path = read_record(run), run / "run.json"
    if record.method not in METHODS:
        raise InputError(f"{path}: method is {record.method!r:.80}, should be one of {', '.join(METHODS)}")
    digests = record.digests or {}
    for file in (run / name for name in (WEIGHTS, "config.json", *TOKENIZER_FILES)):
        if (file.name in digests or file.exists()) and sha256(file) != digests.get(file.name):
            said = "is not the file that was saved, or was not there when the run was saved"
            raise InputError(f"{file}: {said} (its SHA-256 is not in run.json)")
    config, layers = read_config(run), record.exit_layers
    depth, positions = config.num_hidden_layers, config.max_position_embeddings
    if layers[-1] > depth:
        raise InputError(f"{path}: exit_layers is {layers}, and the model has {depth} layers")
    if record.max_length > positions:
        raise InputError(f"{path}: max_length is {record.max_length}, and the model has {positions} positions")
    tensors = open_weights(run)
    # Compared before anything is built: exit_layers may ask for a million layers, and hidden_size for a billion.
    last = f"{len(layers) - 1}.encoder." if record.method == "mm" else "encoder."
    ends = (f"{last}word_embeddings", f"{last}layers.{layers[-1] - 1}.intermediate")
    check_sizes(run / WEIGHTS, tensors, *ends, config.hidden_size)
    model, _ = filled(run / WEIGHTS, tensors, lambda: _new_model(config, record, layers, record.method), {}, {})
    return model.eval(), replace(record, depth=depth, vocab_size=config.vocab_size)


def _new_model(config: Config, record: Record, exit_layers: list[int], method: str) -> MultiExitModel | MultiModel:
    """The model that a run's record describes, with new weights, or none, on the current device."""
    if method == "mm":
        return MultiModel(_new_model(config, record, [n], "sweet") for n in exit_layers)
    encoder = checkpoint.new_encoder(replace(config, num_hidden_layers=exit_layers[-1]))
    if method == "branch":
        return BranchModel(encoder, exit_layers, record.num_labels, record.exit_strategy)
    return MultiExitModel(encoder, exit_layers, record.num_labels, method, record.exit_strategy)


def load_trunk(folder: Path) -> tuple[MultiExitModel, list[str]]:
    """A finished model with one exit, at its end, and its labels: of a run of one exit, of MM (its last model) or of
    branches (their trunk), or of a classifier in the Hugging Face layout. Raises InputError as their loaders do.
    """
    if is_run(folder):
        model, record = load_run(folder)
        model = model[-1] if record.method == "mm" else model
        if len(model.heads) > 1 and record.method != "branch":
            layers = ",".join(map(str, model.exit_layers))
            raise InputError(f"--trunk: {folder} has exits after layers {layers}, and a trunk has one, at its end")
        return model.keep_exits(model.exit_layers[-1:]), record.labels
    if not folder.is_dir():
        raise InputError(f"--trunk: {folder} is no folder; should be a run, or a classifier in the Hugging Face layout")
    encoder, classifier, labels = checkpoint.load_classifier(folder)
    trunk = MultiExitModel(encoder, (len(encoder.layers),), len(labels))  # its pooler is the checkpoint's
    trunk.heads[0].classifier.load_state_dict({"weight": classifier[0], "bias": classifier[1]})
    return trunk.eval(), labels


def newest_run(runs: Path = Path("runs")) -> Path:
    """The run folder under `runs` that was written last. Raises InputError where there is none."""
    for folder in runs.glob(".*.partial"):  # a run that a killed training was replacing is put back first
        if match := safe.PARTIAL.fullmatch(folder.name):
            safe.clear_leftovers(folder.with_name(match[1]))
    records = [path for path in runs.glob("[!.]*/run.json") if path.is_file()]  # a dot: of a half-written run
    if not records:
        raise InputError(f"{runs}/: no run here; train one with train.py, or name a run folder")
    return max(records, key=lambda path: path.stat().st_mtime).parent


def versions() -> dict[str, str]:
    """What made a run: the versions of Python, of the operating system's kernel and of the libraries."""
    libraries = {name: version(name) for name in ("torch", "tokenizers", "safetensors", "numpy")}
    return {"python": platform.python_version(), "system": platform.platform(), **libraries}
