"""The package's own quantizer in the form that the `refinement` study asks for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dropbydrop.coding.codebooks import default_lambdas, ships, train, universal_set
from dropbydrop.coding.encoder import EFFORTS, encode_group, group_rotation
from dropbydrop.coding.refit import prefixes
from dropbydrop.system.atomic_folder import replacing
from dropbydrop.system.cache import cache_dir
from dropbydrop.system.version import __version__

if TYPE_CHECKING:
    from .refinement import Encode


def codebooks_for(levels: Sequence[int], lambdas: Sequence[float] | None = None) -> Tensor:
    """The universal set for these levels, float32 [M, K/2, g]; kept in the user's cache.

    Sets that do not ship with the package take a while to train; the cache is keyed by
    levels, their weights (`lambdas`, None for the default ones) and the version, and one that
    cannot be read is trained again.
    """
    levels = tuple(levels)
    usual = lambdas is None or list(lambdas) == default_lambdas(levels)
    if usual and ships(levels):
        return universal_set(levels)
    weights = default_lambdas(levels) if lambdas is None else list(lambdas)
    key = json.dumps([levels, weights, __version__])
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    path = cache_dir() / "universal" / f"{name}.safetensors"
    try:
        return load_file(path)["codebooks"].to(torch.float32)
    except (OSError, SafetensorError, KeyError):
        codebooks = universal_set(levels) if usual else train(levels, weights)
    # a cache that cannot be written costs time, nothing else
    with suppress(OSError, SafetensorError), replacing(path) as partial:
        save_file({"codebooks": codebooks.contiguous()}, partial)
    return codebooks


def package_encoder(preset: str = "balanced", seed: int = 0) -> Encode:
    """encode(W, H, levels) with rotation, universal codebooks and row scales.

    Input scales are those of the matrix alone; in a checkpoint the matrices of an input group
    share them. Beyond the codes it spends 16 bits a row: pass `overhead=overhead(d_in)` to the
    study. A set of levels that does not ship with the package is trained first, see
    `codebooks_for`.
    """

    def encode(weight: Tensor, h: Tensor, levels: Sequence[int], /) -> list[Tensor]:
        chosen = tuple(levels)
        codebooks = codebooks_for(chosen)
        rotation = group_rotation({"w": weight}, h, seed)
        lambdas = default_lambdas(chosen)
        effort = EFFORTS[preset]
        coded = encode_group({"w": weight}, h, rotation, codebooks, chosen, lambdas, effort)["w"]
        scales = coded.scales.to(weight.dtype)[:, None]
        every = range(1, chosen[-1] + 1)
        return [rotation.transpose(scales * q) for q in prefixes(coded.codes, codebooks, every)]

    return encode


def overhead(d_in: int) -> float:
    """Bits a weight of the float16 row scales.

    Not counted: a byte an input for sign and input scale, which is 8 / d_out bits here but shared
    by all matrices of an input group in a checkpoint, and the universal codebooks, which are part
    of the package.
    """
    return 16 / d_in
