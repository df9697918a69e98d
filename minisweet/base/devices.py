"""Where to compute: on which device, in which precision, and as one of how many processes.

With `torchrun --nproc-per-node N train.py ...`, on one machine or more, each process holds the whole model and takes a
share of every batch's rows. The gradient of the batch's mean loss is the sum of the processes' own, each weighted by
its share: one all-reduce of one flat tensor, between backward and clipping. So all have the same gradient, loss and
overflow, and N processes do what one does.
"""

import ctypes
import os
import platform
import re
import sys
import time
import traceback
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisweet.base.commands import Parser
from minisweet.base.safe import InputError, one_line

AMP_CHOICES = ("auto", "off", "bf16", "fp16")
Place = namedtuple("Place", "rank local_rank processes")  # which process of all, and on its machine, from 0
FAREWELL = timedelta(minutes=1)  # that a process which fails waits for the first one to fail too
PLACES = [Place(0, 0, 1)]  # the last counts; `together` adds another one


def place() -> Place:
    """Which process of `together` this is; else the only one, whatever process group a library's user has made."""
    return PLACES[-1]


def place_by_torchrun() -> Place:
    """Where the environment puts this process, as torchrun sets it. Raises InputError for what torchrun never sets."""
    if not os.environ.get("WORLD_SIZE"):
        return Place(0, 0, 1)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    said = [os.environ.get(name) or "0" for name in names]
    shown = ", ".join(map(" ".join, zip(names, said, strict=True)))
    if not all(text.isdecimal() for text in said) or not max(map(int, said[:2])) < int(said[2]):
        raise InputError(f"{shown}: should be as torchrun sets them, ranks from 0 and below WORLD_SIZE; or unset them")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if int(said[2]) > 1 else ():
        if not os.environ.get(name):
            raise InputError(f"{name}: not set, and WORLD_SIZE is {said[2]}; start several processes with torchrun")
    return Place(*map(int, said))


