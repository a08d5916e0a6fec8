"""The kernel "cuda-i16": products with trellis planes in exact integers (trellis.cu, labels.cu).

    inputs = rotate_rows(x, rotation, rows)      one launch: Q x, and the largest size of each row
    y = product(inputs, planes, ...)             one launch for up to MOST matrices of a group
    dropbydrop::gpu_trellis_decode(...)          a dense matrix, exactly: an operator, as in ops.py

Inputs are rounded to int16, one step a row of x, as the native CPU kernels do: an error of 2e-5 of
the output. The integer sums are exact, so results are the same however the work is cut.

Limits: 1 to 16 rows of x, Hadamard factors up to int8.LARGEST_BLOCK (`check_fits`), devices whose
blocks of threads may have 97 KiB of shared memory (all from compute capability 8.0 on).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dropbydrop.coding.rotation import Rotation

from ..registry import MAX_GEMV_ROWS, TYPES
from .int8 import MOST, check_rotation, shared_memory, spans
from .nvrtc import Function, pointer, source
from .ops import fake, operator
from .trellis_tables import PAIR_BYTES, Tables

NAME = "cuda-i16"
SOURCE = source("rotate.cu", "labels.cu", "trellis.cu")
DENSE = source("labels.cu", "trellis_dense.cu")
MOST_STEPS = 127 * 256 + 127  # of an input, to either side: native/kernels/trellis.h
TILE = 16  # rows of W that a warp takes
PIECE = 128  # inputs that a warp takes at once
_LONGEST = 1 << 15  # inputs whose sums in a lane fit 32 bits: 63 * MOST_STEPS * _LONGEST / 32
_ENTRIES = 3 * 256  # of the tables of a plane
_VALUES = 64  # bytes
_OVERHEAD = 2  # of a unit of work, in pieces: its sums are brought together


@dataclass(frozen=True)
class Plan:
    """The compile-time constants of trellis.cu."""

    N: int
    THREADS: int
    EXTRA: int
    VECTOR: int

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        return table_bytes(128) if self.EXTRA < 0 else PAIR_BYTES

    def defines(self) -> dict[str, int]:
        """For the compiler."""
        return {**vars(self), "STRIDE": 128, "MOST_STEPS": MOST_STEPS}


def table_bytes(stride: int) -> int:
    """Bytes of shared memory of one plane."""
    return _ENTRIES * stride + _VALUES


def plan(n: int, d: int, limit: int, extra: Sequence[int]) -> Plan:
    """How a product with n rows of x of d inputs runs; `limit` of a block's shared memory; extra:
    of `Tables`, of the planes that are read."""
    few = 1 if n == 1 else 2 if n == 2 else 4
    older = max(extra) if min(extra) >= 0 and limit >= PAIR_BYTES else -1
    threads = {1: 768 if older else 1024, 2: 512, 4: 384}[few]  # as registers allow
    return Plan(few, threads, older, vector_of(d))


def vector_of(d: int) -> int:
    """Bytes that a load of codes may take."""
    return 4 if d % 4 == 0 else 1


def splits(tiles: int, d: int, blocks: int, warps: int) -> tuple[int, int]:
    """How a plane's `blocks` of `warps` warps cut `tiles` tiles of d inputs: (chunks of these,
    inputs of a chunk). Each block takes as many units of work, which go round its warps; it is as
    fast with half of its warps as with all, with fewer it waits for memory."""
    pieces, few = -(-d // PIECE), -(-warps // 2)

    def cost(count: int) -> int:
        turns, rest = divmod(-(-tiles * count // blocks), warps)
        busy = turns * warps + (max(rest, few) if rest else 0)
        return busy * (-(-pieces // count) + _OVERHEAD)

    least, most = -(-d // _LONGEST), max(1, pieces // 2)
    best = min(range(least, max(least, min(most, 64)) + 1), key=cost)
    each = -(-pieces // best)
    return -(-pieces // each), each * PIECE


def tiles_of(rows: Sequence[int]) -> int:
    """Tiles of matrices with so many rows each."""
    return sum(-(-count // TILE) for count in rows)


@cache
def _function(name: str, plan: Plan | None, device: int) -> Function:
    return Function(SOURCE, name, plan.defines() if plan else {}, device)


@dataclass(frozen=True)
class Inputs:
    """Rows of x as `rotate_rows` leaves them.

    Attributes:
        rotated: float32 [n, d padded to a multiple of 128], zeros past d.
        largest: int32 [n, spans], the largest size in each span, as its bits.
        arrived: int32, counters that are zero.
        d: inputs.
    """

    rotated: Tensor
    largest: Tensor
    arrived: Tensor
    d: int


def counters(n: int, rows: Sequence[int]) -> int:
    """Counters that products of n rows of x with matrices of so many rows need."""
    return -(-n // 4) * tiles_of(rows)


def check_fits(rotation: Rotation) -> None:
    """KernelError where an input group's inputs cannot be placed."""
    check_rotation(rotation, NAME, "torch")


