"""Kernels for a prefix of additive codes: of the CPU here, of CUDA devices in `cuda`.

    kernel = select()                          # or select("avx2-u8"), or DROPBYDROP_KERNEL=torch
    packed = pack(codes)                       # once per matrix; planes can be appended later
    books = prepare_codebooks(tables, symmetric=True)
    matrix = Matrix(packed, scales, bias)
    attention = Bound([mq, mk, mv], books, rotation, prefix=2)    # per input group and precision
    q, k, v = attention(x)                     # one call: rotation, tables, three products
    weight = decode_dense(packed, books, scales, prefix=2, dtype=torch.bfloat16)

    logits = rows_linear(x, head_rows, head_scales)               # eight-bit head

A product of a few rows goes through tables of dot products (registry, ops, native/kernels), on CUDA
through kernels of its own; more rows decode to a dense matrix and use torch's product.
"""

from . import cuda
from .cpu.products import Matrix, PreparedGroup, decode_dense, linear, linears, rotate
from .cpu.step import DecodeStep
from .int8_head import rows_linear
from .layout import (
    Codebooks,
    Packed,
    keep,
    pack,
    pack_plane,
    prepare_codebooks,
    to_row_major,
    unpack,
    unpack_plane,
)
from .registry import Kernel, available, by_name, describe, gpu_kernel, select, table

__all__ = [
    "Codebooks",
    "DecodeStep",
    "Kernel",
    "Matrix",
    "Packed",
    "PreparedGroup",
    "available",
    "by_name",
    "cuda",
    "decode_dense",
    "describe",
    "gpu_kernel",
    "keep",
    "linear",
    "linears",
    "pack",
    "pack_plane",
    "prepare_codebooks",
    "rotate",
    "rows_linear",
    "select",
    "table",
    "to_row_major",
    "unpack",
    "unpack_plane",
]
