"""`aqlm`: AQLM as published, a code of its own for each level (additive.py has the method).

At P bits a weight: P codebooks of 256 entries for groups of 8, all trained for that level alone.
Stored in float16 beside the codes: the codebooks, which are the matrix's own, and a scale a row.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .additive import Training, additive_bytes, train
from .suite import Level, Suite, dedicated

PUBLISHED = Training()


def aqlm(
    weight: Tensor,
    gram: Tensor,
    levels: Sequence[int],
    training: Training = PUBLISHED,
    seed: int = 0,
) -> Suite:
    """weight float32 [d_out, d_in], gram [d_in, d_in]."""
    served = {}
    for p in levels:
        state = train(weight, gram, p, [p], [1.0], training, seed)
        served[p] = Level(state.decode(p), additive_bytes(weight.shape, p))
    return dedicated(served)
