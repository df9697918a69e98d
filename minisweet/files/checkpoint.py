"""Public weights into our encoders: strictly, through the explicit name maps of names.py.

Every tensor of a checkpoint is either loaded, or dropped on purpose and by name. What is missing, unexpected, not
finite or of another shape is listed and stops the load. Sizes are compared with the tensors before anything is built,
so that a config.json that asks for a billion layers costs nothing. Keys of config.json that are no field of BertConfig
or DebertaConfig (architectures, use_cache, transformers_version, ...) describe the file, not the model.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minisweet.bert import BertEncoder
from minisweet.deberta import DebertaEncoder
from minisweet.files.config import BertConfig, DebertaConfig
from minisweet.files.names import BERT_DROPPED, DEBERTA_DROPPED, bert_names, deberta_names
from minisweet.files.safe import InputError, is_text, listed, one_line, read_json, written_beside

Encoder = BertEncoder | DebertaEncoder
Linear = tuple[Tensor, Tensor]  # weight and bias

ARCHITECTURES = {
    "bert": (BertConfig, BertEncoder, bert_names, BERT_DROPPED),
    "deberta": (DebertaConfig, DebertaEncoder, deberta_names, DEBERTA_DROPPED),
}
LOG = logging.getLogger("minisweet")
OURS = "minisweet"  # the model_type of a run, so that no other library takes it for a plain BERT
WEIGHTS, INDEX, PICKLED = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
FLOATS = ("F16", "BF16", "F32", "F64")
POOLER, CLASSIFIER = ("pooler.dense.weight", "pooler.dense.bias"), ("classifier.weight", "classifier.bias")
TASK_HEADS = ("classifier.", "qa_outputs.")  # of sequence and token classification, of question answering


def read_config(folder: str | Path) -> BertConfig | DebertaConfig:
    """Read `folder`/config.json. Raises InputError, naming the file and the field, for what is not implemented."""
    path = Path(folder) / "config.json"
    content = read_json(path)
    # BERT's oldest checkpoints are from before there was a model_type.
    model_type = content.get("encoder_type" if content.get("model_type") == OURS else "model_type", "bert")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise InputError(f"{path}: model_type is {model_type!r}, and only {' or '.join(ARCHITECTURES)} is implemented")
    try:
        return ARCHITECTURES[model_type][0].from_json(content)
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: {error}") from None


def new_encoder(config: BertConfig | DebertaConfig) -> Encoder:
    """Make an encoder with random weights."""
    return ARCHITECTURES[config.model_type][1](config)


class NoInit(TorchFunctionMode):
    """Within, torch.nn.init does nothing.

    On the meta device it has nothing to draw, but torch would import its compiler for that: a second's work.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return None if getattr(func, "__module__", "") == nn.init.__name__ else func(*args, **(kwargs or {}))


def load_encoder(folder: str | Path, num_layers: int | None = None, warn: bool = True) -> Encoder:
    """Load a BERT or DeBERTa encoder, as config.json's model_type says, from a folder in the Hugging Face layout.

    Args:
        folder: holds config.json and model.safetensors, or the shards that model.safetensors.index.json names, or
            pytorch_model.bin, which is converted once; in any floating-point type.
        num_layers: keep the first so many layers; the others are not read. Default: all.
        warn: say so where a BERT checkpoint has no pooler, and where the head of a task is left out.

    Returns:
        The encoder in float32, in training mode. Its `pooler_start` is the checkpoint's pooler (weight, bias), where
        each exit head starts from, or None where the checkpoint has none.

    Raises InputError where `num_layers` lies outside the encoder, a file is missing or unreadable, config.json asks for
    what is not implemented, or the tensors are not those that it describes.
    """
    return _load(Path(folder), num_layers, warn)[0]


