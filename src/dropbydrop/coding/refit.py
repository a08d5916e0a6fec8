"""Refits between searches: row scales in closed form, codebooks by conjugate gradients.

Both minimise the same J as the search, over the continuous parameters with the codes fixed, so a
refit never increases J (in exact arithmetic; callers keep the old value otherwise).

    scales     s_i = sum_P lambda_P <w_i, H q_iP> / sum_P lambda_P <q_iP, H q_iP>
    codebooks  J is a quadratic in the stacked entries C. Its gradient for entry k of codebook m is
               -2 sum_{P >= m} lambda_P sum_{(i,j): code = k} s_i sign (E_P H)_{i, group j}, one
               product E_P H a level and iteration. Preconditioner: for each entry the g x g block
               Lambda_m sum_{(i,j): code = k} s_i^2 H_jj, which is the diagonal block of the
               quadratic; a mere count of uses ignores scales and H and stalls.
Matrices that share a set are refit together: the sums run over all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .code import GROUP


@dataclass
class Coded:
    """One matrix under refit, all in rotated coordinates."""

    weight: Tensor  # float32 [d_out, d_in]
    scales: Tensor  # float32 [d_out]
    codes: Tensor  # uint8 [M, d_out, G]


def prefixes(codes: Tensor, codebooks: Tensor, levels: Sequence[int]) -> list[Tensor]:
    """Unscaled partial sums [d_out, d_in] at each level; codebooks [M, K/2, g] (sign-symmetric)."""
    total = torch.zeros(codes[0].numel(), GROUP, device=codebooks.device)
    shape = (codes.shape[1], codes.shape[2] * GROUP)
    entries = torch.cat([codebooks, -codebooks], dim=1)
    out = []
    for m in range(levels[-1]):
        total = total + torch.nn.functional.embedding(codes[m].reshape(-1).int(), entries[m])
        if m + 1 in levels:
            out.append(total.view(shape))
    return out


def objective(
    coded: Coded, h: Tensor, codebooks: Tensor, levels: Sequence[int], lambdas: Sequence[float]
) -> float:
    """J of one matrix in the units of its weights (not divided by the scales). h [d_in, d_in]."""
    total = 0.0
    for q, lam in zip(prefixes(coded.codes, codebooks, levels), lambdas, strict=True):
        e = coded.weight - coded.scales[:, None] * q
        total += lam * float(((e @ h) * e).sum(dtype=torch.float64))
    return total


def refit_scales(
    coded: Coded, h: Tensor, codebooks: Tensor, levels: Sequence[int], lambdas: Sequence[float]
) -> Tensor:
    """Row scales [d_out] that minimise J for fixed codes; rows that decode to zero keep theirs."""
    top = torch.zeros_like(coded.scales)
    bottom = torch.zeros_like(coded.scales)
    for q, lam in zip(prefixes(coded.codes, codebooks, levels), lambdas, strict=True):
        qh = q @ h
        top += lam * (qh * coded.weight).sum(1)
        bottom += lam * (qh * q).sum(1)
    good = (bottom > 0) & (top > 0)
    return torch.where(good, top / bottom.clamp_min(1e-30), coded.scales)


def refit_codebooks(
    matrices: Sequence[Coded],
    h: Tensor,
    codebooks: Tensor,
    levels: Sequence[int],
    lambdas: Sequence[Sequence[float]],
    iterations: int = 6,
) -> Tensor:
    """Codebooks [M, K/2, g] after `iterations` of preconditioned conjugate gradients on J.

    Args:
        matrices: the matrices that share this set (same d_in, same H).
        h: conditioned H, float32 [d_in, d_in].
        codebooks: start, float32 [M, K/2, g]; entries nobody uses stay where they are.
        lambdas: for each matrix, the weight of each level.
    """
    planes, half, _ = codebooks.shape
    groups = h.shape[0] // GROUP
    device = h.device
    blocks = torch.stack(
        [h[j * GROUP : (j + 1) * GROUP, j * GROUP : (j + 1) * GROUP] for j in range(groups)]
    )
    entry = [(x.codes & (half - 1)).int() for x in matrices]
    sign = [1.0 - 2.0 * (x.codes >= half).float() for x in matrices]

    def gradient(sources: list[list[Tensor]]) -> Tensor:
        """Adjoint of decoding: sources[i][level] [d_out, d_in] -> [M, K/2, g]."""
        out = torch.zeros_like(codebooks)
        for x, k, s, per_level in zip(matrices, entry, sign, sources, strict=True):
            total = torch.zeros_like(x.weight)
            for m in reversed(range(planes)):
                if m + 1 in levels:
                    total = total + per_level[levels.index(m + 1)]
                values = (total * x.scales[:, None]).view(-1, groups, GROUP) * s[m][..., None]
                out[m].index_add_(0, k[m].reshape(-1), values.reshape(-1, GROUP))
        return out

    def weighted(i: int, parts: list[Tensor]) -> list[Tensor]:
        return [lam * (e @ h) for e, lam in zip(parts, lambdas[i], strict=True)]

    def apply(books: Tensor) -> Tensor:
        sources = []
        for i, x in enumerate(matrices):
            parts = [x.scales[:, None] * q for q in prefixes(x.codes, books, levels)]
            sources.append(weighted(i, parts))
        return gradient(sources)

    block = torch.zeros(planes, half, GROUP * GROUP, device=device)
    for i, x in enumerate(matrices):
        group = torch.arange(groups, device=device)
        for m in range(planes):
            reach = sum(lam for p, lam in zip(levels, lambdas[i], strict=True) if p > m)
            use = torch.zeros(half * groups, device=device)
            where = (entry[i][m] * groups + group).reshape(-1)
            use.index_add_(0, where, x.scales.square()[:, None].expand(-1, groups).reshape(-1))
            block[m] += reach * (use.view(half, groups) @ blocks.reshape(groups, -1))
    block = block.view(planes, half, GROUP, GROUP)
    mean = block.diagonal(dim1=-2, dim2=-1).mean().clamp_min(1e-30)
    inverse = torch.linalg.inv(block + 1e-4 * mean * torch.eye(GROUP, device=device))

    residuals = []
    for i, x in enumerate(matrices):
        qs = prefixes(x.codes, codebooks, levels)
        residuals.append(weighted(i, [x.weight - x.scales[:, None] * q for q in qs]))
    r = gradient(residuals)
    z = (inverse @ r[..., None])[..., 0]
    p, rz, out = z, (r * z).sum(), codebooks.clone()
    for _ in range(iterations):
        if float(rz) <= 0:
            break
        ap = apply(p)
        step = rz / (p * ap).sum().clamp_min(1e-30)
        out = out + step * p
        r = r - step * ap
        z = (inverse @ r[..., None])[..., 0]
        rz, last = (r * z).sum(), rz
        p = z + rz / last * p
    return out
