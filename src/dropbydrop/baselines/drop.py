"""`drop`: this package's quantizer, one nested code for all levels, as `quantize` runs it.

The matrices of a site share a rotation, so this method takes a site rather than a matrix. Signs are
counted with the site's first matrix; codebooks and odd factors are stored once a checkpoint
(`shared_bytes`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from ..code import ENTRIES, GROUP
from ..encoder import EFFORTS, encode_site
from ..refit import prefixes
from ..rotation import Rotation, split_odd
from ..study.encode import codebooks_for
from ..universal import default_lambdas
from .suite import Level, Suite


def drop(
    weights: Mapping[str, Tensor], gram: Tensor, levels: Sequence[int], preset: str, seed: int
) -> dict[str, Suite]:
    """Encode the matrices of a site.

    Args:
        weights: module -> float32 [d_out, d_in]; gram [d_in, d_in] of their common input.
        preset: search effort: fast, balanced or best.
        seed: of the rotation.

    Raises:
        CalibrationError: H is not finite or not positive definite even after damping.
    """
    chosen = tuple(sorted(levels))
    d_in = gram.shape[0]
    rotation = Rotation.make(d_in, seed=seed).to(gram.device)
    books = codebooks_for(chosen).to(gram.device)
    lambdas = default_lambdas(chosen)
    coded = encode_site(weights, gram, rotation, books, chosen, lambdas, EFFORTS[preset])
    suites, signs = {}, -(-d_in // 8)
    for name, code in coded.items():
        scales = code.scales.float()[:, None]
        fixed = 2 * len(scales) + signs
        plane = code.codes[0].numel()
        served = {
            p: Level(rotation.inverse(scales * q), p * plane + fixed)
            for p, q in zip(chosen, prefixes(code.codes, books, chosen), strict=True)
        }
        suites[name] = Suite(served, (chosen[-1] * plane + fixed,))
        signs = 0
    return suites


def prepare(levels: Sequence[int]) -> None:
    """Train the universal set for these levels if it neither ships nor is in the cache."""
    codebooks_for(sorted(levels))


def shared_bytes(level: int, widths: Collection[int]) -> int:
    """What a checkpoint stores once: the universal codebooks of `level` planes in float16 (halves,
    by sign symmetry) and, for inputs of these widths, the odd factors of rotations in float32."""
    odd = {split_odd(d_in)[1] for d_in in widths} - {1}
    return level * ENTRIES // 2 * GROUP * 2 + sum(4 * size * size for size in odd)
