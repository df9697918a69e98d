"""Fine-tune BERT, DeBERTa or MPNet with early exits: the paper's SWEET, Early-Exit (ee) and Multi-Model (mm), and ours.

    python train.py                                   # minilm-l6, sweet, toy: one to two minutes on a laptop
    python train.py --model bert-base --method sweet --task rte
    python train.py --data tickets.csv --text-columns subject,body --label-column team
    python train.py --trunk my-classifier --data texts.csv --targets trunk   # exits for a classifier, without labels

Writes a run folder, which evaluate.py reads. Dimension letters: N instances, K exits, C classes, V words, D hidden.
"""

import argparse
import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from shlex import quote

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C while torch is imported; then see `run_command`

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_

from minisweet import MultiExitModel
from minisweet.base import devices
from minisweet.base.commands import Parser, Progress, positive_float, run_command, whole_number
from minisweet.base.files import InputError
from minisweet.checkpoint import WEIGHTS
from minisweet.data.tasks import add_data_options
from minisweet.data.text import Batch, TokenizedExamples
from minisweet.evaluation.answers import all_logits
from minisweet.exits import EXIT_STRATEGIES, ExitModel, exit_loss
from minisweet.methods import METHODS, build_alone, grow
from minisweet.ngrams import fit_ngrams
from minisweet.runs.folders import is_run, read_record, run_name, save_run
from minisweet.runs.hub import REPOSITORIES
from minisweet.runs.resume import SavedTraining, claim_output
from minisweet.runs.start import EPOCHS, MAX_LENGTH, STEPS, TrainingSetup, add_training_options, find_start


def fine_tune(
    model: MultiExitModel,
    batches: Iterable[Batch],
    steps: int,
    learning_rate: float,
    seed: int = 0,
    precision: torch.dtype | None = None,
    checkpoint: SavedTraining | None = None,
) -> list[list[float]]:
    """Train the parameters of `model.parameter_groups()` (App. A). Returns each step's losses, (steps, K).

    The learning rate decays linearly towards zero, and each group's gradient is clipped to norm 1. `seed` is that of
    dropout. With a checkpoint, its stage goes on where it stopped. Raises FloatingPointError, with the step, where a
    loss, or a parameter at the end, is not finite.
    """
    groups, device = model.train().parameter_groups(), next(model.parameters()).device
    parameters = list(chain.from_iterable(groups))
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)
    scaler = GradScaler(device.type, enabled=precision is torch.float16)
    losses = checkpoint.restore(parameters, optimizer, scaler) if checkpoint else []
    bar = Progress(batches, total=steps, unit="step", desc=checkpoint.stage if checkpoint else "training")
    for step, batch in enumerate(bar, start=1):
        if step <= len(losses):  # the step was done before the training was stopped
            continue
        # Seeds dropout by step, so that no random state has to be saved.
        torch.manual_seed(1_000_003 * seed + 1_009 * step + devices.process_rank())
        optimizer.zero_grad()
        rows, weight = devices.own_rows(batch)  # each of several processes takes a share of every batch
        of_step = compute_gradients(model, rows.to(device), scaler, precision)
        losses.append(devices.add_up_gradients(parameters, of_step, weight).tolist())
        if not np.isfinite(losses[-1]).all():
            raise FloatingPointError(step)
        scaler.unscale_(optimizer)
        for group in groups:
            clip_grad_norm_(group, 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - (step - 1) / steps)
        scaler.step(optimizer)
        scaler.update()
        bar.set_postfix_str(f"loss per exit {np.mean(losses[-50:], axis=0).round(2)}", refresh=False)
        if checkpoint:
            checkpoint.keep(losses, parameters, optimizer, scaler, is_over=step == steps)
    if not all(parameter.isfinite().all() for parameter in parameters):  # by the last step, after its loss
        raise FloatingPointError(steps)
    return losses


def compute_gradients(model: MultiExitModel, batch: Batch, scaler: GradScaler, precision: torch.dtype | None) -> Tensor:
    """Add up the gradients of all trained exits' losses. Returns the losses, (K,); of branches (K-1,)."""
    losses, exits, is_ee = [], model.exit_by_exit(*batch.inputs), model.method == "ee"
    for _ in range(model.trained_exits):
        with devices.autocast(batch.input_ids.device, precision):
            losses.append(exit_loss(*next(exits), batch.targets))
        if not is_ee:  # no later loss sends a gradient to this segment, so its activations are freed
            scaler.scale(losses[-1]).backward()
    if is_ee:
        scaler.scale(model.sum_losses(losses)).backward()
    return torch.stack(losses).detach()


