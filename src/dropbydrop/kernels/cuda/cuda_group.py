"""The matrices of one input group on a GPU: rotation, then a product of few rows or a dense matrix.

    rows of x   launches, for up to 3 (triton) or 4 (cuda-i8, cuda-i16) matrices together
    up to 16    triton    rotate, multiply; one more to add the parts of matrices with few rows
                cuda-i8   rotate and round, multiply
                cuda-i16  rotate, multiply
    more        rotate (one or two); for each matrix: decode to the type of x, vendor's product

The counterpart of `cpu.cpu_group.CpuGroup`. The planes are those of the module, as stored: nothing
is packed, copied or padded; scales and biases are copied, in float32, below each
other. A row of the result does not depend on how many rows are computed together, as long as they
are few.

Few rows are one operator, dropbydrop::gpu_group(x, group, width) -> [n, width], which names
its input group by a number. Planes as arguments would become inputs of a compiled graph: a guard
each, and torch's CUDA graphs copy inputs that are no parameters before every replay, all planes for
every token. For the same reason the tensors that the dense path passes to operators are marked as
never moving.

Differentiable in x: an input that requires a gradient takes the dense path, whose backward decodes
the matrix again instead of keeping it. float64 takes plain torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from dropbydrop.coding.rotation import Rotation
from dropbydrop.system.errors import KernelError

from .. import registry
from ..layout import Codebooks, Matrix
from ..prepared_group import PreparedGroup
from ..registry import TYPES
from . import int8, ops, trellis, trellis_tables
from .ops import fake, operator

_numbers = itertools.count()  # never given twice: a compiled graph cannot reach another input group
_input_groups: WeakValueDictionary[int, CudaGroup] = WeakValueDictionary()


@operator("gpu_group(Tensor x, int group, int width) -> Tensor")
def few_rows(x: Tensor, group: int, width: int) -> Tensor:
    """x [n, d_in], n <= 16 -> [n, width], the rows of all matrices of a group in their order."""
    found = _input_groups.get(group)
    if found is None:
        raise KernelError(
            "compiled code refers to a part of a model that no longer exists; compile the model "
            "again after loading or moving it."
        )
    return found.gemv_rows(x)


@fake("gpu_group")
def _(x, group, width):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], width))


class _Decoded(torch.autograd.Function):
    """x W'^T with W' decoded in forward and again in backward; differentiates in x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Callable[[torch.dtype], Tensor]) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        return F.linear(x, weight(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(ctx.dtype) @ ctx.weight(ctx.dtype), None


def decode_dense(
    matrix: Matrix, books: Codebooks, prefix: int, dtype: torch.dtype, kernel: str
) -> Tensor:
    """`kernels.decode_dense` by a kernel of its name; float64 by torch."""
    _check_stored(matrix)
    planes, scales = matrix.data(prefix), matrix.scales
    if dtype not in TYPES:
        return books.on(scales.device).decode(planes, scales, prefix, dtype)
    return _decoded(planes, tables_on(books, scales.device, prefix), scales, dtype, kernel)


def takes(kernel: str, rotation: Rotation, prefix: int) -> bool:
    """Whether a kernel is to multiply an input group when none is named."""
    try:
        if kernel == int8.NAME:
            int8.check_fits(rotation, prefix, int8.shared_memory(rotation.signs.device))
        elif kernel == trellis.NAME:
            trellis.check_fits(rotation)
    except KernelError:
        return False
    return kernel != int8.NAME or prefix <= int8.MOST_PLANES


def tables_on(books: Codebooks, device: torch.device, prefix: int) -> Tensor | trellis.Tables:
    """Codebooks as the kernels of their kind read them: of `ops.device_entries` [P, 256, 8], or of
    `trellis_tables.prepare`. Made once for all that share the set."""
    if books.kind == "trellis":
        tables: trellis.Tables = books.derived(
            ("trellis", device), lambda: trellis_tables.prepare(books.set, device)
        )
        return tables
    stacked: Tensor = books.derived(
        ("stacked", device), lambda: ops.device_entries(books.entries, device)
    )
    return stacked[:prefix]


def _decoded(
    planes: Sequence[Tensor],
    tables: Tensor | trellis.Tables,
    scales: Tensor,
    dtype: torch.dtype,
    kernel: str,
) -> Tensor:
    """The matrix of P planes by a kernel's operator."""
    run = torch.ops.dropbydrop
    if isinstance(tables, Tensor):
        return run.gpu_decode(planes, tables, scales, dtype, kernel)
    bits = tables.bits[: len(planes)]
    return run.gpu_trellis_decode(
        planes, tables.labels, tables.values, tables.scales, bits, scales, dtype
    )


def _check_stored(matrix: Matrix) -> None:
    if matrix.packed:
        raise KernelError(
            "these planes are packed for the CPU kernels; GPU kernels read them as stored: take "
            "Plane.stored(codes, spec, d_out, d_in)."
        )


class CudaGroup(PreparedGroup):
    """See the module's note."""

    def __init__(
        self,
        matrices: Sequence[Matrix],
        books: Codebooks,
        rotation: Rotation,
        prefix: int,
        kernel: str,
    ) -> None:
        """Args as for `PreparedGroup`; kernel: "triton", "cuda-i8" or "cuda-i16"."""
        for matrix in matrices:
            _check_stored(matrix)
        super().__init__(matrices, books, rotation, prefix, registry.by_name(kernel).name)
        self.width = sum(self.rows)
        device = matrices[0].scales.device
        self.tables = tables_on(books, device, prefix)
        self.planes = [matrix.data(prefix) for matrix in matrices]
        self._scales = torch.cat([matrix.scales.float() for matrix in matrices])
        self._bias: Tensor | None = None
        if any(matrix.bias is not None for matrix in matrices):
            self._bias = torch.cat(
                [m.scales.new_zeros(m.rows).float() if m.bias is None else m.bias.float()
                 for m in matrices]
            )  # fmt: skip
        self._fused = ops.rotates(rotation)
        self._bytes = None
        if self.kernel == int8.NAME:
            assert isinstance(self.tables, Tensor)
            int8.check_fits(rotation, prefix)
            self._bytes = int8.prepare(self.tables)
        elif self.kernel == trellis.NAME:
            trellis.check_fits(rotation)
        for tensor in (
            *([self.tables] if isinstance(self.tables, Tensor) else self.tables.tensors),
            rotation.signs, rotation.odd, *itertools.chain(*self.planes),
        ):  # fmt: skip
            if tensor is not None:
                torch._dynamo.mark_static_address(tensor)
        self.number = next(_numbers)
        _input_groups[self.number] = self

    def gemv(self, x: Tensor) -> Sequence[Tensor]:
        """See `PreparedGroup.gemv`."""
        flat = x.reshape(-1, self.d_in)  # [n, d_in]
        y = torch.ops.dropbydrop.gpu_group(flat, self.number, self.width)
        y = y.view(*x.shape[:-1], self.width)
        return (y,) if len(self.rows) == 1 else torch.split_with_sizes(y, self.rows, -1)

    def gemv_rows(self, x: Tensor) -> Tensor:
        """x [n, d_in], n <= 16 -> [n, width]; not differentiable."""
        most, multiply = self._begun(x)
        results, first = [], 0
        for start in range(0, len(self.rows), most):
            part = slice(start, start + most)
            last = first + sum(self.rows[part])
            bias = None if self._bias is None else self._bias[first:last]
            results.append(multiply(part, self._scales[first:last], bias))
            first = last
        return results[0] if len(results) == 1 else torch.cat(results, 1)

    def _begun(self, x: Tensor) -> tuple[int, Callable[[slice, Tensor, Tensor | None], Tensor]]:
        """Rotates x. How many matrices a launch takes, and that launch: (which, their scales, their
        biases) -> [n, rows of these]."""
        tables = self.tables
        if isinstance(tables, trellis.Tables):
            inputs = trellis.rotate_rows(x, self.rotation, self.rows)
            return trellis.MOST, lambda part, scales, bias: trellis.product(
                inputs, self.planes[part], self.rows[part], tables, scales, bias, x.dtype,
                trellis.counters(len(x), self.rows[: part.start]),
            )  # fmt: skip
        if self._bytes is not None:
            steps, books = int8.rotate_rows(x, self.rotation), self._bytes
            return int8.MOST, lambda part, scales, bias: int8.product(
                *steps, self.planes[part], *books, scales, bias, x.dtype
            )
        rotated = self._rotate(x, x.dtype)
        return ops.MOST, lambda part, scales, bias: ops.product(
            rotated, self.planes[part], tables, scales, bias
        )

    def dense(self, x: Tensor) -> list[Tensor]:
        """See `PreparedGroup.dense`."""
        rotated = self._rotate(x.reshape(-1, self.d_in), x.dtype)
        training = x.requires_grad and torch.is_grad_enabled()
        results = []
        for i, matrix in enumerate(self.matrices):
            if training:
                y = _Decoded.apply(rotated, lambda dtype, i=i: self.weight(i, dtype))
            else:
                y = F.linear(rotated, self.weight(i, x.dtype))
            y = y if matrix.bias is None else y + matrix.bias.to(y.dtype)
            results.append(y.view(*x.shape[:-1], y.shape[-1]))
        return results

    def weight(self, i: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """See `PreparedGroup.weight`."""
        scales = self.matrices[i].scales
        if dtype in TYPES:
            return _decoded(self.planes[i], self.tables, scales, dtype, self.kernel)
        return self.books.on(scales.device).decode(self.planes[i], scales, self.prefix, dtype)

    def _rotate(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x [n, d_in] -> Q x in `dtype`: one or two launches, or torch's steps (`ops.rotates`)."""
        rotation = self.rotation
        differentiated = x.requires_grad and torch.is_grad_enabled()
        if not self._fused or x.dtype not in TYPES or differentiated:
            wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
            return rotation.apply(wide).to(dtype).contiguous()
        return torch.ops.dropbydrop.gpu_rotate(
            x, rotation.signs, rotation.odd, rotation.block, dtype
        )
