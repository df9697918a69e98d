"""The checkpoint of a training, so that a training that was stopped goes on as if it never had been.

Until the run NAME is saved, .NAME.checkpoint/ lies beside it. Its checkpoint.pt holds stage, losses, parameters,
optimizer and scaler. It is written every ten minutes, at the end of each stage (MM's models, a trunk, branches), and at
SIGTERM or Ctrl-C. Seed and step alone set the order of the examples and dropout. So the weights are those of a training
that never stopped, to the bit. A lock in the folder says that the training lives. It ends with its process.
"""

import argparse
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

from minisweet.base.files import LOG, InputError, read_json, written_beside
from minisweet.runs.folders import FILES, is_run
from minisweet.training import largest, process_rank

try:
    import fcntl
except ImportError:  # Windows: the folder alone is the claim
    fcntl = None

MINUTES = 10  # between two checkpoints
# Options that may change when a training goes on. In place of files, their rows' digests are compared.
MAY_CHANGE = set("out overwrite resume task data_dir file dev_data unlabelled max_lost sure max_share".split())
ROWS = ("rows_digest", "trained_keys")  # of the rows in their order, unlabelled ones too, and of all texts


def checkpoint_folder(out: Path) -> Path:
    """Where the checkpoint of the training to `out` lies."""
    out = out.resolve()
    return out.with_name(f".{out.name}.checkpoint")


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Hold the lock in a checkpoint's folder. Gives False where there is none, or another process holds its lock."""
    if fcntl is None or not folder.exists():
        yield folder.exists()
        return
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def is_claimed(out: Path) -> bool:
    """Whether a training to `out` lives."""
    with claimed(folder := checkpoint_folder(out)) as is_mine:
        return folder.exists() and not is_mine


@contextmanager
def claim_output(out: Path, may_stand: bool) -> Iterator[Path]:
    """Make the checkpoint's folder and hold its lock, so that no other training writes to `out`; give the folder.

    Afterwards the folder stays if a checkpoint is in it. Raises InputError where another training holds it; where it,
    or a run in `out`, is there, unless `may_stand`; where `out` holds anything else; and where nothing can be written.
    """
    folder = checkpoint_folder(out)
    names = sorted(os.listdir(out)) if out.is_dir() else ["a file"] * out.exists()
    if others := [name for name in names if name not in FILES or "run.json" not in names]:
        raise InputError(f"--out: {out} holds {others[0]!r:.100}, which no run made; name another folder")
    if names and not may_stand:
        raise InputError(f"--out: {out} holds a run already; name another folder, or pass --overwrite")
    if process_rank():
        yield folder
        return
    try:
        folder.mkdir(parents=True, exist_ok=may_stand)
    except FileExistsError:
        why = f"another training runs, or was stopped, with {folder}"
        raise InputError(f"--out: {why}; pass --resume or --overwrite to take it") from None
    except OSError as error:
        raise InputError(f"--out: {out!s:.100} cannot be written ({error.strerror})") from None
    with claimed(folder) as is_mine:
        if not is_mine:
            raise InputError(f"--out: another process trains {out} now; wait for it, or name another folder")
        try:
            yield folder
        finally:
            if not (folder / "checkpoint.pt").exists():
                shutil.rmtree(folder, ignore_errors=True)


def training_of(run_json: dict) -> dict:
    """What must stay the same when a training goes on, of a run.json."""
    options = {key: value for key, value in (run_json.get("arguments") or {}).items() if key not in MAY_CHANGE}
    return options | {key: run_json.get(key) for key in ("exit_layers", "labels", *ROWS, "precision")}


