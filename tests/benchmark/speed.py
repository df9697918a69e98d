"""What one would use on own text, and what it costs: accuracy and milliseconds from text to label, in one run.

    python -m tests.benchmark.speed LIST TRAIN.csv TEST.csv RUN [RUN] [--words 20,60] [--turns 3] [--write]

RUN is a run of `minisweet fit TRAIN.csv`; a further one also learned from unlabelled texts. All sides answer the rows
of TEST, and then some of them in turn, one by one and in batches of 32 of similar length (int8 files of ours one
text at a time only). Rivals, of linear.py, learn the rows of TRAIN. `transformers` and plain ONNX Runtime run public
weights with a new head, and have the score of our model without the bag of words. With --words texts of so many words
follow: the words of TEST, cut anew. Each side has a process of its own, and the sides take turns, so that a machine
whose speed drifts is fair to all. Numbers are medians. With --write they replace those of LIST in speed.csv.
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
from minisweet.base.commands import Parser, list_of, number, run_command
from minisweet.base.devices import device_name
from minisweet.classifier.promise import classification_report
from minisweet.fast import tune_cpu
from minisweet.hub import model_folder
from minisweet.texts import Examples, special_tokens
from tests.benchmark import CHECKOUT, CLASSIFIER, commit, read_rows, write_rows
from tests.benchmark.linear import RIVALS, STATIC, STATIC_FOLDER, TFIDF, fit_rival

HERE = "tests.benchmark.speed"
SIDE = """
import importlib, json, sys, time
module, name, arguments = json.loads(sys.argv[1])
step = getattr(importlib.import_module(module), name)(*arguments)
for line in sys.stdin:
    batch, texts = json.loads(line)
    start = time.perf_counter()
    answers = [pair for n in range(0, len(texts), batch) for pair in step(texts[n : n + batch])]
    print(json.dumps([time.perf_counter() - start, answers]), flush=True)
"""
FIELDS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
POINTS = {"full depth": 1.0, "deployed": None, "bag of words": 0.0}  # thresholds
BATCHES = {"one_by_one": 1, "in_batches": 32}  # texts at once
FEW = 16  # texts of a number of words
Step = Callable[[list[str]], list]  # answers texts at once, by class and layer (None where there is one exit)


def ours(run: str, threshold: float | None) -> Step:
    """Our classifier, by PyTorch."""
    tune_cpu()
    classify = EarlyExitClassifier.load(run, threshold=threshold)
    names = classify.cascade.labels
    return lambda part: [(names.index(a.label), a.exit_layer) for a in classify.classify(part)]


def theirs(folder: str, classes: int, words: str) -> Step:
    """Full depth by `transformers`."""
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=classes).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=words, pad_token="[PAD]")
    cut = {"padding": True, "truncation": True, "max_length": Tokenizer.from_file(words).truncation["max_length"]}

    @torch.inference_mode()
    def answer(part: list[str]) -> list:
        scores = model(**tokenizer(part, **cut, return_tensors="pt")).logits
        return [(label, None) for label in scores.argmax(-1).tolist()]

    return answer


def by_onnx(file: str, tokenizer: str, threshold: float | None) -> Step:
    """An ONNX file, ours or the exported model, by ONNX Runtime."""
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

    return answer


def rival(name: str, rows: str) -> Step:
    """One of RIVALS or STATIC, which learns some rows: texts, and numbers of labels."""
    answer = fit_rival(name, Examples(*json.loads(Path(rows).read_text())))
    return lambda part: [(n, None) for n in answer(Examples(part, None, None)).tolist()]


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


def is_one_by_one(kind: str, side: str) -> bool:
    """Whether a side takes one text at a time only."""
    return kind == "int8" and side.startswith("our file")


def take_turns(
    sides: dict[tuple, tuple], texts: list[str], timed: dict[str, list[str]], turns: int
) -> dict[tuple, tuple[dict, list]]:
    """Let each side answer `texts`, then the `timed` ones of each name in turn, after a turn that warms up.

    Returns each side's median milliseconds, by name and setting, and its answers to `texts`. A side is a module, a
    function there that makes a `Step`, and its arguments, as JSON can hold them.
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": CHECKOUT}
    workers, answers, times = {}, {}, defaultdict(lambda: defaultdict(list))
    for side, call in sides.items():
        workers[side] = subprocess.Popen([sys.executable, "-c", SIDE, json.dumps(call)], **pipes)

    def ask(side: tuple[str, str], setting: str, some: list[str]) -> tuple[float, list]:
        print(json.dumps([BATCHES[setting], some]), file=workers[side].stdin, flush=True)
        return json.loads(next(line for line in workers[side].stdout if line.startswith("[")))

    settings = {side: list(BATCHES)[: 1 if is_one_by_one(*side) else 2] for side in sides}
    for side in sides:
        answers[side] = ask(side, settings[side][-1], texts)[1]
    for turn, (name, some), side in product(range(turns + 1), timed.items(), sides):
        for setting in settings[side]:
            took, _ = ask(side, setting, some)
            if turn:
                times[side][name, setting].append(1000 * took / len(some))
    for worker in workers.values():
        worker.communicate()
    return {
        side: ({key: statistics.median(took) for key, took in times[side].items()}, answers[side]) for side in sides
    }


