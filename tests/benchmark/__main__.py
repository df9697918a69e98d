"""minisweet beside what one would use instead, measured in one run, as ratios.

    python -m tests.benchmark [--data-dir DIR] [--only steps,epoch,...] [--runs RUN RUN] [--out benchmark.json]

Each side runs in a process of its own, with the settings that its user would have, and the two take turns, unit by
unit, so that a machine whose speed drifts is fair to both. A figure is the median over the turns, a ratio the median
of the ratios of single turns. Needs `transformers`; the GLUE rows need RTE in --data-dir. The rows of the sweep and of
live early exit measure fine-tuned models: the run folders that --runs names.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from minisweet import MultiExitModel, load_encoder
from minisweet.adaptive import ExitRule, exits_taken, leaves, spaced_thresholds
from minisweet.base.commands import Parser, list_of, one_of, run_command
from minisweet.base.devices import tune_cpu
from minisweet.base.safe import read_json, write_json
from minisweet.bert import BertConfig, BertEncoder
from minisweet.branches import METHODS
from minisweet.data.tasks import load_examples
from minisweet.data.text import Batch, TokenizedExamples, load_tokenizer
from minisweet.deberta import DebertaConfig, DebertaEncoder
from minisweet.evaluation.operating import operating_point
from minisweet.evaluation.sweep import load_validation, predict
from minisweet.live import GATHERED, early_exit
from minisweet.runs.folders import load_run, method_name, read_evaluation, read_record
from minisweet.runs.hub import model_folder
from minisweet.use.onnx import export_onnx
from minisweet.use.plots import COLOURS, label_axes, new_figure, save_figure
from tests.benchmark.rivals import classify_unit, export_all, texts_of
from tests.conftest import checkpoint_tensors, exit_model
from train import send_back, used_rows

SIZES = {"minilm-l6": (384, 6, 1536), "base": (768, 12, 3072)}  # D, L, feed-forward; 12 heads
DEBERTA = {"relative_attention": True, "position_biased_input": False, "pos_att_type": "c2p|p2c"}
BATCH = 16
FAMILIES = ("a model of n layers", "one file", "exits after every layer")  # of the sides of `one_file`
SPEEDS = (0.25, 0.5, 0.75)  # shares of the layers
TO_THE_END = ExitStack()  # what a process enters once and never leaves
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def settings_of(arch: str, size: str, depth: int | None = None) -> dict:
    """config.json's keys for an encoder of this size."""
    D, L, wide = SIZES[size]
    sizes = {"hidden_size": D, "num_hidden_layers": depth or L, "num_attention_heads": 12, "intermediate_size": wide}
    sizes |= {"max_position_embeddings": 512, "type_vocab_size": 2, "vocab_size": 30522}
    return sizes if arch == "bert" else sizes | {"type_vocab_size": 0, "vocab_size": 50265} | DEBERTA


def our_encoder(arch: str, size: str, depth: int | None = None) -> nn.Module:
    """Our encoder with random weights."""
    settings = settings_of(arch, size, depth)
    return BertEncoder(BertConfig(**settings)) if arch == "bert" else DebertaEncoder(DebertaConfig(**settings))


def their_model(arch: str, size: str) -> nn.Module:
    """The encoder of `transformers` with random weights, its classifier on top, its fastest attention on the CPU."""
    import transformers

    name = "Bert" if arch == "bert" else "Deberta"
    config = getattr(transformers, f"{name}Config")(**settings_of(arch, size))
    return getattr(transformers, f"{name}ForSequenceClassification")(config)


def optimizer_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Clip and step, as both sides do."""
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def step_unit(side: str, arch: str, size: str, T: int, amp: bool, exits: int = 1, depth: int | None = None):
    """One training step with optimizer, batch 16, dropout 0.1."""
    torch.manual_seed(0)
    if side == "ours":
        encoder = our_encoder(arch, size, depth)
        model = MultiExitModel(encoder, exit_layers_of(len(encoder.layers), exits), 2).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    else:
        model = their_model(arch, size).train()
        model = model.bfloat16() if side == "theirs, all bfloat16" else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)
    input_ids = torch.randint(5, 30000, (BATCH, T))
    mask, types, labels = torch.ones_like(input_ids), torch.zeros_like(input_ids), torch.randint(0, 2, (BATCH,))
    mask[0, T // 2 :] = 0

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
            if side == "ours":
                send_back(model, Batch(None, input_ids, mask, types, labels), NO_SCALER)
            else:
                logits = model(input_ids=input_ids, attention_mask=mask, token_type_ids=types).logits
                F.cross_entropy(logits.float(), labels).backward()
        optimizer_step(model, optimizer)

    return step


@torch.no_grad()
def forward_unit(side: str, arch: str, size: str, T: int, amp: bool):
    """All exits' logits of one batch of 16, without dropout."""
    encoder = our_encoder(arch, size)
    model = MultiExitModel(encoder, [len(encoder.layers)], 2).eval()
    input_ids = torch.randint(5, 30000, (BATCH, T))
    inputs = input_ids, torch.ones_like(input_ids), torch.zeros_like(input_ids)

    @torch.no_grad()
    def forward() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
            model(*inputs)

    return forward


