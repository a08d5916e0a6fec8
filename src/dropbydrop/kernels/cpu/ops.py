"""Torch operators over the native kernels: pure functions that torch.compile and export can see.

    dropbydrop::rotate(x, signs, odd, block, kernel) -> float32, shape of x
    dropbydrop::build_tables(x, codebooks, entries, kernel) -> uint8 [n, bytes]
    dropbydrop::matvec(tables, planes, scales, bias, rows, groups, entries, kernel, dtype)
        -> [n, rows]
    dropbydrop::input_group(x, signs, odd, block, codebooks, entries, planes, scales, biases, rows,
        kernel) -> [n * sum(rows)], one [n, rows[i]] after the other
    dropbydrop::prepared_group(x, job, width, kernel) -> [n * width], the same
    dropbydrop::decode(planes, tiled, codebooks, scales, rows, groups, first, last, dtype, kernel)
        -> rows first..last of the weight, [last - first, 8 * groups]

Tables are values: a function of x and the codebooks alone, so q/k/v share them, and a table belongs
to the kernel that built it. `input_group` does the three steps in one native call, for all matrices
of an input. P = len(codebooks), and `planes` lists the first P planes of one matrix after the
other. Threads follow torch.get_num_threads().

`prepared_group` is `input_group` with everything but x and its result described beforehand
(`describe_group`) in one small tensor of addresses: passing 20 tensors through the dispatcher costs
several times what a small product does. It is for this process only; a graph that is to be saved
uses `input_group`.

Operators are defined with torch.library.Library rather than `custom_op`, whose checks on every call
cost more than a small product does. Tensors must be contiguous and on the CPU; the callers in this
package see to it. Nothing here differentiates (see linear.py).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dropbydrop.coding.code import ENTRIES, GROUP
from dropbydrop.system.native_library import library

from .. import registry

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
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


def done(status: int) -> None:
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


_MAGIC = 0x7072677475706E69  # DROP_INPUT_GROUP_MAGIC


class GroupStruct(ctypes.Structure):
    """DropInputGroup of native/kernels/c_api.h."""

    _fields_ = (
        ("magic", ctypes.c_int64),
        ("d_in", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("signs", ctypes.c_void_p),
        ("odd", ctypes.c_void_p),
        ("prefix", ctypes.c_int64),
        ("entries", ctypes.c_int64),
        ("codebooks", ctypes.c_void_p),
        ("matrices", ctypes.c_void_p),
        ("count", ctypes.c_int64),
    )


def _matrices(
    planes: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    rows: Sequence[int],
    prefix: int,
) -> tuple[ctypes.Array, ctypes.Array]:
    """C descriptions of the matrices, and the array of plane addresses they point into."""
    addresses = pointers(planes)
    start, step = ctypes.addressof(addresses), 8 * prefix
    described = (_Matrix * len(rows))()
    for i, (scale, bias, count) in enumerate(zip(scales, biases, rows, strict=True)):
        described[i] = _Matrix(
            start + i * step,
            count,
            scale.data_ptr(),
            TYPES[scale.dtype],
            None if bias is None else bias.data_ptr(),
            0 if bias is None else TYPES[bias.dtype],
        )
    return described, addresses


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@operator("rotate(Tensor x, Tensor? signs, Tensor? odd, int block, str kernel) -> Tensor")
def rotate(x: Tensor, signs: Tensor | None, odd: Tensor | None, block: int, kernel: str) -> Tensor:
    """x [n, d] -> Q x, float32 [n, d]; see `dropbydrop.rotation`."""
    n, d = x.shape
    out = torch.empty(n, d)
    done(
        native_library().drop_rotate(
            registry.index(kernel),
            x.data_ptr(),
            TYPES[x.dtype],
            n,
            d,
            d,
            block,
            _address(signs),
            _address(odd),
            out.data_ptr(),
            torch.get_num_threads(),
        )
    )
    return out


@fake("rotate")
def _(x, signs, odd, block, kernel):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape, dtype=torch.float32)


@operator("build_tables(Tensor x, Tensor[] codebooks, int entries, str kernel) -> Tensor")
def build_tables(x: Tensor, codebooks: Sequence[Tensor], entries: int, kernel: str) -> Tensor:
    """Rotated x float32 [n, d], prepared codebooks of planes 1..P -> tables uint8 [n, bytes]."""
    lib, index = native_library(), registry.index(kernel)
    n, d = x.shape
    groups, prefix = d // GROUP, len(codebooks)
    out = torch.empty(n, lib.drop_lut_bytes(index, groups, prefix, entries), dtype=torch.uint8)
    books = pointers(codebooks)
    threads = torch.get_num_threads()
    done(lib.drop_build_lut(index, x.data_ptr(), n, groups, prefix, books, out.data_ptr(), threads))
    return out


@fake("build_tables")
def _(x, codebooks, entries, kernel):  # type: ignore[no-untyped-def]
    groups = x.shape[1] // GROUP
    count = native_library().drop_lut_bytes(registry.index(kernel), groups, len(codebooks), entries)
    return x.new_empty((x.shape[0], count), dtype=torch.uint8)


@operator(
    "matvec(Tensor tables, Tensor[] planes, Tensor scales, Tensor? bias, int rows, int groups, "
    "int entries, str kernel, ScalarType dtype) -> Tensor"
)
def matvec(
    tables: Tensor,
    planes: Sequence[Tensor],
    scales: Tensor,
    bias: Tensor | None,
    rows: int,
    groups: int,
    entries: int,
    kernel: str,
    dtype: torch.dtype,
) -> Tensor:
    """Tables [n, bytes], packed planes 1..P -> y [n, rows] of `dtype`."""
    n, prefix = tables.shape[0], len(planes)
    out = torch.empty(n, rows, dtype=dtype)
    described, keep = _matrices(planes, [scales], [bias], [rows], prefix)
    done(
        native_library().drop_lut_gemv(
            registry.index(kernel),
            tables.data_ptr(),
            n,
            groups,
            prefix,
            entries,
            described,
            1,
            out.data_ptr(),
            TYPES[dtype],
            torch.get_num_threads(),
        )
    )
    del keep
    return out


@fake("matvec")
def _(tables, planes, scales, bias, rows, groups, entries, kernel, dtype):  # type: ignore[no-untyped-def]
    return tables.new_empty((tables.shape[0], rows), dtype=dtype)


@operator(
    "input_group(Tensor x, Tensor? signs, Tensor? odd, int block, Tensor[] codebooks, int entries, "
    "Tensor[] planes, Tensor[] scales, Tensor?[] biases, int[] rows, str kernel) -> Tensor"
)
def input_group(
    x: Tensor,
    signs: Tensor | None,
    odd: Tensor | None,
    block: int,
    codebooks: Sequence[Tensor],
    entries: int,
    planes: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    rows: Sequence[int],
    kernel: str,
) -> Tensor:
    """x [n, d], not rotated -> y_i [n, rows[i]] of all matrices that read x, in the dtype of x."""
    described, keep = _matrices(planes, scales, biases, rows, len(codebooks))
    books = pointers(codebooks)
    job = _site(x.shape[1], signs, odd, block, books, entries, described)
    out = run_group(x, ctypes.addressof(job), x.shape[1], sum(rows), registry.index(kernel))
    del keep
    return out


@fake("input_group")
def _(x, signs, odd, block, codebooks, entries, planes, scales, biases, rows, kernel):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0] * sum(rows),))


def _site(
    d: int,
    signs: Tensor | None,
    odd: Tensor | None,
    block: int,
    books: ctypes.Array,
    entries: int,
    described: ctypes.Array,
) -> GroupStruct:
    return GroupStruct(
        _MAGIC,
        d,
        block,
        _address(signs),
        _address(odd),
        len(books),
        entries,
        ctypes.addressof(books),
        ctypes.addressof(described),
        len(described),
    )


def run_group(x: Tensor, address: int, d: int, width: int, kernel: int) -> Tensor:
    """Run the C structure at `address` on contiguous x [..., d] -> [n * width], n rows."""
    n = x.numel() // d
    kind = TYPES[x.dtype]
    out = x.new_empty(n * width)
    if native_library().drop_input_group(
        kernel, address, x.data_ptr(), kind, n, d, out.data_ptr(), kind, torch.get_num_threads()
    ):
        done(-1)
    return out


@dataclass(frozen=True, eq=False)
class GroupJob:
    """An `input_group` call without its input. Holds every tensor whose address it contains."""

    job: Tensor  # uint8: the C structure
    address: int  # of `job`
    width: int  # sum of the rows of the matrices
    kernel: int
    keep: tuple[object, ...]


def describe_group(
    d: int,
    signs: Tensor | None,
    odd: Tensor | None,
    block: int,
    codebooks: Sequence[Tensor],
    entries: int,
    planes: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    rows: Sequence[int],
    kernel: str,
) -> GroupJob:
    """The arguments of `input_group`, but x, prepared for `prepared_group`."""
    tensors = (signs, odd, *codebooks, *planes, *scales, *biases)
    for tensor in tensors:
        if tensor is not None and not (tensor.is_contiguous() and tensor.is_cpu):
            raise ValueError("an input group's tensors must be contiguous and on the CPU")
    described, addresses = _matrices(planes, scales, biases, rows, len(codebooks))
    books = pointers(codebooks)
    job = _site(d, signs, odd, block, books, entries, described)
    blob = torch.frombuffer(bytearray(bytes(job)), dtype=torch.uint8).clone()
    keep = (tensors, described, addresses, books)
    return GroupJob(blob, blob.data_ptr(), sum(rows), registry.index(kernel), keep)


@operator("prepared_group(Tensor x, Tensor job, int width, int kernel) -> Tensor")
def prepared_group(x: Tensor, job: Tensor, width: int, kernel: int) -> Tensor:
    """`input_group` as described by a `GroupJob` that the caller keeps alive."""
    return run_group(x, job.data_ptr(), x.shape[1], width, kernel)


@fake("prepared_group")
def _(x, job, width, kernel):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0] * width,))


@operator(
    "decode(Tensor[] planes, bool tiled, Tensor[] codebooks, Tensor scales, int rows, int groups, "
    "int first, int last, ScalarType dtype, str kernel) -> Tensor"
)
def decode(
    planes: Sequence[Tensor],
    tiled: bool,
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

    Bit for bit what `dropbydrop.coding.code.decode` gives.
    """
    out = torch.empty(last - first, groups * GROUP, dtype=dtype)
    if dtype == torch.float16:
        return decode(
            planes, tiled, codebooks, scales, rows, groups, first, last, torch.float32, kernel
        ).to(dtype)
    addresses, books = pointers(planes), pointers(codebooks)
    done(
        native_library().drop_decode(
            registry.index(kernel),
            addresses,
            int(tiled),
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
def _(planes, tiled, codebooks, scales, rows, groups, first, last, dtype, kernel):  # type: ignore[no-untyped-def]
    return scales.new_empty((last - first, groups * GROUP), dtype=dtype)


def table_bytes(groups: int, prefix: int, entries: int = ENTRIES // 2, kernel: str = "") -> int:
    """Bytes of the tables of one activation row."""
    index = registry.index(kernel or registry.select().name)
    return native_library().drop_lut_bytes(index, groups, prefix, entries)
