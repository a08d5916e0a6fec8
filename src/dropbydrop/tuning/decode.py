"""Decoding with gradients: rotated weights of one input group at several levels at once.

    W'_P[r] = s[r] * sum_{m <= P} C_m[index_m[r]]

with the index of codebook_set.py: codes of byte planes, labels of trellis planes. The sum runs once
over the planes, in their order and in float32, and is read at every level on the way: the same
values, bit for bit, as `CodebookSet.decode`. The index is a constant; gradients flow to the entries
of the codebooks and to the scales. With E_P the gradient of a loss by W'_P,

    dL/dC_m[k]  = sum over P >= m and all (r, j) with index k of  s[r] * E_P[r, j]
    dL/ds[r]    = sum over P of  <E_P[r], sum_{m <= P} C_m[index_m[r]]>

so C_1 learns from all levels, C_M from the highest alone. Written out rather than left to autograd,
which would keep a partial sum for each plane and scatter gradients four times as slowly on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dropbydrop.coding.code import partial_sums


def decode_levels(
    index: Sequence[Tensor],
    entries: Sequence[Tensor],
    scales: Tensor,
    prefixes: Sequence[int],
) -> list[Tensor]:
    """Weights of one input group at each of `prefixes`, in its rotated coordinates.

    Args:
        index: of planes 1, 2, ... as far as the highest prefix: integers [d_out, G], all rows of an
            input group.
        entries: their tables, float32 [K, g].
        scales: row scales, float32 [d_out], the same for every prefix.
        prefixes: ascending.

    Returns:
        float32 [d_out, d_in] for each prefix.
    """
    planes = prefixes[-1]
    return list(_Decode.apply(index[:planes], tuple(prefixes), *entries[:planes], scales))


class _Decode(torch.autograd.Function):
    """`decode_levels` with the gradients of the module's note."""

    @staticmethod
    def forward(
        ctx: Any, index: Sequence[Tensor], prefixes: tuple[int, ...], *small: Tensor
    ) -> tuple[Tensor, ...]:
        entries, scales = small[:-1], small[-1]
        sums = partial_sums(index, entries, prefixes)  # [d_out, d_in] each
        ctx.index, ctx.prefixes, ctx.shape = index, prefixes, entries[0].shape
        ctx.save_for_backward(*sums, scales)
        return tuple(total * scales[:, None] for total in sums)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        *sums, scales = ctx.saved_tensors
        by_scale = sum((e * t).sum(1) for e, t in zip(grads, sums, strict=True))
        by_table: list[Tensor] = []
        total: Tensor | None = None  # sum over P >= m of s * E_P
        left = len(sums)
        for m in range(len(ctx.index), 0, -1):
            if left and ctx.prefixes[left - 1] == m:
                left -= 1
                part = grads[left] * scales[:, None]
                total = part if total is None else total.add_(part)
            assert total is not None
            by_table.append(_sum_by_index(total, ctx.index[m - 1], *ctx.shape))
        return None, None, *reversed(by_table), by_scale


def _sum_by_index(total: Tensor, index: Tensor, entries: int, size: int) -> Tensor:
    """Sums of the groups of total [d_out, d_in] that have the same index, float32 [K, g].

    Groups are added in their order, so that the same input gives the same bits: on a GPU
    `index_add_` does not, and the backward pass of an embedding sorts first. Sums of single weights
    run in float64: there are a million of them for 64 entries.
    """
    values, index = total.view(-1, size), index.reshape(-1)
    if values.is_cuda:
        sort = torch.ops.aten.embedding_dense_backward
        return sort(values, index.to(torch.int64), entries, -1, False)
    if size == 1:
        sums = torch.bincount(index, values[:, 0].double(), entries)
        return sums[:, None].to(values.dtype)
    out = values.new_zeros(entries, size)
    return out.index_add_(0, index.to(torch.int64), values)
