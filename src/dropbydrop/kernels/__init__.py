"""Kernels for a prefix of additive codes: of the CPU here, of CUDA devices in `gpu`.

    kernel = select()                          # or select("avx2-u8"), or DROPBYDROP_KERNEL=torch
    packed = pack(codes)                       # once per matrix; planes can be appended later
    books = prepare_codebooks(tables, symmetric=True)
    matrix = Matrix(packed, scales, bias)
    attention = Bound([mq, mk, mv], books, rotation, prefix=2)    # per site and precision
    q, k, v = attention(x)                     # one call: rotation, tables, three products
    weight = decode_dense(packed, books, scales, prefix=2, dtype=torch.bfloat16)

    logits = rows_linear(x, head_rows, head_scales)               # eight-bit head
    attach(model, bound_of)                    # single tokens through all blocks in one call

A product of a few rows goes through tables of dot products (registry, ops, native/kernels), on CUDA
through kernels of its own; more rows decode to a dense matrix and use torch's product.
"""

from . import gpu
from .attach import attach, detach, how, how_config, native
from .layout import (
    Codebooks,
    Packed,
    canonical,
    keep,
    pack,
    pack_plane,
    prepare_codebooks,
    unpack,
    unpack_plane,
)
from .linear import Bound, Matrix, decode_dense, linear, linears, rotate
from .registry import Kernel, available, by_name, describe, gpu_kernel, select, table
from .rows import rows_linear
from .step import DecodeStep

__all__ = [
    "Bound",
    "Codebooks",
    "DecodeStep",
    "Kernel",
    "Matrix",
    "Packed",
    "attach",
    "available",
    "by_name",
    "canonical",
    "decode_dense",
    "describe",
    "detach",
    "gpu",
    "gpu_kernel",
    "how",
    "how_config",
    "keep",
    "linear",
    "linears",
    "native",
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
