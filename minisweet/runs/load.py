"""Run folders read: the record, the model, the validation rows, and what was computed of them.

Dimension letter: C classes.
"""

import json
from dataclasses import replace
from pathlib import Path

from safetensors import safe_open

from minisweet.base.files import LOG, InputError, read_dataclass, read_json
from minisweet.beyond.ngrams import NgramExit
from minisweet.checkpoint import WEIGHTS, load_classifier, load_strict, new_encoder, read_config
from minisweet.data.text import Examples
from minisweet.exits import ExitModel, MultiExitModel
from minisweet.methods import METHODS
from minisweet.runs.folders import EVALUATION, OPERATING, VALIDATION, is_run
from minisweet.runs.records import Evaluation, OperatingPoint, Record


def read_record(run: Path) -> Record:
    """Read a run's run.json. Raises InputError for a folder that is no run, and a key that is missing or wrong."""
    if not is_run(run):
        raise InputError(f"{run}: no run here (it has no run.json); train one with train.py or minisweet fit")
    content = read_json(run / "run.json")
    return read_dataclass(Record, run / "run.json", content.get("arguments", {}) | content)


def run_id(run: Path) -> str | None:
    """The id of a run's weights, which their file says; None where there are no weights."""
    if not (run / WEIGHTS).is_file():
        return None
    with safe_open(run / WEIGHTS, "pt") as file:
        return (file.metadata() or {}).get("id")


def check_id(file: Path, found: str | None) -> None:
    """Raise InputError where a file that was computed from a run is of other weights than those beside it."""
    wanted = run_id(file.parent)
    if wanted and found != wanted:
        raise InputError(f"{file}: is of other weights than the model beside it; make it anew")


def read_result(kind: type, run: Path, name: str, command: str):
    """Read a run's evaluation.json or operating.json. InputError where it is missing, or is of another run."""
    if not (run / name).is_file():
        read_record(run)
        raise InputError(f"{run}: has no {name}; first: {command} {run}")
    result = read_dataclass(kind, run / name)
    check_id(run / name, result.id)
    return result


def read_evaluation(run: Path) -> Evaluation:
    """What evaluate.py found of a run."""
    return read_result(Evaluation, run, EVALUATION, "python evaluate.py")


def read_operating_point(run: Path) -> OperatingPoint:
    """What was chosen for a run."""
    return read_result(OperatingPoint, run, OPERATING, "minisweet choose")


def load_run(run: Path) -> tuple[ExitModel, Record]:
    """A run's model in float32, in evaluation mode and on the CPU; and its record.

    Raises InputError for a folder that is no run, a training that diverged, and files that are broken or do not fit.
    """
    record = read_record(run)
    if record.diverged is not None:
        raise InputError(f"{run}: its training diverged at step {record.diverged}; it has no weights")
    if record.id != (found := run_id(run)):
        raise InputError(f"{run / WEIGHTS}: is of another run than run.json beside it ({found})")
    config, C, layers = read_config(run), record.num_labels, [n for n in record.exit_layers if n > 0]

    def make() -> ExitModel:
        encoder = new_encoder(replace(config, num_hidden_layers=layers[-1]))
        encoder.depth = record.depth
        model = METHODS[record.method].build(encoder, layers, C, exit_strategy=record.exit_strategy)
        if record.exit_layers[0] == 0:
            model.add_ngrams(NgramExit(config.vocab_size, C, [], pairs=len(record.columns) == 2))
        return model

    return load_strict(run / WEIGHTS, make).eval(), record


def read_validation(run: Path, record: Record) -> Examples:
    """The validation rows in a run."""
    with (run / VALIDATION).open(encoding="utf-8", newline="\n") as file:
        rows = [json.loads(line) for line in file]
    numbers = {name: number for number, name in enumerate(record.labels)} | {None: -1}
    first, second, difficulties = (
        [row[name] for row in rows] if name in rows[0] else None
        for name in ("text" if "text" in rows[0] else "sentence1", "sentence2", "difficulty")
    )
    return Examples(first, second, [numbers[row["label"]] for row in rows], difficulties)


def load_trunk(folder: Path) -> tuple[MultiExitModel, list[str]]:
    """A run's model with its last exit alone, or a classifier in the Hugging Face layout; and its labels."""
    if is_run(folder):
        model, record = load_run(folder)
        model = model.models_alone[-1]
        return model.keep_exits(model.head_layers[-1:]), record.labels
    if not folder.is_dir():
        raise InputError(f"--trunk: {folder} is no folder; should be a run, or a classifier in the Hugging Face layout")
    encoder, classifier, labels = load_classifier(folder)
    if labels == [f"LABEL_{number}" for number in range(len(labels))]:
        LOG.warning("%s: its labels have no names; write them into id2label of its config.json", folder)
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