def sides_of(runs: list[tuple[str, EarlyExitClassifier]], place: Path) -> dict[tuple[str, str], tuple]:
    """All sides, by precision and name: a module, a function there, and its arguments."""
    (first, classify), *_ = runs
    tokenizer = Tokenizer.from_file(f"{first}/tokenizer.json")
    pad = special_tokens(tokenizer)[2]
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad), pad_token=pad)
    tokenizer.save(f"{place}/words")
    public = str(model_folder(classify.model).resolve()), len(classify.classes_)
    export_theirs(*public, f"{place}/theirs-float32.onnx", f"{place}/theirs-int8.onnx")
    rivals = [*RIVALS, *([STATIC] if STATIC_FOLDER.exists() else [])]
    sides = {("float32", name): (HERE, "rival", (name, f"{place}/rows")) for name in rivals}
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
    parser.add_argument("list", help="the name of the list")
    for name in ("train", "test"):
        parser.add_argument(name, type=Path, metavar=f"{name.upper()}.csv")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--words", type=list_of(number(int, 1)), default=[])
    parser.add_argument("--timed", type=number(int, 1), default=400, help="texts of the list")
    parser.add_argument("--turns", type=number(int, 1), default=3)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    runs, found = [(str(run.resolve()), EarlyExitClassifier.load(run)) for run in args.runs], []
    _, classify = runs[0]
    labels = list(map(str, classify.cascade.labels))
    parts = [[(row["text"], labels.index(row["label"])) for row in read_rows(file)] for file in (args.train, args.test)]
    words = " ".join(text for text, _ in parts[1]).split()
    rows = sorted(parts[1], key=lambda row: len(row[0]))
    texts, right = [text for text, _ in rows], np.array([label for _, label in rows])
    timed = {args.list: texts[:: max(1, len(texts) // args.timed)]}
    for count in args.words:
        timed[f"{count} words"] = [" ".join(words[n * count : (n + 1) * count]) for n in range(FEW)]
    about = {"machine": device_name(torch.device("cpu")), "date": date.today(), "commit": commit()}
    model = classify.cascade.ask_model(classify.cascade.tokenize(texts)).argmax(-1)
    with TemporaryDirectory() as name:
        learnt = list(map(list, zip(*parts[0], strict=True)))
        Path(name, "rows").write_text(json.dumps([learnt[0], None, learnt[1]]))
        for (kind, side), (took, answers) in take_turns(sides_of(runs, Path(name)), texts, timed, args.turns).items():
            classes, layers = zip(*answers, strict=True)
            answered = model.numpy() if side in ("transformers", "ONNX Runtime") else np.array(classes)
            score = f"{100 * (answered == right).mean():.1f}"
            macro_f1 = f"{np.mean(classification_report(answered, right, len(labels))['f1']):.1f}"
            if (kind, side) == ("int8", "ONNX Runtime"):  # whose answers are not our model's
                score = macro_f1 = ""
            depth = classify.record.depth
            share = float(side not in (TFIDF, STATIC)) if None in layers else float(np.mean(layers)) / depth
            told = {"score": score, "macro_f1": macro_f1, "share": f"{share:.2f}"}
            for some in timed:
                times = {name: f"{took[some, name]:.2f}" if (some, name) in took else "" for name in BATCHES}
                told = told if some == args.list else dict.fromkeys(told, "")
                found.append({"texts": some, "precision": kind, "side": side} | times | told | about)
    print("\n".join(", ".join(map(str, row.values())) for row in found))
    if args.write:
        others = [row for row in read_rows(CLASSIFIER / "speed.csv") if row["texts"] not in timed]
        write_rows(CLASSIFIER / "speed.csv", [*others, *found])


if __name__ == "__main__":
    run_command(main)
