"""Checkpoints of a training, so that one that was stopped goes on as if it never had been.

Until a run is saved, they stand beside its folder NAME in the hidden folder .NAME.checkpoint:

    STAGE.STEP.SHA256.pt   after so many steps: weights, AdamW, scaler, random states, losses; the last two are kept
    STAGE.end.SHA256.pt    a stage that is over, one of MM's models, a trunk, branches: weights and losses
    trained.json           what they must be resumed with: options, versions, digests of the model and the data

The number of steps says where in the data a training stands, since the seed alone sets the order of the examples.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from minisweet.data.own import digest, drawn_rows, load_data
from minisweet.data.text import TokenizedExamples
from minisweet.files.runs import read_record, versions
from minisweet.files.safe import InputError, read_json, sha256, write_json
from minisweet.training.devices import place
from minisweet.training.distributed import largest, of_all
from minisweet.training.options import exit_layers_for


def options(arguments: dict) -> dict:
    """The options that must stay the same when a training goes on, as JSON holds them."""
    others = ("out", "overwrite", "save_every", "resume")
    named = {f"--{name.replace('_', '-')}": value for name, value in arguments.items() if name not in others}
    return json.loads(json.dumps(named, default=str))


def what_is_trained(arguments: dict, folder: Path, examples: TokenizedExamples, dev: str, *device: object) -> dict:
    """All that checkpoints must agree in: options, versions, device, digests of the model in `folder` and the data.

    `dev` is the digest of the validation data.
    """
    data, model = hashlib.sha256(), hashlib.sha256()
    for array in (*examples.ids, examples.lengths, examples.first_lengths, examples.labels):
        data.update(b"" if array is None else array.tobytes())  # a trunk's own answers need no labels
    for path in sorted(path for kind in ("model*.safetensors", "*.bin", "config.json") for path in folder.glob(kind)):
        model.update(sha256(path).encode())
    digests = {"SHA-256 of the data": data.hexdigest(), "SHA-256 of the model": model.hexdigest()}
    digests["SHA-256 of the validation data"] = dev
    libraries = {name: versions()[name] for name in ("torch", "numpy", "tokenizers")}
    there = {"device": " ".join(map(str, device)), "processes": place().processes}
    return options(arguments) | libraries | digests | there


def changes(now: dict, before: dict) -> str:
    """What differs, with both values; "" where nothing does."""
    names = [name for name in now if now[name] != before.get(name)]
    return ", ".join(f"{name} is {now[name]!s:.60} and was {before.get(name)!s:.60}" for name in names[:2])


def is_finished(args: argparse.Namespace) -> bool:
    """Whether the run that --resume asks for is there. Raises InputError where it is one of other options."""
    path, folder = args.out / "run.json", checkpoint_folder(args.out)
    if not path.is_file() or any(file.stat().st_mtime > path.stat().st_mtime for file in folder.glob("*.pt")):
        return False  # or there is a training that is to replace the run
    record = read_record(args.out)
    end = record["exit_layers"][-1] if args.trunk else record["depth"]
    layers = {"exit_layers": list(args.exit_layers or exit_layers_for(end))}
    told = options(record["arguments"] | {"exit_layers": record["exit_layers"]}) | record
    now = options(vars(args) | layers) | data_digests(args, record["labels"])
    if changed := changes({name: value for name, value in now.items() if name in told}, told):  # old runs tell less
        if args.overwrite:
            return False
        raise InputError(f"--resume: {args.out} is finished, but {changed}; name another --out, or pass --overwrite")
    shutil.rmtree(folder, ignore_errors=True)  # of a training that was killed just after it had saved the run
    return True


def data_digests(args: argparse.Namespace, labels: Sequence[str]) -> dict:
    """What run.json tells of the data of a run with these labels, read again. {} where the data is gone."""
    try:
        trunk = (labels, args.targets != "trunk") if args.trunk else ()
        data = load_data(args, *trunk)
    except InputError:
        if args.data is None or not (args.data.exists() and (args.dev_data or args.data).exists()):
            return {}
        raise
    train = digest(data.train, drawn_rows(data.train, args.train_size, args.seed))
    return {"labels": data.record["labels"], "train_digest": train, "dev_digest": data.record["dev_digest"]}


def checkpoint_folder(out: Path) -> Path:
    """Where the checkpoints of the run `out` stand."""
    target = Path(os.path.realpath(out))
    return target.with_name(f".{target.name}.checkpoint")


class Checkpoints:
    """The checkpoints of the training of a run `out`, one every so many `minutes`.

    `trained` is of `what_is_trained`. Without `resume` the first one written replaces those that are there. Raises
    InputError where they are of another training.
    """

    def __init__(self, out: Path, trained: dict, minutes: float, resume: bool) -> None:
        self.folder, self.trained, self.minutes, self.resume = checkpoint_folder(out), trained, minutes, resume
        self.kept: list[Path] = []  # what this training has written, or goes on from
        self.signal = 0  # that came
        self.before = self.earlier = self.start = self.saved = 0.0  # seconds: of this stage and of all before a stop
        for other in of_all(trained):
            if changed := changes(trained, other):
                raise InputError(f"torchrun: {changed} in another process; all must train the same")
        if not any(self.folder.glob("*.pt")):
            return
        if not resume:
            tell(f"{self.folder}: of a training that was stopped; this one starts anew, as --resume is not given")
        elif changed := changes(trained, read_json(self.folder / "trained.json")):
            raise InputError(f"--resume: {changed} in {self.folder}; leave --resume out to start anew")

    def load(self, stage: str, parameters: Sequence[nn.Parameter], *others, which: str = "[0-9]*") -> list:
        """Load the newest whole checkpoint of a stage into its parameters, and the AdamW and scaler in `others`.

        Returns the losses until there; [] where there is none.
        """
        self.start = self.saved = time.perf_counter()
        self.before, losses = 0.0, []
        paths = self.folder.glob(f"{stage.replace(' ', '-')}.{which}.*.pt") if self.resume else ()
        for path in sorted(paths, reverse=True):
            if sha256(path) != path.name.split(".")[-2]:
                tell(f"{path}: broken, its SHA-256 is not that in its name; going on from what is before it")
                continue
            content = torch.load(path, map_location="cpu", weights_only=True)
            self.kept.append(path)
            self.before = content["seconds"]
            self.earlier += self.before
            with torch.no_grad():
                for parameter, saved in zip(parameters, content["parameters"], strict=True):
                    parameter.copy_(saved)
            for other, saved in zip(others, content["others"], strict=True):
                other.load_state_dict(saved)
            if others:
                for generator, saved in zip(generators(parameters), content["random"][place().rank], strict=True):
                    generator.set_state(saved)
            losses = content["losses"].tolist()
            break
        if (most := largest(len(losses), -len(losses)))[0] != -most[1]:
            raise InputError(f"--resume: {self.folder} is not the same for all processes; put --out on a shared disk")
        return losses

    def keep(self, stage: str, losses: list, parameters: Sequence[nn.Parameter], *others) -> None:
        """Save a checkpoint if it is time to, or if a signal came, which ends the process then."""
        due, number = largest(time.perf_counter() - self.saved > 60 * self.minutes, self.signal)
        if due or number:
            self.save(stage, losses, parameters, *others)
        if number:
            tell(f"stopped after {len(losses)} steps of {stage}; --resume goes on from {self.folder}")
            sys.exit(128 + int(number))

    def save(self, stage: str, losses: list, parameters: Sequence[nn.Parameter], *others) -> None:
        """Save a checkpoint, whole or not at all; without `others`, AdamW and scaler, of a stage that is over."""
        content = {"seconds": self.seconds(), "losses": torch.tensor(losses).double()}
        content |= {"parameters": [parameter.detach() for parameter in parameters]}
        content |= {"others": [other.state_dict() for other in others]}
        content |= {"random": of_all([generator.get_state() for generator in generators(parameters)])}
        self.saved = time.perf_counter()
        if place().rank:  # the first process alone writes
            return
        which = f"{len(losses):09d}" if others else "end"
        while not self.write(f"{stage.replace(' ', '-')}.{which}", content) and len(self.steps()) > bool(others):
            self.steps()[0].unlink(missing_ok=True)  # an older one gives way to it
            self.kept.remove(self.steps()[0])
        self.kept = [path for path in self.kept if path not in self.steps()[:-2]]
        for old in set(self.folder.glob("*.pt")) - set(self.kept):
            old.unlink()

    def write(self, name: str, content: dict) -> bool:
        """Write a file of checkpoints; False, and a line that says why, where that fails."""
        partial = self.folder / "partial"
        try:
            if not self.kept:
                self.remove()  # what was there is of another training, or broken
                write_json(self.folder / "trained.json", self.trained)
            with partial.open("wb") as file:
                torch.save(content, file)
            path = self.folder / f"{name}.{sha256(partial)}.pt"
            partial.replace(path)
            self.kept.append(path)
            return True
        except (OSError, RuntimeError, InputError) as error:  # of a full disk torch may raise either
            partial.unlink(missing_ok=True)
            free = shutil.disk_usage(self.folder.parent).free >> 20
            tell(f"{partial}: cannot be written, {free} MiB are free ({error}); the training goes on")
            return False

    def steps(self) -> list[Path]:
        """The kept checkpoints of stages that were not over, oldest first."""
        return [path for path in self.kept if ".end." not in path.name]

    def seconds(self) -> float:
        """How long this stage has been computed, before it was stopped too."""
        return self.before + time.perf_counter() - self.start

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Within, the first SIGTERM, SIGINT or SIGHUP is noted for `keep`; a second one does what it does elsewhere."""
        former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        noted = {number: handler for number, handler in former.items() if handler is not signal.SIG_IGN}  # see nohup

        def note(number: int, _) -> None:
            self.signal = number
            if place().processes == 1:  # torchrun may send what the terminal has sent already, and waits for 30 seconds
                restore()

        def restore() -> None:
            for number, handler in noted.items():
                signal.signal(number, handler)

        for number in noted:
            signal.signal(number, note)
        try:
            yield
        finally:
            restore()

    @contextmanager
    def until_saved(self) -> Iterator[None]:
        """Within, the run is saved: then the checkpoints go. If it cannot be, they stay, and the error says where."""
        try:
            yield
        except (OSError, InputError) as error:
            where = f"; the finished training is kept in {self.folder}: --resume saves it"
            raise InputError(f"{error}{where if any('.end.' in path.name for path in self.kept) else ''}") from None
        self.remove()

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
