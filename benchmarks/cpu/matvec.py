"""Matrix-vector products at every prefix, against named baselines of the same run.

    python benchmarks/cpu/matvec.py                # shapes and prefixes of docs/results.md
    python benchmarks/cpu/matvec.py --threads 2 --kernels avx512vbmi,avx2-u8 --shapes 4096x4096
    python benchmarks/cpu/matvec.py --crossover    # rows of x: tables against a dense matrix
    python benchmarks/cpu/matvec.py --errors       # output error of every kernel; not timed

Every product reads codes that are not in any cache: the matrices of a sweep total more than
--megabytes (600; more than the last cache), and each is used once a sweep. A time is a whole call
from Python, with rotation, table building, the product and the row scales. Baselines are timed in
turn with the kernels, so that a busy machine slows them alike: a plain sequential read of the same
memory with the same threads ("stream"), and torch's own product in bfloat16 and float32. Figures
are the best of --rounds sweeps; the JSON on the last line has all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from dropbydrop import kernels
from dropbydrop.coding.codebook_set import BytesSet
from dropbydrop.coding.planes import BytesPlane
from dropbydrop.coding.rotation import Rotation
from dropbydrop.evaluation.bench import topology
from dropbydrop.kernels import CpuGroup, Matrix, Plane
from dropbydrop.system.native_library import library

PREFIXES = (1, 2, 3, 4)
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


def random_books(prefix: int) -> kernels.Codebooks:
    stored = [torch.randn(128, 8) * 0.5**m for m in range(prefix)]
    return kernels.prepare_codebooks(BytesSet.of(stored))


def held(planes: Tensor, rows: int, d_in: int) -> tuple[Plane, ...]:
    """Packed bytes [P, bytes] as planes."""
    return tuple(Plane(plane, BytesPlane(), rows, d_in, packed=True) for plane in planes)


def product_sweeps(
    memory: Tensor, rows: int, d_in: int, names: list[str], dense_limit: int
) -> list[Sweep]:
    """One sweep per kernel and prefix, then the baselines."""
    groups, x = d_in // 8, torch.randn(1, d_in)
    plane = -(-rows // 64) * 64 * groups
    books, rotation = random_books(max(PREFIXES)), Rotation.make(d_in)
    scales = torch.rand(rows).half()
    sweeps = []
    for name in names:
        for prefix in PREFIXES:
            count = memory.numel() // (plane * prefix)
            prepared = [
                CpuGroup([Matrix(held(planes, rows, d_in), scales)], books, rotation, prefix, name)
                for planes in memory[: count * plane * prefix].view(count, prefix, plane)
            ]  # fmt: skip
            calls = [lambda group=group: group(x) for group in prepared]
            sweeps.append(Sweep(f"{name} P={prefix}", calls, plane * prefix))
    for dtype in (torch.bfloat16, torch.float32):
        size = rows * d_in * dtype.itemsize
        count = max(2, dense_limit // size)
        weights = [torch.empty(rows, d_in, dtype=dtype) for _ in range(count)]
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
        sweeps = product_sweeps(memory, rows, d_in, args.kernels.split(","), args.megabytes << 20)
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
    """Rows of x at which a dense product overtakes tables."""
    results = []
    for shape in args.shapes.split(","):
        rows, d_in = map(int, shape.split("x"))
        books, rotation = random_books(max(PREFIXES)), Rotation.make(d_in)
        groups = d_in // 8
        plane = -(-rows // 64) * 64 * groups
        planes = memory[: 4 * plane].view(4, plane).unbind()
        held = tuple(Plane(p, rows, groups, True) for p in planes)
        matrix = Matrix(held, torch.rand(rows))
        print(f"\n{rows} x {d_in}, {args.threads} thread(s): microseconds, tables / dense")
        print("rows of x" + "".join(f"{f'P={prefix}':>18}" for prefix in PREFIXES))
        for n in (1, 2, 4, 8, 16, 32, 64, 128):
            line = f"{n:9}"
            for prefix in PREFIXES:
                prepared = CpuGroup([matrix], books, rotation, prefix, args.kernels.split(",")[0])
                best = []
                for dtype in (torch.float32, torch.bfloat16):
                    x = torch.randn(n, d_in, dtype=dtype)
                    dense = Sweep("dense", [lambda x=x, b=prepared: b.dense(x)], 0)
                    tables = Sweep("tables", [lambda x=x, b=prepared: b.gemv(x)], 0)
                    for _ in range(args.rounds):
                        dense.run()
                        tables.run()
                    best.append((tables.best, dense.best))
                    results.append(
                        {
                            "shape": [rows, d_in], "rows_of_x": n, "prefix": prefix,
                            "threads": args.threads, "dtype": str(dtype),
                            "tables_us": tables.best * 1e6, "dense_us": dense.best * 1e6,
                        }
                    )  # fmt: skip
                fastest = min(best[0][1], best[1][1])
                line += f"{best[0][0] * 1e6:9.0f}/{fastest * 1e6:<8.0f}"
            print(line)
    return results


def measure_errors(args: argparse.Namespace) -> list[dict]:
    """|y - y64| / |y64| with y64 in float64 from the decoded weights; inputs are not rotated."""
    results = []
    for shape in args.shapes.split(","):
        rows, d_in = map(int, shape.split("x"))
        books, straight = random_books(max(PREFIXES)), Rotation(d_in, 1, torch.ones(d_in), None)
        codes = [torch.randint(0, 256, (rows, d_in // 8)).byte() for _ in PREFIXES]
        matrix = Matrix(kernels.pack(codes, books.set.planes, rows, d_in), torch.ones(rows))
        plain = torch.randn(8, d_in)
        peaked = plain.clone()
        peaked[:, :: d_in // 4] = 20.0  # four outliers of 20 times the rms
        print(f"\n{rows} x {d_in}: relative error, Gaussian inputs / with outliers")
        print(f"{'':24}" + "".join(f"{f'P={prefix}':>20}" for prefix in PREFIXES))
        for kernel in (k for k in kernels.available() if not k.gpu):
            line = f"{kernel.name:24}"
            for prefix in PREFIXES:
                prepared = CpuGroup([matrix], books, straight, prefix, kernel.name)
                weight = prepared.weight(0, torch.float64)
                errors = []
                for x in (plain, peaked):
                    want = x.double() @ weight.T
                    errors.append(float((prepared(x)[0] - want).norm() / want.norm()))
                line += f"{errors[0]:11.1e}/{errors[1]:.1e} "
                results.append(
                    {"name": kernel.name, "shape": [rows, d_in], "prefix": prefix,
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
