"""How Gaussian is a weight matrix, in units that matter to a quantizer.

At a million weights every test of normality rejects, so p-values say nothing; effect sizes do:

    kolmogorov   sup |F - Phi|, familiar and bounded, blind to tails
    w2           squared Wasserstein-2 distance to N(0, 1) over the variance: the distortion unit.
                 A code made for the Gaussian, carried over by the optimal map, has an rms error of
                 at most sqrt(D) + sqrt(w2) (triangle inequality), so w2 far below D is harmless.
    negentropy   h(N) - h(w) = KL(w || N) in bits a weight: the rate unit. By Shannon's lower bound
                 R(D) >= R_Gauss(D) - negentropy: no quantizer beats the Gaussian bound by more, as
                 far as weights are independent. Estimated on bins of 0.1 sigma with open tails,
                 hence from below; at that resolution, whatever the storage grid of the weights.

All three are of the standardised values. For the premise of the bound, N(0, sigma_r^2) rows, pass
W with its rows divided by their rms (`by_row=True`): a mixture of row scales has heavy tails that
a quantizer with row scales never sees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

BINS = torch.linspace(-5, 5, 101, dtype=torch.float64)
"""Bin edges of the negentropy and of the histogram, in standard deviations."""


@dataclass(frozen=True)
class GaussianFit:
    """Moments, effect sizes of non-normality and histogram of one matrix."""

    count: int  # number of values
    mean: float
    std: float  # of the values as given, or of the row-scaled ones
    skewness: float
    kurtosis: float  # fourth standardised moment, 3 for a Gaussian
    max_over_rms: float
    expected_max_over_rms: float  # median of the same for `count` Gaussian samples
    kolmogorov: float  # in [0, 1]
    w2: float  # squared, over the variance
    negentropy: float  # bits a weight, corrected for the bias of binning, >= 0
    histogram: tuple[float, ...]  # [100] fractions in `BINS`; tails[0], tails[1] lie outside
    tails: tuple[float, float]


def fit_gaussian(weight: Tensor, by_row: bool = False) -> GaussianFit:
    """Fit a Gaussian to the entries of W and measure how far it is from one.

    Args:
        weight: [d_out, d_in] (any shape when `by_row` is false).
        by_row: divide each row by its rms first; rows of zeros are left out.

    Working memory is about eight float64 copies of W.

    Raises:
        ValueError: fewer than two distinct values, or values that are not finite.
    """
    values = weight.detach().to("cpu", torch.float64)
    if by_row:
        row_rms = values.square().mean(1).sqrt()  # [d_out]
        values = values[row_rms > 0] / row_rms[row_rms > 0][:, None]
    x = values.reshape(-1)
    if x.numel() < 2 or not bool(torch.isfinite(x).all()):
        raise ValueError("a Gaussian fit needs at least two finite values")
    mean = float(x.mean())
    rms = float(x.square().mean().sqrt())
    peak = float(x.abs().max())
    centred = x - mean
    std = float(centred.square().mean().sqrt())
    if not std > 1e-12 * peak:
        raise ValueError(f"all {x.numel()} values equal {mean:.6g}: there is nothing to fit")
    z = centred / std
    squared = z.square()
    ordered = torch.from_numpy(np.sort(z.numpy()))  # vectorised; torch's sort takes 15 times longer
    below = torch.searchsorted(ordered, BINS).double() / len(z)  # fraction below each edge
    histogram, tails = below.diff(), (float(below[0]), float(1 - below[-1]))
    return GaussianFit(
        count=len(z),
        mean=mean,
        std=std,
        skewness=float((squared * z).mean()),
        kurtosis=float(squared.square().mean()),
        max_over_rms=peak / rms,
        expected_max_over_rms=expected_max(len(z)),
        kolmogorov=_kolmogorov(ordered),
        w2=_wasserstein(ordered),
        negentropy=_negentropy(histogram, tails, len(z)),
        histogram=tuple(histogram.tolist()),
        tails=tails,
    )


def expected_max(count: int) -> float:
    """Median of the largest of `count` values |N(0, 1)|: (2 Phi(q) - 1)^count = 1/2."""
    tail = -math.expm1(-math.log(2) / count) / 2
    return -float(torch.special.ndtri(torch.tensor(tail, dtype=torch.float64)))


def _kolmogorov(ordered: Tensor) -> float:
    """sup |F - Phi| of ascending values [n]; the supremum is at a step, from one of its sides."""
    n = len(ordered)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    cdf = torch.special.ndtr(ordered)
    return float(torch.maximum((cdf - steps[:-1]).max(), (steps[1:] - cdf).max()))


@lru_cache(maxsize=1)  # matrices of one shape come in a row
def _quantile_means(n: int) -> Tensor:
    """Integral of Phi^-1 over [i/n, (i+1)/n], exact: phi(q_i) - phi(q_{i+1}). float64 [n]."""
    edges = torch.special.ndtri(torch.arange(1, n, dtype=torch.float64) / n)
    density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
    zero = torch.zeros(1, dtype=torch.float64)
    return -torch.cat([zero, density, zero]).diff()


def _wasserstein(ordered: Tensor) -> float:
    """W2^2 between the empirical law of ascending values [n] and N(0, 1), in closed form.

    W2^2 = E x^2 + 1 - 2 sum_i x_(i) * integral of Phi^-1 over the i-th of n equal slices.
    """
    cross = float((ordered * _quantile_means(len(ordered))).sum())
    return max(float(ordered.square().mean()) + 1 - 2 * cross, 0.0)


def _negentropy(histogram: Tensor, tails: tuple[float, float], n: int) -> float:
    """KL of the binned law to the binned N(0, 1), in bits, less its sampling bias (cells - 1)/2n.

    The bias is that of a plug-in estimate (Miller 1955), here for cells that are not empty.
    """
    cells = torch.cat([histogram, torch.tensor(tails, dtype=torch.float64)])
    mass = torch.special.ndtr(BINS)
    # upper half by symmetry: 1 - Phi loses digits there
    inner = torch.where(BINS[:-1] < 0, mass.diff(), mass.diff().flip(0))
    outer = mass[0].repeat(2)
    reference = torch.cat([inner, outer])
    used = cells > 0
    nats = float((cells[used] * torch.log(cells[used] / reference[used])).sum())
    return max((nats - (int(used.sum()) - 1) / (2 * n)) / math.log(2), 0.0)


@dataclass(frozen=True)
class MassiveActivations:
    """Tokens whose energy ||x||^2 at one input group dwarfs the median token's."""

    tokens: int
    max_over_median: float
    count: int  # tokens above `threshold` times the median
    share: float  # of the total energy, carried by those tokens
    first_token_share: float  # of those tokens, fraction at position 0 of their window


def massive_activations(energies: Tensor, threshold: float = 100.0) -> MassiveActivations:
    """Summarise token energies ||x||^2 [n_windows, T] (or [T], one window) of an input group.

    A few such tokens make H nearly rank one; the weighted error then measures little else.
    Source of the phenomenon: Sun et al., Massive Activations in Large Language Models (2024).

    Raises:
        ValueError: no tokens, or energies that are negative or not finite.
    """
    table = energies.detach().to("cpu", torch.float64)
    table = table[None] if table.ndim == 1 else table
    if table.ndim != 2 or not table.numel():
        raise ValueError(f"token energies must be [n_windows, T], not {tuple(energies.shape)}")
    if not bool(torch.isfinite(table).all()) or bool((table < 0).any()):
        raise ValueError("token energies must be finite and non-negative")
    median = float(table.median())
    massive = table > threshold * median
    count, total = int(massive.sum()), float(table.sum())
    peak = float(table.max())
    return MassiveActivations(
        tokens=table.numel(),
        max_over_median=peak / median if median > 0 else (math.inf if peak > 0 else 1.0),
        count=count,
        share=float(table[massive].sum()) / total if total > 0 else 0.0,
        first_token_share=int(massive[:, 0].sum()) / count if count else 0.0,
    )
