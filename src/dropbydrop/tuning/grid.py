"""A codebook of a trellis plane while it is trained.

It is stored as integers of at most 63 in size and one scale. Trained are the values themselves,
v [K], float32; what decodes is v rounded to the grid that it will be stored on,

    scale = max|v| / top,    table = scale * round(v / scale),

with `top` the largest integer that the plane came with, so that nothing moves before the first
step. Gradients pass the rounding as if it were not there (Bengio et al. 2013): a step of the grid
is a hundredth of the range of the values, and training sees what it does to the loss.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def top_of(part: Mapping[str, Tensor]) -> int:
    """Largest integer of a stored codebook (`TrellisPlane.parts`), at least 1."""
    return max(1, int(part[""].abs().max()))


def values_of(part: Mapping[str, Tensor]) -> Tensor:
    """v of a stored codebook."""
    return part[""].to(torch.float32) * part[".scale"].to(torch.float32)


def rounded_part(values: Tensor, top: int) -> dict[str, Tensor]:
    """What is stored of v: integers int8 [K], and their scale float32 [1]."""
    size = values.detach().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    scale = (size / top).reshape(1)
    return {"": (values.detach() / scale).round().to(torch.int8), ".scale": scale}


def table_of(values: Tensor, top: int) -> Tensor:
    """float32 [K, 1]: v on its grid, with the gradients of v."""
    on_grid = values_of(rounded_part(values, top))
    return (on_grid + (values - values.detach()))[:, None]
