"""`dedicated`: this package's quantizer run once for each level, with a single level each.

Same search, rotation, scales and effort as `drop`; each level has a universal set trained for it
alone, and its error is the whole loss. What `drop` loses against it is the price of nesting.

Sets for single levels do not ship with the package; `universal_set` trains each once
(up to a minute) and keeps it in the user's cache. That is not part of quantizing a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from . import drop
from .suite import Suite
from .suite import dedicated as suite_of


def dedicated(
    weights: Mapping[str, Tensor], gram: Tensor, levels: Sequence[int], preset: str, seed: int
) -> dict[str, Suite]:
    """Encode the matrices of an input group; arguments as `drop.drop`."""
    runs = {p: drop.drop(weights, gram, [p], preset, seed) for p in levels}
    return {name: suite_of({p: runs[p][name].levels[p] for p in levels}) for name in weights}


def prepare(levels: Sequence[int]) -> None:
    """Train the universal sets of single levels that are not in the cache."""
    for p in levels:
        drop.prepare([p])