def new_inputs(x: Tensor, rotation: Rotation, rows: Sequence[int]) -> Inputs:
    """Memory for `rotate_rows`; rows: of all matrices that will be multiplied."""
    (n, d), (_, count, _) = x.shape, spans(rotation)
    return Inputs(
        torch.empty(n, -(-d // PIECE) * PIECE, device=x.device),
        torch.empty(n, count, dtype=torch.int32, device=x.device),
        torch.empty(counters(n, rows), dtype=torch.int32, device=x.device),
        d,
    )


def rotate_arguments(x: Tensor, rotation: Rotation, to: Inputs) -> list[Any]:
    """The arguments of `rotate_floats` in trellis.cu, in its order."""
    odd = 1 if rotation.odd is None else rotation.odd.shape[0]
    tensors = (x, rotation.signs, rotation.odd, to.rotated, to.largest, to.arrived)
    sizes = (TYPES[x.dtype], to.d, odd, rotation.block, spans(rotation)[0])
    counts = (to.rotated.shape[1], to.arrived.numel())
    return [*map(pointer, tensors), *map(ctypes.c_int, (*sizes, *counts))]


def rotate_rows(x: Tensor, rotation: Rotation, rows: Sequence[int]) -> Inputs:
    """x [n, d], not rotated, for products with matrices of so many rows each."""
    x = x.contiguous()
    inputs = new_inputs(x, rotation, rows)
    span, count, threads = spans(rotation)
    _function("rotate_floats", None, x.device.index).launch(
        (count, x.shape[0]),
        threads,
        4 * (span + span // 8 + 32),
        rotate_arguments(x, rotation, inputs),
        overlap=True,
    )
    return inputs


class _Planes(ctypes.Structure):
    _fields_ = (("count", ctypes.c_int), ("bits", ctypes.c_int * 8))

    @staticmethod
    def of(bits: Sequence[int]) -> _Planes:
        return _Planes(len(bits), (ctypes.c_int * 8)(*bits))


class _Matrices(ctypes.Structure):
    _fields_ = (("codes", ctypes.c_void_p * 8 * MOST), ("rows", ctypes.c_int * MOST))


def product_arguments(
    inputs: Inputs,
    planes: Sequence[Sequence[Tensor]],
    rows: Sequence[int],
    tables: Tables,
    scales: Tensor,
    bias: Tensor | None,
    out: Tensor,
    cut: tuple[int, int],
    first_counter: int = 0,
) -> list[Any]:
    """The arguments of `product` in trellis.cu, in its order; cut: of `splits`. The caller keeps
    what they point to; the first is the memory for partial sums."""
    matrices, prefix, n = _Matrices(), len(planes[0]), out.shape[0]
    for i, own in enumerate(planes):
        matrices.rows[i] = rows[i]
        for m, plane in enumerate(own):
            matrices.codes[i][m] = plane.data_ptr()
    parts = torch.empty(n, cut[0], prefix, sum(rows), dtype=torch.int64, device=out.device)
    arrived = inputs.arrived[first_counter:]
    tensors = (
        tables.labels, tables.values, tables.pairs, tables.folds, tables.scales,
        inputs.rotated, inputs.largest, scales, bias, parts, arrived, out,
    )  # fmt: skip
    sizes = (TYPES[out.dtype], n, inputs.d, inputs.rotated.shape[1], inputs.largest.shape[1], *cut)
    kinds = _Planes.of(tables.bits[:prefix])
    return [parts, matrices, kinds, *map(pointer, tensors), *map(ctypes.c_int, sizes)]


def product(
    inputs: Inputs,
    planes: Sequence[Sequence[Tensor]],
    rows: Sequence[int],
    tables: Tables,
    scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    first_counter: int = 0,
) -> Tensor:
    """x as `rotate_rows` gives it, n <= 16, times matrices that lie below each other.

    Args:
        planes: planes 1..P as stored, of each of at most MOST matrices.
        rows: of each matrix.
        scales, bias: float32 [d_out of all matrices]; bias may be None.
        first_counter: of `inputs.arrived` that no other product uses.

    Returns:
        [n, d_out of all matrices] of `dtype`.
    """
    n, device = inputs.rotated.shape[0], inputs.rotated.device
    properties = torch.cuda.get_device_properties(device)
    prefix = len(planes[0])
    chosen = plan(n, inputs.d, shared_memory(device), tables.extra[:prefix])
    _check(planes, chosen.VECTOR, n, dtype)
    function, shared = _function("product", chosen, device.index), chosen.shared
    resident = properties.multi_processor_count * function.resident(chosen.THREADS, shared)
    turns = -(-n // chosen.N)
    blocks = max(1, resident // (turns * prefix))  # of a plane and a pass
    cut = splits(tiles_of(rows), inputs.d, blocks, chosen.THREADS // 32)
    blocks = min(blocks, tiles_of(rows) * cut[0])
    out = torch.empty(n, sum(rows), dtype=dtype, device=device)
    _, *arguments = product_arguments(
        inputs, planes, rows, tables, scales, bias, out, cut, first_counter
    )
    grid = (blocks * prefix, turns)
    function.launch(grid, chosen.THREADS, shared, arguments, overlap=True)
    return out


def _check(planes: Sequence[Sequence[Tensor]], vector: int, n: int, dtype: torch.dtype) -> None:
    aligned = not any(plane.data_ptr() % vector for own in planes for plane in own)
    whole = all(plane.is_contiguous() for own in planes for plane in own)
    if n > MAX_GEMV_ROWS or dtype not in TYPES or not (aligned and whole) or len(planes) > MOST:
        raise ValueError(
            f"{n} rows of {dtype}, {len(planes)} matrices; need at most {MAX_GEMV_ROWS} and "
            f"{MOST}, and contiguous planes aligned to {vector} bytes"
        )


class _Codes(ctypes.Structure):
    _fields_ = (("at", ctypes.c_void_p * 8),)


def dense_defines(planes: int, vector: int, limit: int) -> dict[str, int]:
    """The compile-time constants of trellis_dense.cu."""
    stride = next(s for s in (128, 64, 32, 16) if planes * table_bytes(s) <= limit)
    return {"THREADS": 512, "STRIDE": stride, "VECTOR": vector}


def dense_arguments(
    planes: Sequence[Tensor],
    bits: Sequence[int],
    tables: Sequence[Tensor],
    scales: Tensor,
    out: Tensor,
) -> list[Any]:
    """The arguments of `decode` in trellis_dense.cu, in its order; tables: `Tables.tensors`."""
    at = _Codes((ctypes.c_void_p * 8)(*[plane.data_ptr() for plane in planes]))
    kinds, tensors = _Planes.of(bits[: len(planes)]), (*tables, scales, out)
    sizes = (TYPES[scales.dtype], TYPES[out.dtype], *out.shape)
    return [at, kinds, *map(pointer, tensors), *map(ctypes.c_int, sizes)]


@cache
def _decoder(planes: int, vector: int, limit: int, device: int) -> tuple[Function, int, int]:
    """The function, its threads and its shared memory."""
    constants = dense_defines(planes, vector, limit)
    function = Function(DENSE, "decode", constants, device)
    return function, constants["THREADS"], planes * table_bytes(constants["STRIDE"])


@operator(
    "gpu_trellis_decode(Tensor[] planes, Tensor labels, Tensor values, Tensor plane_scales,"
    " int[] bits, Tensor scales, ScalarType dtype) -> Tensor"
)
def decode(
    planes: Sequence[Tensor],
    labels: Tensor,
    values: Tensor,
    plane_scales: Tensor,
    bits: Sequence[int],
    scales: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Planes 1..P as stored, `Tables`, row scales [d_out] -> the weight [d_out, d_in] in rotated
    coordinates, float32, bfloat16, float16. Bit for bit what `CodebookSet.decode` gives.
    """
    scales = scales.contiguous()
    device, rows, d = scales.device, len(scales), planes[0].shape[1]
    out = torch.empty(rows, d, dtype=dtype, device=device)
    properties, limit = torch.cuda.get_device_properties(device), shared_memory(device)
    aligned = not any(plane.data_ptr() % 4 for plane in planes)
    vector = vector_of(d) if aligned else 1
    function, threads, shared = _decoder(len(planes), vector, limit, device.index)
    resident = properties.multi_processor_count * function.resident(threads, shared)
    units = tiles_of([rows]) * -(-d // PIECE)
    blocks = min(resident, -(-units // (threads // 32)))
    tables = labels, values, plane_scales
    arguments = dense_arguments(planes, bits, tables, scales, out)
    function.launch((blocks, 1), threads, shared, arguments)
    return out


@fake("gpu_trellis_decode")
def _(planes, labels, values, plane_scales, bits, scales, dtype):  # type: ignore[no-untyped-def]
    return scales.new_empty((scales.shape[0], planes[0].shape[1]), dtype=dtype)
