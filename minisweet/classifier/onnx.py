"""A classifier as one ONNX file, which any program with ONNX Runtime and `tokenizers` can run.

torch exports the bag of words and the model. They become one graph, see GRAPH, with an `If` around the model: exit 0
answers all rows, and only the rows whose confidence is too low are embedded and run through all layers.

The file is tried on validation rows, one by one, before it is written. A float32 file has the run's threshold and
promise, because its answers are the model's. Int8 changes some answers, so an int8 file gets a threshold and a promise
of its own, relative to its own full depth.

Dimension letters: B batch, T tokens, C classes, N texts. Of a batch's B rows, M reach the model.
"""

import copy
import json
import logging
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import torch
from onnx import GraphProto, ModelProto
from onnx.compose import add_prefix
from onnx.helper import make_node, set_model_props
from onnx.numpy_helper import from_array
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxscript import optimizer
from torch import nn

from minisweet.base.commands import progress
from minisweet.base.files import InputError, written_beside
from minisweet.classifier import report
from minisweet.classifier.bag_of_words import NgramExit
from minisweet.classifier.cascade import Cascade, Rule
from minisweet.classifier.probe import FullModel
from minisweet.classifier.promise import OperatingPoint, choose
from minisweet.classifier.run import Validation
from minisweet.classifier.split import JUDGES
from minisweet.dropout import Dropout
from minisweet.texts import Texts, special_tokens

OPSET = 20  # ONNX Runtime reads it, and the graph's version, from 1.18 on
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
NUMBERS = ("chosen_threshold", "bag_temperature", "temperature", "weight")  # the threshold and the rule; constants
# `threshold` may be left out. As in `leaves` of cascade.py, all rows stay at 1, and none does at `lowest`. The nodes of
# the model replace `Model`, with its weights in the same graph, the only place where ONNX Runtime packs them.
GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
early_exit (int64[batch, tokens] input_ids, int64[batch, tokens] attention_mask, int64[batch, tokens] token_type_ids,
            optional(float) threshold, float chosen_threshold, float bag_temperature, float temperature, float weight)
        => (float[batch, CLASSES] probabilities, float[batch] confidence, int64[batch] exit_layer) {
    one = Constant <value_float = 1.0> ()
    lowest = Constant <value_float = LOWEST> ()
    depth = Constant <value_int = DEPTH> ()
    last_axis = Constant <value_ints = [-1]> ()
    is_given = OptionalHasElement (threshold)
    asked = If (is_given) <
        then_branch = given () => (float of_caller) { of_caller = OptionalGetElement (threshold) },
        else_branch = chosen () => (float of_file) { of_file = Identity (chosen_threshold) }
    >
    bag = Bag (input_ids, attention_mask)
    first = Div (bag, bag_temperature)
    early = Softmax (first)
    sure = ReduceMax <keepdims = 0> (early, last_axis)
    is_sure = GreaterOrEqual (sure, asked)
    is_below_1 = Less (asked, one)
    may_leave = And (is_sure, is_below_1)
    all_leave = LessOrEqual (asked, lowest)
    leave = Or (may_leave, all_leave)
    stay = Not (leave)
    found = NonZero (stay)
    rows = Reshape (found, last_axis)
    count = Size (rows)
    some_stay = Cast <to = 9> (count)
    probabilities = If (some_stay) <
        then_branch = full_depth () => (float[batch, CLASSES] replaced) {
            ids = Gather (input_ids, rows)
            mask = Gather (attention_mask, rows)
            types = Gather (token_type_ids, rows)
            model = Model (ids, mask, types)
            last = Div (model, temperature)
            of_bag = Gather (first, rows)
            weighted = Mul (of_bag, weight)
            both = Add (last, weighted)
            answers = Softmax (both)
            places = Unsqueeze (rows, last_axis)
            replaced = ScatterND (early, places, answers)
        },
        else_branch = exit_0 () => (float[batch, CLASSES] same) { same = Identity (early) }
    >
    confidence = ReduceMax <keepdims = 0> (probabilities, last_axis)
    stays = Cast <to = 7> (stay)
    exit_layer = Mul (stays, depth)
}
"""


def insert(graph: GraphProto, op: str, step: nn.Module) -> None:
    """Replace the node `op`, if the graph has one, by the nodes of `step`, a function of tokens."""
    for place, node in enumerate(graph.node):
        if node.op_type == op:
            tokens = tuple(torch.ones(3, 7).long() + n for n in range(len(node.input)))  # equal ones would be merged
            sizes = tuple(dict.fromkeys((0, 1), torch.export.Dim.AUTO) for _ in tokens)
            program = torch.export.export(step, tokens, dynamic_shapes=sizes, strict=False)
            made = torch.onnx.export(program, dynamo=True, external_data=False, verbose=False, opset_version=OPSET)
            assert made is not None
            inner = add_prefix(made.model_proto, f"{op}.").graph
            given = [make_node("Identity", [a], [b.name]) for a, b in zip(node.input, inner.input, strict=True)]
            result = make_node("Identity", [inner.output[0].name], node.output)
            nodes = [*graph.node[:place], *given, *inner.node, result, *graph.node[place + 1 :]]
            del graph.node[:]
            graph.node.extend(nodes)
            graph.initializer.extend(inner.initializer)
            return


def graphs_in(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph, and all graphs in it."""
    yield graph
    for attribute in (attribute for node in graph.node for attribute in node.attribute if attribute.HasField("g")):
        yield from graphs_in(attribute.g)


