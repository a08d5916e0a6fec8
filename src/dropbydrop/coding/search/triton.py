"""A visit of the search as one Triton kernel: all stages of a group, one row of W a program.

The same steps as `batched.Visits`, which is written in a dozen torch operations a stage and
keeps all candidates' scores in memory: [rows, B, K/2] floats a stage. Here they stay in registers,
and a visit is two launches: the product with the errors of the other groups, and this.

For each stage m, with B candidates (q, cost), q [B, g] the sum of their entries so far:
    1. blend = sum_l pull_l target_l; residual = blend - q; the score of candidate b and entry k is
       cost_b / total + |residual_b|^2 + |C_k|^2 - |2 residual_b . C_k|, a product [B, K/2];
    2. the B best, one after the other: smallest of all scores, then struck out. The sign of an
       entry is that of the dot product;
    3. at a supervised stage, cost += lambda |target - q|^2.
Then, in a sweep, the cost of the old codes: they stay unless the new ones are better. Codes are
packed, one byte a stage, into two 32-bit words until they are written.

Limits: K/2 = 128, g = 8, at most 8 planes, beam up to 32. Ties may be broken in another order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..code import ENTRIES
from .batched import Visits

HALF = ENTRIES // 2


@triton.jit
def _word(books, m, code, g, real, HALF: tl.constexpr):
    """The entry of a code of stage m, [16], zeros where not `real`."""
    entry = tl.load(books + (m * HALF + code % HALF) * 8 + g, mask=real, other=0.0)
    return tl.where(code >= HALF, -entry, entry)


@triton.jit
def _target(own, pulled, level, row, rows, g, real):
    """Whitened target of a level, [16]."""
    target = tl.load(pulled + (level * rows + row) * 8 + g, mask=real, other=0.0)
    return target + tl.load(own + row * 8 + g, mask=real, other=0.0)


@triton.jit(do_not_specialize=["j", "rows"])  # not compiled anew for 1, or for multiples of 16
def visit(
    own, pulled, books, codebooks, part, error, chosen, moved,
    pulls, totals, lambdas, at, rows, groups, j, beam,
    START: tl.constexpr, PLANES: tl.constexpr, LEVELS: tl.constexpr, B: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """One group j of `Visits`: own [rows, 8], pulled [L, rows, 8], books and codebooks [M, 128, 8],
    part [rows, 8 * groups], error [L, rows, 8 * groups], chosen [M, rows, groups], moved [rows];
    pulls [M, L], totals [M], lambdas [L], at [M] (the level a stage completes, or -1). Grid: rows.
    """
    row = tl.program_id(0).to(tl.int64)
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
            target = _target(own, pulled, level, row, rows, g, real)
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
            slot, parent, entry = b == i, b == best // HALF, best % HALF
            word = tl.load(books + (m * HALF + entry) * 8 + g, mask=real, other=0.0)
            word = tl.where(negative, -word, word)
            origin = tl.sum(tl.where(parent[:, None], q, 0.0), 0)
            q_new = tl.where(slot[:, None], (origin + word)[None, :], q_new)
            # finite: even the first stage has more entries than a beam has candidates
            cost_new = tl.where(slot, tl.sum(tl.where(parent, cost, 0.0), 0), cost_new)
            code = (entry + tl.where(negative, HALF, 0)).to(tl.int32)
            before, after = tl.where(parent, low, 0), tl.where(parent, high, 0)
            if m < 4:
                low_new = tl.where(slot, tl.sum(before, 0) | (code << (8 * m)), low_new)
            else:
                low_new = tl.where(slot, tl.sum(before, 0), low_new)
                high_new = tl.where(slot, tl.sum(after, 0) | (code << (8 * m - 32)), high_new)
        q, cost, low, high = q_new, cost_new, low_new, high_new
        level = tl.load(at + m)
        if level >= 0:
            target = _target(own, pulled, level, row, rows, g, real)
            left = target[None, :] - q
            cost += tl.load(lambdas + level) * tl.sum(left * left, 1)
    first = b == 0
    codes_low = tl.sum(tl.where(first, low, 0), 0)
    codes_high = tl.sum(tl.where(first, high, 0), 0)
    best_cost = tl.sum(tl.where(first, cost, 0.0), 0)
    here = chosen + row * groups + j
    plane = rows.to(tl.int64) * groups
    if not START:
        old_low, old_high, before = codes_low * 0, codes_high * 0, best_cost * 0
        total = tl.zeros([16], tl.float32)
        for m in tl.static_range(PLANES):
            code = tl.load(here + m * plane).to(tl.int32)
            if m < 4:
                old_low |= code << (8 * m)
            else:
                old_high |= code << (8 * m - 32)
            total += _word(books, m, code, g, real, HALF)
            level = tl.load(at + m)
            if level >= 0:
                left = _target(own, pulled, level, row, rows, g, real) - total
                before += tl.load(lambdas + level) * tl.sum(left * left, 0)
        better = best_cost < before * (1 - 1e-6)
        codes_low = tl.where(better, codes_low, old_low)
        codes_high = tl.where(better, codes_high, old_high)
        tl.store(moved + row, tl.load(moved + row) + better.to(tl.int32))
    weight = tl.load(part + row * groups * 8 + j * 8 + g, mask=real, other=0.0)
    total = tl.zeros([16], tl.float32)
    for m in tl.static_range(PLANES):
        word = codes_low if m < 4 else codes_high
        code = (word >> (8 * (m % 4))) & 255
        tl.store(here + m * plane, code.to(tl.uint8))
        total += _word(codebooks, m, code, g, real, HALF)
        level = tl.load(at + m)
        if level >= 0:
            to = error + (level * plane + row * groups + j) * 8 + g
            tl.store(to, weight - total, mask=real)


def warps(wide: int) -> int:
    """Warps of a program for beams padded to `wide`: 32 scores and dot products a thread.

    With twice as many the compiler runs out of registers (tests/compile_triton.py).
    """
    return wide // 8


class TritonVisits(Visits):
    """`Visits` on CUDA; no scores in memory, so more rows at once."""

    ROWS = 1 << 15

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        at, totals, pulls = self.schedule
        self._constants = [
            torch.tensor(numbers, device=self.device)
            for numbers in (pulls, totals, self.lambdas, [-1 if x is None else x for x in at])
        ]
        self._constants[3] = self._constants[3].int()
        self.codebooks = self.codebooks.contiguous()

    def _visit(self, j: int, own: Tensor, pulled: Tensor, books: Tensor, start: bool) -> None:
        planes, rows, groups = self.chosen.shape
        wide = max(16, self.beam)
        visit[(rows,)](
            own, pulled, books, self.codebooks, self.part, self.error, self.chosen, self.moved,
            *self._constants, rows, groups, j, self.beam,
            START=start, PLANES=planes, LEVELS=len(self.levels), B=wide, HALF=HALF,
            num_warps=warps(wide),
        )  # fmt: skip
