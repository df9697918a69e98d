"""The checkpoint of a training, so that a training that was stopped goes on as if it never had been.

Until the run NAME is saved, .NAME.checkpoint/checkpoint.pt lies beside it. It is written every `--save-every` minutes,
at the end of each stage (MM's models, a trunk, branches), and at SIGTERM, SIGHUP or Ctrl-C. Seed, step and process
alone set the order of the examples and dropout. So the weights are those of a training that never stopped, to the bit.
"""

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from torch import nn

from minisweet.base.commands import STOPS
from minisweet.base.devices import all_gather, process_rank
from minisweet.base.files import LOG, InputError, read_json, written_beside
from minisweet.runs.folders import FILES, is_run, read_record

# Options that may change when a training goes on. In place of files, their rows' digests are compared; in place of
# --exit-layers, the model's layers.
MAY_CHANGE = {"out", "overwrite", "resume", "save_every", "task", "data", "dev_data", "data_dir", "exit_layers"}
ROWS = {"train_digest": "training", "dev_digest": "validation"}  # whose digests


@contextmanager
def claim_output(out: Path, may_stand: bool) -> Iterator[Path]:
    """Make the checkpoint's folder, so that no other training writes to `out`, and give the checkpoint's path.

    Afterwards the folder stays if a checkpoint is in it. Raises InputError where the folder, or a run in `out`, is
    there, unless `may_stand`; where `out` holds anything else; and where nothing can be written.
    """
    whole = out.resolve()
    try:
        names = sorted(os.listdir(out)) if out.exists() else []
        if others := [name for name in names if name not in FILES or "run.json" not in names]:
            raise InputError(f"--out: {out} holds {others[0]!r:.100}, which no run made; name another folder")
        if names and not may_stand:
            raise InputError(f"--out: {out} holds a run already; name another folder, or pass --overwrite")
        path = whole.with_name(f".{whole.name}.checkpoint") / "checkpoint.pt"
        with suppress(FileNotFoundError):  # another OSError where the longest name of `written_beside` is too long
            os.stat(whole.with_name(f".{whole.name}.12345678.partial"))
        if process_rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=may_stand)
    except FileExistsError:
        why = f"another training runs, or was stopped, with {path.parent}"
        raise InputError(f"--out: {why}; pass --resume or --overwrite to take it") from None
    except OSError as error:
        raise InputError(f"--out: {out!s:.100} cannot be written ({error.strerror})") from None
    try:
        yield path
    finally:
        if process_rank() == 0 and not path.exists():
            shutil.rmtree(path.parent, ignore_errors=True)


def training_of(record: dict) -> dict:
    """What must stay the same when a training goes on, of a run.json."""
    options = {key: value for key, value in (record.get("arguments") or {}).items() if key not in MAY_CHANGE}
    rest = ("exit_layers", "labels", "train_digest", "dev_digest", "precision")
    return options | {key: record.get(key) for key in rest}


class SavedTraining:
    """The checkpoint at `path` of the training that `record` describes.

    With --resume it holds the stages that are found there. If there are none, but a finished run is in --out,
    `is_finished` is true. Raises InputError where what is found is of another training.
    """

    def __init__(self, path: Path, args: argparse.Namespace, record: dict) -> None:
        self.path, self.minutes, self.is_finished = path, args.save_every, False
        self.stages = {}  # by name: losses, seconds, parameters; of one that was stopped, AdamW and the scaler too
        self.training = before = training_of(record)
        self.signal = 0  # the number of the signal that came
        self.started = self.saved = time.perf_counter()
        if args.resume and path.is_file():
            try:
                saved = torch.load(path, map_location="cpu", weights_only=True)
                before, self.stages = saved["training"], saved["stages"]
            except (OSError, MemoryError):
                raise
            except Exception as error:  # of pickle, zip or torch, according to what is wrong with the file
                why = f"is no checkpoint ({error!s:.100}); to start anew, pass --overwrite"
                raise InputError(f"{path}: {why}") from None
            if {0, *before["exit_layers"]} == {0, *self.training["exit_layers"]}:
                before["exit_layers"] = self.training["exit_layers"]  # exit 0 is fitted after all stages
        elif args.resume and is_run(args.out):
            read_record(args.out)  # raises for a broken run.json
            before, self.is_finished = training_of(read_json(args.out / "run.json")), True
        for key, value in self.training.items():
            if value != (was := before.get(key)):
                pair = f"{key} is {value!s:.60} and was {was!s:.60}"
                what = f"the {ROWS[key]} rows are others" if key in ROWS else pair
                raise InputError(f"--resume: {args.out} is another training's: {what}; to start anew, pass --overwrite")
        *_, place = "step 0", *(f"step {len(saved['losses'])} of {stage}" for stage, saved in self.stages.items())
        self.notes = [f"--resume: goes on from {place}"] * args.resume  # for the user

    def restore(self, parameters: Sequence[nn.Parameter], *others) -> list[list[float]]:
        """Restore parameters, AdamW and scaler, if the stage was begun. Returns each step's losses until there."""
        saved, self.started = self.stages.get(self.stage, {}), time.perf_counter()
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
        is_due = is_over or time.perf_counter() - self.saved > 60 * self.minutes
        is_due, number = map(max, zip(*all_gather((is_due, self.signal)), strict=True))
        if not is_due and not number:
            return
        state = {"losses": losses, "seconds": time.perf_counter() - self.started}
        state["parameters"] = [parameter.detach().cpu() for parameter in parameters]
        if not is_over:
            state["others"] = [other.state_dict() for other in others]
        self.stages[self.stage] = state
        if process_rank() == 0:
            with written_beside(self.path) as new, new.open("wb") as file:  # a full disk is OSError in a file of ours
                try:
                    torch.save({"training": self.training, "stages": self.stages}, file)
                except RuntimeError as error:  # torch's own, while it handles ours
                    raise OSError(error.__context__ or error) from None
        self.saved = time.perf_counter()
        if number:
            LOG.warning("stopped after %d steps of %s; --resume goes on from %s", len(losses), self.stage, self.path)
            sys.exit(128 + number)

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """Within, the stage is trained. SIGTERM, SIGHUP and Ctrl-C wait for `keep`, unless they are ignored (nohup)."""

        def note(number: int, _: object) -> None:
            self.signal = number

        self.stage = stage
        with ExitStack() as former:
            for number in (*STOPS, signal.SIGINT):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    former.callback(signal.signal, number, signal.signal(number, note))
            yield
