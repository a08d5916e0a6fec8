"""`paper`: AQLM's own loop under the Drop-by-Drop loss, as the paper states the method.

Babaoglu, Chen, Khisti (arXiv 2606.12876): L = sum_P lambda_P ||W X - W^_P X||^2 over the supervised
prefixes, minimised by AQLM's alternation (additive.py): the same start, Adam steps, beam search and
early stop; only the loss has more terms. It tells what our search, universal codebooks, level
weights and rotation add to the idea itself.

The weights are equal and sum to one, on the raw errors: one half on each of two levels, one third
on each of three. Raw errors fall by about 3.5 a level, so the lowest level dominates.

Deviations: the block-Hadamard rotation of the paper's revision is left out, and no fine-tuning.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .additive import Training, additive_bytes, train
from .aqlm import PUBLISHED
from .suite import Level, Suite


def paper(
    weight: Tensor,
    gram: Tensor,
    levels: Sequence[int],
    training: Training = PUBLISHED,
    seed: int = 0,
) -> Suite:
    """weight float32 [d_out, d_in], gram [d_in, d_in]; every level is supervised."""
    ascending, shape = sorted(levels), weight.shape
    lambdas = [1 / len(ascending)] * len(ascending)
    state = train(weight, gram, ascending[-1], ascending, lambdas, training, seed)
    served = {p: Level(state.decode(p), additive_bytes(shape, p)) for p in ascending}
    return Suite(served, (additive_bytes(shape, ascending[-1]),))
