"""The steps of benchmarks/gpu.py that time products: copy, matvec, prefill, decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dropbydrop import kernels

from .timing import Bench, Dense, Nothing, Way

Make = Callable[[Sequence[int], int], nn.Module]  # (rows of each matrix, d_in) -> x -> products


def attempt(record: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """`record` with what was measured, or with the error: one kernel does not stop the others."""
    try:
        return record | measure()
    except Exception as error:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # raises where the device is lost
        return record | {"error": f"{type(error).__name__}: {error}"}


def copy(b: Bench) -> dict[str, Any]:
    """Gigabytes a second of a copy, reads and writes counted."""
    count = (1 << 30) if b.cuda else (1 << 20)
    source = torch.empty(count, dtype=torch.uint8, device=b.device)
    target = torch.empty_like(source)
    return {"gb_per_s": 2 * count / b.seconds([lambda: target.copy_(source)] * 4) / 1e9}


def matvec(b: Bench) -> dict[str, Any]:
    """Microseconds of one product, its ratio to bfloat16, and gigabytes of codes a second."""
    out = b.partial
    for d_out, d_in in b.sizes.matvec:
        x = torch.randn(1, d_in, dtype=torch.bfloat16, device=b.device)
        size = 2 * d_out * d_in
        dense = [
            torch.randn(d_out, d_in, dtype=torch.bfloat16, device=b.device)
            for _ in range(b.copies(size))
        ]
        plain = b.seconds([partial(F.linear, x, w) for w in dense])
        del dense
        out[f"{d_out}x{d_in}"] = {
            "bf16_us": plain * 1e6,
            "bf16_gb_per_s": size / plain / 1e9,
            "planes": [],
        }

    def measure(d_out: int, d_in: int, bits: int, way: Way, plain_us: float) -> dict[str, Any]:
        size = bits * d_out * d_in // 8
        x = torch.randn(1, d_in, dtype=torch.bfloat16, device=b.device)
        products = [b.products([d_out], d_in, bits, way) for _ in range(b.copies(size))]
        spent = b.seconds([partial(p, x) for p in products])
        return {
            "us": spent * 1e6,
            "times_bf16": plain_us / (spent * 1e6),
            "codes_gb_per_s": size / spent / 1e9,
        }

    for way in b.ways:
        for d_out, d_in in b.sizes.matvec:
            entry = out[f"{d_out}x{d_in}"]
            for bits in b.bits(way.code):
                work = partial(measure, d_out, d_in, bits, way, entry["bf16_us"])
                entry["planes"].append(attempt(way.record | {"bits": bits}, work))
    return out


def prefill(b: Bench) -> dict[str, Any]:
    """Decoding to bfloat16 as a share of a product of many rows."""
    product_us: dict[tuple[int, int], float] = {}
    for d_out, d_in in b.sizes.matvec:
        x = torch.randn(b.sizes.prefill, d_in, dtype=torch.bfloat16, device=b.device)
        weight = torch.randn(d_out, d_in, dtype=torch.bfloat16, device=b.device)
        product_us[d_out, d_in] = 1e6 * b.seconds([partial(F.linear, x, weight)] * 2)

    def measure(shape: tuple[int, int], bits: int, way: Way) -> dict[str, Any]:
        if way.kernel == "torch":
            scales = torch.ones(shape[0], dtype=torch.float16, device=b.device)
            matrix = kernels.Matrix(b.planes(way.code, *shape, bits), scales)
            books, prefix = b.books[way.code], b.prefix(way.code, bits)
            run: Callable[[], object] = partial(
                kernels.decode_dense, matrix, books, prefix, torch.bfloat16, "torch"
            )
        else:  # without making the tables anew
            group: Any = b.products(shape[:1], shape[1], bits, way)._call
            run = partial(group.weight, 0, torch.bfloat16)
        spent, whole = 1e6 * b.seconds([run] * 2), product_us[shape]
        return {"decode_us": spent, "product_us": whole, "share": spent / whole}

    for way in b.ways:
        for shape in product_us:
            for bits in sorted({2, max(b.sizes.bits)}):
                what = f"{shape[0]}x{shape[1]} {bits} bits {way.code} {way.kernel}"
                b.partial[what] = attempt({}, partial(measure, shape, bits, way))
    return b.partial


class Block(nn.Module):
    """One Llama block for one token; its key/value cache is full and not written."""

    def __init__(self, b: Bench, make: Make) -> None:
        super().__init__()
        s = b.sizes
        self.heads = s.heads
        self.qkv, self.o = make([s.hidden] * 3, s.hidden), make([s.hidden], s.hidden)
        self.gate_up, self.down = make([s.inner] * 2, s.hidden), make([s.hidden], s.inner)
        shape = (1, s.heads, s.context, s.hidden // s.heads)
        self.cache = [torch.randn(shape, dtype=torch.bfloat16, device=b.device) for _ in range(2)]
        self.norms = [torch.ones(s.hidden, dtype=torch.bfloat16, device=b.device) for _ in range(2)]

    def forward(self, x: Tensor) -> Tensor:
        """x [1, d] -> [1, d]."""
        y = F.rms_norm(x, x.shape[-1:], self.norms[0])
        q, k, v = (part.reshape(1, self.heads, 1, -1) for part in self.qkv(y))
        attended = F.scaled_dot_product_attention(q + 0 * (k + v), *self.cache)
        x = x + self.o(attended.reshape(1, -1))[0]
        gate, up = self.gate_up(F.rms_norm(x, x.shape[-1:], self.norms[1]))
        return x + self.down(F.silu(gate) * up)[0]


@torch.no_grad()
def decode(b: Bench) -> dict[str, Any]:
    """Milliseconds a token of a whole decoder, head included, and the ratio to bfloat16; `rest_ms`
    is a token without any products but the head's."""
    s = b.sizes
    x = torch.randn(1, s.hidden, dtype=torch.bfloat16, device=b.device)
    head = torch.randn(s.vocab, s.hidden, dtype=torch.bfloat16, device=b.device)

    def token(make: Make) -> float:
        blocks = [Block(b, make) for _ in range(s.blocks)]

        def run() -> Tensor:
            y = x
            for block in blocks:
                y = block(y)
            return F.linear(y, head)

        return b.seconds([run])

    plain = token(lambda rows, d_in: Dense(b, rows, d_in))

    def measure(way: Way, bits: int) -> dict[str, Any]:
        spent = token(lambda rows, d_in: b.products(rows, d_in, bits, way))
        return {"ms": spent * 1e3, "times_bf16": plain / spent}

    out = b.partial
    out |= {"blocks": s.blocks, "bf16_ms": plain * 1e3, "planes": []}
    out["rest_ms"] = 1e3 * token(lambda rows, d_in: Nothing(b, rows, d_in))
    for way in b.ways:
        for bits in sorted({2, max(s.bits)}):
            if way.kernel != "torch":  # which decodes a dense matrix for every token
                out["planes"].append(
                    attempt(way.record | {"bits": bits}, partial(measure, way, bits))
                )
    return out
