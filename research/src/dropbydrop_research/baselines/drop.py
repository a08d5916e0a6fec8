"""`drop`: this package's quantizer, one nested code for all levels, as `quantize` runs it.

The matrices of an input group share a rotation, so this method takes a group rather than a matrix.
Signs and input scales are counted with the first matrix of the group; codebooks and odd factors are
stored once a checkpoint (`shared_bytes`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from dropbydrop.coding.code import ENTRIES, GROUP
from dropbydrop.coding.codebooks import default_lambdas, universal_set
from dropbydrop.coding.encoder import EFFORTS, encode_group, group_rotation
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
) -> dict[str, Suite]:
    """Encode the matrices of an input group.

    Args:
        weights: module -> float32 [d_out, d_in]; gram [d_in, d_in] of their common input.
        preset: search effort: fast, balanced or best.
        seed: seed of the rotation.
        supervision: levels and weights in J, up to the highest of `levels`; None: the default.

    Raises:
        CalibrationError: H is not finite or not positive definite even after damping.
    """
    chosen = tuple(sorted(levels))
    d_in = gram.shape[0]
    rotation = group_rotation(weights, gram, seed)
    at, lambdas = supervision or Supervision.default(chosen)
    books = universal_set(at, lambdas).to(gram.device)
    coded = encode_group(weights, gram, rotation, books, at, lambdas, EFFORTS[preset])
    suites, inputs = {}, d_in
    for name, code in coded.items():
        scales = code.scales.float()[:, None]
        fixed = 2 * len(scales) + inputs
        plane = code.codes[0].numel()
        sums = books.sums(code.codes, len(scales), chosen)  # [d_out, d_in] each
        served = {
            p: Level(rotation.transpose(scales * q), p * plane + fixed)
            for p, q in zip(chosen, sums, strict=True)
        }
        suites[name] = Suite(served, (chosen[-1] * plane + fixed,))
        inputs = 0
    return suites


def prepare(levels: Sequence[int], supervision: Supervision | None = None) -> None:
    """Train the universal set for these levels if it neither ships nor is in the cache."""
    universal_set(*(supervision or Supervision.default(levels)))


def shared_bytes(level: int, widths: Collection[int]) -> int:
    """What a checkpoint stores once: the universal codebooks of `level` planes in float16 (halves,
    by sign symmetry) and, for inputs of these widths, the odd factors of rotations in float32."""
    odd = {split_odd(d_in)[1] for d_in in widths} - {1}
    return level * ENTRIES // 2 * GROUP * 2 + sum(4 * size * size for size in odd)