class TransformersWithExits(nn.Module):
    """minilm-l6 from `transformers` with exits on top, under the interface that a loop of ours reads.

    `attention` "eager" is the attention of the authors' copy of the library, "sdpa" its fastest today.
    """

    def __init__(self, layers=(1, 2, 3, 6), attention: str = "sdpa") -> None:
        super().__init__()
        import transformers

        folder = model_folder("minilm-l6")
        self.bert = transformers.BertModel.from_pretrained(folder, attn_implementation=attention)
        self.layers = list(layers)
        self.poolers = nn.ModuleList(nn.Linear(384, 384) for _ in layers)
        self.classifiers = nn.ModuleList(nn.Linear(384, 2) for _ in layers)
        self.dropout = nn.Dropout(0.1)

    def take_weights(self, model: MultiExitModel) -> "TransformersWithExits":
        """The weights of one of our fine-tuned models."""
        found = self.bert.load_state_dict(checkpoint_tensors(model.encoder, pooler=False), strict=False)
        assert not found.unexpected_keys
        assert all("pooler" in name for name in found.missing_keys)
        for head, pooler, classifier in zip(model.heads, self.poolers, self.classifiers, strict=True):
            pooler.load_state_dict(head.pooler.state_dict())
            classifier.load_state_dict(head.classifier.state_dict())
        return self.eval()

    def exit(self, k: int, hidden):
        """Exit k's logits."""
        return self.classifiers[k](self.dropout(torch.tanh(self.poolers[k](hidden[:, 0]))))

    def exit_by_exit(self, input_ids, mask, types):
        """All exits' logits."""
        hidden = self.bert(
            input_ids, attention_mask=mask, token_type_ids=types, output_hidden_states=True
        ).hidden_states
        return [(self.exit(k, hidden[n]), None) for k, n in enumerate(self.layers)]

    def one_by_one(self, input_ids, mask, types):
        """The exits' logits, each before the layers after it run: what an early-exit loop needs."""
        hidden = self.bert.embeddings(input_ids=input_ids, token_type_ids=types)
        bias = (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        for n, layer in enumerate(self.bert.encoder.layer, start=1):
            hidden = layer(hidden, bias)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            if n in self.layers:
                yield self.exit(self.layers.index(n), hidden)


def glue(task: str, split: str, data_dir: str) -> TokenizedExamples:
    """A tokenised task."""
    folder = model_folder("minilm-l6")
    return TokenizedExamples(load_tokenizer(folder, 30522, 256), load_examples(task, split, Path(data_dir)))


def padded(batch, T: int = 256):
    """A batch padded to T tokens, as the authors do."""
    return [F.pad(tensor, (0, T - tensor.shape[1])) for tensor in batch.inputs]


def epoch_unit(side: str, amp: bool, data_dir: str):
    """Ten training batches of RTE: minilm-l6 with exits after layers 1, 2, 3, 6."""
    examples = glue("rte", "train", data_dir)
    ours = side == "ours"
    fused = side != "the authors' way"
    if ours:
        model = MultiExitModel(load_encoder(model_folder("minilm-l6")), (1, 2, 3, 6), 2).train()
        examples = TO_THE_END.enter_context(used_rows(model, examples))
    else:
        model = TransformersWithExits(attention="sdpa" if fused else "eager").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=fused or None)
    if fused:
        batches = examples.shuffled(BATCH, 0, 0)
    else:
        order = np.random.default_rng(0).permutation(len(examples))
        batches = (examples.batch(order[i : i + BATCH]) for i in range(0, len(order), BATCH))

    def ten_batches() -> None:
        for _ in range(10 if fused else 3):
            batch = next(batches)
            inputs = batch.inputs if fused else padded(batch)
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
                if ours:
                    send_back(model, batch, NO_SCALER)
                else:
                    exits = model.exit_by_exit(*inputs)
                    sum(F.cross_entropy(logits.float(), batch.targets) for logits, _ in exits).backward()
            optimizer_step(model, optimizer)

    ten_batches.examples = BATCH * (10 if fused else 3)
    return ten_batches


