"""Run folders: all that made a fine-tuned model, next to the model.

run.json            arguments, versions, device, the training subset's row numbers, the loss of each step and exit, and
                    the SHA-256 of the files, which `load_run` compares
model.safetensors   the fine-tuned weights, encoder and heads
config.json, tokenizer files   of the model that was fine-tuned; model_type is ours, so that nothing takes it for a BERT
evaluation.json, logits.safetensors, curve.png   written by evaluate.py
diverged.json       alone, where the loss became infinite or NaN: the arguments, and when

Every number is checked where it is read. Dimension letters: K exits, C classes, P thresholds.
"""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save

from minisweet import checkpoint
from minisweet.base import safe
from minisweet.base.safe import InputError, as_written, is_text, listed, read_json, sha256, write_json, written_beside
from minisweet.base.weights import WEIGHTS
from minisweet.branches import METHODS, BranchModel
from minisweet.calibration import CALIBRATIONS
from minisweet.checkpoint import OURS, read_config
from minisweet.config import Config
from minisweet.data.tasks import TASKS
from minisweet.data.text import TOKENIZER_FILES
from minisweet.exits import EXIT_STRATEGIES, MultiExitModel, MultiModel

DIVERGED = "diverged.json"
FILES = {"run.json", WEIGHTS, "config.json", *TOKENIZER_FILES, "evaluation.json", "logits.safetensors", "curve.png"}
# The suffixes of a method's name (sweet-flow0.5) to the options that older versions of train.py had.
BOUNDARIES = {"flow": "gradient_flow", "cap": "gradient_cap", "owner": "owner_cap"}
# The arguments that a record holds at its top too, and their names there.
SHOWN = {key: key for key in ("model", "method", "task", "seed", "exit_strategy")} | {"lr": "learning_rate"}
NEEDED = ("model", "method", "exit_strategy", "exit_layers", "depth", "device", "precision", "losses")
OPTIONAL = ("task", "data_dir", "train_size", "text_columns", *BOUNDARIES.values())  # may be null
EVALUATED = ("task", "metric", "method", "exit_layers", "exit_strategy", "exit_scores", "thresholds", "scores")
EVALUATED += ("speedup_ratios", "exit_counts", "area", "class_counts", "calibration", "temperatures", "examples")
POINT = ("threshold", "score", "full_depth_score", "speedup_ratio")  # of the operating point
ANY = range(2**31)


def _rules(K=ANY, C=ANY, P=ANY, lowest: float = 0) -> dict[str, tuple]:
    """What the values of run.json, evaluation.json, diverged.json and their arguments may be, as `fits` takes it.

    First the kind, then the length of each list around it, the outermost first: `"exit_counts": (ANY, P, K)` is a list
    of P lists of K whole numbers, and `"ece nll": (number, dict, K)` of two keys, each an object of lists of K numbers;
    objects may nest. K, C and P are the lengths that are right, (3,) for 3 and ANY for any; `lowest` is the lowest
    score. Values that others follow from stand first.
    """
    size, layer, share, number, ratio = ANY[1:], range(1, 10**6 + 1), (0, 1), (0, 1e38), (1e-9, 1 + K[-1])
    return {
        "exit_layers": (layer, ANY[1:]),
        "thresholds": (share, ANY[1:]),
        "arguments operating_point": (object, dict),
        "method": (set(METHODS),),
        "exit_strategy": (set(EXIT_STRATEGIES),),
        "metric": ({"accuracy", "agreement", "matthews"},),
        "calibration": (set(CALIBRATIONS),),
        "model task data_dir device precision finished error run_digest logits_digest": (str,),
        "epochs batch_size train_size examples live_batch_size": (size,),
        "seed live_differs": (ANY,),
        "max_length": (ANY[8:],),
        "depth": (layer,),
        "lr learning_rate": ((1e-300, 1e300),),
        "seconds examples_per_second gradient_flow gradient_cap owner_cap": (number,),
        "losses": (number, ANY, ANY),
        "labels": (str, ANY),
        "text_columns": (str, (1, 2)),
        "subset": (ANY, ANY),
        "digests versions": (str, dict),
        "threshold": (share,),
        "area score full_depth_score": ((lowest, 100),),
        "exit_scores": ((lowest, 100), K),
        "scores": ((lowest, 100), P),
        "speedup_ratio": (ratio,),
        "speedup_ratios": (ratio, P),
        "exit_counts": (ANY, P, K),
        "class_counts": (ANY, K, C),
        "temperatures": ((1e-9, 1e9), K),
        "certainty_ranges": (share, K, (2,)),
        "ece nll": (number, dict, K),
        "mean_exit_layers": ((1, 1e6), dict, P),
        "live": (number, P, dict),
    }


