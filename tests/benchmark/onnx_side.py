"""Text in, label out by ONNX Runtime: a side of speed.py, whose process holds neither torch nor minisweet."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

FIELDS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}


def step_of(texts: str, batch: int, file: str, tokenizer: str, threshold: float | None) -> Callable[[], list]:
    """What answers all texts in batches, by class and layer (None where the file has one exit)."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    fields = {value.name: FIELDS[value.name] for value in session.get_inputs() if value.name in FIELDS}
    encode, rows = Tokenizer.from_file(tokenizer).encode_batch, json.loads(Path(texts).read_text())
    setting = {} if threshold is None else {"threshold": np.array(threshold, np.float32)}

    def step() -> list:
        answers = []
        for start in range(0, len(rows), batch):
            encoded = encode(rows[start : start + batch])
            inputs = {name: np.array([getattr(text, field) for text in encoded]) for name, field in fields.items()}
            scores, *more = session.run(None, inputs | setting)
            layers = more[1].tolist() if more else [None] * len(scores)
            answers += zip(scores.argmax(-1).tolist(), layers, strict=True)
        return answers

    return step
