"""Fine-tune BERT or DeBERTa with early exits: the paper's Early-Exit (ee), Multi-Model (mm) and SWEET (sweet).

    python train.py                                                # minilm-l6, sweet, toy: about a minute on a laptop
    python train.py --model bert-base --method sweet --task rte

Writes a run folder, which evaluate.py reads.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from minisweet.bert import BertConfig
from minisweet.data.tasks import TASKS, load_examples
from minisweet.data.text import TokenizedExamples, load_tokenizer
from minisweet.deberta import DebertaConfig
from minisweet.exits import EXIT_STRATEGIES, METHODS, MultiExitModel, build_multi_model, cap_others, check_exit_layers
from minisweet.files.checkpoint import load_encoder, read_config
from minisweet.files.commands import Parser, list_of, number, positive_float, run_command, whole_number
from minisweet.files.hub import REPOSITORIES, model_folder
from minisweet.files.runs import DIVERGED, check_output, method_name, save_run, versions
from minisweet.files.safe import InputError, write_json
from minisweet.training.devices import (
    add_device_options,
    autocast,
    choose_device,
    choose_precision,
    device_name,
    reuse_freed_memory,
)
from minisweet.training.options import EXIT_LAYERS, default_batch_size, default_learning_rate


class NotFiniteError(InputError):
    """The loss of a training became infinite or NaN."""


def exit_loss(logits: Tensor, certainty: Tensor | None, labels: Tensor) -> Tensor:
    """One exit's loss: logits (B, C), certainty (B,) or None, and labels (B,) to a scalar.

    Cross-entropy, and for learning-to-exit the mean squared error of the certainty that the exit is right.
    """
    loss = F.cross_entropy(logits.float(), labels)
    if certainty is not None:
        loss = loss + F.mse_loss(certainty, (logits.argmax(-1) == labels).float())
    return loss


@contextmanager
def used_rows_alone(embedding: nn.Embedding, used: Tensor) -> Iterator[None]:
    """Within, the embedding holds only the rows `used` (V,) of its table, in this order; at the end all are back.

    A row that no example uses gets no gradient, and AdamW without weight decay leaves it as it is. So only the others
    need be trained: SST-2 takes 12% less time.
    """
    whole = embedding.weight
    embedding.weight = nn.Parameter(whole.detach()[used])
    try:
        yield
    finally:
        with torch.no_grad():
            whole[used] = embedding.weight
        embedding.weight = whole


def train(
    model: MultiExitModel,
    examples: TokenizedExamples,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    precision: torch.dtype | None = None,
    owner_cap: float | None = None,
    title: str = "train",
) -> list[list[float]]:
    """Fine-tune all exits of `model` in place, on the device where it is (App. A).

    Args:
        model: of EE or SWEET, or one of MM's models.
        examples: the training set.
        epochs, batch_size: passes over it, and examples in each step.
        learning_rate: of the first step; it decays linearly to zero.
        seed: of the order of the examples and of dropout.
        precision: type to autocast to; None for float32 alone.
        owner_cap: of a model with flow 1, the cap of `cap_others`; None for no cap.
        title: for the progress bar.

    Returns:
        Each step's loss at each exit: (steps, K).

    Raises:
        NotFiniteError: the loss is no longer finite.
        ValueError: an owner_cap, and a model with a boundary.
    """
    if owner_cap is not None and (model.gradient_flow < 1 or model.gradient_cap):
        raise ValueError("owner_cap is for a model with gradient_flow 1")
    torch.manual_seed(seed)
    model.train()
    device = next(model.parameters()).device
    used = torch.from_numpy(examples.vocabulary()).to(device)
    steps = epochs * -(-len(examples) // batch_size)
    history = []
    progress = tqdm(total=epochs * len(examples), unit="ex", desc=title)
    with progress, used_rows_alone(model.encoder.word_embeddings, used):
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=learning_rate, betas=(0.9, 0.999), weight_decay=0.0, fused=True
        )
        scaler = torch.amp.GradScaler(device.type, enabled=precision is torch.float16)
        owned = model.owned()
        for batch in chain.from_iterable(examples.shuffled(batch_size, seed, epoch) for epoch in range(epochs)):
            batch = batch.to(device)
            batch = batch._replace(input_ids=torch.searchsorted(used, batch.input_ids))  # rows of the smaller table
            optimizer.zero_grad()
            losses, own = [], []
            with autocast(device, precision):
                for k, (logits, certainty) in enumerate(model.segments(*batch.inputs)):  # exit by exit
                    loss = exit_loss(logits, certainty, batch.labels)
                    # Under SWEET (and in MM's models, of one exit each) no other loss reaches this segment: call
                    # backward() now and free the segment. It computes in the forward's types, autocast or not.
                    if model.gradient_flow == 0:
                        scaler.scale(loss).backward()
                        loss = loss.detach()
                    elif owner_cap is not None and k + 1 < len(owned):  # no other exit reaches the last one's
                        own += torch.autograd.grad(scaler.scale(loss), owned[k], retain_graph=True)
                    losses.append(loss)
            if model.gradient_flow > 0:
                scaler.scale(sum(losses)).backward()
            if own:
                cap_others(sum(owned[:-1], []), own, owner_cap)
            scaler.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), 1.0)  # of all segments together, as the authors do
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * (1 - len(history) / steps)
            scaler.step(optimizer)
            scaler.update()
            history.append(torch.stack(losses).tolist())
            if not np.isfinite(history[-1]).all():
                raise NotFiniteError(
                    f"--lr: at {learning_rate:g} the loss is {sum(history[-1])} in step {len(history)}"
                )
            progress.update(len(batch.rows))
            progress.set_postfix(loss=f"{sum(history[-1]):.3f}", refresh=False)
    return history


def add_training_options(parser: Parser) -> None:
    """Add what every command that trains takes: the model, the data, and how batches are made and computed."""
    option = parser.add_argument
    option("--model", default="minilm-l6", help=f"{', '.join(REPOSITORIES)}, or a folder (default: minilm-l6)")
    option("--data-dir", type=Path, default=Path("data"), help="holds the GLUE tasks' folders (default: data)")
    option("--batch-size", type=whole_number(1), help="examples (default: 16, and 8 for deberta-large)")
    option("--max-length", type=whole_number(8), default=256, help="tokens; longer examples are cut (default: 256)")
    option("--exit-layers", type=list_of(whole_number(1)), help="counted from 1, such as 1,4,6,12 (default: by depth)")
    add_device_options(parser)


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = Parser(description="Fine-tune BERT or DeBERTa with early exits.")
    option = parser.add_argument
    option("--method", choices=METHODS, default="sweet", help="SWEET, Early-Exit or Multi-Model (default: sweet)")
    boundary = parser.add_mutually_exclusive_group().add_argument
    boundary(
        "--gradient-flow",
        type=number(0, 1),
        help="share of gradient that passes sweet's boundaries; 1 is EE (default: 0)",
    )
    boundary("--gradient-cap", type=number(0), help="instead: pass at most so many times the norm of the exit's own")
    boundary("--owner-cap", type=number(0), help="instead: on each parameter, at most so many times its owner exit's")
    option("--exit-strategy", choices=EXIT_STRATEGIES, default="confidence", help="or learning-to-exit, lte")
    option("--task", choices=list(TASKS), default="toy", help="what to learn (default: toy)")
    option("--train-size", type=whole_number(1), default=6000, help="examples, drawn by the seed (default: 6000)")
    option("--seed", type=whole_number(0), default=0, help="of the subset, new weights, order, dropout (default: 0)")
    option("--lr", type=positive_float, help="first learning rate (default: the paper's; minilm-l6 2e-4, others 5e-5)")
    option("--epochs", type=whole_number(1), default=2, help="passes over the training set (default: 2)")
    option("--out", type=Path, help="run folder (default: runs/<model>-<method>-<task>-seed<k>)")
    option("--overwrite", action="store_true", help="replace the run in --out")
    add_training_options(parser)
    args = parser.parse_args()
    if args.method != "sweet" and method_name(vars(args)) != args.method:
        raise InputError(f"--gradient-flow, --gradient-cap, --owner-cap: of --method sweet, not {args.method}")
    if args.out is None:
        name = f"{Path(args.model).resolve().name}-{method_name(vars(args))}-{args.task}-seed{args.seed}"
        args.out = Path("runs") / (name + "-lte" * (args.exit_strategy == "lte"))
    args.lr = args.lr or default_learning_rate(args.model, args.task, args.method)
    args.batch_size = args.batch_size or default_batch_size(args.model)
    return args


def find_model(args: argparse.Namespace) -> tuple[Path, BertConfig | DebertaConfig, Sequence[int]]:
    """The folder of --model, its config, and the exit layers; raises InputError where an option does not fit them."""
    folder = model_folder(args.model)
    config = read_config(folder)
    exit_layers = args.exit_layers or EXIT_LAYERS.get(config.num_hidden_layers)
    if exit_layers is None:
        raise InputError(f"--exit-layers: needed for {args.model}, an encoder of {config.num_hidden_layers} layers")
    try:
        check_exit_layers(exit_layers, config.num_hidden_layers)
    except ValueError as error:
        raise InputError(f"--exit-layers: {error}") from None
    if args.max_length > config.max_position_embeddings:
        raise InputError(
            f"--max-length: {args.max_length}, and {args.model} has {config.max_position_embeddings} positions"
        )
    return folder, config, exit_layers


def main() -> None:
    """Train one run."""
    args = parse_arguments()
    reuse_freed_memory()
    check_output(args.out, args.overwrite)
    device = choose_device(args.device)
    precision = choose_precision(args.amp, device)
    task = TASKS[args.task]
    folder, config, exit_layers = find_model(args)

    rows = load_examples(args.task, "train", args.data_dir)
    subset = np.sort(np.random.default_rng(args.seed).permutation(len(rows.labels))[: args.train_size])
    tokenizer = load_tokenizer(folder, config.vocab_size, args.max_length)
    examples = TokenizedExamples(tokenizer, rows, subset)

    torch.manual_seed(args.seed)
    if args.method == "mm":
        model = build_multi_model(folder, exit_layers, len(task.labels), args.exit_strategy)
        parts = list(model)  # trained one after the other, each alone
    else:
        encoder = load_encoder(folder, exit_layers[-1])
        # With --owner-cap all gradient passes, as under EE; train() caps it after the backward pass.
        flow = args.gradient_flow if args.owner_cap is None else 1.0
        model = MultiExitModel(
            encoder, exit_layers, len(task.labels), args.method, args.exit_strategy, flow, args.gradient_cap
        )
        parts = [model]
    print(
        f"{args.model}, {method_name(vars(args))}, {args.task}: {len(examples)} examples, exits after layers "
        f"{','.join(map(str, exit_layers))} of {config.num_hidden_layers}, learning rate {args.lr:g}, "
        f"batch size {args.batch_size}, epochs {args.epochs}, seed {args.seed}, {device}, {precision or torch.float32}"
    )
    start = time.perf_counter()
    losses = []
    arguments = vars(args) | {"data_dir": str(args.data_dir.resolve()), "out": str(args.out)}
    settings = {"epochs": args.epochs, "batch_size": args.batch_size, "learning_rate": args.lr, "seed": args.seed}
    settings["owner_cap"] = args.owner_cap
    for part in parts:
        title = f"layers {part.exit_layers[-1]}" if args.method == "mm" else args.method
        try:
            losses.append(train(part.to(device), examples, **settings, precision=precision, title=title))
        except NotFiniteError as error:
            if not args.out.exists():  # a grid's search must know that this rate is over
                write_json(args.out / DIVERGED, {"error": str(error), "arguments": arguments})
            raise
        part.cpu()  # frees the device for the next one
    seconds = time.perf_counter() - start

    record = {
        "arguments": arguments,
        "model": args.model,
        "method": args.method,
        "exit_strategy": args.exit_strategy,
        "task": args.task,
        "metric": task.metric,
        "exit_layers": exit_layers,
        "depth": config.num_hidden_layers,
        "learning_rate": args.lr,
        "seed": args.seed,
        "device": device_name(device),
        "precision": str(precision or torch.float32),
        "versions": versions(),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "examples_per_second": round(args.epochs * len(examples) / seconds, 1),
        "subset": subset.tolist(),
        "losses": np.concatenate(losses, axis=1).round(5).tolist(),  # (steps, K)
    }
    save_run(args.out, model, folder, record, args.overwrite)
    print(f"{args.out}: trained in {seconds:.0f} s; next: python evaluate.py {args.out}")


if __name__ == "__main__":
    run_command(main)
