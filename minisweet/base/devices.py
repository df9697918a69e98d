"""The device and the precision to compute in."""

import platform
import re
from pathlib import Path

import torch

from minisweet.base.files import LOG, InputError

AMP_CHOICES = ("auto", "off", "bf16", "fp16")
AMP_HELP = f"autocast: {', '.join(AMP_CHOICES)}; off: float32; auto: on CUDA, and in training on a CPU with bfloat16"
CPU_TOKENS, GPU_TOKENS = 1024, 2**15  # on a CPU, much larger batches leave the cache and take up to 1.5 times as long


def choose_device(name: str) -> torch.device:
    """The device that auto, cpu, cuda or cuda:N names. Raises InputError for anything else."""
    gpus = [f"cuda:{n}" for n in range(torch.cuda.device_count())]
    if name == "cuda" or (name == "auto" and gpus):
        name = "cuda:0"
    if name not in ("auto", "cpu", *gpus):
        raise InputError(f"{name!r:.80} is not available; should be {', '.join(['auto', 'cpu', *gpus])}", "device")
    return torch.device("cpu" if name == "auto" else name)


def tokens_at_once(device: torch.device) -> int:
    """The largest number of tokens in a batch for inference."""
    return CPU_TOKENS if device.type == "cpu" else GPU_TOKENS


def choose_precision(amp: str, device: torch.device, training: bool = False) -> torch.dtype | None:
    """The type to autocast to, or None for float32.

    "auto" means bfloat16 if the device has instructions for it, and otherwise float16 on CUDA and float32 on a CPU. But
    "auto" means float32 for evaluation and prediction on a CPU, so that predictions are the same on every machine.
    Raises InputError for float16 on a CPU.
    """
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif amp == "auto" and training and processor()[1]:
        amp = "bf16"
    elif amp == "fp16" and device.type == "cpu":
        raise InputError("fp16 is for CUDA; on a CPU it should be bf16 or off", "amp")
    elif amp == "bf16" and device.type == "cpu" and not processor()[1]:
        LOG.warning("amp bf16: %s has no instructions for it; off may be ten times faster", processor()[0])
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)


def amp_of(precision: str) -> str:
    """The choice of AMP that gives a precision, such as "torch.bfloat16"."""
    return {"torch.bfloat16": "bf16", "torch.float16": "fp16"}.get(precision, "off")


def processor() -> tuple[str, bool]:
    """The name of the CPU, and whether it has instructions for bfloat16 (known on Linux with x86 only)."""
    path = Path("/proc/cpuinfo")
    cpu = path.read_text() if path.exists() else ""
    name = re.search(r"^model name\s*: (.*)", cpu, re.MULTILINE)
    return name[1] if name else f"{platform.machine()} CPU", "avx512_bf16" in cpu or "amx_bf16" in cpu


def device_name(device: torch.device) -> str:
    """The name of the device, for records of results."""
    cpu = f"{processor()[0]}, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
