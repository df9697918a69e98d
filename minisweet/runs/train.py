"""Train one run and write its folder: what train.py, `minisweet fit` and `EarlyExitClassifier.fit` call.

Dimension letters: N instances, K exits, C classes, V words, D hidden size.
"""

import argparse
from itertools import chain

import numpy as np
import torch

from minisweet.base.commands import progress
from minisweet.base.files import LOG, InputError
from minisweet.beyond.ngrams import fit_ngrams
from minisweet.checkpoint import WEIGHTS
from minisweet.exits import ExitModel, MultiExitModel
from minisweet.methods import METHODS, add_exits, new_trunk
from minisweet.runs.folders import save_run
from minisweet.runs.resume import SavedTraining, claim_output
from minisweet.runs.start import Data, Setup, epochs_of, prepare
from minisweet.training import fine_tune, process_rank, used_rows

# A plain model with fewer labelled rows also learns its own answers: to at most so many texts, for so many epochs.
FEW, MOST, EPOCHS_AGAIN = 2000, 5000, 2


def train(args: argparse.Namespace, data: Data) -> bool:
    """Train a run and write it to `args.out`. False where --resume finds it finished.

    `args` has what `add_training_options` and `add_run_options` add, and out, method, class_weights, train_size and
    dev_size; for own text trunk too. Raises InputError where options or data do not fit, or the loss is not finite.
    """
    with claim_output(args.out, args.resume or args.overwrite) as folder:
        setup = prepare(args, data)
        checkpoint = SavedTraining(folder, setup.args, setup.run_json)
        if not checkpoint.is_finished:
            train_and_save(setup, checkpoint)
        if process_rank() == 0:
            checkpoint.path.unlink(missing_ok=True)
    return not checkpoint.is_finished


def train_and_save(setup: Setup, checkpoint: SavedTraining) -> None:
    """Train the stages of the method, fit exit 0, and write the run."""
    args, run_json, C = setup.args, setup.run_json, len(setup.data.labels)
    torch.manual_seed(args.seed)
    trunk = setup.data.trunk or new_trunk(setup.folder, setup.layers[-1], C, args.exit_strategy)
    embeddings = trunk.encoder.word_embeddings.weight.detach().clone()  # before they are trained
    if not len(setup.examples):  # no row is labelled: all learn what the trunk says
        setup = taught(setup, checkpoint, trunk)
    try:
        model = train_model(setup, checkpoint, trunk)
    except FloatingPointError as error:
        step = run_json["diverged"] = error.args[0]
        if process_rank() == 0:
            checkpoint.path.unlink(missing_ok=True)
            if not (args.out / WEIGHTS).exists():  # an earlier run with weights is not overwritten
                # It counts as done: `reproduce` and --resume pass it over.
                save_run(args.out, None, setup.folder, run_json, setup.validation)
        where = f"at {args.lr:g} the loss became infinite or NaN at step {step}"
        raise InputError(f"--lr: {where}; try a lower one") from None
    if process_rank():  # the first process alone fits exit 0 and writes
        return
    if setup.ngrams:
        fit_exit_0(setup, checkpoint, model, embeddings)
    stages = checkpoint.stages
    losses = {name: np.round(saved["losses"], 5).tolist() for name, saved in stages.items()}
    run_json["losses"] = {name: of_stage for name, of_stage in losses.items() if of_stage}
    run_json["stages"] = {name: round(saved["seconds"], 1) for name, saved in stages.items()}
    run_json["seconds"] = round(sum(saved["seconds"] for saved in stages.values()), 1)
    save_run(args.out, model, setup.folder, run_json, setup.validation)
    LOG.info("%s: trained in %.0f s", args.out, run_json["seconds"])


def train_model(setup: Setup, checkpoint: SavedTraining, trunk: MultiExitModel) -> ExitModel:
    """Train a method's model, which is built from a trunk (methods.py): a model with one exit, new or finished."""
    args, is_new, method = setup.args, setup.data.trunk is None, METHODS[setup.args.method]
    if is_new and method.keeps_trunk:
        train_trunk(setup, checkpoint, trunk)
    torch.manual_seed(args.seed)  # so that new weights do not depend on where the trunk is from
    model = add_exits(args.method, trunk, setup.layers, args.exit_strategy)
    if method.keeps_trunk:
        setup = taught(setup, checkpoint, model)
    for name, part, times_rate in method.stages(model, is_new):
        train_stage(setup, checkpoint, name, part, times_rate * args.lr)
    return model