def fits(value: object, kind: object, *shape: object) -> bool:
    """Whether a value of a JSON file is of a kind: text (str), in a set, a range or (low, high), or any (object)."""
    if shape and shape[0] is dict:
        parts = list(value.values()) if isinstance(value, dict) else []
        for part in parts:  # grows by what inner objects hold, so that no depth of them is too much
            parts += part.values() if isinstance(part, dict) else ()
        inner = all(isinstance(part, dict) or fits(part, kind, *shape[1:]) for part in parts)
        return isinstance(value, dict) and inner
    if shape:
        is_list = isinstance(value, list) and len(value) in shape[0]
        return is_list and all(fits(part, kind, *shape[1:]) for part in value)
    if kind is str or isinstance(kind, set):
        return is_text(value) and (kind is str or value in kind)
    if isinstance(kind, range):
        return type(value) is int and value in kind
    return kind is object or (type(value) in (int, float) and kind[0] <= value <= kind[1])


def check_values(path: Path, values: dict, needed: tuple[str, ...] = (), **sizes) -> None:
    """Raise InputError, naming file and key, for a value that breaks its rule, and for a needed one that is missing."""
    if missing := [key for key in needed if key not in values]:
        script = "evaluate.py" if path.name == "evaluation.json" else "train.py"
        raise InputError(f"{path}: has no {missing[0]}; run {script} again")
    for keys, rule in _rules(**sizes).items():
        for key in (key for key in keys.split() if key in values):
            right = fits(values[key], *rule) or (values[key] is None and key in OPTIONAL)
            if right and key in ("exit_layers", "thresholds"):
                right = values[key] == sorted(set(values[key]))
            if not right:
                raise InputError(f"{path}: {key} is {as_written(values[key])}, which no command here writes")


def check_arguments(path: Path, content: dict, needed: str) -> dict:
    """The `arguments` of a file that were given. Raises InputError as `check_values` does."""
    check_values(path, content, ("arguments",))
    arguments = {key: value for key, value in content["arguments"].items() if value is not None}
    check_values(path, arguments, (needed,))
    return arguments


