"""The nested search as batched torch operations: all rows of a matrix at once, group by group.

Serves GPUs and machines without a compiler. The steps are those of native/search/search_core.h;
the beam keeps its candidates by exact scores. Memory: what is left of W at each level, [L, rows,
d_in], and the scores [rows, B, K/2] of one group, so rows are cut into chunks. triton.py does
what follows the product of a visit in one kernel.

Nothing in a pass over the groups waits for the device: constants are put there once, and the number
of changes is read at the end of a sweep.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..code import GROUP, expand_set, partial_sums
from ..objective import Metric


def _schedule(
    planes: int, levels: Sequence[int], lambdas: Sequence[float], lookahead: float
) -> tuple[list[int | None], list[float], list[list[float]]]:
    """For each stage: the level it completes, the weight a, and the levels' shares in the blend."""
    at: list[int | None] = []
    totals, pulls = [], []
    for m in range(planes):
        pull = [
            lam * lookahead ** (p - 1 - m) if p > m else 0.0
            for p, lam in zip(levels, lambdas, strict=True)
        ]
        at.append(levels.index(m + 1) if m + 1 in levels else None)
        totals.append(sum(pull))
        pulls.append([x / totals[-1] for x in pull])
    return at, totals, pulls


def _beam(
    target: Tensor,  # [L, n, g] whitened
    books: Tensor,  # [M, K/2, g] whitened
    lambdas: Sequence[float],
    schedule: tuple[list[int | None], list[float], list[list[float]]],
    beam: int,
) -> tuple[Tensor, Tensor]:
    """Codes [M, n] (int64, bit 7 = sign) and costs [n] of one group."""
    at, totals, pulls = schedule
    planes, half, _ = books.shape
    n = target.shape[1]
    device = target.device
    q = torch.zeros(n, 1, GROUP, device=device)
    cost = torch.zeros(n, 1, device=device)
    codes = torch.zeros(n, 1, 0, dtype=torch.int64, device=device)
    norms = books.square().sum(-1)  # [M, K/2]
    for m in range(planes):
        blend = torch.einsum("l,lng->ng", torch.tensor(pulls[m], device=device), target)
        residual = blend[:, None] - q  # [n, B, g]
        base = cost / totals[m] + residual.square().sum(-1)
        dots = 2 * residual @ books[m].T  # [n, B, K/2]
        scores = base[..., None] + norms[m] - dots.abs()
        kept = 1 if m == planes - 1 else min(beam, scores[0].numel())
        picked = scores.view(n, -1).topk(kept, dim=1, largest=False).indices  # [n, kept]
        parent, entry = picked // half, picked % half
        negative = dots.view(n, -1).gather(1, picked) < 0
        word = books[m][entry] * torch.where(negative, -1.0, 1.0)[..., None]
        q = q.gather(1, parent[..., None].expand(-1, -1, GROUP)) + word
        cost = cost.gather(1, parent)
        level = at[m]
        if level is not None:
            cost = cost + lambdas[level] * (target[level][:, None] - q).square().sum(-1)
        codes = torch.cat(
            [
                codes.gather(1, parent[..., None].expand(-1, -1, m)),
                (entry + half * negative)[..., None],
            ],
            dim=-1,
        )
    return codes[:, 0].T, cost[:, 0]


def _prefixes(codes: Tensor, entries: Tensor, levels: Sequence[int]) -> Tensor:
    """One group decoded at the supervised levels, [L, n, g]; codes [M, n], entries [M, K, g]."""
    return torch.stack(partial_sums(codes[..., None], entries, levels))


