"""ctypes binding of the C++ search (native/search). See search_core.h for what it does."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from dropbydrop.coding.code import GROUP
from dropbydrop.coding.objective import Metric
from dropbydrop.system.errors import KernelError
from dropbydrop.system.native_library import library, members

_MAX = 8  # DROP_SEARCH_MAX_CODEBOOKS


class _Metric(ctypes.Structure):
    """DropMetric of native/search/c_api.h."""

    _fields_ = members(ctypes.c_void_p, "coupling", "factor")


class _Search(ctypes.Structure):
    """DropSearch of native/search/c_api.h."""

    _fields_ = (
        *members(ctypes.c_int64, "d_out", "d_in"),
        *members(ctypes.c_int, "planes", "beam", "levels"),
        ("level", ctypes.c_int * _MAX),
        ("lambda_", ctypes.c_float * _MAX),
        ("lookahead", ctypes.c_float),
        *members(ctypes.c_void_p, "w", "codebooks"),
        *members(_Metric, "feedback", "descent"),
        *members(ctypes.c_int, "start", "sweeps"),
        *members(ctypes.c_void_p, "codes", "changed"),
    )


def backends() -> list[str]:
    """Names of the native backends this machine runs, best first; empty without the library."""
    lib = library()
    names: list[str] = []
    while lib is not None:
        name = lib.drop_search_backend(len(names))
        if name is None:
            break
        names.append(name.decode())
    return names


def search(
    backend: str,
    w: Tensor,
    codebooks: Tensor,
    levels: Sequence[int],
    lambdas: Sequence[float],
    beam: int,
    lookahead: float,
    feedback: Metric | None,
    descent: Metric | None,
    sweeps: int,
    codes: Tensor | None,
) -> tuple[Tensor, list[int]]:
    """See `dropbydrop.coding.search.search`; all tensors float32 on the CPU."""
    lib = library()
    if lib is None or backend not in backends():
        raise KernelError(f"search backend {backend!r} is not available; have {backends()}")
    d_out, d_in = w.shape
    planes = codebooks.shape[0]
    w, codebooks = w.contiguous(), codebooks.contiguous()
    start = codes is None
    out = (
        torch.zeros(planes, d_out, d_in // GROUP, dtype=torch.uint8)
        if codes is None
        else codes.clone().contiguous()
    )
    changed = torch.zeros(max(sweeps, 1), dtype=torch.int64)

    def pack(metric: Metric | None) -> _Metric:
        if metric is None:
            return _Metric(None, None)
        return _Metric(metric.coupling.data_ptr(), metric.factor.data_ptr())

    problem = _Search(
        d_out,
        d_in,
        planes,
        beam,
        len(levels),
        (ctypes.c_int * _MAX)(*levels),
        (ctypes.c_float * _MAX)(*lambdas),
        lookahead,
        w.data_ptr(),
        codebooks.data_ptr(),
        pack(feedback),
        pack(descent),
        int(start),
        sweeps,
        out.data_ptr(),
        changed.data_ptr(),
    )
    status = lib.drop_search(backend.encode(), ctypes.byref(problem), torch.get_num_threads())
    if status == 3:
        raise MemoryError("the native search ran out of memory")
    if status:
        raise ValueError(f"the native search refused its arguments (status {status})")
    return out, changed[:sweeps].tolist()
