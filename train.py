"""Fine-tune BERT or DeBERTa with early exits: the paper's SWEET, Early-Exit (ee) and Multi-Model (mm), and branches.

    python train.py                                   # minilm-l6, sweet, toy: about a minute on a laptop
    python train.py --model bert-base --method sweet --task rte
    python train.py --task sst2 --method branch
    python train.py --data tickets.csv --text-columns subject,body --label-column team        # branches
    python train.py --trunk my-classifier --task rte  # early exits for a classifier that is there already
    python train.py --trunk my-classifier --data texts.csv --targets trunk          # which needs no labels

Writes a run folder, which evaluate.py reads.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime, timezone
from itertools import chain, islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from minisweet import MultiExitModel, build_multi_model, load_encoder
from minisweet.base import devices
from minisweet.base.commands import Progress, run_command
from minisweet.base.devices import add_up_gradients, autocast, own_rows, place
from minisweet.base.safe import InputError, write_json
from minisweet.branches import BranchModel, add_exits, grow_branches, slice_trunk
from minisweet.data.load import class_weights
from minisweet.data.text import Batch, TokenizedExamples
from minisweet.evaluation.sweep import predict
from minisweet.exits import build_alone, exit_loss
from minisweet.runs.folders import DIVERGED, claim_output, save_run
from minisweet.runs.resume import Checkpoints, is_finished
from minisweet.runs.start import Start, find_start, parse_arguments

READ_EVERY = 50  # steps: each reading of the losses waits for the GPU, and a signal waits as long


class NotFiniteError(InputError):
    """The loss of a training became infinite or NaN."""


def train(
    model: MultiExitModel,
    examples: TokenizedExamples,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    precision: torch.dtype | None = None,
    stage: str = "train",
    checkpoints: Checkpoints | None = None,
) -> list[list[float]]:
    """Fine-tune the parameters of `model.parameter_groups()` in place, on the device where they are (App. A).

    Args:
        model: of EE or SWEET, one of MM's models, or branches on their trunk.
        examples: the training set; its targets are labels, or probabilities.
        epochs, batch_size: passes over it, and examples in each step.
        learning_rate: of the first step; it decays linearly to zero.
        seed: of the order of the examples and of dropout.
        precision: type to autocast to; None for float32 alone.
        stage: its name, for the progress bar and in the checkpoints.
        checkpoints: to go on from, and to write to.

    Returns:
        Each step's loss at each exit that is trained: (steps, K), and for branches (steps, K-1).

    Raises:
        NotFiniteError: the loss is no longer finite.
    """
    torch.manual_seed(seed + place().rank * 10**6)  # of several processes, each has a dropout of its own
    model.train()
    device = next(model.parameters()).device
    steps = epochs * -(-len(examples) // batch_size)
    read_every = 1 if device.type == "cpu" else READ_EVERY
    bar = Progress(total=epochs * len(examples), unit="ex", desc=stage)
    with bar as progress, used_rows(model, examples) as examples:
        groups = model.parameter_groups()
        parameters = list(chain.from_iterable(groups))
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
        scaler = torch.amp.GradScaler(device.type, enabled=precision is torch.float16)
        history = checkpoints.load(stage, parameters, optimizer, scaler) if checkpoints else []
        unread: list[Tensor] = []  # losses that are still on the device
        batches = chain.from_iterable(examples.shuffled(batch_size, seed, epoch) for epoch in range(epochs))
        for batch in islice(batches, len(history)):  # taken out: these steps were done before the training was stopped
            progress.update(len(batch.rows))
        for step, batch in enumerate(batches, len(history) + 1):
            optimizer.zero_grad()
            mine, weight = own_rows(batch)  # of several processes, each takes a share of every batch
            with autocast(device, precision):
                losses = send_back(model, mine.to(device), scaler)
            unread.append(add_up_gradients(parameters, losses, weight))
            update(optimizer, scaler, groups, learning_rate * (1 - (step - 1) / steps))
            progress.update(len(batch.rows))
            if len(unread) == read_every or step == steps:
                read = torch.stack(unread).tolist()
                if not np.isfinite(read).all():
                    raise NotFiniteError(f"--lr: at {learning_rate:g} the loss is {np.sum(read)} by step {step}")
                if step == steps and not all(parameter.isfinite().all() for parameter in parameters):
                    raise NotFiniteError(f"--lr: at {learning_rate:g} the last step made NaN or infinity of weights")
                history += read
                unread.clear()
                recent = " ".join(f"{loss:.2f}" for loss in np.mean(history[-50:], axis=0))
                epoch = f"epoch {1 + (step - 1) * epochs // steps} of {epochs}"
                progress.set_postfix_str(f"{epoch}, loss per exit in the last 50 steps: {recent}", refresh=False)
                if checkpoints:
                    checkpoints.keep(stage, history, parameters, optimizer, scaler, is_over=step == steps)
    return history


def send_back(model: MultiExitModel, batch: Batch, scaler: torch.amp.GradScaler) -> Tensor:
    """Add up the gradients of all exits' losses on a batch. Returns the losses (K,), or (K-1,) for branches."""
    losses = []
    for logits, certainty in islice(model.exit_by_exit(*batch.inputs), model.trained_exits):
        loss = exit_loss(logits, certainty, batch.targets)
        if model.losses_are_apart:
            # The forward pass waits here, between two segments. No later loss reaches what it has run, so backward()
            # can run now, which frees the segment's activations. The gradients are those of the summed loss.
            scaler.scale(loss).backward()
            loss = loss.detach()
        losses.append(loss)
    if not model.losses_are_apart:
        scaler.scale(sum(losses)).backward()
    return torch.stack(losses).detach()


