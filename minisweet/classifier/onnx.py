"""A run as one ONNX file that leaves early by itself: `minisweet export RUN --onnx FILE.onnx [--int8]`.

How its graph is made stands in onnx_graph.py. Here it is tried on validation rows, one by one, before the file is
written. A float32 file takes the run's threshold and promise, since its answers are the model's. Eight bits change some
answers, and so an int8 file gets a threshold and a promise of its own, against its own full depth.

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

from minisweet.adaptive import ExitRule, in_float32
from minisweet.base.commands import progress
from minisweet.base.files import InputError, written_beside
from minisweet.texts import Texts, special_tokens
from minisweet.classifier import promise as operating
from minisweet.metrics import METRICS
from minisweet.classifier.estimator import Deployed, EarlyExitClassifier, classify_tokens
from minisweet.classifier.onnx_graph import INPUTS, export_graph, set_rule


def export_onnx(run: Path, out: Path, int8: bool = False) -> list[str]:
    """Write one file of a run, whole or not at all. Returns what came out, a line each.

    Raises InputError for an `out` that exists, a run for which nothing was chosen, one of Multi-Model, and where more
    than one, and more than one in a thousand, of the float32 answers are not the model's.
    """
    its = EarlyExitClassifier.load(run, device="cpu", amp="off").deployed
    if its.model.exits.asks_at_1:
        raise InputError(f"--onnx: {run} is a run of Multi-Model (mm); the file is for one model")
    with written_beside(out, overwrite=False) as new:
        file, its, lines = make_file(its, int8)
        new.write_bytes(content := file.SerializeToString())
    kind, exits = "int8" if int8 else "float32", ", ".join(map(str, its.model.exit_layers))
    what = f"{kind}, {len(content) / 1e6:.1f} MB, exits {exits}, by default at threshold {its.threshold:.6g}"
    return [f"{out}: {what}", *lines]


def make_file(its: Deployed, int8: bool) -> tuple[ModelProto, Deployed, list[str]]:
    """The file, with its metadata and tokenizer; what it deploys; and what came out when it was tried, a line each.

    In int8 temperatures and threshold are the file's own.
    """
    record, texts, outputs, layers = its.run.record, its.run.texts, its.run.outputs, list(its.model.exit_layers)
    rows = operating.split(outputs, record.trained_keys)[1]  # those that judge, or all rows where none does
    rows = rows if len(rows) else np.arange(len(texts))
    file = export_graph(its.model, its.threshold, its.rule, int8)
    lines = []
    if int8:
        logits = answers_of_exits(file, texts, len(layers))
        exits = outputs.exits.take([outputs.exits.layers.index(n) for n in layers])
        full_depth, stated = outputs.logits[-1].argmax(-1), its.point.full_depth  # of the last exit by itself
        outputs = outputs._replace(logits=logits, exits=exits, precision="int8")
        goal, combine = its.point.goal, its.rule.needs_exit_0
        point = operating.choose(outputs, goal, record.trained_keys, layers, its.run.labels, combine)
        its = its._replace(point=point, rule=point.rule, threshold=in_float32(point.threshold))
        set_rule(file, its.threshold, its.rule)
        changes = int((logits[-1].argmax(-1) != full_depth)[rows].sum())
        what = f"{changes:,} of {len(rows):,} answers at full depth are not the model's"
        if outputs.metric != "agreement":
            gap = point.full_depth - stated
            what += f"; {METRICS[outputs.metric]} there {point.full_depth:.1f}, {gap:+.1f} points beside the model's"
        lines += [f"int8: {what}"]

    texts = texts.take(rows)
    (probabilities, _, taken), milliseconds = one_by_one(file, texts)
    _, full_milliseconds = one_by_one(file, texts, threshold=np.ones((), np.float32))
    of_file = [(its.labels[k], layer) for k, layer in zip(probabilities.argmax(-1), taken, strict=True)]
    of_model = [(answer.label, answer.exit_layer) for answer in classify_tokens(its, texts)]
    differ = sum(one != other for one, other in zip(of_file, of_model, strict=True))
    if 1000 * differ > max(1000, len(rows)) and not int8:
        raise InputError(f"--onnx: not written: {differ} of {len(rows)} answers are not the model's")

    metadata = {"labels": record.labels, "exit_layers": layers, "max_length": record.arguments.max_length}
    metadata |= {"pairs": len(record.columns) == 2, "threshold": its.threshold, "goal": its.point.goal}
    tokenizer = copy.deepcopy(its.run.tokenizer)
    pad = special_tokens(tokenizer)[2]
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad), pad_token=pad)
    as_json = {key: json.dumps(value) for key, value in metadata.items()}
    set_model_props(file, as_json | {"tokenizer": tokenizer.to_str()})
    lines += [f"{len(rows):,} validation rows, one by one: {differ:,} answers or exits are not the model's"]
    lines += [f"milliseconds per text: {milliseconds:.2f} at the threshold, {full_milliseconds:.2f} at full depth"]
    promised = its.point.promise or its.point.shortfall(record.set_aside)
    if its.point.precision not in ("int8", "torch.float32"):
        promised = (
            f"what was promised is of {its.point.precision}, and nothing of this file: choose again with --amp off"
        )
    return file, its, [*lines, *([promised] if promised else [])]


def answers_of_exits(file: ModelProto, texts: Texts, exits: int) -> Tensor:
    """What each exit of a file says of all texts: log-probabilities (K, N, C), at a temperature of 1."""
    said = []
    for k in range(exits):  # nobody leaves at exits before, which get no confidence, and all leave at exit k
        set_rule(file, 0.0, ExitRule(1, torch.tensor([math.nan] * k + [1.0] * (exits - k))))
        said.append(one_by_one(file, texts)[0][0])
    return torch.from_numpy(np.stack(said)).clamp(min=1e-37).log()


def one_by_one(file: ModelProto, texts: Texts, **setting: np.ndarray) -> tuple[list[np.ndarray], float]:
    """Run texts through a file one by one: its outputs, (N, ...) each, and the mean milliseconds of a text.

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