def sweep_unit(side: str, run: str):
    """Eleven thresholds: ours on the whole validation set at once; theirs instance by instance, padded to 256."""
    model, record = load_run(Path(run))
    examples = glue(record.task, "dev", record.data_dir)
    rule = ExitRule(record.num_labels)
    thresholds, rows = spaced_thresholds(11, rule.lowest), range(0, len(examples), len(examples) // 20)
    if side == "ours":

        def sweep():
            confidence = rule.confidences(predict(model, examples, None)[0])
            return [exits_taken(confidence, threshold, rule.lowest)[rows].tolist() for threshold in thresholds]

        sweep.examples = len(examples)
        return sweep

    theirs = TransformersWithExits(model.exit_layers, attention="eager").take_weights(model)

    @torch.no_grad()
    def sweep():
        decisions = []
        for threshold in thresholds:
            decisions.append([])
            for row in rows:
                for k, logits in enumerate(theirs.one_by_one(*padded(examples.batch(np.array([row]))))):  # noqa: B007
                    if leaves(rule.confidence(k, logits, None), threshold, rule.lowest):
                        break
                decisions[-1].append(k)
        return decisions

    sweep.examples = len(rows)
    return sweep


def live_unit(side: str, run: str, amp: bool, threshold: float = 1.0):
    """The validation set in batches of 32: ours live at a threshold; theirs MM's last model, alone, at full depth."""
    model, record = load_run(Path(run))
    examples = glue(record.task, "dev", record.data_dir)
    batches = list(examples.by_length(32 * GATHERED if side == "ours" else 32))
    if side == "ours":
        run_batch = partial(early_exit, model, threshold=threshold)
    else:
        alone = TransformersWithExits(model[-1].exit_layers).take_weights(model[-1])
        run_batch = lambda *inputs: alone.exit_by_exit(*inputs)[-1][0].argmax(-1)  # noqa: E731

    @torch.no_grad()
    def all_batches():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
            for batch in batches:
                run_batch(*batch.inputs)

    all_batches.examples = len(examples)
    return all_batches


def branch_unit(side: str, run: str, data_dir: str):
    """Ten batches of branches' training: with the trunk's layers, or with its states as if they had been kept."""
    model, record = load_run(Path(run))
    model.train()
    examples = glue(record.task, "train", data_dir)
    batches = [batch for batch, _ in zip(examples.shuffled(BATCH, 0, 0), range(10), strict=False)]
    optimizer = torch.optim.AdamW(sum(model.parameter_groups(), []), lr=1e-5, weight_decay=0.0, fused=True)
    number, kept = [0], {}

    def remembered(function):
        """It runs once for each batch."""

        def call(hidden, context, *span):
            key = (number[0], function, span)
            if key not in kept:
                kept[key] = function(hidden, context, *span)
            return kept[key]

        return call

    if side == "kept":
        model.encoder.run_layers = remembered(model.encoder.run_layers)
        for layer in model.encoder.layers:
            layer.forward = remembered(layer.forward)

    def ten_batches() -> None:
        for number[0], batch in enumerate(batches):  # noqa: B007
            optimizer.zero_grad()
            send_back(model, batch, NO_SCALER)
            optimizer_step(model, optimizer)

    ten_batches.examples = BATCH * len(batches)
    return ten_batches


UNITS = {"step": step_unit, "forward": forward_unit, "epoch": epoch_unit, "sweep": sweep_unit, "live": live_unit}
UNITS |= {"classify": classify_unit, "branch": branch_unit}


def work(unit: str, arguments: dict) -> None:
    """The process of one side: run the unit each time that a line arrives, and answer with its seconds."""
    if arguments["side"] == "ours":
        tune_cpu()
    run = UNITS[unit](**arguments)
    for _ in sys.stdin:
        start = time.perf_counter()
        answer = run()
        seconds = (time.perf_counter() - start) / getattr(run, "examples", 1)
        print(json.dumps([seconds, answer]), flush=True)


def take_turns(unit: str, sides: list[dict], turns: int) -> tuple[list[list[float]], list]:
    """Let processes for `sides` run the unit in turn: seconds and answers, [side][turn] each."""
    command = [sys.executable, "-m", "tests.benchmark", "--work", unit]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    workers = [subprocess.Popen([*command, json.dumps(side)], **pipes) for side in sides]
    seconds, answers = [[] for _ in sides], [[] for _ in sides]
    for turn in range(turns + 1):
        for n, worker in enumerate(workers):
            print(turn, file=worker.stdin, flush=True)
            line = worker.stdout.readline()
            if not line:
                raise RuntimeError(f"{sides[n]} of {unit} failed")
            if turn:  # the first is warm-up
                for of_all, value in zip((seconds, answers), json.loads(line), strict=True):
                    of_all[n].append(value)
    for worker in workers:
        worker.stdin.close()
        worker.wait()
    return seconds, answers


def compare(rows: list, title: str, unit: str, ours: dict, theirs: dict, turns: int = 5, target: float = 0.0) -> None:
    """Add a row: medians of both sides, the median ratio theirs/ours, and the target."""
    seconds, answers = take_turns(unit, [ours, theirs], turns)
    ratio = statistics.median(b / a for a, b in zip(*seconds, strict=True))
    a, b = (statistics.median(side) for side in seconds)
    row = {"row": title, "ours_ms": 1000 * a, "theirs_ms": 1000 * b, "ratio": ratio, "target": target}
    if unit == "sweep":
        row["same_decisions"] = answers[0][-1] == answers[1][-1]
    aim = f" (target {target})" if target else ""
    same = {True: ", same decisions", False: ", OTHER DECISIONS", None: ""}[row.get("same_decisions")]
    say(rows, row, f"{title:<86}{1000 * a:10.1f}{1000 * b:10.1f}{ratio:8.2f}x{aim}{same}")


def steps(rows: list, args) -> None:
    """Rows 1 and 2: a training step."""
    for amp in (False, True):
        kind = "bfloat16 autocast" if amp else "float32"
        for size in SIZES:
            for T in (32, 128):
                case = {"arch": "bert", "size": size, "T": T, "amp": amp}
                title = f"1 step, BERT {size}, T {T}, {kind}; transformers, the same"
                target = 1.25 if amp else 1.10
                compare(rows, title, "step", case | {"side": "ours"}, case | {"side": "theirs"}, target=target)
    for T in (64, 128, 256):
        case = {"arch": "deberta", "size": "base", "T": T, "amp": False}
        theirs = case | {"side": "theirs"}
        title = f"2 step, DeBERTa base, T {T}, "
        compare(rows, title + "float32; transformers, float32", "step", case | {"side": "ours"}, theirs, 3, 1.1)
        ours = case | {"side": "ours", "amp": True}
        compare(rows, title + "bfloat16 autocast; transformers, float32", "step", ours, theirs, 3, 1.9)
        theirs = case | {"side": "theirs, all bfloat16"}
        compare(rows, title + "bfloat16 autocast; transformers, all bfloat16", "step", ours, theirs, 3)


def epoch(rows: list, args) -> None:
    """Row 3: RTE training, milliseconds per example."""
    for amp in (False, True):
        ours = {"side": "ours", "amp": amp, "data_dir": str(args.data_dir)}
        kind = "bfloat16" if amp else "float32"
        authors = ours | {"side": "the authors' way", "amp": False}
        target = 10 if amp else 6.5
        compare(rows, f"3 RTE, per example, {kind}; the authors' way, float32", "epoch", ours, authors, 5, target)
        peer = ours | {"side": "transformers in our loop"}
        target = 1.25 if amp else 1.10
        compare(rows, f"3 RTE, per example, {kind}; transformers in our loop", "epoch", ours, peer, 7, target)


def runs_given(args, methods: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """The run folders of --runs that were trained with one of `methods`: folder, task, method by its whole name."""
    records = [(str(run), read_record(run)) for run in args.runs]
    chosen = [(run, record) for run, record in records if record.method in methods]
    return [(run, record.task, method_name(vars(record))) for run, record in chosen]


def sweeps(rows: list, args) -> None:
    """Row 4: eleven thresholds, milliseconds per instance."""
    for run, task, method in runs_given(args, ("ee", "sweet")):
        target = {"sst2": 80, "rte": 25}.get(task, 0)
        title = f"4 eleven thresholds, {method} {task}, per instance; one at a time, padded to 256"
        compare(rows, title, "sweep", {"side": "ours", "run": run}, {"side": "theirs", "run": run}, 3, target)


def live(rows: list, args) -> None:
    """Row 5: live early exit beside our own full depth. Row 6: beside `transformers`, where the scores are close."""
    for run, task, method in runs_given(args, METHODS):
        for amp in ("off", "bf16"):
            command = [sys.executable, "evaluate.py", run, "--live", "--calibration", "none", "--amp", amp]
            subprocess.run(command, check=True, capture_output=True)
            result = read_json(Path(run) / "evaluation.json")
            shares = np.array([[row["layer_share"], row["wall_share"]] for row in result["live"]])  # (thresholds, 2)
            at_half = float(np.interp(0.5, *shares.T))
            excess = float((shares[:, 1] - shares[:, 0]).max())
            title = f"5 live, {method} {task}, {result['precision'].removeprefix('torch.')}"
            row = {"row": title, "wall_at_half": at_half, "excess": excess, "live": result["live"]}
            line = f"{title}: {at_half:.2f} of the time at half of the layers (target <= 0.60); at most layer share "
            say(rows, row, f"{line}{excess:+.2f} (target +0.10)")
    for alone, task, _ in runs_given(args, ("mm",)):
        for amp, kind in ((False, "float32"), (True, "bfloat16")):
            goal = read_json(Path(alone) / "evaluation.json")["exit_scores"][-1] - 1
            for run, other, method in runs_given(args, METHODS):
                result = read_json(Path(run) / "evaluation.json")
                scores, last = result["scores"], len(result["scores"]) - 1
                # The first threshold within a point of the model alone, or else the last but two; and full depth.
                chosen = next((n for n, score in enumerate(scores) if score >= goal), last - 2)
                for n in sorted({chosen, last}) if other == task else ():
                    t = result["thresholds"][n]
                    title = f"6 live, {method}, {kind}, t {t:.2f}: {scores[n]:.1f}; transformers alone: {goal + 1:.1f}"
                    ours = {"side": "ours", "run": run, "amp": amp, "threshold": t}
                    compare(rows, title, "live", ours, {"side": "theirs", "run": alone, "amp": amp}, 5)


def saved_bytes(method: str) -> int:
    """Peak bytes that autograd holds for the backward pass in one step: base size, batch 16 x 128, exits 1,4,6,12."""
    torch.manual_seed(0)
    model = exit_model(our_encoder("bert", "base"), (1, 4, 6, 12), 2, method).train()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, int] = {}
    now = peak = 0

    class Held:
        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal now, peak
            self.tensor, storage = tensor, tensor.untyped_storage()
            self.key, self.size = storage.data_ptr(), storage.nbytes()
            if self.key not in parameters:
                if held.setdefault(self.key, 0) == 0:
                    now += self.size
                held[self.key] += 1
                peak = max(peak, now)

        def __del__(self) -> None:
            nonlocal now
            if self.key not in parameters:
                held[self.key] -= 1
                now -= self.size if held[self.key] == 0 else 0

    input_ids = torch.randint(5, 30000, (16, 128))
    batch = Batch(None, input_ids, torch.ones_like(input_ids), torch.zeros_like(input_ids), torch.zeros(16).long())
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda saved: saved.tensor):
        send_back(model, batch, NO_SCALER)
    return peak


