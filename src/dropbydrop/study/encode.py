"""The package's own quantizer in the form that the `refinement` study asks for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..encoder import EFFORTS, encode_site
from ..refit import prefixes
from ..rotation import Rotation
from ..universal import default_lambdas, universal_set
from .refinement import Encode


def package_encoder(preset: str = "balanced", seed: int = 0) -> Encode:
    """encode(W, H, levels) with rotation, universal codebooks and row scales.

    Beyond the codes it spends 16 bits a row: pass `overhead=overhead(d_in)` to the study. A set of
    levels that does not ship with the package is trained first, in about a minute each.
    """

    def encode(weight: Tensor, h: Tensor, levels: Sequence[int], /) -> list[Tensor]:
        chosen = tuple(levels)
        codebooks = universal_set(chosen)
        rotation = Rotation.make(weight.shape[1], seed=seed)
        lambdas = default_lambdas(chosen)
        effort = EFFORTS[preset]
        coded = encode_site({"w": weight}, h, rotation, codebooks, chosen, lambdas, effort)["w"]
        scales = coded.scales.to(weight.dtype)[:, None]
        every = range(1, chosen[-1] + 1)
        return [rotation.inverse(scales * q) for q in prefixes(coded.codes, codebooks, every)]

    return encode


def overhead(d_in: int) -> float:
    """Bits a weight of the float16 row scales. Signs and universal codebooks are not counted: the
    former are one bit an input, shared by all rows, the latter part of the package."""
    return 16 / d_in
