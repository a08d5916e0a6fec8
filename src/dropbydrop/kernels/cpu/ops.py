"""Torch operators over the native kernels: pure functions that torch.compile and export can see.

    dropbydrop::rotate(x, signs, odd, block, kernel) -> float32, shape of x
    dropbydrop::prepared_group(x, job, width, kernel) -> [n * width], one [n, rows[i]] after another
    dropbydrop::decode(planes, packed, codebooks, scales, rows, groups, first, last, dtype, kernel)
        -> rows first..last of the weight, [last - first, 8 * groups]
    dropbydrop::decode_trellis(planes, codebooks, scales, d_in, first, last, dtype, kernel)
        -> the same of trellis planes, held, [last - first, d_in]

`prepared_group` rotates x, builds its look-up tables (for trellis planes: rounds it to integers)
and multiplies all matrices that read x, in one native call. Everything but x and the result is
described beforehand (`describe_group`) in one small tensor of addresses: passing 20 tensors through
the dispatcher costs several times what a small product does. So it is for this process only; a
graph that is to be saved decodes. Threads follow torch.get_num_threads().

Operators are defined with torch.library.Library rather than `custom_op`, whose checks on every call
cost more than a small product does. Tensors must be contiguous and on the CPU; the callers in this
package see to it. Nothing here differentiates (see prepared_group.py).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dropbydrop.coding.code import GROUP
from dropbydrop.coding.rotation import Rotation
from dropbydrop.system.native_library import library, members

from .. import registry
from ..layout import STRIP, Codebooks, Matrix
from ..registry import TYPES

_library = torch.library.Library("dropbydrop", "DEF")


def operator(schema: str) -> Callable[[Callable], Callable]:
    """Define an operator whose CPU implementation is the decorated function."""

    def register(function: Callable) -> Callable:
        _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        _library.impl(schema.split("(")[0], function, "CPU")
        return function

    return register


def fake(name: str) -> Callable[[Callable], Callable]:
    """Register the decorated function as the fake implementation: shapes and types only."""
    return torch.library.register_fake(f"dropbydrop::{name}", lib=_library)


@lru_cache(maxsize=1)
def native_library() -> Any:
    """The native library; an error where an operator is called without it."""
    lib = library()
    if lib is None:
        raise RuntimeError("dropbydrop operators need the native library")
    return lib


def check_status(status: int) -> None:
    """Raise when a native function reports that it did nothing."""
    if status:
        raise RuntimeError(
            "kernel not supported by this processor, or an input group job that is none"
        )


def pointers(tensors: Sequence[Tensor]) -> ctypes.Array:
    """A C array of the tensors' addresses. The tensors must outlive its use."""
    return (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])


class _Matrix(ctypes.Structure):
    """DropMatrix of native/kernels/c_api.h."""

    _fields_ = (
        ("planes", ctypes.c_void_p),
        ("d_out", ctypes.c_int64),
        ("scales", ctypes.c_void_p),
        ("scale_type", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("bias_type", ctypes.c_int64),
    )


_MAGIC = 0x32707267706E6964  # DROP_INPUT_GROUP_MAGIC
_KINDS = {"bytes": 0, "trellis": 1}  # DROP_BYTES, DROP_TRELLIS
TRELLIS_INPUTS = 1 << 17  # most inputs of a product with trellis planes: its sums fit 32 bits


class GroupStruct(ctypes.Structure):
    """DropInputGroup of native/kernels/c_api.h."""

    _fields_ = (
        *members(ctypes.c_int64, "magic", "kind", "d_in", "block"),
        *members(ctypes.c_void_p, "signs", "odd"),
        *members(ctypes.c_int64, "prefix", "entries"),
        *members(ctypes.c_void_p, "codebooks", "matrices"),
        ("count", ctypes.c_int64),
    )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@operator("rotate(Tensor x, Tensor signs, Tensor? odd, int block, str kernel) -> Tensor")
def rotate(x: Tensor, signs: Tensor, odd: Tensor | None, block: int, kernel: str) -> Tensor:
    """x [n, d] -> Q x, float32 [n, d]; see `coding.rotation`."""
    n, d = x.shape
    out = torch.empty(n, d)
    check_status(
        native_library().drop_rotate(
            registry.index(kernel),
            x.data_ptr(),
            TYPES[x.dtype],
            n,
            d,
            d,
            block,
            signs.data_ptr(),
            _address(odd),
            out.data_ptr(),
            torch.get_num_threads(),
        )
    )
    return out


@fake("rotate")
def _(x, signs, odd, block, kernel):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape, dtype=torch.float32)


