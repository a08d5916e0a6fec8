"""Decoding with gradients: rotated weights of one input group at several levels at once.

    W'_P[r] = s[r] * sum_{m <= P} C_m[codes_m[r]]

The sum runs once over the planes, in their order and in float32, and is read at every level on the
way: the same values, bit for bit, as `code.decode`. The codes are constants; gradients flow to the
entries of the codebooks and to the scales. With E_P the gradient of a loss by W'_P,

    dL/dC_m[k]  = sum over P >= m and all (r, j) with code k of  s[r] * E_P[r, j]
    dL/ds[r]    = sum over P of  <E_P[r], sum_{m <= P} C_m[codes_m[r]]>

so C_1 learns from all levels, C_M from the highest alone. Written out rather than left to autograd,
which would keep a partial sum for each plane and scatter gradients four times as slowly on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dropbydrop.coding.code import GROUP, partial_sums


def decode_levels(
    codes: Sequence[Tensor],
    entries: Sequence[Tensor],
    scales: Tensor,
    prefixes: Sequence[int],
) -> list[Tensor]:
    """Weights of one input group at each of `prefixes`, in its rotated coordinates.

    Args:
        codes: planes 1, 2, ... as far as the highest prefix: uint8 [d_out, G], all rows of an input
            group.
        entries: their entries, float32 [K, g].
        scales: row scales, float32 [d_out], the same for every prefix.
        prefixes: ascending.

    Returns:
        float32 [d_out, d_in] for each prefix.
    """
    planes = prefixes[-1]
    return list(_Decode.apply(codes[:planes], tuple(prefixes), *entries[:planes], scales))


class _Decode(torch.autograd.Function):
    """`decode_levels` with the gradients of the module's note."""

    @staticmethod
    def forward(
        ctx: Any, codes: Sequence[Tensor], prefixes: tuple[int, ...], *small: Tensor
    ) -> tuple[Tensor, ...]:
        entries, scales = small[:-1], small[-1]
        sums = partial_sums(codes, entries, prefixes)  # [d_out, d_in] each
        ctx.codes, ctx.prefixes, ctx.entries = codes, prefixes, len(entries[0])
        ctx.save_for_backward(*sums, scales)
        return tuple(total * scales[:, None] for total in sums)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        *sums, scales = ctx.saved_tensors
        by_scale = sum((e * t).sum(1) for e, t in zip(grads, sums, strict=True))
        by_table: list[Tensor] = []
        total: Tensor | None = None  # sum over P >= m of s * E_P
        left = len(sums)
        for m in range(len(ctx.codes), 0, -1):
            if left and ctx.prefixes[left - 1] == m:
                left -= 1
                part = grads[left] * scales[:, None]
                total = part if total is None else total.add_(part)
            assert total is not None
            by_table.append(_sum_by_code(total.view(-1, GROUP), ctx.codes[m - 1], ctx.entries))
        return None, None, *reversed(by_table), by_scale


def _sum_by_code(values: Tensor, codes: Tensor, entries: int) -> Tensor:
    """Sums of the rows of values [N, g] that have the same code, float32 [K, g].

    Rows are added in their order, so that the same input gives the same bits: on a GPU `index_add_`
    does not, and the backward pass of an embedding sorts first.
    """
    index = codes.reshape(-1)
    if values.is_cuda:
        sort = torch.ops.aten.embedding_dense_backward
        return sort(values, index.to(torch.int64), entries, -1, False)
    out = values.new_zeros(entries, GROUP)
    return out.index_add_(0, index.to(torch.int64), values)