class SavedTraining:
    """The checkpoint in `folder` of the training that `run_json` describes.

    With --resume it holds the stages that are found there. If there are none, but a finished run is in --out,
    `is_finished` is true. Raises InputError where what is found is of another training.
    """

    def __init__(self, folder: Path, args: argparse.Namespace, run_json: dict) -> None:
        self.path, self.is_finished = folder / "checkpoint.pt", False
        self.stages = {}  # by name: losses, seconds, parameters; of one that was stopped, AdamW and the scaler too
        self.training = before = training_of(run_json)
        self.signal = 0  # the number of the signal that came
        self.started = self.saved = time.perf_counter()
        if args.resume and self.path.is_file():
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            before, self.stages = saved["training"], saved["stages"]
            done = [f"{len(state['losses'])} steps of {stage}" for stage, state in self.stages.items()]
            LOG.info("--resume: goes on after %s", ", ".join(done))
        elif args.resume and is_run(args.out):
            before, self.is_finished = training_of(read_json(args.out / "run.json")), True
        for key, value in self.training.items():
            if value != (was := before.get(key)):
                what = "its rows are others" if key in ROWS else f"{key} is {value!s:.60} and was {was!s:.60}"
                raise InputError(f"--resume: {args.out} is another training's: {what}; to start anew, pass --overwrite")

    def restore(self, parameters: Sequence[nn.Parameter], *others) -> list[list[float]]:
        """Restore parameters, AdamW and scaler, if the stage was begun. Returns each step's losses until there."""
        saved, self.started = self.stages.get(self.stage), time.perf_counter()
        if not saved:
            return []
        self.started -= saved["seconds"]
        with torch.no_grad():
            for parameter, values in zip(parameters, saved["parameters"], strict=True):
                parameter.copy_(values)
        for other, state in zip(others, saved.get("others", ()), strict=False):
            other.load_state_dict(state)
        return saved["losses"]

    def keep(self, losses: list, parameters: Sequence[nn.Parameter], *others, is_over: bool) -> None:
        """Save the checkpoint if it is time, if the stage is over, or if a signal came, which then ends the process.

        All processes save together as soon as one of them must.
        """
        mean = [sum(values) / len(values) for values in zip(*losses[-50:], strict=True)]
        self.bar.set_postfix_str("loss " + ", ".join(f"{value:.2f}" for value in mean), refresh=False)
        is_due = is_over or time.perf_counter() - self.saved > 60 * MINUTES
        number, is_due = largest(self.signal), largest(int(is_due))
        if not is_due and not number:
            return
        state = {"losses": losses, "parameters": [parameter.detach().cpu() for parameter in parameters]}
        if not is_over:
            state["others"] = [other.state_dict() for other in others]
        self.save(self.stage, state)
        if number:
            LOG.warning("stopped after %d steps of %s; --resume goes on from there", len(losses), self.stage)
            sys.exit(128 + number)

    def save(self, stage: str, state: dict) -> None:
        """Write what a stage has come to."""
        self.stages[stage] = state | {"seconds": time.perf_counter() - self.started}
        if process_rank() == 0:
            with written_beside(self.path) as new, new.open("wb") as file:
                try:
                    torch.save({"training": self.training, "stages": self.stages}, file)
                except RuntimeError as error:  # torch's own, while it handles that of a full disk
                    raise OSError(error.__context__ or error) from None
        self.saved = time.perf_counter()

    @contextmanager
    def timed(self, stage: str) -> Iterator[dict]:
        """Within, a stage without steps runs. What it puts into the dictionary is saved at the end."""
        self.started, state = time.perf_counter(), {"losses": []}
        yield state
        self.save(stage, state)

    @contextmanager
    def during(self, stage: str, bar) -> Iterator[None]:
        """Within, the stage is trained, and `bar` shows its losses. A command's SIGTERM and Ctrl-C wait for `keep`."""
        self.stage, self.bar, former = stage, bar, {}
        if callable(signal.getsignal(signal.SIGTERM)):  # a command, by `run_command`; else Python's own signals stay
            for number in (signal.SIGTERM, signal.SIGINT):
                former[number] = signal.signal(number, lambda number, _: setattr(self, "signal", number))
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
