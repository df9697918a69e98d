"""The checkpoint of a training, so that a training that was stopped goes on as if it never had been.

Until the run NAME is saved, .NAME.checkpoint/ lies beside it. Its checkpoint.pt holds what came of each stage that is
over (a trunk, branches, MM's models, answers to texts), and of the running one losses, parameters, optimizer and scaler
as they were at most ten minutes ago. Seed and step alone set the order of the examples and dropout. So the weights are
those of a training that never stopped, to the bit. A lock in the folder says that the training lives. It is released
when the process ends.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from minisweet.base.commands import Parser
from minisweet.base.files import LOG, InputError, written_beside
from minisweet.checkpoint import WEIGHTS
from minisweet.run import FILES, Run, is_run

try:
    import fcntl
except ImportError:  # Windows: the folder alone is the claim
    fcntl = None

MINUTES = 10  # between two checkpoints


def add_output_options(parser: Parser) -> None:
    """Add --resume and --overwrite."""
    either = parser.add_mutually_exclusive_group().add_argument
    either("--resume", action="store_true", help="go on from the checkpoint of a training that was stopped")
    either("--overwrite", action="store_true", help="replace the run, or a stopped training, in --out")


def checkpoint_folder(out: Path) -> Path:
    """Where the checkpoint of the training to `out` lies."""
    real = Path(os.path.realpath(out))
    return real.parent / f".{real.name}.checkpoint"


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
def claim_output(out: Path, resume: bool = False, overwrite: bool = False) -> Iterator["SavedTraining"]:
    """Make the checkpoint's folder and hold its lock, so that no other training writes to `out`.

    Afterwards the folder stays if a checkpoint is in it. Raises InputError where another training holds it; where it,
    or a run in `out`, is there, unless it may be resumed or overwritten; and where `out` holds anything else.
    """
    saved = SavedTraining(out, resume)
    names = sorted(os.listdir(out)) if out.is_dir() else ["a file"] * os.path.lexists(out)
    if others := [name for name in names if name not in FILES or "run.json" not in names]:
        raise InputError(f"--out: {out} holds {others[0]!r:.100}, which no run made; name another folder")
    if names and not (resume or overwrite):
        raise InputError(f"--out: {out} holds a run already; name another folder, or pass --overwrite")
    folder = saved.path.parent
    try:
        folder.mkdir(parents=True, exist_ok=resume or overwrite)
    except FileExistsError:
        why = f"another training runs, or was stopped, with {folder}"
        raise InputError(f"--out: {why}; pass --resume or --overwrite to take it") from None
    except OSError as error:
        raise InputError(f"--out: {out!s:.100} cannot be written ({error.strerror})") from None
    with claimed(folder) as is_mine:
        if not is_mine:
            raise InputError(f"--out: another process trains {out} now; wait for it, or name another folder")
        try:
            yield saved
        finally:
            if not saved.path.exists():
                shutil.rmtree(folder, ignore_errors=True)


class SavedTraining:
    """What a training to `out` has come to, stage by stage; without `out` nothing is written.

    `stages` has by name the losses and seconds, and what is needed to go on.
    """

    def __init__(self, out: Path | None = None, resume: bool = False) -> None:
        self.out, self.resume, self.training, self.stages = out, resume, {}, {}
        self.path = out and checkpoint_folder(out) / "checkpoint.pt"
        self.started = self.saved = time.perf_counter()

    def begin(self, training: dict) -> bool:
        """Whether the run of this training is finished. If not, the stages that were begun are there from now on.

        `training` is what must be equal where it goes on. Raises InputError where what is found is another's.
        """
        self.training, before, is_finished = training, training, False
        if self.resume and self.path.is_file():
            try:
                before, self.stages = torch.load(self.path, map_location="cpu", weights_only=True).values()
            except Exception as error:  # of pickle or zip, according to what is wrong with the file
                why = f"{self.path} is not readable ({error!s:.100}); to start anew, pass --overwrite"
                raise InputError(why, "resume") from None
            done = [f"{len(state['losses'])} steps of {stage}" for stage, state in self.stages.items()]
            LOG.info("--resume: goes on after %s", ", ".join(done))
        elif self.resume and is_run(self.out):
            before, is_finished = Run.read(self.out).record.training(), True
        for key, value in training.items():
            if value != (was := before.get(key)):
                hidden = {"digest": "its rows are others", "weights": "it starts from other weights"}
                what = hidden.get(key, f"{key} is {value!s:.60} and was {was!s:.60}")
                raise InputError(f"{self.out} is another training's: {what}; to start anew, pass --overwrite", "resume")
        return is_finished

    def stage(self, name: str, bar) -> "SavedTraining":
        """Begin a stage, whose losses `bar` shows."""
        self.name, self.bar, self.started = name, bar, time.perf_counter()
        return self

    def restore(self, parameters: Sequence[nn.Parameter], *others) -> list[list[float]]:
        """Restore parameters, AdamW and scaler, if the stage was begun. Returns each step's losses until there."""
        if not (saved := self.stages.get(self.name)):
            return []
        self.started -= saved["seconds"]
        with torch.no_grad():
            for parameter, values in zip(parameters, saved["parameters"], strict=True):
                parameter.copy_(values)
        for other, state in zip(others, saved["others"], strict=False):
            other.load_state_dict(state)
        return saved["losses"]

    def keep(self, losses: list, steps: int, parameters: Sequence[nn.Parameter], *others) -> None:
        """Save where the stage is, if it is time, or if it is over."""
        mean = [sum(values) / len(values) for values in zip(*losses[-50:], strict=True)]
        self.bar.set_postfix_str("loss " + ", ".join(f"{value:.2f}" for value in mean), refresh=False)
        is_over = len(losses) == steps
        if is_over or (self.path and time.perf_counter() - self.saved > 60 * MINUTES):
            kept = [parameter.detach().cpu() for parameter in parameters] if self.path else []
            state = {"losses": losses, "parameters": kept}
            self.save(self.name, state | {"others": [] if is_over else [other.state_dict() for other in others]})

    def once(self, name: str, make: Callable[[], Tensor | None]) -> Tensor | None:
        """What `make` makes, as a stage without steps; where it was made before, what was made then."""
        if self.stages.get(name, {}).get("made") is None:
            self.started = time.perf_counter()
            self.save(name, {"losses": [], "made": make()})
        return self.stages[name]["made"]

    def save(self, name: str, state: dict) -> None:
        """Write what a stage has come to."""
        self.stages[name] = state | {"seconds": time.perf_counter() - self.started}
        if self.path:
            with written_beside(self.path) as new, new.open("wb") as file:
                try:
                    torch.save({"training": self.training, "stages": self.stages}, file)
                except RuntimeError as error:  # torch's own, while it handles that of a full disk
                    raise OSError(error.__context__ or error) from None
        self.saved = time.perf_counter()

    def finish(self, run: Run) -> None:
        """Write the run, whose training is over, in place of its checkpoint.

        One that diverged is a run, too, and counts as done; but it replaces no weights.
        """
        if self.out:
            if run.record.diverged is None or not (self.out / WEIGHTS).exists():
                run.save(self.out)
            self.path.unlink(missing_ok=True)
