"""Trellis planes by their definitions: a set, a Viterbi pass, error feedback column by column.

Slow and plain; what the encoder and every backend of the search are compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dropbydrop.coding.codebook_set import TrellisSet, pack_stream
from dropbydrop.coding.planes import TrellisPlane, trellis_planes


def normal_set(levels: Sequence[int], window: int = 8, seed: int = 0) -> TrellisSet:
    """Random taps; values are 64 quantiles of N(0, sigma^2), a smaller sigma for every plane."""
    generator = torch.Generator().manual_seed(seed)
    planes = trellis_planes(levels, window)
    grid = torch.special.ndtri((torch.arange(64) + 0.5) / 64)  # within 2.42
    parts, sigma = [], 1.0
    for plane in planes:
        taps = torch.randint(1, 64, (window,), generator=generator, dtype=torch.uint8)
        values = (grid / 2.42 * 63).round().to(torch.int8)
        parts.append({"": values, ".scale": torch.tensor([sigma * 2.42 / 63]), ".taps": taps})
        sigma *= 0.53**plane.bits
    return TrellisSet(planes, tuple(parts))


def table(books: TrellisSet, m: int) -> Tensor:
    """Value of every window of plane m: float64 [2^L], the oldest bit on top."""
    taps, window = books.parts[m][".taps"], books.planes[m].window
    label = torch.zeros(1 << window, dtype=torch.int64)
    for age in range(window):
        label ^= ((torch.arange(1 << window) >> age) & 1) * int(taps[age])
    return books.entries[m][label, 0].double()


def viterbi(
    values: Tensor,
    bits: int,
    curve: float,
    pull: Tensor,
    weights: Tensor,
    starts: Sequence[int] | None = None,
    ring: bool = True,
) -> Tensor:
    """The ring that minimises sum_t weights_t (curve c_t^2 - 2 pull_t c_t): a pass for every start.

    Args:
        values: of every window, [2^L]. bits: k. pull, weights: of every step of the ring, [n].
        starts: the last L - k bits to try; None: all. ring: end with those that came first.

    Returns:
        windows int64 [n], whose last k bits are the stream's.
    """
    states, step = len(values), 1 << bits
    rest = states // step
    window = torch.arange(states)
    before = (window >> bits)[:, None] + torch.arange(step)[None] * rest
    tried = torch.arange(rest) if starts is None else torch.tensor(starts)
    cost = torch.full((len(tried), states), torch.inf, dtype=torch.float64)
    cost[torch.arange(len(tried)), tried] = 0.0
    came = []
    for t in range(len(pull)):
        least, pick = cost[:, before].min(2)
        came.append(before[window, pick])  # [starts, 2^L]
        cost = least + weights[t] * (curve * values.square() - 2 * pull[t] * values)
    if ring:
        cost[window % rest != tried[:, None]] = torch.inf
    start, last = divmod(int(cost.argmin()), states)
    path = [last]
    for back in reversed(came[1:]):
        path.append(int(back[start, path[-1]]))
    return torch.tensor(path[::-1])


def good_ring(values: Tensor, bits: int, curve: float, pull: Tensor, weights: Tensor) -> Tensor:
    """`viterbi` from one start: where a path that goes round twice is after the first round."""
    twice = viterbi(values, bits, curve, pull.repeat(2), weights.repeat(2), [0], ring=False)
    start = int(twice[len(pull) - 1]) % (len(values) >> bits)
    return viterbi(values, bits, curve, pull, weights, [start])


def naive_search(
    w: Tensor,
    row_weights: Tensor,
    books: TrellisSet,
    prefixes: Sequence[int],
    lambdas: Sequence[float],
    *,
    lower: Tensor | None = None,
    rounds: int = 2,
    **_: Any,
) -> list[Tensor]:
    """As `coding.trellis.search` from no codes: planes of a column alternate `rounds` times."""
    assert lower is not None
    w, lower = w.double(), lower.double()
    tables = [table(books, m) for m in range(len(books.planes))]
    d_out, d_in = w.shape
    errors = {count: torch.zeros(d_out, d_in, dtype=torch.float64) for count in prefixes}
    windows = [torch.zeros(_steps(p, d_out), d_in, dtype=torch.int64) for p in books.planes]
    for j in reversed(range(d_in)):
        u = {
            c: w[:, j] + e[:, j + 1 :] @ lower[j + 1 :, j] / lower[j, j] for c, e in errors.items()
        }
        q = torch.zeros(len(tables), d_out, dtype=torch.float64)
        for _ in range(rounds):
            for m, values in enumerate(tables):
                curve, pull = 0.0, torch.zeros(d_out, dtype=torch.float64)
                for count, lam in zip(prefixes, lambdas, strict=True):
                    if count > m:
                        curve += lam
                        pull += lam * (u[count] - q[:count].sum(0) + q[m])
                more = (0, len(windows[m]) - d_out)  # padding of the last byte, at no cost
                steps = (torch.nn.functional.pad(x.double(), more) for x in (pull, row_weights))
                windows[m][:, j] = good_ring(values, books.planes[m].bits, curve, *steps)
                q[m] = values[windows[m][:d_out, j]]
        for count in prefixes:
            errors[count][:, j] = w[:, j] - q[:count].sum(0)
    return [stream(windows[m], plane.bits) for m, plane in enumerate(books.planes)]


def _steps(plane: TrellisPlane, d_out: int) -> int:
    """Weights of a ring, padding included."""
    return 8 * plane.shape(d_out, 1)[0] // plane.bits


def stream(windows: Tensor, bits: int) -> Tensor:
    """Codes of a plane from its windows [n, d_in]."""
    ages = torch.arange(bits).flip(0)
    new = (windows[:, None] >> ages[None, :, None]) & 1  # [n, k, d_in]
    return pack_stream(new.reshape(-1, windows.shape[1]).to(torch.uint8))
