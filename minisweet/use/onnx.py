"""A run as one ONNX file that leaves early by itself: `python -m minisweet export RUN --onnx FILE.onnx [--int8]`.

How its graph is made stands in onnx_graph.py. Here the graph is tried on validation rows, one by one, before the file
is written: how often its answers are the model's, how many change since texts leave early, and how long a text takes.

Dimension letters: K exits, N texts, C classes.
"""

import json
import math
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
from minisweet.base.files import InputError, counted, written_beside
from minisweet.data.text import TokenizedExamples, special_tokens
from minisweet.evaluation.answers import load_answers
from minisweet.evaluation.goals import shortfall
from minisweet.evaluation.metrics import has_labels, score
from minisweet.evaluation.operating import deal, operating_point
from minisweet.methods import METHODS
from minisweet.runs.folders import read_validation, versions
from minisweet.use.classifier import EarlyExitClassifier
from minisweet.use.onnx_graph import INPUTS, export_graph, set_rule


def export_onnx(run: Path, out: Path, int8: bool = False, recertify: bool = False) -> list[str]:
    """Write one file of a run, whole or not at all. Returns what came out, a line each.

    `recertify` chooses temperatures and threshold anew, from the file's own answers. Raises InputError for an `out`
    that exists, no evaluated run, one of Multi-Model or of learning-to-exit, `recertify` where the goal promises
    nothing, and where more than one in a hundred of the float32 answers is not the model's.
    """
    classify = EarlyExitClassifier(run, device="cpu")
    record, goal = classify.record, classify.evaluation.operating_point.goal
    if classify.rule.ranges is not None or not METHODS[record.method].is_one_model:
        what = METHODS[record.method].words + f" ({record.method})"
        what = "learning-to-exit (lte)" if classify.rule.ranges is not None else what
        raise InputError(f"--onnx: {run} is a run of {what}; the file is for one model whose exits have a confidence")
    if recertify and "sure" not in goal:
        raise InputError(f"--recertify: {run} has the goal {goal}; should be evaluate.py's --max-loss or --max-change")
    with written_beside(out, overwrite=False) as new:
        file, lines = make_file(run, classify, int8, recertify)
        content = file.SerializeToString()
        new.write_bytes(content)
    kind, size, after = "int8" if int8 else "float32", len(content) / 1e6, ",".join(map(str, classify.exit_layers))
    default = f"by default at threshold {classify.threshold:.6g}"
    return [f"{out}: {kind}, {size:.1f} MB, exits after layers {after}, {default}", *lines]


