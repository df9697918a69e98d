"""Milliseconds from text to label, beside `transformers` and ONNX Runtime, like for like, in one run.

    python -m tests.benchmark.speed RUN [--turns 5] [--texts 640] [--write]

RUN is a run of `minisweet fit`. Its validation texts are answered, one by one and in batches of 32 of similar length
(but for our file, which takes one at a time). Each side has a process of its own, and the sides take turns, so that a
machine whose speed drifts is fair to all. Rivals, of linear.py, learn these very texts, and are only timed; so is the
model of `transformers`, public weights with a new head. Numbers are medians. With --write the rows of the model in
speed.csv are replaced.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from tokenizers import Tokenizer

from minisweet import EarlyExitClassifier
from minisweet.base.commands import Parser, run_command, whole_number
from minisweet.base.devices import device_name, processor
from minisweet.base.files import read_json
from minisweet.fast import tune_cpu
from minisweet.hub import model_folder
from minisweet.texts import Examples, special_tokens
from tests.benchmark import CHECKOUT, CLASSIFIER, commit, read_rows, write_rows
from tests.benchmark.linear import RIVALS, SETFIT, fit_rival

HERE = "tests.benchmark.speed"
SIDE = """
import importlib, json, sys, time
module, name, arguments = json.loads(sys.argv[1])
step = getattr(importlib.import_module(module), name)(*arguments)
for _ in sys.stdin:
    start = time.perf_counter()
    answers = step()
    print(json.dumps([time.perf_counter() - start, answers]), flush=True)
"""
FIELDS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
POINTS = {"exit 0 alone": 0.0, "full depth": 1.0, "deployed": None}  # thresholds


def in_batches(texts: str, batch: int, answer: Callable[[list[str]], list]) -> Callable[[], list]:
    """What answers the texts of a file in batches, by class and layer (None where there is one exit)."""
    rows = json.loads(Path(texts).read_text())
    return lambda: [pair for n in range(0, len(rows), batch) for pair in answer(rows[n : n + batch])]


def ours(texts: str, batch: int, run: str, amp: str, threshold: float | None) -> Callable[[], list]:
    """Our classifier, by PyTorch."""
    tune_cpu()
    classify = EarlyExitClassifier.load(run, threshold=threshold, amp=amp)
    names = classify.classes_.tolist()
    return in_batches(
        texts, batch, lambda part: [(names.index(a.label), a.exit_layer) for a in classify.classify(part)]
    )


def theirs(texts: str, batch: int, folder: str, classes: int, words: str, bf16: bool) -> Callable[[], list]:
    """The full model by `transformers`."""
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=classes).eval()
    model = model.bfloat16() if bf16 else model
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=words, pad_token="[PAD]")

    @torch.inference_mode()
    def answer(part: list[str]) -> list:
        scores = model(**tokenizer(part, padding=True, truncation=True, return_tensors="pt")).logits
        return [(label, None) for label in scores.argmax(-1).tolist()]

    return in_batches(texts, batch, answer)


def by_onnx(texts: str, batch: int, file: str, tokenizer: str, threshold: float | None) -> Callable[[], list]:
    """An ONNX file, ours or the exported full model, by ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    fields = {value.name: FIELDS[value.name] for value in session.get_inputs() if value.name in FIELDS}
    encode = Tokenizer.from_file(tokenizer).encode_batch
    setting = {} if threshold is None else {"threshold": np.array(threshold, np.float32)}

    def answer(part: list[str]) -> list:
        encoded = encode(part)
        inputs = {name: np.array([getattr(text, field) for text in encoded]) for name, field in fields.items()}
        scores, *more = session.run(None, inputs | setting)
        layers = more[1].tolist() if more else [None] * len(scores)
        return list(zip(scores.argmax(-1).tolist(), layers, strict=True))

    return in_batches(texts, batch, answer)


def rival(texts: str, batch: int, name: str, rows: str) -> Callable[[], list]:
    """One of RIVALS, which learns some rows: texts, and numbers of labels."""
    answer = fit_rival(name, Examples(*json.loads(Path(rows).read_text())))
    return in_batches(texts, batch, lambda part: [(n, None) for n in answer(Examples(part, None, None)).tolist()])


def export_theirs(folder: str, classes: int, file: str, int8: str) -> None:
    """Write the model of `transformers` as ONNX files, in the exporter's and the quantizer's usual way."""
    import transformers
    from onnxruntime.quantization import quantize_dynamic

    options = {"num_labels": classes, "attn_implementation": "eager"}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, **options).eval()
    names, sizes = ("input_ids", "attention_mask", "token_type_ids"), dict.fromkeys((0, 1), torch.export.Dim.AUTO)
    names = names[:2] if model.config.model_type == "mpnet" else names  # which reads no token types
    inputs, shapes = {name: torch.ones(2, 8, dtype=torch.int64) for name in names}, dict.fromkeys(names, sizes)
    torch.onnx.export(model, kwargs=inputs, f=file, dynamic_shapes=shapes, dynamo=True, verbose=False)
    quantize_dynamic(file, int8)


