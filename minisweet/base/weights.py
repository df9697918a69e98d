"""Files of weights into modules, strictly: one safetensors file, its shards, or a pytorch_model.bin, converted once.

What is missing, unexpected or of another shape is listed, or else what is not finite, and nothing is loaded. Before
anything is built, the first and the last module's sizes are compared with config.json's (`check_sizes`): one that asks
for a billion layers costs nothing.
"""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minisweet.base.safe import InputError, check_regular, is_text, listed, one_line, read_json, written_beside

WEIGHTS, INDEX, PICKLED = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
Sources = dict[str, tuple[str, ...]]  # a parameter of ours to those it is joined of, along the first dimension


def open_weights(folder: Path) -> dict:
    """Open a folder's weights, of one file or of the shards beside its index: each tensor's name to its slice, unread.

    pytorch_model.bin is converted first, where it is alone. Raises InputError where anything of this fails.
    """
    files, slices = [folder / WEIGHTS], {}
    if not files[0].exists() and (folder / INDEX).exists():
        index = read_json(folder / INDEX).get("weight_map")
        names = set(index.values()) if isinstance(index, dict) and all(map(is_text, index.values())) else set()
        if not names or any(Path(name).name != name for name in names):
            raise InputError(f"{folder / INDEX}: weight_map must name a file of the same folder for each tensor")
        files = [folder / name for name in sorted(names)]
    elif not files[0].exists() and (folder / PICKLED).is_file():
        convert(folder / PICKLED)
    try:
        for path in files:
            check_regular(path)
            file = safe_open(path, framework="pt")
            for key in file.keys():  # noqa: SIM118 (it is no dict)
                if key in slices:
                    raise InputError(f"{path}: holds {key!r:.80}, which another shard holds too")
                slices[key] = file.get_slice(key)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not readable as safetensors ({error})") from None
    return slices


def check_sizes(path: Path, tensors: Mapping, first: str, last: str, D: int) -> None:
    """Raise InputError unless an encoder's first and last module are there, of width D, before it is built so wide."""
    for name in (f"{first}.weight", f"{last}.weight"):
        if name not in tensors:
            raise InputError(f"{path}: {name} is missing, and config.json's num_hidden_layers and the like ask for it")
        if len(shape := tensors[name].get_shape()) != 2 or shape[1] != D:
            raise InputError(f"{path}: {name} is {shape}, should be of hidden_size {D}, as config.json says")


def filled(
    path: Path, tensors: Mapping, make: Callable[[], nn.Module], names: Sources, others: dict, dropped: tuple = ()
) -> tuple[nn.Module, dict[str, Tensor]]:
    """What `make` makes, filled with tensors in float32, and `others`. Raises InputError with all wrong names and
    shapes, or else with all tensors that are not finite.

    `tensors` are slices from `open_weights`, `names` the parameters' names there where they are not the same. `others`
    are names and shapes of tensors that are wanted too, and `dropped` is what the names of the rest begin with;
    any other is an error.
    """
    with torch.device("meta"), NoInit():  # shapes only: random weights would be drawn and thrown away
        module = make()
    shapes = {name: list(value.shape) for name, value in module.state_dict().items()} | others
    sources = {name: names.get(name, (name,)) for name in shapes}
    wanted, problems = {}, []
    for name, (rows, *rest) in shapes.items():
        wanted |= dict.fromkeys(sources[name], [rows // len(sources[name]), *rest])
    for name, shape in wanted.items():
        if name not in tensors:
            problems.append(f"{name} {shape} is missing")
        elif (there := tensors[name].get_shape()) != shape:
            problems.append(f"{name} is {there} and should be {shape}")
        elif (dtype := tensors[name].get_dtype()) not in ("F16", "BF16", "F32", "F64"):
            problems.append(f"{name} is of type {dtype} and should be floating-point")
    unused = [name for name in tensors if name not in wanted and not name.startswith(dropped)]
    problems += [f"{name} {tensors[name].get_shape()} is unexpected" for name in unused]
    if not problems:
        with torch.device("cpu"):  # whatever the user's default is
            weights = {name: torch.cat([tensors[part][...].float() for part in sources[name]]) for name in shapes}
        infinite = [name for name in shapes if not weights[name].isfinite().all()]
        problems = [f"{' or '.join(sources[name])} holds NaN or infinity" for name in infinite]
    if problems:
        raise InputError(f"{path} does not fit its config.json: {listed(problems)}")
    others = {name: weights.pop(name) for name in others}
    module.load_state_dict(weights, assign=True)
    return module, others


class NoInit(TorchFunctionMode):
    """Within, torch.nn.init does nothing: on the meta device it would import torch's compiler, a second's work."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return None if getattr(func, "__module__", "") == nn.init.__name__ else func(*args, **(kwargs or {}))


def convert(path: Path) -> None:
    """Write the state dict in `path`, a pytorch_model.bin, to model.safetensors beside it. Raises InputError."""
    room, tensors = 2 * path.stat().st_size + 2**20, {}  # bytes: two names may share one tensor
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of another protocol of pickle
            content = torch.load(path, weights_only=True, map_location="cpu")
        for name, value in content.items():
            plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
            if not (isinstance(name, str) and plain) or value.is_nested or value.is_quantized:
                raise TypeError(f"{name!r:.80} is no name with a plain tensor (sparse, quantised, nested, empty)")
            room -= value.numel() * value.element_size()
            if room < 0:  # an expanded one would fill the memory
                raise TypeError(f"{name!r:.80} {list(value.shape)} is more than the file can hold")
            if not value.isfinite().all():  # before a model.safetensors stands there
                raise TypeError(f"{name!r:.80} holds NaN or infinity")
            # safetensors refuses tied tensors and strided views: every tensor gets memory of its own.
            tensors[name] = value.detach().clone(memory_format=torch.contiguous_format)
        packed = save(tensors, metadata={"format": "pt"})  # save_file() would let no other user read it
    except Exception as error:  # pickle, zip, runtime and key errors, according to what is wrong with the file
        raise InputError(f"{path}: not a PyTorch state dict ({type(error).__name__}: {one_line(error, 200)})") from None
    with written_beside(path.with_name(WEIGHTS)) as new:
        new.write_bytes(packed)
