"""ctypes binding of the fused C++ search (native/search). See search_core.h for what it does."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from dropbydrop.coding.code import GROUP
from dropbydrop.coding.objective import Metric
from dropbydrop.errors import KernelError
from dropbydrop.system.native_library import library_path

_MAX = 8
_LIBRARY = library_path("drop_search")


class _Metric(ctypes.Structure):
    _fields_ = [("coupling", ctypes.c_void_p), ("factor", ctypes.c_void_p)]


class _Problem(ctypes.Structure):
    _fields_ = [
        ("d_out", ctypes.c_int64),
        ("d_in", ctypes.c_int64),
        ("planes", ctypes.c_int),
        ("beam", ctypes.c_int),
        ("levels", ctypes.c_int),
        ("level", ctypes.c_int * _MAX),
        ("lambda_", ctypes.c_float * _MAX),
        ("lookahead", ctypes.c_float),
        ("w", ctypes.c_void_p),
        ("codebooks", ctypes.c_void_p),
        ("feedback", _Metric),
        ("descent", _Metric),
        ("start", ctypes.c_int),
        ("sweeps", ctypes.c_int),
        ("codes", ctypes.c_void_p),
        ("changed", ctypes.c_void_p),
    ]


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    if not _LIBRARY.exists():
        return None
    library = ctypes.CDLL(str(_LIBRARY))
    library.drop_search_backend.restype = ctypes.c_char_p
    library.drop_search_backend.argtypes = [ctypes.c_int]
    library.drop_search.restype = ctypes.c_int
    library.drop_search.argtypes = [ctypes.c_char_p, ctypes.POINTER(_Problem), ctypes.c_int]
    return library


def backends() -> list[str]:
    """Names of the native backends this machine runs, best first; empty without the library."""
    library = _library()
    names: list[str] = []
    while library is not None:
        name = library.drop_search_backend(len(names))
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
    library = _library()
    if library is None or backend not in backends():
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

    problem = _Problem(
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
    status = library.drop_search(backend.encode(), ctypes.byref(problem), torch.get_num_threads())
    if status == 3:
        raise MemoryError("the native search ran out of memory")
    if status:
        raise ValueError(f"the native search refused its arguments (status {status})")
    return out, changed[:sweeps].tolist()
