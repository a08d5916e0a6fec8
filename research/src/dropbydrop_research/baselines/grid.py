"""Scalar grids: what round-to-nearest, GPTQ and Matryoshka have in common.

Rows are cut into groups of 64 consecutive inputs (the last may be shorter). A group has a float16
scale and an integer zero point of b bits, from its smallest and largest value (asymmetric, zero
always on the grid, as in GPTQ's published code):

    code = clamp(round(w / scale) + zero, 0, 2^b - 1),    w^ = scale * (code - zero)

The scale is rounded to float16 before it is used, so what is decoded is what is stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .suite import bit_bytes

GROUP_SIZE = 64
_SMALLEST = 2.0**-24  # of float16


def groups_of(d_in: int) -> int:
    """Number of groups of a row."""
    return -(-d_in // GROUP_SIZE)


def fit_grid(w: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point, each [d_out], of groups w [d_out, n]."""
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    flat = low == high
    low, high = torch.where(flat, -1.0, low), torch.where(flat, 1.0, high)
    top = 2**bits - 1
    scale = ((high - low) / top).half().float().clamp_min(_SMALLEST)
    return scale, (-low / scale).round().clamp(0, top)


def to_codes(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Nearest codes, as floats; shapes broadcast."""
    return ((w / scale).round() + zero).clamp(0, 2**bits - 1)


def from_codes(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Decoded values; shapes broadcast."""
    return scale * (codes - zero)


def fit_grids(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scales and zero points, each [d_out, groups], of the whole matrix [d_out, d_in]."""
    parts = [fit_grid(part, bits) for part in weight.split(GROUP_SIZE, dim=1)]
    return torch.stack([p[0] for p in parts], 1), torch.stack([p[1] for p in parts], 1)


def grid_bytes(shape: Sequence[int], bits: int) -> int:
    """Bytes of codes, float16 scales and zero points of a matrix of shape [d_out, d_in]."""
    d_out, d_in = shape
    groups = d_out * groups_of(d_in)
    return bit_bytes(d_out * d_in, bits) + 2 * groups + bit_bytes(groups, bits)
