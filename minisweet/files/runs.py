"""Run folders: all that made a fine-tuned model, next to the model.

run.json            arguments, versions, device, the training subset's row numbers, the loss of each step and exit, and
                    the SHA-256 of the files below, which `load_run` compares
model.safetensors   the fine-tuned weights, encoder and heads
config.json, tokenizer files   of the model that was fine-tuned; model_type is ours, so that nothing takes it for a BERT
evaluation.json, logits.safetensors, curve.png   written by evaluate.py
diverged.json       alone, where the loss became infinite or NaN: the arguments, and when

What is read here is checked where it is read, every number for its type, its range and that it is finite.
Dimension letters: K exits, C classes, N instances, P thresholds.
"""

import hashlib
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save

from minisweet.data.tasks import TASKS
from minisweet.data.text import TOKENIZER_FILES
from minisweet.exits import EXIT_STRATEGIES, METHODS, MultiExitModel, MultiModel, check_exit_layers
from minisweet.files import checkpoint, safe
from minisweet.files.checkpoint import OURS, WEIGHTS, read_config
from minisweet.files.safe import InputError, is_text, listed, read_json, sha256, sweep, write_json, written_beside

DIVERGED = "diverged.json"
EVALUATED = ("evaluation.json", "logits.safetensors", "curve.png")
FILES = {"run.json", WEIGHTS, "config.json", *EVALUATED, *TOKENIZER_FILES}
# The suffixes of a method's name (sweet-flow0.5) to the options that older versions of train.py had.
BOUNDARIES = {"flow": "gradient_flow", "cap": "gradient_cap", "owner": "owner_cap"}


# Checks of a value that was read: they return whether it is right.
def _whole(low: int, high: int = 2**31) -> Callable[[object], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _real(low: float, high: float) -> Callable[[object], bool]:
    return lambda value: type(value) in (int, float) and low <= value <= high


def _rows(check: Callable, length: int | None = None, total: int | None = None) -> Callable[[object], bool]:
    """A list, of this length, whose values pass `check` and sum up to `total`."""
    return lambda value: (
        isinstance(value, list)
        and length in (None, len(value))
        and all(map(check, value))
        and (total is None or sum(value) == total)
    )


def _table(check: Callable) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _optional(check: Callable) -> Callable[[object], bool]:
    return lambda value: value is None or check(value)


# What train.py's arguments may be. Those of an older version may lack some.
ARGUMENTS = {
    "model": is_text,
    "method": lambda value: isinstance(value, str) and value in METHODS,
    "exit_strategy": lambda value: isinstance(value, str) and value in EXIT_STRATEGIES,
    "task": _optional(is_text),
    "data_dir": _optional(is_text),
    "train_size": _optional(_whole(1)),
    "seed": _whole(0),
    "lr": _real(1e-300, 1e300),
    "epochs": _whole(1),
    "batch_size": _whole(1),
    "max_length": _whole(8),
    **{option: _optional(_real(0, 1e300)) for option in BOUNDARIES.values()},
}
# What run.json's values may be. The first ones must be there.
NEEDED = ("arguments", "model", "method", "exit_strategy", "exit_layers", "depth", "device", "precision", "losses")
RECORD = {
    **{key: ARGUMENTS[key] for key in ("model", "method", "exit_strategy", "task", "seed")},
    "learning_rate": ARGUMENTS["lr"],
    "exit_layers": lambda value: _rows(_whole(1, 10**6))(value) and value and all(a < b for a, b in pairwise(value)),
    "depth": _whole(1, 10**6),
    "device": is_text,
    "precision": is_text,
    "metric": is_text,
    "losses": lambda value: _rows(_rows(_real(0, 1e38)))(value) and len({len(row) for row in value}) == 1,
    "labels": lambda value: _rows(is_text)(value) and 1 < len(value) == len(set(value)),
    "subset": _rows(_whole(0)),
    "seconds": _real(0, 1e12),
    "examples_per_second": _real(0, 1e12),
    "digests": _table(lambda value: isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value)),
    "versions": _table(is_text),
    "finished": is_text,
}


def check_values(path: Path, values: dict, checks: dict[str, Callable], needed: tuple[str, ...] = ()) -> None:
    """Raise InputError, naming file and key, for a value that fails its check, and for a needed one that is missing."""
    for key, is_right in checks.items():
        if (key in needed or key in values) and not is_right(values.get(key)):
            raise InputError(f"{path}: {key} is {values.get(key)!r:.100}, which no command here writes")


