"""Checkpoints of a training, so that one that was stopped goes on as if it never had been.

Until a run is saved, they stand beside its folder NAME in the hidden folder .NAME.checkpoint:

    STAGE.STEP.SHA256.pt   after so many steps: weights, AdamW, scaler, random states, losses; the last two are kept
    STAGE.end.SHA256.pt    a stage that is over, one of MM's models, a trunk, branches: without AdamW and scaler
    trained.json           what they must be resumed with: options, versions, digests of the model and the data

The number of steps says where in the data a training stands, since the seed alone sets the order of the examples.
"""

import argparse
import hashlib
import os
import pickle
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from minisweet.base.devices import of_all, place
from minisweet.base.safe import InputError, read_json, sha256, write_json
from minisweet.data.text import TOKENIZER_FILES
from minisweet.runs.folders import read_record


def must_stay(record: dict) -> dict:
    """What a run.json tells that must stay the same where a training goes on: options, classes, digests of the data."""
    # --out may be spelled otherwise, and so may --exit-layers: the layers that it comes to are compared below.
    may_change = ("out", "overwrite", "save_every", "exit_layers")
    given = {name: value for name, value in record["arguments"].items() if name not in may_change}
    options = {f"--{name.replace('_', '-')}": value for name, value in given.items()}
    data = {key: record.get(key) for key in ("labels", "train_digest", "dev_digest")}
    return options | data | {"--exit-layers": list(record["exit_layers"])}


def changes(now: dict, before: dict) -> str:
    """What differs, with both values; "" where nothing does."""
    names = [name for name in now if now[name] != before.get(name)]
    return ", ".join(f"{name} is {now[name]!s:.60} and was {before.get(name)!s:.60}" for name in names[:2])


def checkpoint_folder(out: Path) -> Path:
    """Where the checkpoints of the run `out` stand."""
    target = Path(os.path.realpath(out))
    return target.parent / f".{target.name}.checkpoint"


def is_finished(out: Path) -> bool:
    """Whether a run is there, and no newer checkpoint of a training that is to replace it."""
    run, checkpoints = out / "run.json", checkpoint_folder(out).glob("*.pt")
    return run.is_file() and all(path.stat().st_mtime <= run.stat().st_mtime for path in checkpoints)


