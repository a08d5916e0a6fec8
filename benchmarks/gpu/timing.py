"""How benchmarks/gpu.py times: shapes, matrices that no cache holds, medians of graph replays."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dropbydrop import kernels
from dropbydrop.coding.planes import KINDS, counts_of
from dropbydrop.coding.rotation import Rotation
from dropbydrop.kernels import Codebooks, Matrix, Plane
from random_model import LEVELS, random_planes, random_set


class Unavailable(Exception):
    """A step cannot run here, for a reason that is no failure of it."""


class Way(NamedTuple):
    """A kind of planes, and a kernel that multiplies by them."""

    code: str
    kernel: str

    @property
    def record(self) -> dict[str, Any]:
        """For the results."""
        return self._asdict()


@dataclass(frozen=True)
class Sizes:
    """Shapes of a run; the real ones, or tiny ones that show the script works."""

    matvec: tuple[tuple[int, int], ...]  # (d_out, d_in)
    bits: tuple[int, ...]  # those with a target first
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

    def __init__(
        self,
        device: str,
        sizes: Sizes,
        megabytes: float,
        codes: Sequence[str] = tuple(KINDS),
        only: Sequence[str] | None = None,
    ) -> None:
        """
        Args:
            megabytes: least size of what a graph reads.
            codes: kinds of planes. only: names of kernels; all that there are by default.
        """
        self.device, self.sizes, self.bytes = torch.device(device), sizes, megabytes * 1e6
        self.cuda = self.device.type == "cuda"
        self.partial: dict[str, Any] = {}  # of the step that runs, kept if it fails
        self.codes = list(codes)
        fitting = [k for k in kernels.available() if k.takes(self.device.type)]
        on_gpu = [k for k in fitting if k.gpu] or fitting[-1:]
        chosen = [k for k in on_gpu if only is None or k.name in only]
        self.ways = [Way(code, k.name) for k in chosen for code in codes if k.reads(code)]
        self.names = list(dict.fromkeys(way.kernel for way in self.ways))
        planes = {code: random_planes(code, LEVELS) for code in codes}
        self.books = {code: kernels.prepare_codebooks(random_set(planes[code])) for code in codes}

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

    def bits(self, code: str) -> list[int]:
        """The bits of the run that planes of a kind can have."""
        sums = list(accumulate(spec.bits for spec in self.books[code].set.planes))
        return [bits for bits in self.sizes.bits if bits in sums]

    def prefix(self, code: str, bits: int) -> int:
        """Planes of a kind that have so many bits together."""
        return counts_of(self.books[code].set.planes, sorted({bits, LEVELS[-1]}))[0]

    def planes(self, code: str, d_out: int, d_in: int, bits: int) -> tuple[Plane, ...]:
        """Random planes of one matrix."""
        specs = self.books[code].set.planes[: self.prefix(code, bits)]
        return tuple(
            Plane.stored(
                torch.randint(
                    0, 256, spec.shape(d_out, d_in), dtype=torch.uint8, device=self.device
                ),
                spec,
                d_out,
                d_in,
            )
            for spec in specs
        )

    def products(self, rows: Sequence[int], d_in: int, bits: int, way: Way) -> Products:
        """Matrices of random planes that share an input; the rotation is part of the product."""
        matrices = [
            Matrix(
                self.planes(way.code, d_out, d_in, bits),
                torch.full((d_out,), 0.02, dtype=torch.float16, device=self.device),
            )
            for d_out in rows
        ]
        rotation = Rotation.make(d_in, seed=0).to(self.device)
        prefix = self.prefix(way.code, bits)
        return Products(matrices, self.books[way.code], rotation, prefix, way.kernel)


class Products(nn.Module):
    """x -> W x for each matrix of an input group, from planes, by a kernel.

    Args:
        books: what the codes mean.
        kernel: name of the kernel; "torch" decodes a dense matrix.
    """

    def __init__(
        self,
        matrices: list[Matrix],
        books: Codebooks,
        rotation: Rotation,
        prefix: int,
        kernel: str,
    ) -> None:
        super().__init__()
        self._call = kernels.prepare_group(matrices, books, rotation, prefix, kernel)

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


class Nothing(nn.Module):
    """Products that are there already: what a decoder takes beside them."""

    def __init__(self, b: Bench, rows: Sequence[int], d_in: int) -> None:
        super().__init__()
        kind: dict[str, Any] = {"dtype": torch.bfloat16, "device": b.device}
        self.results = [torch.zeros(1, d_out, **kind) for d_out in rows]

    def forward(self, x: Tensor) -> Sequence[Tensor]:
        return self.results
