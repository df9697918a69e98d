"""Public weights into our encoders: strictly, through the explicit name maps of bert.py and deberta.py.

Every tensor of a checkpoint is either loaded, or dropped on purpose and by name. All that is missing, unexpected or
mis-shaped is listed, with both shapes, and stops the load.
"""

import logging
import re
from dataclasses import MISSING, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minisweet import bert, deberta
from minisweet.files.safe import InputError, read_json

Encoder = bert.BertEncoder | deberta.DebertaEncoder

ARCHITECTURES = {
    "bert": (bert.BertConfig, bert.BertEncoder, bert.CHECKPOINT_NAMES, bert.DROPPED),
    "deberta": (deberta.DebertaConfig, deberta.DebertaEncoder, deberta.CHECKPOINT_NAMES, deberta.DROPPED),
}
POOLER = ("pooler.dense.weight", "pooler.dense.bias")


def read_config(folder: str | Path) -> bert.BertConfig | deberta.DebertaConfig:
    """Read `folder`/config.json. Raises InputError, naming the file and the field, for what is not implemented."""
    path = Path(folder) / "config.json"
    content = read_json(path)
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise InputError(f"{path}: model_type is {model_type!r}, and only {' or '.join(ARCHITECTURES)} is implemented")
    config_class = ARCHITECTURES[model_type][0]
    known = fields(config_class)
    missing = [field.name for field in known if field.default is MISSING and field.name not in content]
    if missing:
        raise InputError(f"{path}: {', '.join(missing)} missing, and {config_class.__name__} needs it")
    try:
        return config_class(**{field.name: content[field.name] for field in known if field.name in content})
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


def new_encoder(config: bert.BertConfig | deberta.DebertaConfig) -> Encoder:
    """Make an encoder with random weights."""
    return ARCHITECTURES[config.model_type][1](config)


def load_encoder(folder: str | Path, num_layers: int | None = None, warn: bool = True) -> Encoder:
    """Load a BERT or DeBERTa encoder, as config.json's model_type says, from a folder in the Hugging Face layout.

    Args:
        folder: holds config.json and model.safetensors, in any floating-point type.
        num_layers: keep the first so many layers; the others are not read. Default: all.
        warn: say so where a BERT checkpoint has no pooler.

    Returns:
        The encoder in float32, in training mode like any new module. Its `pooler_start` is the checkpoint's pooler,
        (weight, bias), where each exit head starts from, or None where the checkpoint has none.

    Raises:
        InputError: `num_layers` lies outside the encoder, a file is missing or unreadable, config.json asks for what is
            not implemented, or the tensors are not those that it describes.
    """
    config = read_config(folder)
    depth = config.num_hidden_layers
    if num_layers is not None and not 1 <= num_layers <= depth:
        raise InputError(f"num_layers is {num_layers}, and must lie in 1 to {depth}, the depth of {folder}")
    config = replace(config, num_hidden_layers=num_layers or depth)
    with torch.device("meta"):  # shapes only: random weights would be drawn and thrown away
        encoder = new_encoder(config)
    path = Path(folder) / "model.safetensors"
    try:
        with safe_open(path, framework="pt") as checkpoint:
            weights, pooler = _read(checkpoint, path, encoder, depth)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not readable as safetensors ({error})") from None
    encoder.load_state_dict(weights, assign=True)
    encoder.pooler_start = pooler
    if warn and pooler is None and config.model_type == "bert":
        logging.getLogger("minisweet").warning("%s has no pooler: each exit head starts from a fresh one", path)
    return encoder


def _read(checkpoint, path: Path, encoder: Encoder, depth: int):
    """Read the encoder's weights and the pooler from an open checkpoint, or raise InputError with all that is wrong."""
    model_type = encoder.config.model_type
    _, _, names, dropped = ARCHITECTURES[model_type]
    keys: dict[str, str] = {}  # the plain name of each tensor, to its name in the file
    problems = []
    for key in sorted(checkpoint.keys()):
        plain = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", key.removeprefix(f"{model_type}."))
        plain = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", plain)
        if plain in keys:
            problems.append(f"{key} and {keys[plain]} are the same parameter")
        keys[plain] = key

    def read(sources: list[str], shape: list[int]) -> Tensor | None:
        """Read and join the tensors `sources`, each with an equal part of the rows of `shape`, in float32."""
        part = [shape[0] // len(sources), *shape[1:]]
        found = len(problems)
        for source in sources:
            if source not in keys:
                problems.append(f"{source} {part} is missing")
            elif (actual := checkpoint.get_slice(keys[source]).get_shape()) != part:
                problems.append(f"{source} is {actual} and should be {part}")
            elif (dtype := checkpoint.get_slice(keys[source]).get_dtype()) not in ("F16", "BF16", "F32", "F64"):
                problems.append(f"{source} is of type {dtype} and should be floating-point")
        if len(problems) > found:
            return None
        return torch.cat([checkpoint.get_tensor(keys[source]).float() for source in sources])

    weights, used = {}, set()
    for name, parameter in encoder.state_dict().items():
        sources = _sources(name, names)
        weights[name] = read(sources, list(parameter.shape))
        used.update(sources)
    pooler = None
    if any(name in keys for name in POOLER):
        D = encoder.config.hidden_size
        pooler = (read([POOLER[0]], [D, D]), read([POOLER[1]], [D]))
        used.update(POOLER)
    sliced_off = [f"encoder.layer.{n}.*" for n in range(encoder.config.num_hidden_layers, depth)]
    for plain, key in keys.items():
        if plain not in used and not any(fnmatchcase(plain, pattern) for pattern in (*dropped, *sliced_off)):
            problems.append(f"{key} {checkpoint.get_slice(key).get_shape()} is unexpected")
    if problems:
        raise InputError(f"{path} does not fit its config.json: {'; '.join(problems)}")
    return weights, pooler


def _sources(name: str, names: dict[str, tuple[str, ...]]) -> list[str]:
    """The checkpoint's names for our parameter `name`, by the name map of its architecture."""
    for ours, theirs in names.items():
        pattern = re.escape(ours).replace(r"\{n\}", r"(?P<n>\d+)").replace(r"\*", r"(?P<kind>weight|bias)")
        if match := re.fullmatch(pattern, name):
            n, kind = match.groupdict().get("n", ""), match.groupdict().get("kind", "")
            return [source.replace("{n}", n).replace("*", kind) for source in theirs]
    raise KeyError(name)
