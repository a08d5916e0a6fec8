"""`PreparedGroup`: the matrices of one input group at one precision, ready for a kernel.

What does not depend on the input (addresses, shapes, layouts) is worked out once, and a call with
few rows is then one operator for all matrices. `CpuGroup` (cpu/cpu_group.py) and `CudaGroup`
(cuda/cuda_group.py) are the two kinds; registry.py decides which of their paths a call takes.

Differentiable in x: an input that requires a gradient takes the dense path.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from dropbydrop.coding.rotation import Rotation

from . import registry
from .layout import Codebooks, Matrix


class PreparedGroup(ABC):
    """See the module's note. Immutable; its tensors must not be changed or moved."""

    def __init__(
        self,
        matrices: Sequence[Matrix],
        books: Codebooks,
        rotation: Rotation,
        prefix: int,
        kernel: str,
    ) -> None:
        """
        Args:
            matrices: they share d_in, codebooks and rotation (q/k/v of a block).
            rotation: x -> x', on the device of the matrices.
            prefix: P, the number of planes to read.
            kernel: its name.

        Raises:
            ValueError: fewer planes or codebooks than P.
        """
        for matrix in matrices:
            matrix.check(prefix, books)
        self.matrices, self.books, self.rotation = tuple(matrices), books, rotation
        self.prefix, self.kernel = prefix, kernel
        self.rows, self.d_in = [matrix.rows for matrix in matrices], matrices[0].d_in

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """x [..., d_in], not rotated -> [..., d_out] of each matrix, in the dtype of x."""
        return self.gemv(x) if registry.takes(x) else self.dense(x)

    @abstractmethod
    def gemv(self, x: Tensor) -> Sequence[Tensor]:
        """The product for what `registry.takes`: at most 16 rows; not differentiable."""

    @abstractmethod
    def dense(self, x: Tensor) -> list[Tensor]:
        """The same through dense matrices, for any number of rows; differentiable in x."""

    @abstractmethod
    def weight(self, i: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Matrix i decoded from its P planes: [d_out, d_in], for rotated inputs."""
