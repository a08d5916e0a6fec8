"""How benchmarks/gpu.py times: shapes, matrices that no cache holds, medians of graph replays."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dropbydrop import kernels
from dropbydrop.code import codebook_table
from dropbydrop.kernels import Matrix, Packed, gpu
from dropbydrop.rotation import Rotation
from dropbydrop.universal import universal_set


@dataclass(frozen=True)
class Sizes:
    """Shapes of a run; the real ones, or tiny ones that show the script works."""

    matvec: tuple[tuple[int, int], ...]  # (d_out, d_in)
    prefixes: tuple[int, ...]
    hidden: int
    inner: int
    heads: int
    vocab: int
    blocks: int
    context: int
    prefill: int
    windows: int
    seq_len: int
    replays: int


REAL = Sizes(
    ((8192, 28672), (28672, 8192), (4096, 4096)),
    (1, 2, 3, 4),
    4096, 11008, 32, 32000, 32, 512, 2048, 64, 1024, 30,
)  # fmt: skip
SMOKE = Sizes(((40, 64), (24, 96)), (2,), 64, 96, 4, 300, 2, 16, 24, 2, 16, 2)


class Bench:
    """Device, sizes, and how something is timed there."""

    def __init__(self, device: str, sizes: Sizes, megabytes: float) -> None:
        self.device, self.sizes, self.bytes = torch.device(device), sizes, megabytes * 1e6
        self.cuda = self.device.type == "cuda"
        fitting = [k for k in kernels.available() if k.takes(self.device.type)]
        self.names = [k.name for k in fitting if k.gpu] or ["torch"]
        self.tables = [codebook_table(book) for book in universal_set((2, 3, 4))]

    def seconds(self, calls: list[Callable[[], object]]) -> float:
        """Median time of one call when all are done in turn; on a GPU replayed as one graph."""
        for call in calls[:2]:
            call()
        if not self.cuda:
            return statistics.median(self._clock(calls) for _ in range(self.sizes.replays))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [call() for call in calls]
        times = []
        for _ in range(self.sizes.replays):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        del kept
        return statistics.median(times) / len(calls)

    def _clock(self, calls: list[Callable[[], object]]) -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls)

    def copies(self, size: float) -> int:
        """Matrices of `size` bytes that together exceed what caches hold; at least two."""
        return max(2, -(-int(self.bytes) // int(size)))

    def codes(self, d_out: int, d_in: int, prefix: int) -> Packed:
        """Random planes of one matrix."""
        planes = tuple(
            torch.randint(0, 256, (d_out, d_in // 8), dtype=torch.uint8, device=self.device)
            for _ in range(prefix)
        )
        return Packed(planes, d_out, d_in // 8, False)

    def product(self, d_out: int, d_in: int, prefix: int, kernel: str) -> Product:
        """A matrix of P random planes that a kernel multiplies; the rotation is part of it."""
        scales = torch.full((d_out,), 0.02, dtype=torch.float16, device=self.device)
        matrix = Matrix(self.codes(d_out, d_in, prefix), scales)
        rotation = Rotation.make(d_in, seed=0).to(self.device)
        return Product(matrix, self.tables, rotation, prefix, kernel)


class Product(nn.Module):
    """y = W x from planes, by a kernel of its name."""

    def __init__(
        self, matrix: Matrix, tables: list[Tensor], rotation: Rotation, prefix: int, kernel: str
    ) -> None:
        super().__init__()
        self.bytes = prefix * matrix.packed.planes[0].numel()
        if kernel == "torch":
            books = kernels.prepare_codebooks(tables, True)
            self._call: Any = kernels.Bound([matrix], books, rotation, prefix, kernel)
        else:
            on_device = gpu.device_tables(tables, matrix.scales.device)
            self._call = gpu.DeviceSite([matrix], on_device, rotation, prefix, kernel)

    def forward(self, x: Tensor) -> Tensor:
        return self._call(x)[0]
