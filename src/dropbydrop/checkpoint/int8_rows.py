"""Narrow forms of what is not coded: float16 values, and eight-bit rows of embeddings."""

from __future__ import annotations

import torch
from torch import Tensor


def half(tensor: Tensor, what: str) -> Tensor:
    """`tensor` in float16 (ValueError naming `what` if that is not finite)."""
    narrow = tensor.detach().to(torch.float16)
    if not torch.isfinite(narrow).all():
        raise ValueError(f"{what}: values that are not finite in float16")
    return narrow


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Eight-bit rows: weight [vocab, d] -> int8 rows [vocab, d], float16 row_scales [vocab].

    weight ~ rows * row_scales[:, None]. The scale is rounded to float16 first, so that the rows
    are the nearest ones for the scale that is stored. Works in slabs of rows.
    """
    rows = torch.empty(weight.shape, dtype=torch.int8)
    row_scales = torch.empty(weight.shape[0], dtype=torch.float16)
    for start in range(0, weight.shape[0], 8192):
        slab = weight[start : start + 8192].detach().cpu().to(torch.float32)
        scale = half(slab.abs().amax(dim=1) / 127, "embedding rows")
        safe = torch.where(scale > 0, scale.float(), torch.ones(()))  # an all-zero row stays zero
        row_scales[start : start + 8192] = scale
        rows[start : start + 8192] = (slab / safe[:, None]).round().clamp(-127, 127).to(torch.int8)
    return rows, row_scales