def load_classifier(folder: Path) -> tuple[Encoder, Linear, list[str]]:
    """Load a finished classifier, saved by transformers' BertForSequenceClassification or DebertaFor... .

    Returns the encoder as `load_encoder` does, the classifier's weight (C, D) and bias (C,), and the labels in the
    order of the classes: id2label's, or LABEL_0, LABEL_1, ... Raises InputError as `load_encoder`, and for regression,
    several labels at once, and heads of other tasks.
    """
    path, content = folder / "config.json", read_json(folder / "config.json")
    made = content.get("architectures") or ["ForSequenceClassification"]
    if not isinstance(made, list) or not str(made[0]).endswith("ForSequenceClassification"):
        raise InputError(f"{path}: architectures is {made!r}, and must be a model for sequence classification")
    kind = content.get("problem_type")
    if kind not in (None, "single_label_classification"):
        raise InputError(f"{path}: problem_type is {kind!r}, and only single_label_classification is implemented")
    encoder, classifier = _load(folder, None, True, with_head=True)
    C = len(classifier[1])
    if C < 2:
        raise InputError(f"{folder}: its head has {C} output, which is regression; two classes or more are implemented")
    names = content.get("id2label") or {str(n): f"LABEL_{n}" for n in range(C)}
    labels = [names.get(str(n)) for n in range(C)] if isinstance(names, dict) else []
    if len(names) != C or not all(map(is_text, labels)) or len(set(labels)) < C:
        raise InputError(f"{path}: id2label is {names!r:.100}, and must name each of the head's {C} classes once")
    return encoder, classifier, labels


def _load(folder: Path, num_layers: int | None, warn: bool, with_head: bool = False) -> tuple[Encoder, Linear | tuple]:
    """The encoder, and the classifier if it is asked for, else ()."""
    config = read_config(folder)
    depth, D = config.num_hidden_layers, config.hidden_size
    if num_layers is not None and not 1 <= num_layers <= depth:
        raise InputError(f"num_layers is {num_layers}, and must lie in 1 to {depth}, the depth of {folder}")
    _, _, checkpoint_names, dropped = ARCHITECTURES[config.model_type]
    with open_weights(folder) as files:
        path = folder / (WEIGHTS if (folder / WEIGHTS).exists() else INDEX)
        keys: dict[str, str] = {}  # the plain name of each tensor, to its name in the file
        for key in sorted(files):
            plain = key.removeprefix(f"{config.model_type}.")
            plain = plain.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
            if plain in keys:
                raise InputError(f"{path}: {key} and {keys[plain]} are the same parameter")
            keys[plain] = key
        tensors = {plain: files[key] for plain, key in keys.items()}
        numbers = {name.split(".")[2] for name in keys if name.startswith("encoder.layer.")}
        found = next(n for n in count() if str(n) not in numbers)
        if depth > found:
            raise InputError(f"{path}: num_hidden_layers is {depth}, and encoder.layer.{found} is missing")
        check_width(path, "embeddings.word_embeddings.weight", tensors, D)
        config = replace(config, num_hidden_layers=num_layers or depth)
        with torch.device("meta"), NoInit():  # shapes only: random weights would be drawn and thrown away
            encoder = new_encoder(config)
        names, shapes = checkpoint_names(config.num_hidden_layers), {}
        if with_head or any(name in keys for name in POOLER):
            shapes |= zip(POOLER, ([D, D], [D]), strict=True)
        if with_head:
            C = [*tensors[CLASSIFIER[1]].get_shape(), 2][0] if CLASSIFIER[1] in tensors else 2
            shapes |= zip(CLASSIFIER, ([C, D], [C]), strict=True)
        else:
            dropped = (*dropped, *TASK_HEADS)
        wanted = {name: (names[name], list(value.shape)) for name, value in encoder.state_dict().items()}
        wanted |= {name: ((name,), shape) for name, shape in shapes.items()}
        sliced_off = tuple(f"encoder.layer.{n}." for n in range(config.num_hidden_layers, depth))
        weights = read_tensors(path, tensors, wanted, (*dropped, *sliced_off))
    pooler, classifier = (
        tuple(weights.pop(name) for name in names if name in weights) for names in (POOLER, CLASSIFIER)
    )
    encoder.load_state_dict(weights, assign=True)
    encoder.pooler_start = pooler or None
    left_out = [] if with_head else [key for name, key in keys.items() if name.startswith(TASK_HEADS)]
    if warn and left_out:
        LOG.warning("%s: the head of its task is left out (%s)", path, listed(left_out))
    if warn and not pooler and config.model_type == "bert":
        LOG.warning("%s has no pooler: each exit head starts from a fresh one", path)
    return encoder, classifier


