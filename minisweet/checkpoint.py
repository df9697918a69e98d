"""Public weights into our encoders: strictly, through an explicit map of names.

Every tensor of a checkpoint is either loaded, or dropped on purpose and by name. Keys of config.json that we have no
field for are ignored: they describe the file, not the model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn
from torch.overrides import TorchFunctionMode

from minisweet.base.files import InputError, preview, read_dataclass, read_json, regular_file, written_beside
from minisweet.bert import BertEncoder
from minisweet.config import BertConfig, DebertaConfig
from minisweet.deberta import DebertaEncoder

Encoder = BertEncoder | DebertaEncoder

WEIGHTS, PICKLED = "model.safetensors", "pytorch_model.bin"
OURS = "minisweet"  # the model_type of a run, so that no other library takes it for a plain BERT
ARCHITECTURES = {"bert": (BertConfig, BertEncoder), "deberta": (DebertaConfig, DebertaEncoder)}
# A layer's modules, ours to theirs, that both encoders have; then the parameters of BERT's and of DeBERTa's attention.
MODULES = {
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}
BERT_ATTENTION = ("query.weight", "query.bias", "key.weight", "value.weight", "value.bias")
DEBERTA_ATTENTION = ("in_proj.weight", "q_bias", "v_bias", "pos_proj.weight", "pos_q_proj.weight", "pos_q_proj.bias")
# Tensors whose names start like this are dropped if the model has no such parameter: heads of pre-training and of
# tasks, a buffer that counts 0, 1, 2, ..., and DeBERTa's absolute positions, which only its pre-training read.
DROPPED = ("cls.", "lm_predictions.", "mask_predictions.", "classifier.", "qa_outputs.")
DROPPED += ("embeddings.position_ids", "embeddings.position_embeddings.")


def checkpoint_names(num_layers: int) -> dict[str, str]:
    """The parameters of both encoders to their public names, without "bert." or "deberta."."""
    names = {"relative_table.weight": "encoder.rel_embeddings.weight"}
    for table in ("word_embeddings.weight", "position_embeddings.weight", "token_type_embeddings.weight"):
        names[table] = f"embeddings.{table}"
    layer = {part: f"attention.self.{part}" for part in BERT_ATTENTION + DEBERTA_ATTENTION}
    for kind in ("weight", "bias"):
        names[f"embedding_norm.{kind}"] = f"embeddings.LayerNorm.{kind}"
        layer |= {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in MODULES.items()}
    for n in range(num_layers):
        names |= {f"layers.{n}.{ours}": f"encoder.layer.{n}.{theirs}" for ours, theirs in layer.items()}
    return names


def read_config(folder: str | Path) -> BertConfig | DebertaConfig:
    """Read `folder`/config.json. Raises InputError, naming the file and the field, for what is not implemented."""
    path = Path(folder) / "config.json"
    content = read_json(path)
    # BERT's oldest checkpoints have no model_type.
    model_type = content.get("encoder_type" if content.get("model_type") == OURS else "model_type", "bert")
    if model_type not in list(ARCHITECTURES):
        raise InputError(f"{path}: model_type is {model_type!r}, and only {' or '.join(ARCHITECTURES)} is implemented")
    if isinstance(terms := content.get("pos_att_type"), list):
        content["pos_att_type"] = "|".join(map(str, terms))
    return read_dataclass(ARCHITECTURES[model_type][0], path, content)


def new_encoder(config: BertConfig | DebertaConfig) -> Encoder:
    """Make an encoder with random weights."""
    return ARCHITECTURES[config.model_type][1](config)


def load_encoder(folder: str | Path, num_layers: int | None = None) -> Encoder:
    """Load the encoder of a folder in the Hugging Face layout: BERT or DeBERTa, as config.json's model_type says.

    It has the first `num_layers` layers, by default all, and is in float32 and in training mode. Its `pooler_start` is
    the checkpoint's pooler (weight, bias), or None. Raises InputError where a file is missing or unreadable, asks for
    what is not implemented, or does not fit the others.
    """
    return _load(Path(folder), num_layers)["encoder"]


def load_classifier(folder: Path) -> tuple[Encoder, nn.Linear, list[str]]:
    """Load a finished classifier, saved by transformers' BertForSequenceClassification or DebertaFor... .

    Returns the encoder, the classifier, and the labels in the order of the classes: id2label's, or LABEL_0 and LABEL_1.
    Raises InputError as `load_encoder` does, and for models of other tasks.
    """
    path = folder / "config.json"
    content = read_json(path)
    labels = content.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    names = [labels.get(str(n)) for n in range(len(labels))] if isinstance(labels, dict) else [None]
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise InputError(f"{path}: id2label is {labels!r:.120}, should give the classes 0, 1, ... a text each")
    wanted, found = "single_label_classification", content.get("problem_type")
    if found not in (wanted, None) or len(names) < 2:
        raise InputError(f"{path}: {found} with {len(names)} outputs, should be {wanted} with two or more")
    parts = _load(folder, num_labels=len(names))
    return parts["encoder"], parts["classifier"], names


def _load(folder: Path, num_layers: int | None = None, num_labels: int = 0) -> nn.ModuleDict:
    """The encoder, with the checkpoint's pooler if there is one; where `num_labels` are asked for, the classifier."""
    config = read_config(folder)
    D, depth = config.hidden_size, config.num_hidden_layers
    L = num_layers or depth
    has_pooler = num_labels or any(name.startswith("pooler.") for name in open_weights(folder))
    config = replace(config, num_hidden_layers=L)

    def make() -> nn.ModuleDict:
        parts = {"encoder": new_encoder(config)} | ({"pooler": nn.Linear(D, D)} if has_pooler else {})
        return nn.ModuleDict(parts | ({"classifier": nn.Linear(D, num_labels)} if num_labels else {}))

    names = {f"encoder.{ours}": theirs for ours, theirs in checkpoint_names(L).items()}
    names |= {f"pooler.{kind}": f"pooler.dense.{kind}" for kind in ("weight", "bias")}
    # Our key has no bias. BERT's adds the same number to all scores of a query, which the softmax ignores.
    dropped = [*DROPPED, *(f"encoder.layer.{n}.attention.self.key.bias" for n in range(L))]
    dropped += [f"encoder.layer.{n}." for n in range(L, depth)]
    parts = load_strict(folder / WEIGHTS, make, names, dropped)
    if has_pooler:
        parts["encoder"].pooler_start = (parts["pooler"].weight.detach(), parts["pooler"].bias.detach())
    return parts


