"""config.json and model.safetensors of a folder, read strictly: of a public model, or of a run.

Keys of config.json without a field in our configs are ignored, because they describe the file rather than the model.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from minisweet.base.files import InputError, preview, read_dataclass, read_json, regular_file, written_beside
from minisweet.bert import BertEncoder
from minisweet.config import POOLINGS, BertConfig, Config, DebertaConfig, MPNetConfig
from minisweet.deberta import DebertaEncoder
from minisweet.layers import TransformerEncoder
from minisweet.mpnet import MPNetEncoder

SENTENCE_ENCODERS = ("minilm-l6", "mpnet-base")  # presets that were trained to give the mean of their tokens
POOLING = "1_Pooling/config.json"  # where sentence-transformers stores the pooling of a model
OLD = "pooling_mode_"
WEIGHTS, PICKLED = "model.safetensors", "pytorch_model.bin"
OURS = "minisweet"  # the model_type of a run, so that other libraries do not mistake it for a plain BERT
ARCHITECTURES = {
    "bert": (BertConfig, BertEncoder),
    "deberta": (DebertaConfig, DebertaEncoder),
    "mpnet": (MPNetConfig, MPNetEncoder),
}


def read_config(folder: str | Path, pooling: str | None = None) -> Config:
    """Read `folder`/config.json. Raises InputError, naming the file and the field, for what is not implemented.

    `pooling` is what exits read, "cls" or "mean"; None means what the checkpoint was trained to give.
    """
    path = Path(folder) / "config.json"
    content = read_json(path)
    is_ours = content.get("model_type") == OURS
    model_type = content.get("encoder_type" if is_ours else "model_type", "bert")  # BERT's oldest have no model_type
    if model_type not in list(ARCHITECTURES):
        raise InputError(f"{path}: model_type is {model_type!r}, and only {', '.join(ARCHITECTURES)} are implemented")
    if isinstance(terms := content.get("pos_att_type"), list):
        content["pos_att_type"] = "|".join(map(str, terms))
    if pooling or (not is_ours and "pooling" not in content):
        content["pooling"] = pooling or read_pooling(Path(folder))
    return read_dataclass(ARCHITECTURES[model_type][0], path, content)


def read_pooling(folder: Path) -> str:
    """What the exits of a public checkpoint read: "mean" if it was trained to give its tokens' mean, else "cls".

    Raises InputError if it was trained to give anything else.
    """
    path = folder / POOLING
    if not path.exists():
        return "mean" if {folder.name, folder.resolve().name} & {*SENTENCE_ENCODERS} else "cls"
    content = read_json(path)
    # One mode or several; before version 6 of sentence-transformers each had a key of its own, which was true or false.
    found = content.get("pooling_mode", [name for name, value in content.items() if value is True and OLD in name])
    modes = [found] if isinstance(found, str) else found
    for name in POOLINGS:
        if modes in ([name], [f"{OLD}{name}_token"], [f"{OLD}{name}_tokens"]):
            return name
    raise InputError(f"{path}: the model was trained to give {modes!r:.80}; exits should read cls or mean", "pooling")


def new_encoder(config: Config, num_layers: int) -> TransformerEncoder:
    """The first `num_layers` layers of a new encoder with random weights."""
    encoder = ARCHITECTURES[config.model_type][1](replace(config, num_hidden_layers=num_layers))
    encoder.depth = config.num_hidden_layers
    return encoder


def open_weights(folder: Path) -> tuple[dict, dict[str, str]]:
    """Open model.safetensors of a folder. Returns slices by the tensors' names, and the file's metadata.

    A slice is read when it is indexed. Names have no prefix "bert.", "deberta." or "mpnet.", and LayerNorm's parameters
    have today's names. A pytorch_model.bin without a model.safetensors is converted first. Raises InputError for a file
    that is missing, broken or ambiguous.
    """
    path, pickled = folder / WEIGHTS, folder / PICKLED
    slices = {}
    try:
        if not path.exists() and pickled.exists():
            tensors = torch.load(regular_file(pickled), weights_only=True, map_location="cpu")
            # safetensors refuses tied tensors and strided views, so every tensor gets its own memory.
            tensors = {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
            with written_beside(path) as new:
                new.write_bytes(save(tensors, metadata={"format": "pt"}))
        file = safe_open(regular_file(path), framework="pt")
    except Exception as error:  # of pickle, zip, torch or safetensors, according to what is wrong with the file
        raise InputError(f"{folder}: no readable {WEIGHTS} or {PICKLED} ({error})") from None
    for name in file.keys():  # noqa: SIM118 (it is no dict)
        plain = re.sub(f"^({'|'.join(ARCHITECTURES)})[.]", "", name)
        plain = plain.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if plain in slices:
            raise InputError(f"{path}: it holds {plain} twice, once as {name}")
        slices[plain] = file.get_slice(name)
    return slices, file.metadata() or {}


def load_strict(
    module: nn.Module, slices: dict, folder: Path, to_public: Callable[[str], str] = str, dropped: Sequence[str] = ()
) -> None:
    """Load weights into a module in float32; each tensor must be used or dropped.

    Args:
        module: made within `no_initial_weights`. All its buffers must be in its state dict.
        slices: of `open_weights`.
        folder: where they are from, for messages.
        to_public: maps our names to the names in the file.
        dropped: prefixes of names to ignore.

    Raises InputError if tensors do not fit. It names the first five, with both shapes.
    """
    slices = dict(slices)
    problems, tensors = [], {}
    for name, value in module.state_dict().items():
        source = to_public(name)
        shape = list(value.shape)
        tensor_slice = slices.pop(source, None)
        stored = "missing" if tensor_slice is None else tensor_slice.get_shape()
        if stored != shape:
            problems.append(f"{source} is {stored} and should be {shape}")
            continue
        with torch.device("cpu"):  # whatever the user's default is
            tensor = tensor_slice[...]
        tensors[name] = tensor.to(torch.float32 if value.is_floating_point() else value.dtype, copy=True)
        if tensor.is_floating_point() != value.is_floating_point():
            problems.append(f"{source} is {tensor.dtype} and should be {value.dtype}")
        elif not tensors[name].isfinite().all():
            problems.append(f"{source} holds NaN or infinity")
    unused = [name for name in slices if not name.startswith(tuple(dropped))]
    problems += [f"{name} {slices[name].get_shape()} is unexpected" for name in unused]
    if problems:
        raise InputError(f"{folder / WEIGHTS} does not fit its config.json: {preview(problems)}")
    module.load_state_dict(tensors, assign=True)
