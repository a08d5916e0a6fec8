"""Tables in planes: the rows of an embedding or output head, coded as matrices are.

    W [vocab, d] -> planes of kind trellis, W = W' Q, one scale a row

A table is one matrix for its rotation and its H, and several for its codes: rings of at most `ROWS`
rows, all of one length, so that the search of 262,144 rows needs the memory of 4,096, and that no
row is far from a ring's beginning. The last rows of the last ring may be padding.

A head multiplies the outputs of the final norm, whose Gram matrix is H. A look-up takes rows as
they are, for which H = I would be right: damping (encoder.py) keeps the noise in weak directions of
H small, and that serves look-ups of a table that is both (docs/log.md).

Levels of their own, since what a table costs does not shrink with the matrices: level P of the
model reads `table_bits(P, most)` bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .codebook_set import CodebookSet
from .codebooks import default_lambdas
from .encoder import Effort, GroupEncoder
from .planes import PlaneSpec, planes_of
from .rotation import Rotation

ROWS = 4096  # of a ring, at most
TABLES = "tables"  # the name of their codebook set in a checkpoint
BITS = (3, 4, 5)  # that trellis planes of one family have


def rings(vocab: int) -> tuple[int, int]:
    """Number of rings of a table, and rows of each: a multiple of 8, so that they fill bytes."""
    count = -(-vocab // ROWS)
    return count, -(-vocab // (8 * count)) * 8


def table_bits(levels: Sequence[int], most: int) -> tuple[int, ...]:
    """Bits of a table at each level of the model: two more than the level has, 3 to `most`."""
    return tuple(min(max(level + 2, BITS[0]), most) for level in levels)


def table_planes(bits: Sequence[int], window: int) -> tuple[PlaneSpec, ...]:
    """The planes of tables that have these bits at the levels of a model."""
    return planes_of("trellis", sorted(set(bits)), window)


def encode_table(
    weight: Tensor,
    gram: Tensor,
    rotation: Rotation,
    books: CodebookSet,
    bits: Sequence[int],
    effort: Effort,
    backend: str | None = None,
) -> tuple[list[Tensor], Tensor, list[float]]:
    """Code the rows of a table.

    Args:
        weight: [vocab, d], unrotated.
        gram: H [d, d] of what the rows are multiplied by, unrotated; the work is done where it is.
        rotation: as `encoder.group_rotation` makes it, on the same device.
        books: of `table_planes`.
        bits: that are supervised, ascending.

    Returns:
        Codes uint8 [rings, bytes, d] of every plane and scales float16 [vocab], on the CPU; the
        relative weighted error at each of `bits`.

    Raises:
        CalibrationError: H is not finite or not positive definite even after damping.
    """
    count, length = rings(len(weight))
    lambdas = default_lambdas(list(bits))
    encoder = GroupEncoder(
        "the table", gram, rotation, books.planes, bits, lambdas, effort, backend
    )
    coded, scales, lost, whole = [], [], [0.0] * len(bits), 0.0
    for ring in range(count):
        part = weight[ring * length : (ring + 1) * length].to(gram.device, torch.float32)
        found = encoder.result(encoder.encode(_padded(part, length), books), books)
        energy = float(((part @ gram) * part).sum())
        whole += energy
        lost = [total + error * energy for total, error in zip(lost, found.errors, strict=True)]
        coded.append(found.codes)
        scales.append(found.scales[: len(part)].cpu())
    codes = [torch.stack([ring[m] for ring in coded]).cpu() for m in range(len(books.planes))]
    return codes, torch.cat(scales), [error / max(whole, 1e-30) for error in lost]


def _padded(part: Tensor, length: int) -> Tensor:
    """`part` [n, d] with rows of zeros behind it: [length, d]."""
    missing = length - len(part)
    return torch.cat([part, part.new_zeros(missing, part.shape[1])]) if missing else part
