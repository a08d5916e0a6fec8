"""The table of kernels, and which of them runs: the one place where that is decided (`route`).

One row a kernel: name, what it needs, the kinds of planes it reads, whether this machine has it.
"torch" is always there, reads all kinds and is the reference. A kernel is picked once per process,
kind of device and kind of planes: the best one this machine supports there, or the one named by the
environment variable DROPBYDROP_KERNEL, or the one named in a call; a name that cannot be honoured
raises `KernelError`, never a silent substitute. The choice is logged once.

    device    kernels, best first
    cpu       the native ones (native/kernels), torch
    cuda      cuda-i8 (byte planes), cuda-i16 (trellis planes), triton (byte planes), torch

Products with trellis planes are exact sums of integers: inputs are rounded to 16 bits, nothing
else, and all kernels give the same bits. Products with byte planes go through look-up tables.
Names ending in "-u8" use 8-bit tables: about 1 % output error on inputs without outliers (4 %
with one of 20 times the rms), against 0.02 % (0.1 %) for the default 14-bit tables. They are used
only when named. "cuda-i8" rounds codebooks and activations to 8 bits, at about the same cost, but
is the fastest by far: it runs where that is small beside the error of the codes (`fallbacks`).
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from dropbydrop.coding.planes import KINDS
from dropbydrop.system.accelerator import triton_interpreted
from dropbydrop.system.errors import KernelError
from dropbydrop.system.native_library import library, library_path

log = logging.getLogger("dropbydrop.kernels")

VARIABLE = "DROPBYDROP_KERNEL"

MAX_GEMV_ROWS = 16  # rows of x that kernels multiply without a dense matrix; a tensor core's least
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # of x; the numbers are those of C


@dataclass(frozen=True)
class Kernel:
    """One way of multiplying by codes."""

    name: str
    summary: str
    index: int  # in the native library; -1 for torch
    supported: bool
    reason: str  # why it is not supported; empty otherwise
    device: str = "cpu"  # kind of device whose tensors it takes; "any" for torch
    kinds: tuple[str, ...] = tuple(KINDS)  # of planes that it multiplies by

    @property
    def native(self) -> bool:
        """Whether it lives in the native library."""
        return self.index >= 0

    @property
    def gpu(self) -> bool:
        """Whether it is one of `kernels.cuda`."""
        return self.device == "cuda"

    def takes(self, device: str) -> bool:
        """Whether it multiplies tensors on this kind of device."""
        return self.device in ("any", device) or (
            device == "cpu" and self.name == "triton" and triton_interpreted()
        )

    def reads(self, kind: str | None) -> bool:
        """Whether it multiplies by planes of this kind; None is what has none, as the head."""
        return kind is None or kind in self.kinds


@lru_cache(maxsize=1)
def table() -> tuple[Kernel, ...]:
    """All kernels this build knows, best first for each kind of device, "torch" last."""
    rows = []
    lib = library()
    for index in range(lib.drop_kernel_count() if lib else 0):
        assert lib is not None
        ok = bool(lib.drop_kernel_supported(index))
        rows.append(
            Kernel(
                lib.drop_kernel_name(index).decode(),
                lib.drop_kernel_summary(index).decode(),
                index,
                ok,
                "" if ok else "this processor lacks the instructions",
            )
        )
    rows += _gpu_rows()
    rows.append(
        Kernel("torch", "decodes to a dense matrix in torch; any device", -1, True, "", "any")
    )
    return tuple(rows)


def _gpu_rows() -> list[Kernel]:
    """The kernels of `kernels.cuda`, and why one cannot run here."""
    from .cuda import nvrtc

    no_gpu = "" if torch.cuda.is_available() else "no CUDA device was found"
    if not no_gpu and torch.cuda.get_device_capability() < (8, 0):
        no_gpu = "the GPU's compute capability is below 8.0"
    no_triton = "" if find_spec("triton") else "the package triton is not installed"
    on_cuda = no_gpu or nvrtc.missing()
    on_triton = no_triton or ("" if triton_interpreted() else no_gpu)
    rows = [
        ("cuda-i8", on_cuda, "bytes", "CUDA, 8-bit codebooks and activations; 1 % error"),
        ("cuda-i16", on_cuda, "trellis", "CUDA, 16-bit activations; exact sums"),
        ("triton", on_triton, "bytes", "Triton, planes to tensor cores; up to 16 rows"),
    ]
    return [
        Kernel(name, summary, -1, not reason, reason, "cuda", (kind,))
        for name, reason, kind, summary in rows
    ]


def available() -> list[Kernel]:
    """The kernels that run here, best first. Never empty: the last one is "torch"."""
    return [kernel for kernel in table() if kernel.supported]


def by_name(name: str) -> Kernel:
    """The kernel of that name.

    Raises:
        KernelError: unknown to this build, or not supported by this machine.
    """
    for kernel in table():
        if kernel.name == name:
            if kernel.supported:
                return kernel
            raise KernelError(
                f"kernel {name!r} cannot run here: {kernel.reason}. "
                f"Choose one of: {', '.join(k.name for k in available())}."
            )
    hint = (
        ""
        if library()
        else f" No native library was found at {library_path()}; reinstall to build it."
    )
    raise KernelError(
        f"kernel {name!r} is not in this build. Choose one of: "
        f"{', '.join(k.name for k in available())}.{hint}"
    )


@torch.compiler.assume_constant_result
@lru_cache(maxsize=64)
def index(name: str) -> int:
    """The number of a native kernel in the library; KernelError as `by_name`, also for "torch"."""
    kernel = by_name(name)
    if not kernel.native:
        raise KernelError(f"kernel {name!r} has no native operators for the CPU.")
    return kernel.index


def _automatic(device: str, kind: str | None) -> Kernel:
    """The best kernel for a kind of device, of those that are chosen without being named."""
    return next(
        kernel for kernel in available() if kernel.device in ("any", device) and kernel.reads(kind)
    )


def fallbacks(device: str, kind: str, kernel: str | None) -> list[str]:
    """Names of what may run instead of a kernel that does not take an input group, best first: all
    for `device` and `kind`, or none where a kernel was named."""
    if kernel or os.environ.get(VARIABLE):
        return []
    return [k.name for k in available() if k.device in ("any", device) and k.reads(kind)]


def _named(name: str, device: str, kind: str | None) -> Kernel:
    kernel = by_name(name)
    if kernel.takes(device) and kernel.reads(kind):
        return kernel
    fitting = ", ".join(k.name for k in available() if k.takes(device) and k.reads(kind))
    if not kernel.takes(device):
        raise KernelError(
            f"kernel {name!r} multiplies tensors on {kernel.device}, these are on {device}. "
            f"Move the model, or choose one of: {fitting}."
        )
    raise KernelError(
        f"kernel {name!r} reads planes of kind {' and '.join(kernel.kinds)}, these are of kind "
        f"{kind}. Choose one of: {fitting}."
    )


@lru_cache(maxsize=16)
def _preferred(forced: str | None, device: str, kind: str | None) -> Kernel:
    kernel = _named(forced, device, kind) if forced else _automatic(device, kind)
    _log_choice(kernel, device, bool(forced))
    return kernel


@lru_cache(maxsize=16)
def _log_choice(kernel: Kernel, device: str, forced: bool) -> None:
    lib = library()
    threads = f"; threads: {lib.drop_thread_pool().decode()}" if lib and kernel.native else ""
    log.info(
        "%s kernel: %s (%s%s)%s",
        device.upper(),
        kernel.name,
        kernel.summary,
        threads,
        f", forced by {VARIABLE}" if forced else "",
    )


@torch.compiler.assume_constant_result
def select(name: str | None = None, device: str = "cpu", kind: str | None = None) -> Kernel:
    """The kernel to use: `name`, else DROPBYDROP_KERNEL, else the best one here.

    Args:
        device: kind of device (`tensor.device.type`) of the tensors to multiply.
        kind: of the planes to multiply by; None for what has none, as rotations and the head.

    Raises:
        KernelError: see `by_name`; or the kernel named does not take tensors of `device`, or does
            not read planes of `kind`.
    """
    if name:
        return _named(name, device, kind)
    return _preferred(os.environ.get(VARIABLE) or None, device, kind)


@torch.compiler.assume_constant_result
def backend_for(device: str, kernel: str | None = None, kind: str | None = None) -> tuple[str, str]:
    """("native", "gpu" or "torch", name) of what `select` gives for a kind of device and of planes.

    Strings rather than a `Kernel`, so that torch.compile can branch on them.
    """
    found = select(kernel, device, kind)
    return ("native" if found.native else "gpu" if found.gpu else "torch"), found.name


def takes(x: Tensor) -> bool:
    """Whether kernels multiply x [..., d_in]: few rows, of a known type, not to be trained."""
    few = x.numel() <= MAX_GEMV_ROWS * x.shape[-1]
    return few and x.dtype in TYPES and not (x.requires_grad and torch.is_grad_enabled())


def route(x: Tensor, kernel: str | None = None) -> tuple[str, str]:
    """How x [..., d_in] is multiplied by codes or by eight-bit rows, and the kernel's name.

        "native"  few rows of x: look-up tables, by the native library of the CPU
        "gpu"     few rows of x: from planes to products, by `kernels.cuda`
        "dense"   all else: the kernel decodes, torch multiplies

    More rows go through a dense matrix also where tables would still be a little faster: prompts
    and evaluation are then exact to float rounding.
    """
    backend, name = backend_for(x.device.type, kernel)
    return (backend if backend != "torch" and takes(x) else "dense"), name


def describe() -> list[str]:
    """One line a kernel, for `dropbydrop info --kernels`: its name, whether it runs here, the kinds
    of planes that it reads. `*` marks what is in use, for one of these kinds at least."""
    chosen = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for kind in KINDS:
            with suppress(KernelError):  # one that was forced for others
                chosen.append(select(device=device, kind=kind))
    return [
        f"{'*' if kernel in chosen else ' '} {kernel.name:15} "
        f"{'yes' if kernel.supported else 'no':4} {', '.join(kernel.kinds):15} {kernel.summary}"
        f"{f' ({kernel.reason})' if kernel.reason else ''}"
        for kernel in table()
    ]
