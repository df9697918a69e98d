"""How fast it is beside `transformers` and ONNX Runtime: a training step, texts in batches, and the one file.

    python -m tests.benchmark.speed RUN [--turns 7] [--texts 640] [--write]

RUN is an evaluated run with exits 0 and last. Its validation texts are answered, from text to label. Each side has a
process of its own, and the sides take turns, so that a machine whose speed drifts is fair to all. Numbers are medians.
The tables of a run of more than six layers have its model's name, and no training steps. bfloat16 is
measured where the processor has instructions for it. A training step fine-tunes a whole model of random weights for one
exit, at batch 16 with dropout and optimizer.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import nn

from minisweet import EarlyExitClassifier, MultiExitModel
from minisweet.base.commands import Parser, whole_number
from minisweet.base.devices import device_name, processor, tune_cpu
from minisweet.bert import BertEncoder
from minisweet.config import BertConfig
from minisweet.texts import special_tokens
from minisweet.paper.report import table
from minisweet.run import Run
from minisweet.classifier.export import export
from tests.benchmark import CHECKOUT, run_study, show

HERE = "tests.benchmark.speed"
SIDE = """
import importlib, json, sys, time
sys.path.append("tests/benchmark")  # of onnx_side, whose package would import torch
module, name, arguments = json.loads(sys.argv[1])
step = getattr(importlib.import_module(module), name)(*arguments)
for _ in sys.stdin:
    start = time.perf_counter()
    answers = step()
    print(json.dumps([time.perf_counter() - start, answers]), flush=True)
"""
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
BASE |= {"max_position_embeddings": 514, "vocab_size": 30527, "type_vocab_size": 2}
MODELS = {"MiniLM": BASE | {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}, "BERT-base": BASE}
# Thresholds of the one file, slower and slower, and what is chosen to deploy.
POINTS = {"exit 0 alone": 0.0, **{f"threshold {t}": t for t in (0.7, 0.8, 0.9, 0.95)}}
POINTS |= {"full depth": 1.0, "as deployed": None}


def training_step(is_ours: bool, settings: dict, T: int, bf16: bool) -> Callable[[], None]:
    """What takes one step of ours or of theirs on random texts of T tokens, of which one is half as long."""
    ids, labels = torch.randint(5, 30000, (16, T)), torch.randint(0, 2, (16,))
    mask = torch.ones_like(ids)
    mask[0, T // 2 :] = 0
    inputs = ids, mask  # one sentence: its token types are zeros
    if is_ours:
        tune_cpu()
        config = BertConfig(**settings)
        model = MultiExitModel(BertEncoder(config), (config.num_hidden_layers,), 2)
    else:
        import transformers

        model = transformers.BertForSequenceClassification(transformers.BertConfig(**settings))
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-5, weight_decay=0.0, fused=is_ours or None)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(*inputs)[0].float(), labels)  # both give the logits first
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def our_texts(run: str, texts: str, amp: str, threshold: float | None = None) -> Callable[[], list]:
    """What answers all texts by our classifier, by class and layer."""
    tune_cpu()
    classify, rows = EarlyExitClassifier.load(run, threshold=threshold, amp=amp), json.loads(Path(texts).read_text())
    return lambda: [(classify.deployed.labels.index(its.label), its.exit_layer) for its in classify.classify(rows)]


def their_texts(folder: str, texts: str, bf16: bool) -> Callable[[], list]:
    """What answers all texts by `transformers`, in batches of 32."""
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    model, tokenizer = model.bfloat16() if bf16 else model, transformers.AutoTokenizer.from_pretrained(folder)
    rows = json.loads(Path(texts).read_text())

    @torch.inference_mode()
    def step() -> list:
        answers = []
        for start in range(0, len(rows), 32):
            inputs = tokenizer(rows[start : start + 32], padding=True, truncation=True, return_tensors="pt")
            answers += [(label, None) for label in model(**inputs).logits.argmax(-1).tolist()]
        return answers

    return step


def export_theirs(plain: str, file: str, int8: str) -> None:
    """Write the model of `transformers` as ONNX files, in the exporter's and the quantizer's usual way."""
    import transformers
    from onnxruntime.quantization import quantize_dynamic

    model = transformers.AutoModelForSequenceClassification.from_pretrained(plain, attn_implementation="eager").eval()
    names, sizes = ("input_ids", "attention_mask", "token_type_ids"), dict.fromkeys((0, 1), torch.export.Dim.AUTO)
    names = names[:2] if model.config.model_type == "mpnet" else names  # which reads no token types
    inputs = {name: torch.ones(2, 8, dtype=torch.int64) for name in names}
    shapes = dict.fromkeys(names, sizes)
    torch.onnx.export(model, kwargs=inputs, f=file, dynamic_shapes=shapes, dynamo=True, verbose=False)
    quantize_dynamic(file, int8)


def take_turns(sides: dict[str, tuple], turns: int) -> dict[str, tuple[float, list]]:
    """Let each side take its step in turn. Returns its median seconds, after a turn that warms up, and its answers.

    A side is a module, a function there that makes `step`, and its arguments, as JSON can hold them.
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": CHECKOUT}
    workers, seconds, answers = {}, {side: [] for side in sides}, {}
    for side, call in sides.items():
        workers[side] = subprocess.Popen([sys.executable, "-c", SIDE, json.dumps(call)], **pipes)
    for turn in range(turns + 1):
        for side, worker in workers.items():
            print(turn, file=worker.stdin, flush=True)
            took, answers[side] = json.loads(next(line for line in worker.stdout if line.startswith("[")))
            seconds[side].append(took)
    for worker in workers.values():
        worker.communicate()
    return {side: (statistics.median(seconds[side][1:]), answers[side]) for side in sides}


