"""The metric of a matrix's outputs: what its off-diagonal part is worth, how a search uses it.

An error E of a matrix costs, to second order, E_y sum_t (g_t . E x_t)^2 (models/token_gradients.py
of dropbydrop). With tokens weighted by |g_t|^2 alone, rows err alike and apart. YAQA (arXiv
2505.22988) keeps the outputs' half of a Kronecker form as well, tr(H_O E H E^T) with H_O = mean of
g g^T. When blocks of rows are coded one after the other,

    H_O = (I + F) D (I + F)^T,   F above the blocks, D block diagonal,

and block b answers with the target u_b + sum_{a < b} F_ab^T e_a; white errors then cost sum D_rr
instead of sum H_O,rr. H_O comes from few tokens and is noisy: `left` measures on other tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

DAMPINGS = (0.1, 0.3, 1.0)  # of the mean diagonal, that `choose` tries


def bounds(rows: int, block: int) -> list[int]:
    """Where blocks begin and end: whole ones, the last with what is left."""
    return [*range(0, max(1, rows // block) * block, block), rows]


def damped(gram: Tensor, damping: float) -> Tensor:
    """H_O of mean diagonal 1 plus `damping` on it, float64 [d_out, d_out]."""
    metric = gram.double() / gram.diagonal().double().mean()
    metric.diagonal().add_(damping)
    return metric


def between_rows(metric: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """F [d_out, d_out] and the diagonal of D [d_out] of a positive definite metric, float64.

    Rows in reverse make the Cholesky factor that of blocks whose later ones are free.
    """
    rows = len(metric)
    lower = torch.linalg.cholesky(metric.flip(0, 1))
    feedback, weights = torch.zeros_like(metric), torch.zeros_like(metric[0])
    turned = [rows - bound for bound in bounds(rows, block)][::-1]
    for first, last in pairwise(turned):
        own = lower[first:last, first:last]
        part = torch.linalg.solve_triangular(own, lower[last:, first:last], upper=False, left=False)
        feedback[last:, first:last] = part
        weights[first:last] = own.square().sum(1)
    return feedback.flip(0, 1), weights.flip(0)


def left(gram: Tensor, other: Tensor, damping: float, block: int) -> float:
    """What white errors cost under `other`, H_O of other tokens, with the feedback of `gram`,
    relative to none: below 1 where feedback helps."""
    feedback, _ = between_rows(damped(gram, damping), block)
    eye = torch.eye(len(gram), dtype=torch.float64)
    errors = torch.linalg.solve_triangular(eye + feedback, eye, upper=True)  # of white targets
    return float(((errors @ damped(other, 0.0)) * errors).sum() / len(gram))


def choose(halves: Sequence[Tensor], block: int) -> tuple[float, float]:
    """The best damping, each half of the tokens judging the other, and what is left with it."""
    one, other = halves
    found = [
        ((left(one, other, damping, block) + left(other, one, damping, block)) / 2, damping)
        for damping in DAMPINGS
    ]
    cost, damping = min(found)
    return damping, cost
