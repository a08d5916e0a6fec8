"""How benchmarks/gpu.py times: shapes, matrices that no cache holds, medians of graph replays."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dropbydrop import kernels
from dropbydrop.coding.codebook_set import CodebookSet
from dropbydrop.coding.codebooks import universal_set
from dropbydrop.coding.planes import BytesPlane
from dropbydrop.coding.rotation import Rotation
from dropbydrop.kernels import Matrix, Plane


@dataclass(frozen=True)
class Sizes:
    """Shapes of a run; the real ones, or tiny ones that show the script works."""

    matvec: tuple[tuple[int, int], ...]  # (d_out, d_in)
    prefixes: tuple[int, ...]  # those with a target first
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
    ((8192, 28672), (4096, 4096), (28672, 8192)),
    (2, 4, 1, 3),
    4096, 11008, 32, 32000, 32, 512, 2048, 64, 1024, 30,
)  # fmt: skip
SMOKE = Sizes(((40, 64), (24, 96)), (2,), 64, 96, 4, 300, 2, 16, 24, 2, 16, 2)


class Bench:
    """Device, sizes, and how something is timed there."""

    def __init__(self, device: str, sizes: Sizes, megabytes: float) -> None:
        self.device, self.sizes, self.bytes = torch.device(device), sizes, megabytes * 1e6
        self.cuda = self.device.type == "cuda"
        self.partial: dict[str, Any] = {}  # of the step that runs, kept if it fails
        fitting = [k for k in kernels.available() if k.takes(self.device.type)]
        self.names = [k.name for k in fitting if k.gpu] or ["torch"]
        self.books = universal_set((2, 3, 4))

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
        graph.replay()  # the first one uploads the graph
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

    def synchronize(self) -> None:
        """Wait for the device, so that a host clock may be read."""
        if self.cuda:
            torch.cuda.synchronize()

    def copies(self, size: float) -> int:
        """Matrices of `size` bytes that together exceed what caches hold; at least two."""
        return max(2, -(-int(self.bytes) // int(size)))

    def codes(self, d_out: int, d_in: int, prefix: int) -> tuple[Plane, ...]:
        """Random planes of one matrix."""
        planes = (
            torch.randint(0, 256, (d_out, d_in // 8), dtype=torch.uint8, device=self.device)
            for _ in range(prefix)
        )
        return tuple(Plane.stored(plane, BytesPlane(), d_out, d_in) for plane in planes)

    def products(self, rows: Sequence[int], d_in: int, prefix: int, kernel: str) -> Products:
        """Matrices of P random planes that share an input; the rotation is part of the product."""
        matrices = [
            Matrix(
                self.codes(d_out, d_in, prefix),
                torch.full((d_out,), 0.02, dtype=torch.float16, device=self.device),
            )
            for d_out in rows
        ]
        rotation = Rotation.make(d_in, seed=0).to(self.device)
        return Products(matrices, self.books, rotation, prefix, kernel)


class Products(nn.Module):
    """x -> W x for each matrix of an input group, from planes, by a kernel.

    Args:
        books: what the codes mean.
        kernel: name of the kernel; "torch" decodes a dense matrix.
    """

    def __init__(
        self,
        matrices: list[Matrix],
        books: CodebookSet,
        rotation: Rotation,
        prefix: int,
        kernel: str,
    ) -> None:
        super().__init__()
        prepared = kernels.prepare_codebooks(books)
        self._call = kernels.prepare_group(matrices, prepared, rotation, prefix, kernel)

    def forward(self, x: Tensor) -> Sequence[Tensor]:
        return self._call(x)


class Dense(nn.Module):
    """The same from random matrices in bfloat16."""

    def __init__(self, b: Bench, rows: Sequence[int], d_in: int) -> None:
        super().__init__()
        kind: dict[str, Any] = {"dtype": torch.bfloat16, "device": b.device}
        self.weights = [torch.randn(d_out, d_in, **kind) / d_in**0.5 for d_out in rows]

    def forward(self, x: Tensor) -> Sequence[Tensor]:
        return [nn.functional.linear(x, weight) for weight in self.weights]