@contextmanager
def used_rows(model: MultiExitModel, examples: TokenizedExamples) -> Iterator[Tensor]:
    """Within, the word embeddings are cut to the rows in use: a step takes 10 to 12% less. Gives each id's row (V,)."""
    embedding, whole = model.encoder.word_embeddings, model.encoder.word_embeddings.weight
    used = torch.from_numpy(np.unique(np.concatenate([*examples.ids, [examples.pad_id]]))).to(whole.device)
    embedding.weight = nn.Parameter(whole.detach()[used], whole.requires_grad)
    try:
        yield torch.zeros(len(whole), dtype=torch.int64).index_copy(0, used.cpu(), torch.arange(len(used)))
    finally:
        with torch.no_grad():
            whole[used] = embedding.weight
        embedding.weight = whole


def balanced(targets: np.ndarray, num_labels: int) -> np.ndarray:
    """Labels (N,) or probabilities (N, C) to (N, C), each row times N / (classes that occur x rows of its class)."""
    targets = np.eye(num_labels, dtype=np.float32)[targets] if targets.ndim == 1 else targets
    _, of_row, counts = np.unique(targets.argmax(1), return_inverse=True, return_counts=True)
    weights = len(targets) / (len(counts) * counts[of_row])  # (N,)
    return targets * weights[:, None].astype(np.float32)


