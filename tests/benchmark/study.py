"""The study of exits: branches, EE, SWEET and MM, with and without exit 0, on tasks of GLUE and on own text.

    python -m tests.benchmark.study --data-dir DIR --out FOLDER
    python -m tests.benchmark.study --data-dir DIR --out FOLDER/base --model mpnet-base
        --tasks sst2,mrpc,cola,own --own TRAIN.csv TEST.csv

A run of branches with exit 0 in front holds all that is made of exit 0, of branches and of full depth, since its exits
are trained apart. Its exit 0 is also put in front of EE, SWEET and MM, whose training it does not touch. FOLDER/records
keeps run.json and the validation logits of each run, and what is there is not made again. Then zero_tables.py makes the
tables.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from safetensors.torch import load_file, save_file

from minisweet.base.commands import Parser, list_of, one_of, positive_number, whole_number
from minisweet.base.files import InputError, read_json, write_json, written_beside
from minisweet.checkpoint import read_config
from minisweet.methods import exit_layers_for
from minisweet.hub import home, model_folder
from tests.benchmark import CHECKOUT, TASKS, USUAL, run_study
from tests.benchmark.archive import LOGITS, METHODS

SMALL = "minilm-l6"  # the default model
ROWS = 6000  # of GLUE to train on, drawn by the seed, or all where there are fewer
RATE = float(USUAL)  # of all models but the small one
RATES = {  # of 5e-5, 1e-4, 2e-4, 4e-4: the best area on seed 0's validation rows, by TASKS; own was not searched
    "branch": (1e-4, 5e-5, 1e-4, 1e-4, 1e-4, 2e-4, 2e-4),
    "ee": (4e-4, 1e-4, 2e-4, 1e-4, 5e-5, 1e-4, 2e-4),
    "sweet": (1e-4, 1e-4, 5e-5, 1e-4, 5e-5, 2e-4, 2e-4),
    "mm": (1e-4, 1e-4, 1e-4, 1e-4, 1e-4, 5e-5, 2e-4),
}
KEPT = "task labels metric exit_layers depth device precision versions stages seconds".split()  # of run.json
SETTINGS = "model method exit_strategy exit_layers seed lr epochs batch_size max_length train_size amp".split()


def options_of(parser: Parser, tasks: Sequence[str]) -> argparse.Namespace:
    """What the command line says: a study's own options, and those of all that train. `tasks` are the default."""
    parser.add_argument("--model", default=SMALL)
    parser.add_argument("--data-dir", type=Path, default=home() / "data")
    parser.add_argument("--own", type=Path, nargs=2, metavar=("TRAIN", "TEST"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", type=list_of(one_of(*dict.fromkeys((*TASKS, *tasks)))), default=list(tasks))
    parser.add_argument("--seeds", type=list_of(whole_number(0)), default=[0, 1, 2])
    args = parser.parse_args()
    if "own" in args.tasks and not args.own:
        raise InputError("--tasks: own needs --own TRAIN.csv TEST.csv")
    return args


def run_in_clone(words: list[str]) -> int:
    """Run a script or a module of the clone. Returns its exit status."""
    return subprocess.run([sys.executable, *words], cwd=CHECKOUT).returncode


def make_run(run: Path, *script: str, **options: object) -> None:
    """Train and evaluate a run, or go on with it. `options` are the script's. Those that are None are left out."""
    words = []
    for name, value in (options | {"out": run}).items():
        if value is not None:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            words += [f"--{name.replace('_', '-')}", text]
    for command in ([*script, *words, "--resume"], ["evaluate.py", str(run)]):
        if run_in_clone(command):
            raise InputError(f"{run}: {command[0]} failed, see above")


def keep(run: Path, record: Path) -> None:
    """Keep of an evaluated run what the tables read, and what tells how it was made."""
    told, tensors = read_json(run / "run.json"), load_file(run / LOGITS)
    settings = {key: told["arguments"][key] for key in SETTINGS}
    with written_beside(record) as folder:
        folder.mkdir()
        write_json(folder / "run.json", {"arguments": settings} | {key: told[key] for key in KEPT})
        save_file(tensors | {"logits": tensors["logits"].half()}, folder / LOGITS)  # half the size; three digits do


def main() -> None:
    """Make what is missing."""
    parser = Parser(__doc__)
    parser.add_argument("--lr", type=positive_number, help=f"(default: {SMALL} the best of a search, else {RATE:g})")
    args = options_of(parser, TASKS[:-1])  # all but own text
    records, is_small = args.out / "records", args.model == SMALL
    records.mkdir(parents=True, exist_ok=True)
    layers = list(exit_layers_for(read_config(model_folder(args.model)).num_hidden_layers))
    suffix = "" if args.lr in (None, None if is_small else RATE) else f"-lr{args.lr:g}".replace("e-0", "e-")
    for seed, task, method in product(args.seeds, args.tasks, METHODS.values()):
        if not (record := records / f"{task}-{seed}-{method}{suffix}").exists():
            usual = RATES[method][TASKS.index(task)] if is_small else RATE
            options = {"model": args.model, "method": method, "seed": seed, "epochs": 2, "lr": args.lr or usual}
            options["exit_layers"] = [0, *layers] if method == "branch" else layers
            run, script = args.out.resolve() / "runs" / record.name, ["train.py"]
            if task == "own":
                own = [str(path.resolve()) for path in args.own]
                script = ["-m", "minisweet", "fit", own[0], "--dev-data", own[1]]
            else:
                options |= {"task": task, "train_size": ROWS, "data_dir": args.data_dir.resolve()}
            make_run(run, *script, **options)
            keep(run, record)
            shutil.rmtree(run)
    print(f"next: python -m tests.benchmark.zero_tables {args.out}")


if __name__ == "__main__":
    run_study(main)
