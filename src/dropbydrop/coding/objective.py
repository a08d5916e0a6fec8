"""The Drop-by-Drop loss and the quadratic forms the search needs.

    J = sum_P lambda_P tr((W - W^_P) H (W - W^_P)^T)          (paper, the Drop-by-Drop loss)

summed over the supervised levels P. H = E[x x^T] of the input group's inputs, in rotated
coordinates.

Conditioning. H from a few ten thousand tokens of a real model is nearly singular, and factoring it
in float32 fails; so all factorisations run in float64 after a ridge of `damp` times the mean
diagonal has been added (the token clipping of the statistics has already removed the first token's
massive activations, which would make that mean meaningless).

Two packed forms of H feed the search, each [G, d_in, g] "coupling" and [G, g, g] "factor":
  feedback  H = L L^T, the coupling of group j is the column block L[i > j, j], its factor L[j, j].
            The cost of group j given all later groups is then exact:
            ||e L||^2 = sum_j ||(e L)_j||^2.
  descent   H_jj = R_j R_j^T, coupling H[i not in j, j] R_j^{-T}, factor R_j: the exact cost of
            group j with all others fixed, up to a constant.
Both cut columns of L or H into groups of 8, as the search of byte planes visits them. That of
trellis planes visits single columns and takes L and H themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .code import GROUP
from .codebook_set import CodebookSet


@dataclass
class Coded:
    """One matrix and its code, all in rotated coordinates."""

    weight: Tensor  # float32 [d_out, d_in]
    scales: Tensor  # float32 [d_out]
    codes: list[Tensor]  # of each plane, as it is stored

    def sums(self, books: CodebookSet, prefixes: Sequence[int]) -> list[Tensor]:
        """What the first planes decode to, before scaling: float32 [d_out, d_in] each."""
        return books.sums(self.codes, len(self.weight), prefixes)


def objective(
    coded: Coded, h: Tensor, books: CodebookSet, prefixes: Sequence[int], lambdas: Sequence[float]
) -> float:
    """J of one matrix in the units of its weights (not divided by the scales).

    h float32 [d_in, d_in], conditioned; prefixes: the planes that each supervised level reads.
    """
    total = 0.0
    for q, lam in zip(coded.sums(books, prefixes), lambdas, strict=True):
        e = coded.weight - coded.scales[:, None] * q
        total += lam * float(((e @ h) * e).sum(dtype=torch.float64))
    return total


@dataclass(frozen=True)
class Metric:
    """One packed form of H; see the module's note. float32, contiguous."""

    coupling: Tensor  # [G, d_in, g]
    factor: Tensor  # [G, g, g]


def condition(gram: Tensor, damp: float) -> Tensor:
    """H + damp * mean(diag H) * I in float64. gram [d_in, d_in]; `damp` has no unit."""
    h = gram.to(torch.float64)
    h = (h + h.T) / 2
    mean = h.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    h.diagonal().add_(damp * mean)
    return h


def feedback_metric(h: Tensor) -> Metric:
    """Cholesky form of a conditioned H [d_in, d_in] float64 for error feedback.

    Raises:
        torch.linalg.LinAlgError: H is not positive definite (damping too small).
    """
    n, groups = h.shape[0], h.shape[0] // GROUP
    lower = torch.linalg.cholesky(h)
    coupling = lower.view(n, groups, GROUP).transpose(0, 1).clone()  # [G, d_in, g]
    factor = torch.stack([coupling[j, j * GROUP : (j + 1) * GROUP] for j in range(groups)])
    for j in range(groups):
        coupling[j, : (j + 1) * GROUP] = 0
    return Metric(coupling.float().contiguous(), factor.float().contiguous())


def descent_metric(h: Tensor) -> Metric:
    """Block form of a conditioned H [d_in, d_in] float64 for block descent."""
    n, groups = h.shape[0], h.shape[0] // GROUP
    columns = h.view(n, groups, GROUP).transpose(0, 1).clone()  # [G, d_in, g]
    blocks = torch.stack([columns[j, j * GROUP : (j + 1) * GROUP] for j in range(groups)])
    factor = torch.linalg.cholesky(blocks)
    # X = H[:, j] R^{-T}  <=>  X R^T = H[:, j]
    coupling = torch.linalg.solve_triangular(
        factor.transpose(1, 2), columns, upper=True, left=False
    )
    for j in range(groups):
        coupling[j, j * GROUP : (j + 1) * GROUP] = 0
    return Metric(coupling.float().contiguous(), factor.float().contiguous())


def weighted_errors(weight: Tensor, decoded: Sequence[Tensor], gram: Tensor) -> list[float]:
    """Relative weighted errors tr(E H E^T) / tr(W H W^T), one for each W^_P in `decoded`.

    weight, decoded[i] [d_out, d_in]; gram [d_in, d_in]. Dimensionless; 0 of a matrix of zeros.
    """
    energy = ((weight @ gram) * weight).sum(dtype=torch.float64)
    errors = []
    for w_hat in decoded:
        e = weight - w_hat
        error = ((e @ gram) * e).sum(dtype=torch.float64)
        errors.append(float(error / energy) if energy > 0 else 0.0)  # of zeros nothing is lost
    return errors
