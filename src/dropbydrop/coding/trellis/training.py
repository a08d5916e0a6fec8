"""Universal codebooks of trellis planes: taps found by search, values by least squares.

After rotation and division by the row scale, weights are close to i.i.d. N(0, 1) samples (see
../codebooks.py), so codebooks trained on such samples, [rows, sequences], serve all matrices.

Values (`train`). Rounds of: codes by the production search with H = I; then the value of a label is
what minimises the nested loss for these codes, plane by plane: with the errors e_P = x - q_P and
c the plane's own value, the mean of the e_P + c of its uses, weighted by lambda_P. Labels h and
63 - h are tied, v[63 - h] = -v[h]. In the end planes are rounded one after the other to integers of
at most 63 in size with the scale that fits best, and the planes after it are trained once more.

Taps (`find_taps`), the linear map from a window to a label, plane after plane: a plane codes what
the ones before it leave, alone. Random maps, of which those with good values on few samples are
trained on more; then the best is changed at random and keeps what helps. A map must have full rank,
and the newest and the oldest bits must each tell the top bits of the label apart: the classical
rule that paths which part or meet do so far apart (Ungerboeck 1982). Of random maps that obey it,
at window 12, the best of forty is 2 % better than their mean. A longer window begins from the best
map of a shorter one, with random taps put into its middle.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..codebook_set import VALUE_MAX, TrellisSet
from ..planes import LABELS, TrellisPlane, counts_of, trellis_planes
from . import search

ROWS = 512  # of a training sequence
TRAINING = {"sequences": 256, "rounds": 6, "seed": 0}
LABEL_BITS = 6
_SCALES = torch.linspace(0.92, 1.0, 41, dtype=torch.float64)  # tried for rounding


def noise(sequences: int, seed: int) -> Tensor:
    """N(0, 1) samples of unit power, float32 [ROWS, sequences]."""
    x = torch.randn(ROWS, sequences, generator=torch.Generator().manual_seed(seed))
    return x / x.square().mean().sqrt()


def _set(
    planes: Sequence[TrellisPlane], values: Sequence[Tensor], taps: Sequence[Tensor]
) -> TrellisSet:
    """Codebooks with values that are not rounded yet."""
    one = torch.ones(1)
    parts = [{"": v, ".scale": one, ".taps": t} for v, t in zip(values, taps, strict=True)]
    return TrellisSet(tuple(planes), tuple(parts))


def first_values(bits: int, size: float) -> Tensor:
    """Quantiles of a Gaussian as spread as the reconstruction of one of deviation `size`."""
    at = (torch.arange(LABELS, dtype=torch.float64) + 0.5) / LABELS
    spread = size * (1 - 4.0**-bits) ** 0.5
    values: Tensor = spread * 2**0.5 * torch.erfinv(2 * at - 1)
    return values.float()


def encoded(
    x: Tensor, books: TrellisSet, prefixes: Sequence[int], lambdas: Sequence[float]
) -> tuple[list[Tensor], list[Tensor]]:
    """(label of every sample [rows, n], error after the plane [rows, n]) of each plane."""
    rows, count = x.shape
    codes = search(x, torch.ones(rows), books, prefixes, lambdas, lower=torch.eye(count))
    labels = [books.index(m, code, rows).long() for m, code in enumerate(codes)]
    errors, left = [], x
    for label, entries in zip(labels, books.entries, strict=True):
        left = left - entries[:, 0][label]
        errors.append(left)
    return labels, errors


def fitted(
    books: TrellisSet, labels: Sequence[Tensor], errors: Sequence[Tensor], weights: Sequence[float]
) -> list[Tensor]:
    """Values [K] of each plane by least squares. weights: of each prefix in the loss."""
    found = []
    for m, (label, entries) in enumerate(zip(labels, books.entries, strict=True)):
        old = entries[:, 0]
        total = sum(weights[m:])
        pull = sum(
            (
                lam / total * error
                for lam, error in zip(weights[m:], errors[m:], strict=True)
                if lam
            ),
            torch.zeros_like(errors[0]),
        )
        flat = label.flatten()
        uses = torch.zeros(LABELS, dtype=torch.float64).index_add_(
            0, flat, torch.ones(len(flat), dtype=torch.float64)
        )
        sums = uses * old + torch.zeros(LABELS, dtype=torch.float64).index_add_(
            0, flat, pull.flatten().double()
        )
        tied, both = sums - sums.flip(0), uses + uses.flip(0)
        found.append(torch.where(both > 0, tied / both.clamp_min(1), old.double()).float())
    return found


def rounded(values: Tensor) -> tuple[Tensor, Tensor]:
    """(integers int8 [K], scale float32 [1]) nearest to values [K]."""
    scales = _SCALES * values.abs().max().double() / VALUE_MAX
    whole = (values.double() / scales[:, None]).round().clamp(-VALUE_MAX, VALUE_MAX)
    best = (whole * scales[:, None] - values).square().sum(1).argmin()
    return whole[best].to(torch.int8), scales[best].float()[None]


def train(
    levels: Sequence[int],
    window: int,
    lambdas: Sequence[float],
    taps: Sequence[Tensor],
    sequences: int = TRAINING["sequences"],
    rounds: int = TRAINING["rounds"],
    seed: int = TRAINING["seed"],
) -> TrellisSet:
    """Codebooks for given taps; see the module's note.

    Args:
        levels, lambdas: supervised levels and their weights in J.
        window: bits. taps: uint8 [window] of each plane.
        sequences, rounds, seed: of the training samples.
    """
    planes = trellis_planes(levels, window)
    prefixes = counts_of(planes, levels)
    weights = [0.0] * len(planes)
    for prefix, lam in zip(prefixes, lambdas, strict=True):
        weights[prefix - 1] = lam
    x = noise(sequences, seed)
    values, bits = [], 0
    for plane in planes:
        values.append(first_values(plane.bits, 1.05 * 2.0**-bits))
        bits += plane.bits
    parts: list[dict[str, Tensor]] = []
    for stage in range(len(planes)):  # planes before `stage` are rounded
        for _ in range(1 if stage else rounds):
            books = _set(planes, values, taps)
            fit = fitted(books, *encoded(x, books, prefixes, lambdas), weights)
            values = [*values[:stage], *fit[stage:]]
        whole, scale = rounded(values[stage])
        parts.append({"": whole, ".scale": scale, ".taps": taps[stage].clone()})
        values[stage] = whole.float() * scale
    return TrellisSet(planes, tuple(parts))


def distortions(
    books: TrellisSet, prefixes: Sequence[int], lambdas: Sequence[float], sequences: int = 512
) -> list[float]:
    """Mean squared error on fresh N(0, 1) samples after every plane."""
    _, errors = encoded(noise(sequences, 12345), books, prefixes, lambdas)
    return [float(error.square().mean()) for error in errors]


class _Candidate:
    """A map of one plane with its values, for samples x [rows, n] that the plane codes alone."""

    def __init__(self, plane: TrellisPlane, taps: Tensor, values: Tensor) -> None:
        self.plane, self.taps, self.values = plane, taps, values
        self.error = float("inf")

    def train(self, x: Tensor, rounds: int) -> _Candidate:
        """Least squares for so many rounds; `error` is that of the last codes."""
        for _ in range(rounds):
            books = _set([self.plane], [self.values], [self.taps])
            labels, errors = encoded(x, books, [1], [1.0])
            self.error = float(errors[0].square().mean())
            self.values = fitted(books, labels, errors, [1.0])[0]
        return self

    def valid(self) -> bool:
        """Full rank; newest and oldest bits apart in the top bits of the label; no tap of zero."""
        k, words = self.plane.bits, [int(tap) for tap in self.taps]
        span = {0}
        for word in words:
            span |= {word ^ other for other in span}

        def apart(ends: Sequence[int]) -> bool:
            tops = [word >> (LABEL_BITS - k) for word in ends]
            return tops == [1] if k == 1 else 0 not in tops and tops[0] != tops[1]

        return len(span) == LABELS and all(words) and apart(words[:k]) and apart(words[-k:])


def find_taps(
    plane: TrellisPlane,
    x: Tensor,
    generator: torch.Generator,
    tries: int,
    shorter: Tensor | None = None,
) -> _Candidate:
    """Taps and values for one plane that codes samples x [ROWS, n] alone.

    Args:
        tries: random maps, and as many changes of the best.
        shorter: taps for a shorter window, to begin from.
    """

    def draw(high: int) -> int:
        return int(torch.randint(high, (1,), generator=generator))

    def words(count: int) -> Tensor:
        return torch.randint(LABELS, (count,), generator=generator).to(torch.uint8)

    size = float(x.square().mean().sqrt())
    few = x[:, : max(16, x.shape[1] // 8)]

    def candidate(taps: Tensor) -> _Candidate:
        return _Candidate(plane, taps, first_values(plane.bits, size))

    def random_map() -> Tensor:
        if shorter is None:
            return words(plane.window)
        at = plane.bits + draw(len(shorter) - 2 * plane.bits + 1)
        return torch.cat([shorter[:at], words(plane.window - len(shorter)), shorter[at:]])

    pool: list[_Candidate] = []
    while len(pool) < tries:
        one = candidate(random_map())
        if one.valid():
            pool.append(one.train(few, 4))
    finalists = sorted(pool, key=lambda c: c.error)[: max(4, tries // 16)]
    best = min((c.train(x, 3) for c in finalists), key=lambda c: c.error)
    goal = _Candidate(plane, best.taps, best.values).train(few, 1).error
    for _ in range(tries):
        taps, i, j = best.taps.clone(), draw(plane.window), draw(plane.window)
        if draw(4) == 0:
            taps[i], taps[j] = best.taps[j], best.taps[i]
        else:
            taps[i] = words(1)[0] if draw(2) else taps[i] ^ (1 << draw(LABEL_BITS))
        one = _Candidate(plane, taps, best.values)
        if not one.valid() or one.train(few, 3).error > goal * 1.003:
            continue
        if one.train(x, 3).error < best.error:
            best = one
            goal = _Candidate(plane, best.taps, best.values).train(few, 1).error
    return best


def find_all_taps(
    levels: Sequence[int],
    window: int,
    tries: int,
    seed: int = 0,
    shorter: Sequence[Tensor] | None = None,
    sequences: int = 128,
) -> list[Tensor]:
    """Taps of every plane for these levels; `shorter`: those of a set with a shorter window."""
    generator = torch.Generator().manual_seed(seed)
    x = noise(sequences, 1000 + seed)
    taps = []
    for m, plane in enumerate(trellis_planes(levels, window)):
        effort = tries if m == 0 else tries // 4  # what later planes gain is the same by any map
        found = find_taps(plane, x, generator, effort, shorter[m] if shorter else None)
        taps.append(found.taps)
        books = _set([plane], [found.values], [found.taps])
        x = encoded(x, books, [1], [1.0])[1][0]
    return taps
