"""`gptq`: GPTQ, groups of 64, a code of its own for each level.

Frantar, Ashkboos, Hoefler, Alistarh, GPTQ (ICLR 2023): columns are rounded one after the other
(columns.py), and what a column leaves over is compensated in the ones to come. Damping 1 %.

Two orders of the columns, both published:
- act-order (the default here, since it is the better one): by descending diagonal of H. Groups
  stay those of consecutive inputs, their grids are fitted on the original weights ("static
  groups"), so no permutation has to be stored;
- natural: grids are fitted when a group is reached, on what compensation has made of it.

Deviations: H is that of the unquantized model, the same for every method compared (the published
script takes the activations of quantized predecessors). For natural order, a group's grid sees all
updates so far; the published script leaves out those of the current block of 128 columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .columns import by_energy, feed_back
from .grid import GROUP_SIZE, fit_grid, fit_grids, from_codes, grid_bytes, to_codes
from .suite import Level, Suite, dedicated


def gptq(weight: Tensor, gram: Tensor, levels: Sequence[int], act_order: bool = True) -> Suite:
    """weight float32 [d_out, d_in], gram [d_in, d_in].

    Raises:
        CalibrationError: H cannot be factorised even after damping.
    """
    shape = weight.shape
    return dedicated(
        {p: Level(_one_level(weight, gram, p, act_order), grid_bytes(shape, p)) for p in levels}
    )


def _one_level(weight: Tensor, gram: Tensor, bits: int, act_order: bool) -> Tensor:
    out = torch.empty_like(weight)
    scale, zero = fit_grids(weight, bits)

    def visit(j: int, column: Tensor, ahead: Tensor) -> Tensor:
        group = j // GROUP_SIZE
        if not act_order and j % GROUP_SIZE == 0:
            scale[:, group], zero[:, group] = fit_grid(ahead[:, :GROUP_SIZE], bits)
        s, z = scale[:, group], zero[:, group]
        out[:, j] = from_codes(to_codes(column, s, z, bits), s, z)
        return column - out[:, j]

    natural = torch.arange(weight.shape[1], device=weight.device)
    feed_back(weight, gram, visit, by_energy(gram) if act_order else natural)
    return out
