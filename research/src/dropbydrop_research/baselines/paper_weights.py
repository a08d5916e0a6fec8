"""`paper-weights`: this package's quantizer under the level weights that the paper states.

Same search, rotation, scales and effort as `drop`. Where `drop` supervises every level by
`codebooks.default_lambdas`, this one supervises the lowest and the highest alone, one half each
on their raw errors, as the paper does for 3 and 5 bits (arXiv 2606.12876). Raw errors fall by about
3.5 a level, so the lowest dominates; what lies between is whatever its codes give. The universal
set is trained with the same weights (`coding.codebooks.universal_set`), once a machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from . import drop
from .suite import Suite


def supervision(levels: Sequence[int]) -> drop.Supervision:
    """Lowest and highest level, one half each; a single level has all the weight."""
    ends = tuple(sorted({min(levels), max(levels)}))
    return drop.Supervision(ends, (1 / len(ends),) * len(ends))


def paper_weights(
    weights: Mapping[str, Tensor], gram: Tensor, levels: Sequence[int], preset: str, seed: int
) -> dict[str, Suite]:
    """Encode the matrices of an input group; arguments as `drop.drop`."""
    return drop.drop(weights, gram, levels, preset, seed, supervision(levels))


def prepare(levels: Sequence[int]) -> None:
    """Train the universal set of these weights if it is not in the cache."""
    drop.prepare(levels, supervision(levels))
