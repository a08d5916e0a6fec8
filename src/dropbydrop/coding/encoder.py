"""Encode the matrices of one input group: rotate, condition, search, refit.

Steps, for the matrices W of an input group that share an input with Gram matrix H:
    1. rotate: W' = W Q^-1, H' = Q H Q^T (rotation.py), Q with input scales that suit W and H
       (channel_scaling.py); condition H' and factor it in float64 (objective.py). Done once an
       input group.
    2. start: row scales = rms of the rows; codes by error feedback with the universal set; then
       descent sweeps. kinds.py chooses the search of the kind of planes.
    3. for every further round: row scales in closed form, then sweeps with the new scales. A round
       that does not lower J is not kept.
    4. scales are rounded to float16 before the last sweeps, so the codes fit what is stored.
The weights of the levels (codebooks.default_lambdas) are those the universal set was trained with.
Learned codebooks (`learn_group`, byte planes) start from the result. Up to LEARNING_ROUNDS times:
all codebooks by conjugate gradients on J (refit.py), over the matrices of the input group together,
since they share look-up tables; rounding to float16, as stored; row scales in closed form; sweeps.
A round that does not lower J is not kept, so a learned set is never worse in J than the universal
one. It costs 16 bits for each of M * 128 * 8 values an input group (4 KiB at 2 planes, 8 KiB at 4),
against nothing, and several times the search. What it brings shrinks as rotation and row scales do
their work; docs/log.md has both measured, and why the universal set is the default.

Pure computation: no files, no models. Everything runs on the device of its inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from dropbydrop.system.errors import CalibrationError

from .channel_scaling import input_scales_of
from .codebook_set import BytesSet, CodebookSet
from .kinds import prepare_search
from .objective import Coded, condition, objective, weighted_errors
from .planes import PlaneSpec, counts_of
from .refit import refit_codebooks, refit_scales
from .rotation import Rotation

DAMP = 0.2  # of the mean diagonal; with less, the lowest level shapes its noise so hard that the
# levels above start from large errors in weak directions (docs/log.md)

LEARNING_ROUNDS = 5
K = TypeVar("K")  # what a matrix is called: a module, or a module and an expert


@dataclass(frozen=True)
class Effort:
    """How hard the search tries. All of it follows from the preset.

    Attributes:
        beam: candidates kept between stages, of byte planes.
        sweeps: descent sweeps a round, of byte planes.
        rounds: scale refit and sweeps, after the first.
        window: bits of the window of trellis planes, at most (`codebooks.universal_set`). Two more
            take twice the time and lower all errors by 2 to 3 %.
        trellis_sweeps: descent sweeps a round, of trellis planes; none after the start. One takes
            as long as the start; it lowers the errors of levels 2 and 3 by 1 %, and raises that of
            level 4 by as much, on the text of calibration and on other.
        guided: whether tokens count in H by the gradients of the loss at the outputs.
    """

    beam: int
    sweeps: int
    rounds: int
    window: int = 12
    trellis_sweeps: int = 0
    guided: bool = False


EFFORTS = {
    "fast": Effort(beam=8, sweeps=1, rounds=1),
    "balanced": Effort(beam=16, sweeps=3, rounds=1, window=14, guided=True),
    "best": Effort(beam=32, sweeps=4, rounds=3, window=16, trellis_sweeps=1, guided=True),
}


@dataclass(frozen=True)
class Encoded:
    """One matrix, coded.

    Attributes:
        codes: of each plane, as it is stored (`PlaneSpec.shape`).
        scales: float16 [d_out].
        errors: relative weighted error tr(E H E^T) / tr(W H W^T) at each supervised level, under
            the clipped, undamped H.
    """

    codes: list[Tensor]
    scales: Tensor
    errors: list[float]


class GroupEncoder:
    """The search and the refit of scales for the matrices of one input group.

    Rotates, conditions and factors H once. Its methods take and return matrices in rotated
    coordinates (`Coded`) and change nothing in place; codebooks may change between calls.

    Args:
        name: of one of the matrices, for messages.
        gram: H = E[x x^T] of the unrotated inputs, float32 [d_in, d_in].
        planes: those of all sets of codebooks it is given.
        levels, lambdas: supervised levels and their weights in J; the last reads all planes.

    Raises:
        CalibrationError: H is not finite or not positive definite even after damping.
    """

    def __init__(
        self,
        name: str,
        gram: Tensor,
        rotation: Rotation,
        planes: Sequence[PlaneSpec],
        levels: Sequence[int],
        lambdas: Sequence[float],
        effort: Effort,
        backend: str | None = None,
    ) -> None:
        self.rotation, self.lambdas, self.rounds = rotation, lambdas, effort.rounds
        self.prefixes = counts_of(planes, levels)
        self._gram = rotation.apply_gram(gram)
        kind = planes[0].kind
        sweeps = effort.trellis_sweeps if kind == "trellis" else effort.sweeps
        settings: Any = {"beam": effort.beam, "sweeps": sweeps, "backend": backend}
        try:
            h = condition(self._gram, DAMP)
            self._search = prepare_search(kind, h, self.prefixes, lambdas, **settings)
        except torch.linalg.LinAlgError as error:
            raise CalibrationError(
                f"the inputs of {name} have no usable statistics ({error}); "
                "calibrate on more, or different, text."
            ) from error
        self.h = h.to(torch.float32)  # conditioned, [d_in, d_in]

    def value(self, coded: Coded, books: CodebookSet) -> float:
        """J of one matrix."""
        return objective(coded, self.h, books, self.prefixes, self.lambdas)

    def search(self, coded: Coded, books: CodebookSet, start: bool = False) -> Coded:
        """New codes: by sweeps from those it has or, with `start`, from none."""
        scaled = coded.weight / coded.scales[:, None]
        codes = self._search(scaled, coded.scales, books, None if start else coded.codes)
        return replace(coded, codes=codes)

    def rescale(self, coded: Coded, books: CodebookSet) -> Coded:
        """Scales [d_out] in closed form, as they will be stored."""
        scales = refit_scales(coded, self.h, books, self.prefixes, self.lambdas)
        return replace(coded, scales=stored_scales(scales))

    def encode(self, weight: Tensor, books: CodebookSet) -> Coded:
        """Steps 2 to 4 of the module's note, for a matrix float32 [d_out, d_in], unrotated."""
        w = self.rotation.apply_weight(weight)
        scaled = Coded(w, stored_scales(w.square().mean(1).sqrt()), [])
        best = self.search(scaled, books, start=True)
        lowest = self.value(best, books)
        for _ in range(self.rounds):
            trial = self.search(self.rescale(best, books), books)
            value = self.value(trial, books)
            if value >= lowest:
                break
            best, lowest = trial, value
        return best

    def result(self, coded: Coded, books: CodebookSet) -> Encoded:
        """What is stored of a matrix, and its errors."""
        decoded = [coded.scales[:, None] * q for q in coded.sums(books, self.prefixes)]
        errors = weighted_errors(coded.weight, decoded, self._gram)
        return Encoded(coded.codes, coded.scales.half(), errors)


