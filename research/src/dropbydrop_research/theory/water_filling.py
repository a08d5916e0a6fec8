"""Rate-distortion function of Gaussian weights under a weighted MSE: reverse water-filling.

Model of a matrix W [d_out, d_in]: independent rows w_r ~ N(0, sigma_r^2 I). Distortion of a
reconstruction: tr(E H E^T), E = W - W^. With H = V diag(lambda) V^T the rows sqrt(lambda_i) *
(w_r v_i) are independent Gaussians of variance v_ri = sigma_r^2 lambda_i under a plain MSE, so
(Cover and Thomas, Elements of Information Theory, theorem 10.3.3)

    D(theta) = sum_ri min(v_ri, theta),   B(theta) = sum_ri max(0, 1/2 log2(v_ri / theta)).

A component is active when v_ri > theta; the others are worth no bit and keep their variance as
distortion. Two allocations of B = bits * d_out * d_in:

    common    every row gets d_in * bits bits: one water level per row, theta_r = sigma_r^2 theta,
              hence D = (sum_r sigma_r^2) * sum_i min(lambda_i, theta). What a code that spends
              the same number of bits on each row, like ours, can hope for.
    optimal   one water level for the whole matrix: the bound of any quantizer. Never above the
              first; equal to it when all rows have one variance.

Solver: on a fixed active set theta is in closed form. B is convex and piecewise linear in
log theta, D concave and piecewise linear in theta, so Newton's method started with every component
active moves one way, only shrinks the active set, and ends at the exact solution in a few steps.
The d_out * d_in variances are never formed: per row only the number of active components enters.

It is a bound for the ensemble that the model describes, in the limit of long blocks. One given
matrix can beat it, the more so where the model is wrong (outliers, weights aligned with H).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Allocation = Literal["common", "optimal"]


def spectrum(h: Tensor) -> Tensor:
    """Eigenvalues of H, largest first.

    Args:
        h: [d_in, d_in], symmetric positive semi-definite up to rounding.

    Returns:
        float64 [d_in], descending; rounding noise below zero is set to zero.

    Raises:
        ValueError: not square, not finite, not symmetric, or clearly indefinite.
    """
    return _clean(torch.linalg.eigvalsh(_symmetric(h)), h)


def eigenbasis(h: Tensor) -> tuple[Tensor, Tensor]:
    """`spectrum` of H and its eigenvectors: float64 [d_in] descending, [d_in, d_in] columns."""
    values, vectors = torch.linalg.eigh(_symmetric(h))
    return _clean(values, h), vectors.flip(1)


def cross_spectrum(vectors: Tensor, held: Tensor) -> Tensor:
    """Energies of held-out activations along given directions, largest first.

    D(R) at a fixed rate is concave in H (a minimum of the linear functions tr(S H) over error
    covariances S). So the eigenvalues of a sampled H give a bound that is too low on average, and
    the diagonal of V^T H_held V, V from independent samples, one that is too high (up to the noise
    of its diagonal, of relative size sqrt(2 / n)). The two together bracket the population's
    bound; where they differ, H is under-sampled.

    Args:
        vectors: [d_in, d_in], eigenvectors of the calibration H (`eigenbasis`).
        held: [d_in, d_in] from other samples, in the same unit (both means, or both sums over
            equally many samples).

    Returns:
        float64 [d_in], descending, non-negative.
    """
    if vectors.shape != held.shape:
        raise ValueError(f"{tuple(vectors.shape)} directions for a held-out H {tuple(held.shape)}")
    return _clean((vectors * (_symmetric(held) @ vectors)).sum(0), held)


def matched_spectrum(weight: Tensor, lam: Tensor, vectors: Tensor) -> Tensor:
    """Spectrum whose source has the energies that W really has along the eigenvectors of H.

    lambda_i times the mean over rows of (w_r v_i)^2 / sigma_r^2, which is 1 for N(0, sigma_r^2 I).
    The difference it makes to the bound is what weights that are aligned with H do to it.

    Args:
        weight: [d_out, d_in]; rows of zeros are left out.
        lam, vectors: of H, as `eigenbasis` returns them.

    Returns:
        float64 [d_in], descending.
    """
    w = weight.detach().to("cpu", torch.float64)
    rows = w.square().mean(1)
    along = (w[rows > 0] @ vectors).square() / rows[rows > 0][:, None]  # [d_out, d_in]
    return (lam * along.mean(0)).sort(descending=True).values


def row_variances(weight: Tensor) -> Tensor:
    """Mean square of each row, the maximum-likelihood sigma_r^2 of N(0, sigma_r^2 I).

    W [d_out, d_in] -> float64 [d_out].
    """
    return weight.detach().to("cpu", torch.float64).square().mean(1)


@dataclass(frozen=True)
class Gap:
    """Distance of a code from the bound at its own rate."""

    db: float  # 10 log10(reached / D(bits)); negative when the ensemble's bound is beaten
    bits: float  # bits - R(reached): bits a weight that an ideal code would save


@dataclass(frozen=True, eq=False)
class Filling:
    """Reverse water-filling of one row of unit variance (the `common` allocation)."""

    bits: float  # bits a weight
    level: float  # water level theta, in the unit of lambda
    active: Tensor  # bool [d_in], lambda_i > theta
    distortions: Tensor  # float64 [d_in], min(lambda_i, theta)
    rates: Tensor  # float64 [d_in], bits of component i; their mean is `bits`


@dataclass(frozen=True, eq=False)
class GaussianSource:
    """Gaussian rows under a weighted MSE; see the module's note.

    Attributes:
        spectrum: float64 [d_in], eigenvalues of H, descending, >= 0.
        rows: float64 [d_out], row variances sigma_r^2 >= 0.
    """

    spectrum: Tensor
    rows: Tensor

    def __post_init__(self) -> None:
        lam = self.spectrum.detach().to("cpu", torch.float64)
        rows = self.rows.detach().to("cpu", torch.float64)
        for name, values in (("spectrum", lam), ("rows", rows)):
            if values.ndim != 1 or not len(values):
                raise ValueError(f"{name} must be a non-empty vector, not {tuple(values.shape)}")
            if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
                raise ValueError(f"{name} must be finite and non-negative")
        object.__setattr__(self, "spectrum", lam.sort(descending=True).values)
        object.__setattr__(self, "rows", rows)

    @staticmethod
    def of(weight: Tensor, h: Tensor) -> GaussianSource:
        """The source fitted to W [d_out, d_in] under H [d_in, d_in]."""
        return GaussianSource(spectrum(h), row_variances(weight))

    @property
    def power(self) -> float:
        """Distortion at rate zero, sum_r sigma_r^2 * tr(H): the ensemble's mean of tr(W H W^T)."""
        return float(self.rows.sum() * self.spectrum.sum())

    @property
    def size(self) -> int:
        """Number of weights, d_out * d_in; null components and zero rows count."""
        return len(self.rows) * len(self.spectrum)

    def distortion(self, bits: float, allocation: Allocation = "common") -> float:
        """D(R): least distortion, in the unit of tr(E H E^T), at `bits` bits a weight.

        Raises:
            ValueError: a negative or non-finite rate.
        """
        if not (bits >= 0 and math.isfinite(bits)):
            raise ValueError(f"a rate must be finite and non-negative, not {bits}")
        rows, factor = self._rows(allocation)
        pieces = _Pieces.of(self.spectrum, rows)
        if pieces is None:
            return 0.0
        total = bits * len(self.spectrum) * len(rows)
        return factor * pieces.distortion(2.0 ** pieces.log_level_at(total))

    def rate(self, distortion: float, allocation: Allocation = "common") -> float:
        """R(D): bits a weight needed for `distortion`; 0 from `power` on, inf at or below 0.

        Raises:
            ValueError: the distortion is not a number.
        """
        if math.isnan(distortion):
            raise ValueError("the distortion is not a number")
        rows, factor = self._rows(allocation)
        pieces = _Pieces.of(self.spectrum, rows)
        if pieces is None or distortion >= self.power:
            return 0.0
        if distortion <= 0:
            return math.inf
        level = pieces.level_at(distortion / factor)
        return pieces.bits(math.log2(level)) / (len(self.spectrum) * len(rows))

    def gap(self, reached: float, bits: float, allocation: Allocation = "common") -> Gap:
        """How far a code that reaches distortion `reached` at `bits` stays from the bound.

        The distance in bits inverts R(D). It is less than db / 6.02 where components are inactive
        (only a part of the weights' components then trades bits for distortion).

        Raises:
            ValueError: `reached` is not positive, or the source has no power.
        """
        bound = self.distortion(bits, allocation)
        if not reached > 0 or bound <= 0:
            raise ValueError(f"no gap between distortion {reached} and bound {bound}")
        return Gap(10 * math.log10(reached / bound), bits - self.rate(reached, allocation))

    def fill(self, bits: float) -> Filling:
        """Water level, active set, distortion and rate of each component at `bits` bits a weight.

        For a row of unit variance; row r has level sigma_r^2 * theta and the same active set.
        """
        if not (bits >= 0 and math.isfinite(bits)):
            raise ValueError(f"a rate must be finite and non-negative, not {bits}")
        lam = self.spectrum
        pieces = _Pieces.of(lam, torch.ones(1, dtype=torch.float64))
        level = 0.0 if pieces is None else 2.0 ** pieces.log_level_at(bits * len(lam))
        active = lam > level
        rates = torch.where(active, 0.5 * torch.log2(lam / level), 0.0) if level else lam * 0
        return Filling(bits, level, active, lam.clamp(max=level), rates)

    def _rows(self, allocation: Allocation) -> tuple[Tensor, float]:
        """Row variances to fill jointly, and the factor that turns their D into the matrix's."""
        if allocation == "optimal":
            return self.rows, 1.0
        if allocation == "common":
            return torch.ones(1, dtype=torch.float64), float(self.rows.sum()) or 1.0
        raise ValueError(f"allocation {allocation!r}: choose common or optimal")


