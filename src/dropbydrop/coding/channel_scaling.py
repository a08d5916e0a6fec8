"""Input scales of an input group, by which its rotation multiplies the inputs: noise shaping for
nothing.

A code of rotated coordinates makes white noise there, so with x_i multiplied by t_i before the
rotation, and column i of W divided by t_i, the noise of column i of W has power proportional to
P t_i^2, P being the power of the scaled weights. With w_i^2 the mean square of column i (rows
divided by their rms) and h_i = H_ii, the weighted error is, up to what the code contributes,

    without error feedback         mean_i(w_i^2 / t_i^2) * mean_i(h_i t_i^2)    t^4 = w^2 / h
    with perfect error feedback    mean_i(w_i^2 / t_i^2) * GM_i(h_i t_i^2)      t^2 = w^2

since feedback makes the geometric mean (GM) of H's spectrum count, which scales move by no more
than their product. On the right is what minimises each, by Cauchy-Schwarz and by the inequality of
the means. Real feedback is damped (objective.py), so we take the geometric middle of the two,

    t_i = w_i^(3/4) h_i^(-1/8),

measured against others in docs/log.md. Scales stay within 2^-4 ... 2^4: a column that is thousands
of times the rest must not raise the damping of everything else. Inputs that calibration never saw
at work get about three times the scale of the others, hence more noise should they ever wake.
Related: the channel scales of AWQ (Lin et al. 2024), searched there for a quantizer that rounds to
nearest, without rotation.

Means over columns are those of all matrices of the input group, which share the scales.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

_FLOOR = 1e-4  # of the mean: inputs that are always zero, columns of zeros
_LIMIT = 4  # octaves


def input_scales_of(weights: Iterable[Tensor], gram: Tensor) -> Tensor:
    """t > 0, float32 [d_in], of geometric mean 1 before the limits.

    Args:
        weights: the input group's matrices, [d_out, d_in] each, unrotated.
        gram: H = E[x x^T] of the unrotated inputs, [d_in, d_in]. Not finite or all-zero statistics
            give ones where they say nothing; the encoder refuses them.
    """
    power = torch.zeros(gram.shape[0], dtype=torch.float64, device=gram.device)
    for weight in weights:
        rows = weight.float().square()
        rows /= rows.mean(1, keepdim=True).clamp_min(1e-30)
        power += rows.sum(0, dtype=torch.float64)
    log = 0.375 * _log(power) - 0.125 * _log(gram.diagonal().double())
    limit = _LIMIT * math.log(2)
    return (log - log.mean()).clamp(-limit, limit).exp().float()


def _log(values: Tensor) -> Tensor:
    """Logarithms [d_in] with a floor; zeros for values that say nothing."""
    mean = values.mean()
    if not bool(torch.isfinite(mean)) or float(mean) <= 0:
        return torch.zeros_like(values)
    return values.clamp_min(_FLOOR * mean).log()
