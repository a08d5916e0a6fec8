"""The search in torch operations: no compiler needed, and a reference for the other backends.

The steps of native/trellis/trellis_core.h, with path metrics in float32. All segments of a plane
are one batch. A state is the last L bits of the stream, the newest one lowest; its predecessors
share its upper L - k bits, so that a step of all 2^L states is a minimum over the first axis of
[2^k, 2^(L-k)], repeated along a new last axis. A Viterbi pass is a class of its own (`Viterbi`),
which the Triton backend replaces.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..codebook_set import labels, pack_stream
from ..planes import TrellisPlane
from .arguments import (
    SEGMENT,
    WARM_UP,
    Problem,
    beyond_of,
    blocks_of,
    ring_of,
    ring_rows,
    segments_of,
    state_labels,
)

INFINITY = float("inf")


class Viterbi:
    """Forward and back over a batch of sequences of one plane.

    Attributes:
        plane, values: the spec, and float32 [K] by label.
        labels, table: of every state, its label uint8 [2^L] and its value float32 [2^L].
        SEGMENT, WARM_UP: as for `segments_of`.
    """

    SEGMENT = SEGMENT
    WARM_UP = WARM_UP

    def __init__(self, plane: TrellisPlane, values: Tensor, taps: Tensor) -> None:
        self.plane = plane
        self.values = values
        self.labels = state_labels(plane, taps)
        self.table = values[self.labels.long()]
        self._back = values  # of the last `forward`

    def forward(self, x: Tensor, s: Tensor, start: int | None = None) -> Tensor:
        """Finds the paths of least sum_t s_t (x_t - value)^2 to every state, for `trace`.

        Args:
            x, s: targets and weights, float32 [G, T].
            start: the state before the first row, free by default.

        Returns:
            The best last state of each sequence: int64 [G].
        """
        count, rows = x.shape
        states = len(self.labels)
        shape = (count, 1 << self.plane.bits, states >> self.plane.bits)
        metrics = torch.zeros(count, states, device=x.device)
        if start is not None:
            metrics.fill_(INFINITY)[:, start] = 0
        index = self.labels.long()
        back = []
        for t in range(rows):
            costs = s[:, t, None] * (x[:, t, None] - self.values).square()
            best, came = metrics.view(shape).min(1)
            back.append(came.to(torch.uint8))
            metrics = best.repeat_interleave(shape[1], 1) + costs[:, index]
            metrics -= metrics.amin(1, keepdim=True)
        self._back = torch.stack(back)  # [T, G, 2^(L-k)]
        return metrics.argmin(1)

    def trace(self, at: Tensor, state: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Follows the path of each sequence back from `state` [G] at row `at` [G] to row `first`.

        Returns:
            (states int64 [G, T], zero elsewhere; the state before row `first` [G]).
        """
        bits, window = self.plane.bits, self.plane.window
        rows, count, _ = self._back.shape
        found = torch.zeros(rows, count, dtype=torch.int64, device=state.device)
        each = torch.arange(count, device=state.device)
        now = state
        for t in range(rows - 1, first - 1, -1):
            now = torch.where(at == t, state, now)
            found[t] = now
            stay = now >> bits
            came = self._back[t, each, stay].long()
            now = torch.where(at >= t, stay | came << (window - bits), now)
        return found.T, now


