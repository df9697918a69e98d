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
from typing import NamedTuple

import numpy as np
import onnxruntime
import torch
from onnx import ModelProto
from onnx.helper import set_model_props
from tokenizers import Tokenizer
from torch import Tensor

from minisweet.adaptive import Exits
from minisweet.base.commands import Progress
from minisweet.base.files import InputError, written_beside
from minisweet.data.rows import Examples
from minisweet.data.text import PAD, TokenizedExamples
from minisweet.evaluation.choice import certifying_rows
from minisweet.evaluation.metrics import score
from minisweet.evaluation.operating import operating_point, shortfall
from minisweet.evaluation.records import read_evaluation
from minisweet.evaluation.sweep import Validation, load_validation
from minisweet.runs.folders import read_validation, versions
from minisweet.use.classifier import EarlyExitClassifier
from minisweet.use.onnx_graph import INPUTS, Flat, export_pieces, join, join_all_exits

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
    check_run(run, classify)
    record, layers = classify.record, classify.exit_layers
    evaluation, examples = read_evaluation(run), read_validation(run, record)
    goal, validation = evaluation.operating_point.wish, load_validation(run, evaluation, record)
    if recertify and "sure" not in goal:
        raise InputError(f"--recertify: {run} has the goal {goal}; should be evaluate.py's --max-loss or --max-change")
    full_depth, exits = validation.logits[-1].argmax(-1).numpy(), Exits(layers, record.depth, record.method)

    flat, note = export_pieces(classify.model, int8), ""
    if recertify:
        validation, note = recertified(classify, flat, examples, validation._replace(exits=exits), goal)
    elif int8 and "sure" in goal and classify.threshold < 1:
        note = "what evaluate.py promises holds in float32, and says nothing of int8; --recertify promises it anew"
    # A threshold just below 1 must not become 1 in float32: there no exit but the last is asked.
    threshold, below_1 = classify.threshold, np.nextafter(np.float32(1), np.float32(0))
    nearest = 1.0 if threshold == 1 else min(np.float32(threshold), below_1)
    file = join(flat, nearest, classify.rule.temperatures.tolist())

    _, certifying = certifying_rows(validation, record.train_texts)
    rows = certifying if "sure" in goal and len(certifying) else np.arange(len(full_depth))
    trial = try_out(file, classify, examples.take(rows))
    if 100 * trial.differ > len(rows) and not int8:
        raise InputError(f"--onnx: not written: {trial.differ} of {len(rows)} answers are not the model's")
    changes = int((trial.labels != trial.full_depth).sum())
    metadata = {"labels": record.labels, "exit_layers": layers, "max_length": record.max_length, "threshold": threshold}
    metadata |= {"goal": goal, "certified_for": ("file" if recertify else "model") if "sure" in goal else None}
    metadata |= {"file_changes": changes, "file_rows": len(rows)}
    write_file(out, file, metadata, classify.tokenizer)

    value = score(trial.labels, validation.labels[rows].numpy(), validation.metric)
    costs = dict(zip(layers, exits.costs(threshold), strict=True))
    kind, size, after = "int8" if int8 else "float32", out.stat().st_size / 1e6, ",".join(map(str, layers))
    return [
        f"{out}: {kind}, {size:.1f} MB, exits after layers {after}, by default at threshold {threshold:.6g}",
        f"{len(rows):,} validation rows, one by one: {validation.metric} {value:.1f} with "
        f"{np.mean([costs[n] for n in trial.layers]):.1%} of the layers; "
        f"{trial.differ:,} labels or exits are not the model's",
        f"{changes:,} labels ({changes / len(rows):.1%}) change against the file's full depth, "
        f"{int((trial.labels != full_depth[rows]).sum()):,} against the model's",
        *([note] if note else []),
        "milliseconds per text, one by one: {:.2f} at the operating point, {:.2f} at full depth".format(*trial.times),
    ]


def check_run(run: Path, classify: EarlyExitClassifier) -> None:
    """Raise InputError for a run that no ONNX file can hold."""
    record, size = classify.record, sum(weights.nbytes for weights in classify.model.state_dict().values())
    if record.exit_strategy == "lte" or record.method == "mm":
        what = "learning-to-exit (lte)" if record.exit_strategy == "lte" else "Multi-Model (mm)"
        raise InputError(f"--onnx: {run} is a run of {what}; the file is for one model whose exits have a confidence")
    if size >= LARGEST:
        raise InputError(f"--onnx: {run} would take {size:,} bytes, and an ONNX file holds less than {LARGEST:,}")


def recertified(
    classify: EarlyExitClassifier, flat: Flat, examples: Examples, validation: Validation, goal: dict
) -> tuple[Validation, str]:
    """Choose temperatures and threshold, in place, for the goal from the answers of the file to be made of `flat`.

    `validation` has the classifier's exits. Returns it with the file's answers, and a line for the user.
    """
    outputs, _ = one_by_one(join_all_exits(flat), TokenizedExamples(classify.tokenizer, examples))
    probabilities = np.stack([np.concatenate(answers)[:, :-1] for answers in outputs], axis=1)  # (K, N, C)
    logits = torch.from_numpy(probabilities).clamp(min=1e-37).log()
    labels = logits[-1].argmax(-1) if validation.metric == "agreement" else validation.labels
    validation = validation._replace(logits=logits, labels=labels)
    classify.rule, point = operating_point(validation, goal, classify.exit_layers, classify.record.train_texts)
    classify.threshold = point["threshold"]
    return validation, shortfall(point) or "what is promised holds for this file, against its own full depth"


class Trial(NamedTuple):
    """What a file says of n texts."""

    labels: np.ndarray  # (n,), class indices
    layers: list[int]  # (n,), of the exits that were taken
    full_depth: np.ndarray  # (n,), its class indices at threshold 1
    differ: int  # how many labels or exits are not the model's
    times: tuple[float, float]  # milliseconds per text, with early exit and at full depth


def try_out(file: ModelProto, classify: EarlyExitClassifier, examples: Examples) -> Trial:
    """Run texts through the file, one by one, and through the model."""
    texts = TokenizedExamples(classify.tokenizer, examples)
    (early, ms), (full, full_ms) = one_by_one(file, texts), one_by_one(file, texts, threshold=np.ones((), np.float32))
    labels, full_depth = (np.array([outputs[0].argmax() for outputs in answers]) for answers in (early, full))
    layers = [outputs[2].item() for outputs in early]
    of_model = [(classify.labels.index(answer.label), answer.exit_layer) for answer in classify.classify(texts)]
    differ = sum(one != other for one, other in zip(zip(labels, layers, strict=True), of_model, strict=True))
    return Trial(labels, layers, full_depth, differ, (ms, full_ms))


def write_file(out: Path, file: ModelProto, metadata: dict, tokenizer: Tokenizer) -> None:
    """Write the file with its metadata, the versions of what made it, and its tokenizer."""
    of_onnx = {name: version(name) for name in ("onnx", "onnxscript", "onnxruntime")}
    properties = {key: json.dumps(value) for key, value in (metadata | {"versions": versions() | of_onnx}).items()}
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(PAD))
    set_model_props(file, properties | {"tokenizer": tokenizer.to_str()})
    with written_beside(out, overwrite=False) as new:
        new.write_bytes(file.SerializeToString())


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
