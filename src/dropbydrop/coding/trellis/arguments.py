"""`Problem`: the checked arguments of a search, and what its backends derive from them alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from ..codebook_set import TrellisSet
from ..planes import TrellisPlane

SEGMENT = 768  # rows of a segment, about; native/trellis/segments.h
WARM_UP = 8  # cycles of rows before it


@dataclass(frozen=True, eq=False)
class Problem:
    """See `dropbydrop.coding.trellis.search`. Raises ValueError for what contradicts itself."""

    w: Tensor
    row_weights: Tensor
    books: TrellisSet
    prefixes: list[int]
    lambdas: list[float]
    lower: Tensor | None
    h: Tensor | None
    sweeps: int
    codes: Sequence[Tensor] | None

    def __post_init__(self) -> None:
        d_out, d_in = self.w.shape
        prefixes, planes = self.prefixes, self.books.planes
        if not prefixes or prefixes != sorted(set(prefixes)) or prefixes[0] < 1:
            raise ValueError(f"prefixes {prefixes} must ascend from at least 1")
        if prefixes[-1] != len(planes) or len(self.lambdas) != len(prefixes):
            raise ValueError(
                f"prefixes {prefixes} with {len(planes)} planes and {len(self.lambdas)} weights: "
                "the last prefix must use every plane, and each needs a weight"
            )
        if min(self.lambdas) <= 0 or self.row_weights.shape != (d_out,):
            raise ValueError(f"weights must be positive, those of rows [{d_out}]")
        if (self.codes is None) == (self.lower is None) or (self.sweeps > 0 and self.h is None):
            raise ValueError("a start needs `codes` or `lower`, and only one; sweeps need `h`")
        for matrix in (self.lower, self.h):
            if matrix is not None and matrix.shape != (d_in, d_in):
                raise ValueError(f"matrix {list(matrix.shape)} for {d_in} inputs")
        if self.codes is not None:
            shapes = [tuple(code.shape) for code in self.codes]
            if shapes != [plane.shape(d_out, d_in) for plane in planes]:
                raise ValueError(f"codes of {shapes} for a matrix {[d_out, d_in]}")

    @cached_property
    def pulls(self) -> list[list[float]]:
        """[m][level] how the levels pull on plane m, summing to 1.

        Later planes are unknown: a later level counts with the share of its error that they will
        leave, 4^-bits.
        """
        rows = []
        for m in range(len(self.books.planes)):
            pulls = []
            for prefix, lam in zip(self.prefixes, self.lambdas, strict=True):
                bits = sum(plane.bits for plane in self.books.planes[m + 1 : prefix])
                pulls.append(lam * 4.0**-bits if prefix > m else 0.0)
            rows.append([pull / sum(pulls) for pull in pulls])
        return rows


def ring_of(plane: TrellisPlane) -> int:
    """Bits of a state: the window, made even when a row has two bits."""
    return plane.window + (plane.window % 2 if plane.bits == 2 else 0)


def ring_rows(plane: TrellisPlane, d_out: int) -> int:
    """Rows of the ring of a stream, those of its padding included."""
    return 8 * plane.shape(d_out, 1)[0] // plane.bits


def segments_of(
    plane: TrellisPlane, d_out: int, segment: int, warm_up: int
) -> list[tuple[int, int, int]]:
    """(first row of the warm-up, first, last) of each segment of the ring: whole cycles of rows.

    segment: rows, about; warm_up: cycles. The first warm-up begins before row 0, where the last
    rows of the ring are.
    """
    cycle, rows = ring_of(plane) // plane.bits, ring_rows(plane, d_out)
    count = max(1, (rows + segment // 2) // segment)
    cycles = -(-rows // cycle)
    bounds = [cycles * i // count * cycle for i in range(count + 1)]
    bounds[-1] = rows
    return [(first - warm_up * cycle, first, last) for first, last in pairwise(bounds)]


def state_labels(plane: TrellisPlane, taps: Tensor) -> Tensor:
    """Label of every state: uint8 [2^window], the newest bit the lowest."""
    found = torch.zeros(1, dtype=torch.uint8, device=taps.device)
    for tap in taps:
        found = torch.cat([found, found ^ tap])
    return found
