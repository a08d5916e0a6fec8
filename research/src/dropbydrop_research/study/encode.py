"""The package's own quantizer in the form that the `refinement` study asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from dropbydrop.coding.codebooks import default_lambdas, universal_set
from dropbydrop.coding.encoder import EFFORTS, encode_group, group_rotation

if TYPE_CHECKING:
    from .refinement import Encode


def package_encoder(preset: str = "balanced", seed: int = 0) -> Encode:
    """encode(W, H, levels) with rotation, universal codebooks of byte planes and row scales.

    Input scales are those of the matrix alone; in a checkpoint the matrices of an input group
    share them. Beyond the codes it spends 16 bits a row: pass `overhead=overhead(d_in)` to the
    study. A set of levels that does not ship with the package is trained first, once a machine
    (coding/codebooks.py).
    """

    def encode(weight: Tensor, h: Tensor, levels: Sequence[int], /) -> list[Tensor]:
        chosen = tuple(levels)
        books = universal_set(chosen)
        rotation = group_rotation({"w": weight}, h, seed)
        lambdas = default_lambdas(chosen)
        effort = EFFORTS[preset]
        coded = encode_group({"w": weight}, h, rotation, books, chosen, lambdas, effort)["w"]
        scales = coded.scales.to(weight.dtype)[:, None]
        sums = books.sums(coded.codes, len(weight), range(1, chosen[-1] + 1))
        return [rotation.transpose(scales * q) for q in sums]

    return encode


def overhead(d_in: int) -> float:
    """Bits a weight of the float16 row scales.

    Not counted: a byte an input for sign and input scale, which is 8 / d_out bits here but shared
    by all matrices of an input group in a checkpoint, and the universal codebooks, which are part
    of the package.
    """
    return 16 / d_in
