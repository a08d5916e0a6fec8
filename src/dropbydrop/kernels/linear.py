"""Products with packed matrices: the choice between tables and a dense matrix, in one place.

    rows n of x        native kernel                      torch
    1 .. FEW           one `site` operator: rotate,       decode to a dense matrix,
                       build tables, multiply             torch's product
    more               decode slabs of the matrix,
                       torch's product with each

FEW is where decoding and a dense product become cheaper than n look-ups a code (measured by
benchmarks/matvec.py: the crossover lies between 16 and 64 rows depending on the prefix). Results
of 1 .. FEW rows do not depend on how many rows are computed together, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import code
from ..code import GROUP
from ..rotation import Rotation
from . import ops, registry
from .layout import Codebooks, Packed

FEW = 16
_SLAB_BYTES = 8 << 20  # dense rows decoded at a time: stays in the last cache


@dataclass(frozen=True, eq=False)
class Matrix:
    """A packed matrix with its row scales [d_out] and optional bias [d_out]."""

    packed: Packed
    scales: Tensor
    bias: Tensor | None = None


def _check_prefix(prefix: int, packed: Packed, books: Codebooks) -> None:
    if not 1 <= prefix <= min(len(packed.planes), len(books.tables)):
        raise ValueError(
            f"prefix {prefix} with {len(packed.planes)} planes and {len(books.tables)} codebooks"
        )


def rotate(x: Tensor, rotation: Rotation, kernel: str | None = None) -> Tensor:
    """x [..., d] on the CPU -> Q x in float32, natively if possible (`Rotation.apply` otherwise)."""
    chosen = registry.select(kernel)
    if not chosen.native or x.device.type != "cpu" or x.dtype not in ops._TYPES:
        return rotation.apply(x.float() if x.dtype != torch.float64 else x)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.ops.dropbydrop.rotate(
        flat, rotation.signs, rotation.odd, rotation.block, chosen.name
    )
    return out.view(x.shape)


def decode_dense(
    packed: Packed,
    books: Codebooks,
    scales: Tensor,
    prefix: int,
    dtype: torch.dtype = torch.float32,
    kernel: str | None = None,
) -> Tensor:
    """The weight of the first `prefix` planes, [d_out, d_in], in the rotated space of its site.

    Equals `dropbydrop.code.decode` bit for bit with every kernel.
    """
    _check_prefix(prefix, packed, books)
    chosen = registry.select(kernel)
    if not books.prepared or not packed.planes[0].is_cpu or dtype == torch.float64:
        from .layout import unpack

        return code.decode(unpack(packed), books.tables, scales, prefix, dtype)
    return torch.ops.dropbydrop.decode(
        packed.planes[:prefix],
        packed.tiled,
        books.prepared[:prefix],
        scales,
        packed.rows,
        packed.groups,
        0,
        packed.rows,
        dtype,
        chosen.name if chosen.native else "portable",
    )


def _dense(
    x: Tensor, matrix: Matrix, books: Codebooks, prefix: int, kernel: registry.Kernel
) -> Tensor:
    """x [n, d], rotated -> [n, d_out] through dense slabs of the matrix."""
    packed = matrix.packed
    bias = None if matrix.bias is None else matrix.bias.to(x.dtype)
    native = kernel.native and packed.tiled and x.dtype in ops._TYPES
    slab = max(64, _SLAB_BYTES // (x.element_size() * packed.groups * GROUP) // 64 * 64)
    if not native or packed.rows <= slab:
        weight = decode_dense(packed, books, matrix.scales, prefix, x.dtype, kernel.name)
        return F.linear(x, weight, bias)
    parts = []
    for first in range(0, packed.rows, slab):
        last = min(first + slab, packed.rows)
        weight = torch.ops.dropbydrop.decode(
            packed.planes[:prefix],
            True,
            books.prepared[:prefix],
            matrix.scales,
            packed.rows,
            packed.groups,
            first,
            last,
            x.dtype,
            kernel.name,
        )
        parts.append(F.linear(x, weight, None if bias is None else bias[first:last]))
    return torch.cat(parts, dim=1)


def linears(
    x: Tensor,
    matrices: Sequence[Matrix],
    books: Codebooks,
    rotation: Rotation,
    prefix: int,
    kernel: str | None = None,
) -> list[Tensor]:
    """Products of one input with all matrices that read it.

    Args:
        x: [..., d_in], not rotated; float32, bfloat16 or float16 for the native kernels.
        matrices: they share d_in, codebooks and rotation (q/k/v of a block).
        prefix: P, the number of planes to read.
        kernel: a name to force; see `registry.select`.

    Returns:
        One [..., d_out] for each matrix, in the dtype of x.

    Raises:
        KernelError: the kernel named is not available.
    """
    for matrix in matrices:
        _check_prefix(prefix, matrix.packed, books)
    chosen = registry.select(kernel)
    shape, dtype = x.shape[:-1], x.dtype
    flat = x.reshape(-1, x.shape[-1])
    usable = chosen.native and x.device.type == "cpu" and dtype in ops._TYPES
    if usable and flat.shape[0] <= FEW:
        results = torch.ops.dropbydrop.site(
            flat.contiguous(),
            rotation.signs,
            rotation.odd,
            rotation.block,
            books.prepared[:prefix],
            books.entries,
            [plane for matrix in matrices for plane in matrix.packed.planes[:prefix]],
            [matrix.scales for matrix in matrices],
            [matrix.bias for matrix in matrices],
            [matrix.packed.rows for matrix in matrices],
            chosen.name,
        )
    else:
        rotated = rotate(flat, rotation, chosen.name).to(dtype)
        results = [_dense(rotated, matrix, books, prefix, chosen) for matrix in matrices]
    return [y.view(*shape, -1) for y in results]


def linear(
    x: Tensor,
    matrix: Matrix,
    books: Codebooks,
    rotation: Rotation,
    prefix: int,
    kernel: str | None = None,
) -> Tensor:
    """`linears` for one matrix: x [..., d_in] -> [..., d_out]."""
    return linears(x, [matrix], books, rotation, prefix, kernel)[0]