def training_table(turns: int) -> str:
    """A training step of each of MODELS, length and type."""
    rows, settings = [], list(product((32, 128), (False, True) if processor()[1] else (False,)))
    for name, model in MODELS.items():
        row = [name]
        for setting in settings:
            sides = {is_ours: (HERE, "training_step", (is_ours, model, *setting)) for is_ours in (True, False)}
            (ours, _), (theirs, _) = take_turns(sides, turns).values()
            row.append(f"{1000 * theirs:.0f}, {1000 * ours:.0f}: {theirs / ours:.2f}")
        rows.append(row)
    head = ["model", *(f"{T} tokens, {'bfloat16' if bf16 else 'float32'}" for T, bf16 in settings)]
    return table("A training step: milliseconds of transformers, of ours, and times as fast", head, rows)


def text_table(title: str, sides: dict[str, tuple], gold: list[int], depth: int, turns: int) -> str:
    """Of each side: milliseconds of a text, beside the first side's, accuracy, and the share of the layers."""
    rows, found = [], take_turns(sides, turns)
    for side, (took, answers) in found.items():
        right = statistics.mean(label == true for (label, _), true in zip(answers, gold, strict=True))
        share = statistics.mean(depth if layer is None else layer for _, layer in answers) / depth
        ratio = took / next(iter(found.values()))[0]
        rows.append([side, f"{1000 * took / len(gold):.2f}", f"{ratio:.2f}", f"{100 * right:.1f}", f"{share:.2f}"])
    return table(title, ["side", "ms per text", "of the first", "accuracy", "layers run"], rows)


def main() -> None:
    """Measure all three, and print or write the tables."""
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--turns", type=whole_number(1), default=7)
    parser.add_argument("--texts", type=whole_number(32), default=640)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    from minisweet.classifier.onnx import export_onnx

    run = Run.read(args.run.resolve())
    record, rows, tokenizer = run.record, run.examples, run.tokenizer
    pad = special_tokens(tokenizer)[2]
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad), pad_token=pad)
    rows = rows.take(sorted(range(len(rows.first))[: args.texts], key=lambda n: len(rows.first[n])))
    batches, files = {}, {}  # those of similar length are in one batch, on all sides
    with TemporaryDirectory() as place:
        plain, texts, words, theirs, ours = (f"{place}/{name}" for name in ("plain", "texts", "words", "full", "file"))
        Path(texts).write_text(json.dumps(rows.texts()))
        tokenizer.save(words)
        export(run.folder, Path(plain))
        export_theirs(plain, f"{theirs}-float32.onnx", f"{theirs}-int8.onnx")
        for kind, amp in list({"float32": "off", "bfloat16": "bf16"}.items())[: 1 + processor()[1]]:
            batches[f"transformers, {kind}"] = HERE, "their_texts", (plain, texts, kind == "bfloat16")
            for point in ("full depth", "as deployed"):
                batches[f"ours, {kind}, {point}"] = HERE, "our_texts", (str(run.folder), texts, amp, POINTS[point])
        for kind in ("float32", "int8"):
            file = f"{theirs}-{kind}.onnx"
            batches[f"ONNX Runtime, {kind}"] = "onnx_side", "step_of", (file, words, texts, 32)
            files[f"full model, {kind}"] = "onnx_side", "step_of", (file, words, texts, 1)
            file = Path(f"{ours}-{kind}.onnx")
            export_onnx(run.folder, file, int8=kind == "int8")
            for point, threshold in POINTS.items():
                call = "onnx_side", "step_of", (str(file), words, texts, 1, threshold)
                files[f"the file that leaves early, {kind}, {point}"] = call
        of_small = record.depth == MODELS["MiniLM"]["num_hidden_layers"]
        made = {"a training step": training_table(args.turns)} if of_small else {}
        for name, sides in {"texts in batches": batches, "one file": files}.items():
            how = "in batches of 32" if sides is batches else "one by one"
            title = f"{record.task}, {len(rows.first):,} texts, {how}"
            made[name] = text_table(title, sides, rows.labels, record.depth, args.turns)
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "onnxruntime"))
    where = f"{device_name(torch.device('cpu'))}{', with bfloat16' * processor()[1]}; {libraries}"
    made["measured on"] = f"{where}; medians of {args.turns} turns; {date.today()}.\n"
    suffix = "" if of_small else f": {Path(record.arguments.model).name}"
    show({name + suffix: block for name, block in made.items()}, args.write)


if __name__ == "__main__":
    run_study(main)
