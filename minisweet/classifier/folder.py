"""A classifier's folder, a run: load and save its state. RUNS.md lists the files."""

from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save as to_bytes

from minisweet.base.devices import choose_device, choose_precision
from minisweet.base.files import LOG, InputError, json_lines, read_dataclass, written_beside
from minisweet.classifier.bag_of_words import NgramExit
from minisweet.classifier.cascade import Logits
from minisweet.classifier.operating_point import OperatingPoint
from minisweet.classifier.probe import with_linear_head
from minisweet.classifier.run import (
    LOGITS,
    Record,
    load_run_tokenizer,
    load_weights,
    read_record,
    read_tensors,
    read_validation,
    save_run,
)
from minisweet.classifier.state import FitRecord, State, Trained
from minisweet.classifier.training import in_float32
from minisweet.exits import MultiExitModel
from minisweet.loading import new_encoder, read_config

BAG, OPERATING = "bag_of_words.safetensors", "operating.json"


def read_fit_record(folder: Path) -> tuple[Record, FitRecord]:
    """Read the record of a run on own text. Raises InputError if there is none, or it is a run of train.py."""
    record = read_record(folder)
    if record.fit is None:
        raise InputError(f"{folder}: a run of train.py, which is evaluated by: python evaluate.py {folder}")
    return record, read_dataclass(FitRecord, f"{folder}/run.json: fit", record.fit)


def load_model(folder: Path, record: Record, about: FitRecord) -> MultiExitModel:
    """Load the model of a run, with the head that its record names."""

    def make() -> MultiExitModel:
        encoder = new_encoder(read_config(folder), record.depth)
        if about.head == "linear":
            return with_linear_head(encoder, len(record.labels))
        return MultiExitModel(encoder, (record.depth,), len(record.labels))

    return load_weights(folder, record, make)


def load_state(folder: Path, threshold: float | None, device: str, amp: str, batch_size: int) -> State:
    """Load a run. `threshold` is None for the one that was chosen.

    Raises InputError if a file is missing, broken or of another run.
    """
    record, about = read_fit_record(folder)
    model, tokenizer = load_model(folder, record, about), load_run_tokenizer(folder, record)
    bag = NgramExit(record.vocab_size, len(record.labels), [])
    bag.load_state_dict(read_tensors(folder / BAG, record.id)[0])
    tensors, facts = read_tensors(folder / LOGITS, record.id)
    of_bag, of_model = tensors.pop("logits")
    known = {name: tensor.numpy() for name, tensor in tensors.items()}
    logits = Logits(of_bag, of_model, precision=facts["precision"], **known)
    point = read_dataclass(OperatingPoint, folder / OPERATING)
    if point.id != record.id:
        raise InputError(f"{folder / OPERATING}: belongs to other weights than the model beside it")
    place = choose_device(device)
    precision = choose_precision(amp, place)
    trained = Trained(record, about, model.to(place), bag.to(place), tokenizer, read_validation(folder, record))
    deployed = point.threshold if threshold is None else in_float32(threshold)
    state = State(trained, logits, point, deployed, place, precision, batch_size)
    if threshold is None and point.precision != str(precision or torch.float32) and point.threshold < 1:
        LOG.warning(state.promise)
    return state


def files_of_choice(state: State) -> dict[str, bytes]:
    """The files that `choose` may change, by name: the logits and the operating point."""
    logits, run_id = state.logits, state.trained.record.id
    tensors = {name: torch.tensor(getattr(logits, name)) for name in ("labels", "keys", "units")}
    tensors["logits"] = torch.stack([logits.bag, logits.model])  # (2, N, C)
    point = json_lines(asdict(state.point)).encode()
    return {LOGITS: to_bytes(tensors, {"precision": logits.precision, "id": run_id}), OPERATING: point}


def save_choice(folder: Path, state: State) -> None:
    """Write what was chosen into the folder of the run."""
    for name, content in files_of_choice(state).items():
        with written_beside(folder / name) as new:
            new.write_bytes(content)


def save_state(out: Path, state: State, overwrite: bool) -> None:
    """Write a whole run to a folder, whole or not at all. An existing run is replaced, or refused."""
    trained, more = state.trained, files_of_choice(state)
    more[BAG] = to_bytes(trained.bag.state_dict(), {"id": trained.record.id})
    save_run(out, trained.record, trained.model, trained.tokenizer, trained.validation, more, overwrite)
