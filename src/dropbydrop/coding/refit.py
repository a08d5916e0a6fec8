"""Refits between searches: row scales in closed form, codebooks by conjugate gradients.

Both minimise the same J as the search, over the continuous parameters with the codes fixed, so a
refit never increases J (in exact arithmetic; callers keep the old value otherwise). Scales are
refit for planes of any kind, codebooks for byte planes alone: those of trellis planes are the
universal ones, and `tune` trains them.

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

import torch
from torch import Tensor

from .code import GROUP, expand_set, partial_sums
from .codebook_set import CodebookSet
from .objective import Coded


def refit_scales(
    coded: Coded, h: Tensor, books: CodebookSet, prefixes: Sequence[int], lambdas: Sequence[float]
) -> Tensor:
    """Row scales [d_out] that minimise J for fixed codes; rows that decode to zero keep theirs.

    h float32 [d_in, d_in], conditioned; prefixes: the planes that each supervised level reads.
    """
    top = torch.zeros_like(coded.scales)
    bottom = torch.zeros_like(coded.scales)
    for q, lam in zip(coded.sums(books, prefixes), lambdas, strict=True):
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
    problem = _Quadratic(matrices, h, levels, lambdas, codebooks.shape)
    blocks = problem.diagonal()  # [M, K/2, g, g]
    mean = blocks.diagonal(dim1=-2, dim2=-1).mean().clamp_min(1e-30)
    inverse: Tensor = torch.linalg.inv(blocks + 1e-4 * mean * torch.eye(GROUP, device=h.device))

    def precondition(residual: Tensor) -> Tensor:
        return (inverse @ residual[..., None])[..., 0]  # [M, K/2, g]

    r = problem.residual(codebooks)
    z = precondition(r)
    p, rz = z, (r * z).sum()
    out: Tensor = codebooks.clone()
    for _ in range(iterations):
        if float(rz) <= 0:
            break
        ap = problem.apply(p)
        step = rz / (p * ap).sum().clamp_min(1e-30)
        out = out + step * p
        r = r - step * ap
        z = precondition(r)
        rz, last = (r * z).sum(), rz
        p = z + rz / last * p
    return out


class _Quadratic:
    """J as a quadratic in the stacked codebooks C [M, K/2, g], up to a constant: C.(A C) - 2 B.C.

    Args as for `refit_codebooks`; `shape` is that of C.
    """

    def __init__(
        self,
        matrices: Sequence[Coded],
        h: Tensor,
        levels: Sequence[int],
        lambdas: Sequence[Sequence[float]],
        shape: torch.Size,
    ) -> None:
        self.matrices, self.h, self.levels, self.lambdas = matrices, h, list(levels), lambdas
        self.shape, self.groups = shape, h.shape[0] // GROUP
        half = shape[1]
        self._codes = [torch.stack(x.codes) for x in matrices]  # [M, d_out, G] each
        self._entry = [(codes & (half - 1)).int() for codes in self._codes]
        self._sign = [1.0 - 2.0 * (codes >= half).float() for codes in self._codes]

    def apply(self, codebooks: Tensor) -> Tensor:
        """A C, [M, K/2, g]."""
        return self._adjoint(self._decode(codebooks))

    def residual(self, codebooks: Tensor) -> Tensor:
        """B - A C, [M, K/2, g]: half the negative gradient of J."""
        decoded = zip(self.matrices, self._decode(codebooks), strict=True)
        return self._adjoint([[x.weight - q for q in levels] for x, levels in decoded])

    def diagonal(self) -> Tensor:
        """The g x g block of A of every entry, [M, K/2, g, g]."""
        planes, half, _ = self.shape
        corners = [slice(j * GROUP, (j + 1) * GROUP) for j in range(self.groups)]
        h_blocks = torch.stack([self.h[part, part] for part in corners])  # [G, g, g]
        group = torch.arange(self.groups, device=self.h.device)
        blocks = torch.zeros(planes, half, GROUP * GROUP, device=self.h.device)
        for x, entry, lambdas in zip(self.matrices, self._entry, self.lambdas, strict=True):
            energy = x.scales.square()[:, None].expand(-1, self.groups).reshape(-1)  # [d_out * G]
            for m in range(planes):
                reach = sum(lam for p, lam in zip(self.levels, lambdas, strict=True) if p > m)
                use = torch.zeros(half * self.groups, device=self.h.device)
                use.index_add_(0, (entry[m] * self.groups + group).reshape(-1), energy)
                use = use.view(half, self.groups)
                blocks[m] += reach * (use @ h_blocks.reshape(self.groups, -1))  # [K/2, g * g]
        return blocks.view(planes, half, GROUP, GROUP)

    def _decode(self, codebooks: Tensor) -> list[list[Tensor]]:
        """Every matrix at each level, [d_out, d_in]."""
        entries = expand_set(codebooks)
        return [
            [x.scales[:, None] * q for q in partial_sums(codes, entries, self.levels)]
            for x, codes in zip(self.matrices, self._codes, strict=True)
        ]

    def _adjoint(self, errors: Sequence[Sequence[Tensor]]) -> Tensor:
        """Adjoint of decoding, on errors [d_out, d_in] of each matrix at each level times
        lambda H: [M, K/2, g]."""
        out = torch.zeros(self.shape, device=self.h.device)
        rows = zip(self.matrices, self._entry, self._sign, errors, self.lambdas, strict=True)
        for x, entry, sign, parts, lambdas in rows:
            sources = [lam * (e @ self.h) for e, lam in zip(parts, lambdas, strict=True)]
            total = torch.zeros_like(x.weight)
            for m in reversed(range(self.shape[0])):
                if m + 1 in self.levels:
                    total = total + sources[self.levels.index(m + 1)]
                scaled = (total * x.scales[:, None]).view(-1, self.groups, GROUP)  # [d_out, G, g]
                values = scaled * sign[m][..., None]
                out[m].index_add_(0, entry[m].reshape(-1), values.reshape(-1, GROUP))
        return out
