"""`aqlm-drop`: AQLM trained for the highest level, its last codebooks dropped for the lower ones.

"AQLM (Drop)" in Figure 6 of the Drop-by-Drop paper: nothing in AQLM's loss orders the codebooks,
and its prefixes collapse. Training is that of `aqlm` at the highest level.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .additive import Training, additive_bytes, train
from .aqlm import PUBLISHED
from .suite import Level, Suite


def aqlm_drop(
    weight: Tensor,
    gram: Tensor,
    levels: Sequence[int],
    training: Training = PUBLISHED,
    seed: int = 0,
) -> Suite:
    """weight float32 [d_out, d_in], gram [d_in, d_in]."""
    top, shape = max(levels), weight.shape
    state = train(weight, gram, top, [top], [1.0], training, seed)
    served = {p: Level(state.decode(p), additive_bytes(shape, p)) for p in levels}
    return Suite(served, (additive_bytes(shape, top),))