def open_weights(folder: Path) -> dict:
    """Open a folder's model.safetensors: each tensor's name to its slice, which is read when it is asked for.

    Names come without "bert." or "deberta.", and with today's names of LayerNorm's parameters. A pytorch_model.bin that
    stands there alone is converted first. Raises InputError for a file that is missing, broken or ambiguous.
    """
    path, pickled, slices = folder / WEIGHTS, folder / PICKLED, {}
    try:
        if not path.exists() and pickled.exists():
            tensors = torch.load(regular_file(pickled), weights_only=True, map_location="cpu")
            # safetensors refuses tied tensors and strided views: every tensor gets memory of its own.
            tensors = {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
            with written_beside(path) as new:
                new.write_bytes(save(tensors, metadata={"format": "pt"}))
        file = safe_open(regular_file(path), framework="pt")
    except Exception as error:  # of pickle, zip, torch or safetensors, according to what is wrong with the file
        raise InputError(f"{folder}: no readable {WEIGHTS} or {PICKLED} ({error})") from None
    for name in file.keys():  # noqa: SIM118 (it is no dict)
        plain = name.removeprefix("bert.").removeprefix("deberta.")
        plain = plain.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if plain in slices:
            raise InputError(f"{path}: it holds {plain} twice, once as {name}")
        slices[plain] = file.get_slice(name)
    return slices


def load_strict(path: Path, make: Callable[[], nn.Module], names: Mapping = {}, dropped: Sequence = ()) -> nn.Module:
    """Make a module, and fill it with the tensors of a file, each of which must be used or dropped.

    `make` is called on the meta device, so that no weights are drawn only to be thrown away: all buffers must be in the
    module's state dict. `names` maps our names to the file's, where they differ. `dropped` are prefixes of names to
    ignore. Raises InputError, naming each with both shapes, for tensors that do not fit.
    """
    slices, problems, tensors = open_weights(path.parent), [], {}
    with torch.device("meta"), _NoInit():
        module = make()
    for name, value in module.state_dict().items():
        source, shape = names.get(name, name), list(value.shape)
        found = slices.pop(source, None)
        there = "missing" if found is None else found.get_shape()
        if there != shape:
            problems.append(f"{source} is {there} and should be {shape}")
            continue
        tensor = found[...]
        tensors[name] = tensor.to(value.dtype, copy=True)
        if tensor.is_floating_point() != value.is_floating_point():
            problems.append(f"{source} is {tensor.dtype} and should be {value.dtype}")
        elif not tensors[name].isfinite().all():
            problems.append(f"{source} holds NaN or infinity")
    unused = [name for name in slices if not name.startswith(tuple(dropped))]
    problems += [f"{name} {slices[name].get_shape()} is unexpected" for name in unused]
    if problems:
        raise InputError(f"{path} does not fit its config.json: {preview(problems)}")
    module.load_state_dict(tensors, assign=True)
    return module


class _NoInit(TorchFunctionMode):
    """Within it, torch.nn.init does nothing: on the meta device it would import torch's compiler, a second's work."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return None if getattr(func, "__module__", "") == nn.init.__name__ else func(*args, **(kwargs or {}))