def method_name(arguments: dict) -> str:
    """The method of a run's arguments, for old runs with what passes their boundaries: ee, sweet, sweet-flow0.5."""
    values = {name: arguments.get(option) for name, option in BOUNDARIES.items()}
    return arguments["method"] + "".join(f"-{name}{value:.12g}" for name, value in values.items() if value is not None)


def method_arguments(name: str) -> dict:
    """The arguments that `method_name` makes `name` of. Raises ValueError for another name."""
    match = re.fullmatch(r"(sweet)-(flow|cap|owner)([0-9][0-9.e+-]{0,20})", name)
    if name not in METHODS and not match:
        raise ValueError(name)
    boundary = {BOUNDARIES[match[2]]: float(match[3])} if match else {}
    if any(value > (1 if option == "gradient_flow" else 1e300) for option, value in boundary.items()):
        raise ValueError(name)
    return {"method": match[1] if match else name} | dict.fromkeys(BOUNDARIES.values()) | boundary


def run_name(arguments: dict, in_grid: bool = False) -> str:
    """The name of a run's folder, by train.py's arguments; a grid's runs also differ in their rate and their size."""
    name = f"{Path(os.path.realpath(arguments['model'])).name}-{method_name(arguments)}-{arguments['task']}"
    if in_grid:
        name += f"-lr{arguments['lr']:g}-n{arguments['train_size']}"
    return f"{name}-seed{arguments['seed']}" + "-lte" * (arguments["exit_strategy"] == "lte")


@contextmanager
def claim_output(out: Path, overwrite: bool) -> Iterator[None]:
    """Hold `out`, so that no other training writes to it within. A file beside it is locked: .NAME.claim.

    Raises InputError at once where a run must not, or cannot, be written to `out`, and where another training holds it.
    """
    try:
        target = Path(os.path.realpath(out))
        if target.is_symlink():
            raise OSError("a link to itself")
        target.parent.mkdir(parents=True, exist_ok=True)
        claim = target.with_name(f".{target.name}.claim")
        held = safe.lock(claim)
    except (OSError, ValueError) as error:
        raise InputError(f"--out: {out} cannot be written ({error})") from None
    if held is None:
        raise InputError(f"--out: {out} is being written by another training; wait for it, or name another folder")
    try:
        sweep(target)
        check_output(out, overwrite)
        yield
    finally:
        claim.unlink(missing_ok=True)  # while it is held, so that nobody else can hold it
        os.close(held)


