"""The nested search as batched torch operations: all rows of a matrix at once, group by group.

Serves GPUs and machines without a compiler. The steps are those of native/search/search_core.h;
the beam keeps its candidates by exact scores. Memory: scores [rows, B, K/2] of one group, so rows
are cut into chunks. The beam itself may be another one, such as triton_beam.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..code import GROUP
from ..objective import Metric

_ROWS = 4096  # rows searched together: scores of 4096 x 32 x 128 floats are 64 MiB


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


def _prefixes(codes: Tensor, tables: Tensor, levels: Sequence[int]) -> Tensor:
    """Partial sums [L, n, g] of codes [M, n] at the supervised levels; tables [M, K, g]."""
    total = torch.zeros(codes.shape[1], GROUP, device=tables.device)
    out = []
    for m in range(codes.shape[0]):
        total = total + tables[m][codes[m].long()]
        if m + 1 in levels:
            out.append(total)
    return torch.stack(out)


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
    beam_search: Callable[..., tuple[Tensor, Tensor]] = _beam,
) -> tuple[Tensor, list[int]]:
    """See `dropbydrop.search.search`; `beam_search` has the arguments of `_beam`."""
    planes = codebooks.shape[0]
    d_out, d_in = w.shape
    schedule = _schedule(planes, levels, lambdas, lookahead)
    tables = torch.cat([codebooks, -codebooks], dim=1)
    weights = torch.tensor(lambdas, device=w.device)
    out = torch.zeros(planes, d_out, d_in // GROUP, dtype=torch.uint8, device=w.device)
    changed = [0] * sweeps
    for first in range(0, d_out, _ROWS):
        rows = slice(first, min(first + _ROWS, d_out))
        part = w[rows]
        error = part.expand(len(levels), -1, -1).clone()  # [L, rows, d_in]

        def visit(
            j: int, metric: Metric, part: Tensor = part, error: Tensor = error
        ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            """Codes, cost, whitened targets and factor for group j with the errors as they are."""
            factor = metric.factor[j]
            own = part[:, j * GROUP : (j + 1) * GROUP] @ factor
            target = own + error @ metric.coupling[j]
            found, cost = beam_search(target, codebooks @ factor, lambdas, schedule, beam)
            return found, cost, target, factor

        chosen = torch.zeros(planes, part.shape[0], d_in // GROUP, dtype=torch.uint8).to(w.device)
        if codes is None:
            assert feedback is not None
            for j in reversed(range(d_in // GROUP)):
                found, *_ = visit(j, feedback)
                chosen[:, :, j] = found.to(torch.uint8)
                inputs = slice(j * GROUP, (j + 1) * GROUP)
                error[:, :, inputs] = part[:, inputs] - _prefixes(found, tables, levels)
        else:
            chosen.copy_(codes[:, rows])
            for j in range(d_in // GROUP):
                inputs = slice(j * GROUP, (j + 1) * GROUP)
                error[:, :, inputs] -= _prefixes(chosen[:, :, j], tables, levels)
        for sweep in range(sweeps):
            assert descent is not None
            for j in range(d_in // GROUP):
                found, cost, target, factor = visit(j, descent)
                old = _prefixes(chosen[:, :, j], tables, levels)
                before = (target - old @ factor).square().sum(-1)  # [L, rows]
                better = cost < (weights[:, None] * before).sum(0) * (1 - 1e-6)
                changed[sweep] += int(better.sum())
                merged = torch.where(better, found.to(torch.uint8), chosen[:, :, j])
                chosen[:, :, j] = merged
                inputs = slice(j * GROUP, (j + 1) * GROUP)
                error[:, :, inputs] = part[:, inputs] - _prefixes(merged, tables, levels)
        out[:, rows] = chosen
    return out, changed