def export_graph(model: FullModel, bag: NgramExit, threshold: float, rule: Rule, int8: bool) -> ModelProto:
    """The graph of a bag of words and a model, with a threshold and a rule. The model loses its dropout.

    With `int8` weights have eight bits, with a scale per column. Only seven bits are used: with all eight, products
    overflow on processors without VNNI. The bag of words stays as it is: one scale for its whole table would change its
    answers. All texts of a batch would share one scale of activations, so that an int8 file takes one text at a time.
    """
    for module in model.requires_grad_(False).train().modules():  # training selects the attention with fewer nodes
        if isinstance(module, Dropout):
            module.p = 0.0
    C, depth = len(bag.bias), model.encoder.depth
    text = GRAPH.replace("CLASSES", str(C)).replace("LOWEST", f"{np.float32(1 / C):.9g}").replace("DEPTH", str(depth))
    file = onnx.parser.parse_model(text)  # whose inputs are those of the file, and the NUMBERS

    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the exporters say much about themselves
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        for graph in graphs_in(file.graph):
            insert(graph, "Bag", bag)
            insert(graph, "Model", model)
        optimizer.fold_constants(file)
        optimizer.remove_unused_nodes(file)
        if int8:
            nodes = [node for graph in graphs_in(file.graph) for node in graph.node]
            for i, node in enumerate(nodes):
                node.name = f"{node.op_type}.{i}"
            kept = [node.name for node in nodes if any(value.startswith("Bag.") for value in node.input)]
            options = {"weight_type": QuantType.QInt8, "per_channel": True, "reduce_range": True}
            options |= {"nodes_to_exclude": kept, "extra_options": {"EnableSubgraph": True}}
            quantize_dynamic(file, f"{folder}/int8.onnx", **options)
            file = onnx.load(f"{folder}/int8.onnx")
            for value in file.graph.input[: len(INPUTS)]:
                value.type.tensor_type.shape.dim[0].dim_value = 1
    logging.disable(level)
    for graph in graphs_in(file.graph):  # With shapes ONNX Runtime fuses sums and LayerNorms: batches take longer.
        del graph.value_info[:]
    del file.graph.input[-len(NUMBERS) :]  # which are constants from here on
    set_numbers(file, threshold, rule)
    return file


