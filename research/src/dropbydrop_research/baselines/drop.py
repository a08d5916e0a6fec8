"""`drop`: this package's quantizer, one nested code for all levels, as `quantize` runs it.

`trellis` is the same with trellis planes (`--code trellis`). The matrices of an input group share a
rotation, so this method takes a group rather than a matrix. Signs and input scales are counted with
the first matrix of the group; codebooks and odd factors are stored once a checkpoint
(`shared_bytes`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from dropbydrop.coding.codebooks import default_lambdas, universal_set
from dropbydrop.coding.encoder import EFFORTS, encode_group, group_rotation
from dropbydrop.coding.planes import WINDOWS, counts_of, planes_of
from dropbydrop.coding.rotation import split_odd

from .suite import Level, Suite


class Supervision(NamedTuple):
    """Which levels J sums over, ascending, and their weights."""

    levels: tuple[int, ...]
    lambdas: tuple[float, ...]

    @classmethod
    def default(cls, levels: Sequence[int]) -> Supervision:
        """Every level, as `quantize` weights them."""
        chosen = tuple(sorted(levels))
        return cls(chosen, tuple(default_lambdas(chosen)))


def drop(
    weights: Mapping[str, Tensor],
    gram: Tensor,
    levels: Sequence[int],
    preset: str,
    seed: int,
    supervision: Supervision | None = None,
    code: str = "bytes",
) -> dict[str, Suite]:
    """Encode the matrices of an input group.

    Args:
        weights: module -> float32 [d_out, d_in]; gram [d_in, d_in] of their common input.
        preset: search effort: fast, balanced or best.
        seed: seed of the rotation.
        supervision: levels and weights in J, up to the highest of `levels`; None: the default.
        code: kind of the planes.

    Raises:
        CalibrationError: H is not finite or not positive definite even after damping.
        PrecisionError: levels that trellis planes do not have.
    """
    chosen, effort = tuple(sorted(levels)), EFFORTS[preset]
    d_in = gram.shape[0]
    rotation = group_rotation(weights, gram, seed)
    at, lambdas = supervision or Supervision.default(chosen)
    books = universal_set(at, lambdas, code, effort.window).to(gram.device)
    coded = encode_group(weights, gram, rotation, books, at, lambdas, effort)
    prefixes = counts_of(books.planes, chosen)
    suites, inputs = {}, d_in
    for name, found in coded.items():
        scales = found.scales.float()[:, None]
        sizes = [plane.nbytes(len(scales), d_in) for plane in books.planes]
        fixed = 2 * len(scales) + inputs
        sums = books.sums(found.codes, len(scales), prefixes)  # [d_out, d_in] each
        served = {
            p: Level(rotation.transpose(scales * q), sum(sizes[:count]) + fixed)
            for p, count, q in zip(chosen, prefixes, sums, strict=True)
        }
        suites[name] = Suite(served, (sum(sizes) + fixed,))
        inputs = 0
    return suites


def prepare(levels: Sequence[int], supervision: Supervision | None = None) -> None:
    """Train the universal set for these levels if it neither ships nor is in the cache."""
    universal_set(*(supervision or Supervision.default(levels)))


def shared_bytes(level: int, widths: Collection[int], code: str = "bytes") -> int:
    """What a checkpoint stores once: the universal codebooks of a level's planes as they are stored
    (of trellis planes about 80 bytes each, with the longest window) and, for inputs of these
    widths, the odd factors of rotations in float32."""
    odd = {split_odd(d_in)[1] for d_in in widths} - {1}
    books = sum(plane.codebook_bytes for plane in planes_of(code, (level,), WINDOWS[-1]))
    return books + sum(4 * size * size for size in odd)
