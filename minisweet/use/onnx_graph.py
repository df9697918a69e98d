"""How a model becomes one ONNX graph that leaves early by itself.

torch exports `torch.cond`, which runs one of two functions, as ONNX's node `If`, which runs one of two inner graphs.
Here each exit runs all later ones in a function of its own, and so the file is a graph in a graph in a graph. For exits
0, 2 and 6:

    exit 0 answers all rows
    If rows stay, which are those whose confidence is too low:
        these rows alone are embedded, and run through layer 1
        exit 2 answers them
        If rows stay:
            these rows alone run through layers 2 to 5
            exit 6 answers them, and its answers replace those of exit 2 in these rows
        the answers of exits 2 and 6 replace those of exit 0 in these rows

At threshold 1 no exit but the last is asked, by another `If`, and all rows stay.

Dimension letters: B rows of a batch, M of them that stay, T tokens, D hidden size, K exits, C classes.
"""

import copy
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence

import onnx
import torch
import torch.nn.functional as F
from onnx import GraphProto, ModelProto, TensorProto
from onnx.helper import make_tensor
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxscript import opset20
from torch import Tensor, nn

from minisweet.exits import MultiExitModel

OPSET, IR_VERSION = 20, 10  # ONNX Runtime reads both from 1.18 on
INPUTS, OUTPUTS = ("input_ids", "attention_mask", "token_type_ids"), ("probabilities", "confidence", "exit_layer")


class EarlyExit(nn.Module):
    """A model that leaves early by itself, row by row. Exits are counted from 0.

    What goes from one exit to the next is the state: tokens (ids, mask, types) up to exit 0, and from then on the
    hidden states before the next exit's layer, with the mask.
    """

    def __init__(self, model: MultiExitModel, temperatures: Sequence[float]) -> None:
        super().__init__()
        self.model, self.temperatures = copy.deepcopy(model), temperatures  # a copy, since the export alone needs this:
        # Each exit has a layer of its own, as branches do. Weights that two graphs share are slow, see `move_weights`.
        self.layers = nn.ModuleList(copy.deepcopy(model.layer_of_exit(n)) for n in model.head_layers)
        self.requires_grad_(False).eval()
        for layer in (*self.model.encoder.layers, *self.layers):
            layer.training = True  # of the layer itself, not of its dropout: BERT then writes its attention out, in
            # fewer nodes than those of torch's own

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, threshold: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, T) and a number to probabilities (B, C), confidence (B,) and exit layer (B,), int64."""
        answer = self.from_exit(0, threshold, self.go(0, (input_ids, attention_mask, token_type_ids)))
        return answer[:, :-1], answer[:, :-1].amax(-1), answer[:, -1].long()

    def from_exit(self, k: int, threshold: Tensor, state: Sequence[Tensor]) -> Tensor:
        """The answers (B, C+1), from exit k on, of the rows that come so far: probabilities, and the exit's layer."""
        if k == len(self.temperatures) - 1:
            return self.ask(k, *state)

        def ask(*state: Tensor) -> Tensor:
            return self.ask(k, *state)

        def skip(*state: Tensor) -> Tensor:
            return torch.zeros(len(state[0]), self.model.num_labels + 1)

        def go(said: Tensor, stays: Tensor, threshold: Tensor, *state: Tensor) -> Tensor:
            rows = stays.nonzero()[:, 0]  # (M,)
            later = self.go(k + 1, [x.index_select(0, rows) for x in state])
            return said.index_copy(0, rows, self.from_exit(k + 1, threshold, later))

        def keep(said: Tensor, *_: Tensor) -> Tensor:
            return said.clone()

        said = torch.cond(threshold < 1, ask, skip, tuple(state))
        # As `leaves` of adaptive.py. At threshold 1 all stay, since 0 was said.
        stays = ~((said[:, :-1].amax(-1) >= threshold) | (threshold <= 1 / self.model.num_labels))  # (B,)
        return torch.cond(stays.any(), go, keep, (said, stays, threshold, *state))

    def ask(self, k: int, *state: Tensor) -> Tensor:
        """What exit k says, (B, C+1)."""
        n = self.model.exit_layers[k]
        if n == 0:
            logits = self.model.ngrams(*state)
        else:
            (hidden, mask), j = state, self.model.head_layers.index(n)
            logits, _ = self.model.heads[j](self.layers[j](hidden, self.model.encoder.context(mask), rows=1))
        return F.pad((logits / self.temperatures[k]).softmax(-1), (0, 1), value=float(n))

    def go(self, k: int, state: Sequence[Tensor]) -> Sequence[Tensor]:
        """The state at exit k, from the state at the exit before, or from tokens."""
        n, encoder, done = self.model.exit_layers[k], self.model.encoder, 0
        if n == 0:
            return state
        if len(state) == 3:
            ids, mask, types = state
            hidden = encoder.embed(ids, types)
        else:
            (hidden, mask), done = state, self.model.exit_layers[k - 1] - 1
        context = encoder.context(mask)
        for layer in encoder.layers[done : n - 1]:
            hidden = layer(hidden, context)
        return hidden, mask


