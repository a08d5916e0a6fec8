"""Theorem 1: a Gaussian source is successively refinable under the weighted MSE.

Source: Babaoglu, Chen, Khisti, Multi-Bitwidth Quantization for LLMs Using Additive Codebooks,
Theorem 1; successive refinement of one Gaussian is due to Equitz and Cover (1991).

1. Distortion equivalence. With Y = W X, tr(E X X^T E^T) = ||Y - Y^||_F^2 when Y^ = W^ X: the
   weighted MSE on W is a plain MSE on Y.
2. Independent components. X = U S V^T with rank r. Z = W U_r S_r [d_out, r] is Y in an orthonormal
   basis of the row space of X, so distances in Z equal distances in Y. If the rows of W are
   N(0, sigma^2 I), the components of Z are independent with variances sigma^2 s_i^2 = sigma^2
   lambda_i (eigenvalues of H = X X^T), and D(R) is reverse water-filling.
3. Recovery. W^ from Y^ by the inverse (X square and invertible), the right inverse
   X^T (X X^T)^-1 (X wide, full row rank), the pseudo-inverse otherwise. In the last case only the
   part of W in the column space of X is determined, and only it has a distortion.
4. Nesting. As the rate grows the water level falls: active components stay active, each
   distortion only decreases, and each component is a Gaussian, refinable without loss. So the rate
   of the stages sums to the rate of the last level alone.

Everything is float64. `ideal_reconstructions` draws from the joint law that meets the bound at
every level at once; it is the theorem's construction, not a code.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .water_filling import GaussianSource


class Case(enum.Enum):
    """The three cases of Theorem 1, by the shape and rank of X [d_in, n]."""

    SQUARE = "square"  # n = d_in, full rank: W^ = Y^ X^-1
    WIDE = "wide"  # n > d_in, full row rank: W^ = Y^ X^T (X X^T)^-1
    DEFICIENT = "deficient"  # rank < d_in (tall X, or dependent rows): W^ = Y^ X^+


def _svd(x: Tensor, rtol: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of X [d_in, n] cut at its rank: U [d_in, r], S [r], V^T [r, n], float64."""
    if x.ndim != 2 or not x.numel():
        raise ValueError(f"X must be a non-empty matrix [d_in, n], not {tuple(x.shape)}")
    u, s, vt = torch.linalg.svd(x.detach().to("cpu", torch.float64), full_matrices=False)
    tolerance = max(x.shape) * torch.finfo(x.dtype).eps if rtol is None else rtol
    rank = int((s > tolerance * s[0]).sum())
    return u[:, :rank], s[:rank], vt[:rank]


def classify(x: Tensor, rtol: float | None = None) -> Case:
    """Which case of Theorem 1 applies to X [d_in, n].

    `rtol` cuts singular values relative to the largest one (default: max(d_in, n) * eps of the
    dtype of X, as in numpy.linalg.matrix_rank).
    """
    rank = len(_svd(x, rtol)[1])
    if rank < x.shape[0]:
        return Case.DEFICIENT
    return Case.SQUARE if x.shape[0] == x.shape[1] else Case.WIDE


def weighted_distortion(weight: Tensor, reconstruction: Tensor, h: Tensor) -> float:
    """tr(E H E^T), E = W - W^ [d_out, d_in], H [d_in, d_in]."""
    error = weight.to("cpu", torch.float64) - reconstruction.to("cpu", torch.float64)
    return float(((error @ h.to("cpu", torch.float64)) * error).sum())


def output_distortion(weight: Tensor, reconstruction: Tensor, x: Tensor) -> float:
    """||W X - W^ X||_F^2, X [d_in, n]. Equals `weighted_distortion` with H = X X^T."""
    error = weight.to("cpu", torch.float64) - reconstruction.to("cpu", torch.float64)
    return float((error @ x.to("cpu", torch.float64)).square().sum())


