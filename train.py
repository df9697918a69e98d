"""Fine-tune BERT, DeBERTa or MPNet with early exits: SWEET, Early-Exit (ee) or Multi-Model (mm).

    python train.py                                   # minilm-l6, sweet, toy: a few minutes on two cores
    python train.py --model bert-base --method sweet --task rte

Writes a run folder for evaluate.py. The loop is in minisweet/training.py. For your own text: minisweet fit FILE.
"""

import hashlib
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from shlex import quote

import numpy as np
import torch

from minisweet.base.commands import Parser, name_of, run_command
from minisweet.base.devices import choose_device, choose_precision, device_name
from minisweet.base.files import LOG, InputError
from minisweet.checkpoint import WEIGHTS, load_encoder, read_config
from minisweet.defaults import resolve
from minisweet.fast import tune_cpu
from minisweet.hub import fetch_task, home, model_folder
from minisweet.methods import build_model
from minisweet.options import TrainingOptions
from minisweet.run import Record, check_output, run_name, save_run, versions, weights_id
from minisweet.tasks import TASKS, find_task, load_examples
from minisweet.texts import Texts, load_tokenizer
from minisweet.training import fine_tune


def main() -> None:
    """Read the options, train one run, and say what to do next."""
    parser = Parser(__doc__)
    parser.add_options(TrainingOptions, "model", "pooling", title="model")
    parser.add_options(TrainingOptions, "method", "exit_layers", "exit_strategy", title="method")
    data = parser.add_argument_group("data").add_argument
    data("--task", type=name_of, default="toy", help=f"{', '.join(TASKS)}, or a folder in --data-dir (default: toy)")
    data("--data-dir", type=Path, default=home() / "data", help="the folder of the tasks (default: %(default)s)")
    parser.add_options(TrainingOptions, "train_size", "max_length", title="data")
    parser.add_options(TrainingOptions, "lr", "epochs", "batch_size", "seed", "device", "amp", title="training")
    output = parser.add_argument_group("output").add_argument
    output("--out", type=Path, help="run folder (default: runs/<model>-<method>-<task>-seed<k>)")
    output("--overwrite", action="store_true", help="replace the run in --out when the new one is trained")
    args = parser.parse_args()
    options = parser.make(TrainingOptions, args)
    out = args.out or Path("runs") / run_name(options, args.task)
    tune_cpu()
    train(options, args.task, args.data_dir, out, args.overwrite)
    print(f"{out}: trained; next: python evaluate.py {quote(str(out))}")


def train(options: TrainingOptions, task: str, data_dir: Path, out: Path, overwrite: bool = False) -> None:
    """Train a model on a task and write the run to a folder.

    Raises InputError if `out` cannot be written or replaced (before training), if model and data do not match, and if
    training diverges.
    """
    # 1. Options: those that are left open depend on the model, the task and its rows.
    check_output(out, overwrite)
    fetch_task(task, data_dir)
    spec = find_task(task, data_dir)
    folder = model_folder(options.model)
    config = read_config(folder)
    rows, validation = load_examples(task, "train", data_dir), load_examples(task, "dev", data_dir)
    options = resolve(options, config, task, spec, min(len(rows.first), options.train_size))
    device = choose_device(options.device)
    precision = choose_precision(options.amp, device, training=True)

    # 2. Data: at most `train_size` rows to train on, sampled with the seed, the same for all methods; and all dev rows.
    tokenizer = load_tokenizer(folder, config.vocab_size, options.max_length, config.max_tokens)
    if rows.second is not None and config.type_vocab_size == 1:
        raise InputError(f"{folder}: its type_vocab_size is 1, and pairs, as in {task}, need 2")
    order = np.random.default_rng(options.seed).permutation(len(rows.first))
    subset = np.sort(order[: options.train_size]).tolist()  # for one seed, a smaller subset is part of a larger one
    texts = Texts(tokenizer, rows.take(subset))

    # 3. Model: public weights, with new exits.
    torch.manual_seed(options.seed)
    first_layers = partial(load_encoder, folder, pooling=options.pooling)
    model = build_model(options.method, first_layers, options.exit_layers, len(spec.labels), options.exit_strategy)
    record = Record(
        arguments=options,
        task=task,
        labels=list(spec.labels),
        metric=spec.metric,
        text_columns=list(spec.columns[:-1]),
        header=list(spec.header or ()),
        exit_layers=options.exit_layers,
        depth=config.num_hidden_layers,
        vocab_size=config.vocab_size,
        subset=subset,
        weights=hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
        trained_keys=sorted({*texts.keys.tolist()}),
        device=device_name(device),
        precision=str(precision or torch.float32),
        versions=versions(),
    )
    announce(record, texts, len(rows.first), len(validation.first))

    # 4. Loop: EE and SWEET are one model, and MM is one per exit.
    start = time.perf_counter()
    settings = options.epochs, options.batch_size, options.lr, options.seed, device, precision
    for part in model.models_alone:
        name = f"layers {part.exit_layers[-1]}" if options.method == "mm" else options.method
        losses = fine_tune(part, texts, *settings, title=name)
        record.losses[name] = np.round(losses, 5).tolist()

    # 5. Save.
    record = replace(record, id=weights_id(model), seconds=round(time.perf_counter() - start, 1))
    check_output(out, overwrite)  # once more, since training takes a while
    save_run(out, record, model.eval(), tokenizer, validation, overwrite=overwrite)


def announce(record: Record, texts: Texts, all_rows: int, dev_rows: int) -> None:
    """Log what is about to be trained."""
    options = record.arguments
    exits = ",".join(map(str, record.exit_layers))
    LOG.info("%s, exits after layers %s of %d, method %s", options.model, exits, record.depth, options.method)
    LOG.info("%s: %d of %d rows to train on, %d to validate", record.task, len(texts), all_rows, dev_rows)
    LOG.info("texts cut to %d tokens: %d", options.max_length, texts.is_cut.sum())
    settings = options.lr, options.epochs, options.seed, record.device, record.precision
    LOG.info("lr %g, epochs %d, seed %d, %s, %s", *settings)


if __name__ == "__main__":
    run_command(main)
