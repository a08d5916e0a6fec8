"""Torch operators over the Triton kernels: opaque, functional, so compile and graphs see them.

    dropbydrop::gpu_decode(planes, tables, scales, dtype, kernel) -> W' [d_out, d_in]
    dropbydrop::gpu_rotate(x, signs, odd, block, dtype) -> Q x [n, d]
    dropbydrop::gpu_rows(x, rows, row_scales, bias) -> [n, count], n <= 16

`product`, the product of few rows, is no operator of its own but part of cuda_group.py's. P is the
number of planes: uint8 [d_out, G] each, contiguous. `tables` is what `device_entries` returns.
Nothing here differentiates; cuda_group.py does.

Triton is imported at the first launch. With TRITON_INTERPRET=1 it interprets the kernels on the
CPU, which is how they are tested without a GPU: the operators then take CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from dropbydrop.coding.code import GROUP
from dropbydrop.coding.rotation import Rotation, hadamard_on
from dropbydrop.system.accelerator import triton_interpreted
from dropbydrop.system.errors import KernelError

from ..registry import MAX_GEMV_ROWS

MOST = 3  # matrices of a launch
_LARGEST_BLOCK = 1 << 13  # of a Hadamard factor: two products, at most 64 x 128
_LARGEST_ODD = 128
_ROWS = 32  # of W, in the tile of a product
_GROUPS = 32  # the inputs are split into multiples of this
_PROGRAMS = 512  # programs a product is split into: about 4 for each multiprocessor of a large GPU
_library = torch.library.Library("dropbydrop", "FRAGMENT")


@lru_cache(maxsize=1)
def _triton() -> Any:
    from . import triton_kernels

    return triton_kernels


_TRITON_INSTALLED = find_spec("triton") is not None  # here: a compiled graph cannot look for it


def has_triton() -> bool:
    """Whether Triton is installed; the CUDA kernels do not need it, the others here do."""
    return _TRITON_INSTALLED


def operator(schema: str) -> Callable[[Callable], Callable]:
    """Define an operator: for CUDA tensors, and for those of the CPU under the interpreter."""

    def register(function: Callable) -> Callable:
        name = schema.split("(")[0]
        _library.define(schema, tags=torch.Tag.pt2_compliant_tag)

        def on_cuda(*args: Any) -> Any:
            where = next(value.device for value in args if isinstance(value, Tensor))
            with torch.cuda.device(where):  # Triton launches on the current device
                return function(*args)

        def on_cpu(*args: Any) -> Any:
            if not triton_interpreted():
                raise KernelError(
                    f"dropbydrop::{name} needs CUDA tensors. Move the model to a GPU, choose "
                    "another kernel, or set TRITON_INTERPRET=1 to test it on the CPU."
                )
            return function(*args)

        _library.impl(name, on_cuda, "CUDA")
        _library.impl(name, on_cpu, "CPU")
        return function

    return register


def fake(name: str) -> Callable[[Callable], Callable]:
    """Register the decorated function as the fake implementation: shapes and types only."""
    return torch.library.register_fake(f"dropbydrop::{name}", lib=_library)


def device_entries(tables: Sequence[Tensor], device: torch.device | str) -> Tensor:
    """Codebooks of planes 1..M, [256, 8] each, as kernels read them: [M, 256, 8] on `device`.

    float16 where that loses nothing (universal sets are stored so), else float32.
    """
    whole = torch.stack([table.detach().float() for table in tables])
    half = whole.half()
    return (half if torch.equal(half.float(), whole) else whole).to(device).contiguous()


def check_planes(planes: Sequence[Tensor], tables: Tensor) -> None:
    """What every kernel relies on; ValueError otherwise."""
    if not 1 <= len(planes) <= min(8, tables.shape[0]):
        raise ValueError(f"{len(planes)} planes with {tables.shape[0]} codebooks; need 1 to 8")
    for plane in planes:
        if plane.dtype != torch.uint8 or plane.shape != planes[0].shape:
            raise ValueError(f"codes of {plane.dtype} {tuple(plane.shape)}; need uint8 [d_out, G]")
        if not plane.is_contiguous():
            raise ValueError("planes of codes must be contiguous")


def _padded(planes: Sequence[Tensor]) -> list[Tensor]:
    """Eight pointers, of which the kernel reads the first P."""
    return [*planes, *[planes[0]] * (8 - len(planes))]


@operator(
    "gpu_decode(Tensor[] planes, Tensor tables, Tensor scales, ScalarType dtype, str kernel)"
    " -> Tensor"
)
def decode(
    planes: Sequence[Tensor], tables: Tensor, scales: Tensor, dtype: torch.dtype, kernel: str
) -> Tensor:
    """Planes 1..P -> the weight [d_out, d_in] in rotated coordinates, float32, bfloat16, float16.

    Bit for bit what `dropbydrop.coding.code.decode` gives, with either kernel.
    """
    check_planes(planes, tables)
    if kernel == "cuda-i8" and tables.dtype == torch.float16:
        from . import dense

        return dense.decode(planes, tables, scales, dtype)
    d_out, groups = planes[0].shape
    out = torch.empty(d_out, groups * GROUP, dtype=dtype, device=scales.device)
    r, b = 16, 64
    _triton().decode[-(-d_out // r), -(-groups // b)](
        *_padded(planes), tables, scales.contiguous(), out, d_out, groups, P=len(planes), R=r, B=b
    )
    return out


@fake("gpu_decode")
def _(planes, tables, scales, dtype, kernel):  # type: ignore[no-untyped-def]
    d_out, groups = planes[0].shape
    return scales.new_empty((d_out, groups * GROUP), dtype=dtype)


def splits(tiles: int, groups: int) -> tuple[int, int]:
    """How a product of `tiles` tiles of rows cuts its inputs: (splits, groups in each).

    A function of the shape alone, and one split where tiles alone fill a GPU.
    """
    wanted = -(-_PROGRAMS // tiles)
    most = max(1, groups // (2 * _GROUPS))
    length = -(-groups // min(wanted, most))
    length = -(-length // _GROUPS) * _GROUPS
    return -(-groups // length), length


def width(planes: int, dtype: torch.dtype) -> int:
    """Groups in the tile of a product: what fits the registers (tests/compile_triton.py)."""
    return 8 if dtype == torch.float32 else 32 if planes <= 2 else 16


def product(
    x: Tensor,
    planes: Sequence[Sequence[Tensor]],
    tables: Tensor,
    scales: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Few rows times matrices that lie below each other: one launch, or two (see `splits`).

    Args:
        x: [n, d_in], rotated, n <= 16, contiguous.
        planes: planes 1..P, uint8 [d_out, G], of each of at most MOST matrices.
        scales, bias: float32 [d_out of all matrices]; bias may be None.

    Returns:
        [n, d_out of all matrices] in the type of x.
    """
    for own in planes:
        check_planes(own, tables)
    n, groups = x.shape[0], planes[0][0].shape[1]
    if n > MAX_GEMV_ROWS or x.shape[1] != groups * GROUP or len(planes) > MOST:
        raise ValueError(
            f"x {tuple(x.shape)}, {len(planes)} matrices; need at most {MAX_GEMV_ROWS} rows of "
            f"{groups * GROUP} and {MOST} matrices"
        )
    counts = [own[0].shape[0] for own in planes]
    rows, tiles = sum(counts), sum(-(-count // _ROWS) for count in counts)
    parts, length = splits(tiles, groups)
    whole, biased = parts == 1, bias is not None
    out = torch.empty(n, rows, dtype=x.dtype, device=x.device)
    to = out if whole else torch.empty(parts, n, rows, device=x.device)
    spare = MOST - len(planes)
    _triton().product[tiles, parts](
        x, *[plane for own in [*planes, *[planes[0]] * spare] for plane in _padded(own)],
        tables, scales, scales if bias is None else bias, to, n, *counts, *[0] * spare,
        groups, length, P=len(planes[0]), R=_ROWS, B=width(len(planes[0]), x.dtype),
        MATRICES=len(planes), WHOLE=whole, BIAS=biased, WIDE=triton_interpreted(),
        num_stages=1,  # see the note of triton_kernels.py
    )  # fmt: skip
    if not whole:
        r = 128
        _triton().finish[-(-rows // r), n](
            to, scales, scales if bias is None else bias, out, n, rows, parts, BIAS=biased, R=r
        )
    return out


def rotates(rotation: Rotation) -> bool:
    """Whether `rotate` covers this rotation; others, and all where Triton is not installed, go
    through torch, step by step."""
    odd = 1 if rotation.odd is None else rotation.odd.shape[0]
    return rotation.block <= _LARGEST_BLOCK and odd <= _LARGEST_ODD and has_triton()


@operator("gpu_rotate(Tensor x, Tensor signs, Tensor? odd, int block, ScalarType dtype) -> Tensor")
def rotate(x: Tensor, signs: Tensor, odd: Tensor | None, block: int, dtype: torch.dtype) -> Tensor:
    """x [n, d] -> Q x, computed in float32 and rounded once to `dtype`. signs [d]: ±1, ±factor."""
    n, d = x.shape
    count = d // block
    b = min(block, 64 if block <= 4096 else 128)
    a = block // b
    ap, bp = max(16, a), max(16, b)
    at_once = odd is not None and n <= MAX_GEMV_ROWS
    last = odd is None or at_once
    out = torch.empty(n, d, dtype=dtype if last else torch.float32, device=x.device)
    _triton().mix[(n * count,)](
        x.contiguous(), signs, signs if odd is None else odd, hadamard_on(a, x.device),
        hadamard_on(b, x.device), out, count, A=a, B=b, AP=ap, BP=bp, FACTOR=at_once,
        S=max(1, min(1 << (count - 1).bit_length(), _LARGEST_BLOCK // (ap * bp))),
        num_warps=4 if ap * bp <= 4096 else 8,
    )  # fmt: skip
    if last:
        return out
    assert odd is not None
    mixed = torch.empty(n, d, dtype=dtype, device=x.device)
    s = 32
    size = 1 << max(4, (count - 1).bit_length())
    _triton().spread[n, -(-block // s)](out, odd, mixed, count, block, OP=size, S=s)
    return mixed


@fake("gpu_rotate")
def _(x, signs, odd, block, dtype):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, dtype=dtype)


@operator("gpu_rows(Tensor x, Tensor rows, Tensor row_scales, Tensor? bias) -> Tensor")
def rows(x: Tensor, rows: Tensor, row_scales: Tensor, bias: Tensor | None) -> Tensor:
    """x [n, d] times int8 rows [count, d], n <= 16 -> [n, count] in the type of x."""
    n, (count, d) = x.shape[0], rows.shape
    if n > MAX_GEMV_ROWS or x.shape[1] != d or rows.dtype != torch.int8:
        raise ValueError(f"x {tuple(x.shape)}, rows {rows.dtype} {tuple(rows.shape)}")
    out = torch.empty(n, count, dtype=x.dtype, device=x.device)
    r = 64
    _triton().rows[(-(-count // r),)](
        x.contiguous(), rows.contiguous(), row_scales, row_scales if bias is None else bias, out,
        n, count, d, BIAS=bias is not None, R=r, D=128, WIDE=triton_interpreted(),
    )  # fmt: skip
    return out


@fake("gpu_rows")
def _(x, rows, row_scales, bias):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], rows.shape[0]))


def rows_linear(x: Tensor, weight: Tensor, row_scales: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., d] times eight-bit rows int8 [count, d] -> [..., count] in the type of x."""
    flat = x.reshape(-1, x.shape[-1])
    y = torch.ops.dropbydrop.gpu_rows(flat, weight, row_scales, bias)
    return y.view(*x.shape[:-1], weight.shape[0])
