"""A run as one ONNX file with early exit inside: `minisweet export RUN --onnx FILE.onnx [--int8]`.

onnx_graph.py makes the graph. This file tries it on validation rows, one by one, before it is written. A float32 file
has the run's threshold and promise, because its answers are the model's. Eight bits change some answers, and so an int8
file gets a threshold and a promise of its own, relative to its own full depth.
"""

import copy
import json
import time
from dataclasses import asdict
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
from minisweet.classifier.deployed import OwnRun, classify, deploy, fitted_of
from minisweet.classifier.onnx_graph import INPUTS, export_graph, set_rule
from minisweet.classifier.operating_point import OperatingPoint
from minisweet.classifier.promise import METRIC_NAMES
from minisweet.classifier.selection import choose, choosers_and_judges
from minisweet.texts import Texts, special_tokens


def export_onnx(out: Path, run: OwnRun, int8: bool = False) -> list[str]:
    """Write one file of a run, with weights of eight bits if `int8`, whole or not at all.

    Returns the lines that `minisweet export` prints. Raises InputError if `out` exists, or more than one
    float32 answer, and more than 0.1% of them, differ from the model's.
    """
    record = run.record
    deployed = deploy(run, device="cpu", amp="off")
    lines = []
    _, judging, _ = choosers_and_judges(run.outputs, record.trained_keys)
    rows = judging if len(judging) else np.arange(len(run.texts))  # to try the file on
    tried = run.texts.take(rows)
    with written_beside(out, overwrite=False) as new:
        file = export_graph(deployed.run.model, deployed.run.bag, run.point.threshold, run.point.rule, int8)
        if int8:
            point, line = choose_for_int8(file, run, rows)
            lines.append(line)
            set_rule(file, point.threshold, point.rule)
            deployed = deployed._replace(run=run._replace(point=point), threshold=in_float32(point.threshold))
        point = deployed.run.point
        (probabilities, _, layers), milliseconds = one_by_one(file, tried)
        _, full_milliseconds = one_by_one(file, tried, threshold=np.ones((), np.float32))
        of_file = [(deployed.labels[k], layer) for k, layer in zip(probabilities.argmax(-1), layers, strict=True)]
        of_model = [(answer.label, answer.exit_layer) for answer in classify(deployed, tried)]
        differ = sum(ours != theirs for ours, theirs in zip(of_file, of_model, strict=True))
        if 1000 * differ > max(1000, len(rows)) and not int8:
            raise InputError(f"--onnx: not written: {differ} of {len(rows)} answers are not the model's")
        lines.append(f"{len(rows):,} validation rows, one by one: {differ:,} answers or exits are not the model's")
        at_both = f"{milliseconds:.2f} at the threshold, {full_milliseconds:.2f} at full depth"
        lines.append(f"milliseconds per text: {at_both}")
        metadata = {
            "labels": record.labels,
            "exit_layers": [0, record.depth],
            "max_length": record.arguments.max_length,
            "texts_at_once": 1 if int8 else None,  # None for any number
            "threshold": deployed.threshold,
            "goal": asdict(point.goal),
        }
        tokenizer = copy.deepcopy(run.tokenizer)
        pad = special_tokens(run.tokenizer)[2]
        tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad), pad_token=pad)
        as_json = {key: json.dumps(value) for key, value in metadata.items()}
        set_model_props(file, as_json | {"tokenizer": tokenizer.to_str()})
        new.write_bytes(file.SerializeToString())
        size = new.stat().st_size / 1e6
    promise = point.in_words(fitted_of(record).set_aside)
    if point.precision not in ("int8", "torch.float32"):
        promise = f"the promise was made in {point.precision}, not for this file: choose again with --amp off"
    kind = "int8" if int8 else "float32"
    first = f"{out}: {kind}, {size:.1f} MB, by default at threshold {deployed.threshold:.6g}"
    return [first, *lines, promise]


def choose_for_int8(file: ModelProto, run: OwnRun, rows: np.ndarray) -> tuple[OperatingPoint, str]:
    """Choose for an int8 file from its own answers. Also returns a line: what eight bits change in some rows."""
    set_rule(file, 0.0, CombinedRule(1, torch.ones(2), torch.zeros(2)))
    at = [
        np.array(threshold, np.float32) for threshold in (0, 1)
    ]  # where all texts leave at exit 0, and where none does
    answers = [one_by_one(file, run.texts, threshold=threshold)[0][0] for threshold in at]
    logits = torch.from_numpy(np.stack(answers)).clamp(min=1e-37).log()  # (2, N, C)
    outputs = run.outputs._replace(logits=logits, precision="int8")
    point = choose(outputs, run.point.goal, run.record.trained_keys, fitted_of(run.record).combines)
    changes = int((logits[-1].argmax(-1) != run.outputs.logits[-1].argmax(-1))[rows].sum())  # of the last exit alone
    line = f"int8: {changes:,} of {len(rows):,} answers at full depth are not the model's"
    if outputs.metric != "agreement":
        gap = point.full_depth - run.point.full_depth
        metric = METRIC_NAMES[outputs.metric]
        line += f"; {metric} {point.full_depth:.1f}, {gap:+.1f} points compared with the model"
    return point, line


def one_by_one(file: ModelProto, texts: Texts, **setting: np.ndarray) -> tuple[list[np.ndarray], float]:
    """Run texts through a file one by one. Returns its outputs, (N, ...) each, and the mean milliseconds per text.

    The first tenth of the texts is not timed.
    """
    options = onnxruntime.SessionOptions()
    outputs, seconds = [], []
    options.log_severity_level = 3  # else it warns that the threshold is no constant
    session = onnxruntime.InferenceSession(file.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for row in progress(range(len(texts)), desc="file", unit="text"):
        inputs = dict(zip(INPUTS, map(Tensor.numpy, texts.batch(np.array([row])).inputs), strict=True)) | setting
        start = time.perf_counter()
        outputs.append(session.run(None, inputs))
        seconds.append(time.perf_counter() - start)
    return list(map(np.concatenate, zip(*outputs, strict=True))), 1000 * float(np.mean(seconds[len(seconds) // 10 :]))
