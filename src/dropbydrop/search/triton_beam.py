"""The beam over stages as one Triton kernel: all stages of one group, one row of W a program.

The same steps as `torch_search._beam`, which is written in a dozen torch operations a stage and
keeps all candidates' scores in memory: [rows, B, K/2] floats a stage. Here they stay in registers.

For each stage m, with B candidates (q, cost), q [B, g] the sum of their entries so far:
    1. blend = sum_l pull_l target_l; residual = blend - q; the score of candidate b and entry k is
       cost_b / total + |residual_b|^2 + |C_k|^2 - |2 residual_b . C_k|, a product [B, K/2];
    2. the B best, one after the other: smallest of all scores, then struck out. The sign of an
       entry is that of the dot product;
    3. at a supervised stage, cost += lambda |target - q|^2.
Codes are packed, one byte a stage, into two 32-bit words.

Limits: K/2 = 128, g = 8, at most 8 planes, beam up to 32. Ties may be broken in another order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..code import ENTRIES

HALF = ENTRIES // 2


@triton.jit
def _stages(
    targets, books, pulls, totals, lambdas, at, codes, costs, rows, beam,
    PLANES: tl.constexpr, LEVELS: tl.constexpr, B: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """targets [L, rows, 8], books [M, 128, 8], pulls [M, L], totals [M], lambdas [L], at [M] (the
    level a stage completes, or -1) -> codes int32 [2, rows] packed, costs [rows]. Grid: rows."""
    row = tl.program_id(0)
    g = tl.arange(0, 16)  # inputs of a group, padded to what tl.dot takes
    real = g < 8
    b, k = tl.arange(0, B), tl.arange(0, HALF)
    flat = tl.arange(0, B * HALF)
    q = tl.zeros([B, 16], tl.float32)
    cost = tl.where(b == 0, 0.0, float("inf"))
    low, high = tl.zeros([B], tl.int32), tl.zeros([B], tl.int32)
    for m in tl.static_range(PLANES):
        blend = tl.zeros([16], tl.float32)
        for level in tl.static_range(LEVELS):
            target = tl.load(targets + (level * rows + row) * 8 + g, mask=real, other=0.0)
            blend += tl.load(pulls + m * LEVELS + level) * target
        entry_at = (m * HALF + k)[:, None] * 8 + g[None, :]
        book = tl.load(books + entry_at, mask=real[None, :], other=0.0)  # [128, 16]
        residual = blend[None, :] - q
        base = cost / tl.load(totals + m) + tl.sum(residual * residual, 1)
        dots = 2 * tl.dot(residual, tl.trans(book), input_precision="tf32x3")  # [B, 128]
        scores = base[:, None] + tl.sum(book * book, 1)[None, :] - tl.abs(dots)
        scores, dots = tl.reshape(scores, [B * HALF]), tl.reshape(dots, [B * HALF])
        kept = beam
        if m == PLANES - 1:
            kept = 1
        q_new = tl.zeros([B, 16], tl.float32)
        cost_new = tl.full([B], float("inf"), tl.float32)
        low_new, high_new = tl.zeros([B], tl.int32), tl.zeros([B], tl.int32)
        for i in range(kept):
            lowest = tl.min(scores, 0)
            best = tl.min(tl.where(scores == lowest, flat, B * HALF - 1), 0)
            negative = tl.sum(tl.where(flat == best, dots, 0.0), 0) < 0
            scores = tl.where(flat == best, float("inf"), scores)
            own, parent, entry = b == i, b == best // HALF, best % HALF
            word = tl.load(books + (m * HALF + entry) * 8 + g, mask=real, other=0.0)
            word = tl.where(negative, -word, word)
            origin = tl.sum(tl.where(parent[:, None], q, 0.0), 0)
            q_new = tl.where(own[:, None], (origin + word)[None, :], q_new)
            # finite: even the first stage has more entries than a beam has candidates
            cost_new = tl.where(own, tl.sum(tl.where(parent, cost, 0.0), 0), cost_new)
            code = (entry + tl.where(negative, HALF, 0)).to(tl.int32)
            before, after = tl.where(parent, low, 0), tl.where(parent, high, 0)
            if m < 4:
                low_new = tl.where(own, tl.sum(before, 0) | (code << (8 * m)), low_new)
            else:
                low_new = tl.where(own, tl.sum(before, 0), low_new)
                high_new = tl.where(own, tl.sum(after, 0) | (code << (8 * m - 32)), high_new)
        q, cost, low, high = q_new, cost_new, low_new, high_new
        level = tl.load(at + m)
        if level >= 0:
            target = tl.load(targets + (level * rows + row) * 8 + g, mask=real, other=0.0)
            left = target[None, :] - q
            cost += tl.load(lambdas + level) * tl.sum(left * left, 1)
    first = b == 0
    tl.store(codes + row, tl.sum(tl.where(first, low, 0), 0))
    tl.store(codes + rows + row, tl.sum(tl.where(first, high, 0), 0))
    tl.store(costs + row, tl.sum(tl.where(first, cost, 0.0), 0))


def beam_search(
    target: Tensor,
    books: Tensor,
    lambdas: Sequence[float],
    schedule: tuple[list[int | None], list[float], list[list[float]]],
    beam: int,
) -> tuple[Tensor, Tensor]:
    """Codes [M, n] (int64, bit 7 = sign) and costs [n] of one group; as `torch_search._beam`.

    target [L, n, g] and books [M, K/2, g], both whitened.
    """
    at, totals, pulls = schedule
    device, (levels, n, _) = target.device, target.shape
    planes = books.shape[0]

    def values(numbers: Sequence[object], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(numbers, dtype=dtype, device=device)

    packed = torch.empty(2, n, dtype=torch.int32, device=device)
    costs = torch.empty(n, device=device)
    _stages[(n,)](
        target.contiguous(), books.contiguous(), values(pulls), values(totals), values(lambdas),
        values([-1 if level is None else level for level in at], torch.int32),
        packed, costs, n, beam,
        PLANES=planes, LEVELS=levels, B=max(16, beam), HALF=HALF, num_warps=1,
    )  # fmt: skip
    codes = [(packed[m // 4] >> (8 * (m % 4))) & 255 for m in range(planes)]
    return torch.stack(codes).long(), costs
