"""Tables in planes (coding/tables.py) on disk: what each plane file holds of them, and reading it.

The plane files of a level hold what its tables have beyond those of the level below, so a level
reads a prefix of a table as it reads a prefix of the matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dropbydrop.coding.rotation import Rotation, split_odd
from dropbydrop.coding.tables import rings

from .config import codes_name, odd_name, table_inputs_name
from .contents import plane_tensors
from .reader import Checkpoint
from .tensor_files import TensorInfo


def table_bytes(checkpoint: Checkpoint, count: int) -> int:
    """Bytes of the first `count` planes of all tables."""
    q = checkpoint.quantization
    planned: dict[str, TensorInfo] = {}
    for m in range(1, len(q.planes) + 1):
        planned |= plane_tensors(q, {}, checkpoint.rest, m)
    read = [codes_name(module, k) for module in q.tables for k in range(1, count + 1)]
    return sum(planned[name].nbytes for name in read)


def read_table(checkpoint: Checkpoint, module: str, count: int) -> list[Tensor]:
    """Codes of the first `count` planes of a table: uint8 [rings, bytes, d] each.

    Raises:
        MissingPlaneError, FormatError: as `Checkpoint.require`.
    """
    files = checkpoint.quantization.table_files
    return [checkpoint.read_plane(files[k - 1], codes_name(module, k)) for k in range(1, count + 1)]


def read_table_rotation(checkpoint: Checkpoint, module: str) -> Rotation:
    """The rotation of a table's columns, in memory."""
    packed = checkpoint.read(table_inputs_name(module))
    odd = split_odd(len(packed))[1]
    factor = checkpoint.read(odd_name(odd)).clone() if odd > 1 else None
    return Rotation.from_stored(len(packed), packed, factor)


def dense_table(
    checkpoint: Checkpoint, module: str, count: int, rows: slice = slice(None)
) -> Tensor:
    """Rows of W in the original space, from the first `count` planes: float32 [n, d].

    The reference: decodes without kernels.
    """
    books = checkpoint.read_set(checkpoint.quantization.embeddings.codebooks)
    codes = read_table(checkpoint, module, count)
    scales = checkpoint.read(f"{module}.scales")
    length = rings(len(scales))[1]  # rows of a ring
    first, last, _ = rows.indices(len(scales))
    parts = []
    for ring in range(first // length, -(-last // length)):
        low = ring * length
        inside = slice(max(first - low, 0), min(last - low, length))
        (sums,) = books.sums([plane[ring] for plane in codes], length, [len(codes)], inside)
        kept = scales[low + inside.start : low + inside.stop].float()
        parts.append(sums * kept[:, None])
    return read_table_rotation(checkpoint, module).transpose(torch.cat(parts))
