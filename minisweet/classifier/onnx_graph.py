"""How a model becomes one ONNX graph with early exit inside.

torch exports each kind of step once, as a function with weights as inputs: the embeddings, a layer, an exit, the bag of
words. `Writer` writes the graph that calls them. ONNX's node `If` runs one of two inner graphs, and so the file is a
graph in a graph in a graph. For exits 0 (the bag of words), 2 and 6:

    exit 0 answers all rows
    If rows stay, which are those whose confidence is too low:
        these rows alone are embedded, and run through layer 1
        exit 2 answers them
        If rows stay:
            these rows alone run through layers 2 to 5
            exit 6 answers them, and its answers replace those of exit 2 in these rows
        the answers of exits 2 and 6 replace those of exit 0 in these rows

At threshold 1 another `If` skips all exits but the last, and all rows stay. Of a batch's B rows, M reach an exit.
"""

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial

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
from minisweet.exits import MultiExitModel
from minisweet.layers import Dropout

OPSET, IR_VERSION = 20, 10  # ONNX Runtime reads both from 1.18 on
INPUTS, OUTPUTS = ("input_ids", "attention_mask", "token_type_ids"), ("probabilities", "confidence", "exit_layer")
RULE = ("temperatures", "weights")  # (K,): what logits are divided by, and how much the bag's logits count
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

    The `state` of rows is what the next exit starts from: tokens, or hidden states and context. An exit's answers
    (M, C+2) are probabilities, confidence and layer.
    """

    def __init__(self, model: MultiExitModel, bag: NgramExit | None, combines: bool) -> None:
        self.combines = combines  # whether the bag of words contributes to later exits
        self.bag = bag
        self.model = copy.deepcopy(model).requires_grad_(False).train()
        self.exit_layers = model.exit_layers if bag is None else (0, *model.exit_layers)
        for module in self.model.modules():
            if isinstance(module, Dropout):  # attention as in training is fewer nodes than torch's own
                module.p = 0.0
        encoder, layer, head = self.model.encoder, self.model.encoder.layers[0], self.model.heads[0]
        start = Step(lambda encoder, ids, mask, types: (encoder.embed(ids, types), *encoder.context(mask)), encoder)
        go = Step(lambda layer, hidden, *context: layer(hidden, context), layer)
        ask = Step(lambda layer, head, hidden, *context: head(layer(hidden, context, tokens=1))[0], layer, head)
        tokens = [torch.ones(3, 7).long() for _ in INPUTS]
        steps = {"start": (start, tokens), "go": (go, start(*tokens)), "ask": (ask, start(*tokens))}
        if bag is not None:
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

    def go(self, k: int, state: Sequence[str]) -> list[str]:
        """The state before exit k's layer, from the state at the exit before."""
        n, done = self.exit_layers[k], self.exit_layers[k - 1] - 1 if k else -1
        if n == 0:
            return list(state)
        if done < 0:
            state = self.call("start", "start", [self.model.encoder], *state)
            done = 0
        hidden, *context = state
        for i in range(done, n - 1):
            (hidden,) = self.call("go", f"layers.{i}", [self.model.encoder.layers[i]], hidden, *context)
        return [hidden, *context]

    def ask_bag(self, state: list[str]) -> str:
        """The logits (M, C) of the bag of words."""
        return self.call("ask_bag", "bag_of_words", [self.bag], *state[:2])[0]

    def ask(self, k: int, state: list[str], bag_logits: str | None) -> str:
        """Exit k's answers (M, C+2). `bag_logits` are None if they are not needed."""
        add, model, n = self.add, self.model, self.exit_layers[k]
        place = add("Constant", value_int=k)
        if n == 0:
            logits = bag_logits or self.ask_bag(state)
        else:
            modules = model.layer_of_exit(n), model.heads[model.exit_layers.index(n)]
            (logits,) = self.call("ask", f"exits.{n}", modules, *state)
        calibrated = add("Div", logits, add("Gather", "temperatures", place))
        if bag_logits and k:
            calibrated = add("Add", calibrated, add("Mul", bag_logits, add("Gather", "weights", place)))
        probabilities = add("Softmax", calibrated)
        confidence = add("ReduceMax", probabilities, add("Constant", value_ints=[-1]))
        answers = add("Concat", probabilities, confidence, axis=1)  # (M, C+1)
        layer = add("Constant", value_float=float(n))
        return add("Pad", answers, add("Constant", value_ints=[0, 0, 0, 1]), layer)

    def from_exit(self, k: int, state: list[str], bag_logits: str | None = None) -> str:
        """The answers (M, C+2) of exit k and of later exits to the rows that come to exit k."""
        add = self.add
        if k == len(self.exit_layers) - 1:
            return self.ask(k, state, bag_logits)
        if k == 0 and self.combines:
            bag_logits = self.ask_bag(state)

        def skip() -> str:  # zeros in place of answers
            rows = add("Shape", state[0], end=1)
            columns = add("Constant", value_ints=[self.model.num_labels + 2])
            return add("ConstantOfShape", add("Concat", rows, columns, axis=0))

        answers = self.either("asks", partial(self.ask, k, state, bag_logits), skip)
        confidence = add("Gather", answers, add("Constant", value_int=self.model.num_labels), axis=1)  # (M,)
        stays = add("NonZero", add("Not", add("GreaterOrEqual", confidence, "limit")))
        rows = add("Squeeze", stays, add("Constant", value_ints=[0]))

        def later() -> str:
            of_rows = 3 if self.exit_layers[k] == 0 else 2  # all tokens; or hidden states and the context's first
            kept = [add("Gather", x, rows) for x in state[:of_rows]] + state[of_rows:]
            of_bag = bag_logits and add("Gather", bag_logits, rows)
            replaced = self.from_exit(k + 1, self.go(k + 1, kept), of_bag)
            return add("ScatterND", answers, add("Unsqueeze", rows, add("Constant", value_ints=[1])), replaced)

        return self.either(add("Cast", add("Size", rows), to=BOOL), later, lambda: answers)

    def write(self) -> ModelProto:
        """Write the whole graph. Besides the inputs of the file it has temperatures and weights, (K,) each."""
        add, C = self.add, self.model.num_labels
        zero, one, lowest = (add("Constant", value_float=value) for value in (0.0, 1.0, 1 / C))
        start, axis, end = (add("Constant", value_ints=[value]) for value in (0, -1, C))
        # As `leaves` of adaptive.py. At threshold 1 all stay, since the confidence of what is skipped is 0.
        add("Where", add("LessOrEqual", "threshold", lowest), zero, "threshold", outputs=["limit"])
        add("Less", "threshold", one, outputs=["asks"])
        answers = self.from_exit(0, self.go(0, INPUTS))  # (B, C+2)
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
    model: MultiExitModel, bag: NgramExit | None, threshold: float, rule: CombinedRule, int8: bool = False
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
        file = inline_local_functions(Writer(model, bag, rule.needs_bag).write())
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
    weights = rule.weights / rule.temperatures[0] if rule.needs_bag else torch.zeros_like(rule.weights)
    new = {"threshold": np.array(threshold), "temperatures": rule.temperatures.numpy(), "weights": weights.numpy()}
    kept = [value for value in file.graph.initializer if value.name not in new]
    del file.graph.initializer[:]
    file.graph.initializer.extend(kept + [from_array(value.astype(np.float32), name) for name, value in new.items()])


def graphs_in(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph, and all graphs in it."""
    yield graph
    for attribute in (attribute for node in graph.node for attribute in node.attribute if attribute.HasField("g")):
        yield from graphs_in(attribute.g)
