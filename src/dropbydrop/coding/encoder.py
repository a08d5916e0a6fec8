"""Encode the matrices of one input group: rotate, condition, search, refit.

Steps, for the matrices W of an input group that share an input with Gram matrix H:
    1. rotate: W' = W Q^-1, H' = Q H Q^T (rotation.py), Q with input scales that suit W and H
       (channel_scaling.py); condition H' and factor it in float64 (objective.py). Done once an
       input group.
    2. start: row scales = rms of the rows; codes by error feedback with the universal set; then
       descent sweeps.
    3. for every further round: row scales in closed form, then sweeps with the new scales. A round
       that does not lower J is not kept.
    4. scales are rounded to float16 before the last sweeps, so the codes fit what is stored.
The weights of the levels (codebooks.default_lambdas) are those the universal set was trained with.
Learned codebooks (`learn_group`) start from the result. Up to LEARNING_ROUNDS times: all codebooks
by conjugate gradients on J (refit.py), over the matrices of the input group together, since
they share look-up tables; rounding to float16, as stored; row scales in closed form; sweeps. A
round that does not lower J is not kept, so a learned set is never worse in J than the universal
one. It costs 16 bits for each of M * 128 * 8 values an input group (4 KiB at 2 planes, 8 KiB at 4),
against nothing, and several times the search. What it brings shrinks as rotation and row scales do
their work; docs/log.md has both measured, and why the universal set is the default.

Pure computation: no files, no models. Everything runs on the device of its inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dropbydrop.system.errors import CalibrationError

from .channel_scaling import input_scales_of
from .objective import Coded, condition, descent_metric, feedback_metric, objective, weighted_errors
from .refit import refit_codebooks, refit_scales
from .rotation import Rotation
from .search import search

DAMP = 0.2  # of the mean diagonal; with less, the lowest level shapes its noise so hard that the
# levels above start from large errors in weak directions (docs/log.md)

LEARNING_ROUNDS = 5


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


class GroupEncoder:
    """The search and the refit of scales for the matrices of one input group.

    Rotates, conditions and factors H once. Its methods take and return matrices in rotated
    coordinates (`Coded`) and change nothing in place.

    Args:
        name: of one of the matrices, for messages.
        gram: H = E[x x^T] of the unrotated inputs, float32 [d_in, d_in].
        levels, lambdas: supervised prefixes and their weights in J.

    Raises:
        CalibrationError: H is not finite or not positive definite even after damping.
    """

    def __init__(
        self,
        name: str,
        gram: Tensor,
        rotation: Rotation,
        levels: Sequence[int],
        lambdas: Sequence[float],
        effort: Effort,
        backend: str | None = None,
    ) -> None:
        self.rotation, self.levels, self.lambdas = rotation, levels, lambdas
        self.effort, self.backend = effort, backend
        self._gram = rotation.apply_gram(gram)
        try:
            h = condition(self._gram, DAMP)
            self._feedback, self._descent = feedback_metric(h), descent_metric(h)
        except torch.linalg.LinAlgError as error:
            raise CalibrationError(
                f"the inputs of {name} have no usable statistics ({error}); "
                "calibrate on more, or different, text."
            ) from error
        self.h = h.to(torch.float32)  # conditioned, [d_in, d_in]

    def value(self, coded: Coded, codebooks: Tensor) -> float:
        """J of one matrix; codebooks float32 [M, K/2, g], as for the other methods."""
        return objective(coded, self.h, codebooks, self.levels, self.lambdas)

    def search(self, coded: Coded, codebooks: Tensor, start: bool = False) -> Coded:
        """New codes [M, d_out, G]: by sweeps from those it has or, with `start`, from none."""
        codes, _ = search(
            coded.weight / coded.scales[:, None],
            codebooks,
            self.levels,
            self.lambdas,
            beam=self.effort.beam,
            sweeps=self.effort.sweeps,
            feedback=self._feedback,
            descent=self._descent,
            codes=None if start else coded.codes,
            backend=self.backend,
        )
        return replace(coded, codes=codes)

    def rescale(self, coded: Coded, codebooks: Tensor) -> Coded:
        """Scales [d_out] in closed form, as they will be stored."""
        scales = refit_scales(coded, self.h, codebooks, self.levels, self.lambdas)
        return replace(coded, scales=stored_scales(scales))

    def encode(self, weight: Tensor, codebooks: Tensor) -> Coded:
        """Steps 2 to 4 of the module's note, for a matrix float32 [d_out, d_in], unrotated."""
        w = self.rotation.apply_weight(weight)
        none = torch.empty(0, dtype=torch.uint8, device=w.device)
        scaled = Coded(w, stored_scales(w.square().mean(1).sqrt()), none)
        best = self.search(scaled, codebooks, start=True)
        lowest = self.value(best, codebooks)
        for _ in range(self.effort.rounds):
            trial = self.search(self.rescale(best, codebooks), codebooks)
            value = self.value(trial, codebooks)
            if value >= lowest:
                break
            best, lowest = trial, value
        return best

    def result(self, coded: Coded, codebooks: Tensor) -> Encoded:
        """What is stored of a matrix, and its errors; codebooks float32 [M, K/2, g]."""
        decoded = [coded.scales[:, None] * q for q in coded.sums(codebooks, self.levels)]
        errors = weighted_errors(coded.weight, decoded, self._gram)
        return Encoded(coded.codes, coded.scales.half(), errors)