def update(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, groups: list, learning_rate: float) -> None:
    """Take a step, with the gradients of each group of parameters clipped to norm 1."""
    scaler.unscale_(optimizer)
    for group in groups:
        clip_grad_norm_(group, 1.0)
    optimizer.param_groups[0]["lr"] = learning_rate
    scaler.step(optimizer)
    scaler.update()


@contextmanager
def used_rows(model: MultiExitModel, examples: TokenizedExamples) -> Iterator[TokenizedExamples]:
    """Within, the word embeddings hold only the rows that the examples use, and ids count these: id 5 is the sixth.

    A row that no example uses gets no gradient, and AdamW without weight decay leaves it as it is. So only the others
    need be trained: SST-2 takes 12% less time. The optimizer must be made within. At the end all rows are back. A
    frozen trunk's stay as they are.
    """
    if isinstance(model, BranchModel):
        yield examples
        return
    embedding = model.encoder.word_embeddings
    whole = embedding.weight
    used, renumbered = examples.renumbered()  # ids (V,)
    used = torch.from_numpy(used).to(whole.device)
    embedding.weight = nn.Parameter(whole.detach()[used])
    try:
        yield renumbered
    finally:
        with torch.no_grad():
            whole[used] = embedding.weight
        embedding.weight = whole


def fit(
    start: Start, examples: TokenizedExamples, args: argparse.Namespace, checkpoints: Checkpoints
) -> tuple[nn.Module, np.ndarray, dict[str, float]]:
    """Make and train the model of --method, from a trunk where one is given; go on where `checkpoints` are.

    Returns the model, on the CPU; the losses (steps, K), or (steps, K-1) where --trunk is the last exit, untrained; and
    the seconds of each stage: MM's models by name, "trunk" and "branches", or the method.
    """
    folder, exit_layers, num_labels, strategy = start.folder, start.exit_layers, start.num_labels, args.exit_strategy
    trunk, device, precision, is_given = start.trunk, start.device, start.precision, start.trunk is not None
    losses, seconds = [], {}

    def run(model: MultiExitModel, examples: TokenizedExamples, learning_rate: float, stage: str) -> None:
        examples = balanced(examples, num_labels) if args.class_weights else examples
        settings = {"epochs": args.epochs, "batch_size": args.batch_size, "learning_rate": learning_rate}
        settings |= {"seed": args.seed, "precision": precision, "stage": stage, "checkpoints": checkpoints}
        with checkpoints.signals():
            losses.append(train(model.to(device), examples, **settings))
        model.cpu()  # frees the device for the next one
        seconds[stage] = checkpoints.lap()

    torch.manual_seed(args.seed)
    if args.method == "branch" and not is_given:
        trunk = build_alone(folder, exit_layers[-1], num_labels, strategy)  # MM's last model, to the bit
        run(trunk, examples, args.lr, "trunk")
    if trunk is not None:
        if args.targets != "labels":
            examples = examples.with_targets(trunk_targets(trunk.to(device), examples, precision, args.targets))
            trunk.cpu()
        torch.manual_seed(args.seed)  # so that what is new is the same on any trunk
    if args.method == "mm":
        if is_given:
            model = slice_trunk(trunk, exit_layers, strategy)
        else:
            model = build_multi_model(folder, exit_layers, num_labels, strategy)
        for part in model[:-1] if is_given else model:  # a trunk that is there stays as it is
            run(part, examples, args.lr, f"layers {part.exit_layers[0]}")
    elif args.method == "branch":
        model = grow_branches(trunk, exit_layers, strategy)
        if model.branches:  # else the trunk is all
            run(model, examples, args.branch_lr_factor * args.lr, "branches")
            losses.reverse()  # the trunk's, of the last exit, was trained first
    else:
        if is_given:
            model = add_exits(trunk, exit_layers, args.method, strategy)
        else:
            encoder = load_encoder(folder, exit_layers[-1])
            model = MultiExitModel(encoder, exit_layers, num_labels, args.method, strategy)
        run(model, examples, args.lr, args.method)
    return model, np.concatenate(losses, axis=1), seconds