def make_file(run: Path, classify: EarlyExitClassifier, int8: bool, recertify: bool) -> tuple[ModelProto, list[str]]:
    """The file, with its metadata and tokenizer, and what came out when it was tried, a line each.

    It is tried on the rows that judge, or on all rows where none does.
    """
    record, layers, goal = classify.record, classify.exit_layers, classify.evaluation.operating_point.goal
    answered = load_answers(run, classify.evaluation, record)
    examples = read_validation(run, record, classify.evaluation)
    full_depth, exits = answered.logits[-1].argmax(-1).numpy(), Exits(layers, record.depth, record.method)
    sides = deal(answered, record.train_tokens)  # by the model's labels: who chose its exits does not judge the file
    note = ""
    file = export_graph(classify.model, classify.threshold, classify.rule.temperatures.tolist(), int8)
    if recertify:  # the classifier gets the file's temperatures and threshold, so that both can be compared
        texts, answers = TokenizedExamples(classify.tokenizer, examples), []
        for k in range(len(layers)):  # nobody leaves at exits before, which get no confidence, and all leave at exit k
            set_rule(file, 0.0, [math.nan] * k + [1.0] * (len(layers) - k))
            answers.append(one_by_one(file, texts)[0][0])
        logits = torch.from_numpy(np.stack(answers)).clamp(min=1e-37).log()  # (K, N, C)
        labels = answered.labels if has_labels(answered.metric) else logits[-1].argmax(-1)
        answered = answered._replace(logits=logits, labels=labels, exits=exits)
        classify.rule, point = operating_point(answered, goal, sides, layers)
        classify.threshold = point["threshold"]
        set_rule(file, classify.threshold, classify.rule.temperatures.tolist())
        note = shortfall(point, record, layers) or "what is promised holds for this file, against its own full depth"
    elif int8 and "sure" in goal and classify.threshold < 1:
        note = "what evaluate.py promises holds in float32, and says nothing of int8; --recertify promises it anew"

    rows = sides.judging if len(sides.judging) else np.arange(len(full_depth))
    texts = TokenizedExamples(classify.tokenizer, examples.take(rows))
    (probabilities, _, taken), milliseconds = one_by_one(file, texts)
    (of_full_depth, *_), full_milliseconds = one_by_one(file, texts, threshold=np.ones((), np.float32))
    labels = probabilities.argmax(-1)
    changes = int((labels != of_full_depth.argmax(-1)).sum())
    of_file = [(record.labels[label], layer) for label, layer in zip(labels, taken, strict=True)]
    of_model = [(answer.label, answer.exit_layer) for answer in classify.classify(texts)]
    differ = sum(one != other for one, other in zip(of_file, of_model, strict=True))
    if 100 * differ > len(rows) and not int8:
        raise InputError(f"--onnx: not written: {differ} of {len(rows)} answers are not the model's")

    metadata = {"labels": record.labels, "exit_layers": layers, "max_length": record.max_length, "goal": goal}
    metadata |= {"pairs": classify.pairs, "threshold": classify.threshold}
    metadata |= {"file_changes": changes, "file_rows": len(rows)}
    metadata["certified_for"] = ("file" if recertify else "model") if "sure" in goal else None
    metadata["versions"] = versions() | {name: version(name) for name in ("onnx", "onnxscript", "onnxruntime")}
    pad = special_tokens(classify.tokenizer)[2]
    classify.tokenizer.enable_padding(pad_id=classify.tokenizer.token_to_id(pad), pad_token=pad)
    as_json = {key: json.dumps(value) for key, value in metadata.items()}
    set_model_props(file, as_json | {"tokenizer": classify.tokenizer.to_str()})

    value = score(labels, answered.labels[rows].numpy(), answered.metric)
    costs = dict(zip(layers, exits.costs(classify.threshold), strict=True))
    return file, [
        f"{counted(len(rows), 'validation row')}, one by one: {answered.metric} {value:.1f} with "
        f"{np.mean([costs[n] for n in taken]):.1%} of the layers; {differ:,} labels or exits are not the model's",
        f"{changes:,} labels ({changes / len(rows):.1%}) change against the file's full depth, "
        f"{(labels != full_depth[rows]).sum():,} against the model's",
        *([note] if note else []),
        f"milliseconds per text, one by one: {milliseconds:.2f} at the operating point, "
        f"{full_milliseconds:.2f} at full depth",
    ]


def one_by_one(file: ModelProto, texts: TokenizedExamples, **setting: np.ndarray) -> tuple[list[np.ndarray], float]:
    """Run texts through a file one by one: its outputs, (N, ...) each, and the mean milliseconds of a text.

    The first tenth of the texts is not timed.
    """
    options, outputs, seconds = onnxruntime.SessionOptions(), [], []
    options.log_severity_level = 3  # else it warns that the threshold is no constant
    session = onnxruntime.InferenceSession(file.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for row in Progress(range(len(texts)), desc="file", unit="text"):
        inputs = dict(zip(INPUTS, map(Tensor.numpy, texts.batch(np.array([row])).inputs), strict=True)) | setting
        start = time.perf_counter()
        outputs.append(session.run(None, inputs))
        seconds.append(time.perf_counter() - start)
    return list(map(np.concatenate, zip(*outputs, strict=True))), 1000 * float(np.mean(seconds[len(seconds) // 10 :]))