def memory(rows: list, args) -> None:
    """Row 7: activations held for the backward pass."""
    ee, sweet = saved_bytes("ee"), saved_bytes("sweet")
    row = {"row": "7 activations, bytes", "ours": sweet, "theirs": ee, "ratio": sweet / ee, "target": 0.60}
    line = f"7 peak of activations: SWEET {sweet / 1e6:.0f} MB, EE {ee / 1e6:.0f} MB, {sweet / ee:.2f}x"
    say(rows, row, f"{line} (target <= 0.60)")


def startup(rows: list, args) -> None:
    """Row 8: seconds before the first step."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import train"], check=True)
    imports = time.perf_counter() - start
    start = time.perf_counter()
    load_encoder(model_folder("minilm-l6"))
    loading = time.perf_counter() - start
    texts = load_examples("rte", "train", args.data_dir)
    start = time.perf_counter()
    TokenizedExamples(load_tokenizer(model_folder("minilm-l6"), 30522, 256), texts)
    tokenizing = time.perf_counter() - start
    row = {"row": "8 start-up, seconds", "imports": imports, "loading": loading, "tokenizing_rte": tokenizing}
    line = f"8 start-up: imports {imports:.1f} s, loading minilm-l6 {loading:.2f} s"
    say(rows, row, f"{line}, tokenising RTE {tokenizing:.2f} s")


def matrix_peak(dtype: torch.dtype) -> float:
    """The machine's matrix products, in FLOP/s: the best of some large ones."""
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(seconds)


