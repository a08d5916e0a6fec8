"""Study `refinement`: Theorem 1 as an experiment, on synthetic Gaussian sources.

W has independent N(0, 1) entries and H = X X^T / n a given spectrum, in the three cases of the
theorem: X square and invertible, wide with full row rank, rank-deficient. For each case:

    bound     D(R) by reverse water-filling
    ideal     draws from the law that meets the bound at every level at once (the theorem)
    single    a code of its own for each level
    nested    one code trained for all levels, its prefixes (Drop-by-Drop)
    dropped   one code trained for the last level, its prefixes (AQLM with codebooks dropped)

Every error is measured twice, as tr(E H E^T) and as ||W X - Y^||^2 / n with W^ recovered from Y^ by
the case's map (distortion equivalence). The nested code's error must fall from each supervised
level to the next; how far each stays from the bound is reported, not judged. (Rates count all d_in
weights of a row. In the rank-deficient case the bound spends them on the rank alone, so it falls by
more than 6 dB a bit, which codes of single weights or small groups cannot follow.)

The encoder comes from outside: encode(W, H, levels) -> W^ of prefixes 1..max(levels), each
[d_out, d_in] float. H may be singular; conditioning it is the encoder's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from dropbydrop.system.errors import DropError
from dropbydrop_research.theory import (
    Case,
    GaussianSource,
    components,
    eigenbasis,
    ideal_reconstructions,
    output_distortion,
    recover,
    recover_components,
    refine,
    spectrum,
    weighted_distortion,
)

from .data import Progress, finite


class Encode(Protocol):
    """Codes W [d_out, d_in] under H [d_in, d_in], supervising `levels`."""

    def __call__(self, weight: Tensor, h: Tensor, levels: Sequence[int], /) -> Sequence[Tensor]: ...


def run(
    encode: Encode,
    *,
    levels: Sequence[int] = (1, 2, 3, 4),
    d_in: int = 256,
    d_out: int = 256,
    alpha: float = 1.0,
    overhead: float = 0.0,
    seed: int = 0,
    cases: Sequence[Case] = tuple(Case),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run the experiment.

    Args:
        encode: see the module's note.
        levels: supervised levels of the nested code, increasing.
        alpha: eigenvalues of H fall as i^-alpha (0: white).
        overhead: bits a weight beyond the codes that the encoder's side information (row scales)
            costs; added to every level's rate.

    Returns:
        {"levels", "d_in", "d_out", "alpha", "overhead", "seed", "cases": [see `_case`]}.

    Raises:
        DropError: an error of the nested code that does not fall from a supervised level to the
            next. Levels that do not increase raise ValueError.
    """
    if not levels or any(b <= a for a, b in pairwise(levels)) or levels[0] < 1:
        raise ValueError(f"levels must increase from 1 on, not {list(levels)}")
    results = []
    for i, case in enumerate(cases):
        if progress:
            progress(i, len(cases), case.value)
        draw = len(Case) * seed + list(Case).index(case)  # another basis and W for every case
        x = synthetic_inputs(case, d_in, alpha, draw)
        results.append(_case(encode, case, x, levels, d_out, overhead, draw))
    if progress:
        progress(len(cases), len(cases), "")
    rising = [r["case"] for r in results if not r["decreasing"]]
    if rising:
        raise DropError(
            f"the nested code's error does not fall from each of the levels {list(levels)} to the "
            f"next in the case(s) {', '.join(rising)}; the encoder does not refine."
        )
    return {
        "levels": list(levels),
        "d_in": d_in,
        "d_out": d_out,
        "alpha": alpha,
        "overhead": overhead,
        "seed": seed,
        "cases": results,
    }


