"""Encode the matrices of one input site: rotate, condition, search, refit.

Steps, for the matrices W of a site that share an input with Gram matrix H:
    1. rotate: W' = W Q^T, H' = Q H Q^T (rotation.py); condition H' and factor it in float64
       (objective.py). Done once a site.
    2. start: row scales = rms of the rows; codes by error feedback with the universal set; then
       descent sweeps.
    3. for every further round: row scales in closed form, then sweeps with the new scales. A round
       that does not lower J is not kept.
    4. scales are rounded to float16 before the last sweeps, so the codes fit what is stored.
The weights of the levels (universal.default_lambdas) are those the universal set was trained with.

Pure computation: no files, no models. Everything runs on the device of its inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import CalibrationError
from .objective import condition, descent_metric, feedback_metric, weighted_errors
from .refit import Coded, objective, prefixes, refit_scales
from .rotation import Rotation
from .search import search

DAMP = 0.1  # of the mean diagonal; below it the lowest level shapes its noise so hard that the
# levels above start from large errors in weak directions (docs/log.md)


@dataclass(frozen=True)
class Effort:
    """How hard the search tries. All of it follows from the preset."""

    beam: int  # candidates kept between stages
    sweeps: int  # descent sweeps a round
    rounds: int  # scale refit + sweeps, after the first


EFFORTS = {
    "fast": Effort(beam=8, sweeps=1, rounds=1),
    "balanced": Effort(beam=16, sweeps=3, rounds=1),
    "best": Effort(beam=32, sweeps=4, rounds=3),
}


@dataclass(frozen=True)
class Encoded:
    """One matrix, coded.

    Attributes:
        codes: uint8 [M, d_out, G].
        scales: float16 [d_out].
        errors: relative weighted error tr(E H E^T) / tr(W H W^T) at each supervised level, under
            the clipped, undamped H.
    """

    codes: Tensor
    scales: Tensor
    errors: list[float]


def encode_site(
    weights: Mapping[str, Tensor],
    gram: Tensor,
    rotation: Rotation,
    codebooks: Tensor,
    levels: Sequence[int],
    lambdas: Sequence[float],
    effort: Effort,
    backend: str | None = None,
) -> dict[str, Encoded]:
    """Encode all matrices of a site.

    Args:
        weights: module name -> float32 [d_out, d_in], unrotated.
        gram: H = E[x x^T] of the unrotated inputs, float32 [d_in, d_in].
        rotation: of the site.
        codebooks: float32 [M, K/2, g].
        levels, lambdas: supervised prefixes and their weights in J.

    Raises:
        CalibrationError: H is not finite or not positive definite even after damping.
    """
    rotated = rotation.apply_gram(gram)
    try:
        h = condition(rotated, DAMP)
        feedback, descent = feedback_metric(h), descent_metric(h)
    except torch.linalg.LinAlgError as error:
        raise CalibrationError(
            f"the inputs of {next(iter(weights))} have no usable statistics ({error}); "
            "calibrate on more, or different, text."
        ) from error
    h32 = h.to(torch.float32)

    def improve(coded: Coded, start: bool) -> Coded:
        codes, _ = search(
            coded.weight / coded.scales[:, None],
            codebooks,
            levels,
            lambdas,
            beam=effort.beam,
            sweeps=effort.sweeps,
            feedback=feedback,
            descent=descent,
            codes=None if start else coded.codes,
            backend=backend,
        )
        return replace(coded, codes=codes)

    out = {}
    for name, weight in weights.items():
        w = rotation.apply_weight(weight)
        none = torch.empty(0, dtype=torch.uint8, device=w.device)
        best = improve(Coded(w, stored_scales(w.square().mean(1).sqrt()), none), start=True)
        lowest = objective(best, h32, codebooks, levels, lambdas)
        for _ in range(effort.rounds):
            scales = stored_scales(refit_scales(best, h32, codebooks, levels, lambdas))
            trial = improve(replace(best, scales=scales), start=False)
            value = objective(trial, h32, codebooks, levels, lambdas)
            if value >= lowest:
                break
            best, lowest = trial, value
        decoded = [best.scales[:, None] * q for q in prefixes(best.codes, codebooks, levels)]
        errors = weighted_errors(w, decoded, rotated)
        out[name] = Encoded(best.codes, best.scales.half(), errors)
    return out


def stored_scales(scales: Tensor) -> Tensor:
    """Scales [d_out] as a float16 tensor would give them back; rows of zeros get the smallest."""
    return scales.clamp(min=1e-6, max=6.5e4).half().float()