def method_name(arguments: dict) -> str:
    """The method of a run's arguments, for old runs with what passes their boundaries: ee, sweet, sweet-flow0.5."""
    values = {name: arguments.get(option) for name, option in BOUNDARIES.items()}
    return arguments["method"] + "".join(f"-{name}{value:.12g}" for name, value in values.items() if value is not None)


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
    """Whether something stands at `out` that a run may replace. Raises InputError where a run must not be written."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out: {out} is a file; name a folder that is new, empty, or a run")
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    found = {name for name in names if not safe.PARTIAL.fullmatch(name)}  # what a killed evaluate.py left
    if foreign := found - (FILES if "run.json" in found else set()) - {DIVERGED}:
        found = listed(sorted(foreign))
        raise InputError(f"--out: {out} holds other files than a run's ({found}); name a folder that is new or empty")
    if "run.json" in found and not overwrite:
        raise InputError(f"--out: {out} holds a run already; name another folder, or pass --overwrite")
    return bool(names)


def save_run(out: Path, model: torch.nn.Module, model_folder: Path, record: dict, overwrite: bool) -> None:
    """Write a run folder, whole or not at all. Call it within `claim_output`.

    Raises InputError as `claim_output` does, and for weights that are not finite.
    """
    if names := [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]:
        raise InputError(f"--out: {out} is not written, these weights hold NaN or infinity: {listed(names)}")
    replaces = check_output(out, overwrite)
    with written_beside(out, overwrite=replaces) as folder:
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


def read_record(run: Path) -> dict:
    """Read a run's run.json. Raises InputError for a folder that is no run, or a broken one.

    The arguments model, method, task, seed, exit_strategy and lr (as learning_rate) stand at the top too, as they do in
    the runs of older versions. `labels` are the task's where the run does not tell them, and `num_labels` is added.
    """
    path = run / "run.json"
    if not is_run(run):
        raise InputError(f"{run}: no run here (it has no run.json); train one with train.py")
    content = read_json(path, finite=True)
    said = {SHOWN[key]: value for key, value in check_arguments(path, content, "max_length").items() if key in SHOWN}
    for key in (said.keys() & content.keys()) - {"model"}:
        if said[key] != content[key]:
            raise InputError(f"{path}: {key} is {content[key]!r:.100}, and {said[key]!r:.100} in its arguments")
    record = {"exit_strategy": "confidence"} | said | content  # the oldest runs do not tell their exit strategy
    check_values(path, record, NEEDED)
    K, columns = len(record["exit_layers"]), sorted({len(row) for row in record["losses"]})
    # The last exit has no loss where it is a trunk that was there.
    if columns != [K] and (record["method"] not in ("mm", "branch") or columns != [K - 1]):
        raise InputError(f"{path}: losses is of {', '.join(map(str, columns))} exits, and exit_layers of {K}")
    task = TASKS.get(record.get("task"))
    labels = record.get("labels", list(task.labels) if task else [])
    if not 1 < len(labels) == len(set(labels)):
        raise InputError(f"{path}: labels is {labels!r:.100}, and must be two or more that differ")
    if task is None and "metric" not in record:
        raise InputError(f"{path}: has no metric, and its task is {record.get('task')!r:.100}, none of GLUE's")
    return record | {"labels": labels, "num_labels": len(labels)}


def read_evaluation(run: Path, record: dict | None = None, whole: bool = True) -> dict | None:
    """Read a run's evaluation.json; None where there is none. Without `whole`, one of an older version may lack keys.

    Raises InputError for a value that evaluate.py does not write, for one that is missing, and for the evaluation of
    another run than `record`'s; those of older versions do not tell whose they are.
    """
    path = run / "evaluation.json"
    if not path.exists():
        return None
    record = record or read_record(run)
    evaluation = read_json(path, finite=True)
    layers, thresholds = evaluation.get("exit_layers", record["exit_layers"]), evaluation.get("thresholds")
    K, P = ((len(values),) if isinstance(values, list) else ANY for values in (layers, thresholds))
    lowest = -100 if evaluation.get("metric", record.get("metric")) == "matthews" else 0
    sizes = {"K": K, "C": (record["num_labels"],), "P": P, "lowest": lowest}
    is_new = "run_digest" in evaluation
    needed = EVALUATED if whole or is_new else ()
    if needed and record["exit_strategy"] == "lte":
        needed += ("certainty_ranges",)
    check_values(path, evaluation, needed + ("operating_point", "logits_digest") * is_new, **sizes)
    if is_new and evaluation["run_digest"] != run_digest(run, record):
        raise InputError(f"{path}: is of another run, its run_digest is not this one's; run evaluate.py again")
    if "operating_point" in evaluation:
        check_values(path, evaluation["operating_point"], POINT, **sizes)
    same = evaluation.keys() & record.keys() & {"task", "method", "exit_strategy", "metric"}
    wrong = [key for key in sorted(same) if evaluation[key] != record[key]]
    fit = set(layers) <= set(record["exit_layers"]) and layers[-1] == record["exit_layers"][-1]
    wrong += ["exit_layers"] * (not fit)  # --use-exits asks some alone, the last among them
    for key in ("exit_counts", "class_counts"):  # of all instances in each row
        wrong += [key] * any(sum(row) != evaluation.get("examples", sum(row)) for row in evaluation.get(key, ()))
    if wrong:
        raise InputError(f"{path}: {wrong[0]} is {evaluation[wrong[0]]!r:.100}, which does not fit this run")
    return evaluation


def read_diverged(run: Path) -> dict | None:
    """What a training left whose loss became infinite or NaN: `error` and `arguments`. None where there is none."""
    path = run / DIVERGED
    if not path.exists():
        return None
    content = read_json(path, finite=True)
    check_values(path, content, ("error",))
    check_arguments(path, content, "method")
    return content


def run_digest(run: Path, record: dict | None = None) -> str:
    """What tells a run's model from another one: the SHA-256 over its digests, or, of an old run, of its weights."""
    if digests := (record or read_record(run)).get("digests"):
        return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
    return sha256(run / WEIGHTS)