def trunk_targets(
    trunk: MultiExitModel, examples: TokenizedExamples, precision: torch.dtype | None, targets: str
) -> np.ndarray:
    """What exits learn instead of labels, (N, C): the trunk's probabilities, or half of them and half the label."""
    logits, _ = predict(trunk.eval(), examples, precision, "targets")
    probabilities = logits[-1].softmax(-1)
    if targets == "half":
        probabilities = (probabilities + F.one_hot(torch.from_numpy(examples.labels), probabilities.shape[1])) / 2
    return probabilities.numpy()


def balanced(examples: TokenizedExamples, C: int) -> TokenizedExamples:
    """The same examples, each counted N / (c n) in the loss: n of the N are of its class, and c of the C classes occur.

    Its class is its label, or without labels the likeliest of its targets.
    """
    targets = torch.from_numpy(examples.targets)
    targets = F.one_hot(targets, C).float() if targets.ndim == 1 else targets
    classes = targets.argmax(-1) if examples.labels is None else torch.from_numpy(examples.labels)  # (N,)
    weights = torch.tensor(class_weights(classes.bincount(minlength=C).tolist()))  # (C,)
    return examples.with_targets((targets * weights[classes, None]).numpy())


def main() -> None:
    """Train one run."""
    args = parse_arguments(__doc__)
    devices.tune_cpu()
    may_stand = args.overwrite or (args.resume and is_finished(args.out))
    with claim_output(args.out, may_stand) if place().rank == 0 else nullcontext():  # now, not hours later
        train_run(args)


def train_run(args: argparse.Namespace) -> None:
    """Train one run and write its folder, or with --resume say that it is there."""
    start = find_start(args)
    record, checkpoints = start.record, Checkpoints(args, start.record, start.device)
    if checkpoints.finished:
        checkpoints.remove()  # of a training that was killed just after it had saved the run
        print(f"{args.out}: finished already; next: python evaluate.py {args.out}")
        return
    examples = TokenizedExamples(start.tokenizer, start.rows)
    notes = [f"train: cut to {args.max_length} tokens: {examples.cut:,}"] if examples.cut else []
    print(*start.notes, *notes, sep="\n")
    checkpoints.lap()  # what is above is no training
    try:
        model, losses, stages = fit(start, examples, args, checkpoints)
    except NotFiniteError as error:
        checkpoints.remove()
        if place().rank == 0 and not args.out.exists():  # a grid's search must know that this rate is over
            write_json(args.out / DIVERGED, {"error": str(error), "arguments": record["arguments"]})
        raise
    if place().rank:  # the first process alone writes
        return
    seconds = sum(stages.values())
    record |= {"finished": datetime.now(timezone.utc).isoformat(timespec="seconds"), "losses": losses.round(5).tolist()}
    record |= {"seconds": round(seconds, 1), "stages": {stage: round(took, 1) for stage, took in stages.items()}}
    record["examples_per_second"] = round(args.epochs * len(examples) / seconds, 1)
    try:
        save_run(args.out, model, start.folder, record, args.overwrite)
    except (OSError, InputError) as error:
        kept = f"; what was trained is kept in {checkpoints.folder}: --resume saves it" if checkpoints.kept else ""
        raise InputError(f"{error}{kept}") from None
    checkpoints.remove()
    print(f"{args.out}: trained in {seconds:.0f} s; next: python evaluate.py {args.out}")


if __name__ == "__main__":
    run_command(devices.together(main))
