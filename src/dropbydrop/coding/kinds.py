"""The search of a kind of planes, made ready for one H: all that the encoder sees of kinds.

    kind      forms of H                               start                      sweeps
    bytes     two packings by groups (objective.py)    feedback, beam (search/)   groups, beam
    trellis   its Cholesky factor and H itself         feedback (trellis/)        columns, Viterbi

Factors are made once an input group and shared by its matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from . import search as byte_search
from . import trellis
from .codebook_set import BytesSet, CodebookSet, TrellisSet
from .objective import descent_metric, feedback_metric


class PreparedSearch(Protocol):
    """Codes of planes 1..M of a matrix under one H."""

    def __call__(
        self, w: Tensor, scales: Tensor, books: CodebookSet, codes: list[Tensor] | None
    ) -> list[Tensor]:
        """Search from `codes`, or from none.

        Args:
            w: float32 [d_out, d_in], rows divided by their scale, in rotated coordinates.
            scales: of the rows, float32 [d_out]: an error of row r counts scales[r]^2.
        """


def backends(kind: str, device: torch.device | str = "cpu") -> list[str]:
    """Search backends of a kind on a device, best first."""
    return trellis.backends(device) if kind == "trellis" else byte_search.backends(device)


def prepare_search(
    kind: str,
    h: Tensor,
    prefixes: Sequence[int],
    lambdas: Sequence[float],
    *,
    beam: int,
    sweeps: int,
    backend: str | None,
) -> PreparedSearch:
    """The search of a kind of planes.

    Args:
        h: conditioned, float64 [d_in, d_in].
        prefixes: planes that each supervised level reads; lambdas: weights of the levels in J.
        beam: candidates that the search of byte planes keeps. sweeps: of descent.

    Raises:
        torch.linalg.LinAlgError: H is not positive definite.
    """
    if kind == "trellis":
        return TrellisSearch(h, prefixes, lambdas, sweeps, backend)
    return BytesSearch(h, prefixes, lambdas, beam, sweeps, backend)


class BytesSearch:
    """See `PreparedSearch`; rows do not see each other, so their scales do not matter."""

    def __init__(
        self,
        h: Tensor,
        prefixes: Sequence[int],
        lambdas: Sequence[float],
        beam: int,
        sweeps: int,
        backend: str | None,
    ) -> None:
        self._prefixes, self._lambdas = prefixes, lambdas
        self._beam, self._sweeps, self._backend = beam, sweeps, backend
        self._feedback, self._descent = feedback_metric(h), descent_metric(h)

    def __call__(
        self, w: Tensor, scales: Tensor, books: CodebookSet, codes: list[Tensor] | None
    ) -> list[Tensor]:
        """See `PreparedSearch`."""
        assert isinstance(books, BytesSet)
        found, _ = byte_search.search(
            w,
            books.stacked,
            self._prefixes,
            self._lambdas,
            beam=self._beam,
            sweeps=self._sweeps,
            feedback=self._feedback,
            descent=self._descent,
            codes=None if codes is None else torch.stack(codes),
            backend=self._backend,
        )
        return list(found)


class TrellisSearch:
    """See `PreparedSearch`; a stream runs down the rows, and their weights decide between them.

    A start takes no sweeps: they are worth more once scales are refit, and one is nearly all.
    """

    def __init__(
        self,
        h: Tensor,
        prefixes: Sequence[int],
        lambdas: Sequence[float],
        sweeps: int,
        backend: str | None,
    ) -> None:
        self._prefixes, self._lambdas = prefixes, lambdas
        self._sweeps, self._backend = sweeps, backend
        self._lower = torch.linalg.cholesky(h).float().contiguous()
        self._h = h.float() if sweeps else None

    def __call__(
        self, w: Tensor, scales: Tensor, books: CodebookSet, codes: list[Tensor] | None
    ) -> list[Tensor]:
        """See `PreparedSearch`; without sweeps given codes are as good as they get."""
        assert isinstance(books, TrellisSet)
        if codes is not None and not self._sweeps:
            return codes
        given: Any = {"lower": self._lower}
        if codes is not None:
            given = {"codes": codes, "h": self._h, "sweeps": self._sweeps}
        rows = scales.square()
        return trellis.search(
            w, rows, books, self._prefixes, self._lambdas, backend=self._backend, **given
        )
