"""`CpuGroup`: products with the matrices of one input group by the native library, or by torch.

    rows of x       native kernel                          kernel "torch" (any device)
    few             one operator: rotate, build look-up    as below
                    tables (bytes) or round to integers
                    (trellis), multiply
    more            decode slabs of the matrix,            decode to a dense matrix,
                    torch's product with each              torch's product

The result of a row does not depend on how many of them are computed together, bit for bit, nor on
the number of threads or the instruction set. Dense products run in float32 where an x86 processor
has no instructions for the 16-bit type (for bfloat16 AMX or AVX512-BF16, for float16 AMX-FP16).
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from dropbydrop.coding.code import GROUP
from dropbydrop.coding.rotation import Rotation
from dropbydrop.system.errors import KernelError

from .. import registry
from ..layout import Codebooks, Matrix
from ..prepared_group import PreparedGroup
from ..registry import TYPES
from . import ops

_SLAB_BYTES = 8 << 20  # dense rows decoded at a time: stays in the last cache


@cache
def _widens(dtype: torch.dtype) -> bool:
    """Whether dense products of a 16-bit type are done in float32: no instructions for it."""
    fast = {
        torch.bfloat16: ("_is_amx_tile_supported", "_is_avx512_bf16_supported"),
        torch.float16: ("_is_amx_fp16_supported",),
    }
    if dtype not in fast or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return not any(getattr(torch.cpu, name, lambda: False)() for name in fast[dtype])


def rotate(x: Tensor, rotation: Rotation, kernel: str | None = None) -> Tensor:
    """x [..., d] -> Q x in float32 (float64 stays), natively where possible."""
    backend, name = registry.backend_for(x.device.type, kernel)
    trained = x.requires_grad and torch.is_grad_enabled()
    if backend != "native" or x.dtype not in TYPES or trained:
        return rotation.apply(x if x.dtype == torch.float64 else x.float())
    flat = x.reshape(-1, x.shape[-1]).contiguous()  # [n, d]
    # the dispatcher takes several times as long as the rotation of a row
    run = torch.ops.dropbydrop.rotate if torch.compiler.is_compiling() else ops.rotate
    out = run(flat, rotation.signs, rotation.odd, rotation.block, name)
    return out.view(x.shape)


def decode_rows(
    matrix: Matrix,
    books: Codebooks,
    prefix: int,
    dtype: torch.dtype,
    kernel: str,
    rows: tuple[int, int],
) -> Tensor:
    """Rows first..last of a matrix, [last - first, d_in], in the rotated space of its inputs.

    Equals `CodebookSet.decode` bit for bit with every kernel, in either layout.
    """
    (first, last), plane = rows, matrix.planes[0]
    backend, _ = registry.backend_for(plane.data.device.type, kernel, books.kind)
    native = backend == "native" and matrix.scales.dtype in TYPES
    if not native or dtype not in TYPES:
        codes = [p.to_stored() for p in matrix.planes[:prefix]]
        found = books.on(plane.data.device)
        return found.decode(codes, matrix.scales, prefix, dtype, slice(first, last))
    if books.kind == "trellis":
        return torch.ops.dropbydrop.decode_trellis(
            [p.to_packed().data for p in matrix.planes[:prefix]],
            books.prepared[:prefix],
            matrix.scales,
            plane.d_in,
            first,
            last,
            dtype,
            kernel,
        )
    return torch.ops.dropbydrop.decode(
        matrix.data(prefix),
        plane.packed,
        books.prepared[:prefix],
        matrix.scales,
        plane.d_out,
        plane.d_in // GROUP,
        first,
        last,
        dtype,
        kernel,
    )


class CpuGroup(PreparedGroup):
    """See the module's note.

    Attributes:
        job: the native call without its input; None where torch does the products.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        books: Codebooks,
        rotation: Rotation,
        prefix: int,
        kernel: str | None = None,
    ) -> None:
        """Args as for `PreparedGroup`; kernel: a name to force, see `registry.select`."""
        chosen = registry.select(kernel, matrices[0].scales.device.type, books.kind)
        if chosen.gpu:
            raise KernelError(f"kernel {chosen.name!r} reads planes as stored; use CudaGroup.")
        super().__init__(matrices, books, rotation, prefix, chosen.name)
        self.job: ops.GroupJob | None = None
        fits = books.kind != "trellis" or self.d_in <= ops.TRELLIS_INPUTS
        known = all(m.bias is None or m.bias.dtype in TYPES for m in matrices)
        if chosen.native and fits and known and all(matrix.packed for matrix in matrices):
            self.job = ops.describe_group(self.matrices, books, rotation, prefix, chosen.name)
        self._in_slabs = chosen.native
        books.on(matrices[0].scales.device)  # now, not while a call is traced

    def gemv(self, x: Tensor) -> Sequence[Tensor]:
        """See `PreparedGroup.gemv`."""
        job, n = self.job, x.numel() // self.d_in
        if job is None or not x.is_cpu:  # the library would follow an address of another device
            return self.dense(x)
        x, shape = x.contiguous(), x.shape[:-1]
        if torch.compiler.is_compiling():  # tracing must see the operator
            flat = x.reshape(n, self.d_in)
            y = torch.ops.dropbydrop.prepared_group(flat, job.job, job.width, job.kernel)
        else:  # without the dispatcher, which costs as much as a small product
            y = ops.run_group(x, job.address, self.d_in, job.width, job.kernel)
        # y is one [n, rows] after the other
        if len(self.rows) == 1:
            return (y.view(*shape, job.width),)
        if n == 1:
            return torch.split_with_sizes(y.view(*shape, job.width), self.rows, -1)
        parts = y.split([n * rows for rows in self.rows])
        return [part.view(*shape, rows) for part, rows in zip(parts, self.rows, strict=True)]

    def dense(self, x: Tensor) -> list[Tensor]:
        """See `PreparedGroup.dense`."""
        flat = x.reshape(-1, self.d_in)  # [n, d_in]
        rotated = rotate(flat, self.rotation, self.kernel)
        if not (x.is_cpu and _widens(x.dtype)):
            rotated = rotated.to(x.dtype)
        results = [self._dense(rotated, matrix) for matrix in self.matrices]
        return [
            y.to(x.dtype).view(*x.shape[:-1], rows)
            for y, rows in zip(results, self.rows, strict=True)
        ]

    def _dense(self, x: Tensor, matrix: Matrix) -> Tensor:
        """x [n, d_in], rotated -> [n, d_out], through dense slabs of the matrix."""
        bias = None if matrix.bias is None else matrix.bias.to(x.dtype)
        slab = matrix.rows
        if self._in_slabs:
            slab = max(64, _SLAB_BYTES // (x.element_size() * self.d_in) // 64 * 64)
        parts = []
        for first in range(0, matrix.rows, slab):
            last = min(first + slab, matrix.rows)
            weight = self._decode(matrix, x.dtype, (first, last))
            parts.append(F.linear(x, weight, None if bias is None else bias[first:last]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _decode(self, matrix: Matrix, dtype: torch.dtype, rows: tuple[int, int]) -> Tensor:
        return decode_rows(matrix, self.books, self.prefix, dtype, self.kernel, rows)

    def weight(self, i: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """See `PreparedGroup.weight`."""
        matrix = self.matrices[i]
        return self._decode(matrix, dtype, (0, matrix.rows))
