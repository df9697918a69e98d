"""Where to compute, and in which precision."""

import ctypes
import os
import platform
import re
import sys
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch

from minisweet.files.commands import Parser
from minisweet.files.safe import InputError

AMP_CHOICES = ("auto", "off", "bf16", "fp16")


class Place(NamedTuple):
    """Which process this is, of all and on its machine, from 0; how many there are."""

    rank: int
    local_rank: int
    processes: int


def place() -> Place:
    """Where torchrun has put this process; without torchrun it is the only one."""
    said = [os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
    return Place(*map(int, said)) if all(map(str.isdecimal, said)) else Place(0, 0, 1)


def add_device_options(parser: Parser) -> None:
    """Add --device and --amp."""
    option = parser.add_argument
    option("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    option("--amp", choices=AMP_CHOICES, default="auto", help="mixed precision (default: auto: off on the CPU)")


def choose_device(name: str) -> torch.device:
    """Turn auto, cpu, cuda or cuda:N into a device that is there; torchrun's processes take one GPU each.

    Raises InputError.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if place().processes > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise InputError(f"--device: {name!r} under torchrun, where each process takes a GPU of its own: cuda")
        name = f"cuda:{place().local_rank}"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise InputError(f"--device: {name!r} is not auto, cpu, cuda or cuda:N")
    kind, _, number = name.partition(":")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise InputError(f"--device: {name!r} is not here; this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device(name)


def choose_precision(amp: str, device: torch.device) -> torch.dtype | None:
    """The type to autocast to, None for float32 alone.

    auto: bfloat16 on CUDA where it is supported and float16 where it is not; nothing on the CPU, where bfloat16 pays
    only on processors with instructions for it.
    """
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)


def autocast(device: torch.device, precision: torch.dtype | None) -> AbstractContextManager:
    """The autocast context for `precision`; one that does nothing for None."""
    return torch.autocast(device.type, dtype=precision, enabled=precision is not None)


def reuse_freed_memory() -> None:
    """Let this process keep the memory that it frees, where glibc allocates it.

    By default each large tensor is new memory from the kernel, which zeroes it page by page at first touch, in every
    step again. Keeping it saves 10 to 20% of a training step on the CPU.
    """
    if sys.platform == "linux" and hasattr(glibc := ctypes.CDLL(None), "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from malloc.h
        glibc.mallopt(M_MMAP_MAX, 0)
        glibc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def device_name(device: torch.device) -> str:
    """What a reader of the results should know of the device."""
    together = f", {place().processes} processes" if place().processes > 1 else ""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device) + together
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads{together}"