def check_output(out: Path, overwrite: bool) -> bool:
    """Whether something stands at `out` that a run may replace; raises InputError where a run must not be written."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out: {out} is a file; name a folder that is new, empty, or a run")
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    found = {name for name in names if not safe.PARTIAL.fullmatch(name)}  # what a killed evaluate.py left
    if foreign := found - FILES - {DIVERGED} or (found if "run.json" not in found and found != {DIVERGED} else set()):
        raise InputError(
            f"--out: {out} holds other files than a run's ({listed(sorted(foreign))}); name a folder that is new, "
            "empty, or a run"
        )
    if "run.json" in found and not overwrite:
        raise InputError(f"--out: {out} holds a run already; name another folder, or pass --overwrite")
    return bool(names)


def save_run(out: Path, model: torch.nn.Module, model_folder: Path, record: dict, overwrite: bool) -> None:
    """Write a run folder, whole or not at all. Call it within `claim_output`.

    Raises InputError as `claim_output` does, and for weights that are not finite.
    """
    if names := checkpoint.not_finite(model):
        raise InputError(f"--out: {out} is not written, these weights hold NaN or infinity: {listed(names)}")
    replaces = check_output(out, overwrite)
    with written_beside(Path(os.path.realpath(out)), overwrite=replaces) as partial:
        partial.mkdir()
        (partial / WEIGHTS).write_bytes(save(model.state_dict()))
        encoder_type = read_config(model_folder).model_type
        config = read_json(model_folder / "config.json") | {"model_type": OURS, "encoder_type": encoder_type}
        write_json(partial / "config.json", config)
        for name in TOKENIZER_FILES:
            if (model_folder / name).is_file():
                shutil.copyfile(model_folder / name, partial / name)
        digests = {path.name: sha256(path) for path in sorted(partial.iterdir())}
        write_json(partial / "run.json", record | {"digests": digests})


def read_record(run: Path) -> dict:
    """Read a run's run.json. Raises InputError for a folder that is no run, or a broken one.

    The arguments model, method, task, seed, exit_strategy and lr (as learning_rate) stand at the top too, as they do in
    the runs of older versions. `labels` are the task's where the run does not tell them, and `num_labels` is added.
    """
    path = run / "run.json"
    if not path.is_file():
        sweep(Path(os.path.realpath(run)))  # a training that was killed while it replaced this run
    if not path.is_file():
        raise InputError(f"{run}: no run here (it has no run.json); train one with train.py")
    content = read_json(path, finite=True)
    check_values(path, content, {"arguments": lambda value: isinstance(value, dict)}, NEEDED)
    arguments = content["arguments"]
    check_values(path, arguments, ARGUMENTS, ("max_length",))
    said = {key: arguments[key] for key in ("model", "method", "task", "seed", "exit_strategy") if key in arguments}
    said |= {"learning_rate": arguments["lr"]} if "lr" in arguments else {}
    for key in (said.keys() & content.keys()) - {"model"}:
        if said[key] != content[key]:
            raise InputError(f"{path}: {key} is {content[key]!r:.100}, and {said[key]!r:.100} in its arguments")
    record = {"exit_strategy": "confidence"} | said | content  # the oldest runs do not tell their exit strategy
    check_values(path, record, RECORD, NEEDED)
    K, columns = len(record["exit_layers"]), len(record["losses"][0])
    if columns != K and (record["method"], columns) != ("branch", K - 1):  # a trunk that was there has no loss
        raise InputError(f"{path}: losses is of {columns} exits, and exit_layers of {K}")
    if record["exit_layers"][-1] > record["depth"]:
        raise InputError(f"{path}: exit_layers is {record['exit_layers']}, and depth is {record['depth']}")
    if "labels" not in record:
        if record.get("task") not in TASKS:
            raise InputError(f"{path}: task is {record.get('task')!r:.100}, and must be one of {', '.join(TASKS)}")
        record["labels"] = list(TASKS[record["task"]].labels)
    return record | {"num_labels": len(record["labels"])}


def read_evaluation(run: Path, record: dict | None = None) -> dict | None:
    """Read a run's evaluation.json; None where there is none. Those of older versions may lack some keys.

    `record` is the run's, from `read_record`. Raises InputError for a value that evaluate.py does not write.
    """
    path = run / "evaluation.json"
    if not path.exists():
        return None
    record = record or read_record(run)
    evaluation = read_json(path, finite=True)
    same = {key: lambda value, key=key: value == record[key] for key in ("task", "method", "exit_strategy")}
    check_values(path, evaluation, same)
    layers, depth = evaluation.get("exit_layers", record["exit_layers"]), record["depth"]
    some = [n for n in record["exit_layers"] if isinstance(layers, list) and n in layers]  # --use-exits asks some alone
    check_values(path, evaluation, {"exit_layers": lambda value: value == some and some})
    K, C, thresholds = len(some), record["num_labels"], evaluation.get("thresholds")
    in_order = _rows(_real(0, 1))(thresholds) and thresholds == sorted(thresholds)
    check_values(path, evaluation, {"thresholds": lambda value: in_order and value, "examples": _whole(1)})
    P, N = len(thresholds) if in_order else None, evaluation.get("examples")
    score = _real(-100 if evaluation.get("metric", record.get("metric")) == "matthews" else 0, 100)
    number = _real(0, 1e38)
    before_and_after = _table(_rows(number, K))
    checks = {
        "metric": lambda value: value == record.get("metric", value) and is_text(value),
        "exit_scores": _rows(score, K),
        "scores": _rows(score, P),
        "speedup_ratios": _rows(_real(1e-9, K + 1), P),
        "exit_counts": _rows(_rows(_whole(0), K, N), P),
        "area": score,
        "class_counts": _rows(_rows(_whole(0), C, N), K),
        "calibration": is_text,
        "temperatures": _rows(_real(1e-9, 1e9), K),
        "ece": before_and_after,
        "nll": before_and_after,
        "certainty_ranges": _rows(_rows(_real(0, 1), 2), K),
        "mean_exit_layers": _table(_rows(_real(1, depth), P)),
        "live": _rows(_table(lambda cell: number(cell) or _table(number)(cell)), P),
        "live_batch_size": _whole(1),
        "live_differs": _whole(0),
        "seconds": _real(0, 1e12),
        "device": is_text,
        "precision": is_text,
        "versions": _table(is_text),
    }
    check_values(path, evaluation, checks)
    return evaluation


def read_diverged(run: Path) -> dict | None:
    """What a training left whose loss became infinite or NaN: `error` and `arguments`. None where there is none."""
    path = run / DIVERGED
    if not path.exists():
        return None
    content = read_json(path, finite=True)
    checks = {"arguments": lambda value: isinstance(value, dict), "error": lambda value: isinstance(value, str)}
    check_values(path, content, checks, ("arguments", "error"))
    check_values(path, content["arguments"], ARGUMENTS, ("method",))
    return content


def run_digest(run: Path) -> str:
    """What tells a run's model from another one: the SHA-256 over its digests, or, of an old run, of its weights."""
    digests = read_record(run).get("digests")
    return (
        hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest() if digests else sha256(run / WEIGHTS)
    )


