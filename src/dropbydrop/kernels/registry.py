"""The table of kernels, and which of them runs.

One row a kernel: name, what it needs, whether this machine has it. "torch" is always there and is
the reference. A kernel is picked once per process: the best native one this machine supports, or
the one named by the environment variable DROPBYDROP_KERNEL, or the one named in a call; a name that
cannot be honoured raises `KernelError`, never a silent substitute. The choice is logged once.

Names ending in "-u8" use 8-bit tables: about 1 % output error on inputs without outliers (up to 6 %
with one of 20 times the rms), against 0.02 % (0.1 %) for the default 14-bit tables. They are used
only when named.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..errors import KernelError
from ._native import PATH, library, log

VARIABLE = "DROPBYDROP_KERNEL"


@dataclass(frozen=True)
class Kernel:
    """One way of multiplying by codes on a CPU."""

    name: str
    summary: str
    index: int  # in the native library; -1 for torch
    supported: bool
    reason: str  # why it is not supported; empty otherwise

    @property
    def native(self) -> bool:
        """Whether it lives in the native library."""
        return self.index >= 0


@lru_cache(maxsize=1)
def table() -> tuple[Kernel, ...]:
    """All kernels this build knows, best first, "torch" last."""
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
    rows.append(Kernel("torch", "decodes to a dense matrix in torch; any device", -1, True, ""))
    return tuple(rows)


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
    hint = "" if library() else f" No native library was found at {PATH}; reinstall to build it."
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
        raise KernelError(f"kernel {name!r} has no native operators.")
    return kernel.index


@lru_cache(maxsize=8)
def _preferred(forced: str | None) -> Kernel:
    kernel = by_name(forced) if forced else available()[0]
    lib = library()
    team = lib.drop_team_kind().decode() if lib and kernel.native else "torch"
    log.info(
        "CPU kernel: %s (%s; threads: %s)%s",
        kernel.name,
        kernel.summary,
        team,
        f", forced by {VARIABLE}" if forced else "",
    )
    return kernel


@torch.compiler.assume_constant_result
def select(name: str | None = None) -> Kernel:
    """The kernel to use: `name`, else DROPBYDROP_KERNEL, else the best one here.

    Raises:
        KernelError: see `by_name`.
    """
    return by_name(name) if name else _preferred(os.environ.get(VARIABLE) or None)


def describe() -> list[str]:
    """One line a kernel, for `dropbydrop info --kernels`; `*` marks the one in use."""
    chosen = select()
    return [
        f"{'*' if kernel is chosen else ' '} {kernel.name:15} "
        f"{'yes' if kernel.supported else 'no':4} {kernel.summary}"
        f"{f' ({kernel.reason})' if kernel.reason else ''}"
        for kernel in table()
    ]
