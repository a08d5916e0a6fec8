"""Products with packed matrices: the choice between tables and a dense matrix, in one place.

    rows of x       native kernel, CPU                     otherwise
    few             one `input group` operator: rotate,           decode to a dense matrix,
                    build tables, multiply                 torch's product
    more            decode slabs of the matrix,            the same
                    torch's product with each

"Few" is 16 rows, or more while rows times planes stay below what the kernel was measured to win
(`_WINS`; benchmarks/cpu/matvec.py --crossover). The result of a row does not depend on how many of
them are computed together, bit for bit, nor on the number of threads or the instruction set.

Dense products run in float32 where an x86 processor has no instructions for the 16-bit type (for
bfloat16 AMX or AVX512-BF16, for float16 AMX-FP16).
Differentiable in x: an input that requires a gradient takes the dense path.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from dropbydrop.coding import code
from dropbydrop.coding.code import GROUP
from dropbydrop.coding.rotation import Rotation
from dropbydrop.errors import KernelError

from .. import cuda, registry
from ..layout import Codebooks, Packed, unpack
from . import ops

FEW = 16
# Rows times planes up to which tables were faster than a dense matrix, 4096 x 4096 and 1536 x 576.
_WINS = {"avx512vbmi": 128, "avx512vbmi-u8": 160, "avx512bw": 80, "avx2": 32, "avx2-u8": 56}
_SLAB_BYTES = 8 << 20  # dense rows decoded at a time: stays in the last cache


def few(kernel: registry.Kernel, prefix: int) -> int:
    """Most rows of x for which a product with `prefix` planes goes through tables."""
    return max(FEW, _WINS.get(kernel.name, 0) // prefix) if kernel.native else 0


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


def _fits(x: Tensor, kernel: registry.Kernel) -> bool:
    """Whether native operators can take x."""
    return (
        kernel.native
        and x.is_cpu
        and x.dtype in ops.TYPES
        and not (x.requires_grad and torch.is_grad_enabled())
    )


def rotate(x: Tensor, rotation: Rotation, kernel: str | None = None) -> Tensor:
    """x [..., d] -> Q x in float32 (float64 stays), natively where possible."""
    chosen = registry.select(kernel, x.device.type)
    if not _fits(x, chosen):
        return rotation.apply(x if x.dtype == torch.float64 else x.float())
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

    Equals `coding.code.decode` bit for bit with every kernel. The planes may be row major
    (`Packed` with tiled=False), so nothing has to be packed for this.
    """
    _check_prefix(prefix, packed, books)
    chosen = registry.select(kernel, packed.planes[0].device.type)
    if chosen.gpu:
        return cuda.decode_dense(packed, books, scales, prefix, dtype, chosen.name)
    return _rows(packed, books, scales, prefix, dtype, chosen, 0, packed.rows)


def _rows(
    packed: Packed,
    books: Codebooks,
    scales: Tensor,
    prefix: int,
    dtype: torch.dtype,
    kernel: registry.Kernel,
    first: int,
    last: int,
) -> Tensor:
    """Rows first..last of `decode_dense`."""
    native = kernel.native and packed.planes[0].is_cpu and scales.dtype in ops.TYPES
    if not native or dtype not in ops.TYPES:
        codes = [plane[first:last] for plane in unpack(packed, prefix)]
        tables = [table.to(codes[0].device) for table in books.tables]
        return code.decode(codes, tables, scales[first:last], prefix, dtype)
    return torch.ops.dropbydrop.decode(
        packed.planes[:prefix],
        packed.tiled,
        books.prepared[:prefix],
        scales,
        packed.rows,
        packed.groups,
        first,
        last,
        dtype,
        kernel.name,
    )


