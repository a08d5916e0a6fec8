"""Search of nested trellis codes: one entry point, several backends that can be asked for by name.

    backend     where                                   what it is
    avx512      x86-64 with AVX-512 F, BW, DQ and VL    native/trellis, 32 states in a vector
    avx2        x86-64 with AVX2 and FMA                native/trellis, 16 states in a vector
    portable    any machine the library was built for   native/trellis, 8 states in a vector
    triton      CUDA                                    torch's, with a Viterbi pass as one kernel
    torch       anywhere, also CUDA                     batched over segments; no compiler needed

All minimise J = sum_P lambda_P sum_r weight_r (w_r - q_P,r) H (w_r - q_P,r)^T as stated in
native/trellis/trellis_core.h: inputs one after the other with exact error feedback, the planes of
an input one after the other, each by a Viterbi pass over the rows; or, where outputs have a metric
of their own, blocks of rows one after the other. The native backends keep path metrics in 16 bits,
the others in float32; so codes differ between them while J agrees to a part in a thousand. The
codes of one backend do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dropbydrop.system.errors import KernelError

from ..codebook_set import TrellisSet
from ..search import with_torch
from . import batched, cpu
from .arguments import Problem

__all__ = ["backends", "search"]


def backends(device: torch.device | str = "cpu") -> list[str]:
    """Backends that run on `device`, best first."""
    return with_torch(cpu.backends(), device)


def search(
    w: Tensor,
    row_weights: Tensor,
    books: TrellisSet,
    prefixes: Sequence[int],
    lambdas: Sequence[float],
    *,
    lower: Tensor | None = None,
    h: Tensor | None = None,
    sweeps: int = 0,
    codes: Sequence[Tensor] | None = None,
    backend: str | None = None,
    row_feedback: Tensor | None = None,
    row_block: int = 0,
) -> list[Tensor]:
    """Find codes by error feedback (when `codes` is None), then improve them by descent.

    Args:
        w: float32 [d_out, d_in], rows divided by their scale, in rotated coordinates.
        row_weights: float32 [d_out], weight of a row's error in J: its scale squared.
        books: codebooks of planes 1..M.
        prefixes: supervised numbers of planes, ascending; the last is M.
        lambdas: weight of each in J.
        lower: float32 [d_in, d_in], H = lower lower^T; needed when `codes` is None.
        h: float32 [d_in, d_in], H; needed when `sweeps` > 0.
        sweeps: descent over all inputs, last first; an input's codes change only if J falls.
        codes: of every plane as stored, to start from; not modified.
        row_feedback: float32 [d_out, d_out], F of a metric of the outputs, (I + F) D (I + F)^T with
            F above its blocks and D block diagonal; row_weights are then the diagonal of D. With
            `lower`, without sweeps.
        row_block: rows of its blocks: whole cycles of all planes, two blocks at least.
        backend: one of `backends()`; None takes the first.

    Returns:
        Codes of planes 1..M as stored: uint8 [ceil(k d_out / 8), d_in] each.

    Raises:
        KernelError: a backend that this machine or build does not have.
        ValueError: prefixes, weights, codes or matrices that contradict each other.
    """
    levels = list(prefixes), list(lambdas)
    rows = row_feedback, row_block
    problem = Problem(w, row_weights, books, *levels, lower, h, sweeps, codes, *rows)
    names = backends(w.device)
    name = backend or names[0]
    if name not in names:
        raise KernelError(f"search backend {name!r} is not available here; choose one of {names}.")
    if name == "torch":
        return batched.search(problem)
    if name == "triton":
        from .triton import TritonViterbi

        return batched.search(problem, TritonViterbi)
    return cpu.search(name, problem)
