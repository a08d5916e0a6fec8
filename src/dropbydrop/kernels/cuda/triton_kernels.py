"""Triton kernels: decode planes, multiply a few rows, rotate. Device code only; ops.py launches it.

All read planes as they are on disk, uint8 [d_out, G] row major, so nothing is packed for a GPU, and
exactly the first P of them: P is a compile-time constant, the other pointers are never touched.

    decode    tile [rows, groups]: gather one entry of 8 a code and plane, add the planes in float32
              in their order, times the row scale, round once. Bit for bit `coding.code.decode`.
    product   the same tile, not yet scaled, rounded to the type of x and multiplied with 16 rows of
              x on the tensor cores; missing rows are zeros. Every launch does the same arithmetic
              in the same order whatever the number of rows, so a row does not depend on the others.
              Up to three matrices that share x lie below each other in one launch (q/k/v, gate/up).
              Where the inputs are split, parts go to a float32 buffer, added in order by `finish`.
    rotate    O (x) H (signs * x) for d = odd * 2^k. `mix` does the Hadamard factor of one odd index
              as two small products, 2^k = A * B. With few rows it applies the odd factor while it
              loads, reading all of x for each odd index: one launch. With many, `spread` does that.
    rows      eight-bit rows of the output head, for the same few rows of x.

Products of float32 run on the tensor cores as three of TF32, which keeps an error of about 1e-6;
that needs compute capability 8.0.

Codebooks are [M, 256, 8] in one tensor: 2 KiB (float16) or 4 KiB (float32) a plane, which stay in
the first-level cache. The gather through it is what bounds these kernels (about eight cache lines
a warp instruction), not memory: see int8.cu for one that avoids it. `product` is launched with
num_stages=1: when Triton pipelines its loop, the gather becomes asynchronous copies to shared
memory, which go around the first-level cache and take 16 KiB a plane and stage.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..registry import MAX_GEMV_ROWS

ROWS = tl.constexpr(MAX_GEMV_ROWS)  # of x a product computes; the least a tensor core takes


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
def _choose(in_b, in_c, a, b, c):
    """The pointer of the matrix that a tile is in."""
    if in_b:
        a = b
    if in_c:
        a = c
    return a


@triton.jit
def _finished(total, scales, bias, row, mask, BIAS: tl.constexpr):
    """total * scales (+ bias) of these rows; float32."""
    total *= tl.load(scales + row, mask=mask, other=0)
    if BIAS:
        total += tl.load(bias + row, mask=mask, other=0)
    return total


@triton.jit
def product(
    x,
    a1, a2, a3, a4, a5, a6, a7, a8,
    b1, b2, b3, b4, b5, b6, b7, b8,
    c1, c2, c3, c4, c5, c6, c7, c8,
    tables, scales, bias, out, n, rows_a, rows_b, rows_c, groups, length,
    P: tl.constexpr, R: tl.constexpr, B: tl.constexpr, MATRICES: tl.constexpr,
    WHOLE: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """x [n, 8 * groups], n <= 16, times matrices a, b, c of rows_a, rows_b, rows_c rows.

    WHOLE: out [n, rows], scaled, with bias; else out [splits, n, rows] float32, unscaled, for
    `finish`. rows is the sum of the rows. Grid: tiles of rows of a, of b, of c; splits of `length`
    groups (a multiple of B).
    """
    tile = tl.program_id(0)
    first, count = 0, rows_a
    p1, p2, p3, p4, p5, p6, p7, p8 = a1, a2, a3, a4, a5, a6, a7, a8
    if MATRICES > 1:
        tiles_a, tiles_b = tl.cdiv(rows_a, R), tl.cdiv(rows_b, R)
        in_b, in_c = tile >= tiles_a, tile >= tiles_a + tiles_b
        p1 = _choose(in_b, in_c, a1, b1, c1)
        p2 = _choose(in_b, in_c, a2, b2, c2)
        p3 = _choose(in_b, in_c, a3, b3, c3)
        p4 = _choose(in_b, in_c, a4, b4, c4)
        p5 = _choose(in_b, in_c, a5, b5, c5)
        p6 = _choose(in_b, in_c, a6, b6, c6)
        p7 = _choose(in_b, in_c, a7, b7, c7)
        p8 = _choose(in_b, in_c, a8, b8, c8)
        first = tl.where(in_c, rows_a + rows_b, tl.where(in_b, rows_a, 0))
        count = tl.where(in_c, rows_c, tl.where(in_b, rows_b, rows_a))
        tile -= tl.where(in_c, tiles_a + tiles_b, tl.where(in_b, tiles_a, 0))
    row = tile * R + tl.arange(0, R)
    split = tl.program_id(1)
    i = tl.arange(0, ROWS)
    d_in = groups * 8
    total = tl.zeros([R, ROWS], tl.float32)
    for step in range(0, length, B):
        group = split * length + step + tl.arange(0, B)
        mask = (row < count)[:, None] & (group < groups)[None, :]
        at = row.to(tl.int64)[:, None] * groups + group[None, :]
        w = _prefix(p1, p2, p3, p4, p5, p6, p7, p8, tables, at, mask, P, R, B)
        w = tl.reshape(w, [R, B * 8]).to(x.dtype.element_ty)
        k = (split * length + step) * 8 + tl.arange(0, B * 8)
        inside = (i < n)[:, None] & (k < d_in)[None, :]
        part = tl.load(x + i[:, None] * d_in + k[None, :], mask=inside, other=0.0)  # [16, 8 B]
        total = _times(w, part, total, WIDE)
    rows = rows_a + rows_b + rows_c
    if WHOLE:
        total = tl.trans(total)  # [16, R]: neighbouring rows of W are neighbours in out
        known = (row < count)[None, :]
        total = _finished(total, scales, bias, (first + row)[None, :], known, BIAS)
    else:
        total = tl.trans(total)
    to = (split * n + i)[:, None].to(tl.int64) * rows + (first + row)[None, :]
    keep = (i < n)[:, None] & (row < count)[None, :]
    tl.store(out + to, total.to(out.dtype.element_ty), mask=keep)


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
    total = _finished(total, scales, bias, row, mask, BIAS)
    tl.store(out + i.to(tl.int64) * rows + row, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def mix(
    x, signs, factor, high, low, out, count,
    A: tl.constexpr, B: tl.constexpr, AP: tl.constexpr, BP: tl.constexpr,
    FACTOR: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """out [n, count, A * B] = H_{AB} F (signs * x), H_{AB} = high [A, A] (x) low [B, B].

    F is `factor` [count, count] over the second dimension where FACTOR, S rows of x at a time; else
    the identity. AP, BP >= 16 are the sizes of the tiles: A and B, padded. Grid: n * count.
    """
    size: tl.constexpr = A * B
    own = tl.program_id(0) % count
    start = (tl.program_id(0) // count).to(tl.int64) * count * size
    a, b = tl.arange(0, AP), tl.arange(0, BP)
    at = a[:, None] * B + b[None, :]
    mask = (a < A)[:, None] & (b < B)[None, :]
    if FACTOR:
        y = tl.zeros([AP, BP], tl.float32)
        for first in range(0, count, S):
            o = first + tl.arange(0, S)
            weight = tl.load(factor + own * count + o, mask=o < count, other=0.0)
            tile = o[:, None, None] * size + at[None, :, :]
            known = (o < count)[:, None, None] & mask[None, :, :]
            some = tl.load(x + start + tile, mask=known, other=0.0).to(tl.float32)
            some *= tl.load(signs + tile, mask=known, other=0.0)
            y += tl.sum(some * weight[:, None, None], 0)
    else:
        y = tl.load(x + start + own * size + at, mask=mask, other=0.0).to(tl.float32)
        y *= tl.load(signs + own * size + at, mask=mask, other=0.0)
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
    tl.store(out + start + own * size + at, y.to(out.dtype.element_ty), mask=mask)


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
    i = tl.arange(0, ROWS)
    total = tl.zeros([R, ROWS], tl.float32)
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