def synthetic_inputs(case: Case, d_in: int, alpha: float, seed: int) -> Tensor:
    """X float64 [d_in, n] whose X X^T / n has eigenvalues i^-alpha in a random basis.

    n = d_in, 4 d_in or d_in / 2 in the three cases; the last keeps the d_in / 2 largest.
    """
    n = {Case.SQUARE: d_in, Case.WIDE: 4 * d_in, Case.DEFICIENT: d_in // 2}[case]
    rank = min(d_in, n)
    generator = torch.Generator().manual_seed(seed)

    def basis(size: int) -> Tensor:  # [size, rank], orthonormal columns
        gauss = torch.randn(size, rank, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(gauss).Q

    eigenvalues = torch.arange(1, rank + 1, dtype=torch.float64) ** -alpha
    return (basis(d_in) * (eigenvalues * n).sqrt()) @ basis(n).T


def _case(
    encode: Encode,
    case: Case,
    x: Tensor,
    levels: Sequence[int],
    d_out: int,
    overhead: float,
    seed: int,
) -> dict[str, Any]:
    """One case. Errors are relative to the power d_out * tr(H).

    Returns {"case", "shape" of X, "rank", "levels" (prefixes 1..M), "bits", "bound", "curve",
    "codes": {kind: [error or None a prefix]}, "gaps": {kind: [{"db", "bits"} or None]},
    "equivalence": [[on W, on Y], …], "decreasing", "components"}.
    """
    d_in, n = x.shape
    h = x @ x.T / n
    generator = torch.Generator().manual_seed(-1 - seed)  # not the stream that drew X
    weight = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
    source = GaussianSource(spectrum(h), torch.ones(d_out, dtype=torch.float64))
    last = levels[-1]
    prefixes = list(range(1, last + 1))
    rates = [p + overhead for p in prefixes]

    coded = weight.to(torch.float32), h.to(torch.float32)
    nested = encode(*coded, levels)
    dropped = encode(*coded, [last])
    reconstructions: dict[str, list[Tensor | None]] = {
        "ideal": _ideal(weight, x, rates, generator),
        "single": [encode(*coded, [p])[p - 1] if p in levels else None for p in prefixes],
        "nested": list(nested),
        "dropped": list(dropped),
    }
    codes: dict[str, list[float | None]] = {}
    equivalence = []
    for kind, series in reconstructions.items():
        codes[kind] = []
        for w_hat in series:
            if w_hat is None:
                codes[kind].append(None)
                continue
            on_w = weighted_distortion(weight, w_hat, h) / source.power
            recovered = recover(w_hat.double() @ x, x)
            on_y = output_distortion(weight, recovered, x) / n / source.power
            codes[kind].append(on_w)
            equivalence.append([on_w, on_y])
    supervised = [codes["nested"][p - 1] for p in levels]
    grid = [last * i / 60 + overhead for i in range(61)]
    return {
        "case": case.value,
        "shape": [d_in, n],
        "rank": int((source.spectrum > 1e-12 * source.spectrum[0]).sum()),
        "levels": prefixes,
        "bits": rates,
        "bound": [source.distortion(r) / source.power for r in rates],
        "curve": {"bits": grid, "bound": [source.distortion(r) / source.power for r in grid]},
        "codes": codes,
        "gaps": {
            kind: [_gap(source, value, r) for value, r in zip(values, rates, strict=True)]
            for kind, values in codes.items()
        },
        "equivalence": equivalence,
        "decreasing": all(
            a > b for a, b in pairwise(supervised) if a is not None and b is not None
        ),
        "components": _components(weight, h, source, rates, reconstructions),
    }


def _gap(
    source: GaussianSource, value: float | None, bits: float
) -> dict[str, float | None] | None:
    if value is None or value <= 0:
        return None
    gap = source.gap(value * source.power, bits)
    return {"db": gap.db, "bits": finite(gap.bits)}


def _ideal(
    weight: Tensor, x: Tensor, rates: Sequence[float], generator: torch.Generator
) -> list[Tensor | None]:
    """W^ at every rate drawn from the nested optimum, in the components of Y = W X / sqrt(n)."""
    scaled = x / x.shape[1] ** 0.5
    z = components(weight, scaled)  # [d_out, r]
    variances = torch.linalg.svdvals(scaled)[: z.shape[1]].square()
    levels = refine(torch.cat([variances, variances.new_zeros(x.shape[0] - len(variances))]), rates)
    targets = [level.distortions[: len(variances)] for level in levels]
    drawn = ideal_reconstructions(z, variances, targets, generator)
    return [recover_components(z_hat, scaled) for z_hat in drawn]


def _components(
    weight: Tensor,
    h: Tensor,
    source: GaussianSource,
    rates: Sequence[float],
    reconstructions: dict[str, list[Tensor | None]],
) -> dict[str, Any]:
    """Distortion of each eigen-component against the water level: [d_in] values each.

    The optimum is shown from 1/4 bit on, where components join; codes start at prefix 1.
    """
    vectors = eigenbasis(h)[1]
    shown = [r for r in (0.25, 0.5) if r < rates[0]] + list(rates)
    levels = []
    for i, level in enumerate(refine(source.spectrum, shown), len(rates) - len(shown)):
        entry: dict[str, Any] = {
            "bits": level.bits,
            "level": level.level,
            "active": int(level.active.sum()),
            "increments": level.increments.tolist(),
        }
        for kind in ("ideal", "nested") if i >= 0 else ():
            w_hat = reconstructions[kind][i]
            if w_hat is not None:
                error = ((weight - w_hat.double()) @ vectors).square().mean(0)
                entry[kind] = (error * source.spectrum).tolist()
        levels.append(entry)
    return {"spectrum": source.spectrum.tolist(), "levels": levels}
