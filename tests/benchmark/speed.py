"""What one would use on own text, and what it costs: accuracy and milliseconds from text to label, in one run.

    python -m tests.benchmark.speed TRAIN.csv TEST.csv RUN [RUN] [--turns 3] [--write]

RUN is a run of `minisweet fit TRAIN.csv`; a further one also learned from unlabelled texts. All sides answer the rows
of TEST, one by one and in batches of 32 of similar length (our files one text at a time only). Rivals, of linear.py,
learn the rows of TRAIN. `transformers` and plain ONNX Runtime run public weights with a new head, and have the score of
our model without the bag of words. Each side has a process of its own, and the sides take turns, so that a machine
whose speed drifts is fair to all. Numbers are medians. With --write they replace speed.csv.
"""

import json
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from tokenizers import Tokenizer

from minisweet import EarlyExitClassifier
from minisweet.base.commands import Parser, number, run_command
from minisweet.base.devices import device_name
from minisweet.classifier.operating_point import classification_report
from minisweet.fast import tune_cpu
from minisweet.hub import model_folder
from minisweet.texts import Examples, special_tokens
from tests.benchmark import CHECKOUT, CLASSIFIER, commit, read_rows, write_rows
from tests.benchmark.linear import RIVALS, TFIDF, fit_rival

HERE = "tests.benchmark.speed"
SIDE = """
import importlib, json, sys, time
module, name, arguments = json.loads(sys.argv[1])
step = getattr(importlib.import_module(module), name)(*arguments)
for batch in sys.stdin:
    start = time.perf_counter()
    answers = step(int(batch))
    print(json.dumps([time.perf_counter() - start, answers]), flush=True)
"""
FIELDS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
POINTS = {"full depth": 1.0, "deployed": None}  # thresholds
BATCHES = {"one_by_one": 1, "in_batches": 32}  # texts at once
Step = Callable[[int], list]  # answers all texts, so many at once


def in_batches(texts: str, answer: Callable[[list[str]], list]) -> Step:
    """What answers the texts of a file, by class and layer (None where there is one exit)."""
    rows = json.loads(Path(texts).read_text())
    return lambda batch: [pair for n in range(0, len(rows), batch) for pair in answer(rows[n : n + batch])]


def ours(texts: str, run: str, threshold: float | None) -> Step:
    """Our classifier, by PyTorch."""
    tune_cpu()
    classify = EarlyExitClassifier.load(run, threshold=threshold)
    names = classify.state.labels
    return in_batches(texts, lambda part: [(names.index(a.label), a.exit_layer) for a in classify.classify(part)])


def theirs(texts: str, folder: str, classes: int, words: str) -> Step:
    """The full model by `transformers`."""
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=classes).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=words, pad_token="[PAD]")

    @torch.inference_mode()
    def answer(part: list[str]) -> list:
        scores = model(**tokenizer(part, padding=True, truncation=True, return_tensors="pt")).logits
        return [(label, None) for label in scores.argmax(-1).tolist()]

    return in_batches(texts, answer)


def by_onnx(texts: str, file: str, tokenizer: str, threshold: float | None) -> Step:
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

    return in_batches(texts, answer)


def rival(texts: str, name: str, rows: str) -> Step:
    """One of RIVALS, which learns some rows: texts, and numbers of labels."""
    answer = fit_rival(name, Examples(*json.loads(Path(rows).read_text())))
    return in_batches(texts, lambda part: [(n, None) for n in answer(Examples(part, None, None)).tolist()])


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