def export_graph(
    model: MultiExitModel, threshold: float, temperatures: Sequence[float], int8: bool = False
) -> ModelProto:
    """The graph of a model, with a temperature for each exit. `threshold` is an input, with this default.

    With `int8` weights have eight bits, with a scale per column, and ONNX Runtime quantises activations as they come.
    Seven of the eight bits are used: with all of them, products overflow on processors without VNNI. Exit 0 stays as it
    is: it has no products, and one scale for its whole table would change its answers.
    """
    tokens, sizes = torch.ones(3, 7).long(), dict.fromkeys((0, 1), torch.export.Dim.AUTO)
    # Clones, since torch.export would merge equal tensors into one input.
    inputs, shapes = (tokens, tokens.clone(), tokens.clone(), torch.ones(())), (sizes, sizes, sizes, {})
    options = {"dynamo": True, "external_data": False, "verbose": False, "opset_version": OPSET}
    options["output_names"] = OUTPUTS  # inputs are named as those of `forward`
    options["custom_translation_table"] = {torch.ops.aten.sym_stride.int: stride}
    logging.disable(logging.WARNING)  # the exporters say much about themselves
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        program = torch.export.export(EarlyExit(model, temperatures), inputs, dynamic_shapes=shapes, strict=False)
        file = torch.onnx.export(program, **options).model_proto
        if int8:
            nodes = [node for graph in graphs_in(file.graph) for node in graph.node]
            kept = [node.name for node in nodes if "model.ngrams.table" in node.input]
            options = {"weight_type": QuantType.QInt8, "per_channel": True, "reduce_range": True}
            options |= {"nodes_to_exclude": kept, "extra_options": {"EnableSubgraph": True}}
            quantize_dynamic(file, f"{folder}/int8.onnx", **options)
            file = onnx.load(f"{folder}/int8.onnx")
    logging.disable(logging.NOTSET)
    move_weights(file.graph)
    file.graph.initializer.append(make_tensor("threshold", TensorProto.FLOAT, [], [threshold]))
    for value in (*file.graph.input, *file.graph.output):
        for size, name in zip(value.type.tensor_type.shape.dim, ("batch", "tokens"), strict=False):
            if size.dim_param:  # torch's own name, such as s21
                size.dim_param = name
    file.ir_version = IR_VERSION
    return file


def stride(x, dim: int):
    """How far apart the entries of a dimension lie, which torch may ask of a tensor instead of a size."""
    return opset20.ReduceProd(opset20.Shape(x, start=dim + 1), keepdims=0)


def move_weights(top: GraphProto) -> None:
    """Put weights that one graph alone reads into that graph: only there ONNX Runtime packs them.

    What torch says of each node goes: the shapes, with which ONNX Runtime fuses sums and LayerNorms, which makes
    batches slower; and where in the code it comes from, which takes as much room as the weights.
    """
    graphs, weights = list(graphs_in(top)), {weight.name: weight for weight in top.initializer}
    read = [sorted({name for node in graph.node for name in node.input} & weights.keys()) for graph in graphs]
    readers = Counter(sum(read, []))
    del top.initializer[:]
    for graph, names in zip(graphs, read, strict=True):
        graph.initializer.extend(weights[name] for name in names if readers[name] == 1)
        del graph.value_info[:], graph.metadata_props[:]
        for node in graph.node:
            del node.metadata_props[:]
    top.initializer.extend(weights[name] for name in sorted(readers) if readers[name] > 1)


def graphs_in(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph, and all graphs in it."""
    yield graph
    for attribute in (attribute for node in graph.node for attribute in node.attribute if attribute.HasField("g")):
        yield from graphs_in(attribute.g)
