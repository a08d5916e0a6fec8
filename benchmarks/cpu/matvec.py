"""Matrix-vector products at every level, against named baselines of the same run.

    python benchmarks/cpu/matvec.py                # shapes and levels of docs/results.md
    python benchmarks/cpu/matvec.py --threads 2 --kernels avx512vbmi,avx2-u8 --shapes 4096x4096
    python benchmarks/cpu/matvec.py --code bytes,trellis      # both kinds of planes in turn
    python benchmarks/cpu/matvec.py --crossover    # rows of x: the kernel against a dense matrix
    python benchmarks/cpu/matvec.py --errors       # output error of every kernel; not timed

Every product reads codes that are not in any cache: the matrices of a sweep total more than
--megabytes (600; more than the last cache), and each is used once a sweep. A time is a whole call
from Python, with rotation, tables or rounding, the product and the row scales. Baselines are timed
in turn with the kernels, so that a busy machine slows them alike: a plain sequential read of the
same memory with the same threads ("stream"), and torch's own product in bfloat16 and float32.
Figures are the best of --rounds sweeps; the JSON on the last line has all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dropbydrop import kernels
from dropbydrop.coding.planes import counts_of
from dropbydrop.coding.rotation import Rotation
from dropbydrop.evaluation.bench import topology
from dropbydrop.kernels import CpuGroup, Matrix, Plane
from dropbydrop.system.native_library import library

sys.path.append(str(Path(__file__).parents[1]))  # a script sees the modules of its folder alone
import random_model

LEVELS = {"bytes": (1, 2, 3, 4), "trellis": (2, 3, 4)}
DTYPES = (torch.float32, torch.bfloat16)
_keep: list[object] = []  # results, so that nothing is optimised away


class Sweep:
    """A list of calls on different memory, timed as one; `bytes` is what one call reads."""

    def __init__(self, name: str, calls: list[Callable[[], object]], count: int) -> None:
        self.name, self.calls, self.bytes = name, calls, count
        self.seconds: list[float] = []

    def run(self) -> None:
        start = time.perf_counter()
        for call in self.calls:
            _keep[:] = [call()]
        self.seconds.append((time.perf_counter() - start) / len(self.calls))

    @property
    def best(self) -> float:
        return min(self.seconds)

    def record(self) -> dict:
        return {
            "name": self.name,
            "microseconds": round(self.best * 1e6, 2),
            "median_microseconds": round(statistics.median(self.seconds) * 1e6, 2),
            "gigabytes_per_second": round(self.bytes / self.best / 1e9, 3),
        }


class Coded:
    """Matrices of one shape with random planes of one kind, cut out of one stretch of memory."""

    def __init__(self, code: str, window: int, rows: int, d_in: int) -> None:
        self.code, self.levels, self.rows, self.d_in = code, LEVELS[code], rows, d_in
        self.specs = random_model.random_planes(code, self.levels, window=window)
        self.prefixes = dict(zip(self.levels, counts_of(self.specs, self.levels), strict=True))
        self.books = kernels.prepare_codebooks(random_model.random_set(self.specs))
        self.sizes = [kernels.plane_bytes(spec, rows, d_in) for spec in self.specs]
        self.scales = torch.rand(rows).half()

    def bytes(self, level: int) -> int:
        """Bytes of the planes of a level, as held."""
        return sum(self.sizes[: self.prefixes[level]])

    def matrix(self, memory: Tensor, level: int) -> Matrix:
        """A matrix whose planes are the first bytes of memory."""
        planes, at = [], 0
        for spec, size in zip(self.specs, self.sizes[: self.prefixes[level]], strict=False):
            data = memory[at : at + size]
            if self.code == "trellis":
                data = data.view(spec.shape(self.rows, self.d_in)[0], -1)
            planes.append(Plane(data, spec, self.rows, self.d_in, packed=True))
            at += size
        return Matrix(tuple(planes), self.scales)

    def group(self, matrix: Matrix, level: int, kernel: str, rotation: Rotation) -> CpuGroup:
        """It alone as an input group."""
        return CpuGroup([matrix], self.books, rotation, self.prefixes[level], kernel)

    def sweep(self, memory: Tensor, level: int, kernel: str) -> Sweep:
        """Products of one row with as many matrices as memory holds."""
        x, size, rotation = torch.randn(1, self.d_in), self.bytes(level), Rotation.make(self.d_in)
        parts = memory[: memory.numel() // size * size].view(-1, size)
        groups = [self.group(self.matrix(p, level), level, kernel, rotation) for p in parts]
        calls = [lambda group=group: group(x) for group in groups]
        return Sweep(f"{kernel} {self.code} P={level}", calls, size)


def all_coded(args: argparse.Namespace, shape: str) -> list[Coded]:
    rows, d_in = map(int, shape.split("x"))
    return [Coded(code, args.window, rows, d_in) for code in args.code.split(",")]


def dense_sweeps(rows: int, d_in: int, limit: int) -> list[Sweep]:
    sweeps, x = [], torch.randn(1, d_in)
    for dtype in (torch.bfloat16, torch.float32):
        size = rows * d_in * dtype.itemsize
        weights = [torch.empty(rows, d_in, dtype=dtype) for _ in range(max(2, limit // size))]
        first = torch.randn(rows, d_in)
        for weight in weights:
            weight.copy_(first)
        xs = x.to(dtype)
        calls = [lambda w=weight, x=xs: torch.nn.functional.linear(x, w) for weight in weights]
        sweeps.append(Sweep(f"torch {str(dtype).removeprefix('torch.')}", calls, size))
    return sweeps


def stream_sweep(memory: Tensor, threads: int) -> Sweep:
    lib = library()
    assert lib is not None
    best = kernels.available()[0].index
    read = lambda: lib.drop_stream_read(best, memory.data_ptr(), memory.numel(), threads)  # noqa: E731
    return Sweep("stream", [read], memory.numel())


def measure_products(args: argparse.Namespace, memory: Tensor) -> list[dict]:
    results = []
    for shape in args.shapes.split(","):
        rows, d_in = map(int, shape.split("x"))
        stream = stream_sweep(memory, args.threads)
        sweeps = [
            coded.sweep(memory, level, kernel)
            for coded in all_coded(args, shape)
            for kernel in args.kernels.split(",")
            for level in coded.levels
        ]
        sweeps += dense_sweeps(rows, d_in, args.megabytes << 20)
        for _ in range(args.rounds):
            for sweep in (stream, *sweeps):
                sweep.run()
        by_name = {sweep.name: sweep for sweep in sweeps}
        half, full = by_name["torch bfloat16"], by_name["torch float32"]
        speed = stream.bytes / stream.best
        print(f"\n{rows} x {d_in}, {args.threads} thread(s); stream {speed / 1e9:.1f} GB/s")
        print(f"{'':24}{'us':>9}{'GB/s':>8}{'of stream':>11}{'x bf16':>8}{'x f32':>8}")
        for sweep in sweeps:
            record = sweep.record() | {
                "shape": [rows, d_in],
                "threads": args.threads,
                "of_stream": round(sweep.bytes / sweep.best / speed, 3),
                "times_bf16": round(half.best / sweep.best, 2),
                "times_f32": round(full.best / sweep.best, 2),
            }
            results.append(record)
            print(
                f"{sweep.name:24}{sweep.best * 1e6:9.1f}{record['gigabytes_per_second']:8.2f}"
                f"{record['of_stream']:10.0%} {record['times_bf16']:8.1f}{record['times_f32']:8.1f}"
            )
        results.append(stream.record() | {"shape": [rows, d_in], "threads": args.threads})
    return results


def measure_crossover(args: argparse.Namespace, memory: Tensor) -> list[dict]:
    """Rows of x at which a dense product overtakes the kernel."""
    results = []
    kernel = args.kernels.split(",")[0]
    for shape in args.shapes.split(","):
        for coded in all_coded(args, shape):
            matrix, turn = coded.matrix(memory, coded.levels[-1]), Rotation.make(coded.d_in)
            print(f"\n{shape} {coded.code}, {args.threads} thread(s): microseconds, kernel / dense")
            print("rows of x" + "".join(f"{f'P={level}':>18}" for level in coded.levels))
            for n in (1, 2, 4, 8, 16, 32, 64, 128):
                line = f"{n:9}"
                for level in coded.levels:
                    group = coded.group(matrix, level, kernel, turn)
                    records = [crossing(group, n, dtype, args.rounds) for dtype in DTYPES]
                    same = {
                        "shape": [coded.rows, coded.d_in], "code": coded.code, "rows_of_x": n,
                        "level": level, "threads": args.threads,
                    }  # fmt: skip
                    results += [same | record for record in records]
                    fastest = min(record["dense_us"] for record in records)
                    line += f"{records[0]['kernel_us']:9.0f}/{fastest:<8.0f}"
                print(line)
    return results


def crossing(group: CpuGroup, n: int, dtype: torch.dtype, rounds: int) -> dict:
    """Times of both ways of n rows."""
    x = torch.randn(n, group.d_in, dtype=dtype)
    dense = Sweep("dense", [lambda: group.dense(x)], 0)
    kernel = Sweep("kernel", [lambda: group.gemv(x)], 0)
    for _ in range(rounds):
        dense.run()
        kernel.run()
    return {
        "dtype": str(dtype),
        "kernel_us": kernel.best * 1e6,
        "dense_us": dense.best * 1e6,
    }


def measure_errors(args: argparse.Namespace) -> list[dict]:
    """|y - y64| / |y64| with y64 in float64 from the decoded weights; inputs are not rotated."""
    results = []
    for shape in args.shapes.split(","):
        for coded in all_coded(args, shape):
            straight = Rotation(coded.d_in, 1, torch.ones(coded.d_in), None)
            codes = torch.randint(0, 256, (coded.bytes(coded.levels[-1]),)).byte()
            matrix = coded.matrix(codes, coded.levels[-1])
            plain = torch.randn(8, coded.d_in)
            peaked = plain.clone()
            peaked[:, :: coded.d_in // 4] = 20.0  # four outliers of 20 times the rms
            print(f"\n{shape} {coded.code}: relative error, Gaussian inputs / with outliers")
            print(f"{'':24}" + "".join(f"{f'P={level}':>20}" for level in coded.levels))
            for kernel in kernels.available():
                if kernel.gpu or not kernel.reads(coded.code):
                    continue
                line = f"{kernel.name:24}"
                for level in coded.levels:
                    group = coded.group(matrix, level, kernel.name, straight)
                    weight = group.weight(0, torch.float64)
                    errors = []
                    for x in (plain, peaked):
                        want = x.double() @ weight.T
                        errors.append(float((group(x)[0] - want).norm() / want.norm()))
                    line += f"{errors[0]:11.1e}/{errors[1]:.1e} "
                    results.append(
                        {"name": kernel.name, "code": coded.code,
                         "shape": [coded.rows, coded.d_in], "level": level,
                         "gaussian": errors[0], "outliers": errors[1]}
                    )  # fmt: skip
                print(line)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shapes", default="4096x4096,4096x11008", help="d_out x d_in, comma-separated"
    )
    parser.add_argument(
        "--kernels", default="", help="names, comma-separated; default: the best one"
    )
    parser.add_argument(
        "--code", default="bytes", help="kinds of planes, comma-separated: bytes,trellis"
    )
    parser.add_argument("--window", type=int, default=12, help="bits, of trellis planes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=640, help="memory swept, > last cache")
    parser.add_argument("--crossover", action="store_true", help="sweep the rows of x instead")
    parser.add_argument("--errors", action="store_true", help="errors instead of times")
    args = parser.parse_args()
    if library() is None:
        print("the native kernels are not built", file=sys.stderr)
        return 2
    args.kernels = args.kernels or kernels.select().name
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    where = topology()
    for key, value in where.items():
        print(f"{key}: {value}")
    with torch.inference_mode():
        if args.errors:
            results = measure_errors(args)
        else:
            memory = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8).repeat(args.megabytes)
            measure = measure_crossover if args.crossover else measure_products
            results = measure(args, memory)
    print(json.dumps({"benchmark": "matvec", "topology": where, "results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
