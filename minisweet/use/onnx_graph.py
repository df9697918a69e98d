"""How a model becomes one ONNX graph that leaves early by itself.

An ONNX graph is fixed, but for its node `If`, which runs one of two inner graphs. So the file is a graph in a graph in
a graph. For exits 0, 2 and 6:

    exit 0 answers all rows                                              "ask 0"
    If rows stay, which are those whose confidence is too low:
        these rows alone are embedded, and run through layer 1           "go 0"
        exit 2 answers them                                              "ask 1"
        If rows stay:
            these rows alone run through layers 2 to 5                   "go 1"
            exit 6 answers them                                          "ask 2"
            its answers replace those of exit 2 in these rows            (ScatterND)
        the answers of exits 2 and 6 replace those of exit 0 in these rows

At threshold 1 no exit but the last is asked: another `If` runs "skip k" in place of "ask k", and all rows stay.

torch exports no such graph. So each piece is a function of its own, with inputs of its own. torch exports them side by
side in one flat graph (`export_pieces`), and `join` puts one piece into the other.

Dimension letters: B rows of a batch, M of them that stay, T tokens, D hidden size, K exits, C classes.
"""

import copy
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence

import onnx
import onnxscript  # noqa: F401  torch's exporter imports it, late
import torch
import torch.nn.functional as F
from onnx import GraphProto, ModelProto, NodeProto, TensorProto
from onnx.helper import make_graph, make_model, make_node, make_tensor
from onnx.helper import make_tensor_value_info as make_value
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn

from minisweet.exits import MultiExitModel

OPSET, IR_VERSION = 20, 10  # ONNX Runtime reads both from 1.18 on
INPUTS, OUTPUTS = ("input_ids", "attention_mask", "token_type_ids"), ("probabilities", "confidence", "exit_layer")
FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