def check_width(path: Path, name: str, tensors: Mapping, D: int) -> None:
    """Raise InputError unless the tensor is there, with D columns: of that size is all that will be built."""
    shape = tensors[name].get_shape() if name in tensors else "missing"
    if len(shape) != 2 or shape[1] != D:
        raise InputError(f"{path}: {name} is {shape}, and hidden_size is {D} in config.json")


@contextmanager
def open_weights(folder: Path) -> Iterator[dict]:
    """Open a folder's weights: each tensor's name to its slice, still unread. Raises InputError where this fails."""
    slices = {}
    with ExitStack() as stack:
        try:
            for path in weight_files(folder):
                file = stack.enter_context(safe_open(path, framework="pt"))
                for key in file.keys():  # noqa: SIM118 (it is no dict)
                    if key in slices:
                        raise InputError(f"{path}: holds {key!r:.80}, which another shard holds too")
                    slices[key] = file.get_slice(key)
            yield slices
        except FileNotFoundError:
            raise InputError(f"{path}: no such file") from None
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not readable as safetensors ({error})") from None


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, made of pytorch_model.bin where need be, or the files that its index names, all beside it."""
    weights, path = folder / WEIGHTS, folder / INDEX
    if weights.exists() or not path.exists():
        if not weights.exists() and (folder / PICKLED).is_file():
            convert(folder / PICKLED)
        return [weights]
    index = read_json(path).get("weight_map")
    names = set(index.values()) if isinstance(index, dict) and all(map(is_text, index.values())) else set()
    if not names or any(Path(name).name != name for name in names):
        raise InputError(f"{path}: weight_map must name a file of the same folder for each tensor")
    return [folder / name for name in sorted(names)]


def read_tensors(path: Path, tensors: Mapping, wanted: Mapping, dropped: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Read tensors in float32. Raises InputError, with `path`, for all that is wrong with them.

    Args:
        tensors: each name to its slice, from `open_weights`.
        wanted: each of our names to its names there, whose tensors are joined along the first dimension, and its shape.
        dropped: what other names may begin with.
    """
    problems, weights, used = [], {}, set()
    for ours, (sources, shape) in wanted.items():
        used.update(sources)
        part, values = [shape[0] // len(sources), *shape[1:]], []
        for source in sources:
            if source not in tensors:
                problems.append(f"{source} {part} is missing")
            elif (actual := tensors[source].get_shape()) != part:
                problems.append(f"{source} is {actual} and should be {part}")
            elif (dtype := tensors[source].get_dtype()) not in FLOATS:
                problems.append(f"{source} is of type {dtype} and should be floating-point")
            else:
                values.append(tensors[source][...].float())
                if not values[-1].isfinite().all():
                    problems.append(f"{source} holds NaN or infinity")
        if not problems:
            weights[ours] = torch.cat(values)
    for name in tensors:
        if name not in used and not name.startswith(dropped or ("\0",)):
            problems.append(f"{name} {tensors[name].get_shape()} is unexpected")
    if problems:
        raise InputError(f"{path} does not fit its config.json: {listed(problems)}")
    return weights


def convert(path: Path) -> None:
    """Write the state dict in `path`, a pytorch_model.bin, to model.safetensors beside it. Raises InputError."""
    room = 2 * path.stat().st_size + 2**20  # bytes: two names may share one tensor
    try:
        tensors, state = {}, torch.load(path, weights_only=True, map_location="cpu")
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise TypeError("it must map names to tensors")
        for name, value in state.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{name!r:.80} is no tensor")
            if value.layout != torch.strided or value.is_nested or value.is_quantized or value.device.type != "cpu":
                raise TypeError(f"{name!r:.80} is sparse, quantised, nested or empty, and should be a plain tensor")
            room -= value.numel() * value.element_size()
            if room < 0:  # an expanded one would fill the memory
                raise TypeError(f"{name!r:.80} {list(value.shape)} is more than the file can hold")
            # safetensors refuses tied tensors and strided views: every tensor gets memory of its own.
            tensors[name] = value.detach().clone(memory_format=torch.contiguous_format)
        packed = save(tensors, metadata={"format": "pt"})  # save_file() would let no other user read it
    except Exception as error:  # pickle, zip, runtime and key errors, according to what is wrong with the file
        raise InputError(f"{path}: not a PyTorch state dict ({type(error).__name__}: {one_line(error, 200)})") from None
    with written_beside(path.with_name(WEIGHTS)) as partial:
        partial.write_bytes(packed)