def load_run(run: Path) -> tuple[MultiExitModel | MultiModel, dict]:
    """Load a run's model to predict with, in float32, in evaluation mode and on the CPU, and its record.

    The record is `read_record`'s, with `depth` and `vocab_size` of config.json. Raises InputError for a folder that is
    no run, for a broken one, and for files that are not those that were saved.
    """
    record = read_record(run)
    check_digests(run, record.get("digests"))
    config, layers, length = read_config(run), record["exit_layers"], record["arguments"]["max_length"]
    depth, positions, path = config.num_hidden_layers, config.max_position_embeddings, run / "run.json"
    if layers[-1] > depth:
        raise InputError(f"{path}: exit_layers is {layers}, and the model has {depth} layers")
    if length > positions:
        raise InputError(f"{path}: max_length is {length}, and the model has {positions} positions")
    tensors = checkpoint.open_weights(run)
    # Compared before anything is built: exit_layers may ask for a million layers, and hidden_size for a billion.
    last = f"{len(layers) - 1}.encoder." if record["method"] == "mm" else "encoder."
    ends = (f"{last}word_embeddings", f"{last}layers.{layers[-1] - 1}.intermediate")
    checkpoint.check_sizes(run / WEIGHTS, tensors, *ends, config.hidden_size)
    model, _ = checkpoint.filled(run / WEIGHTS, tensors, lambda: _new_model(config, record), {}, {})
    return model.eval(), record | {"depth": depth, "vocab_size": config.vocab_size}


def _new_model(config: Config, record: dict) -> MultiExitModel | MultiModel:
    """The model that a run's record describes, with new weights, or none, on the current device."""

    def with_exits(exit_layers: list[int], method: str) -> MultiExitModel:
        encoder = checkpoint.new_encoder(replace(config, num_hidden_layers=exit_layers[-1]))
        make = BranchModel if method == "branch" else partial(MultiExitModel, method=method)
        return make(encoder, exit_layers, record["num_labels"], exit_strategy=record["exit_strategy"])

    if record["method"] == "mm":
        return MultiModel(with_exits([n], "sweet") for n in record["exit_layers"])
    return with_exits(record["exit_layers"], record["method"])


def check_digests(run: Path, digests: dict | None) -> None:
    """Raise InputError unless the run's files are those whose SHA-256 run.json tells."""
    if digests is None:
        safe.LOG.warning("%s: from before runs had digests, so its files are not compared", run)
        return
    for path in (run / name for name in (WEIGHTS, "config.json", *TOKENIZER_FILES)):
        if (path.name in digests or path.exists()) and sha256(path) != digests.get(path.name):
            said = "is not the file that was saved, or was not there when the run was saved"
            raise InputError(f"{path}: {said} (its SHA-256 is not in run.json)")


def load_trunk(folder: Path) -> tuple[MultiExitModel, dict]:
    """A finished model with one exit, at its end, to grow branches on, and the record of the run that it is.

    `folder` is a run of one exit, of MM (its last model) or of branches (its trunk), or a classifier in the Hugging
    Face layout, whose record holds its `labels` alone. Raises InputError as `load_run` and `load_classifier` do.
    """
    if is_run(folder):
        model, record = load_run(folder)
        model = model[-1] if record["method"] == "mm" else model
        if len(model.heads) > 1 and not isinstance(model, BranchModel):
            layers = ",".join(map(str, model.exit_layers))
            raise InputError(f"--trunk: {folder} has exits after layers {layers}, and a trunk has one, at its end")
        return model.keep_exits(model.exit_layers[-1:]), record
    encoder, classifier, labels = checkpoint.load_classifier(folder)
    trunk = MultiExitModel(encoder, (len(encoder.layers),), len(labels))  # its pooler is the checkpoint's
    trunk.heads[0].classifier.load_state_dict({"weight": classifier[0], "bias": classifier[1]})
    return trunk.eval(), {"labels": labels, "num_labels": len(labels)}


def newest_run(runs: Path = Path("runs")) -> Path:
    """The run folder under `runs` that was written last. Raises InputError where there is none."""
    records = [path for path in runs.glob("[!.]*/run.json") if path.is_file()]  # a dot: of a half-written run
    if not records:
        raise InputError(f"{runs}/: no run here; train one with train.py, or name a run folder")
    return max(records, key=lambda path: path.stat().st_mtime).parent


def versions() -> dict[str, str]:
    """What made a run: the versions of Python, of the operating system's kernel and of the libraries."""
    libraries = {name: version(name) for name in ("torch", "tokenizers", "safetensors", "numpy")}
    return {"python": platform.python_version(), "system": platform.platform(), **libraries}