def load_run(run: Path) -> tuple[MultiExitModel | MultiModel, dict]:
    """Load a run's model to predict with, in float32, in evaluation mode and on the CPU, and its record.

    The record is `read_record`'s, with `depth` and `vocab_size` of config.json. Raises InputError for a folder that is
    no run, for a broken one, and for files that are not those that were saved.
    """
    record = read_record(run)
    check_digests(run, record.get("digests"))
    config, layers, path = read_config(run), record["exit_layers"], run / WEIGHTS
    strategy, num_labels, mm = record["exit_strategy"], record["num_labels"], record["method"] == "mm"
    try:
        check_exit_layers(layers, config.num_hidden_layers)
    except ValueError as error:
        raise InputError(f"{run}: {error}") from None
    if record["arguments"]["max_length"] > config.max_position_embeddings:
        length, positions = record["arguments"]["max_length"], config.max_position_embeddings
        raise InputError(f"{run / 'run.json'}: max_length is {length}, and the model has {positions} positions")
    with checkpoint.open_weights(run) as tensors:
        # Compared before anything is built: exit_layers may ask for a million layers, and hidden_size for a billion.
        last = f"{len(layers) - 1}.encoder." if mm else "encoder."
        checkpoint.check_width(path, f"{last}word_embeddings.weight", tensors, config.hidden_size)
        checkpoint.check_width(path, f"{last}layers.{layers[-1] - 1}.intermediate.weight", tensors, config.hidden_size)
        with torch.device("meta"), checkpoint.NoInit():  # shapes only, the weights follow
            if mm:
                model = MultiModel(_model(config, (n,), num_labels, "sweet", strategy) for n in layers)
            else:
                model = _model(config, layers, num_labels, record["method"], strategy)
        wanted = {name: ((name,), list(value.shape)) for name, value in model.state_dict().items()}
        model.load_state_dict(checkpoint.read_tensors(path, tensors, wanted), assign=True)
    return model.eval(), record | {"depth": config.num_hidden_layers, "vocab_size": config.vocab_size}


def check_digests(run: Path, digests: dict | None) -> None:
    """Raise InputError unless the run's files are those whose SHA-256 run.json tells."""
    if digests is None:
        logging.getLogger("minisweet").warning("%s: from before runs had digests, so its files are not compared", run)
        return
    for name in {WEIGHTS, "config.json", *digests}:
        if name not in digests or name not in FILES:
            raise InputError(f"{run / 'run.json'}: digests are of {listed(sorted(digests))}, and must be of its files")
        if sha256(run / name) != digests[name]:
            raise InputError(f"{run / name}: is not the file that was saved, its SHA-256 is not that in run.json")
    if added := [name for name in TOKENIZER_FILES if name not in digests and (run / name).exists()]:
        raise InputError(f"{run / added[0]}: was not there when the run was saved; remove it")


def load_trunk(folder: Path) -> tuple[MultiExitModel, dict]:
    """A finished model with one exit, at its end, to grow branches on, and the record of the run that it is.

    `folder` is a run of one exit, of MM (its last model) or of branches (its trunk), or a classifier in the Hugging
    Face layout, whose record holds its `labels` alone. Raises InputError as `load_run` and `load_classifier` do.
    """
    if (folder / "run.json").exists():
        model, record = load_run(folder)
        model = model[-1] if record["method"] == "mm" else model
        if len(model.heads) > 1 and record["method"] != "branch":
            layers = ",".join(map(str, model.exit_layers))
            raise InputError(f"--trunk: {folder} has exits after layers {layers}, and a trunk has one, at its end")
        trunk = MultiExitModel(model.encoder, model.exit_layers[-1:], record["num_labels"])
        trunk.heads[0] = model.heads[-1]
        return trunk.eval(), record
    encoder, pooler, classifier, labels = checkpoint.load_classifier(folder)
    trunk = MultiExitModel(encoder, (len(encoder.layers),), len(labels))
    for linear, (weight, bias) in ((trunk.heads[0].pooler, pooler), (trunk.heads[0].classifier, classifier)):
        linear.load_state_dict({"weight": weight, "bias": bias})
    return trunk.eval(), {"labels": labels, "num_labels": len(labels)}


def _model(config, exit_layers: tuple[int, ...], num_labels: int, method: str, strategy: str) -> MultiExitModel:
    """Make a model with random weights, or none, on the current device."""
    encoder = checkpoint.new_encoder(replace(config, num_hidden_layers=exit_layers[-1]))
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