def exit_layers_of(depth: int, exits: int) -> list[int]:
    """Exits at even distances, the last after the last layer."""
    return sorted({max(1, round(depth * (k + 1) / exits)) for k in range(exits)})


def products(arch: str, size: str, T: int, training: bool, depth: int | None = None, exits: int = 1) -> int:
    """FLOP of the matrix products at batch 16: of all exits' logits, and in training also of SWEET's backward pass."""
    D, L, wide = SIZES[size]
    L = depth or L
    K, tokens = len(exit_layers_of(L, exits)), 2 * BATCH * T
    positions = 2 * 2 * (2 * T) * D * (D + BATCH * T) if arch == "deberta" else 0
    whole = tokens * (4 * D * D + 2 * D * wide + 2 * T * D) + positions
    # What the tokens that an exit does not read do in its layer: DeBERTa compares them too.
    ahead = tokens * (3 * D * D + (T * D if arch == "deberta" else 0)) + positions
    forward = (L - 1) * whole + ahead
    # Below a boundary nothing needs the gradient that the first layer above it would send down.
    return forward + 2 * ((L - K) * whole + K * ahead) - (K - 1) * tokens * 3 * D * D if training else forward


def growth(rows: list, args) -> None:
    """How a training step grows with T, depth and exits, beside how its matrix products do; its share of their peak."""
    base = {"arch": "bert", "size": "minilm-l6", "amp": False, "T": 128}
    cases = [base] + [base | {"T": T} for T in (64, 256, 512)] + [base | {"depth": n} for n in (3, 12)]
    first = None
    for case in cases + [base | {"exits": k} for k in (2, 3, 6)]:
        seconds = statistics.median(take_turns("step", [case | {"side": "ours"}], 3)[0][0])
        flop = products("bert", case["size"], case["T"], True, case.get("depth"), case.get("exits", 1))
        first = first or (seconds, flop)
        row = {"row": "growth", **case, "ms": 1000 * seconds, "time": seconds / first[0], "products": flop / first[1]}
        what = f"T {case['T']}, {case.get('depth', 6)} layers, {case.get('exits', 1)} exits"
        say(rows, row, f"growth, {what}: {row['ms']:.0f} ms, {row['time']:.2f}x; products {row['products']:.2f}x")


def peak(rows: list, args) -> None:
    """The share of the machine's matrix-product peak in training and inference, for each encoder and type."""
    for arch, size in (("bert", "minilm-l6"), ("bert", "base"), ("deberta", "base")):
        for amp in (False, True):
            case = {"arch": arch, "size": size, "T": 128, "amp": amp}
            for unit in ("forward", "step"):
                seconds = statistics.median(take_turns(unit, [case | {"side": "ours"}], 3)[0][0])
                available = matrix_peak(torch.bfloat16 if amp else torch.float32)
                share = products(arch, size, 128, unit == "step") / seconds / available
                row = {"row": "peak", "unit": unit, **case, "ms": 1000 * seconds, "share_of_peak": share}
                what = f"{unit}, {arch} {size}, T 128, {'bfloat16' if amp else 'float32'}"
                say(rows, row, f"peak, {what}: {share:.0%} of {available / 1e9:.0f} GFLOP/s")


def bandwidth() -> float:
    """How fast the machine reads memory, in bytes/s: the best of some sums of 256 MB."""
    numbers, seconds = torch.ones(2**26), []
    for _ in range(8):
        start = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - start)
    return 4 * len(numbers) / min(seconds)


def rival_of(run: str) -> dict:
    """What a process for a run's rivals needs: the run's last exit in their formats, and its labels."""
    folder = Path(tempfile.mkdtemp()) / "export"
    TO_THE_END.callback(shutil.rmtree, folder.parent)
    export_all(Path(run), folder)
    return {"run": run, "folder": str(folder), "labels": read_record(Path(run)).labels}


def say(rows: list, row: dict, line: str) -> None:
    """Keep a row and its line, and print it."""
    rows.append(row | {"line": line})
    print(line, flush=True)


def precisions() -> list[str]:
    """float32, and bfloat16 where this processor multiplies in it."""
    capable = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return ["off", "bf16"] if capable else ["off"]


def race(rows: list, title: str, sides: dict, case: dict, turns: int, against: str) -> dict:
    """Let sides take turns on the same texts, and say each one's milliseconds and its ratio to the side `against`.

    Returns of each side the milliseconds, mean (`ms`) and 99th percentile (`p99_ms`), of each turn, and its score.
    """
    seconds, answers = take_turns("classify", [case | side for side in sides.values()], turns)
    _, gold = texts_of(case["source"])
    found = {}
    for name, of_side, said in zip(sides, seconds, answers, strict=True):
        found[name] = {"ms": [1000 * mean for mean in of_side]}
        found[name]["p99_ms"] = [1000 * float(np.percentile(answer["seconds"], 99)) for answer in said]
        right = gold and np.array(said[-1]["labels"]) == np.array(case["labels"])[gold]
        found[name]["score"] = 100 * float(np.mean(right)) if gold else None
    for name, one in found.items():
        ratio, p99_ratio = (ratio_of(one[key], found[against][key]) for key in ("ms", "p99_ms"))
        medians = {key: statistics.median(one[key]) for key in ("ms", "p99_ms")}
        row = {"row": title, "side": name, **medians, "score": one["score"], "ratio": ratio, "p99_ratio": p99_ratio}
        row |= {"run": Path(case["run"]).name, "batch": case["source"]["batch"], "task": case["source"].get("task")}
        right = f"  score {one['score']:.1f}" if gold else ""
        line = f"{title:<34} {name:<32}{row['ms']:8.2f} ms{ratio:7.2f}x, p99{row['p99_ms']:8.2f} ms{p99_ratio:6.2f}x"
        say(rows, row, f"{line}{right}")
    return found