def train_trunk(setup: Setup, checkpoint: SavedTraining, trunk: MultiExitModel) -> None:
    """Train the plain model for its one exit.

    Where few texts have labels and more have none, it then learns the labels again, and its own answers to the others
    (self-training). Full depth mostly gains by it, and exit 0 then foretells it better (.github/results/choose.md).
    """
    train_stage(setup, checkpoint, "trunk", trunk, setup.args.lr)
    count = len(setup.unlabelled or [])
    if len(setup.examples) < min(FEW, count):
        some = np.sort(np.random.default_rng(0).permutation(count)[:MOST])
        again = setup._replace(unlabelled=setup.unlabelled.take(some), epochs=setup.epochs or EPOCHS_AGAIN)
        train_stage(taught(again, checkpoint, trunk, "first answers"), checkpoint, "trunk again", trunk, setup.args.lr)


def taught(setup: Setup, checkpoint: SavedTraining, model: ExitModel, stage: str = "unlabelled") -> Setup:
    """With the unlabelled texts, if any, among the examples: they shall be answered as by the model's last exit.

    More examples take fewer epochs, unless the options say how many. The answers are a stage of the checkpoint.
    """
    if not setup.unlabelled:
        return setup
    labels = np.eye(len(setup.data.labels), dtype=np.float32)[setup.examples.targets]
    targets = np.concatenate([labels, setup.data.answers(setup, checkpoint, model, stage)])
    examples = setup.examples.joined(setup.unlabelled).with_targets(targets)
    epochs = setup.epochs or epochs_of(len(examples), setup.args.batch_size)
    args = argparse.Namespace(**vars(setup.args) | {"epochs": epochs})
    return setup._replace(args=args, examples=examples, unlabelled=None)


def train_stage(setup: Setup, checkpoint: SavedTraining, name: str, model: MultiExitModel, rate: float) -> None:
    """Fine-tune a model, or a part of one, on all examples for all epochs."""
    args, examples = setup.args, setup.examples
    if args.class_weights:
        examples = examples.with_targets(balanced(examples.targets, len(setup.data.labels)))
    model.to(setup.device)
    with used_rows(model, examples) as row_of:
        epochs = (examples.shuffled(args.batch_size, args.seed, epoch) for epoch in range(args.epochs))
        batches = (batch._replace(input_ids=row_of[batch.input_ids]) for batch in chain.from_iterable(epochs))
        steps = args.epochs * -(-len(examples) // args.batch_size)
        with progress(batches, total=steps, unit="step", desc=name) as bar, checkpoint.during(name, bar):
            fine_tune(model, bar, steps, rate, args.seed, setup.precision, checkpoint)
    model.cpu()  # frees the device for the next stage


def fit_exit_0(setup: Setup, checkpoint: SavedTraining, model: ExitModel, embeddings: torch.Tensor) -> None:
    """Fit exit 0 to the labels, and where there are unlabelled texts to what the model's last exit says of them."""
    examples, C = taught(setup, checkpoint, model).examples, len(setup.data.labels)
    targets = balanced(examples.targets, C) if setup.args.class_weights else examples.targets
    chunks = np.array_split(np.arange(len(examples)), -(-len(examples) // 256))
    batches = [examples.batch(rows).inputs for rows in chunks]
    with checkpoint.timed("exit 0"), progress(desc="exit 0", unit="fit") as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        fit_ngrams(setup.ngrams, batches, torch.from_numpy(targets), embeddings, report)
    model.add_ngrams(setup.ngrams)


def balanced(targets: np.ndarray, num_labels: int) -> np.ndarray:
    """Labels (N,) or probabilities (N, C) to (N, C), each row times N / (classes that occur x rows of its class)."""
    targets = np.eye(num_labels, dtype=np.float32)[targets] if targets.ndim == 1 else targets
    _, of_row, counts = np.unique(targets.argmax(1), return_inverse=True, return_counts=True)
    weights = len(targets) / (len(counts) * counts[of_row])  # (N,)
    return targets * weights[:, None].astype(np.float32)
