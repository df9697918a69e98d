"""Checkpoints of a training, so that one that was stopped goes on as if it never had been.

Until a run is saved, they stand beside its folder NAME in the hidden folder .NAME.checkpoint:

    STAGE.STEP.SHA256.pt   after so many steps: weights, AdamW, scaler, random states, losses; the last two are kept
    STAGE.end.SHA256.pt    a stage that is over, one of MM's models, a trunk, branches: without AdamW and scaler
    trained.json           what they must be resumed with: options and exit layers, labels, digests of the model and the
                           data, versions, device, precision, number of processes; and which machine it was

One is written every `--save-every` minutes, at the end of a stage, and when a signal comes. The number of steps says
where in the data a training stands, since the seed alone sets the order of the examples: train.py skips as many. The
weights are then those of a training that never stopped, to the last bit where the processor and its threads are the
same; trained.json tells which they were.
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from torch import nn

from minisweet.base.devices import device_name, of_all, place
from minisweet.base.safe import LOG, InputError, read_json, sha256, sync, write_json
from minisweet.data.text import TOKENIZER_FILES
from minisweet.runs.folders import read_record

# Keys of run.json that tell whether files are the same, wherever they lie.
DIGESTS = {"train_digest": "training data", "dev_digest": "validation data", "model_digest": "model"}
PLACES = ("out", "data", "dev_data", "data_dir", "model", "trunk")  # options that name files


def model_digest(folder: Path) -> str:
    """The SHA-256 over the files of the model that a training starts from, its config and tokenizer among them."""
    names = ("model*.safetensors", "*.bin", "config.json", *TOKENIZER_FILES)
    digests = [sha256(path) for path in sorted(path for name in names for path in folder.glob(name))]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def must_stay(record: dict) -> dict:
    """What a run.json tells that must stay the same where a training goes on: options, classes, digests."""
    arguments = record["arguments"]
    # --exit-layers is compared as the layers that it comes to. --task is the name of an own file, which may move.
    may_change = {"overwrite", "save_every", "exit_layers", *PLACES} | ({"task"} if arguments.get("data") else set())
    options = {f"--{name.replace('_', '-')}": value for name, value in arguments.items() if name not in may_change}
    options["--trunk"] = "given" if arguments.get("trunk") else "not given"
    kept = {key: record.get(key) for key in ("labels", *DIGESTS)}
    return options | {"--exit-layers": list(record["exit_layers"])} | kept


def changes(now: dict, before: dict) -> str:
    """What differs, with both values; if digests alone do, of which files; "" where nothing differs."""
    names = [name for name in now if now[name] != before.get(name)]
    told = [f"{name} is {now[name]!s:.60} and was {before.get(name)!s:.60}" for name in names if name not in DIGESTS]
    return ", ".join(told[:2]) or ", ".join(f"the {DIGESTS[name]} has changed" for name in names)


def checkpoint_folder(out: Path) -> Path:
    """Where the checkpoints of the run `out` stand."""
    target = Path(os.path.realpath(out))
    return target.parent / f".{target.name}.checkpoint"


def is_finished(out: Path) -> bool:
    """Whether a run is there, and no newer checkpoint of a training that is to replace it."""
    run, checkpoints = out / "run.json", checkpoint_folder(out).glob("*.pt")
    return run.is_file() and all(path.stat().st_mtime <= run.stat().st_mtime for path in checkpoints)


class Checkpoints:
    """The checkpoints of a training by `args`, train.py's options, on `device`.

    `record` is what its run.json will tell. `finished` says that the run which --resume asks for is there. Raises
    InputError where it, or the checkpoints, are of another training, and where there are checkpoints and neither
    --resume nor --overwrite is given. With --overwrite they go when the first new one is written.
    """

    def __init__(self, args: argparse.Namespace, record: dict, device: torch.device) -> None:
        self.folder, self.minutes, self.resume = checkpoint_folder(args.out), args.save_every, args.resume
        self.kept: list[Path] = []  # what this training has written, or goes on from
        self.signal = 0  # that came
        self.start = self.saved = time.perf_counter()  # when this stage began, if it had never been stopped
        self.machine = {"machine": device_name(device)}
        self.trained = must_stay(record) | {name: record["versions"][name] for name in ("torch", "numpy", "tokenizers")}
        self.trained |= {"device": f"{device.type} {record['precision']}", "processes": place().processes}
        for other in of_all(self.trained):
            if changed := changes(self.trained, other):
                raise InputError(f"torchrun: of another process {changed}; all must train the same")
        self.finished = args.resume and is_finished(args.out) and self._is_same_run(args.out, args.overwrite)
        if any(self.folder.glob("*.pt")) and not self.finished:
            self._check_stopped(args.out, args.overwrite)

    def _is_same_run(self, out: Path, overwrite: bool) -> bool:
        """Whether the run at `out` is this training's. Raises InputError where it is not, and may not be replaced."""
        read_record(out)  # a broken one is refused
        # Versions and device, of which `must_stay` tells nothing, may be others than the finished run's.
        changed = changes(self.trained, self.trained | must_stay(read_json(out / "run.json")))
        if changed and not overwrite:
            raise InputError(f"--resume: {out} is finished, but {changed}; name another --out, or pass --overwrite")
        return not changed

    def _check_stopped(self, out: Path, overwrite: bool) -> None:
        """Raise InputError unless the checkpoints that are there are this training's, or may go."""
        if not self.resume and not overwrite:
            kept = f"a training that was stopped, in {self.folder}"
            raise InputError(f"--out: {out} has {kept}; pass --resume to go on, or --overwrite to start anew")
        if not self.resume:
            LOG.warning("%s: of a training that was stopped; this one starts anew", self.folder)
            return
        before = read_json(self.folder / "trained.json")
        if changed := changes(self.trained, before):
            why = f"{self.folder} is of another training: {changed}"
            raise InputError(f"--resume: {why}; to start anew, --overwrite without --resume")
        if changed := changes(self.machine, before):
            LOG.warning("--resume: %s; the last bits may not be those of a training that never stopped", changed)

    def lap(self) -> float:
        """The seconds that the stage which ends here was computed, before a stop too; the next one begins."""
        before, self.start = self.start, time.perf_counter()
        return self.start - before

    def load(self, stage: str, parameters: Sequence[nn.Parameter], *others) -> list:
        """Load the newest whole checkpoint of a stage into its parameters, and the AdamW and scaler in `others`.

        Returns the losses until there; [] where there is none.
        """
        losses = []
        found = self.folder.glob(f"{stage.replace(' ', '-')}.*.pt") if self.resume else ()
        for path in sorted(found, reverse=True):  # the newest first: names hold nine digits, or "end", which sorts last
            if sha256(path) != path.name.split(".")[-2]:
                LOG.warning("%s: broken, its SHA-256 is not that in its name; going on from what is before it", path)
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
                anew = "to start anew, --overwrite without --resume"
                raise InputError(f"{path}: no checkpoint of this training; {anew}") from None
            self.kept.append(path)
            break
        if len(set(of_all(len(losses)))) > 1:
            raise InputError(f"--resume: {self.folder} is not the same for all processes; put --out on a shared disk")
        return losses

    def keep(self, stage: str, losses: list, parameters: Sequence[nn.Parameter], *others, is_over: bool) -> None:
        """Save a checkpoint if it is time, if the stage is over, or if a signal came, which then ends the process."""
        late = time.perf_counter() - self.saved > 60 * self.minutes
        # Where it is time for one of the processes, or one of them got a signal, all save.
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
            kept = f"--resume goes on from {self.folder}" if self.kept or place().rank else "nothing of it is kept"
            LOG.warning("stopped after %d steps of %s; %s", len(losses), stage, kept)
            sys.exit(128 + number)

    def write(self, name: str, content: dict) -> None:
        """Write a checkpoint, whole or not at all; where that fails, a line says why, and the one before stays."""
        partial = self.folder / "partial"
        steps = [path for path in self.kept if ".end." not in path.name]
        self.kept = [path for path in self.kept if path not in steps[:-1]]  # the last one stays, beside the new one
        try:
            if not self.kept:
                self.remove()  # what was there is of another training, or broken
                write_json(self.folder / "trained.json", self.trained | self.machine)
            for old in set(self.folder.glob("*.pt")) - set(self.kept):
                old.unlink()
            with partial.open("wb") as file:
                torch.save(content, file)
            with ThreadPoolExecutor() as pool:  # the disk works while the digest is computed
                _, digest = pool.map(lambda do: do(partial), (sync, sha256))
            self.kept.append(partial.replace(self.folder / f"{name}.{digest}.pt"))
            sync(self.folder)
        except (OSError, RuntimeError, InputError) as error:  # of a full disk torch may raise either
            with suppress(OSError):
                partial.unlink()
            LOG.warning("%s: cannot be written (%s)%s", partial, error, "; the training goes on" * (not self.signal))

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Within, the first SIGTERM, SIGINT or SIGHUP is noted for `keep`; a second one ends the process at once."""

        def note(number: int, _) -> None:
            # torchrun may send what the terminal has sent already, and waits for 30 seconds.
            if self.signal and place().processes == 1:
                sys.exit(128 + number)
            self.signal = number

        with ExitStack() as former:
            for number in (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)):  # not on Windows
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