def ratio_of(ours: list[float], theirs: list[float]) -> float:
    """The median of the ratios of single turns."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def alone(rows: list, args) -> None:
    """One sentence of 16, 32 and 100 tokens, text in, label out: a SWEET run, all exits asked, and at full depth."""
    for run, *_ in runs_given(args, ("sweet",))[:1]:
        sides = {"ONNX Runtime, float32": {"side": "onnx float32"}, "ONNX Runtime, int8": {"side": "onnx int8"}}
        for amp in precisions():
            kind = "bfloat16" if amp == "bf16" else "float32"
            sides[f"transformers, {kind}"] = {"side": "transformers", "amp": amp}
            sides[f"ours, {kind}, full depth"] = {"side": "ours", "amp": amp, "threshold": 1.0}
            sides[f"ours, {kind}, all exits"] = {"side": "ours", "amp": amp, "threshold": 0.999999}
        case = rival_of(run)
        for T in (16, 32, 100):
            texts = {"source": {"tokens": T, "count": 40, "batch": 1}}
            race(rows, f"one sentence, {T} tokens", sides, case | texts, 7, "ONNX Runtime, float32")


def one_file(rows: list, args) -> None:
    """The ONNX file that leaves early beside ONNX Runtime's full model, text in, label out: branch runs at shares of
    the layers, one by one and in batches of 32 of similar length; and beside the slices of MM's runs, models of their
    first layers, and runs with an exit after every layer, where --runs names such of the same task and seed."""
    ratios: dict[str, dict[str, list[float]]] = {}  # of a target, the runs of each task
    records = {run: read_record(run) for run in args.runs}
    for run, record in records.items():
        if record.method != "branch" or len(record.exit_layers) == record.depth:
            continue
        case, sides = rival_of(str(run)), {}
        folder = Path(case["folder"])
        of_seed = {run: its for run, its in records.items() if (its.task, its.seed) == (record.task, record.seed)}
        slices = {n: other for other, its in of_seed.items() if its.method == "mm" for n in its.exit_layers[:-1]}
        for n, other in slices.items():
            export_all(other, folder / str(n), n)
        for kind in ("float32", "int8"):
            sides[f"full model, {kind}"] = {"side": f"onnx {kind}"}
            for n in slices:
                sides[f"{n} layers, {kind}"] = {"side": f"onnx {n}/{kind}"}
            for other, its in of_seed.items():
                name = FAMILIES[1 if other == run else 2]
                if its.method == "branch" and (other == run or kind == "int8"):
                    print(*export_onnx(other, folder / f"{name}-{kind}.onnx", kind == "int8", data_dir=args.data_dir))
                    thresholds = thresholds_at(other) | ({1.0: 1.0} if other == run else {})
                    for speed, threshold in thresholds.items():
                        sides[f"{name}, {speed:g}, {kind}"] = {"side": f"onnx {name}-{kind}", "threshold": threshold}
        for batch, count, turns in ((1, 150, 3), (32, 640, 3)):
            source = {"task": record.task, "data_dir": str(args.data_dir.resolve()), "count": count, "batch": batch}
            title = f"{record.task}, seed {record.seed}, {called(batch)}"
            found = race(rows, title, sides, case | {"source": source}, turns, "full model, float32")
            for kind, (mean, p99, batches) in {"float32": (0.60, 1.15, 0.50), "int8": (0.65, 1.25, 0.45)}.items():
                ours, whole = found[f"one file, 0.5, {kind}"], found[f"one file, 1, {kind}"]
                theirs = found[f"full model, {kind}"]
                measured = {f"3 batches of 32, {kind} (<= {batches})": ratio_of(ours["ms"], theirs["ms"])}
                if batch == 1:
                    measured = {f"1 one by one, {kind} (<= {mean})": ratio_of(ours["ms"], theirs["ms"])}
                    measured[f"2 its p99, {kind} (<= {p99})"] = ratio_of(ours["p99_ms"], theirs["p99_ms"])
                elif kind == "int8":
                    lost = found["one file, 0.5, float32"]["score"] - ours["score"]
                    measured["4 points that int8 loses (<= 1.0)"] = lost
                measured[f"5 full depth, {kind}, {batch} at once (<= 1.05)"] = ratio_of(whole["ms"], theirs["ms"])
                for name, value in measured.items():
                    ratios.setdefault(name, {}).setdefault(record.task, []).append(value)
    for name in sorted(ratios):
        for task, values in ratios[name].items():
            row = {"row": name, "side": task, "ratio": statistics.mean(values), "ratios": values}
            each = ", ".join(f"{value:.2f}" for value in values)
            say(rows, row, f"{name:<46} {task}: {row['ratio']:.2f}, mean of {each}")


def thresholds_at(run: Path) -> dict[float, float]:
    """What `evaluate.py --speed` takes for each share of the layers, on a run's evaluation."""
    record = read_record(run)
    validation = load_validation(run, read_evaluation(run, record), record)
    return {speed: operating_point(validation, "crossfit", {"speed": speed})[1]["threshold"] for speed in SPEEDS}


