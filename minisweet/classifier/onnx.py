"""A run as one ONNX file with early exit inside: `minisweet export RUN --onnx FILE.onnx [--int8]`.

onnx_graph.py makes the graph. This file tries it on validation rows, one by one, before it is written. A float32 file
has the run's threshold and promise, because its answers are the model's. Eight bits change some answers, and so an int8
file gets a threshold and a promise of its own, relative to its own full depth.

Dimension letters: K exits, N texts, C classes.
"""

import copy
import json
import math
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnx import ModelProto
from onnx.helper import set_model_props
from torch import Tensor

from minisweet.adaptive import in_float32
from minisweet.base.commands import progress
from minisweet.base.files import InputError, written_beside
from minisweet.classifier.combined_rule import CombinedRule
from minisweet.classifier.deployed import Deployed, OwnRun, classify, deploy, fitted_of
from minisweet.classifier.onnx_graph import INPUTS, export_graph, set_rule
from minisweet.classifier.promise import METRIC_NAMES
from minisweet.classifier.selection import choose, choosers_and_judges
from minisweet.texts import Texts, special_tokens


def export_onnx(out: Path, run: OwnRun, int8: bool = False) -> list[str]:
    """Write one file of a run, with weights of eight bits if `int8`, whole or not at all.

    Returns what came out, in lines. Raises InputError if `out` exists, the run is one of Multi-Model, or more than one,
    and more than one in a thousand, of the float32 answers are not the model's.
    """
    if run.model.asks_at_1:
        raise InputError("--onnx: the run is of Multi-Model (mm); the file is for one model")
    with written_beside(out, overwrite=False) as new:
        file, deployed, lines = make_file(deploy(run, device="cpu", amp="off"), int8)
        content = file.SerializeToString()
        new.write_bytes(content)
    kind, exits = "int8" if int8 else "float32", ", ".join(map(str, deployed.run.point.exits))
    size = f"{len(content) / 1e6:.1f} MB"
    return [f"{out}: {kind}, {size}, exits {exits}, by default at threshold {deployed.threshold:.6g}", *lines]


def make_file(deployed: Deployed, int8: bool) -> tuple[ModelProto, Deployed, list[str]]:
    """Make the file, with its metadata and tokenizer, and try it.

    Also returns what the file deploys, which in int8 has temperatures and a threshold of its own, and lines for a user.
    """
    record, texts = deployed.run.record, deployed.run.texts
    _, judging, _ = choosers_and_judges(deployed.run.outputs, record.trained_keys)
    rows = judging if len(judging) else np.arange(len(texts))  # to try it on
    file, lines = export_graph(deployed.model, deployed.bag, deployed.threshold, deployed.rule, int8), []
    if int8:
        deployed, line = choose_for_int8(file, deployed, rows)
        set_rule(file, deployed.threshold, deployed.rule)
        lines.append(line)

    tried = texts.take(rows)
    (probabilities, _, layers), milliseconds = one_by_one(file, tried)
    _, full_milliseconds = one_by_one(file, tried, threshold=np.ones((), np.float32))
    of_file = [(deployed.labels[k], layer) for k, layer in zip(probabilities.argmax(-1), layers, strict=True)]
    of_model = [(answer.label, answer.exit_layer) for answer in classify(deployed, tried)]
    differ = sum(ours != theirs for ours, theirs in zip(of_file, of_model, strict=True))
    if 1000 * differ > max(1000, len(rows)) and not int8:
        raise InputError(f"--onnx: not written: {differ} of {len(rows)} answers are not the model's")
    lines.append(f"{len(rows):,} validation rows, one by one: {differ:,} answers or exits are not the model's")
    lines.append(f"milliseconds per text: {milliseconds:.2f} at the threshold, {full_milliseconds:.2f} at full depth")

    point, tokenizer = deployed.run.point, copy.deepcopy(deployed.run.tokenizer)
    pad = special_tokens(tokenizer)[2]
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad), pad_token=pad)
    metadata = {
        "labels": record.labels,
        "exit_layers": point.exits,
        "max_length": record.arguments.max_length,
        "pairs": len(record.text_columns) == 2,
        "texts_at_once": 1 if int8 else None,  # None for any number
        "threshold": deployed.threshold,
        "goal": point.goal.as_json(),
    }
    as_json = {key: json.dumps(value) for key, value in metadata.items()}
    set_model_props(file, as_json | {"tokenizer": tokenizer.to_str()})
    promise = point.promise or point.shortfall(fitted_of(record).set_aside)
    if point.precision not in ("int8", "torch.float32"):
        promise = f"what was promised is of {point.precision}, and nothing of this file: choose again with --amp off"
    return file, deployed, [*lines, *([promise] if promise else [])]


def choose_for_int8(file: ModelProto, deployed: Deployed, rows: np.ndarray) -> tuple[Deployed, str]:
    """Choose for an int8 file from its own answers. Also returns a line: what eight bits change in some rows."""
    run, layers = deployed.run, deployed.run.point.exits
    exits = run.outputs.exits.keep_exits([run.outputs.exits.layers.index(n) for n in layers])
    logits = answers_of_exits(file, run.texts, len(layers))
    outputs = run.outputs._replace(logits=logits, exits=exits, precision="int8")
    known, combines = run.record.trained_keys, deployed.rule.needs_bag
    point = choose(outputs, run.point.goal, known, layers, run.given, combines)
    changes = int((logits[-1].argmax(-1) != run.outputs.logits[-1].argmax(-1))[rows].sum())  # of the last exit alone
    line = f"int8: {changes:,} of {len(rows):,} answers at full depth are not the model's"
    if outputs.metric != "agreement":
        gap, metric = point.full_depth - run.point.full_depth, METRIC_NAMES[outputs.metric]
        line += f"; {metric} there {point.full_depth:.1f}, {gap:+.1f} points beside the model's"
    run = run._replace(point=point)
    return deployed._replace(run=run, rule=point.rule, threshold=in_float32(point.threshold)), line


def answers_of_exits(file: ModelProto, texts: Texts, exits: int) -> Tensor:
    """The log-probabilities (K, N, C) of each exit of a file for all texts, at a temperature of 1."""
    logits = []
    for k in range(exits):  # with a temperature of NaN no text leaves, so that all leave at exit k
        temperatures = torch.tensor([math.nan] * k + [1.0] * (exits - k))
        set_rule(file, 0.0, CombinedRule(1, temperatures, torch.zeros(exits)))
        (probabilities, _, _), _ = one_by_one(file, texts)
        logits.append(probabilities)
    return torch.from_numpy(np.stack(logits)).clamp(min=1e-37).log()


def one_by_one(file: ModelProto, texts: Texts, **setting: np.ndarray) -> tuple[list[np.ndarray], float]:
    """Run texts through a file one by one. Returns its outputs, (N, ...) each, and the mean milliseconds per text.

    The first tenth of the texts is not timed.
    """
    options, outputs, seconds = onnxruntime.SessionOptions(), [], []
    options.log_severity_level = 3  # else it warns that the threshold is no constant
    session = onnxruntime.InferenceSession(file.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for row in progress(range(len(texts)), desc="file", unit="text"):
        inputs = dict(zip(INPUTS, map(Tensor.numpy, texts.batch(np.array([row])).inputs), strict=True)) | setting
        start = time.perf_counter()
        outputs.append(session.run(None, inputs))
        seconds.append(time.perf_counter() - start)
    return list(map(np.concatenate, zip(*outputs, strict=True))), 1000 * float(np.mean(seconds[len(seconds) // 10 :]))
