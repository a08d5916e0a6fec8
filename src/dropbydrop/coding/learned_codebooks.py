"""Learned codebooks: one set for each input group, fitted to its matrices under its H.

Every input group starts from the universal set and its codes. Then, up to ROUNDS times: all
codebooks at once by conjugate gradients on J (refit.py), over the matrices of the input group
together, since they share look-up tables; rounding to float16, as stored; row scales in closed
form; sweeps. A round that does not lower J is not kept, so a learned set is never worse in J than
the universal one.

What it costs: 16 bits for each of M * 128 * 8 values an input group, 4 KiB at 2 planes and 8 KiB
at 4, against nothing; and several times the search. What it brings shrinks as rotation and row
scales do their work; docs/log.md has both measured, and why the universal set is the default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from .encoder import Effort, Encoded, GroupEncoder
from .refit import refit_codebooks
from .rotation import Rotation

ROUNDS = 5


def learn_group(
    weights: Mapping[str, Tensor],
    gram: Tensor,
    rotation: Rotation,
    codebooks: Tensor,
    levels: Sequence[int],
    lambdas: Sequence[float],
    effort: Effort,
    backend: str | None = None,
    rounds: int = ROUNDS,
) -> tuple[dict[str, Encoded], Tensor]:
    """Encode all matrices of an input group with codebooks fitted to them.

    Args:
        codebooks: the start, float32 [M, K/2, g]. The others are those of `encode_group`.
        rounds: the most that are tried.

    Returns:
        The matrices, and the input group's codebooks: float32 [M, K/2, g], exact in float16.

    Raises:
        CalibrationError: H is not finite or not positive definite even after damping.
    """
    encoder = GroupEncoder(next(iter(weights)), gram, rotation, levels, lambdas, effort, backend)
    coded = [encoder.encode(weight, codebooks) for weight in weights.values()]
    lowest = sum(encoder.value(x, codebooks) for x in coded)
    for _ in range(rounds):
        books = refit_codebooks(coded, encoder.h, codebooks, levels, [lambdas] * len(coded))
        books = books.half().float()
        trial = [encoder.search(encoder.rescale(x, books), books) for x in coded]
        value = sum(encoder.value(x, books) for x in trial)
        if not value < lowest:
            break
        coded, codebooks, lowest = trial, books, value
    results = {name: encoder.result(x, codebooks) for name, x in zip(weights, coded, strict=True)}
    return results, codebooks