def points_of(result: dict) -> dict[tuple[str, int], dict[str, tuple[float, float, float]]]:
    """What `one_file` measured: of each task and batch size, each side's milliseconds per text, their ratio to the full
    model's in float32, and its score on the rows that ran in batches, which are more. Means over the runs that have all
    sides."""
    rows = [row for row in result["rows"] if row["part"] == "one_file" and "batch" in row]
    most, found = max(row["batch"] for row in rows), {}
    runs_of: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        runs_of.setdefault((row["task"], row["side"]), set()).add(row["run"])
    for task, batch, side in dict.fromkeys((row["task"], row["batch"], row["side"]) for row in rows):
        runs = set.intersection(*(runs for (of_task, _), runs in runs_of.items() if of_task == task))
        here = [row for row in rows if (row["task"], row["side"]) == (task, side) and row["run"] in runs]
        means = [statistics.mean(row[key] for row in here if row["batch"] == batch) for key in ("ms", "ratio")]
        score = statistics.mean(row["score"] for row in here if row["batch"] == most)
        found.setdefault((task, batch), {})[side] = (*means, score)
    return found


def called(batch: int) -> str:
    """How many texts run at once, in words."""
    return "one by one" if batch == 1 else f"in batches of {batch}"


def table_of(result: dict) -> list[str]:
    """`points_of` as a table in Markdown."""
    found = points_of(result)
    tasks = list(dict.fromkeys(task for task, _ in found))
    head = ["side", *(f"{task} {called(batch)}" for task, batch in found), *(f"score, {task}" for task in tasks)]
    lines = ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for side in next(iter(found.values())):
        cells = ["{:.2f} ms, {:.2f}".format(*sides[side]) for sides in found.values()]
        cells += [f"{found[task, 1][side][2]:.1f}" for task in tasks]
        lines.append(f"| {side} | {' | '.join(cells)} |")
    return [*lines, ""]


