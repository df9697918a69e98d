"""A run as one ONNX file that leaves early by itself: `python -m minisweet export RUN --onnx FILE.onnx [--int8]`.

How its graph is made stands in onnx_graph.py. Here the graph is tried on validation rows, one by one, before the file
is written: how often its answers are the model's, how many change since texts leave early, and how long a text takes.

Dimension letters: K exits, N texts, C classes.
"""

import json
import os
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnx import ModelProto
from onnx.helper import set_model_props
from torch import Tensor

from minisweet.adaptive import Exits
from minisweet.base.commands import Progress
from minisweet.base.files import InputError, written_beside
from minisweet.data.text import PAD, TokenizedExamples
from minisweet.evaluation.choice import certifying_rows
from minisweet.evaluation.metrics import score
from minisweet.evaluation.operating import operating_point, shortfall
from minisweet.evaluation.records import read_evaluation
from minisweet.evaluation.sweep import load_validation
from minisweet.runs.folders import read_validation, versions
from minisweet.use.classifier import EarlyExitClassifier
from minisweet.use.onnx_graph import INPUTS, export_pieces, join, join_all_exits

LARGEST = 2**31  # bytes of a protocol buffer


def export_onnx(run: Path, out: Path, int8: bool = False, recertify: bool = False) -> list[str]:
    """Write one file of a run, whole or not at all. Returns what came out, a line each.

    The file is tried on the rows that certify the run's goal, or on all rows where the goal certifies nothing.
    `recertify` chooses temperatures and threshold anew, from the file's own answers.

    Raises InputError for an `out` that exists or is no .onnx, no evaluated run, one of Multi-Model or of
    learning-to-exit, more than 2 GiB, `recertify` where the goal certifies nothing, and where more than one in a
    hundred of the float32 answers is not the model's.
    """
    if out.suffix != ".onnx" or os.path.lexists(out):
        raise InputError(f"--onnx: {out} {'exists already' if out.suffix == '.onnx' else 'should end in .onnx'}")
    classify = EarlyExitClassifier(run, device="cpu")
    record, layers, tokenizer = classify.record, classify.exit_layers, classify.tokenizer
    if record.exit_strategy == "lte" or record.method == "mm":
        what = "learning-to-exit (lte)" if record.exit_strategy == "lte" else "Multi-Model (mm)"
        raise InputError(f"--onnx: {run} is a run of {what}; the file is for one model whose exits have a confidence")
    if (size := sum(weights.nbytes for weights in classify.model.state_dict().values())) >= LARGEST:
        raise InputError(f"--onnx: {run} would take {size:,} bytes, and an ONNX file holds less than {LARGEST:,}")
    evaluation, examples = read_evaluation(run), read_validation(run, record)
    goal, validation = evaluation.operating_point.wish, load_validation(run, evaluation, record)
    if recertify and "sure" not in goal:
        raise InputError(f"--recertify: {run} has the goal {goal}; should be evaluate.py's --max-loss or --max-change")
    full_depth, exits = validation.logits[-1].argmax(-1).numpy(), Exits(layers, record.depth, record.method)

    flat, note = export_pieces(classify.model, int8), ""
    if recertify:
        outputs, _ = one_by_one(join_all_exits(flat), TokenizedExamples(tokenizer, examples))
        probabilities = np.stack([np.concatenate(answers)[:, :-1] for answers in outputs], axis=1)  # (K, N, C)
        logits = torch.from_numpy(probabilities).clamp(min=1e-37).log()
        labels = logits[-1].argmax(-1) if validation.metric == "agreement" else validation.labels
        validation = validation._replace(logits=logits, labels=labels, exits=exits)
        classify.rule, point = operating_point(validation, goal, layers, record.train_texts)
        classify.threshold, note = point["threshold"], shortfall(point)
        note = note or "what is promised holds for this file, against its own full depth"
    elif int8 and "sure" in goal and classify.threshold < 1:
        note = "what evaluate.py promises holds in float32, and says nothing of int8; --recertify promises it anew"
    threshold = classify.threshold
    # A threshold just below 1 must not become 1 in float32: there no exit but the last is asked.
    nearest = 1.0 if threshold == 1 else min(np.float32(threshold), np.nextafter(np.float32(1), np.float32(0)))
    file = join(flat, nearest, classify.rule.temperatures.tolist())

    _, certifying = certifying_rows(validation, record.train_texts)
    rows = certifying if "sure" in goal and len(certifying) else np.arange(len(full_depth))
    texts = TokenizedExamples(tokenizer, examples.take(rows))
    (early, ms), (full, full_ms) = one_by_one(file, texts), one_by_one(file, texts, threshold=np.ones((), np.float32))
    labels, full_labels = (np.array([outputs[0].argmax() for outputs in way]) for way in (early, full))
    left = [outputs[2].item() for outputs in early]
    model_says = [(record.labels.index(answer.label), answer.exit_layer) for answer in classify.classify(texts)]
    others = sum(one != other for one, other in zip(zip(labels, left, strict=True), model_says, strict=True))
    if 100 * others > len(rows) and not int8:
        raise InputError(f"--onnx: not written: {others} of {len(rows)} answers are not the model's")
    value = score(labels, validation.labels[rows].numpy(), validation.metric)
    costs = dict(zip(layers, exits.costs(threshold), strict=True))
    changes, from_model = int((labels != full_labels).sum()), int((labels != full_depth[rows]).sum())

    told = {"labels": record.labels, "exit_layers": layers, "max_length": record.max_length, "threshold": threshold}
    told |= {"goal": goal, "certified_for": ("file" if recertify else "model") if "sure" in goal else None}
    told |= {"file_changes": changes, "file_rows": len(rows)}
    told["versions"] = versions() | {name: version(name) for name in ("onnx", "onnxscript", "onnxruntime")}
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(PAD))
    set_model_props(file, {key: json.dumps(value) for key, value in told.items()} | {"tokenizer": tokenizer.to_str()})
    with written_beside(out, overwrite=False) as new:
        new.write_bytes(file.SerializeToString())
    kind, size, where = "int8" if int8 else "float32", out.stat().st_size / 1e6, ",".join(map(str, layers))
    return [
        f"{out}: {kind}, {size:.1f} MB, exits after layers {where}, by default at threshold {threshold:.6g}",
        f"{len(rows):,} validation rows, one by one: {validation.metric} {value:.1f} with "
        f"{np.mean([costs[n] for n in left]):.1%} of the layers; {others:,} labels or exits are not the model's",
        f"{changes:,} labels ({changes / len(rows):.1%}) change against the file's full depth, "
        f"{from_model:,} against the model's",
        *([note] if note else []),
        f"milliseconds per text, one by one: {ms:.2f} at the operating point, {full_ms:.2f} at full depth",
    ]


def one_by_one(file: ModelProto, texts: TokenizedExamples, **setting: np.ndarray) -> tuple[list, float]:
    """Run texts through a file one by one: each one's outputs, and the mean milliseconds, without the first tenth."""
    options, outputs, seconds = onnxruntime.SessionOptions(), [], []
    options.log_severity_level = 3  # else it warns that the threshold is no constant
    session = onnxruntime.InferenceSession(file.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for row in Progress(range(len(texts)), desc="file", unit="text"):
        inputs = dict(zip(INPUTS, map(Tensor.numpy, texts.batch(np.array([row])).inputs), strict=True)) | setting
        start = time.perf_counter()
        outputs.append(session.run(None, inputs))
        seconds.append(time.perf_counter() - start)
    return outputs, 1000 * float(np.mean(seconds[len(seconds) // 10 :]))
