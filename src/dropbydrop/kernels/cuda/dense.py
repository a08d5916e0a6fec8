"""Decoding to a dense matrix by a CUDA kernel: codebooks in shared memory (dense.cu).

Exact, like the Triton kernel of ops.py, whose gather through the first-level cache it replaces by
one without bank conflicts. It needs codebooks that float16 holds. Used with the kernel "cuda-i8".
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dropbydrop.coding.code import ENTRIES

from ..registry import TYPES
from .nvrtc import Function, pointer, source

SOURCE = source("dense.cu")
THREADS = 512
_ENTRY = 16  # bytes


def defines(planes: int) -> dict[str, int]:
    """The compile-time constants of dense.cu."""
    return {"P": planes, "COPIES": 8 if planes <= 6 else 4, "THREADS": THREADS}


class _Planes(ctypes.Structure):
    _fields_ = (("at", ctypes.c_void_p * 8),)


def arguments(planes: Sequence[Tensor], tables: Tensor, scales: Tensor, out: Tensor) -> list[Any]:
    """The arguments of `decode` in dense.cu, in its order."""
    at = _Planes((ctypes.c_void_p * 8)(*[plane.data_ptr() for plane in planes]))
    sizes = (TYPES[scales.dtype], TYPES[out.dtype], *planes[0].shape)
    return [at, *map(pointer, (tables, scales, out)), *map(ctypes.c_int, sizes)]


@cache
def _function(planes: int, device: int) -> Function:
    return Function(SOURCE, "decode", defines(planes), device)


def decode(planes: Sequence[Tensor], tables: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Planes 1..P uint8 [d_out, G], tables float16 [M, 256, 8], scales [d_out] -> [d_out, d_in]."""
    device, (rows, groups) = scales.device, planes[0].shape
    out = torch.empty(rows, groups * 8, dtype=dtype, device=device)
    constants = defines(len(planes))
    shared = len(planes) * ENTRIES * constants["COPIES"] * _ENTRY
    function = _function(len(planes), device.index)
    count = torch.cuda.get_device_properties(device).multi_processor_count
    blocks = min(count * function.resident(THREADS, shared), -(-rows * groups // THREADS))
    scales = scales.contiguous()
    function.launch((blocks, 1), THREADS, shared, arguments(planes, tables, scales, out))
    return out
