"""A run as one ONNX file that leaves early by itself: `python -m minisweet.export RUN --onnx FILE.onnx`.

torch exports the model in pieces, side by side in one flat graph. Each piece has inputs of its own, since fewer rows
enter it than the one before. `joined` then puts one into the other:

    start                  the layers before the first exit's
    ask k                  what exit k says of each row, and which rows stay; at threshold 1 skip k instead: all stay
    If there are such:     go k, for them alone: the layers up to the next exit's; then ask k+1, and so on;
                           what later exits say takes the place (ScatterND) of what exit k has said
    end                    probabilities, confidence, and the layer of the exit taken

Dimension letters: B rows, M of them that stay, T tokens, D hidden size, K exits, C classes, N validation rows.
"""

import json
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import onnxscript  # noqa: F401  torch's exporter imports it, late
import torch
import torch.nn.functional as F
from onnx import TensorProto
from onnx.helper import make_graph, make_model, make_node, make_tensor, make_tensor_value_info, set_model_props
from onnxruntime.quantization import QuantType, quantize_dynamic
from tokenizers import Tokenizer
from torch import Tensor, nn

from minisweet.adaptive import ExitRule
from minisweet.base.commands import Progress
from minisweet.base.safe import InputError, written_beside
from minisweet.branches import BranchModel
from minisweet.data.load import ChangedRows, load_dev
from minisweet.data.text import PAD, Batch, TokenizedExamples, load_tokenizer
from minisweet.evaluation.metrics import score
from minisweet.evaluation.operating import not_certified
from minisweet.evaluation.sweep import Validation, sweep, validate
from minisweet.evaluation.timing import differences
from minisweet.exits import MultiExitModel, MultiModel
from minisweet.runs.folders import load_run, read_evaluation, versions

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET, IR_VERSION = 20, 10  # ONNX Runtime reads both from 1.18 on
LARGEST = 2**31  # bytes of a protocol buffer
INPUTS, OUTPUTS = (*Batch._fields[1:4], "threshold"), ("probabilities", "confidence", "exit_layer")
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
ROUNDING = 1e-4  # moves a probability by less


def export_onnx(
    run: Path, out: Path, int8: bool = False, data: Path | None = None, data_dir: Path | None = None
) -> list[str]:
    """Write one file of a run, whole or not at all, and run the validation rows through it before it is there.

    `data` and `data_dir` are as in `load_dev`. Returns what came out, a line each.

    Raises InputError for an `out` that exists or is no .onnx, no run, one without an evaluation, of Multi-Model or of
    learning-to-exit, more than 2 GiB, and in float32 for answers that differ from the model's by more than rounding.
    """
    if out.suffix != ".onnx":
        raise InputError(f"--onnx: {out} should end in .onnx")
    if out.exists() or out.is_symlink():
        raise InputError(f"--onnx: {out} exists already; name a new file")
    model, record = load_run(run)
    if record.exit_strategy == "lte" or isinstance(model, MultiModel):
        what = "learning-to-exit (lte)" if record.exit_strategy == "lte" else "Multi-Model (mm)"
        raise InputError(f"--onnx: {run} is a run of {what}; the file is for one model whose exits have a confidence")
    if (evaluation := read_evaluation(run, record)) is None:
        raise InputError(f"--onnx: {run} has no evaluation.json, which tells the threshold; first: evaluate.py {run}")
    rule, threshold = ExitRule.from_evaluation(evaluation, record.num_labels), evaluation.operating_point.threshold
    model = model.keep_exits(evaluation.exit_layers)
    pieces, tokenizer = Pieces(model, rule), load_tokenizer(run, record.vocab_size, record.max_length)
    if (size := 4 * sum(weights.numel() for weights in pieces.parameters())) >= LARGEST:
        raise InputError(f"--onnx: {run} would take {size:,} bytes, and an ONNX file holds less than {LARGEST:,}")
    try:
        rows = load_dev(vars(record), data, data_dir)
    except InputError as error:
        if data or data_dir or isinstance(error, ChangedRows):
            raise
        rows, found = None, f"nothing was checked, since the validation rows are not at hand: {error}"

    flat, *names = flat_graph(pieces)
    # A threshold just below 1 must not become 1 in float32: there no exit but the last is asked.
    nearest = 1.0 if threshold == 1 else min(np.float32(threshold), np.nextafter(np.float32(1), np.float32(0)))
    file = joined(quantized(flat) if int8 else flat, *names, nearest, record.num_labels)
    padding = Tokenizer.from_str(tokenizer.to_str())
    padding.enable_padding(pad_id=tokenizer.token_to_id(PAD))
    told = {"labels": record.labels, "exit_layers": model.exit_layers, "max_length": record.max_length}
    told |= {"threshold": threshold, "versions": versions() | {name: version(name) for name in PACKAGES}}
    set_model_props(file, {"tokenizer": padding.to_str()} | {key: json.dumps(value) for key, value in told.items()})
    with written_beside(out, overwrite=False) as partial:
        partial.write_bytes(file.SerializeToString())
        if rows:
            examples = TokenizedExamples(tokenizer, rows)
            expected = validate(model, record, rows, examples, evaluation.metric, None, "model")
            found = compared(partial, examples, expected, rule, threshold, int8)
    kind, megabytes = "int8" if int8 else "float32", f"{out.stat().st_size / 1e6:.1f} MB"
    layers = ",".join(map(str, model.exit_layers))
    lines = [f"{out}: {kind}, {megabytes}, exits after layers {layers}, by default at threshold {threshold:.6g}", found]
    return lines + list(filter(None, [not_certified(evaluation.operating_point.wish, threshold, evaluation, kind)]))


