"""CPU kernels for a prefix of additive codes.

    kernel = select()                          # or select("avx2-u8"), or DROPBYDROP_KERNEL=torch
    packed = pack(codes)                       # once per matrix; planes can be appended later
    books = prepare_codebooks(tables, symmetric=True)
    matrix = Matrix(packed, scales, bias)
    attention = Bound([mq, mk, mv], books, rotation, prefix=2)    # per site and precision
    q, k, v = attention(x)                     # one call: rotation, tables, three products
    weight = decode_dense(packed, books, scales, prefix=2, dtype=torch.bfloat16)

    logits = rows_linear(x, head_rows, head_scales)               # eight-bit head

A product of a few rows goes through tables of dot products (registry, ops, native/kernels); more
rows, and every device but the CPU, decode to a dense matrix and use torch's product.
"""

from .layout import (
    Codebooks,
    Packed,
    pack,
    pack_plane,
    prepare_codebooks,
    unpack,
    unpack_plane,
)
from .linear import Bound, Matrix, decode_dense, linear, linears, rotate
from .registry import Kernel, available, by_name, describe, select, table
from .rows import rows_linear
from .step import DecodeStep

__all__ = [
    "Bound",
    "Codebooks",
    "DecodeStep",
    "Kernel",
    "Matrix",
    "Packed",
    "available",
    "by_name",
    "decode_dense",
    "describe",
    "linear",
    "linears",
    "pack",
    "pack_plane",
    "prepare_codebooks",
    "rotate",
    "rows_linear",
    "select",
    "table",
    "unpack",
    "unpack_plane",
]
