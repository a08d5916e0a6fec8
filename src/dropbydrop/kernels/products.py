"""Products and decoding by the kernel of a device, whichever it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dropbydrop.coding.rotation import Rotation

from . import cuda, registry
from .cpu.cpu_group import CpuGroup, decode_rows
from .layout import Codebooks, Matrix
from .prepared_group import PreparedGroup


def prepare_group(
    matrices: Sequence[Matrix],
    books: Codebooks,
    rotation: Rotation,
    prefix: int,
    kernel: str | None = None,
) -> PreparedGroup:
    """The matrices of one input group, ready for the kernel of their device.

    Args as for `PreparedGroup`; kernel: a name to force, see `registry.select`. When none is named,
    an input group that the best kernel does not take gets the next one.

    Raises:
        KernelError: the kernel named is not available, or does not take these planes.
        ValueError: fewer planes or codebooks than P.
    """
    device = matrices[0].scales.device.type
    backend, name = registry.backend_for(device, kernel, books.kind)
    if backend == "gpu":
        names = registry.fallbacks(device, books.kind, kernel)
        name = next((n for n in names if cuda.takes(n, rotation, prefix)), name)
    kind = cuda.CudaGroup if registry.by_name(name).gpu else CpuGroup
    return kind(matrices, books, rotation, prefix, name)


def decode_dense(
    matrix: Matrix,
    books: Codebooks,
    prefix: int,
    dtype: torch.dtype = torch.float32,
    kernel: str | None = None,
) -> Tensor:
    """The weight of the first `prefix` planes, [d_out, d_in], in the rotated space of its inputs.

    Equals `CodebookSet.decode` bit for bit with every kernel. CPU kernels take either layout, so
    nothing has to be packed for this.
    """
    matrix.check(prefix, books)
    backend, name = registry.backend_for(matrix.scales.device.type, kernel, books.kind)
    if backend == "gpu":
        return cuda.decode_dense(matrix, books, prefix, dtype, name)
    return decode_rows(matrix, books, prefix, dtype, name, (0, matrix.rows))
