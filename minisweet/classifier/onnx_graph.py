"""How a model becomes one ONNX graph with early exit inside.

torch exports each kind of step once, as a function with weights as inputs: the embeddings, a layer, an exit, the bag of
words. `Writer` writes the graph that calls them. ONNX's node `If` runs one of two inner graphs:

    exit 0, the bag of words, answers all rows
    If rows stay, which are those whose confidence is too low:
        these rows alone are embedded, and run through all layers
        the last exit's answers replace those of exit 0 in these rows

Of a batch's B rows, M reach the last exit.
"""

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import numpy as np
import onnx
import torch
from onnx import FunctionProto, GraphProto, ModelProto, TensorProto
from onnx.helper import make_function, make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
from onnx.inliner import inline_local_functions
from onnx.numpy_helper import from_array
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxscript import optimizer
from torch import Tensor, nn

from minisweet.classifier.bag_of_words import NgramExit
from minisweet.classifier.combined_rule import CombinedRule
from minisweet.exits import MultiExitModel, pool
from minisweet.fast import Dropout

OPSET, IR_VERSION = 20, 10  # ONNX Runtime reads both from 1.18 on
INPUTS, OUTPUTS = ("input_ids", "attention_mask", "token_type_ids"), ("probabilities", "confidence", "exit_layer")
RULE = ("temperatures", "weights")  # (2,): what logits are divided by, and how much the bag's logits count
FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


class Step(nn.ModuleList):
    """Some modules, and a function of them and of tensors."""

    def __init__(self, run: Callable, *modules: nn.Module) -> None:
        super().__init__(modules)
        self.run = run

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.run(*self, *inputs)


def function_of(name: str, step: Step, inputs: Sequence[Tensor]) -> FunctionProto:
    """A step as a function of ONNX. Its inputs are the step's, then the weights that it reads, by their names."""
    inputs = tuple(x.clone() for x in inputs)  # since torch.export would merge equal tensors into one input
    sizes = (tuple(dict.fromkeys(range(x.ndim), torch.export.Dim.AUTO) for x in inputs),)
    program = torch.export.export(step, inputs, dynamic_shapes=sizes, strict=False)
    options = {"dynamo": True, "optimize": False, "external_data": False, "verbose": False, "opset_version": OPSET}
    file = torch.onnx.export(program, **options).model_proto
    values = list(file.graph.initializer)
    weights = [value for value in values if value.name in step.state_dict()]
    file.graph.input.extend(make_tensor_value_info(value.name, value.data_type, value.dims) for value in weights)
    del file.graph.initializer[:]
    file.graph.initializer.extend(value for value in values if value not in weights)
    graph = optimizer.optimize(file).graph
    constants = [make_node("Constant", [], [value.name], value=value) for value in graph.initializer]
    names = [value.name for value in graph.input], [value.name for value in graph.output]
    return make_function("steps", name, *names, [*constants, *graph.node], [make_opsetid("", OPSET)])


