"""Products with eight-bit rows: the output head, at the speed of reading it once.

    logits = (x rows^T) * row_scales (+ bias),   rows int8 [count, d], row_scales [count]

    dropbydrop::rows(x, rows, row_scales, kernel) -> [n, count] in the dtype of x

Natively for up to 16 rows of x: activations are rounded to int16 (one step a row of x; relative
error about 3e-5) and multiplied in integers. More rows widen a slab of the head at a time and use
torch's product. The native result of a row does not depend on the others.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import cuda, registry
from .cpu.ops import check_status, fake, native_library, operator
from .registry import TYPES

HEAD_SLAB = 16384  # rows of the head that are widened at a time


@operator("rows(Tensor x, Tensor rows, Tensor row_scales, str kernel) -> Tensor")
def rows(x: Tensor, rows: Tensor, row_scales: Tensor, kernel: str) -> Tensor:
    """x [n, d], rows int8 [count, d], row_scales [count]; contiguous -> [n, count]."""
    n, d = x.shape
    count = rows.shape[0]
    out = x.new_empty(n, count)
    check_status(
        native_library().drop_int8_rows(
            registry.index(kernel),
            rows.data_ptr(),
            count,
            d,
            row_scales.data_ptr(),
            TYPES[row_scales.dtype],
            x.data_ptr(),
            TYPES[x.dtype],
            n,
            out.data_ptr(),
            TYPES[x.dtype],
            torch.get_num_threads(),
        )
    )
    return out


@fake("rows")
def _(x, rows, row_scales, kernel):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], rows.shape[0]))


def rows_linear(
    x: Tensor,
    weight: Tensor,
    row_scales: Tensor,
    bias: Tensor | None = None,
    kernel: str | None = None,
) -> Tensor:
    """x [..., d] times eight-bit rows -> [..., count], in the dtype of x.

    Args:
        weight: int8 [count, d].
        row_scales: [count], the value of one step of each row.
        bias: [count] or None.
        kernel: a name to force; see `registry.select`.
    """
    if weight.dtype != torch.int8 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"rows of {weight.dtype} {tuple(weight.shape)} for inputs of {x.shape[-1]}; "
            "need int8 [count, d]"
        )
    path, name = registry.route(x, kernel)
    if path == "gpu" and cuda.has_triton():
        return cuda.rows_linear(x, weight, row_scales, bias)
    flat = x.reshape(-1, x.shape[-1])  # [n, d]
    native = (
        path == "native"
        and row_scales.dtype in TYPES
        and weight.is_contiguous()
        and row_scales.is_contiguous()
    )
    if native:
        run = torch.ops.dropbydrop.rows if torch.compiler.is_compiling() else rows
        y = run(flat.contiguous(), weight, row_scales, name)
    else:
        y = flat.new_empty(flat.shape[0], weight.shape[0])
        for first in range(0, weight.shape[0], HEAD_SLAB):
            part = slice(first, first + HEAD_SLAB)
            wide, scale = weight[part].to(x.dtype), row_scales[part].to(x.dtype)
            if x.dtype == torch.float16:  # 127 x summed over d inputs could overflow: scale first
                y[:, part] = F.linear(flat, wide * scale[:, None])
            else:  # int8 is exact in the other types: one pass less over the rows
                y[:, part] = F.linear(flat, wide) * scale
    y = y.view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias.to(x.dtype)
