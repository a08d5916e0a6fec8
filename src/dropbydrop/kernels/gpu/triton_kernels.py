"""Triton kernels: decode planes, multiply a few rows, rotate. Device code only; ops.py launches it.

All read planes as they are on disk, uint8 [d_out, G] row major, so nothing is packed for a GPU, and
exactly the first P of them: P is a compile-time constant, the other pointers are never touched.

    decode    tile [rows, groups]: gather one entry of 8 a code and plane, add the planes in float32
              in their order, times the row scale, round once. Bit for bit `dropbydrop.code.decode`.
    product   the same tile, not yet scaled, rounded to the type of x and multiplied with 16 rows of
              x on the tensor cores; missing rows are zeros. Every launch does the same arithmetic
              in the same order whatever the number of rows, so a row does not depend on the others.
              Splits of the inputs go to a float32 buffer and are added in order by `finish`.
    rotate    O (x) H (signs * x) for d = odd * 2^k. `mix` does the Hadamard factor of one odd index
              as two small products, 2^k = A * B; `spread` the odd factor.
    rows      eight-bit rows of the output head, for the same few rows of x.

Products of float32 run on the tensor cores as three of TF32, which keeps an error of about 1e-6;
that needs compute capability 8.0.

Codebooks are [M, 256, 8] in one tensor: 2 KiB (float16) or 4 KiB (float32) a plane, which stay in
the first-level cache. The gather through it is what bounds these kernels (about eight cache lines
a warp instruction), not memory: see int8.cu for one that avoids it.
"""

from __future__ import annotations

import triton
import triton.language as tl

FEW = tl.constexpr(16)  # rows of x a product computes; the least a tensor core takes


@triton.jit
def _times(w, x, total, WIDE: tl.constexpr):
    """total + w x^T. WIDE: with operands, rounded already, in float32, for Triton's interpreter,
    which multiplies the bits of bfloat16 as integers; the same values otherwise."""
    if WIDE:
        return tl.dot(w.to(tl.float32), tl.trans(x.to(tl.float32)), total, input_precision="tf32x3")
    return tl.dot(w, tl.trans(x), total, input_precision="tf32x3")


@triton.jit
def _plane(total, codes, table, at, mask):
    """total [R, B, 8] + entries of one plane; `at` [R, B] are offsets of its codes."""
    code = tl.load(codes + at, mask=mask, other=0).to(tl.int32)
    entry = tl.arange(0, 8)
    return total + tl.load(table + code[:, :, None] * 8 + entry[None, None, :]).to(tl.float32)


