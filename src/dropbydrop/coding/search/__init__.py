"""Search of the nested code: one entry point, several backends that can be asked for by name.

    backend     where                                   what it is
    avx512      x86-64 with AVX-512 F, BW, DQ and VL    native/search, 16 rows in a vector
    avx2        x86-64 with AVX2 and FMA                native/search, 8 rows in a vector
    portable    any machine the library was built for   native/search, 4 rows in a vector
    triton      CUDA                                    torch's, with a visit as one kernel
    torch       anywhere, also CUDA                     batched over rows; no compiler needed

All backends run the algorithm stated in native/search/search_core.h. They differ in the order of
floating-point sums and, in the native ones, in how candidates of nearly equal score are ordered,
so codes may differ at ties while the objective agrees.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from dropbydrop.system.accelerator import triton_interpreted
from dropbydrop.system.errors import KernelError

from ..objective import Metric
from . import batched, cpu

LOOKAHEAD = 0.25  # what one more stage leaves of a squared error; flat optimum, see docs/log.md


def backends(device: torch.device | str = "cpu") -> list[str]:
    """Backends that run on `device`, best first."""
    return with_torch(cpu.backends(), device)


def with_torch(native: list[str], device: torch.device | str) -> list[str]:
    """Backends of a search on `device`, best first: its native ones on the CPU, torch, Triton."""
    if torch.device(device).type != "cpu":
        compiled = torch.device(device).type == "cuda" and find_spec("triton") is not None
        return ["triton", "torch"] if compiled else ["torch"]
    return [*native, "torch", *(["triton"] if triton_interpreted() else [])]


def search(
    w: Tensor,
    codebooks: Tensor,
    levels: Sequence[int],
    lambdas: Sequence[float],
    *,
    beam: int,
    sweeps: int,
    feedback: Metric | None = None,
    descent: Metric | None = None,
    codes: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, list[int]]:
    """Find codes by error feedback (when `codes` is None), then improve them by block descent.

    Args:
        w: float32 [d_out, d_in], rows divided by their scale, in rotated coordinates.
        codebooks: float32 [M, K/2, g], sign-symmetric halves.
        levels: supervised prefixes, ascending; the last is M.
        lambdas: weight of each level in J.
        beam: candidates kept between stages: a power of two up to 32.
        sweeps: descent sweeps over all groups; each only accepts decreases of J.
        feedback: packed Cholesky form of H; needed when `codes` is None.
        descent: packed block form of H; needed when `sweeps` > 0.
        codes: uint8 [M, d_out, G] to start from; not modified.
        backend: one of `backends()`; None takes the first.

    Returns:
        (codes uint8 [M, d_out, G], groups changed in each sweep).

    Raises:
        KernelError: a backend that this machine or build does not have.
        ValueError: levels, beam or metrics that contradict each other.
    """
    if len(levels) != len(lambdas) or not levels or list(levels) != sorted(set(levels)):
        raise ValueError(f"levels {list(levels)} with {len(lambdas)} weights")
    if levels[-1] != codebooks.shape[0] or min(lambdas) <= 0:
        raise ValueError("the last level must use every codebook, and lambdas must be positive")
    if (codes is None and feedback is None) or (sweeps and descent is None):
        raise ValueError("error feedback needs `feedback`, descent sweeps need `descent`")
    if beam < 1 or beam > 32 or beam & (beam - 1):
        raise ValueError(f"beam {beam} must be a power of two up to 32")
    names = backends(w.device)
    name = backend or names[0]
    if name not in names:
        raise KernelError(f"search backend {name!r} is not available here; choose one of {names}.")
    task = (w, codebooks, levels, lambdas, beam, LOOKAHEAD, feedback, descent, sweeps, codes)
    if name == "torch":
        return batched.search(*task)
    if name == "triton":
        from .triton import TritonVisits

        return batched.search(*task, TritonVisits)
    return cpu.search(name, *task)