def run_group(x: Tensor, address: int, d: int, width: int, kernel: int) -> Tensor:
    """Run the C structure at `address` on contiguous x [..., d] -> [n * width], n rows."""
    n = x.numel() // d
    kind = TYPES[x.dtype]
    out = x.new_empty(n * width)
    if native_library().drop_input_group(
        kernel, address, x.data_ptr(), kind, n, d, out.data_ptr(), kind, torch.get_num_threads()
    ):
        check_status(-1)
    return out


@dataclass(frozen=True, eq=False)
class GroupJob:
    """A `prepared_group` call without its input. Holds every tensor whose address it contains."""

    job: Tensor  # uint8: the C structure
    address: int  # of `job`
    width: int  # sum of the rows of the matrices
    kernel: int
    keep: tuple[object, ...]


def _check_sizes(
    matrices: Sequence[Matrix], books: Codebooks, rotation: Rotation, prefix: int
) -> None:
    """Raise ValueError unless every tensor has the size that its address is read with.

    The reader of checkpoints has looked before (checkpoint/contents.py); from here on nobody does.
    """
    d_in, odd = matrices[0].d_in, matrices[0].d_in // rotation.block
    sizes = [(rotation.signs, d_in), (rotation.odd, odd * odd)]
    for matrix in matrices:
        sizes += [(matrix.scales, matrix.rows), (matrix.bias, matrix.rows)]
        for plane in matrix.planes[:prefix]:
            padded = -(-matrix.rows // STRIP) * STRIP, -(-d_in // STRIP) * STRIP
            held = (padded[0], d_in) if books.kind == "bytes" else (matrix.rows, padded[1])
            sizes.append((plane.data, plane.spec.nbytes(*held)))
    wrong = [(tuple(t.shape), n) for t, n in sizes if t is not None and t.numel() != n]
    floats = {t.dtype for t in (rotation.signs, rotation.odd) if t is not None} == {torch.float32}
    whole = d_in == odd * rotation.block and {matrix.d_in for matrix in matrices} == {d_in}
    if wrong or not (floats and whole) or len(books.prepared) < prefix:
        raise ValueError(
            f"tensors {wrong} of an input group of {d_in} inputs: shape, values needed"
        )


def describe_group(
    matrices: Sequence[Matrix], books: Codebooks, rotation: Rotation, prefix: int, kernel: str
) -> GroupJob:
    """All that a native call on matrices of one input needs beside x; args as `PreparedGroup`."""
    planes = [plane for matrix in matrices for plane in matrix.data(prefix)]
    parts = [part for matrix in matrices for part in (matrix.scales, matrix.bias)]
    tensors = (rotation.signs, rotation.odd, *books.prepared[:prefix], *planes, *parts)
    for tensor in tensors:
        if tensor is not None and not (tensor.is_contiguous() and tensor.is_cpu):
            raise ValueError("an input group's tensors must be contiguous and on the CPU")
    _check_sizes(matrices, books, rotation, prefix)
    plane_addresses, book_addresses = pointers(planes), pointers(books.prepared[:prefix])
    start, step = ctypes.addressof(plane_addresses), 8 * prefix
    described = (_Matrix * len(matrices))()
    for i, matrix in enumerate(matrices):
        described[i] = _Matrix(
            start + i * step,
            matrix.rows,
            matrix.scales.data_ptr(),
            TYPES[matrix.scales.dtype],
            _address(matrix.bias),
            0 if matrix.bias is None else TYPES[matrix.bias.dtype],
        )
    group = GroupStruct(
        _MAGIC,
        _KINDS[books.kind],
        matrices[0].d_in,
        rotation.block,
        rotation.signs.data_ptr(),
        _address(rotation.odd),
        prefix,
        books.lut_entries,
        ctypes.addressof(book_addresses),
        ctypes.addressof(described),
        len(described),
    )
    blob = torch.frombuffer(bytearray(bytes(group)), dtype=torch.uint8).clone()
    keep = (tensors, described, plane_addresses, book_addresses)
    width = sum(matrix.rows for matrix in matrices)
    return GroupJob(blob, blob.data_ptr(), width, registry.index(kernel), keep)


@operator("prepared_group(Tensor x, Tensor job, int width, int kernel) -> Tensor")
def prepared_group(x: Tensor, job: Tensor, width: int, kernel: int) -> Tensor:
    """x [n, d] -> [n * width], as described by a `GroupJob` that the caller keeps alive."""
    return run_group(x, job.data_ptr(), x.shape[1], width, kernel)


@fake("prepared_group")
def _(x, job, width, kernel):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0] * width,))