def set_numbers(file: ModelProto, threshold: float, rule: Rule) -> None:
    """Set the default threshold and the rule of a file, in place."""
    kept = [value for value in file.graph.initializer if value.name not in NUMBERS]
    del file.graph.initializer[:]
    new = zip(NUMBERS, (threshold, *rule), strict=True)
    file.graph.initializer.extend(kept + [from_array(np.array(value, np.float32), name) for name, value in new])


def export_onnx(
    out: Path, cascade: Cascade, point: OperatingPoint, record: Namespace, validation: Validation, int8: bool
) -> list[str]:
    """Write one file of a classifier, with weights of eight bits if `int8`, whole or not at all.

    Returns the lines that `minisweet export` prints. Raises InputError if `out` exists, or more than one float32
    answer, and more than 0.1% of them, differ from the model's.
    """
    model, bag, tokenizer = copy.deepcopy((cascade.model, cascade.bag, cascade.tokenizer))  # which others still use
    cascade = replace(cascade, model=model.cpu(), bag=bag.cpu(), device=torch.device("cpu"), precision=None)
    cascade = replace(cascade, threshold=point.threshold)
    tried = validation.texts.take(np.flatnonzero(validation.roles == JUDGES))
    with written_beside(out, overwrite=False) as new:
        logits, layers = cascade.decide(tried)
        file = export_graph(cascade.model, cascade.bag, point.threshold, point.rule, int8)
        if int8:
            point = choose_for_int8(file, point, record, validation)
        probabilities, _, found = one_by_one(file, tried)
        differ = int(((probabilities.argmax(-1) != logits.argmax(-1).numpy()) | (found != layers.numpy())).sum())
        if 1000 * differ > max(1000, len(tried)) and not int8:
            raise InputError(f"--onnx: not written: {differ} of {len(tried)} answers are not the model's")
        pad = special_tokens(tokenizer)[2]
        tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad), pad_token=pad)
        told = {"labels": record.labels, "max_length": record.arguments["max_length"], "threshold": point.threshold}
        told |= {"exit_layers": [0, record.depth], "goal": asdict(point.goal)}
        told["texts_at_once"] = 1 if int8 else None  # None for any number
        as_json = {key: json.dumps(value) for key, value in told.items()}
        set_model_props(file, as_json | {"tokenizer": tokenizer.to_str()})
        new.write_bytes(file.SerializeToString())
        size = new.stat().st_size / 1e6
    cascade = replace(cascade, threshold=point.threshold)
    first = f"{out}: {'int8' if int8 else 'float32'}, {size:.1f} MB, by default at threshold {point.threshold:.6g}"
    second = f"{len(tried):,} validation rows, one by one: {differ:,} answers or exits are not the model's"
    return [first, second, report.promise_of(cascade, point, record)]


def choose_for_int8(
    file: ModelProto, point: OperatingPoint, record: Namespace, validation: Validation
) -> OperatingPoint:
    """Choose the threshold and the rule of an int8 file from its own answers, and set them in place."""
    set_numbers(file, 0.0, (1.0, 1.0, 0.0))
    # All texts leave at exit 0 at threshold 0, and none does at 1.
    answers = [one_by_one(file, validation.texts, threshold=np.array(at, np.float32))[0] for at in (0, 1)]
    logits = torch.from_numpy(np.stack(answers)).clamp(min=1e-37).log()  # (2, N, C)
    labels, keys, combines = validation.texts.labels, validation.texts.keys, record.arguments["trunk"] is None
    point = choose(logits, labels, keys, validation.roles, point.goal, combines)
    set_numbers(file, point.threshold, point.rule)
    return point


def one_by_one(file: ModelProto, texts: Texts, **setting: np.ndarray) -> list[np.ndarray]:
    """Run N texts through a file one by one. Returns its outputs, (N, ...) each."""
    session = onnxruntime.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs = []
    for row in progress(range(len(texts)), desc="file", unit="text"):
        inputs = texts.batch(np.array([row])).inputs
        outputs.append(session.run(None, {k: v.numpy() for k, v in zip(INPUTS, inputs, strict=True)} | setting))
    return list(map(np.concatenate, zip(*outputs, strict=True)))
