"""A naive quantizer for tests of what is built on quantizers."""

from collections.abc import Sequence

import torch
from torch import Tensor

EDGE = 3.0


def bit_planes(weight: Tensor, h: Tensor, levels: Sequence[int]) -> list[Tensor]:
    """Naive embedded scalar code: bit m halves the interval, ignoring H.

    Supervised prefixes are decoded at the mean of the values in each interval; unsupervised ones as
    the sum of the bits kept, as if the rest were zero bits, which is what dropping does to a code
    trained for its last level only.
    """
    last = levels[-1]
    index = ((weight + EDGE) / (2 * EDGE) * 2**last).floor().clamp(0, 2**last - 1)
    out = []
    for p in range(1, last + 1):
        cell = (index / 2 ** (last - p)).floor()
        if p in levels:
            flat = cell.long().flatten()
            count = torch.bincount(flat, minlength=2**p).clamp(min=1)
            total = torch.zeros(2**p).index_add_(0, flat, weight.flatten())
            out.append((total / count)[flat].view_as(weight))
        else:
            out.append(cell / 2**p * 2 * EDGE - EDGE)
    return out
