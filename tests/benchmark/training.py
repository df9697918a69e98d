"""How studies train: what is missing is made by train.py and evaluate.py, and of each run a record is kept.

A job is what one process makes in one go: records by their paths, and what makes each. Processes with the same jobs
share them: each takes what no other has taken. What is there is not made again.
"""

import argparse
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file

from minisweet.base.commands import Parser, list_of, one_of, whole_number
from minisweet.base.files import InputError, home, written_beside
from minisweet.paper.reproduce import as_options, claimed, run_script
from minisweet.runs.folders import LOGITS
from tests.benchmark import TASKS, keep_record

Job = dict[Path, Callable[[Path], None]]
SMALL = "minilm-l6"  # the default model
ROWS = 6000  # to train on, drawn by the seed, or all where there are fewer


def options_of(parser: Parser, tasks: Sequence[str]) -> argparse.Namespace:
    """What the command line says: a study's own options, and those of all that train. `tasks` are the default."""
    parser.add_argument("--data-dir", type=Path, default=home() / "data")
    parser.add_argument("--own", type=Path, nargs=2, metavar=("TRAIN", "TEST"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", type=list_of(one_of(TASKS)), default=list(tasks))
    parser.add_argument("--seeds", type=list_of(whole_number(0)), default=[0, 1, 2])
    args = parser.parse_args()
    if "own" in args.tasks and not args.own:
        raise InputError("--tasks: own needs --own TRAIN.csv TEST.csv")
    return args


def make_missing(jobs: Iterable[Job]) -> None:
    """Do the jobs whose records are not all there, in their order. The weights of their runs are removed."""
    jobs = list(jobs)
    while todo := [job for job in jobs if is_missing(job)]:
        with claimed([next(iter(job)) for job in todo]) as place:
            job = todo[place]
            if not is_missing(job):  # another process has just made it
                continue
            for record, make in job.items():
                make(record)
            for record in job:
                shutil.rmtree(run_of(record), ignore_errors=True)


def is_missing(job: Job) -> bool:
    """Whether a record of a job is not there."""
    return not all(record.exists() for record in job)


def run_of(record: Path) -> Path:
    """Where the run of a record is made: in `runs` beside `records`."""
    return record.parents[1] / "runs" / record.name


def train_record(record: Path, args: argparse.Namespace, task: str, **options: object) -> None:
    """Train and evaluate a run on a task, and keep its record. `options` are train.py's."""
    data = {"task": task, "train_size": ROWS, "data_dir": args.data_dir}
    if task == "own":
        data = {"data": args.own[0], "dev_data": args.own[1]}
    run = run_of(record)
    train_and_evaluate(run, **data, **options)
    with written_beside(record) as folder:
        keep_record(run, folder)
        tensors = load_file(run / LOGITS)
        save_file(tensors | {"logits": tensors["logits"].half()}, folder / LOGITS)  # half the size; three digits do


def train_and_evaluate(run: Path, **options: object) -> None:
    """Make a run, or go on with it. Options that are None are left out."""
    words = as_options(options | {"out": run}, [*options, "out"])
    for script, arguments in (("train.py", [*words, "--resume"]), ("evaluate.py", [str(run)])):
        if run_script(script, arguments):
            raise InputError(f"{run}: {script} failed, see above")
