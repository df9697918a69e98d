"""Fine-tune BERT or DeBERTa with early exits: the paper's SWEET, Early-Exit (ee) and Multi-Model (mm), and branches.

    python train.py                                   # minilm-l6, sweet, toy: about a minute on a laptop
    python train.py --model bert-base --method sweet --task rte
    python train.py --data tickets.csv --text-columns subject,body --label-column team
    python train.py --trunk my-classifier --data texts.csv --targets trunk   # exits for a classifier, without labels

Writes a run folder, which evaluate.py reads. Dimension letters: N instances, K exits, C classes, V words, D hidden.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_

from minisweet import MultiExitModel
from minisweet.base import devices
from minisweet.base.commands import Progress, run_command
from minisweet.base.files import InputError
from minisweet.branches import METHODS
from minisweet.checkpoint import WEIGHTS
from minisweet.data.text import Batch, TokenizedExamples
from minisweet.evaluation.sweep import all_logits
from minisweet.exits import ExitModel, build_alone, exit_loss
from minisweet.ngrams import NgramExit, fit_ngrams
from minisweet.runs.folders import save_run
from minisweet.runs.resume import Checkpoint, claim_output
from minisweet.runs.start import TrainingSetup, find_start, parse_arguments


def fine_tune(
    setup: TrainingSetup, checkpoint: Checkpoint, model: MultiExitModel, learning_rate: float, stage: str
) -> None:
    """Train the parameters of `model.parameter_groups()` (App. A), or go on where the checkpoint stopped.

    The learning rate decays linearly towards zero, and each group's gradient is clipped to norm 1. The precision is
    bfloat16 where the device has instructions for it, else float16 on CUDA and float32 on a CPU, unless --amp says
    another. Raises FloatingPointError, with the step, where a loss is not finite.
    """
    args, device = setup.args, setup.device
    model.to(device).train()
    with checkpoint.signals(), used_rows(model, setup.examples) as examples:
        groups = model.parameter_groups()
        parameters = list(chain.from_iterable(groups))
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)
        scaler = GradScaler(device.type, enabled=setup.precision is torch.float16)
        history = checkpoint.start(stage, parameters, optimizer, scaler)  # the losses so far: (steps, K)
        steps = args.epochs * -(-len(examples) // args.batch_size)
        epochs = (examples.shuffled(args.batch_size, args.seed, epoch) for epoch in range(args.epochs))
        bar = Progress(chain.from_iterable(epochs), total=steps, unit="step", desc=stage)
        for step, batch in enumerate(bar, start=1):
            if step <= len(history):  # the step was done before the training was stopped
                continue
            # Seeds dropout by step, so that no random state has to be saved.
            torch.manual_seed(hash((args.seed, step, devices.process_rank())))
            optimizer.zero_grad()
            rows, weight = devices.own_rows(batch)  # each of several processes takes a share of every batch
            losses = compute_gradients(model, rows.to(device), scaler, setup.precision)
            history.append(devices.add_up_gradients(parameters, losses, weight).tolist())
            if not np.isfinite(history[-1]).all():
                raise FloatingPointError(step)
            scaler.unscale_(optimizer)
            for group in groups:
                clip_grad_norm_(group, 1.0)
            optimizer.param_groups[0]["lr"] = learning_rate * (1 - (step - 1) / steps)
            scaler.step(optimizer)
            scaler.update()
            bar.set_postfix_str(f"loss per exit {np.mean(history[-50:], axis=0).round(2)}", refresh=False)
            checkpoint.keep(stage, history, parameters, optimizer, scaler, is_over=step == steps)
    model.cpu()  # frees the device for the next stage


def compute_gradients(model: MultiExitModel, batch: Batch, scaler: GradScaler, precision: torch.dtype | None) -> Tensor:
    """Add up the gradients of all exits' losses on a batch. Returns the losses (K,), or (K-1,) for branches.

    Autocast ends with each loss, before backward(), which torch advises to run outside of it.
    """
    losses, exits = [], model.exit_by_exit(*batch.inputs)
    for head in model.heads:
        if not head.classifier.weight.requires_grad:  # in a branch model the last head belongs to the frozen trunk
            break
        with devices.autocast(batch.input_ids.device, precision):
            losses.append(exit_loss(*next(exits), batch.targets))
        if model.method != "ee":  # no later loss sends a gradient to this segment, so its activations are freed
            scaler.scale(losses[-1]).backward()
    if model.method == "ee":
        scaler.scale(sum(losses)).backward()
    return torch.stack(losses).detach()


@contextmanager
def used_rows(model: MultiExitModel, examples: TokenizedExamples) -> Iterator[TokenizedExamples]:
    """Inside the `with` block the word embeddings are cut to the rows in use, and token ids are renumbered to match.

    The other rows would get no gradient and stay as they are. To leave them out saves 10 to 12% of a step.
    """
    embedding, whole = model.encoder.word_embeddings, model.encoder.word_embeddings.weight
    used, renumbered = examples.renumbered()  # ids (V,)
    used = torch.from_numpy(used).to(whole.device)
    embedding.weight = nn.Parameter(whole.detach()[used], whole.requires_grad)
    yield renumbered
    with torch.no_grad():
        whole[used] = embedding.weight
    embedding.weight = whole


def balanced(targets: np.ndarray, num_labels: int) -> np.ndarray:
    """Targets for --class-weights balanced: labels (N,) or probabilities (N, C) to (N, C), each row times its weight.

    A row weighs N / (classes that occur x rows of its class). Its class is its label, or its likeliest target.
    """
    if targets.ndim == 1:
        targets = np.eye(num_labels, dtype=np.float32)[targets]
    classes, of_row, counts = np.unique(targets.argmax(1), return_inverse=True, return_counts=True)
    weights = len(targets) / (len(classes) * counts[of_row])  # (N,)
    return targets * weights[:, None].astype(np.float32)


def fit_exit_0(setup: TrainingSetup, embeddings: Tensor) -> NgramExit:
    """Fit exit 0, a bag of words, with the word embeddings (V, D) that the training started from."""
    examples = setup.examples
    chunks = np.array_split(np.arange(len(examples)), -(-len(examples) // 256))
    batches = [examples.batch(rows).inputs for rows in chunks]
    fit_ngrams(setup.ngrams, batches, torch.from_numpy(examples.targets), embeddings)
    return setup.ngrams


def make_model(setup: TrainingSetup, start: MultiExitModel) -> ExitModel:
    """The method's model, which starts from `start`. With --targets trunk the examples get the answers of `start`."""
    args, examples = setup.args, setup.examples
    if args.targets == "trunk":
        precision = devices.choose_precision(args.amp, setup.device)  # that of evaluate.py: on a CPU float32
        logits, _ = all_logits(start.to(setup.device).eval(), examples, precision, "targets")
        answers = logits[-1].softmax(-1).numpy()  # (N, C)
        examples.targets = balanced(answers, setup.num_labels) if args.class_weights else answers
        start.cpu()
    torch.manual_seed(args.seed)  # so that new weights do not depend on where the trunk is from
    return METHODS[args.method](start, setup.layers, exit_strategy=args.exit_strategy)


