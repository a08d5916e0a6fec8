"""The column loop of GPTQ, with the rounding of a column left to the caller.

Columns are visited in an order; what rounding a column leaves over is handed to the columns not
yet visited, in the way that minimises tr(E H E^T):

    e = residual / U[i, i],    W[:, i:] -= e U[i, i:],    U = upper Cholesky factor of H^{-1}

which is the same as eliminating column after column from H^{-1} (Frantar et al. 2023). Updates of
columns beyond the current block of 128 are collected and done as one product.

Damping: 1 % of the mean diagonal. Inputs that are always zero get H = 1 and weight 0, as published.
Factorisations run in float64, the loop in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dropbydrop.system.errors import CalibrationError

DAMP = 0.01
BLOCK = 128  # a multiple of the group size

Visit = Callable[[int, Tensor, Tensor], Tensor]
"""visit(j, column [d_out], ahead [d_out, n]) -> residual [d_out] to hand on.

j is the column's place in the matrix; `ahead` are the current values from this column on, in
visiting order, up to the end of the block (its first column is `column`)."""


def feed_back(weight: Tensor, gram: Tensor, visit: Visit, order: Tensor) -> None:
    """Visit every column of weight [d_out, d_in] in `order` [d_in]; neither input is modified.

    Raises:
        CalibrationError: H cannot be factorised even after damping.
    """
    h = gram.to(torch.float64)[order][:, order]
    w = weight[:, order].clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    w[:, dead] = 0
    h.diagonal().add_(DAMP * h.diagonal().mean())
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
        upper = torch.linalg.cholesky(inverse, upper=True).to(w.dtype)
    except torch.linalg.LinAlgError as error:
        raise CalibrationError(
            f"the inputs of a matrix of {weight.shape[1]} columns have no usable statistics "
            f"({error}); calibrate on more, or different, text."
        ) from error
    places = order.tolist()
    for low in range(0, len(places), BLOCK):
        high = min(low + BLOCK, len(places))
        shares = torch.empty_like(w[:, low:high])
        for i in range(low, high):
            share = visit(places[i], w[:, i], w[:, i:high]) / upper[i, i]
            w[:, i:high] -= torch.outer(share, upper[i, i:high])
            shares[:, i - low] = share
        w[:, high:] -= shares @ upper[low:high, high:]


def by_energy(gram: Tensor) -> Tensor:
    """Columns by descending diagonal of H ("act-order"), [d_in]."""
    return gram.diagonal().argsort(descending=True, stable=True)