def add_device_options(parser: Parser) -> None:
    """Add --device and --amp."""
    option = parser.add_argument
    option("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    option("--amp", choices=AMP_CHOICES, default="auto", help="mixed precision (default: auto: off on the CPU)")


def choose_device(name: str) -> torch.device:
    """The device of auto, cpu, cuda or cuda:N; torchrun's processes take one GPU each. Raises InputError for others."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if place().processes > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise InputError(f"--device: {name!r} under torchrun, where each process takes a GPU of its own: cuda")
        name = f"cuda:{place().local_rank}"
        here, count = os.environ.get("LOCAL_WORLD_SIZE", ""), torch.cuda.device_count()
        if here.isdecimal() and int(here) > count:  # all processes say so, since the first alone is heard
            raise InputError(f"--nproc-per-node: {here}, and this machine has {count} CUDA devices")
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]{0,3}))?", name):
        raise InputError(f"--device: {name!r} is not auto, cpu, cuda or cuda:N")
    kind, _, number = name.partition(":")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise InputError(f"--device: {name!r} is not here; this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device(name)


def choose_precision(amp: str, device: torch.device) -> torch.dtype | None:
    """The type to autocast to, None for float32 alone.

    auto: bfloat16 on CUDA where it is supported and float16 where it is not; nothing on the CPU, where bfloat16 pays
    only on processors with instructions for it. float32 is never TF32 here, which is torch's default too.
    """
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)


def autocast(device: torch.device, precision: torch.dtype | None) -> AbstractContextManager:
    """The autocast context for `precision`; one that does nothing for None."""
    return torch.autocast(device.type, dtype=precision, enabled=precision is not None)


def processor() -> tuple[str, set[str]]:
    """The processor's name, and what it has (avx2, avx512_bf16, amx_tile, ...): nothing where it cannot be asked."""
    unnamed, lines = f"{platform.machine()} CPU", {}
    with suppress(AttributeError, RuntimeError):  # of newer versions of torch
        told = torch.cpu.get_capabilities()
        return str(told.get("cpu_name") or unnamed), {name for name, has in told.items() if has is True}
    with suppress(OSError):
        lines = dict(re.findall(r"^(model name|flags)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
    return lines.get("model name", unnamed), set(lines.get("flags", "").split())


def tune_cpu() -> None:
    """Make this process faster on the CPU, before its first model; but for rounding nothing else changes.

    The commands call it. A library leaves such settings to its user, who calls it once: `minisweet.tune_cpu()`.

    Where glibc allocates memory, the process keeps what it frees. By default each large tensor is new memory from the
    kernel, which zeroes it page by page at first touch, in every step again: 10 to 20% of a training step.

    Processors with AVX512-BF16 and without AMX are mostly AMD's. MKL, which torch takes for float32, does not use
    AVX-512 on them, and oneDNN needs half of its time. torch leaves float32 to oneDNN only with leave to round to
    bfloat16 on the way ("medium"). oneDNN takes that leave with AMX, so it is not given there; elsewhere products with
    the identity check that nothing is rounded. Who has set torch's precision of float32 keeps what was set.
    """
    if sys.platform == "linux" and hasattr(glibc := ctypes.CDLL(None), "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from malloc.h
        glibc.mallopt(M_MMAP_MAX, 0)
        glibc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    onednn, cuda, (_, has) = getattr(torch.backends.mkldnn, "matmul", None), torch.backends.cuda.matmul, processor()
    if "avx512_bf16" not in has or "amx_tile" in has or not hasattr(onednn, "fp32_precision"):  # from torch 2.9 on
        return
    with suppress(AttributeError, RuntimeError):  # torch cannot tell what was set in several ways
        before = torch.get_float32_matmul_precision(), onednn.fp32_precision, cuda.fp32_precision
        if before == ("highest", "none", "none"):
            torch.set_float32_matmul_precision("medium")
            is_fine = onednn.fp32_precision == "bf16" and rounds_nothing()
            if not is_fine:
                torch.set_float32_matmul_precision("highest")
                onednn.fp32_precision = "none"
            if not is_fine or torch.cuda.is_available():
                cuda.fp32_precision = "none"  # not TF32


def rounds_nothing() -> bool:
    """Whether the CPU's products in float32 keep all bits, those of training and of inference."""
    for D in (64, 384):
        eye, one = torch.eye(D, dtype=torch.float32, device="cpu"), torch.ones(D, dtype=torch.float32, device="cpu")
        fine = one + one.cumsum(0).outer(one) * 2**-20  # (D, D)
        # A linear layer with its bias, of one row, its two gradients as autograd multiplies them, and a batch.
        found = [F.linear(fine, eye, one) - 1, F.linear(fine[-1:], eye), fine @ eye, (fine.T @ eye).T]
        found.append((fine.expand(3, D, D) @ eye.expand(3, D, D))[2])
        if not all(torch.equal(product, fine[-len(product) :]) for product in found):
            return False
    return True


def keep_compiled_products() -> None:
    """Keep 8,192 of the products that oneDNN compiles for each shape at first sight, not 1,024, in some 100 MB more.

    Texts of all lengths need that many: early exit in batches takes 0.8 of the time. oneDNN hears it before the
    process's first product, so before `tune_cpu`, and unless the environment says otherwise.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")


def device_name(device: torch.device) -> str:
    """What a reader of the results should know of the device."""
    cpu = f"{processor()[0]}, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return name + (f", {place().processes} processes" if place().processes > 1 else "")


def together(main: Callable[[], None]) -> Callable[[], None]:
    """`main` as one of the processes of torchrun, of which the first alone prints; without torchrun `main` itself.

    What is returned raises InputError where the environment is none of torchrun's, or the processes do not meet.
    """

    def run() -> None:
        here = place_by_torchrun()
        if here.processes == 1:
            main()
            return
        if here.rank:  # the others have nothing to say but what nobody foresaw
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.__stderr__)
        if cuda := torch.cuda.is_available():
            torch.cuda.set_device(here.local_rank % torch.cuda.device_count())
        backends = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        try:
            torch.distributed.init_process_group(backends, timeout=timedelta(hours=2))  # as long as a download may take
        except (RuntimeError, ValueError) as error:
            raise InputError(f"torchrun: the processes do not meet ({error})") from None
        PLACES.append(here)
        farewell = torch.distributed.new_group(backend="gloo", timeout=FAREWELL)
        try:
            main()
            of_all(0)
        except (InputError, OSError, SystemExit) as error:
            if here.rank:  # torchrun ends the first one, which may be writing, with us
                start = time.monotonic()
                with suppress(RuntimeError):
                    torch.distributed.barrier(farewell)
                waited = timedelta(seconds=time.monotonic() - start)
                if waited > 0.9 * FAREWELL and not isinstance(error, SystemExit):  # it has not failed, nor said why
                    print(one_line(f"process {here.rank}: error: {error}"), file=sys.__stderr__, flush=True)
            raise
        torch.distributed.destroy_process_group()

    return run


@contextmanager
def in_turn() -> Iterator[None]:
    """Within, models and data are fetched: by the first process, then by each machine's first, then the others."""
    turn = 0 if place().rank == 0 else 1 if place().local_rank == 0 else 2
    for _ in range(turn):
        of_all(0)
    yield
    for _ in range(2 - turn):
        of_all(0)


def own_rows(batch: NamedTuple) -> tuple[NamedTuple, float]:
    """This process's rows of a `Batch`, and their share of it. Where it has none, it takes one that counts nothing."""
    rank, _, processes = place()
    has_rows = rank < len(batch.rows)
    rows = slice(rank, None, processes) if has_rows else slice(1)
    mine = type(batch)(*(tensor[rows] for tensor in batch))
    return mine, len(mine.rows) / len(batch.rows) if has_rows else 0.0


def add_up_gradients(parameters: Sequence[nn.Parameter], losses: Tensor, weight: float) -> Tensor:
    """Make the gradients, in place, and the losses (K,) those of the whole batch; returns the losses."""
    if place().processes == 1:
        return losses
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), losses])
    flat = flat * weight if weight else torch.zeros_like(flat)  # a row that counts nothing may give NaN
    with_others(torch.distributed.all_reduce, flat)
    *gradients, losses = flat.split([*(p.numel() for p in parameters), len(losses)])
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.view_as(parameter)
    return losses.clone()  # a view would keep all of `flat`


def with_others(operation: Callable, *arguments: object) -> None:
    """Call what all processes must call. Raises InputError where one of them has ended."""
    try:
        operation(*arguments)
    except RuntimeError:
        raise InputError("torchrun: another process has ended, and so does this one") from None


def of_all(value: object) -> list:
    """All processes' values, of anything that can be pickled, in the order of their ranks. They wait for each other."""
    values = [value] * place().processes
    if len(values) > 1:
        with_others(torch.distributed.all_gather_object, values, value)
    return values
