"""`rtn`: round to nearest, groups of 64. Needs no calibration; a code of its own for each level.

The floor that every method must beat: asymmetric min-max grids (grid.py), each weight to the
nearest point, inputs ignored.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .grid import GROUP_SIZE, fit_grids, from_codes, grid_bytes, to_codes
from .suite import Level, Suite, dedicated


def rtn(weight: Tensor, gram: Tensor, levels: Sequence[int]) -> Suite:
    """weight float32 [d_out, d_in]; gram is not used."""
    return dedicated({p: Level(_round(weight, p), grid_bytes(weight.shape, p)) for p in levels})


def _round(weight: Tensor, bits: int) -> Tensor:
    scale, zero = fit_grids(weight, bits)
    width = weight.shape[1]
    scale = scale.repeat_interleave(GROUP_SIZE, 1)[:, :width]
    zero = zero.repeat_interleave(GROUP_SIZE, 1)[:, :width]
    return from_codes(to_codes(weight, scale, zero, bits), scale, zero)
