"""Kernels for a prefix of additive codes: of the CPU in `cpu`, of CUDA devices in `cuda`.

    kernel = select()                          # or select("avx2-u8"), or DROPBYDROP_KERNEL=torch
    planes = pack(codes, specs, d_out, d_in)   # once per matrix
    books = prepare_codebooks(codebook_set)
    matrix = Matrix(planes, scales, bias)
    attention = prepare_group([mq, mk, mv], books, rotation, prefix=2)     # per input group and P
    q, k, v = attention(x)                     # one call: rotation, look-up tables, three products
    weight = decode_dense(matrix, books, prefix=2, dtype=torch.bfloat16)

    logits = rows_linear(x, head_rows, head_scales)               # eight-bit head

registry.py decides which kernel runs, and which path a product takes.
"""

from . import cuda
from .cpu.cpu_group import CpuGroup, rotate
from .int8_head import rows_linear
from .layout import (
    Codebooks,
    Matrix,
    Plane,
    pack,
    plane_bytes,
    prepare_codebooks,
    to_device_layout,
)
from .prepared_group import PreparedGroup
from .products import decode_dense, prepare_group
from .registry import (
    MAX_GEMV_ROWS,
    available,
    backend_for,
    describe,
    select,
    table,
)

__all__ = [
    "MAX_GEMV_ROWS",
    "Codebooks",
    "CpuGroup",
    "Matrix",
    "Plane",
    "PreparedGroup",
    "available",
    "backend_for",
    "cuda",
    "decode_dense",
    "describe",
    "pack",
    "plane_bytes",
    "prepare_codebooks",
    "prepare_group",
    "rotate",
    "rows_linear",
    "select",
    "table",
    "to_device_layout",
]