def take_turns(sides: dict[tuple, tuple], turns: int) -> dict[tuple, tuple[float, list]]:
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


def sides_of(run: Path, place: Path) -> dict[tuple[str, str], tuple]:
    """All sides, by precision and name: a module, a function there, and its arguments after texts and batch."""
    classify, tokenizer = EarlyExitClassifier.load(run), Tokenizer.from_file(str(run / "tokenizer.json"))
    pad = special_tokens(tokenizer)[2]
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad), pad_token=pad)
    tokenizer.save(f"{place}/words")
    public = str(model_folder(classify.model).resolve()), len(classify.classes_)
    export_theirs(*public, f"{place}/theirs-float32.onnx", f"{place}/theirs-int8.onnx")
    sides = {("float32", name): (HERE, "rival", (name, f"{place}/rows")) for name in RIVALS if name != SETFIT}
    for kind, amp in list({"float32": "off", "bfloat16": "bf16"}.items())[: 1 + processor()[1]]:
        sides[kind, "transformers"] = HERE, "theirs", (*public, f"{place}/words", kind == "bfloat16")
        for point in ("full depth", "deployed"):
            sides[kind, f"our classifier, {point}"] = HERE, "ours", (str(run), amp, POINTS[point])
    for kind in ("float32", "int8"):
        classify.export(place / f"ours-{kind}.onnx", int8=kind == "int8")
        files = {f"our file, {point}": ("ours", at) for point, at in POINTS.items()}
        files = {"ONNX Runtime": ("theirs", None)} | files
        for name, (file, threshold) in files.items():
            sides[kind, name] = HERE, "by_onnx", (f"{place}/{file}-{kind}.onnx", f"{place}/words", threshold)
    return dict(sorted(sides.items(), key=lambda side: ("float32", "bfloat16", "int8").index(side[0][0])))


def main() -> None:
    """Measure, and print or write the rows."""
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--turns", type=whole_number(1), default=5)
    parser.add_argument("--texts", type=whole_number(32), default=640)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    record, found = read_json(args.run / "run.json"), {}
    model = Path(record["arguments"]["model"]).name
    about = {"machine": device_name(torch.device("cpu")), "date": date.today(), "commit": commit()}
    rows = map(json.loads, (args.run / "validation.jsonl").read_text(encoding="utf-8").splitlines())
    rows = [row for row in rows if row["label"] is not None][: args.texts]
    rows.sort(key=lambda row: len(row["text"]))
    with TemporaryDirectory() as name:
        (texts := Path(name, "texts")).write_text(json.dumps([row["text"] for row in rows]))
        learnt = [row["text"] for row in rows], None, [record["labels"].index(row["label"]) for row in rows]
        Path(name, "rows").write_text(json.dumps(learnt))
        sides = sides_of(args.run.resolve(), Path(name))
        for setting, batch in (("one_by_one", 1), ("in_batches", 32)):
            calls = {key: (module, make, (str(texts), batch, *rest)) for key, (module, make, rest) in sides.items()}
            calls = {key: call for key, call in calls.items() if batch == 1 or "our file" not in key[1]}
            for key, (seconds, answers) in take_turns(calls, args.turns).items():
                right = [record["labels"][n] == row["label"] for (n, _), row in zip(answers, rows, strict=True)]
                share = statistics.mean(record["depth"] if n is None else n for _, n in answers) / record["depth"]
                row = {"model": model, "texts": record["task"], "precision": key[0], "side": key[1]}
                row |= {"one_by_one": "", "in_batches": "", "score": f"{100 * statistics.mean(right):.1f}"}
                row |= {"share": f"{share:.2f}"} | about
                if key[1] in (*RIVALS, "transformers", "ONNX Runtime"):  # learnt these very texts, or none
                    row |= {"score": "", "share": ""}
                row = found.setdefault(key, row)
                row[setting] = f"{1000 * seconds / len(rows):.2f}"
    new = list(found.values())
    print("\n".join(", ".join(map(str, row.values())) for row in new))
    if args.write:
        others = [row for row in read_rows(CLASSIFIER / "speed.csv") if row["model"] != model]
        write_rows(CLASSIFIER / "speed.csv", [*new, *others])


if __name__ == "__main__":
    run_command(main)