class Checkpoints:
    """The checkpoints of a training by `args`, train.py's options, of the model in the folder `model` on `device`.

    `record` is what its run.json will tell. Without --resume the first checkpoint written replaces those that are
    there. `finished` says that the run which --resume asks for is there. Raises InputError where it, or the
    checkpoints, are of another training.
    """

    def __init__(self, args: argparse.Namespace, record: dict, model: Path, device: torch.device) -> None:
        self.folder, self.minutes, self.resume = checkpoint_folder(args.out), args.save_every, args.resume
        self.kept: list[Path] = []  # what this training has written, or goes on from
        self.signal = 0  # that came
        self.start = self.saved = time.perf_counter()  # when this stage began, if it had never been stopped
        names = ("model*.safetensors", "*.bin", "config.json", *TOKENIZER_FILES)
        digests = [sha256(path) for path in sorted(path for name in names for path in model.glob(name))]
        self.trained = trained = must_stay(record) | {
            **{name: record["versions"][name] for name in ("torch", "numpy", "tokenizers")},
            "SHA-256 of the model": hashlib.sha256("".join(digests).encode()).hexdigest(),
            "device": f"{device.type} {record['precision']}",
            "processes": place().processes,
        }
        self.finished = args.resume and is_finished(args.out)
        for other in of_all(trained):
            if changed := changes(trained, other):
                raise InputError(f"torchrun: {changed} in another process; all must train the same")
        changed = ""
        if self.finished and read_record(args.out):  # a broken one is refused
            changed = changes(trained, trained | must_stay(read_json(args.out / "run.json")))
        if changed and not args.overwrite:
            where = f"{args.out} is finished, but {changed}"
            raise InputError(f"--resume: {where}; name another --out, or pass --overwrite")
        self.finished = self.finished and not changed
        if any(self.folder.glob("*.pt")) and not self.finished:
            if not args.resume:
                tell(f"{self.folder}: of a training that was stopped; this one starts anew, as --resume is not given")
            elif changed := changes(trained, read_json(self.folder / "trained.json")):
                raise InputError(f"--resume: {changed} in {self.folder}; leave --resume out to start anew")

    def lap(self) -> float:
        """The seconds that the stage which ends here was computed, before a stop too; the next one begins."""
        before, self.start = self.start, time.perf_counter()
        return self.start - before

    def load(self, stage: str, parameters: Sequence[nn.Parameter], *others) -> list:
        """Load the newest whole checkpoint of a stage into its parameters, and the AdamW and scaler in `others`.

        Returns the losses until there; [] where there is none.
        """
        losses = []
        for path in sorted(self.folder.glob(f"{stage.replace(' ', '-')}.*.pt"), reverse=True) if self.resume else ():
            if sha256(path) != path.name.split(".")[-2]:
                tell(f"{path}: broken, its SHA-256 is not that in its name; going on from what is before it")
                continue
            try:
                content = torch.load(path, map_location="cpu", weights_only=True)
                with torch.no_grad():
                    for parameter, saved in zip(parameters, content["parameters"], strict=True):
                        parameter.copy_(saved.view(parameter.shape))
                for other, saved in zip(others, content["others"], strict=False):  # a stage that is over has none
                    other.load_state_dict(saved)
                for generator, saved in zip(generators(parameters), content["random"][place().rank], strict=True):
                    generator.set_state(saved)
                losses, seconds = content["losses"], content["seconds"]
                is_ours = losses.ndim == 2 and type(seconds) is float
                if not is_ours or not all(parameter.isfinite().all() for parameter in parameters):
                    raise ValueError("written by something else")
                losses, self.start = losses.tolist(), self.start - seconds
            except (pickle.UnpicklingError, EOFError, ValueError, LookupError, AttributeError, TypeError, RuntimeError):
                raise InputError(f"{path}: no checkpoint of this training; leave --resume out to start anew") from None
            self.kept.append(path)
            break
        if len(set(of_all(len(losses)))) > 1:
            raise InputError(f"--resume: {self.folder} is not the same for all processes; put --out on a shared disk")
        return losses

    def keep(self, stage: str, losses: list, parameters: Sequence[nn.Parameter], *others, is_over: bool) -> None:
        """Save a checkpoint if it is time, if the stage is over, or if a signal came, which then ends the process."""
        late = time.perf_counter() - self.saved > 60 * self.minutes
        is_due, number = map(max, zip(*of_all((late or is_over, self.signal)), strict=True))
        if is_due or number:
            content = {
                "seconds": time.perf_counter() - self.start,
                "losses": torch.tensor(losses).double(),
                "parameters": [parameter.detach() for parameter in parameters],
                "others": [other.state_dict() for other in others if not is_over],  # AdamW and the scaler
                "random": of_all([generator.get_state() for generator in generators(parameters)]),
            }
            if place().rank == 0:  # the first process alone writes
                self.write(f"{stage.replace(' ', '-')}.{'end' if is_over else f'{len(losses):09d}'}", content)
            self.saved = time.perf_counter()
        if number:
            tell(f"stopped after {len(losses)} steps of {stage}; --resume goes on from {self.folder}")
            sys.exit(128 + number)

    def write(self, name: str, content: dict) -> None:
        """Write a checkpoint, whole or not at all; where that fails, a line says why, and the training goes on."""
        partial = self.folder / "partial"
        steps = [path for path in self.kept if ".end." not in path.name]
        self.kept = [path for path in self.kept if path not in steps[:-1]]  # older ones make room
        try:
            if not self.kept:
                self.remove()  # what was there is of another training, or broken
                write_json(self.folder / "trained.json", self.trained)
            for old in set(self.folder.glob("*.pt")) - set(self.kept):
                old.unlink()
            with partial.open("wb") as file:
                torch.save(content, file)
            self.kept.append(partial.replace(self.folder / f"{name}.{sha256(partial)}.pt"))
        except (OSError, RuntimeError, InputError) as error:  # of a full disk torch may raise either
            partial.unlink(missing_ok=True)
            tell(f"{partial}: cannot be written ({error}); the training goes on")

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Within, the first SIGTERM, SIGINT or SIGHUP is noted for `keep`; a second one ends the process at once."""

        def note(number: int, _) -> None:
            # torchrun may send what the terminal has sent already, and waits for 30 seconds.
            if self.signal and place().processes == 1:
                sys.exit(128 + number)
            self.signal = number

        with ExitStack() as former:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # see nohup
                    former.callback(signal.signal, number, signal.signal(number, note))
            yield

    def remove(self) -> None:
        """Remove the checkpoints."""
        shutil.rmtree(self.folder, ignore_errors=True)


def generators(parameters: Sequence[nn.Parameter]) -> list[torch.Generator]:
    """Those that draw dropout: the CPU's and, where the parameters are on CUDA, their device's."""
    device = parameters[0].device
    cuda = [torch.cuda.default_generators[device.index]] if device.type == "cuda" else []
    return [torch.default_generator, *cuda]


def tell(message: str) -> None:
    """Print a line above the progress bar, where there is one."""
    tqdm.write(message, file=sys.stderr)