class Plane:
    """The ring of one plane: its segments as a batch. See native/trellis/segments.h."""

    def __init__(self, problem: Problem, m: int, passes: type[Viterbi]) -> None:
        plane, part = problem.books.planes[m], problem.books.parts[m]
        d_out, device = problem.w.shape[0], problem.w.device
        self.plane = plane
        self.taps = part[".taps"]
        self.viterbi = passes(plane, problem.books.entries[m].flatten(), part[".taps"])
        self.rows = ring_rows(plane, d_out)
        segments = segments_of(plane, d_out, passes.SEGMENT, passes.WARM_UP)
        self.warm = passes.WARM_UP * ring_of(plane) // plane.bits
        length = self.warm + max(last - first for _, first, last in segments)
        starts = torch.tensor([warm for warm, _, _ in segments], device=device)
        rows = starts[:, None] + torch.arange(length, device=device)  # [G, T]
        self.ends = torch.tensor([last - warm - 1 for warm, _, last in segments], device=device)
        at = torch.arange(length, device=device)
        self.index = rows % self.rows
        weights = torch.nn.functional.pad(problem.row_weights, (0, max(0, self.rows - d_out)))
        self.weights = torch.where(at <= self.ends[:, None], weights[self.index], 0.0)
        own = ((at <= self.ends[:, None]) & (at >= self.warm)).flatten().nonzero()[:, 0]
        self.place = own[self.index.flatten()[own].argsort()]  # of each row of the ring in [G * T]
        self.last = torch.full_like(self.ends, length - 1)
        self.shifts = torch.arange(plane.bits - 1, -1, -1, device=device)

    def search(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The ring for targets x [rows]: (values [rows], newest bits uint8 [k rows])."""
        batch = x[self.index]
        best = self.viterbi.forward(batch, self.weights)
        _, before = self.viterbi.trace(self.last, best, self.warm)
        start = before[:1]
        for _ in range(len(before)):  # once, unless a segment's paths never meet
            ends = torch.cat([before[1:], start])
            states, new = self.viterbi.trace(self.ends, ends, self.warm)
            changed = (new != before).tolist()  # all that the host waits for
            if not any(changed[1:]):
                break
            before = torch.cat([start, new[1:]])
        if changed[0]:  # a short ring: the first segment again, from what closes the ring
            bounds = slice(self.warm, None)
            self.viterbi.forward(batch[:, bounds], self.weights[:, bounds], int(start))
            states[0, bounds] = self.viterbi.trace(self.ends - self.warm, ends, 0)[0][0]
        ring = states.flatten()[self.place]
        new_bits = (ring[:, None] >> self.shifts) & 1
        return self.viterbi.table[ring], new_bits.flatten().to(torch.uint8)


class Blocks:
    """The ring of one plane, a block of rows after the other; see native/trellis/segments.h."""

    def __init__(self, problem: Problem, m: int, plane: Plane) -> None:
        planes, d_out = problem.books.planes, problem.w.shape[0]
        self.viterbi, self.rows, self.shifts = plane.viterbi, plane.rows, plane.shifts
        self.before = beyond_of(planes, m)
        self.blocks = blocks_of(planes, m, d_out, problem.row_block)
        self._weights = torch.nn.functional.pad(problem.row_weights, (0, self.rows - d_out))
        self._states = torch.zeros(self.rows, dtype=torch.int64, device=problem.w.device)
        self._end = 0

    def follow(self, b: int, x: Tensor, values: Tensor) -> None:
        """Block b for targets x [rows]; sets what is decided, or seen, in `values` [rows]."""
        block = self.blocks[b]
        start = block.first if b else -self.before
        index = torch.arange(start, block.seen, device=x.device) % self.rows
        known = int(self._states[start - 1]) if b else None
        best = self.viterbi.forward(x[None, index], self._weights[None, index], known)
        if b + 1 == len(self.blocks):  # the ring closes
            best = torch.full_like(best, self._end)
        last = torch.full_like(best, len(index) - 1)
        states, _ = self.viterbi.trace(last, best, 0)
        self._states[index] = states[0]
        values[index] = self.viterbi.table[states[0]]
        if b == 0:
            self._end = int(states[0, self.before - 1])

    def stream(self) -> Tensor:
        """Newest bits of all rows: uint8 [k rows]."""
        return ((self._states[:, None] >> self.shifts) & 1).flatten().to(torch.uint8)


class Search:
    """One problem, input after input: errors of every level, streams of every plane."""

    def __init__(self, problem: Problem, passes: type[Viterbi]) -> None:
        self.problem = problem
        self.planes = [Plane(problem, m, passes) for m in range(len(problem.books.planes))]
        d_out, d_in = problem.w.shape
        device = problem.w.device
        self.blocks: list[Blocks] = []
        self.feedback = problem.row_feedback
        if self.feedback is not None:
            self.blocks = [Blocks(problem, m, plane) for m, plane in enumerate(self.planes)]
        self.rows = max(plane.rows for plane in self.planes)
        self.w = torch.zeros(d_in, self.rows, device=device)
        self.w[:, :d_out] = problem.w.T
        self.weights = torch.nn.functional.pad(problem.row_weights, (0, self.rows - d_out))
        self.error = torch.zeros(len(problem.prefixes), d_in, self.rows, device=device)
        self.streams = [
            torch.zeros(plane.rows * plane.plane.bits, d_in, dtype=torch.uint8, device=device)
            for plane in self.planes
        ]
        self.lambdas = torch.tensor(problem.lambdas, device=device)
        self.pulls = torch.tensor(problem.pulls, device=device)  # [M, levels]

    def sums(self, values: Sequence[Tensor]) -> Tensor:
        """Partial sums of planes at the supervised prefixes: [levels, rows]."""
        return torch.stack(list(values)).cumsum(0)[[prefix - 1 for prefix in self.problem.prefixes]]

    def set_error(self, j: int, values: Sequence[Tensor]) -> None:
        """The errors of input j; rows that do not exist have none."""
        self.error[:, j] = self.w[j] - self.sums(values)
        self.error[:, j, self.problem.w.shape[0] :] = 0

    def visit(self, target: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Codes of an input for targets [levels, rows], plane after plane.

        Returns:
            (bits of each plane's stream, values [rows] of each plane).
        """
        if self.feedback is not None:
            return self.visit_blocks(target, self.feedback)
        bits: list[Tensor] = []
        values: list[Tensor] = []
        for plane, pulled in zip(self.planes, self.pulls @ target, strict=True):
            x = pulled - sum(values)
            value, stream = plane.search(x[: plane.rows])
            values.append(torch.nn.functional.pad(value, (0, self.rows - plane.rows)))
            bits.append(stream)
        return bits, values

    def visit_blocks(self, target: Tensor, feedback: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """`visit`, a block of rows after the other, with the errors of those before it."""
        d_out = self.problem.w.shape[0]
        values = [torch.zeros(self.rows, device=target.device) for _ in self.planes]
        left = torch.zeros(len(target), d_out, device=target.device)
        for b, block in enumerate(self.blocks[0].blocks):
            fed = target.clone()
            rows, ahead = slice(0, block.first), slice(block.first, min(block.seen, d_out))
            fed[:, ahead] += left[:, rows] @ feedback[rows, ahead]
            for m, (part, pulled) in enumerate(zip(self.blocks, self.pulls @ fed, strict=True)):
                part.follow(b, pulled - sum(values[:m]), values[m])
            own = slice(block.first, min(block.last, d_out))
            left[:, own] = (target - self.sums(values))[:, own]
        return [part.stream() for part in self.blocks], values

    def start(self, lower: Tensor) -> None:
        """Error feedback, from the last input to the first."""
        for j in range(len(self.w) - 1, -1, -1):
            pulled = (lower[j + 1 :, j] / lower[j, j]) @ self.error[:, j + 1 :]
            self.put(j, *self.visit(self.w[j] + pulled))

    def put(self, j: int, bits: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Takes codes and values for input j."""
        for stream, new in zip(self.streams, bits, strict=True):
            stream[:, j] = new
        self.set_error(j, values)

    def values_of(self, j: int) -> list[Tensor]:
        """Values of the codes of input j, [rows] each."""
        found = []
        for plane, stream in zip(self.planes, self.streams, strict=True):
            code = pack_stream(stream[:, j : j + 1])
            label = labels(code, plane.taps, plane.plane.bits, plane.rows)[:, 0].long()
            found.append(
                torch.nn.functional.pad(plane.viterbi.values[label], (0, self.rows - plane.rows))
            )
        return found

    def cost(self, target: Tensor, values: Sequence[Tensor]) -> float:
        """Weighted squared error of the levels."""
        square = (target - self.sums(values)).double().square() @ self.weights.double()
        return float(square @ self.lambdas.double())

    def sweep(self, h: Tensor) -> None:
        """Descent, from the last input to the first."""
        for j in range(len(self.w) - 1, -1, -1):
            row = h[:, j] / h[j, j]
            target = self.w[j] + row @ self.error - self.error[:, j]
            before = self.cost(target, self.values_of(j))
            bits, values = self.visit(target)
            if self.cost(target, values) < before * (1 - 1e-9):
                self.put(j, bits, values)


def search(problem: Problem, passes: type[Viterbi] = Viterbi) -> list[Tensor]:
    """See `dropbydrop.coding.trellis.search`, on the device of the problem's tensors."""
    task = Search(problem, passes)
    if problem.lower is not None:
        task.start(problem.lower.float())
    elif problem.codes is not None:
        for m, code in enumerate(problem.codes):
            shifts = torch.arange(8, dtype=torch.uint8, device=code.device)
            task.streams[m] = ((code[:, None] >> shifts[:, None]) & 1).reshape(-1, code.shape[1])
        for j in range(len(task.w)):
            task.set_error(j, task.values_of(j))
    for _ in range(problem.sweeps):
        if problem.h is not None:
            task.sweep(problem.h.float())
    return [pack_stream(stream) for stream in task.streams]
