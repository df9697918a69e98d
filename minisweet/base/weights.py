"""Files of weights: one safetensors file, its shards, or a pytorch_model.bin, which is converted once."""

import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from minisweet.base.safe import InputError, check_regular, is_text, one_line, read_json, written_beside

WEIGHTS, INDEX, PICKLED = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"


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


def convert(path: Path) -> None:
    """Write the state dict in `path`, a pytorch_model.bin, to model.safetensors beside it. Raises InputError."""
    room, tensors = 2 * path.stat().st_size + 2**20, {}  # bytes: two names may share one tensor
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of another protocol of pickle
            content = torch.load(path, weights_only=True, map_location="cpu")
        for name, value in content.items():
            plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
            if not isinstance(name, str) or not plain or value.is_nested or value.is_quantized:
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
