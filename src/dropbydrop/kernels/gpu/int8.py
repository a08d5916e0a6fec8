"""The kernel "cuda-i8": products in 8-bit integers, from codebooks in shared memory (int8.cu).

    dropbydrop::i8_round(x) -> steps int8 [n, 128 * blocks], units float32 [n, blocks]
    dropbydrop::i8_product(steps, units, planes, books, book_units, scales, bias, dtype)
        -> [n, d_out]

Inputs are rounded to 255 steps of their block of 128, codebooks to 255 steps of the largest entry
of a plane; the integer sums are exact. Both errors are uniform roundings: about 0.7 % of the inputs
(they are rotated, so a block looks Gaussian) and 0.7 to 0.8 % of the entries, 1 % together, against
the noise of the codes themselves of 23 % at 2 bits and 7 % at 4. At 6 planes and more they would
dominate, hence only when named. A set whose entries lie on such a grid would leave the first alone.

Limits: blocks of 128 inputs, 1 to 16 rows of x, what fits in the shared memory of a block.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...code import ENTRIES, GROUP
from ...errors import KernelError
from .nvrtc import Function
from .ops import FEW, TYPES, check_planes, fake

NAME = "cuda-i8"
SOURCE = (Path(__file__).parent / "int8.cu").read_text()
BLOCK = 128  # inputs that share a unit: 16 groups
THREADS = 512
_SHARED = 227 << 10  # of a block of threads on compute capability 9.0
_LIBRARY = torch.library.Library("dropbydrop", "FRAGMENT")
_CODES = {dtype: i for i, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16))}


@dataclass(frozen=True)
class Plan:
    """The compile-time constants of int8.cu and the shared memory they need."""

    P: int
    N: int
    R: int
    LANES: int
    COPIES: int
    VECTOR: int

    def shared(self, blocks: int) -> int:
        """Bytes: the copies of the codebooks, N rows of x."""
        return self.P * ENTRIES * self.COPIES * GROUP + self.N * blocks * BLOCK

    def defines(self) -> dict[str, int]:
        """For the compiler."""
        return {**vars(self), "THREADS": THREADS}


def plan(n: int, d_out: int, groups: int, prefix: int, limit: int = _SHARED) -> Plan:
    """How a product runs. What changes its result (LANES) follows from the shape of W alone.

    Raises:
        KernelError: not even one row of x fits beside the codebooks.
    """
    blocks = -(-groups * GROUP // BLOCK)
    lanes = min(32, 1 << (blocks - 1).bit_length())
    vector = 16 if groups % 16 == 0 else 4 if groups % 4 == 0 else 1
    r = 2 if prefix <= 4 and d_out * lanes >= 1 << 17 else 1
    for copies in (16, 8, 4):
        for rows in (4, 2, 1):
            fits = Plan(prefix, rows, r, lanes, copies, vector)
            if rows < 2 * n and rows * r * prefix <= 32 and fits.shared(blocks) <= limit:
                return fits
    raise KernelError(
        f"{groups * GROUP} inputs and {prefix} planes do not fit into {limit} bytes of shared "
        f"memory, which kernel {NAME!r} needs them in. Choose the kernel triton for this model."
    )


def check_fits(d_in: int, prefix: int) -> None:
    """KernelError where `plan` cannot place a site's matrices."""
    plan(1, 1, d_in // GROUP, prefix)


def prepare(tables: Tensor) -> tuple[Tensor, Tensor]:
    """Codebooks [P, 256, 8] -> bytes int8 [P, 256, 8] and units float32 [P], on the same device."""
    units = tables.float().abs().amax((1, 2)) / 127
    steps = torch.round(tables.float() / units.clamp_min(1e-30)[:, None, None])
    return steps.to(torch.int8).contiguous(), units


@lru_cache(maxsize=64)
def _function(name: str, plan: Plan | None, device: int) -> Function:
    return Function(SOURCE, name, plan.defines() if plan else {}, device)


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


_LIBRARY.define("i8_round(Tensor x) -> (Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag)
_LIBRARY.define(
    "i8_product(Tensor steps, Tensor units, Tensor[] planes, Tensor books, Tensor book_units, "
    "Tensor scales, Tensor? bias, ScalarType dtype) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x float32 [n, d] -> (steps int8 [n, 128 * blocks], units float32 [n, blocks])."""
    n, d = x.shape
    blocks = -(-d // BLOCK)
    steps = torch.empty(n, blocks * BLOCK, dtype=torch.int8, device=x.device)
    units = torch.empty(n, blocks, device=x.device)
    x = x.contiguous()
    function = _function("round_rows", None, x.device.index)
    warps = 4
    function.launch(
        (-(-n * blocks // warps), 1),
        32 * warps,
        0,
        [*map(_pointer, (x, steps, units)), *map(ctypes.c_int, (n, d, blocks))],
    )
    return steps, units


@fake("i8_round")
def _(x):  # type: ignore[no-untyped-def]
    blocks = -(-x.shape[1] // BLOCK)
    steps = x.new_empty((x.shape[0], blocks * BLOCK), dtype=torch.int8)
    return steps, x.new_empty((x.shape[0], blocks))


class _Planes(ctypes.Structure):
    _fields_ = (("at", ctypes.c_void_p * 8),)


def arguments(
    steps: Tensor,
    units: Tensor,
    planes: Sequence[Tensor],
    books: Tensor,
    book_units: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> list[ctypes.Structure | ctypes.c_void_p | ctypes.c_int]:
    """The arguments of `product` in int8.cu, in its order."""
    addresses = _Planes((ctypes.c_void_p * 8)(*[plane.data_ptr() for plane in planes]))
    tensors = (books, book_units, steps, units, scales, bias, out)
    types = (_CODES[scales.dtype], 0 if bias is None else _CODES[bias.dtype], _CODES[out.dtype])
    d_out, groups = planes[0].shape
    return [
        addresses,
        *map(_pointer, tensors),
        *map(ctypes.c_int, (*types, steps.shape[0], d_out, groups)),
    ]


def product(
    steps: Tensor,
    units: Tensor,
    planes: Sequence[Tensor],
    books: Tensor,
    book_units: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """x as `round_rows` gives it, n <= 16; planes 1..P -> [n, d_out] of `dtype`."""
    check_planes(planes, books)
    n, (d_out, groups) = steps.shape[0], planes[0].shape
    if n > FEW or dtype not in TYPES or any(plane.data_ptr() % 16 for plane in planes):
        raise ValueError(f"{n} rows of {dtype}; need at most {FEW}, and planes aligned to 16 bytes")
    device = steps.device
    properties: Any = torch.cuda.get_device_properties(device)
    chosen = plan(n, d_out, groups, len(planes), properties.shared_memory_per_block_optin)
    shared = chosen.shared(units.shape[1])
    out = torch.empty(n, d_out, dtype=dtype, device=device)
    each = max(1, properties.shared_memory_per_multiprocessor // (shared + 1024))
    resident = properties.multi_processor_count * min(each, 2048 // THREADS)
    useful = -(-d_out // (chosen.R * 32 // chosen.LANES * THREADS // 32))
    _function("product", chosen, device.index).launch(
        (min(resident, useful), -(-n // chosen.N)),
        THREADS,
        shared,
        arguments(
            steps, units, planes, books, book_units, scales.contiguous(),
            None if bias is None else bias.contiguous(), out,
        ),
    )  # fmt: skip
    return out


@fake("i8_product")
def _(steps, units, planes, books, book_units, scales, bias, dtype):  # type: ignore[no-untyped-def]
    return units.new_empty((steps.shape[0], planes[0].shape[0]), dtype=dtype)


_LIBRARY.impl("i8_round", round_rows, "CUDA")
_LIBRARY.impl("i8_product", product, "CUDA")
