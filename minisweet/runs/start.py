"""What a training starts from: train.py's command line, the model, the data, and the record of the run to come."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

from minisweet.base import devices
from minisweet.base.commands import Parser, positive_float, whole_number
from minisweet.base.safe import InputError
from minisweet.branches import METHODS
from minisweet.data.load import OF_OWN_DATA, add_data_options, data_name, digest, drawn_rows, load_data
from minisweet.data.rows import Examples
from minisweet.data.text import load_tokenizer
from minisweet.exits import EXIT_STRATEGIES, MultiExitModel
from minisweet.runs import options
from minisweet.runs.folders import load_trunk, run_name, versions
from minisweet.runs.hub import REPOSITORIES
from minisweet.runs.resume import model_digest

TARGETS = ("labels", "trunk", "half")


class Start(NamedTuple):
    """What a training starts from."""

    folder: Path  # of the model
    exit_layers: Sequence[int]
    trunk: MultiExitModel | None
    rows: Examples  # to train on
    tokenizer: Tokenizer
    num_labels: int  # C
    device: torch.device
    precision: torch.dtype | None  # to autocast to
    record: dict  # of run.json, as far as it is known before the training
    notes: list[str]  # for the user, a line each


def parse_arguments(doc: str) -> argparse.Namespace:
    """Read and check the command line of train.py, whose docstring is `doc`."""
    parser, by_size = Parser(doc), f"for {options.STEPS} steps, at least {options.EPOCHS}"
    option = parser.add_argument_group("method").add_argument
    option("--method", choices=METHODS, help="default: sweet; branch with --data or --trunk")
    option("--exit-strategy", choices=EXIT_STRATEGIES, default="confidence", help="or learning-to-exit, lte")
    option("--trunk", type=Path, metavar="FOLDER", help="start from this run or classifier; branches leave it as it is")
    option("--targets", choices=TARGETS, default="labels", help="learn labels, the trunk's own, or half each")
    option("--class-weights", choices=("balanced",), help="rows count N / (C n) for the n of all N in their class")
    option("--branch-lr-factor", type=positive_float, default=2.0, help="branches: their rate over --lr (default: 2)")
    add_data_options(parser)
    option = parser.add_argument_group("training").add_argument
    option("--train-size", type=whole_number(1), help="examples, drawn by the seed (default: 6000, all of --data)")
    option("--seed", type=whole_number(0), default=0, help="of the subset, new weights, order, dropout (default: 0)")
    option("--lr", type=positive_float, help="first learning rate (default: the paper's, or by the model's size)")
    option("--epochs", type=whole_number(1), help=f"over the rows (default: 2; --data: {by_size})")
    option("--out", type=Path, help="run folder (default: runs/<model>-<method>-<task>-seed<k>)")
    option("--overwrite", action="store_true", help="replace the run, or a stopped training, in --out")
    option("--save-every", type=positive_float, default=10.0, metavar="MINUTES", help="checkpoint (default: 10)")
    option("--resume", action="store_true", help="go on from the last checkpoint of a training that was stopped")
    options.add_training_options(parser)
    parser.set_defaults(model=None)  # tells whether it is given
    args = parser.parse_args()
    args.why = {name: "as given" for name in ("method", "lr", "epochs") if getattr(args, name) is not None}
    reason = "for a trunk" if args.trunk else "for your own text" if args.data else "the paper's"
    args.why.setdefault("method", reason)
    args.method = args.method or ("branch" if args.trunk or args.data else "sweet")
    parser.need(args, args.method == "branch", "--method branch", "branch_lr_factor")
    parser.need(args, args.trunk or args.method == "branch", "--trunk or --method branch", "targets")
    parser.need(args, args.data, "--data", *OF_OWN_DATA)
    parser.need(args, args.data is None, "a task, and --data is given", "data_dir")
    parser.need(args, args.dev_data is None, "rows of --data, and --dev-data is given", "dev_size", "dev_seed")
    if args.trunk and args.model is not None:
        raise InputError(f"--model: {args.model}, and --trunk is the model already; leave one of them out")
    args.task = data_name(args)
    args.model = str(args.trunk or ("minilm-l6" if args.model is None else args.model))
    if args.trunk and args.model in REPOSITORIES:  # a folder that is called like a preset
        args.model = os.path.join(os.curdir, args.model)
    args.out = args.out or Path("runs") / run_name(vars(args))
    args.train_size = args.train_size or (6000 if args.data is None else None)
    return args


def find_start(args: argparse.Namespace) -> Start:
    """Fetch and read what the options name. Raises InputError where it does not go together."""
    trunk, labels = load_trunk(args.trunk) if args.trunk else (None, None)
    if trunk:
        args.exit_layers = args.exit_layers or options.exit_layers_for(trunk.exit_layers[0])
    with devices.in_turn():
        folder, config, exit_layers = options.find_model(args)
        data = load_data(args, labels, need_labels=trunk is None or args.targets != "trunk")
    if trunk and args.method in ("mm", "branch") and len(exit_layers) < 2:
        raise InputError(f"--exit-layers: {exit_layers[0]} is one exit alone, which --trunk has; name others too")
    if trunk and exit_layers[-1] != (end := trunk.exit_layers[0]):
        raise InputError(f"--exit-layers: {exit_layers[-1]} is the last of them, should be {end}, where --trunk ends")
    task = args.task if args.data is None else None  # a file may be called rte.csv
    args.lr = args.lr or options.default_learning_rate(config, task, args.method, trunk is not None)
    subset, depth, size = drawn_rows(data.train, args.train_size, args.seed), config.num_hidden_layers, args.batch_size
    if args.epochs is None:  # Sec. 3.2 and App. A train two; own text is often less of it
        args.epochs = options.epochs_of(options.STEPS, len(subset), size) if args.data else 2
    rows, device = data.train.take(subset), devices.choose_device(args.device)
    tokenizer = load_tokenizer(folder, config.vocab_size, args.max_length, config.max_position_embeddings)
    precision, name = devices.choose_precision(args.amp, device), devices.device_name(device)
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    del arguments["resume"], arguments["why"]  # a run that went on is as one that was never stopped
    record = {"arguments": arguments, **data.record, "model_digest": model_digest(folder), "subset": subset.tolist()}
    record |= {"train_digest": digest(rows), "versions": versions(), "exit_layers": exit_layers}
    record |= {"depth": depth, "device": name, "precision": str(precision or torch.float32)}
    rate = args.why.get("lr", f"for {config.model_type}, {depth} layers of {config.hidden_size}")
    has_branches = args.method == "branch" and len(exit_layers) > 1
    branches = f", of branches {args.branch_lr_factor * args.lr:g}" if has_branches else ""
    epochs = "1 epoch" if args.epochs == 1 else f"{args.epochs} epochs"
    by_size = f"to make {options.STEPS} steps, at least {options.EPOCHS} epochs"
    why = args.why.get("epochs", by_size if args.data else "the paper's")
    notes = [
        f"method {args.method} ({args.why['method']}), learning rate {args.lr:g}{branches} ({rate}), {epochs} of "
        f"{-(-len(subset) // size)} steps of {size} examples ({why})",
        f"{args.model}, {args.task}: {len(subset)} examples, exits after layers {','.join(map(str, exit_layers))} of "
        f"{depth}, seed {args.seed}, {name}, {record['precision']}",
        *data.notes,
    ]
    C = len(data.record["labels"])
    return Start(folder, exit_layers, trunk, rows, tokenizer, C, device, precision, record, notes)
