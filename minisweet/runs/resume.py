"""The checkpoint of a training, so that a training that was stopped goes on as if it never had been.

Until the run NAME is saved, the hidden folder .NAME.checkpoint lies beside it, with one file, checkpoint.pt:

    training   what must be the same when the training goes on: options, exit layers, labels, digests of the rows, ...
    stages     each stage by its name: MM's models, a trunk, branches. All have losses, seconds and parameters; one that
               was stopped also has the states of AdamW and the scaler

It is written whole every `--save-every` minutes, at the end of each stage, and at SIGTERM or Ctrl-C. Of several
processes the first one writes it and all read it, so machines must share --out's disk. The number of losses says where
a stage stands: the seed and the step alone set the order of the examples and dropout. So the weights are those of a
training that never stopped, to the last bit with the same processor, numbers of threads and processes, and torch.
"""

import argparse
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn

from minisweet.base.devices import all_gather, process_rank
from minisweet.base.files import LOG, InputError, read_json, written_beside
from minisweet.runs.folders import check_output

# Options that may be others when a training goes on. Files may have moved, since the digests of their rows decide.
MAY_CHANGE = {"out", "overwrite", "resume", "save_every", "task", "data", "dev_data", "data_dir", "exit_layers"}


@contextmanager
def claim_output(out: Path, may_stand: bool) -> Iterator[Path]:
    """Make the checkpoint's folder, which only one training can do: so no other one writes to `out`.

    Gives the path of the checkpoint. Afterwards the folder stays if a checkpoint is in it. Raises InputError where a
    run is in `out` or the folder is there, unless `may_stand`, and where `check_output` does.
    """
    check_output(out, may_stand)
    out = out.resolve()
    folder = out.with_name(f".{out.name}.checkpoint")
    path = folder / "checkpoint.pt"
    try:
        if process_rank() == 0:
            folder.mkdir(parents=True, exist_ok=may_stand)
    except FileExistsError:
        why = f"another training runs, or was stopped, with {folder}"
        raise InputError(f"--out: {why}; pass --resume or --overwrite to take it") from None
    try:
        yield path
    finally:
        if process_rank() == 0 and not path.exists():
            shutil.rmtree(folder, ignore_errors=True)


def training_of(record: dict) -> dict:
    """What a run.json tells that must be the same where a training goes on."""
    options = {key: value for key, value in record["arguments"].items() if key not in MAY_CHANGE}
    rest = ("exit_layers", "labels", "train_digest", "dev_digest", "precision")
    return options | {key: record.get(key) for key in rest}


class Checkpoint:
    """The checkpoint at `path` of the training whose run.json will tell `record`.

    With --resume it holds the stages that are found there. Where there are none, and the run is in --out already,
    `is_finished`. Raises InputError where what is found is of another training.
    """

    def __init__(self, path: Path, args: argparse.Namespace, record: dict) -> None:
        self.path, self.minutes, self.stages, self.is_finished = path, args.save_every, {}, False
        self.training = before = training_of(record)
        self.signal = 0  # the number of the signal that came
        self.started = self.saved = time.perf_counter()
        if args.resume and path.is_file():
            try:
                before, self.stages = torch.load(path, map_location="cpu", weights_only=True).values()
            except Exception as error:  # of pickle, zip or torch, according to what is wrong with the file
                raise InputError(f"--resume: {path} is broken ({error!s:.100}); to start anew, --overwrite") from None
        elif args.resume and (args.out / "run.json").is_file():
            run = read_json(args.out / "run.json")
            if run.get("diverged"):
                raise InputError(f"--resume: {args.out} diverged; train at a lower --lr, with --overwrite")
            before, self.is_finished = training_of(run), True
        was = {key: before.get(key) for key, value in self.training.items() if value != before.get(key)}
        if was:
            changed = [f"{key} is {self.training[key]!s:.60} and was {old!s:.60}" for key, old in was.items()]
            changed = ", ".join(changed[:2])
            raise InputError(f"--resume: {args.out} is another training's: {changed}; to start anew, pass --overwrite")

    def start(self, stage: str, parameters: Sequence[nn.Parameter], *others) -> list[list[float]]:
        """Start a stage, or take it up where it was stopped: `parameters`, and AdamW and the scaler in `others`.

        Returns each step's losses until there.
        """
        saved, self.started = self.stages.get(stage, {}), time.perf_counter()
        if not saved:
            return []
        self.started -= saved["seconds"]
        with torch.no_grad():
            for parameter, values in zip(parameters, saved["parameters"], strict=True):
                parameter.copy_(values)
        for other, state in zip(others, saved.get("others", ()), strict=False):
            other.load_state_dict(state)
        return saved["losses"]

    def keep(self, stage: str, losses: list, parameters: Sequence[nn.Parameter], *others, is_over: bool) -> None:
        """Save the checkpoint if it is time, if the stage is over, or if a signal came, which then ends the process.

        Where it is time for one of several processes, or one of them got a signal, all of them do so.
        """
        is_due = is_over or time.perf_counter() - self.saved > 60 * self.minutes
        is_due, number = map(max, zip(*all_gather((is_due, self.signal)), strict=True))
        if not is_due and not number:
            return
        state = {"losses": losses, "seconds": time.perf_counter() - self.started}
        state["parameters"] = [parameter.detach().cpu() for parameter in parameters]
        if not is_over:
            state["others"] = [other.state_dict() for other in others]
        self.stages[stage] = state
        if process_rank() == 0:
            with written_beside(self.path) as new, new.open("wb") as file:  # a full disk is OSError in a file of ours
                torch.save({"training": self.training, "stages": self.stages}, file)
        self.saved = time.perf_counter()
        if number:
            LOG.warning("stopped after %d steps of %s; --resume goes on from %s", len(losses), stage, self.path)
            sys.exit(128 + number)

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Within, SIGTERM and Ctrl-C do not end the process but are noted for `keep`."""

        def note(number: int, _: object) -> None:
            self.signal = number

        with ExitStack() as former:
            for number in (signal.SIGTERM, signal.SIGINT):
                former.callback(signal.signal, number, signal.signal(number, note))
            yield
