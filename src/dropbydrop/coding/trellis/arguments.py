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
AHEAD = 8  # cycles that a block of rows sees beyond it, for each plane; native/trellis/trellis.h


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
    row_feedback: Tensor | None = None
    row_block: int = 0

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
        if self.row_feedback is not None:
            self._check_rows(self.row_feedback)
        if self.codes is not None:
            shapes = [tuple(code.shape) for code in self.codes]
            if shapes != [plane.shape(d_out, d_in) for plane in planes]:
                raise ValueError(f"codes of {shapes} for a matrix {[d_out, d_in]}")

    def _check_rows(self, feedback: Tensor) -> None:
        d_out, block = self.w.shape[0], self.row_block
        if feedback.shape != (d_out, d_out):
            raise ValueError(f"feedback {list(feedback.shape)} between {d_out} rows")
        if self.lower is None or self.sweeps:
            raise ValueError("feedback between rows is for a start, without sweeps")
        planes = self.books.planes
        cycles = [ring_of(plane) // plane.bits for plane in planes]
        if block < 1 or any(block % cycle for cycle in cycles):
            raise ValueError(f"blocks of {block} rows: whole cycles of the planes, {cycles}")
        if d_out < block + max(block, *(beyond_of(planes, m) for m in range(len(planes)))):
            raise ValueError(f"{d_out} rows are too few for blocks of {block}")

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


@dataclass(frozen=True)
class Block:
    """Rows of a plane that are coded together: from `first` to `last`, seen until `seen`."""

    first: int
    last: int
    seen: int


def blocks_of(planes: Sequence[TrellisPlane], m: int, d_out: int, size: int) -> list[Block]:
    """The blocks of plane m, which sees AHEAD cycles of its own and of every later plane beyond
    them; the first one begins as many rows before row 0, the ring's last ones, and sees none twice.
    """
    beyond, rows = beyond_of(planes, m), ring_rows(planes[m], d_out)
    bounds = [*range(0, d_out // size * size, size), rows]  # as many in every plane
    cycle = ring_of(planes[m]) // planes[m].bits
    most = [(rows - beyond_of(planes, 0)) // cycle * cycle, *[rows] * len(bounds)]
    return [
        Block(first, last, max(last, min(last + beyond, end)))
        for (first, last), end in zip(pairwise(bounds), most, strict=False)
    ]


def beyond_of(planes: Sequence[TrellisPlane], m: int) -> int:
    """Rows that a block sees beyond its end in plane m: whole cycles of it."""
    cycles = [ring_of(plane) // plane.bits for plane in planes[m:]]
    return -(-AHEAD * sum(cycles) // cycles[0]) * cycles[0]


def state_labels(plane: TrellisPlane, taps: Tensor) -> Tensor:
    """Label of every state: uint8 [2^window], the newest bit the lowest."""
    found = torch.zeros(1, dtype=torch.uint8, device=taps.device)
    for tap in taps:
        found = torch.cat([found, found ^ tap])
    return found