def group_rotation(weights: Mapping[Any, Tensor], gram: Tensor, seed: int) -> Rotation:
    """The rotation of an input group: full mixing, with input scales for these matrices and this H.

    Args:
        weights: module name -> [d_out, d_in], unrotated.
        gram: H = E[x x^T] of the unrotated inputs, float32 [d_in, d_in]; the result is where it is.
        seed: for the signs.
    """
    input_scales = input_scales_of(weights.values(), gram)
    return Rotation.make(gram.shape[0], seed=seed).scale(input_scales).to(gram.device)


def encode_group(
    weights: Mapping[K, Tensor],
    gram: Tensor,
    rotation: Rotation,
    books: CodebookSet,
    levels: Sequence[int],
    lambdas: Sequence[float],
    effort: Effort,
    backend: str | None = None,
) -> dict[K, Encoded]:
    """Encode all matrices of an input group with given codebooks.

    Args:
        weights: module name -> float32 [d_out, d_in], unrotated.
        gram: H = E[x x^T] of the unrotated inputs, float32 [d_in, d_in].
        rotation: the input group's, as `group_rotation` makes it.
        books: codebooks of planes 1..M, which say their kind.
        levels, lambdas: supervised levels and their weights in J; the last reads all planes.
        backend: of the search, by name; None takes the best here.

    Returns:
        module name -> codes, scales and errors.

    Raises:
        CalibrationError: H is not finite or not positive definite even after damping.
    """
    rest = (gram, rotation, books.planes, levels, lambdas, effort, backend)
    encoder = GroupEncoder(str(next(iter(weights))), *rest)
    return {
        name: encoder.result(encoder.encode(weight, books), books)
        for name, weight in weights.items()
    }


def learn_group(
    weights: Mapping[K, Tensor],
    gram: Tensor,
    rotation: Rotation,
    books: CodebookSet,
    levels: Sequence[int],
    lambdas: Sequence[float],
    effort: Effort,
    backend: str | None = None,
    rounds: int = LEARNING_ROUNDS,
) -> tuple[dict[K, Encoded], BytesSet]:
    """Encode all matrices of an input group with codebooks fitted to them.

    Args: those of `encode_group`; `books`, of byte planes, is the start, `rounds` the most that are
        tried.

    Returns:
        The matrices, and the input group's codebooks: exact in float16.
    """
    assert isinstance(books, BytesSet), "QuantizeConfig refuses to learn codebooks of other kinds"
    rest = (gram, rotation, books.planes, levels, lambdas, effort, backend)
    encoder = GroupEncoder(str(next(iter(weights))), *rest)
    coded = [encoder.encode(weight, books) for weight in weights.values()]
    lowest = sum(encoder.value(x, books) for x in coded)
    for _ in range(rounds):
        shared = (encoder.prefixes, [lambdas] * len(coded))
        fitted = refit_codebooks(coded, encoder.h, books.stacked, *shared)
        found = BytesSet.of(fitted.half().float())
        trial = [encoder.search(encoder.rescale(x, found), found) for x in coded]
        value = sum(encoder.value(x, found) for x in trial)
        if not value < lowest:
            break
        coded, books, lowest = trial, found, value
    results = {name: encoder.result(x, books) for name, x in zip(weights, coded, strict=True)}
    return results, books


def stored_scales(scales: Tensor) -> Tensor:
    """Scales [d_out] as a float16 tensor would give them back; rows of zeros get the smallest."""
    return scales.clamp(min=1e-6, max=6.5e4).half().float()
