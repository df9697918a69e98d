"""A training step beside that of `transformers`: as many times as fast, at batch 16 with dropout and optimizer.

    python -m tests.benchmark.rivals [--turns 7] [--only minilm,base,deberta]

Both sides fine-tune the whole model for one exit, at its end, with random weights and their user's settings. DeBERTa of
`transformers` fails in bfloat16 autocast, so there it is cast to bfloat16 as a whole. Each side has a process of its
own, and they take turns, so that a machine whose speed drifts is fair to both.
"""

import statistics
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from minisweet import MultiExitModel
from minisweet.base.commands import Parser, list_of, one_of, run_command, whole_number
from minisweet.base.devices import tune_cpu
from minisweet.bert import BertEncoder
from minisweet.config import BertConfig, DebertaConfig
from minisweet.deberta import DebertaEncoder
from minisweet.exits import exit_loss

CHECKOUT = Path(__file__).parents[2]
LOOP = """
import sys, time
for _ in sys.stdin:
    start = time.perf_counter()
    step()
    print("seconds", time.perf_counter() - start, flush=True)
"""
BATCH = 16
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
BASE |= {"max_position_embeddings": 512, "type_vocab_size": 2, "vocab_size": 30522}
DEBERTA = {"type_vocab_size": 0, "vocab_size": 50265, "relative_attention": True, "position_biased_input": False}
MODELS = {
    "minilm": BASE | {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    "base": BASE,
    "deberta": BASE | DEBERTA | {"pos_att_type": "c2p|p2c"},
}


def batch_of(T: int) -> tuple[torch.Tensor, ...]:
    """Random ids, mask and types (16, T), and labels (16,). One text is half as long."""
    torch.manual_seed(0)
    ids = torch.randint(5, 30000, (BATCH, T))
    mask = torch.ones_like(ids)
    mask[0, T // 2 :] = 0
    return ids, mask, torch.zeros_like(ids), torch.randint(0, 2, (BATCH,))


def our_step(name: str, T: int, bf16: bool):
    """A function that takes one step of ours."""
    tune_cpu()
    encoder = (
        DebertaEncoder(DebertaConfig(**MODELS[name])) if name == "deberta" else BertEncoder(BertConfig(**MODELS[name]))
    )
    model = MultiExitModel(encoder, (len(encoder.layers),), 2).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    *inputs, labels = batch_of(T)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            (answer,) = model.exit_by_exit(*inputs)
            loss = exit_loss(*answer, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def their_step(name: str, T: int, bf16: bool):
    """A function that takes one step of a model of `transformers`, whose attention is its fastest."""
    import transformers

    kind = "Deberta" if name == "deberta" else "Bert"
    config = getattr(transformers, f"{kind}Config")(**MODELS[name])
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config).train()
    cast = bf16 and name == "deberta"
    model = model.bfloat16() if cast else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)
    ids, mask, types, labels = batch_of(T)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16 and not cast):
            logits = model(input_ids=ids, attention_mask=mask, token_type_ids=types).logits
        F.cross_entropy(logits.float(), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def take_turns(sides: dict[str, str], turns: int) -> dict[str, list[float]]:
    """Let each side take its step in turn. Returns the seconds of each turn after the first, which warms up.

    `sides` are Python source that defines `step()`.
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": CHECKOUT}
    workers = {side: subprocess.Popen([sys.executable, "-c", source + LOOP], **pipes) for side, source in sides.items()}
    seconds = {side: [] for side in sides}
    for turn in range(turns + 1):
        for side, worker in workers.items():
            print(turn, file=worker.stdin, flush=True)
            line = next(line for line in worker.stdout if line.startswith("seconds "))
            seconds[side].append(float(line.split()[1]))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return {side: values[1:] for side, values in seconds.items()}


def main() -> None:
    """Print a line for each model, length and type."""
    parser = Parser(__doc__)
    parser.add_argument("--turns", type=whole_number(1), default=7)
    parser.add_argument("--only", type=list_of(one_of(MODELS)), default=list(MODELS))
    args = parser.parse_args()
    for name in args.only:
        for T in (32, 128):
            for bf16 in (True, False):
                source = "from tests.benchmark import rivals\nstep = rivals.{}_step({!r}, {}, {})"
                sides = {side: source.format(side, name, T, bf16) for side in ("our", "their")}
                seconds = take_turns(sides, args.turns)
                ratio = statistics.median(b / a for a, b in zip(seconds["our"], seconds["their"], strict=True))
                kind = "bfloat16" if bf16 else "float32"
                print(f"{name:<8} T {T:<4} {kind:<9} {ratio:.2f} times as fast", flush=True)


if __name__ == "__main__":
    run_command(main)
