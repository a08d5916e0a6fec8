"""`matryoshka`: nested integers by GPTQ with feedback averaged over levels, as MatGPTQ does.

One master code of b_max bits a weight; level r is a slice of it (MatQuant, Nair et al. 2025), its
leading bits rounded by the next one:

    S(q, r) = min((q >> d) + ((q >> (d - 1)) & 1), 2^r - 1),  d = b_max - r
    w^_r = scale * ((S(q, r) << d) - zero)

Scales and zero points (groups of 64, grid.py) are shared by all levels. Steps, after MatGPTQ
(arXiv 2602.03537): columns in natural order; each weight takes the q that minimises the sum over
levels of (w - w^_r)^2; what is handed on to the columns to come is the mean over levels of
w - w^_r. Damping 1 %.

Deviations: the master has as many bits as the highest level asked for (the published one has 8,
which would cost twice the disk at levels 2, 3, 4); no search for bits per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .columns import feed_back
from .grid import GROUP_SIZE, fit_grid, from_codes, grid_bytes, groups_of
from .suite import Level, Suite


@dataclass(frozen=True)
class Master:
    """The stored code.

    Attributes:
        codes: uint8 [d_out, d_in], `bits` bits each.
        scales, zeros: float32 [d_out, groups].
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int

    def decode(self, level: int) -> Tensor:
        """float32 [d_out, d_in] from the slice of `level` bits."""
        width = self.codes.shape[1]
        scale = self.scales.repeat_interleave(GROUP_SIZE, 1)[:, :width]
        zero = self.zeros.repeat_interleave(GROUP_SIZE, 1)[:, :width]
        return from_codes(sliced(self.codes, self.bits, level).float(), scale, zero)


def sliced(codes: Tensor, bits: int, level: int) -> Tensor:
    """S(q, level) << (bits - level), integers of any shape."""
    drop = bits - level
    if drop == 0:
        return codes.int()
    q = codes.int()
    return ((q >> drop) + ((q >> (drop - 1)) & 1)).clamp(max=2**level - 1) << drop


def encode(weight: Tensor, gram: Tensor, levels: Sequence[int]) -> Master:
    """The master code of weight float32 [d_out, d_in] under gram [d_in, d_in].

    Raises:
        CalibrationError: H cannot be factorised even after damping.
    """
    d_out, d_in = weight.shape
    bits = max(levels)
    every = torch.arange(2**bits, device=weight.device)
    points = torch.stack([sliced(every, bits, r) for r in levels]).float()  # [levels, 2^bits]
    codes = torch.empty(d_out, d_in, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(d_out, groups_of(d_in), device=weight.device)
    zeros = torch.empty_like(scales)

    def visit(j: int, column: Tensor, ahead: Tensor) -> Tensor:
        group = j // GROUP_SIZE
        if j % GROUP_SIZE == 0:
            scales[:, group], zeros[:, group] = fit_grid(ahead[:, :GROUP_SIZE], bits)
        s, z = scales[:, group, None, None], zeros[:, group, None, None]
        residual = column[:, None, None] - from_codes(points, s, z)  # [d_out, levels, 2^bits]
        best = residual.square().sum(1).argmin(1)
        codes[:, j] = best.to(torch.uint8)
        return residual.mean(1).gather(1, best[:, None])[:, 0]

    feed_back(weight, gram, visit, torch.arange(d_in, device=weight.device))
    return Master(codes, scales, zeros, bits)


def matryoshka(weight: Tensor, gram: Tensor, levels: Sequence[int]) -> Suite:
    """weight float32 [d_out, d_in], gram [d_in, d_in]."""
    master = encode(weight, gram, levels)
    groups = master.scales.numel()
    whole = grid_bytes(weight.shape, master.bits)
    zero_point_bits = master.bits * groups  # at every level those of the master
    served = {
        r: Level(master.decode(r), -(-(weight.numel() * r + zero_point_bits) // 8) + 2 * groups)
        for r in levels
    }
    return Suite(served, (whole,))
