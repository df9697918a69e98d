"""Text in, label out: EarlyExitClassifier, and what one would use in its place. For __main__.py.

`transformers` and ONNX Runtime run the model of a run's last exit, as `python -m minisweet.export` writes it. All read
texts with the same tokenizer, and take batches of texts of similar length.
"""

import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from minisweet import EarlyExitClassifier
from minisweet.base.devices import keep_compiled_products, tune_cpu
from minisweet.data.tasks import load_examples
from minisweet.use.export import export

Classify = Callable[[list[str]], list[str]]


def export_all(run: Path, folder: Path, exit_layer: int | None = None) -> None:
    """One of the run's exits, by default the last, for transformers, and for ONNX Runtime in float32 and in int8."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from transformers import AutoModelForSequenceClassification

    export(run, folder, exit_layer)
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()

    class Logits(torch.nn.Module):
        """Positional arguments, as the exporter takes them."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask, token_type_ids):
            return self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids).logits

    names = ["input_ids", "attention_mask", "token_type_ids"]
    ones = torch.ones(2, 16, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Logits(),
            (ones, ones, torch.zeros_like(ones)),
            str(folder / "float32.onnx"),
            input_names=names,
            output_names=["logits"],
            dynamic_axes={name: {0: "batch", 1: "length"} for name in names},
            opset_version=17,
            dynamo=False,
        )
    quantize_dynamic(str(folder / "float32.onnx"), str(folder / "int8.onnx"), weight_type=QuantType.QInt8)


def ours(run: Path, **arguments) -> Classify:
    """EarlyExitClassifier."""
    keep_compiled_products()
    tune_cpu()
    classify = EarlyExitClassifier(run, **arguments)
    return lambda texts: [answer.label for answer in classify(texts)]


def encoder_of(folder: Path) -> Callable[[list[str]], list[np.ndarray]]:
    """Texts to input_ids, attention_mask, token_type_ids (B, T), by the tokenizers package."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    tokenizer.enable_truncation(256)

    def encode(texts: list[str]) -> list[np.ndarray]:
        encodings = tokenizer.encode_batch_fast(texts)
        return [np.array([getattr(e, name) for e in encodings]) for name in ("ids", "attention_mask", "type_ids")]

    return encode


def onnx(folder: Path, kind: str, labels: list[str], threshold: float | None = None) -> Classify:
    """ONNX Runtime on the CPU: float32.onnx, int8.onnx, or a file that leaves early, at a threshold."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / f"{kind}.onnx"), providers=["CPUExecutionProvider"])
    encode = encoder_of(folder)
    names = [value.name for value in session.get_inputs()]

    given = {} if threshold is None else {"threshold": np.array(threshold, np.float32)}

    def classify(texts: list[str]) -> list[str]:
        scores, *_ = session.run(None, dict(zip(names, encode(texts), strict=True)) | given)
        return [labels[c] for c in scores.argmax(-1)]

    return classify


def theirs(folder: Path, amp: str, labels: list[str]) -> Classify:
    """`transformers`, its fastest attention."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    encode = encoder_of(folder)

    @torch.inference_mode()
    def classify(texts: list[str]) -> list[str]:
        ids, mask, types = map(torch.from_numpy, encode(texts))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp == "bf16"):
            logits = model(input_ids=ids, attention_mask=mask, token_type_ids=types).logits
        return [labels[c] for c in logits.argmax(-1).tolist()]

    return classify


def texts_of(source: dict) -> tuple[list, list[int]]:
    """`count` texts: of so many `tokens`, or of the dev set of a `task` in `data_dir`, with their labels.

    For batches the longest come first.
    """
    if "tokens" in source:
        return [" ".join(["film"] * (source["tokens"] - 2))] * source["count"], []
    rows = load_examples(source["task"], "dev", Path(source["data_dir"]))
    rows = rows.take(np.random.default_rng(0).permutation(len(rows.first))[: source["count"]])
    pairs = list(zip(rows.texts(), rows.labels, strict=True))
    if source["batch"] > 1:
        pairs.sort(key=lambda pair: -len("".join(pair[0])))
    return [text for text, _ in pairs], [label for _, label in pairs]


def classify_unit(side: str, run: str, folder: str, labels: list[str], source: dict, **arguments):
    """The unit of a process: all texts, `source["batch"]` at once. It answers with each call's seconds, and labels."""
    if side == "ours":
        classify = ours(Path(run), **arguments)
    elif side == "transformers":
        classify = theirs(Path(folder), labels=labels, **arguments)
    else:
        classify = onnx(Path(folder), side.removeprefix("onnx "), labels, **arguments)
    (texts, _), batch = texts_of(source), source["batch"]
    # Ours gathers who is left of four batches; the others take a batch at a time.
    size = batch * 4 if side == "ours" and batch > 1 else batch

    def run_all() -> dict[str, list]:
        seconds, said = [], []
        for start in range(0, len(texts), size):
            before = time.perf_counter()
            said += classify(texts[start : start + size])
            seconds.append(time.perf_counter() - before)
        return {"seconds": seconds, "labels": said}

    run_all.examples = len(texts)
    return run_all
