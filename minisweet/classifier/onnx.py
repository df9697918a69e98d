"""A classifier as one ONNX file, which any program with ONNX Runtime and `tokenizers` can run.

torch exports the bag of words and the model. They become one graph with one `If`:

    exit 0, the bag of words, answers all rows
    If rows stay, which are those whose confidence is too low:
        these rows alone are embedded, and run through all layers
        the model's answers replace those of exit 0 in these rows

The file is tried on validation rows, one by one, before it is written. A float32 file has the run's threshold and
promise, because its answers are the model's. Int8 changes some answers, so an int8 file gets a threshold and a promise
of its own, relative to its own full depth.

Of a batch's B rows, M reach the model.
"""

import copy
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto
from onnx.compose import add_prefix
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info, set_model_props
from onnx.numpy_helper import from_array
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxscript import optimizer
from torch import Tensor, nn

from minisweet.base.commands import progress
from minisweet.base.files import InputError, written_beside
from minisweet.classifier.bag_of_words import NgramExit
from minisweet.classifier.cascade import CascadeRule
from minisweet.classifier.operating_point import choosers_and_judges
from minisweet.classifier.state import State
from minisweet.dropout import Dropout
from minisweet.exits import MultiExitModel
from minisweet.texts import Texts, special_tokens

OPSET, IR_VERSION = 20, 10  # ONNX Runtime reads both from 1.18 on
INPUTS, OUTPUTS = ("input_ids", "attention_mask", "token_type_ids"), ("probabilities", "confidence", "exit_layer")
FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def exported(name: str, step: nn.Module, inputs: int) -> GraphProto:
    """A function of the first `inputs` of INPUTS as a graph. All names in it begin with `name`."""
    tokens = tuple(torch.ones(3, 7).long() + n for n in range(inputs))  # torch.export would merge equal tensors
    sizes = tuple(dict.fromkeys((0, 1), torch.export.Dim.AUTO) for _ in tokens)
    program = torch.export.export(step, tokens, dynamic_shapes=sizes, strict=False)
    made = torch.onnx.export(program, dynamo=True, external_data=False, verbose=False, opset_version=OPSET)
    assert made is not None
    return add_prefix(made.model_proto, f"{name}.").graph


