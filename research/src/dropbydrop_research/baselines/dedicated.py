"""`dedicated`: this package's quantizer run once for each level, with a single level each.

Same search, rotation, scales and effort as `drop`; its error is the whole loss. What `drop` loses
against it is the price of nesting. `trellis-dedicated` is the same for `trellis`.

Each level of byte planes has a universal set trained for it alone. Sets that do not ship with the
package are trained once (up to a minute) and kept in the user's cache; that is not part of
quantizing a model. A level of trellis planes has the planes and codebooks that it reads of the
nested set: on white noise nothing is gained by training them for it alone (docs/trellis.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from . import drop
from .suite import Suite
from .suite import dedicated as suite_of


def dedicated(
    weights: Mapping[str, Tensor],
    gram: Tensor,
    levels: Sequence[int],
    preset: str,
    seed: int,
    code: str = "bytes",
) -> dict[str, Suite]:
    """Encode the matrices of an input group; arguments as `drop.drop`."""
    runs = {p: drop.drop(weights, gram, [p], preset, seed, code=code) for p in levels}
    return {name: suite_of({p: runs[p][name].levels[p] for p in levels}) for name in weights}


def prepare(levels: Sequence[int]) -> None:
    """Train the universal sets of single levels that are not in the cache."""
    for p in levels:
        drop.prepare([p])