def train_stage(setup: TrainingSetup, checkpoint: SavedTraining, name: str, model: MultiExitModel, rate: float) -> None:
    """Fine-tune a model, or a part of one, on all examples for all epochs."""
    args, examples = setup.args, setup.examples
    model.to(setup.device)
    with checkpoint.during(name), used_rows(model, examples) as row_of:
        epochs = (examples.shuffled(args.batch_size, args.seed, epoch) for epoch in range(args.epochs))
        batches = (batch._replace(input_ids=row_of[batch.input_ids]) for batch in chain.from_iterable(epochs))
        steps = args.epochs * -(-len(examples) // args.batch_size)
        fine_tune(model, batches, steps, rate, args.seed, setup.precision, checkpoint)
    model.cpu()  # frees the device for the next stage


def train_model(setup: TrainingSetup, checkpoint: SavedTraining, start: MultiExitModel) -> ExitModel:
    """Train a method's model, which is built from a start (methods.py): a model with one exit, new or finished."""
    args, examples, is_new, method = setup.args, setup.examples, setup.trunk is None, METHODS[setup.args.method]
    if is_new and method.keeps_start:  # the plain model, trained for its one exit
        train_stage(setup, checkpoint, "trunk", start, args.lr)
    if args.targets == "trunk":  # from here on its answers are what is learned, also by exit 0
        precision = devices.choose_precision(args.amp, setup.device)  # that of evaluate.py: on a CPU float32
        logits, _ = all_logits(start.to(setup.device).eval(), examples, precision, "targets")
        answers = logits[-1].softmax(-1).numpy()  # (N, C)
        examples.targets = balanced(answers, answers.shape[1]) if args.class_weights else answers
        start.cpu()
    torch.manual_seed(args.seed)  # so that new weights do not depend on where the start is from
    model = grow(args.method, start, setup.layers, args.exit_strategy)
    for name, part, times_rate in method.stages(model, is_new):
        train_stage(setup, checkpoint, name, part, times_rate * args.lr)
    return model


def train_run(setup: TrainingSetup, checkpoint: SavedTraining) -> None:
    """Train one run and write its folder."""
    args, record, examples, C = setup.args, setup.record, setup.examples, len(setup.record["labels"])
    print(*setup.notes, *checkpoint.notes, sep="\n")
    if args.class_weights and examples.targets is not None:
        examples.targets = balanced(examples.targets, C)
    torch.manual_seed(args.seed)
    start = setup.trunk or build_alone(setup.folder, setup.layers[-1], C, args.exit_strategy)
    embeddings = start.encoder.word_embeddings.weight.detach().clone()  # before they are trained
    try:
        model = train_model(setup, checkpoint, start)
    except FloatingPointError as error:
        step = record["diverged"] = error.args[0]
        if devices.process_rank() == 0:
            checkpoint.path.unlink(missing_ok=True)
            if not (args.out / WEIGHTS).exists():  # an earlier run with weights is not overwritten
                # It counts as done: `reproduce` and --resume pass it over.
                save_run(args.out, None, setup.folder, record, setup.validation)
        where = f"at {args.lr:g} the loss became infinite or NaN at step {step}"
        raise InputError(f"--lr: {where}; try a lower one") from None
    if devices.process_rank():  # the first process alone fits exit 0 and writes
        return
    # Of each stage, (steps, its exits). The trunk is trained first, and its exit is the last.
    losses = [checkpoint.stages[stage]["losses"] for stage in sorted(checkpoint.stages, key="trunk".__eq__)]
    seconds = {stage: saved["seconds"] for stage, saved in checkpoint.stages.items()}
    if setup.exit_0:
        started = time.perf_counter()
        chunks = np.array_split(np.arange(len(examples)), -(-len(examples) // 256))
        batches = [examples.batch(rows).inputs for rows in chunks]
        try:
            fit_ngrams(setup.exit_0, batches, torch.from_numpy(examples.targets), embeddings)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            rest = f"--resume --exit-layers {','.join(map(str, setup.layers))}"
            raise InputError(f"--exit-layers: too little memory to fit exit 0; {rest} goes on without it") from None
        model.add_ngrams(setup.exit_0)
        seconds["exit 0"] = time.perf_counter() - started
    record["losses"] = np.concatenate(losses, axis=1).round(5).tolist() if losses else []
    record["stages"] = {stage: round(taken, 1) for stage, taken in seconds.items()}
    record["seconds"] = round(sum(seconds.values()), 1)
    save_run(args.out, model, setup.folder, record, setup.validation)
    print(f"{args.out}: trained in {record['seconds']:.0f} s; next: python evaluate.py {quote(str(args.out))}")


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser, by_size = Parser(__doc__), f"for {STEPS} steps, at least {EPOCHS}"
    option = parser.add_argument_group("method").add_argument
    option("--method", choices=list(METHODS), help="default: sweet; plain with --data or --trunk")
    option("--exit-strategy", choices=EXIT_STRATEGIES, default="confidence", help="or learning-to-exit, lte")
    option("--trunk", type=Path, metavar="FOLDER", help="run or classifier to start from; plain, branch and mm keep it")
    option("--targets", choices=("labels", "trunk"), default="labels", help="learn labels, or the trunk's answers")
    option("--class-weights", choices=("balanced",), help="each row weighs N / (classes x rows of its class)")
    add_data_options(parser)
    group = parser.add_argument_group("training")
    option, either = group.add_argument, group.add_mutually_exclusive_group().add_argument
    option("--train-size", type=whole_number(1), help="examples, drawn by the seed (default: 6000, all of --data)")
    option("--seed", type=whole_number(0), default=0, help="of the subset, new weights, order, dropout (default: 0)")
    option("--lr", type=positive_float, help="first learning rate (default: the paper's, or by the model's size)")
    option("--epochs", type=whole_number(1), help=f"over the rows (default: 2, toy 3; --data: {by_size})")
    option("--out", type=Path, help="run folder (default: runs/<model>-<method>-<task>-seed<k>)")
    option("--save-every", type=positive_float, default=10.0, metavar="MINUTES", help="checkpoint (default: 10)")
    either("--resume", action="store_true", help="go on from the checkpoint of a training that was stopped")
    either("--overwrite", action="store_true", help="replace the run, or a stopped training, in --out")
    add_training_options(parser)
    parser.set_defaults(max_length=None)
    args = parser.parse_args()
    args.method = args.method or ("plain" if args.trunk or args.data else "sweet")
    has_trunk = args.trunk or METHODS[args.method].keeps_start
    parser.need(args, has_trunk, "--trunk or --method branch or plain", "targets")
    parser.need(args, args.data, "--data", "dev_data", "text_columns", "label_column", "labels", "dev_size", "dev_seed")
    parser.need(args, args.dev_data is None, "rows of --data, and --dev-data is given", "dev_size", "dev_seed")
    parser.need(args, args.trunk is None, "a training without --trunk, which is a model itself", "model")
    if args.trunk:  # a folder, even if it is called like a preset
        args.model = f"./{args.trunk}" if str(args.trunk) in REPOSITORIES else str(args.trunk)
    is_cut_there = args.trunk and is_run(args.trunk)  # else a trunk's answers to long texts would change
    args.max_length = args.max_length or (read_record(args.trunk).max_length if is_cut_there else MAX_LENGTH)
    args.task = (args.task or "toy") if args.data is None else args.data.name.split(".")[0] or "own"
    args.out = args.out or Path("runs") / run_name(vars(args))
    args.train_size = args.train_size or (6000 if args.data is None else None)
    return args


def main() -> None:
    """Train one run, or with --resume say that it is there."""
    args = parse_arguments()
    devices.tune_cpu()
    with claim_output(args.out, args.resume or args.overwrite) as path:
        setup = find_start(args)
        checkpoint = SavedTraining(path, setup.args, setup.record)
        if checkpoint.is_finished:
            print(f"{args.out}: finished already; next: python evaluate.py {quote(str(args.out))}")
        else:
            train_run(setup, checkpoint)
        if devices.process_rank() == 0:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    run_command(devices.distributed(main))