def compared(
    path: Path, examples: TokenizedExamples, expected: Validation, rule: ExitRule, threshold: float, int8: bool
) -> str:
    """What a file says of texts, in batches of 32, beside what the model's exits say of them, in a line.

    Raises InputError where they differ in float32, by more than rounding.
    """
    labels, taken = answers_of_file(path, examples, expected.exits.layers)
    share = 100 * np.array(expected.exits.costs(threshold))[taken].mean()
    value = score(labels.numpy(), expected.labels.numpy(), expected.metric)
    found = f"{len(taken):,} validation rows: {expected.metric} {value:.1f} with {share:.1f}% of the layers"
    if int8:
        swept, _ = sweep([(rule, torch.arange(len(taken)))], expected, [threshold])
        return f"{found}; float32: {swept['scores'][0]:.1f} with {100 * swept['speedup_ratios'][0]:.1f}%"
    differ, near = differences(labels[None], taken[None], rule, expected, [threshold], ROUNDING)
    if differ > near:
        raise InputError(f"--onnx: not written: {differ - near} of {len(taken)} answers are not the model's")
    return f"{found}; labels and exits are the model's" + f", but for {differ} that rounding decides" * bool(differ)


def answers_of_file(path: Path, examples: TokenizedExamples, exit_layers: Sequence[int]) -> Tensor:
    """The labels and the exits from 0, (2, N)."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # else it warns that the threshold is no constant
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    answers = torch.empty(2, len(examples), dtype=torch.long)
    for batch in Progress(list(examples.by_length(32)), desc="file", unit="batch"):
        probabilities, _, layers = session.run(None, dict(zip(INPUTS, map(Tensor.numpy, batch.inputs), strict=False)))
        exits = np.searchsorted(exit_layers, layers)
        answers[:, batch.rows] = torch.from_numpy(np.stack([probabilities.argmax(-1), exits]))
    return answers


class Pieces(nn.Module):
    """A run's model in pieces, with a rule's temperatures. Each exit has its own layer here, as with branches."""

    def __init__(self, model: MultiExitModel, rule: ExitRule) -> None:
        super().__init__()
        self.model, self.exit_layers, self.C = model, model.exit_layers, model.num_labels
        self.temperatures, self.lowest = rule.temperatures.tolist(), rule.lowest
        if not isinstance(model, BranchModel):
            self.model = BranchModel(model.encoder, self.exit_layers, self.C)
            self.model.heads = model.heads
        self.requires_grad_(False).eval()

    def example(self) -> dict[str, tuple[Tensor, ...]]:
        """Inputs of all pieces, with B = M = 3 and T = 7."""
        ids, rows, number = torch.ones(3, 7).long(), torch.ones(3, 1).long(), torch.ones(())
        state = (torch.zeros(3, 7, self.model.encoder.config.hidden_size), *self.model.encoder.context(ids))
        pieces: dict[str, tuple[Tensor, ...]] = {"start.0": (ids, ids, ids, number)}
        for k, n in enumerate(self.exit_layers):
            pieces[f"ask.{k}"] = (number, *state)
            if n < self.exit_layers[-1]:
                pieces |= {f"skip.{k}": state[:1], f"go.{k}": (rows, *state)}
        pieces["end.0"] = (torch.zeros(3, self.C + 1),)
        return {name: tuple(x.clone() for x in inputs) for name, inputs in pieces.items()}  # else some are one

    def forward(self, inputs: dict[str, tuple[Tensor, ...]]) -> dict[str, tuple[Tensor, ...]]:
        """All pieces' outputs."""
        return {name: getattr(self, name.split(".")[0])(int(name.split(".")[1]), *inputs[name]) for name in inputs}

    def start(self, _: int, input_ids: Tensor, mask: Tensor, types: Tensor, threshold: Tensor) -> tuple[Tensor, ...]:
        """Whether exits before the last are asked, below which confidence a row stays, hidden states, and context."""
        asks = threshold < 1
        limit = torch.where(asks, threshold, 2.0)  # the threshold alone decides at both ends, as in `leaves`
        limit = torch.where(threshold <= self.lowest, 0.0, limit)
        encoder, context = self.model.encoder, self.model.encoder.context(mask)
        hidden = encoder.run_layers(encoder.embed(input_ids, types), context, 0, self.exit_layers[0] - 1)
        return asks, limit, hidden, *context

    def ask(self, k: int, limit: Tensor, hidden: Tensor, *context: Tensor) -> tuple[Tensor, ...]:
        """Exit k's answer (B, C+1), probabilities and its layer, and which rows stay, (M, 1), which the last lacks."""
        logits, _ = self.model.heads[k](self.model.cls_at_exit(k, hidden, context))
        probabilities = (logits / self.temperatures[k]).softmax(-1)
        answer = F.pad(probabilities, (0, 1), value=float(self.exit_layers[k]))
        if self.exit_layers[k] == self.exit_layers[-1]:
            return (answer,)
        return answer, (probabilities.amax(-1) < limit).nonzero()

    def skip(self, _: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """No answer (B, C+1), and all rows (B, 1)."""
        return hidden.new_zeros(hidden.shape[0], self.C + 1), torch.arange(hidden.shape[0])[:, None]

    def go(self, k: int, rows: Tensor, hidden: Tensor, bias: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        """The rows that stay, before the next exit's layer: hidden states (M, T, D) and padding's bias (M, 1, 1, T)."""
        hidden, bias = hidden.index_select(0, rows[:, 0]), bias.index_select(0, rows[:, 0])
        start, stop = (n - 1 for n in self.exit_layers[k : k + 2])
        return self.model.encoder.run_layers(hidden, (bias, *context), start, stop), bias

    def end(self, _: int, answer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities (B, C), confidence (B,) and exit layer (B,)."""
        return answer[:, :-1], answer[:, :-1].amax(-1), answer[:, -1].long()


@torch.no_grad()
def flat_graph(pieces: Pieces) -> tuple[onnx.ModelProto, dict[str, list[str]], dict[str, list[str]]]:
    """All pieces side by side, and the names of each one's inputs and outputs there."""
    inputs, D = pieces.example(), pieces.model.encoder.config.hidden_size
    ins = {name: [f"{name}.in.{i}" for i in range(len(values))] for name, values in inputs.items()}
    outs = {name: [f"{name}.out.{i}" for i in range(len(values))] for name, values in pieces(inputs).items()}
    ins["start.0"], outs["end.0"] = list(INPUTS), list(OUTPUTS)
    free = {  # all sizes, unless something else decides them
        name: tuple({axis: torch.export.Dim.AUTO for axis, size in enumerate(x.shape) if size != D} for x in values)
        for name, values in inputs.items()
    }
    options = {"dynamo": True, "optimize": True, "external_data": False, "verbose": False, "opset_version": OPSET}
    options |= {"input_names": sum(ins.values(), []), "output_names": sum(outs.values(), [])}
    with quiet():
        program = torch.export.export(pieces, (inputs,), dynamic_shapes=(free,), strict=False)
        return torch.onnx.export(program, **options).model_proto, ins, outs


def quantized(flat: onnx.ModelProto) -> onnx.ModelProto:
    """The flat graph with int8 weights, a scale per column; ONNX Runtime quantises activations as they come.

    Seven of the eight bits are used: with all, products overflow on processors without VNNI. What `forward_cls` reads
    head by head stays as it is: ONNX Runtime has no such products in int8.
    """
    for_heads = {weight.name for weight in flat.graph.initializer if len(weight.dims) > 2}
    kept = [node.name for node in flat.graph.node if for_heads & set(node.input)]
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = f"{folder}/int8.onnx"
        options = {"weight_type": QuantType.QInt8, "per_channel": True, "reduce_range": True}
        quantize_dynamic(flat, path, nodes_to_exclude=kept, **options)
        return onnx.load(path)


def joined(
    flat: onnx.ModelProto, ins: dict[str, list[str]], outs: dict[str, list[str]], threshold: float, num_labels: int
) -> onnx.ModelProto:
    """The pieces of a flat graph, put together as the module's docstring says; `threshold` is the default.

    What one piece alone reads, as weights are, stands in the innermost graph around it: only there ONNX Runtime packs
    it. The shapes that torch knows are left out: with them it fuses sums and LayerNorms, which makes batches slower.
    """
    weights = {weight.name: weight for weight in flat.graph.initializer}
    nodes_of = {piece: nodes_for(flat.graph.node, values) for piece, values in outs.items()}
    readers = Counter(value for nodes in nodes_of.values() for value in weights.keys() & values_read(nodes))
    asks, limit, hidden, bias, *context = outs["start.0"]
    value = make_tensor_value_info

    def piece(name: str, *inputs: str) -> list[onnx.NodeProto]:
        given = dict(zip(ins[name], inputs, strict=True))
        for node in nodes_of[name]:
            node.input[:] = [given.get(value, value) for value in node.input]
        return nodes_of[name]

    def graph(name: str, nodes: list[onnx.NodeProto], *outputs: onnx.ValueInfoProto) -> onnx.GraphProto:
        return make_graph(nodes, name, [], outputs, [weights[v] for v in sorted(values_read(nodes)) if readers[v] == 1])

    def either(condition: str, made: list[str], *ways: tuple[list[onnx.NodeProto], list[str]]) -> onnx.NodeProto:
        """An answer, or that and rows, by one of two ways: their nodes, and what these call it."""
        graphs = [
            graph(names[0], nodes, *(value(*named, None) for named in zip(names, (FLOAT, INT64), strict=False)))
            for nodes, names in ways
        ]
        return make_node("If", [condition], made, then_branch=graphs[0], else_branch=graphs[1])

    def level(k: int, hidden: str, bias: str) -> list[onnx.NodeProto]:
        """The nodes from exit k on, which make `answer.k`: what it and later exits say of the rows that come so far."""
        ask, said = piece(f"ask.{k}", limit, hidden, bias, *context), outs[f"ask.{k}"]
        if f"go.{k}" not in outs:
            return [*ask, make_node("Identity", said, [f"answer.{k}"])]
        skip, go = piece(f"skip.{k}", hidden), piece(f"go.{k}", f"rows.{k}", hidden, bias, *context)
        go += level(k + 1, *outs[f"go.{k}"])
        go += [make_node("ScatterND", [f"said.{k}", f"rows.{k}", f"answer.{k + 1}"], [f"later.{k}"])]
        leave = [make_node("Identity", [f"said.{k}"], [f"kept.{k}"])]
        return [
            either(asks, [f"said.{k}", f"rows.{k}"], (ask, said), (skip, outs[f"skip.{k}"])),
            make_node("Size", [f"rows.{k}"], [f"count.{k}"]),
            make_node("Cast", [f"count.{k}"], [f"stays.{k}"], to=TensorProto.BOOL),
            either(f"stays.{k}", [f"answer.{k}"], (go, [f"later.{k}"]), (leave, [f"kept.{k}"])),
        ]

    nodes = piece("start.0", *INPUTS) + level(0, hidden, bias) + piece("end.0", "answer.0")
    shapes = (FLOAT, ["batch", num_labels]), (FLOAT, ["batch"]), (INT64, ["batch"])
    whole = graph("early_exit", nodes, *(value(name, *shape) for name, shape in zip(OUTPUTS, shapes, strict=True)))
    whole.input.extend([*(value(name, INT64, ["batch", "tokens"]) for name in INPUTS[:3]), value(INPUTS[3], FLOAT, [])])
    whole.initializer.extend(weights[v] for v in sorted(readers) if readers[v] > 1)
    whole.initializer.append(make_tensor(INPUTS[3], FLOAT, [], [threshold]))
    return make_model(whole, opset_imports=flat.opset_import, ir_version=IR_VERSION)


def values_read(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """What nodes read."""
    return {value for node in nodes for value in node.input}


def nodes_for(nodes: Sequence[onnx.NodeProto], values: list[str]) -> list[onnx.NodeProto]:
    """Those of the nodes that some values depend on, in their order."""
    wanted, found = set(values), []
    for node in reversed(nodes):
        if wanted & set(node.output):
            wanted |= set(node.input)
            found.append(node)
    return found[::-1]


@contextmanager
def quiet() -> Iterator[None]:
    """Within, nobody hears of what the exporters think of themselves."""
    logging.disable(logging.WARNING)
    before = logging.root.handlers[:]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        logging.root.handlers[:] = before  # they add one, which would print our notices once more