@operator(
    "decode(Tensor[] planes, bool packed, Tensor[] codebooks, Tensor scales, int rows, int groups, "
    "int first, int last, ScalarType dtype, str kernel) -> Tensor"
)
def decode(
    planes: Sequence[Tensor],
    packed: bool,
    codebooks: Sequence[Tensor],
    scales: Tensor,
    rows: int,
    groups: int,
    first: int,
    last: int,
    dtype: torch.dtype,
    kernel: str,
) -> Tensor:
    """Rows first..last of the weight decoded from planes 1..P, float32 or bfloat16.

    Bit for bit what `CodebookSet.decode` gives.
    """
    out = torch.empty(last - first, groups * GROUP, dtype=dtype)
    if dtype == torch.float16:
        return decode(
            planes, packed, codebooks, scales, rows, groups, first, last, torch.float32, kernel
        ).to(dtype)
    addresses, books = pointers(planes), pointers(codebooks)
    check_status(
        native_library().drop_decode(
            registry.index(kernel),
            addresses,
            int(packed),
            rows,
            groups,
            len(planes),
            books,
            scales.data_ptr(),
            TYPES[scales.dtype],
            first,
            last,
            out.data_ptr(),
            TYPES[dtype],
            torch.get_num_threads(),
        )
    )
    return out


@fake("decode")
def _(planes, packed, codebooks, scales, rows, groups, first, last, dtype, kernel):  # type: ignore[no-untyped-def]
    return scales.new_empty((last - first, groups * GROUP), dtype=dtype)


@operator(
    "decode_trellis(Tensor[] planes, Tensor[] codebooks, Tensor scales, int d_in, int first, "
    "int last, ScalarType dtype, str kernel) -> Tensor"
)
def decode_trellis(
    planes: Sequence[Tensor],
    codebooks: Sequence[Tensor],
    scales: Tensor,
    d_in: int,
    first: int,
    last: int,
    dtype: torch.dtype,
    kernel: str,
) -> Tensor:
    """Rows first..last of the weight decoded from packed trellis planes 1..P.

    Bit for bit what `CodebookSet.decode` gives. scales: [d_out], of all rows.
    """
    if dtype == torch.float16:
        whole = decode_trellis(planes, codebooks, scales, d_in, first, last, torch.float32, kernel)
        return whole.to(dtype)
    out = torch.empty(last - first, d_in, dtype=dtype)
    addresses, books = pointers(planes), pointers(codebooks)
    check_status(
        native_library().drop_trellis_decode(
            registry.index(kernel),
            addresses,
            len(scales),
            d_in,
            len(planes),
            books,
            scales.data_ptr(),
            TYPES[scales.dtype],
            first,
            last,
            out.data_ptr(),
            TYPES[dtype],
            torch.get_num_threads(),
        )
    )
    return out


@fake("decode_trellis")
def _(planes, codebooks, scales, d_in, first, last, dtype, kernel):  # type: ignore[no-untyped-def]
    return scales.new_empty((last - first, d_in), dtype=dtype)
