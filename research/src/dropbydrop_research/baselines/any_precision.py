"""`any-precision`: nested scalar tables by splitting clusters, lowest level 3.

Park et al., Any-Precision LLM (ICML 2024). Every row has a table of 2^b values for each level b and
one code a weight; a lower level reads the leading bits of the codes and its own table.

Steps, for each row with sensitivities f of its weights:
    1. seed at 3 bits as SqueezeLLM (Kim et al. 2024): k-means in one dimension, weighted by f;
    2. incremental upscaling: every cluster is split into the two parts with the smallest weighted
       error; codes get one more bit, 0 for the lower part. Repeated up to the highest level.
Clusters are intervals of the sorted row, so both steps work on their borders with prefix sums, for
all rows at once, and the split is exact (the published code bisects for it).

Stored: codes of the highest level, and the float16 table of each level from 3 on that is asked for.

Deviations: f is the diagonal of H (that of the layer's own error); the published f is the squared
gradient of the loss, which needs a backward pass through the model. K-means starts from quantiles.
The published method stops at 3 bits because quality collapses below; so does this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .suite import Level, Suite, bit_bytes

LOWEST = 3
_ITERATIONS = 100


@dataclass(frozen=True)
class Tables:
    """The stored code.

    Attributes:
        codes: uint8 [d_out, d_in], `bits` bits each.
        values: level -> float32 [d_out, 2^level], exact in float16.
    """

    codes: Tensor
    values: dict[int, Tensor]
    bits: int

    def decode(self, level: int) -> Tensor:
        """float32 [d_out, d_in] from the leading `level` bits of each code."""
        return self.values[level].gather(1, (self.codes >> (self.bits - level)).long())


class _Rows:
    """Sorted rows with prefix sums of f and f w; borders are positions in the sorted order."""

    def __init__(self, weight: Tensor, sensitivity: Tensor) -> None:
        w, self.order = weight.double().sort(1)
        f = sensitivity.double().expand_as(w).gather(1, self.order)
        f = f.clamp_min(1e-12 * float(f.mean()) + torch.finfo(torch.float32).tiny)
        none = w.new_zeros(len(w), 1)
        self.w = w.contiguous()
        self.mass = torch.cat([none, f.cumsum(1)], 1)  # [d_out, d_in + 1]
        self.moment = torch.cat([none, (f * w).cumsum(1)], 1)

    def centers(self, borders: Tensor, empty: Tensor) -> Tensor:
        """Means of the clusters between borders [d_out, k + 1]; where none, `empty` [d_out, k]."""
        mass = self.mass.gather(1, borders).diff(dim=1)
        moment = self.moment.gather(1, borders).diff(dim=1)
        filled = borders.diff(dim=1) > 0
        return torch.where(filled, moment / torch.where(filled, mass, 1.0), empty)

    def nearest(self, centers: Tensor) -> Tensor:
        """Borders [d_out, k + 1] of the cells of ascending centers [d_out, k]."""
        middle = (centers[:, 1:] + centers[:, :-1]) / 2
        inner = torch.searchsorted(self.w, middle.contiguous())
        low = torch.zeros_like(inner[:, :1])
        return torch.cat([low, inner, low + self.w.shape[1]], 1)

    def cluster(self, borders: Tensor) -> Tensor:
        """Index of each sorted position's cluster, [d_out, d_in]."""
        place = torch.arange(self.w.shape[1], device=borders.device).expand_as(self.w)
        return torch.searchsorted(borders[:, 1:-1].contiguous(), place.contiguous(), right=True)


def seed(rows: _Rows, bits: int) -> tuple[Tensor, Tensor]:
    """K-means with 2^bits clusters: borders [d_out, 2^bits + 1], centers [d_out, 2^bits]."""
    n, k = rows.w.shape[1], 2**bits
    starts = ((torch.arange(k, device=rows.w.device) + 0.5) * n / k).long()
    centers = rows.w[:, starts]
    for _ in range(_ITERATIONS):
        borders = rows.nearest(centers)
        before, centers = centers, rows.centers(borders, centers)
        if torch.equal(before, centers):
            break
    borders = rows.nearest(centers)
    return borders, rows.centers(borders, centers)


def split(rows: _Rows, borders: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Best split of every cluster: borders [d_out, 2 k + 1], centers [d_out, 2 k].

    A cluster of one weight or none keeps it in its lower half; the empty half repeats its center.
    """
    d_out, k = centers.shape
    n = rows.w.shape[1]
    own = rows.cluster(borders)  # position p may be the first of a right part
    place = torch.arange(n, device=own.device).expand_as(own)
    low, high = borders.gather(1, own), borders.gather(1, own + 1)

    def part(first: Tensor, last: Tensor) -> Tensor:
        mass = rows.mass.gather(1, last) - rows.mass.gather(1, first)
        moment = rows.moment.gather(1, last) - rows.moment.gather(1, first)
        return moment.square() / mass.clamp_min(torch.finfo(torch.float64).tiny)

    gain = part(low, place) + part(place, high)
    gain = torch.where(place > low, gain, -torch.inf)
    best = gain.new_full((d_out, k), -torch.inf).scatter_reduce(1, own, gain, "amax")
    hit = (gain == best.gather(1, own)) & (place > low)
    candidates = torch.where(hit, place, n)
    found = torch.full((d_out, k), n, device=own.device)
    found = found.scatter_reduce(1, own, candidates, "amin")
    middle = torch.minimum(found, borders[:, 1:])
    finer = torch.empty(d_out, 2 * k + 1, dtype=borders.dtype, device=borders.device)
    finer[:, ::2], finer[:, 1::2] = borders, middle
    return finer, rows.centers(finer, centers.repeat_interleave(2, 1))


def encode(weight: Tensor, sensitivity: Tensor, levels: Sequence[int]) -> Tables:
    """weight float32 [d_out, d_in]; sensitivity [d_in] or [d_out, d_in]; levels from 3 on."""
    rows, top = _Rows(weight, sensitivity), max(levels)
    borders, centers = seed(rows, LOWEST)
    values = {}
    for level in range(LOWEST, top + 1):
        if level > LOWEST:
            borders, centers = split(rows, borders, centers)
        if level in levels:
            values[level] = centers.half().float()
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    codes.scatter_(1, rows.order, rows.cluster(borders).to(torch.uint8))
    return Tables(codes, values, top)


def any_precision(weight: Tensor, gram: Tensor, levels: Sequence[int]) -> Suite:
    """weight float32 [d_out, d_in], gram [d_in, d_in]; levels from 3 on."""
    entries = encode(weight, gram.diagonal(), levels)
    d_out = weight.shape[0]
    table = {p: 2 * d_out * 2**p for p in levels}
    served = {p: Level(entries.decode(p), bit_bytes(weight.numel(), p) + table[p]) for p in levels}
    return Suite(served, (bit_bytes(weight.numel(), entries.bits) + sum(table.values()),))