def _dense(
    x: Tensor, matrix: Matrix, books: Codebooks, prefix: int, kernel: registry.Kernel
) -> Tensor:
    """x [n, d], rotated -> [n, d_out], through dense slabs of the matrix."""
    packed, bias = matrix.packed, matrix.bias
    bias = None if bias is None else bias.to(x.dtype)
    slab = packed.rows
    if kernel.native and x.is_cpu:
        slab = max(64, _SLAB_BYTES // (x.element_size() * packed.groups * GROUP) // 64 * 64)
    parts = []
    for first in range(0, packed.rows, slab):
        last = min(first + slab, packed.rows)
        weight = _rows(packed, books, matrix.scales, prefix, x.dtype, kernel, first, last)
        parts.append(F.linear(x, weight, None if bias is None else bias[first:last]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class PreparedGroup:
    """The matrices of one input group at one precision, ready to be called.

    What does not depend on the input (addresses, shapes, the kernel) is worked out once; a call
    with few rows is then a single operator with two tensor arguments.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        books: Codebooks,
        rotation: Rotation,
        prefix: int,
        kernel: str | None = None,
    ) -> None:
        """Args as for `linears`. The tensors must not be changed or moved afterwards."""
        for matrix in matrices:
            _check_prefix(prefix, matrix.packed, books)
        self.matrices, self.books, self.rotation = tuple(matrices), books, rotation
        self.prefix, self.kernel = prefix, registry.select(kernel)
        self.rows = [matrix.packed.rows for matrix in matrices]
        self.d_in = matrices[0].packed.groups * GROUP
        if self.kernel.gpu:
            raise KernelError(
                f"kernel {self.kernel.name!r} reads row-major planes; use cuda.DeviceSite, linears."
            )
        self.few = few(self.kernel, prefix)
        tiled = all(matrix.packed.tiled for matrix in matrices)
        self.job: ops.GroupJob | None = None
        if self.kernel.native and tiled:
            self.job = self._describe()

    def _describe(self) -> ops.GroupJob:
        rotation, prefix = self.rotation, self.prefix
        return ops.describe_group(
            self.d_in,
            rotation.signs,
            rotation.odd,
            rotation.block,
            self.books.prepared[:prefix],
            self.books.entries,
            [plane for matrix in self.matrices for plane in matrix.packed.planes[:prefix]],
            [matrix.scales for matrix in self.matrices],
            [matrix.bias for matrix in self.matrices],
            self.rows,
            self.kernel.name,
        )

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """x [..., d_in] -> [..., d_out] of each matrix, in the dtype of x."""
        job, n = self.job, x.numel() // self.d_in
        if job is None or n > self.few or not _fits(x, self.kernel):
            return self.dense(x)
        x, shape = x.contiguous(), x.shape[:-1]
        if torch.compiler.is_compiling():  # tracing must see the operator
            flat = x.reshape(n, self.d_in)
            y = torch.ops.dropbydrop.prepared_group(flat, job.job, job.width, job.kernel)
        else:  # without the dispatcher, which costs as much as a small product
            y = ops.run_group(x, job.address, self.d_in, job.width, job.kernel)
        if len(self.rows) == 1:
            return (y.view(*shape, job.width),)
        if n == 1:
            return torch.split_with_sizes(y.view(*shape, job.width), self.rows, -1)
        parts = y.split([n * rows for rows in self.rows])
        return [part.view(*shape, rows) for part, rows in zip(parts, self.rows, strict=True)]

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The first matrix, decoded: [d_out, d_in], in the rotated space of its site."""
        matrix = self.matrices[0]
        return _rows(
            matrix.packed, self.books, matrix.scales, self.prefix, dtype, self.kernel,
            0, matrix.packed.rows,
        )  # fmt: skip

    def dense(self, x: Tensor) -> list[Tensor]:
        """The same through dense matrices, for any number of rows; differentiable in x."""
        flat = x.reshape(-1, self.d_in)
        rotated = rotate(flat, self.rotation, self.kernel.name)
        if not (x.is_cpu and _widens(x.dtype)):
            rotated = rotated.to(x.dtype)
        results = [
            _dense(rotated, matrix, self.books, self.prefix, self.kernel)
            for matrix in self.matrices
        ]
        return [
            y.to(x.dtype).view(*x.shape[:-1], rows)
            for y, rows in zip(results, self.rows, strict=True)
        ]


def linears(
    x: Tensor,
    matrices: Sequence[Matrix],
    books: Codebooks,
    rotation: Rotation,
    prefix: int,
    kernel: str | None = None,
) -> Sequence[Tensor]:
    """Products of one input with all matrices that read it. `PreparedGroup` does the same
    repeatedly.

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
    chosen = registry.select(kernel, x.device.type)
    if chosen.gpu:
        tables = cuda.device_tables(books.tables, x.device)
        return cuda.CudaGroup(matrices, tables, rotation, prefix, chosen.name)(x)
    return PreparedGroup(matrices, books, rotation, prefix, chosen.name)(x)


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