@dataclass(frozen=True, eq=False)
class _Pieces:
    """B(log2 theta) and D(theta) as piecewise linear functions, by sums over sorted components.

    n rows of positive variance, p positive eigenvalues. `count` [n] is the number of active
    components of each row; it indexes the partial sums.
    """

    lam: Tensor  # [p] eigenvalues, ascending (as searchsorted wants them)
    rows: Tensor  # [n]
    head: Tensor  # [p + 1] sum of log2 of the k largest eigenvalues
    tail: Tensor  # [p + 1] sum of all but the k largest eigenvalues

    @staticmethod
    def of(lam: Tensor, rows: Tensor) -> _Pieces | None:
        """From a descending spectrum; None when the source has no power."""
        lam, rows = lam[lam > 0], rows[rows > 0]
        if not len(lam) or not len(rows):
            return None
        zero = torch.zeros(1, dtype=torch.float64)
        head = torch.cat([zero, torch.log2(lam).cumsum(0)])
        ascending = lam.flip(0)
        tail = torch.cat([zero, ascending.cumsum(0)]).flip(0)
        return _Pieces(ascending, rows, head, tail)

    def count(self, level: float) -> Tensor:
        """Active components of each row, those with rows[r] * lam[i] > level: int64 [n].

        Callers keep it off Python floats: int64 * float is float32 in torch.
        """
        return len(self.lam) - torch.searchsorted(self.lam, level / self.rows, right=True)

    def distortion(self, level: float) -> float:
        k = self.count(level)
        return level * int(k.sum()) + float((self.rows * self.tail[k]).sum())

    def bits(self, log_level: float) -> float:
        k = self.count(2.0**log_level)
        return 0.5 * float((self.head[k] + k * (torch.log2(self.rows) - log_level)).sum())

    def log_level_at(self, bits: float) -> float:
        """log2 of the water level that spends `bits` bits in all."""
        k = torch.full_like(self.rows, len(self.lam), dtype=torch.int64)
        while True:
            logs = self.head[k] + k * torch.log2(self.rows)
            log_level = (float(logs.sum()) - 2 * bits) / int(k.sum())
            # min: rounding at an edge must not let a component back in, or the loop may not end
            shrunk = torch.minimum(k, self.count(2.0**log_level))
            if not shrunk.any() or torch.equal(shrunk, k):
                return log_level
            k = shrunk

    def level_at(self, distortion: float) -> float:
        """The water level at which the total distortion is `distortion`, below the power."""
        k = torch.full_like(self.rows, len(self.lam), dtype=torch.int64)
        while True:
            inactive = float((self.rows * self.tail[k]).sum())
            level = (distortion - inactive) / int(k.sum())
            shrunk = torch.minimum(k, self.count(level))
            if not shrunk.any() or torch.equal(shrunk, k):
                return level
            k = shrunk


def _symmetric(h: Tensor) -> Tensor:
    """float64 (H + H^T) / 2 on the CPU, refusing what is not a symmetric matrix."""
    if h.ndim != 2 or h.shape[0] != h.shape[1] or not h.numel():
        raise ValueError(f"H must be square, not {tuple(h.shape)}")
    full = h.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(full).all()):
        raise ValueError("H has entries that are not finite")
    largest = float(full.abs().max())
    if float((full - full.T).abs().max()) > 1e-3 * largest:
        raise ValueError("H is not symmetric")
    return (full + full.T) / 2


def _clean(values: Tensor, h: Tensor) -> Tensor:
    """Sort descending and drop negative rounding noise; refuse an indefinite H.

    The tolerance covers a Gram matrix accumulated in float32 over many samples: its rounding
    errors are relative to the largest eigenvalue.
    """
    largest = float(values.max())
    if float(values.min()) < -1e-4 * max(largest, 0.0):
        raise ValueError(
            f"H is not positive semi-definite: eigenvalues from {float(values.min()):.3g} "
            f"to {largest:.3g} for a matrix of shape {tuple(h.shape)}"
        )
    return values.clamp(min=0).sort(descending=True).values