def draw_budgets(result: dict, path: Path) -> None:
    """Draw score over milliseconds per text from what `one_file` measured, mean over the seeds."""
    found = points_of(result)
    columns = len({task for task, _ in found})
    figure = new_figure(path, figsize=(5.6 * columns, 3.9 * len(found) // columns), layout="tight")
    axes = figure.subplots(len(found) // columns, columns, squeeze=False)
    for (task, batch), axis in zip(sorted(found, key=lambda key: key[1]), axes.flat, strict=True):
        for kind, line, marker in (("float32", "--", "s"), ("int8", "-", "o")):
            curves: dict[str, list[tuple[float, float, str]]] = {}
            for side, (ms, _, score) in found[task, batch].items():
                family, _, name = side.removesuffix(f", {kind}").rpartition(", ")
                if side.endswith(kind):
                    name = "all" if name == "full model" else name.removesuffix(" layers")
                    curves.setdefault(family or FAMILIES[0], []).append((ms, score, name))
            for family, points in curves.items():
                colour = COLOURS[FAMILIES.index(family)]
                xs, ys, _ = zip(*sorted(points), strict=True)
                axis.plot(xs, ys, line, color=colour, marker=marker, markersize=4, label=f"{family}, {kind}")
                for x, y, name in points:
                    axis.annotate(name, (x, y), xytext=(3, -9), textcoords="offset points", fontsize=7, color=colour)
        label_axes(axis, f"{task}, {called(batch)}", "score")
        axis.set(xlabel="milliseconds per text", xlim=(0, None))
    axes.flat[0].legend(fontsize=7)
    save_figure(figure, path)


def batches(rows: list, args) -> None:
    """32 sentences of 32 and of 100 tokens at once, at full depth."""
    for run, *_ in runs_given(args, ("sweet",))[:1]:
        case = rival_of(run)
        for T in (32, 100):
            texts = {"source": {"tokens": T, "count": 128, "batch": 32}}
            sides = {"ONNX Runtime, float32": {"side": "onnx float32"}}
            sides["transformers, float32"] = {"side": "transformers", "amp": "off"}
            sides["ours, float32"] = {"side": "ours", "threshold": 1.0}
            race(rows, f"32 x {T}, full depth", sides, case | texts, 5, "ONNX Runtime, float32")
            sides = {"ONNX Runtime, int8": {"side": "onnx int8"}}
            if "bf16" in precisions():
                sides["ours, bfloat16"] = {"side": "ours", "threshold": 1.0, "amp": "bf16"}
            race(rows, f"32 x {T}, full depth", sides, case | texts, 5, "ONNX Runtime, int8")


IMPORT = "from minisweet import EarlyExitClassifier as E; "
FIRST = {
    "ours": IMPORT + "print(E({run!r})(['a good film'])[0].label)",
    "transformers": "import transformers as t; print(t.pipeline('text-classification', {folder!r})('a good film'))",
}


def first(rows: list, args) -> None:
    """From the start of Python to the first answer, in seconds."""
    for run, *_ in runs_given(args, METHODS)[:1]:
        case = rival_of(run)
        seconds: dict[str, list[float]] = {name: [] for name in FIRST}
        for turn in range(6):
            for name, code in FIRST.items():
                start = time.perf_counter()
                subprocess.run([sys.executable, "-c", code.format(**case)], check=True, capture_output=True)
                if turn:
                    seconds[name].append(time.perf_counter() - start)
        for name, values in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(values, seconds["transformers"], strict=True))
            row = {"row": "start to first answer", "side": name, "s": statistics.median(values), "ratio": ratio}
            say(rows, row, f"start to first answer, {name}: {row['s']:.2f} s, {ratio:.2f}x (target 0.5)")


# A small process between: the system counts what a process had before it became another one, here all of this one's.
PEAK_OF = """import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"""


def methods(rows: list, args) -> None:
    """A whole training of each method on 2,000 rows of SST-2: seconds, and the process's peak memory."""
    base = None
    for method in ("ee", "sweet", "mm", "branch"):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "train.py", "--method", method, "--task", "sst2", "--train-size", "2000"]
            command += ["--model", "minilm-l6", "--data-dir", str(args.data_dir), "--out", f"{folder}/run"]
            start = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", PEAK_OF, *command], check=True, capture_output=True, text=True)
            wall = time.perf_counter() - start
            trained = read_record(Path(folder) / "run").seconds
        row = {"row": "training", "method": method, "s": trained, "wall_s": wall, "peak_bytes": int(done.stdout)}
        base = base or row
        times, memory = trained / base["s"], row["peak_bytes"] / base["peak_bytes"]
        line = f"training, {method:<8}{trained:8.1f} s ({times:.2f} of EE's), "
        say(rows, row, f"{line}peak {row['peak_bytes'] / 1e6:6.0f} MB ({memory:.2f})")


def trunk(rows: list, args) -> None:
    """Branches' training with the trunk's states kept from the epoch before: what keeping them could save."""
    for run, *_ in runs_given(args, ("branch",))[:1]:
        sides = [{"side": side, "run": run, "data_dir": str(args.data_dir.resolve())} for side in ("ours", "kept")]
        seconds, _ = take_turns("branch", sides, 7)
        ratio = statistics.median(b / a for a, b in zip(*seconds, strict=True))
        model, record = load_run(Path(run))
        lengths = glue(record.task, "train", str(args.data_dir)).lengths[:6000]
        size = 2 * 4 * (len(model.exit_layers) - 1) * model.encoder.config.hidden_size * int(lengths.sum())
        row = {"row": "trunk's states kept", "ratio": ratio, "bytes": size}
        line = f"a step of branches, the trunk's states kept: {ratio:.2f} of the time, {size / 1e6:.0f} MB for 6,000"
        say(rows, row, f"{line} rows; over 2 epochs at best {(1 + ratio) / 2:.2f} (keep it at 0.67)")


LATENCY = (alone, batches, one_file, first, methods, trunk)
PARTS = {part.__name__: part for part in (*LATENCY, steps, epoch, sweeps, live, memory, startup, growth, peak)}
MARKS = ("<!-- measured: python -m tests.benchmark --report -->\n", "<!-- /measured -->\n")


def report(result: dict, path: Path) -> None:
    """Put the lines of benchmark.json between the marks of the file on speed."""
    before, _, rest = path.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    machine = "{processor}, {threads} threads, torch {torch}, ONNX Runtime {onnxruntime}; products {gflops:.0f} "
    machine += "GFLOP/s in float32, {gflops_bfloat16:.0f} in bfloat16, memory {gigabytes:.0f} GB/s; commit {commit}.\n"
    text = machine.format(**result)
    for part in PARTS:
        rows, table = [row for row in result["rows"] if row["part"] == part], []
        if part == "one_file" and rows:  # too many rows for lines of their own
            rows, table = [row for row in rows if "batch" not in row], table_of(result)
        if rows:
            about = " ".join(PARTS[part].__doc__.split())
            text += "\n".join(["", about, *table, "```", *(row["line"] for row in rows), "```", ""])
    path.write_text(before + MARKS[0] + text + MARKS[1] + after)


def main() -> None:
    """Run the parts and write what they measured."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--only", type=list_of(one_of(PARTS)), default=PARTS, help="parts, of " + ",".join(PARTS))
    parser.add_argument("--out", type=Path, default=Path("benchmark.json"))
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="run folders, for the parts on runs")
    parser.add_argument("--report", type=Path, metavar="FILE", help="measure nothing: put --out's lines into this file")
    parser.add_argument("--figure", type=Path, metavar="PNG", help="measure nothing: draw what one_file left in --out")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work[0], json.loads(args.work[1]))
        return
    if args.report:
        report(read_json(args.out), args.report)
        return
    if args.figure:
        draw_budgets(read_json(args.out), args.figure)
        return
    tune_cpu()  # for the products' peak, as the sides have it
    rows: list[dict] = []
    result = {
        "torch": torch.__version__,
        "onnxruntime": version("onnxruntime"),
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "commit": subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True).strip(),
        "gflops": matrix_peak(torch.float32) / 1e9,
        "gflops_bfloat16": matrix_peak(torch.bfloat16) / 1e9 if "bf16" in precisions() else 0,
        "gigabytes": bandwidth() / 1e9,
        "rows": rows,
    }
    print(f"{result['processor']}: products {result['gflops']:.0f} GFLOP/s, memory {result['gigabytes']:.0f} GB/s")
    for part in args.only:
        print(f"\n{PARTS[part].__doc__}")
        found: list[dict] = []
        PARTS[part](found, args)
        rows += [{"part": part} | row for row in found]
        write_json(args.out, result)


def processor() -> str:
    """The processor's name, and its fastest instructions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    said = {name.strip(): value for name, _, value in (line.partition(":") for line in reversed(lines))}
    flags = said.get("flags", "").split()
    best = next((name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags), "unknown")
    return f"{said.get('model name', platform.processor()).strip()} with {best}"


if __name__ == "__main__":
    with TO_THE_END:
        run_command(main)