class Pieces(nn.Module):
    """The pieces of a model, as functions of the exit's number k, from 0, and of tensors.

    What goes from one exit to the next is the state: tokens (ids, mask, types) up to exit 0, and from then on the
    hidden states before the next exit's layer, with the encoder's context.
    """

    def __init__(self, model: MultiExitModel) -> None:
        super().__init__()
        model = copy.deepcopy(model)  # what is set below is for the export alone
        self.exit_layers, self.C = model.exit_layers, model.num_labels
        self.ngrams, self.encoder, self.heads = model.ngrams, model.encoder, model.heads
        # Each exit has a layer of its own, as branches do. Weights that two pieces share are slow, see `with_weights`.
        self.layers = nn.ModuleList(copy.deepcopy(model.layer_of_exit(n)) for n in model.head_layers)
        self.requires_grad_(False).eval()
        for layer in (*self.encoder.layers, *self.layers):
            layer.training = True  # of the layer itself, not of its dropout: BERT then writes its attention out, in
            # fewer nodes than those of torch's own

    def start(self, k: int, *tokens: Tensor) -> tuple[Tensor, ...]:
        """Tokens, (B, T) each, to the state at exit k, before which nobody leaves."""
        if self.exit_layers[k] == 0:
            return tokens
        input_ids, mask, types = tokens
        hidden, context = self.encoder.embed(input_ids, types), self.encoder.context(mask)
        for layer in self.encoder.layers[: self.exit_layers[k] - 1]:
            hidden = layer(hidden, context)
        return hidden, *context

    def ask(self, k: int, temperature: Tensor, threshold: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """What exit k says, (B, C+1): probabilities and its layer. Except at the last exit: who stays, rows (M, 1)."""
        if self.exit_layers[k] == 0:
            logits = self.ngrams(*state)
        else:
            j = k - (self.ngrams is not None)  # exit 0 has neither head nor layer
            logits, _ = self.heads[j](self.layers[j](state[0], state[1:], rows=1))
        probabilities = (logits / temperature).softmax(-1)
        answer = F.pad(probabilities, (0, 1), value=float(self.exit_layers[k]))
        stays = (probabilities.amax(-1) < threshold) & (threshold > 1 / self.C)  # see `leaves` of adaptive.py
        return (answer,) if k == len(self.exit_layers) - 1 else (answer, stays.nonzero())

    def skip(self, _: int, first: Tensor) -> tuple[Tensor, Tensor]:
        """In place of "ask": no answer, (B, C+1), and all rows, (B, 1). Of the state it reads the first tensor's B."""
        return torch.zeros(first.shape[0], self.C + 1), torch.arange(first.shape[0])[:, None]

    def go(self, k: int, rows: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """The state at the next exit, of the rows (M, 1) that stay."""
        if self.exit_layers[k] == 0:
            return self.start(k + 1, *(tokens.index_select(0, rows[:, 0]) for tokens in state))
        hidden, bias = (x.index_select(0, rows[:, 0]) for x in state[:2])
        context = bias, *state[2:]  # only the first tensor of a context has a row for each text
        for layer in self.encoder.layers[self.exit_layers[k] - 1 : self.exit_layers[k + 1] - 1]:
            hidden = layer(hidden, context)
        return hidden, *context

    def end(self, _: int, answer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities (B, C), confidence (B,) and exit layer (B,), int64."""
        return answer[:, :-1], answer[:, :-1].amax(-1), answer[:, -1].long()

    def forward(self, inputs: dict[str, tuple[Tensor, ...]]) -> dict[str, tuple[Tensor, ...]]:
        """The outputs of pieces such as "ask.0", each of its own inputs."""
        return {name: getattr(self, name.split(".")[0])(int(name.split(".")[1]), *inputs[name]) for name in inputs}

    def example(self) -> dict[str, tuple[Tensor, ...]]:
        """Inputs of all pieces, with B = M = 3 and T = 7."""
        number, rows, tokens = torch.ones(()), torch.arange(3)[:, None], (torch.ones(3, 7).long(),) * 3
        inputs = {"start.0": tokens, "end.0": (torch.zeros(3, self.C + 1),)}
        state = self.start(0, *tokens)
        for k in range(len(self.exit_layers)):
            inputs[f"ask.{k}"] = (number, number, *state)
            if k < len(self.exit_layers) - 1:
                inputs |= {f"skip.{k}": state[:1], f"go.{k}": (rows, *state)}
                state = self.go(k, rows, *state)
        # Clones, since torch.export would merge equal tensors into one input.
        return {name: tuple(x.clone() for x in values) for name, values in inputs.items()}


def export_pieces(model: MultiExitModel, int8: bool) -> ModelProto:
    """Have torch export all pieces of a model, side by side; with `int8`, with weights of eight bits.

    int8 has a scale per column, and ONNX Runtime quantises activations as they come. Seven of the eight bits are used:
    with all of them, products overflow on processors without VNNI. Exit 0 stays as it is: it has no products, and one
    scale for its whole table would change its answers.
    """
    pieces = Pieces(model)
    inputs = pieces.example()
    sizes = {name: tuple(dict.fromkeys(range(x.ndim), torch.export.Dim.AUTO) for x in inputs[name]) for name in inputs}
    options = {"dynamo": True, "optimize": True, "external_data": False, "verbose": False, "opset_version": OPSET}
    options["input_names"] = [f"{name}.in.{i}" for name, values in inputs.items() for i in range(len(values))]
    options["output_names"] = [f"{name}.out.{i}" for name, values in pieces(inputs).items() for i in range(len(values))]
    logging.disable(logging.WARNING)  # the exporters say much about themselves
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        program = torch.export.export(pieces, (inputs,), dynamic_shapes=(sizes,), strict=False)
        flat = torch.onnx.export(program, **options).model_proto
        if int8:
            kept = [node.name for node in piece(flat, "ask.0")[0]] if model.ngrams is not None else []
            options = {"weight_type": QuantType.QInt8, "per_channel": True, "reduce_range": True}
            quantize_dynamic(flat, f"{folder}/int8.onnx", nodes_to_exclude=kept, **options)
            flat = onnx.load(f"{folder}/int8.onnx")
    logging.disable(logging.NOTSET)
    return flat


Part = tuple[list[NodeProto], list[str]]  # nodes, and what they make


def piece(flat: ModelProto, name: str, *inputs: str) -> Part:
    """A copy of a piece, such as "ask.0", which reads these values. Nothing where there is no such piece."""
    given = {f"{name}.in.{i}": value for i, value in enumerate(inputs)}
    outputs = [value.name for value in flat.graph.output if value.name.startswith(f"{name}.out.")]
    wanted, found = set(outputs), []
    for node in reversed(flat.graph.node):
        if wanted & set(node.output):
            wanted |= set(node.input)
            found.append(copy.deepcopy(node))
            found[-1].input[:] = [given.get(value, value) for value in node.input]
    return found[::-1], outputs


def join(flat: ModelProto, num_labels: int, threshold: float, temperatures: Sequence[float]) -> ModelProto:
    """The graph that leaves early, as the module's docstring shows it. `threshold` is an input, with this default."""

    def either(condition: str, made: list[str], *ways: Part) -> NodeProto:
        """An `If` that makes an answer, or an answer and rows, in one of two ways."""
        graphs = []
        for nodes, names in ways:
            values = [make_value(name, kind, None) for name, kind in zip(names, (FLOAT, INT64), strict=False)]
            graphs.append(make_graph(nodes, names[0], [], values))
        return make_node("If", [condition], made, then_branch=graphs[0], else_branch=graphs[1])

    def from_exit(k: int, state: Sequence[str]) -> Part:
        """The nodes from exit k on, for the rows that come so far, which make the answers of these rows."""
        said, rows, answer = f"said.{k}", f"rows.{k}", f"answer.{k}"
        ask = piece(flat, f"ask.{k}", f"temperature.{k}", "threshold", *state)
        go, next_state = piece(flat, f"go.{k}", rows, *state)
        if not go:  # the last exit
            return ask
        later, (of_later,) = from_exit(k + 1, next_state)
        replace = make_node("ScatterND", [said, rows, of_later], [f"replaced.{k}"])
        keep = make_node("Identity", [said], [f"kept.{k}"])
        return [
            either("asks", [said, rows], ask, piece(flat, f"skip.{k}", state[0])),
            make_node("Size", [rows], [f"count.{k}"]),
            make_node("Cast", [f"count.{k}"], [f"stay.{k}"], to=BOOL),
            either(f"stay.{k}", [answer], ([*go, *later, replace], replace.output), ([keep], keep.output)),
        ], [answer]

    nodes, state = piece(flat, "start.0", *INPUTS)
    exits, answer = from_exit(0, state)
    end, results = piece(flat, "end.0", *answer)
    nodes += [make_node("Less", ["threshold", "one"], ["asks"]), *exits, *end]
    nodes += [make_node("Identity", [value], [name]) for value, name in zip(results, OUTPUTS, strict=True)]
    kinds = (FLOAT, ["batch", num_labels]), (FLOAT, ["batch"]), (INT64, ["batch"])
    outputs = [make_value(name, *kind) for name, kind in zip(OUTPUTS, kinds, strict=True)]
    numbers = {f"temperature.{k}": temperature for k, temperature in enumerate(temperatures)}
    model = with_weights(flat, nodes, outputs, numbers | {"one": 1.0, "threshold": threshold})
    model.graph.input.append(make_value("threshold", FLOAT, []))
    return model


def join_all_exits(flat: ModelProto) -> ModelProto:
    """A graph in which all exits answer all rows, at temperature 1: K outputs (B, C+1). Nobody leaves."""
    nodes, state = piece(flat, "start.0", *INPUTS)
    outputs: list = []
    while state:
        k = len(outputs)
        ask, (answer, *rows) = piece(flat, f"ask.{k}", "temperature", "threshold", *state)
        go, state = piece(flat, f"go.{k}", *rows, *state)  # empty after the last exit
        nodes += [*ask, *go]
        outputs.append(make_value(answer, FLOAT, None))
    return with_weights(flat, nodes, outputs, {"temperature": 1.0, "threshold": 2.0})  # all confidences are below 2


def with_weights(flat: ModelProto, nodes: list, outputs: list, numbers: dict[str, float]) -> ModelProto:
    """A model of joined nodes and its outputs, with the weights and the numbers that the nodes read.

    Weights that one graph alone reads are put into that graph, not into one around it: only there ONNX Runtime packs
    them. The shapes that torch knows are left out: with them it fuses sums and LayerNorms, which makes batches slower.
    """
    inputs = [make_value(name, INT64, ["batch", "tokens"]) for name in INPUTS]
    model = make_model(make_graph(nodes, "early_exit", inputs, outputs), opset_imports=flat.opset_import)
    model.ir_version, weights = IR_VERSION, {weight.name: weight for weight in flat.graph.initializer}
    graphs = list(graphs_in(model.graph))
    read = [sorted({name for node in graph.node for name in node.input} & weights.keys()) for graph in graphs]
    readers = Counter(sum(read, []))
    for graph, names in zip(graphs, read, strict=True):
        graph.initializer.extend(weights[name] for name in names if readers[name] == 1)
    model.graph.initializer.extend(weights[name] for name in sorted(readers) if readers[name] > 1)
    model.graph.initializer.extend(make_tensor(name, FLOAT, [], [number]) for name, number in numbers.items())
    return model


def graphs_in(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph, and all graphs in it."""
    yield graph
    for attribute in (attribute for node in graph.node for attribute in node.attribute if attribute.HasField("g")):
        yield from graphs_in(attribute.g)
