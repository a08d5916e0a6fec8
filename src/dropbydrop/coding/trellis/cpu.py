"""ctypes binding of the C++ search (native/trellis). See trellis_core.h for what it does."""

from __future__ import annotations

import ctypes

import torch

from dropbydrop.system.errors import KernelError
from dropbydrop.system.native_library import library, members

from ..planes import LABELS, WINDOWS
from .arguments import Problem

_MAX = 8  # DROP_TRELLIS_MAX_PLANES


class _Plane(ctypes.Structure):
    """DropTrellisPlane of native/trellis/c_api.h."""

    _fields_ = (
        *members(ctypes.c_int, "bits", "window"),
        ("values", ctypes.c_float * LABELS),
        ("taps", ctypes.c_uint8 * WINDOWS[-1]),
    )


class _Search(ctypes.Structure):
    """DropTrellis of native/trellis/c_api.h."""

    _fields_ = (
        *members(ctypes.c_int64, "d_out", "d_in"),
        *members(ctypes.c_int, "planes", "levels"),
        ("plane", _Plane * _MAX),
        ("prefix", ctypes.c_int * _MAX),
        ("lambda_", ctypes.c_float * _MAX),
        *members(ctypes.c_void_p, "w", "row_weights", "lower", "h"),
        ("sweeps", ctypes.c_int),
        ("codes", ctypes.c_void_p * _MAX),
        ("changed", ctypes.c_void_p),
        ("row_feedback", ctypes.c_void_p),
        ("row_block", ctypes.c_int64),
    )


def backends() -> list[str]:
    """Names of the native backends this machine runs, best first; empty without the library."""
    lib = library()
    names: list[str] = []
    while lib is not None:
        name = lib.drop_trellis_backend(len(names))
        if name is None:
            break
        names.append(name.decode())
    return names


def search(backend: str, problem: Problem) -> list[torch.Tensor]:
    """See `dropbydrop.coding.trellis.search`; all tensors on the CPU."""
    lib = library()
    if lib is None or backend not in backends():
        raise KernelError(f"search backend {backend!r} is not available; have {backends()}")
    (d_out, d_in), planes = problem.w.shape, problem.books.planes
    if problem.codes is None:
        streams = [
            torch.zeros(plane.shape(d_out, d_in)[::-1], dtype=torch.uint8) for plane in planes
        ]
    else:
        streams = [code.T.clone(memory_format=torch.contiguous_format) for code in problem.codes]
    w = problem.w.T.float().contiguous()
    given = (problem.row_weights, problem.lower, problem.h)
    held = [None if t is None else t.float().contiguous() for t in given]
    feedback = problem.row_feedback
    feedback = None if feedback is None else feedback.float().contiguous()
    changed = torch.zeros(max(problem.sweeps, 1), dtype=torch.int64)
    books = [
        _Plane(
            plane.bits,
            plane.window,
            (ctypes.c_float * LABELS)(*entries.flatten().tolist()),
            (ctypes.c_uint8 * WINDOWS[-1])(*part[".taps"].tolist()),
        )
        for plane, entries, part in zip(
            planes, problem.books.entries, problem.books.parts, strict=True
        )
    ]
    task = _Search(
        d_out,
        d_in,
        len(planes),
        len(problem.prefixes),
        (_Plane * _MAX)(*books),
        (ctypes.c_int * _MAX)(*problem.prefixes),
        (ctypes.c_float * _MAX)(*problem.lambdas),
        w.data_ptr(),
        *(None if t is None else t.data_ptr() for t in held),
        problem.sweeps,
        (ctypes.c_void_p * _MAX)(*(stream.data_ptr() for stream in streams)),
        changed.data_ptr(),
        None if feedback is None else feedback.data_ptr(),
        problem.row_block,
    )
    status = lib.drop_trellis_search(backend.encode(), ctypes.byref(task), torch.get_num_threads())
    if status == 3:
        raise MemoryError("the native search ran out of memory")
    if status:
        raise ValueError(f"the native search refused its arguments (status {status})")
    return [stream.T.contiguous() for stream in streams]
