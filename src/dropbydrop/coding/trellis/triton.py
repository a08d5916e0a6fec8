"""A Viterbi pass as two Triton kernels: forward, one sequence a program, and back.

All 2^L path metrics of a sequence are one tensor of the program, in registers; a row costs a
minimum over the first axis of [2^k, 2^(L-k)] and a reshape. Of all that a forward pass finds, one
byte for each 2^(L-k) states and row goes to memory: which of the 2^k older states it came from.
Rows follow each other, so that a pass takes as long for one sequence as for a hundred: segments are
shorter here than on the CPU. Even shorter ones want longer warm-ups and gain little (docs/log.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batched import Viterbi


@triton.jit(do_not_specialize=["rows", "start"])
def forward(
    x, s, table, back, best, rows, start, STATES: tl.constexpr, BRANCHES: tl.constexpr
):  # fmt: skip
    """x, s [G, rows], table [STATES] values by state, back uint8 [G, rows, STATES / BRANCHES],
    best int64 [G]; `start` -1: free. Grid: G."""
    sequence = tl.program_id(0).to(tl.int64)
    state = tl.arange(0, STATES)
    stays: tl.constexpr = STATES // BRANCHES
    stay = tl.arange(0, stays)
    values = tl.load(table + state)
    metrics = tl.where((state == start) | (start < 0), 0.0, 1e30)
    for t in range(rows):
        least, came = tl.min(tl.reshape(metrics, [BRANCHES, stays]), 0, return_indices=True)
        tl.store(back + (sequence * rows + t) * stays + stay, came.to(tl.uint8))
        wide = tl.broadcast_to(least[:, None], [stays, BRANCHES])
        left = tl.load(x + sequence * rows + t) - values
        metrics = tl.reshape(wide, [STATES]) + tl.load(s + sequence * rows + t) * left * left
        if t % 32 == 31:
            metrics -= tl.min(metrics, 0)
    lowest = tl.min(metrics, 0)
    tl.store(best + sequence, tl.min(tl.where(metrics == lowest, state, STATES), 0).to(tl.int64))


@triton.jit(do_not_specialize=["rows", "first"])
def trace(
    back, at, state, found, before, rows, first,
    STAYS: tl.constexpr, BITS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """at, state, before int64 [G]; found int64 [G, rows], zeros. Grid: G."""
    sequence = tl.program_id(0).to(tl.int64)
    now = tl.load(state + sequence)
    last = tl.load(at + sequence)
    for i in range(last + 1 - first):
        row = sequence * rows + last - i
        tl.store(found + row, now)
        stay = now >> BITS
        came = tl.load(back + row * STAYS + stay).to(tl.int64)
        now = stay | came << (WINDOW - BITS)
    tl.store(before + sequence, now)


def warps(states: int) -> int:
    """Warps of a forward program: 32 metrics a thread where there are threads for it."""
    return max(1, min(32, states // 1024))


class TritonViterbi(Viterbi):
    """`Viterbi` on CUDA."""

    SEGMENT = 256
    WARM_UP = 12

    def forward(self, x: Tensor, s: Tensor, start: int | None = None) -> Tensor:
        """See `Viterbi.forward`."""
        (count, rows), states = x.shape, len(self.labels)
        stays = states >> self.plane.bits
        self._back = torch.empty(count, rows, stays, dtype=torch.uint8, device=x.device)
        best = torch.empty(count, dtype=torch.int64, device=x.device)
        forward[(count,)](
            x.contiguous(), s.contiguous(), self.table, self._back, best,
            rows, -1 if start is None else start,
            STATES=states, BRANCHES=1 << self.plane.bits, num_warps=warps(states),
        )  # fmt: skip
        return best

    def trace(self, at: Tensor, state: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """See `Viterbi.trace`."""
        count, rows, stays = self._back.shape
        found = torch.zeros(count, rows, dtype=torch.int64, device=state.device)
        before = torch.empty(count, dtype=torch.int64, device=state.device)
        trace[(count,)](
            self._back, at, state.contiguous(), found, before, rows, first,
            STAYS=stays, BITS=self.plane.bits, WINDOW=self.plane.window, num_warps=1,
        )  # fmt: skip
        return found, before