@triton.jit
def _prefix(
    c1, c2, c3, c4, c5, c6, c7, c8, tables, at, mask,
    P: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Sum of the first P planes of a tile: float32 [R, B, 8], in the order of the planes."""
    total = tl.zeros([R, B, 8], tl.float32)
    total = _plane(total, c1, tables, at, mask)
    if P >= 2:
        total = _plane(total, c2, tables + 2048, at, mask)
    if P >= 3:
        total = _plane(total, c3, tables + 2 * 2048, at, mask)
    if P >= 4:
        total = _plane(total, c4, tables + 3 * 2048, at, mask)
    if P >= 5:
        total = _plane(total, c5, tables + 4 * 2048, at, mask)
    if P >= 6:
        total = _plane(total, c6, tables + 5 * 2048, at, mask)
    if P >= 7:
        total = _plane(total, c7, tables + 6 * 2048, at, mask)
    if P >= 8:
        total = _plane(total, c8, tables + 7 * 2048, at, mask)
    return total


@triton.jit
def decode(
    c1, c2, c3, c4, c5, c6, c7, c8, tables, scales, out, rows, groups,
    P: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """out [rows, 8 * groups] = scales * sum of P planes. Grid: tiles of rows, tiles of groups."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    group = tl.program_id(1) * B + tl.arange(0, B)
    mask = (row < rows)[:, None] & (group < groups)[None, :]
    at = row.to(tl.int64)[:, None] * groups + group[None, :]
    total = _prefix(c1, c2, c3, c4, c5, c6, c7, c8, tables, at, mask, P, R, B)
    scale = tl.load(scales + row, mask=row < rows, other=0).to(tl.float32)
    total = total * scale[:, None, None]
    to = at[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    tl.store(out + to, total.to(out.dtype.element_ty), mask=mask[:, :, None])


@triton.jit
def product(
    x, c1, c2, c3, c4, c5, c6, c7, c8, tables, out, n, rows, groups, length,
    P: tl.constexpr, R: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out [splits, n, rows] float32: unscaled products of x [n, 8 * groups], n <= 16.

    Grid: tiles of rows, splits of `length` groups (a multiple of B).
    """
    row = tl.program_id(0) * R + tl.arange(0, R)
    split = tl.program_id(1)
    i = tl.arange(0, FEW)
    d_in = groups * 8
    total = tl.zeros([R, FEW], tl.float32)
    for step in range(0, length, B):
        group = split * length + step + tl.arange(0, B)
        mask = (row < rows)[:, None] & (group < groups)[None, :]
        at = row.to(tl.int64)[:, None] * groups + group[None, :]
        tile = _prefix(c1, c2, c3, c4, c5, c6, c7, c8, tables, at, mask, P, R, B)
        w = tl.reshape(tile, [R, B * 8]).to(x.dtype.element_ty)
        k = (split * length + step) * 8 + tl.arange(0, B * 8)
        inside = (i < n)[:, None] & (k < d_in)[None, :]
        part = tl.load(x + i[:, None] * d_in + k[None, :], mask=inside, other=0.0)  # [16, 8 B]
        total = _times(w, part, total, WIDE)
    to = (split * n + i)[None, :].to(tl.int64) * rows + row[:, None]
    tl.store(out + to, total, mask=(row < rows)[:, None] & (i < n)[None, :])


@triton.jit
def finish(part, scales, bias, out, n, rows, splits, BIAS: tl.constexpr, R: tl.constexpr):
    """out [n, rows] = scales * sum over splits of part [splits, n, rows] (+ bias).

    Grid: tiles of rows, rows of x.
    """
    row = tl.program_id(0) * R + tl.arange(0, R)
    i = tl.program_id(1)
    mask = row < rows
    total = tl.zeros([R], tl.float32)
    for split in range(splits):
        total += tl.load(part + (split * n + i).to(tl.int64) * rows + row, mask=mask, other=0.0)
    total *= tl.load(scales + row, mask=mask, other=0).to(tl.float32)
    if BIAS:
        total += tl.load(bias + row, mask=mask, other=0).to(tl.float32)
    tl.store(out + i.to(tl.int64) * rows + row, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def mix(
    x, signs, high, low, out, odd,
    A: tl.constexpr, B: tl.constexpr, AP: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """out [n, odd, A * B] = H_{AB} (signs * x), H_{AB} = high [A, A] (x) low [B, B].

    AP, BP >= 16 are the sizes of the tiles: A and B, padded. Grid: n * odd.
    """
    start = tl.program_id(0).to(tl.int64) * (A * B)
    which = (tl.program_id(0) % odd) * (A * B)
    a, b = tl.arange(0, AP), tl.arange(0, BP)
    at = a[:, None] * B + b[None, :]
    mask = (a < A)[:, None] & (b < B)[None, :]
    y = tl.load(x + start + at, mask=mask, other=0.0).to(tl.float32)
    y *= tl.load(signs + which + at, mask=mask, other=0.0)
    c = tl.arange(0, BP)
    h = tl.load(
        low + b[:, None] * B + c[None, :], mask=(b < B)[:, None] & (c < B)[None, :], other=0.0
    )
    y = tl.dot(y, h, input_precision="tf32x3")
    if A > 1:
        c = tl.arange(0, AP)
        h = tl.load(
            high + a[:, None] * A + c[None, :], mask=(a < A)[:, None] & (c < A)[None, :], other=0.0
        )
        y = tl.dot(h, y, input_precision="tf32x3")
    tl.store(out + start + at, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def spread(x, factor, out, odd, size, OP: tl.constexpr, S: tl.constexpr):
    """out [n, odd, size] = factor [odd, odd] x, OP >= odd. Grid: n, tiles of S columns."""
    start = tl.program_id(0).to(tl.int64) * odd * size
    column = tl.program_id(1) * S + tl.arange(0, S)
    i = tl.arange(0, OP)
    mask = (i < odd)[:, None] & (column < size)[None, :]
    y = tl.load(x + start + i[:, None] * size + column[None, :], mask=mask, other=0.0)
    square = (i < odd)[:, None] & (i < odd)[None, :]
    o = tl.load(factor + i[:, None] * odd + i[None, :], mask=square, other=0.0)
    y = tl.dot(o, y, input_precision="tf32x3")
    to = start + i[:, None] * size + column[None, :]
    tl.store(out + to, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def rows(
    x, weight, scales, bias, out, n, count, d,
    BIAS: tl.constexpr, R: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out [n, count] = (x weight^T) * scales (+ bias), weight int8 [count, d], n <= 16."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    i = tl.arange(0, FEW)
    total = tl.zeros([R, FEW], tl.float32)
    for step in range(0, d, D):
        k = step + tl.arange(0, D)
        mask = (row < count)[:, None] & (k < d)[None, :]
        w = tl.load(weight + row.to(tl.int64)[:, None] * d + k[None, :], mask=mask, other=0)
        inside = (i < n)[:, None] & (k < d)[None, :]
        part = tl.load(x + i[:, None] * d + k[None, :], mask=inside, other=0.0)
        # by way of float32, which is exact: Triton's interpreter takes integers for bfloat16's bits
        total = _times(w.to(tl.float32).to(x.dtype.element_ty), part, total, WIDE)
    keep = row < count
    total *= tl.load(scales + row, mask=keep, other=0).to(tl.float32)[:, None]
    if BIAS:
        total += tl.load(bias + row, mask=keep, other=0).to(tl.float32)[:, None]
    to = i[None, :].to(tl.int64) * count + row[:, None]
    tl.store(out + to, total.to(out.dtype.element_ty), mask=keep[:, None] & (i < n)[None, :])