def take_turns(sides: dict[tuple, tuple], turns: int) -> dict[tuple, tuple[dict[str, float], list]]:
    """Let each side take its step in turn. Returns its median seconds, after a turn that warms up, and its answers.

    A side is a module, a function there that makes a `Step`, and its arguments, as JSON can hold them. Our files answer
    one by one only.
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": CHECKOUT}
    workers, seconds, answers = {}, defaultdict(lambda: defaultdict(list)), {}
    for side, call in sides.items():
        workers[side] = subprocess.Popen([sys.executable, "-c", SIDE, json.dumps(call)], **pipes)
    for _, (setting, batch), (side, worker) in product(range(turns + 1), BATCHES.items(), workers.items()):
        if batch == 1 or not side[1].startswith("our file"):
            print(batch, file=worker.stdin, flush=True)
            took, found = json.loads(next(line for line in worker.stdout if line.startswith("[")))
            seconds[side][setting].append(took)
            answers.setdefault(side, found)
    for worker in workers.values():
        worker.communicate()
    medians = {side: {name: statistics.median(took[1:]) for name, took in of.items()} for side, of in seconds.items()}
    return {side: (medians[side], answers[side]) for side in sides}


def sides_of(runs: list[tuple[str, EarlyExitClassifier]], place: Path) -> dict[tuple[str, str], tuple]:
    """All sides, by precision and name: a module, a function there, and its arguments after the texts."""
    (first, classify), *_ = runs
    tokenizer = Tokenizer.from_file(f"{first}/tokenizer.json")
    pad = special_tokens(tokenizer)[2]
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad), pad_token=pad)
    tokenizer.save(f"{place}/words")
    public = str(model_folder(classify.model).resolve()), len(classify.classes_)
    export_theirs(*public, f"{place}/theirs-float32.onnx", f"{place}/theirs-int8.onnx")
    sides = {("float32", name): (HERE, "rival", (name, f"{place}/rows")) for name in RIVALS}
    sides["float32", "transformers"] = HERE, "theirs", (*public, f"{place}/words")
    for point, threshold in POINTS.items():
        sides["float32", f"our classifier, {point}"] = HERE, "ours", (first, threshold)
    for kind in ("float32", "int8"):
        sides[kind, "ONNX Runtime"] = HERE, "by_onnx", (f"{place}/theirs-{kind}.onnx", f"{place}/words", None)
        for n, (_, deployed) in enumerate(runs):
            deployed.export(file := place / f"ours-{n}-{kind}.onnx", int8=kind == "int8")
            for point, threshold in POINTS.items():
                name = f"our file{', unlabelled texts' * n}, {point}"
                sides[kind, name] = HERE, "by_onnx", (str(file), f"{place}/words", threshold)
    return sides


def main() -> None:
    """Measure, and print or write the rows."""
    parser = Parser(__doc__)
    for name in ("train", "test"):
        parser.add_argument(name, type=Path, metavar=f"{name.upper()}.csv")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--turns", type=number(int, 1), default=3)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    runs, found = [(str(run.resolve()), EarlyExitClassifier.load(run)) for run in args.runs], []
    _, classify = runs[0]
    labels = classify.state.labels
    parts = [[(row["text"], labels.index(row["label"])) for row in read_rows(file)] for file in (args.train, args.test)]
    rows = sorted(parts[1], key=lambda row: len(row[0]))
    texts, right = [text for text, _ in rows], np.array([label for _, label in rows])
    about = {"machine": device_name(torch.device("cpu")), "date": date.today(), "commit": commit()}
    model = classify.state.trained.ask_model(classify.state.tokenize(texts), torch.device("cpu"), None).argmax(-1)
    with TemporaryDirectory() as name:
        (file := Path(name, "texts")).write_text(json.dumps(texts))
        learnt = list(map(list, zip(*parts[0], strict=True)))
        Path(name, "rows").write_text(json.dumps([learnt[0], None, learnt[1]]))
        sides = {side: (*call, (str(file), *rest)) for side, (*call, rest) in sides_of(runs, Path(name)).items()}
        for (kind, side), (seconds, answers) in take_turns(sides, args.turns).items():
            classes, layers = zip(*answers, strict=True)
            answered = model.numpy() if side in ("transformers", "ONNX Runtime") else np.array(classes)
            score = f"{100 * (answered == right).mean():.1f}"
            macro_f1 = f"{np.mean(classification_report(answered, right, len(labels))['f1']):.1f}"
            if (kind, side) == ("int8", "ONNX Runtime"):  # whose answers are not our model's
                score = macro_f1 = ""
            depth = classify.state.trained.record.depth
            share = float(side != TFIDF) if None in layers else float(np.mean(layers)) / depth
            times = {name: f"{1000 * seconds[name] / len(rows):.2f}" if name in seconds else "" for name in BATCHES}
            row = {"precision": kind, "side": side} | times | {"score": score, "macro_f1": macro_f1}
            found.append(row | {"share": f"{share:.2f}"} | about)
    print("\n".join(", ".join(map(str, row.values())) for row in found))
    if args.write:
        write_rows(CLASSIFIER / "speed.csv", found)


if __name__ == "__main__":
    run_command(main)