class OnTokens(nn.Module):
    """The model as a function of tokens, without dropout. Training mode selects the attention with fewer nodes."""

    def __init__(self, model: MultiExitModel) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False).train()
        for module in self.model.modules():
            if isinstance(module, Dropout):
                module.p = 0.0

    def forward(self, ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
        """The logits (B, C) of texts, (B, T) each."""
        return self.model(ids, mask, types)[0].logits


class Writer:
    """Writes nodes, one by one. Values go by their names, which begin with the graph's."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[NodeProto] = []

    def add(self, op: str, *inputs: str, outputs: Sequence[str] = (), **attributes: Any) -> str:
        """Write a node. Returns its first output."""
        outputs = outputs or [f"{self.name}.{op}.{len(self.nodes)}"]
        self.nodes.append(make_node(op, inputs, outputs, **attributes))
        return outputs[0]

    def run(self, graph: GraphProto, *inputs: str) -> str:
        """Write all nodes of a graph, after its inputs. Returns its output."""
        for value, name in zip(graph.input, inputs, strict=True):
            self.add("Identity", name, outputs=[value.name])
        self.nodes += graph.node
        return graph.output[0].name


def full_depth(graph: GraphProto, rows: str, first: str, early: str) -> GraphProto:
    """The inner graph: the answers `early` (B, C), with those of some rows (M,) replaced by full depth's.

    `first` (B, C) are exit 0's logits. Weights stand in the graph that reads them: ONNX Runtime packs them only there.
    """
    writer = Writer("full_depth")
    add = writer.add
    logits = writer.run(graph, *(add("Gather", x, rows) for x in INPUTS))  # (M, C)
    of_bag = add("Mul", add("Gather", first, rows), "weight")
    answers = add("Softmax", add("Add", add("Div", logits, "temperature"), of_bag))
    places = add("Unsqueeze", rows, add("Constant", value_ints=[1]))
    output = make_tensor_value_info(add("ScatterND", early, places, answers), FLOAT, None)
    return make_graph(writer.nodes, writer.name, [], [output], graph.initializer)


def write_graph(model: MultiExitModel, bag: NgramExit) -> ModelProto:
    """Write the whole graph. Besides the inputs of the file it has the numbers of a `CascadeRule`."""
    writer, of_bag, C = Writer("early_exit"), exported("bag_of_words", bag, 2), model.num_labels
    add = writer.add
    zero, one, two, lowest = (add("Constant", value_float=value) for value in (0.0, 1.0, 2.0, 1 / C))
    last = add("Constant", value_ints=[-1])
    # As `leaves` of adaptive.py: at threshold 1 all rows stay.
    limit = add("Where", add("Less", "threshold", one), "threshold", two)
    limit = add("Where", add("LessOrEqual", "threshold", lowest), zero, limit)
    first = add("Div", writer.run(of_bag, *INPUTS[:2]), "bag_temperature")  # (B, C)
    early = add("Softmax", first)
    stay = add("Not", add("GreaterOrEqual", add("ReduceMax", early, last, keepdims=0), limit))  # (B,)
    rows = add("Squeeze", add("NonZero", stay), add("Constant", value_ints=[0]))  # (M,)
    some = full_depth(exported("model", OnTokens(model), 3), rows, first, early)
    same = make_tensor_value_info("same", FLOAT, None)
    none = make_graph([make_node("Identity", [early], ["same"])], "exit_0", [], [same])
    answers = add("If", add("Cast", add("Size", rows), to=BOOL), then_branch=some, else_branch=none)
    add("Identity", answers, outputs=OUTPUTS[:1])
    add("ReduceMax", answers, last, keepdims=0, outputs=OUTPUTS[1:2])
    depth = add("Constant", value_int=len(model.encoder.layers))
    add("Mul", add("Cast", stay, to=INT64), depth, outputs=OUTPUTS[2:])
    inputs = [make_tensor_value_info(name, INT64, ["batch", "tokens"]) for name in INPUTS]
    inputs += [make_tensor_value_info(name, FLOAT, []) for name in ("threshold", *CascadeRule._fields)]
    shapes: list[tuple[int, list[str | int]]] = [(FLOAT, ["batch", C]), (FLOAT, ["batch"]), (INT64, ["batch"])]
    outputs = [make_tensor_value_info(name, *shape) for name, shape in zip(OUTPUTS, shapes, strict=True)]
    graph = make_graph(writer.nodes, writer.name, inputs, outputs, of_bag.initializer)
    return make_model(graph, opset_imports=[make_opsetid("", OPSET)], ir_version=IR_VERSION)


def export_graph(model: MultiExitModel, bag: NgramExit, threshold: float, rule: CascadeRule, int8: bool) -> ModelProto:
    """The graph of a bag of words and a model, with a rule for their exits. `threshold` is the default of an input.

    With `int8` weights have eight bits, with a scale per column. Only seven bits are used: with all eight, products
    overflow on processors without VNNI. The bag of words stays as it is: one scale for its whole table would change its
    answers. All texts of a batch would share one scale of activations, so that an int8 file takes one text at a time.
    """
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder, ExitStack() as after:
        after.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)  # the exporters say much about themselves
        warnings.simplefilter("ignore")
        file = write_graph(model, bag)
        optimizer.fold_constants(file)
        optimizer.remove_unused_nodes(file)
        if int8:
            nodes = [node for graph in graphs_in(file.graph) for node in graph.node]
            for i, node in enumerate(nodes):
                node.name = f"{node.op_type}.{i}"
            kept = [node.name for node in nodes if any(value.startswith("bag_of_words.") for value in node.input)]
            options = {"weight_type": QuantType.QInt8, "per_channel": True, "reduce_range": True}
            options |= {"nodes_to_exclude": kept, "extra_options": {"EnableSubgraph": True}}
            quantize_dynamic(file, f"{folder}/int8.onnx", **options)
            file = onnx.load(f"{folder}/int8.onnx")
            for value in file.graph.input[: len(INPUTS)]:
                value.type.tensor_type.shape.dim[0].dim_value = 1
    for graph in graphs_in(file.graph):  # With shapes ONNX Runtime fuses sums and LayerNorms: batches take longer.
        del graph.value_info[:]
    del file.graph.input[-len(CascadeRule._fields) :]  # which are constants from here on
    set_rule(file, threshold, rule)
    return file


def set_rule(file: ModelProto, threshold: float, rule: CascadeRule) -> None:
    """Give a file, in place, a default threshold and a rule."""
    new = {"threshold": threshold} | rule._asdict()
    kept = [value for value in file.graph.initializer if value.name not in new]
    del file.graph.initializer[:]
    file.graph.initializer.extend(kept + [from_array(np.array(value, np.float32), name) for name, value in new.items()])


def graphs_in(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph, and all graphs in it."""
    yield graph
    for attribute in (attribute for node in graph.node for attribute in node.attribute if attribute.HasField("g")):
        yield from graphs_in(attribute.g)


def export_onnx(out: Path, state: State, int8: bool = False) -> list[str]:
    """Write one file of a classifier, with weights of eight bits if `int8`, whole or not at all.

    The state is on the CPU, in float32 and at the threshold that was chosen. Returns the lines that `minisweet export`
    prints. Raises InputError if `out` exists, or more than one float32 answer, and more than 0.1% of them, differ from
    the model's.
    """
    trained = state.trained
    texts = Texts(trained.tokenizer, trained.validation)
    _, judging, _ = choosers_and_judges(state.logits, trained.record.trained_keys)
    tried = texts.take(judging if len(judging) else np.arange(len(texts)))
    with written_beside(out, overwrite=False) as new:
        of_model = [(answer.label, answer.exit_layer) for answer in state.classify(tried)]
        file = export_graph(trained.model, trained.bag, state.point.threshold, state.point.rule, int8)
        if int8:
            state = choose_for_int8(file, state, texts)
        (probabilities, _, layers), milliseconds = one_by_one(file, tried)
        _, full_milliseconds = one_by_one(file, tried, threshold=np.ones((), np.float32))
        of_file = [(state.labels[k], layer) for k, layer in zip(probabilities.argmax(-1), layers, strict=True)]
        differ = sum(ours != theirs for ours, theirs in zip(of_file, of_model, strict=True))
        if 1000 * differ > max(1000, len(tried)) and not int8:
            raise InputError(f"--onnx: not written: {differ} of {len(tried)} answers are not the model's")
        lines = [f"{len(tried):,} validation rows, one by one: {differ:,} answers or exits are not the model's"]
        lines.append(f"milliseconds per text: {milliseconds:.2f}, and {full_milliseconds:.2f} at full depth")
        describe(file, state, int8)
        new.write_bytes(file.SerializeToString())
        size = new.stat().st_size / 1e6
    promise = state.point.in_words(trained.about.set_aside) if int8 else state.promise
    first = f"{out}: {'int8' if int8 else 'float32'}, {size:.1f} MB, by default at threshold {state.threshold:.6g}"
    return [first, *lines, promise]


def describe(file: ModelProto, state: State, int8: bool) -> None:
    """Write into a file, in place, what a program needs to run it."""
    record, tokenizer = state.trained.record, copy.deepcopy(state.trained.tokenizer)
    metadata = {
        "labels": record.labels,
        "exit_layers": [0, record.depth],
        "max_length": record.arguments.max_length,
        "texts_at_once": 1 if int8 else None,  # None for any number
        "threshold": state.threshold,
        "goal": asdict(state.point.goal),
    }
    pad = special_tokens(tokenizer)[2]
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad), pad_token=pad)
    as_json = {key: json.dumps(value) for key, value in metadata.items()}
    set_model_props(file, as_json | {"tokenizer": tokenizer.to_str()})


def choose_for_int8(file: ModelProto, state: State, texts: Texts) -> State:
    """Choose for an int8 file, in place, from its own answers."""
    set_rule(file, 0.0, CascadeRule(1.0, 1.0, 0.0))
    # All texts leave at exit 0 at threshold 0, and none does at 1.
    early, full = (one_by_one(file, texts, threshold=np.array(at, np.float32))[0][0] for at in (0, 1))
    bag, model = (torch.from_numpy(part).clamp(min=1e-37).log() for part in (early, full))  # (N, C) each
    logits = state.logits._replace(bag=bag, model=model, precision="int8")
    point = state.trained.choose(logits, state.point.goal)
    set_rule(file, point.threshold, point.rule)
    return replace(state, point=point, threshold=point.threshold)


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