# One function per method. `start` has one exit, at its end: it is the trunk, or a new model.


def train_together(setup: TrainingSetup, checkpoint: Checkpoint, start: MultiExitModel) -> ExitModel:
    """EE and SWEET: one model, whose exits are trained together. A given trunk's layers are trained further."""
    model = make_model(setup, start)
    if setup.trunk is None or len(model.heads) > 1:  # a trunk with its one exit is trained already
        fine_tune(setup, checkpoint, model, setup.args.lr, setup.args.method)
    return model


def train_one_by_one(setup: TrainingSetup, checkpoint: Checkpoint, start: MultiExitModel) -> ExitModel:
    """Multi-Model: one model for each exit. A trunk is the last of them, and stays as it is."""
    model = make_model(setup, start)
    for part in model.models[:-1] if setup.trunk else model.models:
        fine_tune(setup, checkpoint, part, setup.args.lr, f"layers {part.exit_layers[0]}")
    return model


def train_branches(setup: TrainingSetup, checkpoint: Checkpoint, start: MultiExitModel) -> ExitModel:
    """Branches on a trunk, at twice the learning rate. Without --trunk it is trained first, for its last exit alone."""
    if setup.trunk is None:
        fine_tune(setup, checkpoint, start, setup.args.lr, "trunk")
    model = make_model(setup, start)
    if model.branches:
        fine_tune(setup, checkpoint, model, 2 * setup.args.lr, "branches")
    return model


TRAIN = {"sweet": train_together, "ee": train_together, "mm": train_one_by_one, "branch": train_branches}


def train_run(setup: TrainingSetup, checkpoint: Checkpoint) -> None:
    """Train one run and write its folder."""
    print(*setup.notes, sep="\n")
    args, record, examples = setup.args, setup.record, setup.examples
    if args.class_weights and examples.targets is not None:
        examples.targets = balanced(examples.targets, setup.num_labels)
    torch.manual_seed(args.seed)
    start = setup.trunk or build_alone(setup.folder, setup.layers[-1], setup.num_labels, args.exit_strategy)
    embeddings = start.encoder.word_embeddings.weight.detach().clone()  # before they are trained
    try:
        model = TRAIN[args.method](setup, checkpoint, start)
    except FloatingPointError as error:
        step = record["diverged"] = error.args[0]
        if devices.process_rank() == 0:
            checkpoint.path.unlink(missing_ok=True)
            if not (args.out / WEIGHTS).exists():  # an earlier run with weights is not overwritten
                # It counts as done: `reproduce` passes it over, and --resume refuses it.
                save_run(args.out, None, setup.folder, record, setup.validation)
        where = f"at {args.lr:g} the loss became infinite or NaN at step {step}"
        raise InputError(f"--lr: {where}; try a lower one") from None
    if devices.process_rank():  # the first process alone fits exit 0 and writes
        return
    losses = [saved["losses"] for saved in checkpoint.stages.values()]  # of each stage, (steps, its exits)
    seconds = {stage: saved["seconds"] for stage, saved in checkpoint.stages.items()}
    if args.method == "branch":
        losses.reverse()  # the trunk was trained first, and its exit is the last
    if setup.ngrams:
        started = time.perf_counter()
        model.add_ngrams(fit_exit_0(setup, embeddings))
        seconds["ngrams"] = time.perf_counter() - started
    record["losses"] = np.concatenate(losses, axis=1).round(5).tolist() if losses else []
    record["stages"] = {stage: round(taken, 1) for stage, taken in seconds.items()}
    record["seconds"] = round(sum(seconds.values()), 1)
    save_run(args.out, model, setup.folder, record, setup.validation)
    print(f"{args.out}: trained in {record['seconds']:.0f} s; next: python evaluate.py {args.out}")


def main() -> None:
    """Train one run, or with --resume say that it is there."""
    args = parse_arguments(__doc__)
    devices.tune_cpu()
    with claim_output(args.out, args.resume or args.overwrite) as path:
        setup = find_start(args)
        checkpoint = Checkpoint(path, args, setup.record)
        if checkpoint.is_finished:
            print(f"{args.out}: finished already; next: python evaluate.py {args.out}")
        else:
            train_run(setup, checkpoint)
        if devices.process_rank() == 0:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    run_command(devices.distributed(main))
