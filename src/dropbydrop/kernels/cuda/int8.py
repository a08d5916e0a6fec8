"""The kernel "cuda-i8": products in 8-bit integers, from codebooks in shared memory (int8.cu).

    steps, units = rotate_rows(x, rotation)      one launch: Q x, rounded to bytes
    y = product(steps, units, planes, ...)       one launch for up to MOST matrices of an input
    group

Inputs are rounded to 255 steps of their block of 128, codebooks to 255 steps of the largest entry
of a plane; the integer sums are exact. Both errors are uniform roundings: about 0.7 % of the inputs
(they are rotated, so a block looks Gaussian) and 0.7 to 0.8 % of the entries, 1 % together, against
the noise of the codes themselves of 23 % at 2 bits and 7 % at 4: 2 % more of its power there. With
more planes they would soon dominate, so when none is named it runs for up to MOST_PLANES
(`cuda.takes`). A set whose entries lie on such a grid would leave the first alone.

Limits: blocks of 128 inputs, 1 to 16 rows of x, what fits in the shared memory of a block: Hadamard
factors up to LARGEST_BLOCK, and codebooks beside one row of x (`check_fits`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dropbydrop.coding.code import ENTRIES, GROUP
from dropbydrop.coding.rotation import Rotation
from dropbydrop.system.errors import KernelError

from ..registry import MAX_GEMV_ROWS, TYPES
from .nvrtc import Function, pointer, source
from .ops import check_planes

NAME = "cuda-i8"
SOURCE = source("rotate.cu", "int8.cu")
BLOCK = 128  # inputs that share a unit: 16 groups
MOST = 4  # matrices of a launch
MOST_PLANES = 4  # that are read with this kernel when none is named
LARGEST_BLOCK = 1 << 15  # of a Hadamard factor: 144 KiB of shared memory
THREADS = 512
_SHARED = 227 << 10  # of a block of threads on compute capability 9.0
_REGISTERS = 1 << 16  # of a multiprocessor


@dataclass(frozen=True)
class Plan:
    """The compile-time constants of int8.cu and the shared memory they need."""

    P: int
    N: int
    R: int
    LANES: int
    COPIES: int
    VECTOR: int
    MATRICES: int
    RESIDENT: int

    def defines(self) -> dict[str, int]:
        """For the compiler."""
        return {**vars(self), "THREADS": THREADS}

    def shared(self, blocks: int) -> int:
        """Bytes of shared memory."""
        return _shared(self.P, self.N, self.COPIES, blocks)


def _shared(planes: int, rows: int, copies: int, blocks: int) -> int:
    """Bytes: the copies of the codebooks, the rows of x."""
    return planes * ENTRIES * copies * GROUP + rows * blocks * BLOCK


def _resident(planes: int, n: int, r: int, shared: int, limit: int) -> int:
    """Blocks of threads a multiprocessor is to hold: as shared memory and registers let it.

    Registers: codes and their address (6) and sums (n) a plane and row, inputs (5 a row of x).
    """
    registers = 30 + planes * r * (6 + n) + 5 * n
    return max(1, min(2, limit // (shared + 1024), _REGISTERS // (THREADS * registers)))


def plan(
    n: int, rows: int, groups: int, prefix: int, limit: int = _SHARED, matrices: int = 1
) -> Plan:
    """How a product with `rows` rows of W runs. What changes its result (LANES) follows from the
    shape of W alone.

    Raises:
        KernelError: not even one row of x fits beside the codebooks.
    """
    blocks = -(-groups * GROUP // BLOCK)
    lanes = min(32, 1 << (blocks - 1).bit_length())
    vector = 16 if groups % 16 == 0 else 4 if groups % 4 == 0 else 1
    r = 2 if prefix <= 4 and rows * lanes >= 1 << 17 else 1
    for copies in (16, 8, 4):
        for few in (4, 2, 1):
            shared = _shared(prefix, few, copies, blocks)
            if few < 2 * n and few * r * prefix <= 16 and shared <= limit:
                resident = _resident(prefix, few, r, shared, limit)
                return Plan(prefix, few, r, lanes, copies, vector, matrices, resident)
    raise KernelError(
        f"{groups * GROUP} inputs and {prefix} planes do not fit into {limit} bytes of shared "
        f"memory, which kernel {NAME!r} needs them in. Choose the kernel triton for this model."
    )


def check_fits(rotation: Rotation, prefix: int, limit: int = _SHARED) -> None:
    """KernelError where an input group's inputs or matrices cannot be placed."""
    plan(1, 1, rotation.d_in // GROUP, prefix, limit)
    check_rotation(rotation, NAME, "triton")


def check_rotation(rotation: Rotation, name: str, other: str) -> None:
    """KernelError where a Hadamard factor is too large for kernel `name`; `other` takes it."""
    if rotation.block > LARGEST_BLOCK:
        raise KernelError(
            f"a Hadamard factor of {rotation.block}; kernel {name!r} takes at most "
            f"{LARGEST_BLOCK}. Choose the kernel {other} for this model."
        )


def prepare(tables: Tensor) -> tuple[Tensor, Tensor]:
    """Codebooks [P, 256, 8] -> bytes int8 [P, 256, 8] and units float32 [P], on the same device."""
    units = tables.float().abs().amax((1, 2)) / 127
    steps = torch.round(tables.float() / units.clamp_min(1e-30)[:, None, None])
    return steps.to(torch.int8).contiguous(), units


def shared_memory(device: torch.device) -> int:
    """Bytes that a block of threads may have on a device."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


@cache
def _function(name: str, plan: Plan | None, device: int) -> Function:
    return Function(SOURCE, name, plan.defines() if plan else {}, device)


def spans(rotation: Rotation) -> tuple[int, int, int]:
    """How `rotate_rows` cuts d_in outputs: (outputs of a block, blocks, threads of a block)."""
    span = max(rotation.block, BLOCK)
    a_thread = 8 if rotation.odd is None else 1  # outputs; with an odd factor each is a long sum
    return span, -(-rotation.d_in // span), min(1024, max(BLOCK, span // a_thread))


def rotate_arguments(x: Tensor, rotation: Rotation, steps: Tensor, units: Tensor) -> list[Any]:
    """The arguments of `rotate_rows` in int8.cu, in its order."""
    odd = 1 if rotation.odd is None else rotation.odd.shape[0]
    span = spans(rotation)[0]
    tensors = (x, rotation.signs, rotation.odd, steps, units)
    sizes = (TYPES[x.dtype], rotation.d_in, odd, rotation.block, span, units.shape[1])
    return [*map(pointer, tensors), *map(ctypes.c_int, sizes)]


def rotate_rows(x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """x [n, d], not rotated -> (steps int8 [n, 128 * blocks], units float32 [n, blocks])."""
    x, (n, d) = x.contiguous(), x.shape
    blocks = -(-d // BLOCK)
    steps = torch.empty(n, blocks * BLOCK, dtype=torch.int8, device=x.device)
    units = torch.empty(n, blocks, device=x.device)
    span, count, threads = spans(rotation)
    _function("rotate_rows", None, x.device.index).launch(
        (count, n),
        threads,
        4 * (span + span // 8),
        rotate_arguments(x, rotation, steps, units),
        overlap=True,
    )
    return steps, units


class _Matrices(ctypes.Structure):
    _fields_ = (("codes", ctypes.c_void_p * 8 * MOST), ("end", ctypes.c_int * MOST))


def product_arguments(
    steps: Tensor,
    units: Tensor,
    planes: Sequence[Sequence[Tensor]],
    books: Tensor,
    book_units: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> list[Any]:
    """The arguments of `product` in int8.cu, in its order."""
    matrices, rows = _Matrices(), 0
    for i, own in enumerate(planes):
        rows += own[0].shape[0]
        matrices.end[i] = rows
        for m, plane in enumerate(own):
            matrices.codes[i][m] = plane.data_ptr()
    tensors = (books, book_units, steps, units, scales, bias, out)
    sizes = (TYPES[out.dtype], steps.shape[0], planes[0][0].shape[1])
    return [matrices, *map(pointer, tensors), *map(ctypes.c_int, sizes)]


def product(
    steps: Tensor,
    units: Tensor,
    planes: Sequence[Sequence[Tensor]],
    books: Tensor,
    book_units: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """x as `rotate_rows` gives it, n <= 16, times matrices that lie below each other.

    Args:
        planes: planes 1..P, uint8 [d_out, G], of each of at most MOST matrices.
        books, book_units: from `prepare`.
        scales, bias: float32 [d_out of all matrices]; bias may be None.

    Returns:
        [n, d_out of all matrices] of `dtype`.
    """
    for own in planes:
        check_planes(own, books)
    n, groups = steps.shape[0], planes[0][0].shape[1]
    rows = sum(own[0].shape[0] for own in planes)
    aligned = not any(plane.data_ptr() % 16 for own in planes for plane in own)
    if n > MAX_GEMV_ROWS or dtype not in TYPES or not aligned or len(planes) > MOST:
        raise ValueError(
            f"{n} rows of {dtype}, {len(planes)} matrices; need at most {MAX_GEMV_ROWS} and "
            f"{MOST}, and planes aligned to 16 bytes"
        )
    device = steps.device
    properties = torch.cuda.get_device_properties(device)
    limit = shared_memory(device)
    chosen = plan(n, rows, groups, len(planes[0]), limit, len(planes))
    shared = chosen.shared(units.shape[1])
    out = torch.empty(n, rows, dtype=dtype, device=device)
    function = _function("product", chosen, device.index)
    resident = properties.multi_processor_count * function.resident(THREADS, shared)
    useful = -(-rows // (chosen.R * 32 // chosen.LANES * THREADS // 32))
    function.launch(
        (min(resident, useful), -(-n // chosen.N)),
        THREADS,
        shared,
        product_arguments(steps, units, planes, books, book_units, scales, bias, out),
        overlap=True,
    )
    return out