class Visits:
    """One chunk of rows of W: what a visit of a group does to its codes.

    Attributes:
        chosen: codes so far, uint8 [M, rows, G].
        error: W minus the prefix of those codes at each level, [L, rows, d_in]; of groups without
            codes W itself.
        moved: how often a visit changed a row since the last `take_moved`, int32 [rows].
    """

    ROWS = 4096  # rows searched together: scores of 4096 x 32 x 128 floats are 64 MiB

    def __init__(
        self,
        part: Tensor,
        codebooks: Tensor,
        levels: Sequence[int],
        lambdas: Sequence[float],
        lookahead: float,
        beam: int,
    ) -> None:
        """Args as for `search`; part [rows, d_in] are rows of w."""
        self.part, self.codebooks, self.beam = part, codebooks, beam
        self.levels, self.lambdas = list(levels), list(lambdas)
        rows, d_in = part.shape
        self.groups, self.device = d_in // GROUP, part.device
        self.schedule = _schedule(codebooks.shape[0], levels, lambdas, lookahead)
        self.entries = expand_set(codebooks)
        self.weights = torch.tensor(self.lambdas, device=self.device)
        self.error = part.expand(len(levels), -1, -1).clone()
        shape = (codebooks.shape[0], rows, self.groups)
        self.chosen = torch.zeros(shape, dtype=torch.uint8, device=self.device)
        self.moved = torch.zeros(rows, dtype=torch.int32, device=self.device)

    def adopt(self, codes: Tensor) -> None:
        """Begin with codes uint8 [M, rows, G]."""
        self.chosen.copy_(codes)
        for j in range(self.groups):
            self._subtract(j)

    def pass_over(self, metric: Metric, order: Sequence[int], start: bool) -> None:
        """Visit groups in this order, to choose (`start`) or to improve their codes."""
        groups = self.part.view(-1, self.groups, GROUP).transpose(0, 1)  # [G, rows, g]
        own = (groups @ metric.factor).contiguous()  # [G, rows, g], whitened
        books = torch.einsum("mkg,jgh->jmkh", self.codebooks, metric.factor).contiguous()
        for j in order:
            self._visit(j, own[j], self.error @ metric.coupling[j], books[j], start)

    def take_moved(self) -> int:
        """The number of changes since the last call."""
        count = int(self.moved.sum())
        self.moved.zero_()
        return count

    def _visit(self, j: int, own: Tensor, pulled: Tensor, books: Tensor, start: bool) -> None:
        """New codes of group j, all rows.

        Args:
            own: the group's inputs, whitened, [rows, g].
            pulled: what the errors of all others add, [L, rows, g].
            books: whitened, [M, K/2, g].
        """
        target = own + pulled
        found, cost = _beam(target, books, self.lambdas, self.schedule, self.beam)
        new = found.to(torch.uint8)
        if not start:
            old = self.chosen[:, :, j]
            whitened = _prefixes(old, expand_set(books), self.levels)
            before = (target - whitened).square().sum(-1)  # [L, rows]
            better = cost < (self.weights[:, None] * before).sum(0) * (1 - 1e-6)
            self.moved += better
            new = torch.where(better, new, old)
        self.chosen[:, :, j] = new
        self._subtract(j)

    def _subtract(self, j: int) -> None:
        inputs = slice(j * GROUP, (j + 1) * GROUP)
        found = _prefixes(self.chosen[:, :, j], self.entries, self.levels)
        self.error[:, :, inputs] = self.part[:, inputs] - found


def search(
    w: Tensor,
    codebooks: Tensor,
    levels: Sequence[int],
    lambdas: Sequence[float],
    beam: int,
    lookahead: float,
    feedback: Metric | None,
    descent: Metric | None,
    sweeps: int,
    codes: Tensor | None,
    visits: type[Visits] = Visits,
) -> tuple[Tensor, list[int]]:
    """Shapes and results as of `dropbydrop.coding.search.search`.

    w [d_out, d_in]; codebooks [M, K/2, g]; `visits` is the class that does the visits.
    """
    d_out, d_in = w.shape
    groups = d_in // GROUP
    out = torch.empty(codebooks.shape[0], d_out, groups, dtype=torch.uint8, device=w.device)
    changed = [0] * sweeps
    for first in range(0, d_out, visits.ROWS):
        rows = slice(first, min(first + visits.ROWS, d_out))
        chunk = visits(w[rows].contiguous(), codebooks, levels, lambdas, lookahead, beam)
        if codes is None:
            assert feedback is not None
            chunk.pass_over(feedback, range(groups - 1, -1, -1), start=True)
        else:
            chunk.adopt(codes[:, rows])
        for sweep in range(sweeps):
            assert descent is not None
            chunk.pass_over(descent, range(groups), start=False)
            changed[sweep] += chunk.take_moved()
        out[:, rows] = chunk.chosen
    return out, changed
