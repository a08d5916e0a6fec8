"""The matrices of one input site on a GPU: rotation, then a product of few rows or a dense matrix.

    rows of x        kernel "triton" or "cuda-i8"          otherwise
    up to 16         rotate, one product a matrix          -
    more             rotate, decode to a dense matrix      the same
                     in the type of x, vendor's product

The counterpart of `kernels.linear.Bound`. The planes are those of the module, row major as on disk:
nothing is packed, copied or padded. A row of the result does not depend on how many rows are
computed together, as long as they are few.

Differentiable in x: an input that requires a gradient takes the dense path, whose backward decodes
the matrix again instead of keeping it. float64 takes plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...code import GROUP, decode
from ...errors import KernelError
from ...rotation import Rotation
from .. import registry
from ..layout import Codebooks, Packed
from . import int8, ops
from .ops import FEW, TYPES


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
    packed: Packed, books: Codebooks, scales: Tensor, prefix: int, dtype: torch.dtype
) -> Tensor:
    """`kernels.decode_dense` by the Triton kernel; float64 by torch."""
    planes = packed.planes[:prefix]
    _check_row_major(packed)
    if dtype not in TYPES:
        wide = [table.to(scales.device) for table in books.tables]
        return decode(planes, wide, scales, prefix, dtype)
    tables = ops.device_tables(books.tables[:prefix], scales.device)
    return torch.ops.dropbydrop.gpu_decode(list(planes), tables, scales, dtype)


def _check_row_major(packed: Packed) -> None:
    if packed.tiled:
        raise KernelError(
            "these planes are packed for the CPU kernels; GPU kernels read them row major, as "
            "stored: build Packed(planes, rows, groups, tiled=False)."
        )


class DeviceSite:
    """See the module's note."""

    def __init__(
        self,
        matrices: Sequence[Any],
        tables: Tensor,
        rotation: Rotation,
        prefix: int,
        kernel: str,
    ) -> None:
        """
        Args:
            matrices: `kernels.Matrix` each; they share d_in, codebooks and rotation.
            tables: of the codebooks, from `ops.device_tables`; at least `prefix`.
            rotation: on the device of the matrices.
            kernel: "triton" or "cuda-i8".
        """
        for matrix in matrices:
            _check_row_major(matrix.packed)
            if not 1 <= prefix <= min(len(matrix.packed.planes), tables.shape[0]):
                raise ValueError(
                    f"prefix {prefix} with {len(matrix.packed.planes)} planes and "
                    f"{tables.shape[0]} codebooks"
                )
        self.matrices, self.rotation, self.prefix = tuple(matrices), rotation, prefix
        self.kernel = registry.by_name(kernel).name
        self.d_in = matrices[0].packed.groups * GROUP
        self.tables = tables[:prefix]
        self.planes = [list(matrix.packed.planes[:prefix]) for matrix in matrices]
        self._fused = rotation.signs is not None and ops.rotates(rotation)
        self._bytes = None
        if self.kernel == int8.NAME:
            int8.check_fits(self.d_in, prefix)
            self._bytes = int8.prepare(self.tables)

    def __call__(self, x: Tensor) -> list[Tensor]:
        """x [..., d_in] -> [..., d_out] of each matrix, in the dtype of x."""
        n = x.numel() // self.d_in
        training = x.requires_grad and torch.is_grad_enabled()
        if n > FEW or x.dtype not in TYPES or training:
            return self.dense(x)
        flat, shape = x.reshape(n, self.d_in), x.shape[:-1]
        if self._bytes is not None:
            rotated = self._rotate(flat, torch.float32)
            steps, units = torch.ops.dropbydrop.i8_round(rotated)
            ys = [
                torch.ops.dropbydrop.i8_product(
                    steps, units, planes, *self._bytes, matrix.scales, matrix.bias, x.dtype
                )
                for matrix, planes in zip(self.matrices, self.planes, strict=True)
            ]
        else:
            rotated = self._rotate(flat, x.dtype)
            ys = [
                torch.ops.dropbydrop.gpu_product(
                    rotated, planes, self.tables, matrix.scales, matrix.bias
                )
                for matrix, planes in zip(self.matrices, self.planes, strict=True)
            ]
        return [y.view(*shape, y.shape[-1]) for y in ys]

    def dense(self, x: Tensor) -> list[Tensor]:
        """The same through dense matrices, for any number of rows; differentiable in x."""
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

    def weight(self, i: int, dtype: torch.dtype) -> Tensor:
        """Matrix i decoded from its P planes: [d_out, d_in], for rotated inputs."""
        scales = self.matrices[i].scales
        if dtype in TYPES:
            return torch.ops.dropbydrop.gpu_decode(self.planes[i], self.tables, scales, dtype)
        return decode(self.planes[i], list(self.tables), scales, self.prefix, dtype)

    def _rotate(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x [n, d_in] -> Q x in `dtype`: one or two launches, or torch's steps (see `rotates`)."""
        rotation = self.rotation
        differentiated = x.requires_grad and torch.is_grad_enabled()
        if not self._fused or x.dtype not in TYPES or differentiated:
            wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
            return rotation.apply(wide).to(dtype)
        return torch.ops.dropbydrop.gpu_rotate(
            x, rotation.signs, rotation.odd, rotation.block, dtype
        )