def recover(y: Tensor, x: Tensor, rtol: float | None = None) -> Tensor:
    """W^ with W^ X nearest to Y^, by the map of the case of X.

    Args:
        y: Y^ [d_out, n]. What lies outside the row space of X is dropped: no W^ produces it, and
            dropping it never increases the distance to Y = W X.
        x: X [d_in, n].

    Returns:
        float64 [d_out, d_in]; of minimum norm in the deficient case.
    """
    y64, x64 = y.detach().to("cpu", torch.float64), x.detach().to("cpu", torch.float64)
    case = classify(x, rtol)
    if case is Case.SQUARE:
        return torch.linalg.solve(x64, y64, left=False)
    if case is Case.WIDE:
        # Y X^T (X X^T)^-1 through the QR factors of X^T: same map, without squaring the condition
        q, r = torch.linalg.qr(x64.T)  # [n, d_in], [d_in, d_in]
        return torch.linalg.solve_triangular(r, (y64 @ q).T, upper=True).T
    u, s, vt = _svd(x, rtol)
    return ((y64 @ vt.T) / s) @ u.T


def components(weight: Tensor, x: Tensor, rtol: float | None = None) -> Tensor:
    """Z = W U_r S_r, the independent components of Y = W X: float64 [d_out, r].

    An isometry: ||Z - Z^||_F = ||(W - W^) X||_F.
    """
    u, s, _ = _svd(x, rtol)
    return (weight.detach().to("cpu", torch.float64) @ u) * s


def recover_components(z: Tensor, x: Tensor, rtol: float | None = None) -> Tensor:
    """W^ [d_out, d_in] of minimum norm whose `components` are Z^ [d_out, r]."""
    u, s, _ = _svd(x, rtol)
    if z.shape[1] != len(s):
        raise ValueError(f"{z.shape[1]} components for X of rank {len(s)}")
    return (z.to("cpu", torch.float64) / s) @ u.T


@dataclass(frozen=True, eq=False)
class Level:
    """One level of the nested optimum, for a row of unit variance."""

    bits: float  # bits a weight spent up to and including this level
    level: float  # water level, in the unit of lambda
    active: Tensor  # bool [d_in]
    distortions: Tensor  # float64 [d_in], non-increasing from level to level
    increments: Tensor  # float64 [d_in], bits this level adds to each component, >= 0


def refine(spectrum: Tensor, bits: Sequence[float]) -> list[Level]:
    """The nested optimum at increasing rates (Theorem 1, step 4).

    Args:
        spectrum: [d_in], eigenvalues of H.
        bits: increasing rates in bits a weight.

    Returns:
        One `Level` a rate; components in descending order of lambda. The mean over components of
        the increments, summed up to level l, is bits[l]: nesting costs no rate.

    Raises:
        ValueError: rates that do not increase.
    """
    if any(b <= a for a, b in pairwise(bits)):
        raise ValueError(f"rates must increase from level to level, not {list(bits)}")
    source = GaussianSource(spectrum, torch.ones(1, dtype=torch.float64))
    levels, spent = [], torch.zeros_like(source.spectrum)
    for rate in bits:
        filling = source.fill(rate)
        added = (filling.rates - spent).clamp(min=0)  # negative by rounding only
        levels.append(Level(rate, filling.level, filling.active, filling.distortions, added))
        spent = filling.rates
    return levels


def ideal_reconstructions(
    z: Tensor, variances: Tensor, distortions: Sequence[Tensor], generator: torch.Generator
) -> list[Tensor]:
    """Draw nested reconstructions that meet given distortions: a Markov chain Z - Z_L - ... - Z_1.

    Backward test channels of a Gaussian: Z_L = (1 - d_L / v) Z + N(0, d_L (1 - d_L / v)), then each
    coarser level is the same channel applied to the next finer one, at distortion d_{P-1} - d_P on
    a source of variance v - d_P. By the chain I(Z; Z_1..Z_P) = 1/2 log2(v / d_P) at every level.

    Args:
        z: [n, r] samples of independent components.
        variances: [r], their variances v.
        distortions: per level, coarse to fine, [r] with d_P <= d_{P-1} <= v.

    Returns:
        One float64 [n, r] per level, in the same order.
    """
    current = z.to("cpu", torch.float64)
    power = variances.to("cpu", torch.float64)
    reached = torch.zeros_like(power)  # distortion of `current` against z
    results: list[Tensor] = []
    for target in reversed(distortions):
        extra = torch.minimum(target.to(power) - reached, power)
        if bool((extra < 0).any()):
            raise ValueError("distortions must not increase from a level to the next finer one")
        keep = torch.where(power > 0, 1 - extra / power, 0.0)
        noise = torch.randn(current.shape, generator=generator, dtype=torch.float64)
        current = keep * current + (extra * keep).sqrt() * noise
        reached, power = reached + extra, power - extra
        results.append(current)
    return results[::-1]