def group_rotation(weights: Mapping[str, Tensor], gram: Tensor, seed: int) -> Rotation:
    """The rotation of an input group: full mixing, with input scales for these matrices and this H.

    Args:
        weights: module name -> [d_out, d_in], unrotated.
        gram: H = E[x x^T] of the unrotated inputs, float32 [d_in, d_in]; the result is where it is.
        seed: for the signs.
    """
    input_scales = input_scales_of(weights.values(), gram)
    return Rotation.make(gram.shape[0], seed=seed).scale(input_scales).to(gram.device)


def encode_group(
    weights: Mapping[str, Tensor],
    gram: Tensor,
    rotation: Rotation,
    codebooks: Tensor,
    levels: Sequence[int],
    lambdas: Sequence[float],
    effort: Effort,
    backend: str | None = None,
) -> dict[str, Encoded]:
    """Encode all matrices of an input group with given codebooks.

    Args:
        weights: module name -> float32 [d_out, d_in], unrotated.
        gram: H = E[x x^T] of the unrotated inputs, float32 [d_in, d_in].
        rotation: the input group's, as `group_rotation` makes it.
        codebooks: float32 [M, K/2, g].
        levels, lambdas: supervised prefixes and their weights in J.
        backend: of the search, by name; None takes the best here.

    Returns:
        module name -> codes, scales and errors.

    Raises:
        CalibrationError: H is not finite or not positive definite even after damping.
    """
    encoder = GroupEncoder(next(iter(weights)), gram, rotation, levels, lambdas, effort, backend)
    return {
        name: encoder.result(encoder.encode(weight, codebooks), codebooks)
        for name, weight in weights.items()
    }


def learn_group(
    weights: Mapping[str, Tensor],
    gram: Tensor,
    rotation: Rotation,
    codebooks: Tensor,
    levels: Sequence[int],
    lambdas: Sequence[float],
    effort: Effort,
    backend: str | None = None,
    rounds: int = LEARNING_ROUNDS,
) -> tuple[dict[str, Encoded], Tensor]:
    """Encode all matrices of an input group with codebooks fitted to them.

    Args: those of `encode_group`; `codebooks` is the start, `rounds` the most that are tried.

    Returns:
        The matrices, and the input group's codebooks: float32 [M, K/2, g], exact in float16.
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


def stored_scales(scales: Tensor) -> Tensor:
    """Scales [d_out] as a float16 tensor would give them back; rows of zeros get the smallest."""
    return scales.clamp(min=1e-6, max=6.5e4).half().float()