class Writer:
    """Writes the graph of a model, and of a bag of words in front of it, node by node. Values go by their names.

    An exit's answers (M, C+2) are probabilities, confidence and layer.
    """

    def __init__(self, model: MultiExitModel, bag: NgramExit) -> None:
        self.bag = bag
        self.model = copy.deepcopy(model).requires_grad_(False).train()
        for module in self.model.modules():
            if isinstance(module, Dropout):  # attention as in training is fewer nodes than torch's own
                module.p = 0.0
        encoder, layer, head = self.model.encoder, self.model.encoder.layers[0], self.model.heads[0]
        pooling = encoder.config.pooling
        start = Step(lambda encoder, ids, mask, types: (encoder.embed(ids, types), *encoder.context(mask)), encoder)
        go = Step(lambda layer, hidden, *context: layer(hidden, context), layer)
        ask = Step(lambda head, hidden, mask: head(pool(hidden, mask, pooling))[0], head)
        tokens = [torch.ones(3, 7).long() for _ in INPUTS]
        steps = {"start": (start, tokens), "go": (go, start(*tokens)), "ask": (ask, (start(*tokens)[0], tokens[1]))}
        steps["ask_bag"] = Step(lambda bag, *tokens: bag(*tokens), bag), tokens[:2]
        self.functions = {name: function_of(name, *step) for name, step in steps.items()}
        self.nodes, self.weights = [], []
        self.count = 0

    def add(self, op: str, *inputs: str, outputs: Sequence[str] = (), **attributes) -> str:
        """Write a node. Returns its first output."""
        self.count += 1
        self.nodes.append(make_node(op, inputs, outputs or [f"{op}.{self.count}"], **attributes))
        return self.nodes[-1].output[0]

    def call(self, name: str, place: str, modules: Sequence[nn.Module], *inputs: str) -> list[str]:
        """Write a call of a function with the weights of these modules. Returns its outputs."""
        function = self.functions[name]
        weights = nn.ModuleList(modules).state_dict()
        read = {f"{place}.{key}": weights[key] for key in function.input[len(inputs) :]}
        self.weights += [from_array(weight.numpy(), key) for key, weight in read.items()]
        outputs = [f"{place}.{value}" for value in function.output]
        self.add(name, *inputs, *read, outputs=outputs, domain="steps")
        return outputs

    def either(self, condition: str, *branches: Callable[[], str]) -> str:
        """Write an `If` with two inner graphs, which two functions write. They return its output there.

        Weights stand in the graph that reads them: ONNX Runtime packs them only there.
        """
        outside = (self.nodes, self.weights)
        graphs = []
        for write_branch in branches:
            self.nodes, self.weights = [], []
            output = make_tensor_value_info(self.add("Identity", write_branch()), FLOAT, None)
            graphs.append(make_graph(self.nodes, f"{output.name}.graph", [], [output], self.weights))
        self.nodes, self.weights = outside
        return self.add("If", condition, then_branch=graphs[0], else_branch=graphs[1])

    def divided(self, k: int, logits: str) -> str:
        """Logits (M, C), divided by exit k's temperature."""
        return self.add("Div", logits, self.add("Gather", "temperatures", self.add("Constant", value_int=k)))

    def answers(self, layer: int, logits: str) -> str:
        """The answers (M, C+2) of the exit after a layer, from calibrated logits (M, C)."""
        add = self.add
        probabilities = add("Softmax", logits)
        confidence = add("ReduceMax", probabilities, add("Constant", value_ints=[-1]))
        answers = add("Concat", probabilities, confidence, axis=1)  # (M, C+1)
        after = add("Constant", value_float=float(layer))
        return add("Pad", answers, add("Constant", value_ints=[0, 0, 0, 1]), after)

    def full_depth(self, rows: str, bag_logits: str) -> str:
        """The answers (M, C+2) of full depth to some rows (M,). `bag_logits` (B, C) are those of all rows."""
        add, encoder = self.add, self.model.encoder
        tokens = [add("Gather", x, rows) for x in INPUTS]
        hidden, *context = self.call("start", "start", [encoder], *tokens)
        for i, layer in enumerate(encoder.layers):
            (hidden,) = self.call("go", f"layers.{i}", [layer], hidden, *context)
        (logits,) = self.call("ask", "exit", [self.model.heads[0]], hidden, tokens[1])
        of_bag = add("Mul", add("Gather", bag_logits, rows), add("Gather", "weights", add("Constant", value_int=1)))
        return self.answers(len(encoder.layers), add("Add", self.divided(1, logits), of_bag))

    def write(self) -> ModelProto:
        """Write the whole graph. Besides the inputs of the file it has temperatures and weights, (2,) each."""
        add, C = self.add, self.model.num_labels
        zero, one, two, lowest = (add("Constant", value_float=value) for value in (0.0, 1.0, 2.0, 1 / C))
        start, axis, end = (add("Constant", value_ints=[value]) for value in (0, -1, C))
        # As `leaves` of adaptive.py: at threshold 1 all rows stay.
        limit = add("Where", add("Less", "threshold", one), "threshold", two)
        limit = add("Where", add("LessOrEqual", "threshold", lowest), zero, limit)
        (bag_logits,) = self.call("ask_bag", "bag_of_words", [self.bag], *INPUTS[:2])
        answers = self.answers(0, self.divided(0, bag_logits))  # (B, C+2)
        confidence = add("Gather", answers, add("Constant", value_int=C), axis=1)  # (B,)
        stays = add("NonZero", add("Not", add("GreaterOrEqual", confidence, limit)))
        rows = add("Squeeze", stays, add("Constant", value_ints=[0]))  # (M,)

        def replaced() -> str:
            places = add("Unsqueeze", rows, add("Constant", value_ints=[1]))
            return add("ScatterND", answers, places, self.full_depth(rows, bag_logits))

        answers = self.either(add("Cast", add("Size", rows), to=BOOL), replaced, lambda: answers)
        add("Slice", answers, start, end, axis, outputs=OUTPUTS[:1])
        add("Gather", answers, add("Constant", value_int=C), axis=1, outputs=OUTPUTS[1:2])
        layer = add("Gather", answers, add("Constant", value_int=C + 1), axis=1)
        add("Cast", layer, to=INT64, outputs=OUTPUTS[2:])
        inputs = [make_tensor_value_info(name, INT64, ["batch", "tokens"]) for name in INPUTS]
        inputs += [make_tensor_value_info(name, FLOAT, None) for name in ("threshold", *RULE)]
        shapes = (FLOAT, ["batch", C]), (FLOAT, ["batch"]), (INT64, ["batch"])
        outputs = [make_tensor_value_info(name, *shape) for name, shape in zip(OUTPUTS, shapes, strict=True)]
        versions = [make_opsetid("", OPSET), make_opsetid("steps", 1)]
        graph = make_graph(self.nodes, "early_exit", inputs, outputs, self.weights)
        return make_model(graph, functions=self.functions.values(), opset_imports=versions, ir_version=IR_VERSION)


def export_graph(
    model: MultiExitModel, bag: NgramExit, threshold: float, rule: CombinedRule, int8: bool = False
) -> ModelProto:
    """The graph of a bag of words and a model, with a rule for their exits. `threshold` is the default of an input.

    With `int8` weights have eight bits, with a scale per column. Seven of them are used: with all, products overflow on
    processors without VNNI. The bag of words stays as it is: one scale for its whole table would change its answers.
    Activations have one scale for all that runs at once, so that such a file takes one text at a time.
    """
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder, ExitStack() as after:
        after.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)  # the exporters say much about themselves
        warnings.simplefilter("ignore")
        file = inline_local_functions(Writer(model, bag).write())
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
    del file.graph.input[-len(RULE) :]  # which are constants from here on
    set_rule(file, threshold, rule)
    return file


def set_rule(file: ModelProto, threshold: float, rule: CombinedRule) -> None:
    """Give a file, in place, a default threshold and a rule."""
    weights = (rule.weights / rule.temperatures[0]).numpy()
    new = {"threshold": np.array(threshold), "temperatures": rule.temperatures.numpy(), "weights": weights}
    kept = [value for value in file.graph.initializer if value.name not in new]
    del file.graph.initializer[:]
    file.graph.initializer.extend(kept + [from_array(value.astype(np.float32), name) for name, value in new.items()])


def graphs_in(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph, and all graphs in it."""
    yield graph
    for attribute in (attribute for node in graph.node for attribute in node.attribute if attribute.HasField("g")):
        yield from graphs_in(attribute.g)
