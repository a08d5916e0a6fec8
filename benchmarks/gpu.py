"""Everything the GPU path promises, measured in one run of under ten minutes; prints JSON.

    python benchmarks/gpu.py --state gpu.json       # all steps; run again to go on after a break
    python benchmarks/gpu.py --plan                 # what would be measured, and how much memory
    python benchmarks/gpu.py --only matvec,prefill
    python benchmarks/gpu.py --smoke --device cpu   # tiny shapes, any device: that it runs at all

Steps, in this order, each written to the state file when it is done and not repeated:
    tests      the tests marked gpu, in at most 170 seconds; which failed
    copy       bytes read and written by a copy of 1 GiB, a second. The ceiling of the shares is
               this or the fastest bfloat16 product of `matvec`, which only reads, if that is more
    matvec     one row of x times W under a CUDA graph: rotation and product from P planes, against
               torch's bfloat16 product of the same shape in the same run
    counters   where NVIDIA's ncu is on the PATH: instructions, turns of shared memory and traffic
               of one product of each kind, in at most 40 seconds
    prefill    decoding to a dense matrix, against a product of 2,048 rows with it
    decode     a token of a 7B-shaped decoder (own minimal blocks, all of them, random weights)
               under a CUDA graph, from planes, in bfloat16, and without the products
    search     one 7B-shaped square matrix: seconds and memory
    quantize   chain, H and search of one 7B-shaped block with 64 windows of 1,024 tokens; the time
               for 32 blocks is EXTRAPOLATED. Memory is the peak of the device
    generate   a token through transformers' static cache and compile path, with few blocks of a
               checkpoint; time a block is the difference between two depths, and the model's is
               EXTRAPOLATED from it
    smollm2    --model quantized with --preset best: seconds, perplexity and KL of levels 2, 3, 4
    tuned      that checkpoint fine-tuned: the same table. It needs --work, or the run of smollm2

Every product reads memory that is in no cache: the matrices of a graph total more than --megabytes
(256; 60 is the last cache of an H200), each used once a replay. Times are medians of replays by
device events.

What goes wrong is recorded beside what the step had found until then, and does not stop the others:
a step that raises, one that takes longer than three times what is foreseen, one that leaves the
device unusable (the script then starts itself again for the steps that are left). A step that no
longer fits into --minutes is left for the next run. Only a run that names the step repeats one that
failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dropbydrop.coding.planes import KINDS
from gpu.device import counters, tests
from gpu.models import ModelBench, generate, quantize, search, smollm2, tuned
from gpu.products import copy, decode, matvec, prefill
from gpu.timing import Bench, Unavailable

STEPS: dict[str, Callable[[Any], dict[str, Any]]] = {
    step.__name__: step
    for step in (
        tests,
        copy,
        matvec,
        counters,
        prefill,
        decode,
        search,
        quantize,
        generate,
        smollm2,
        tuned,
    )
}
# Seconds foreseen on an H200, compiling included. Guesses, for the budget alone.
SECONDS = {
    "tests": 180, "copy": 5, "matvec": 10, "counters": 45, "prefill": 5, "decode": 10,
    "search": 35, "quantize": 100,
    "generate": 150, "smollm2": 270, "tuned": 120,
}  # fmt: skip
_STARTED = "DROPBYDROP_BENCHMARK_STARTED"  # when, for a script that started itself again


def targets(results: dict[str, Any]) -> dict[str, Any]:
    """What the results say about the project's targets, the best kernel at each."""
    best: dict[str, Any] = {}

    def better(key: str, value: float, kernel: str) -> None:
        if value > best.get(key, {"value": 0})["value"]:
            best[key] = {"value": value, "kernel": kernel}

    def kind(row: dict[str, Any]) -> str:
        return " of trellis planes" if row.get("code") == "trellis" else ""

    products = [e for e in results.get("matvec", {}).values() if isinstance(e, dict)]
    rates = [results.get("copy", {}).get("gb_per_s", 0)]
    bandwidth = max(rates + [entry.get("bf16_gb_per_s", 0) for entry in products])
    for shape, entry in results.get("matvec", {}).items():
        for row in entry["planes"] if isinstance(entry, dict) else []:
            if "error" in row:
                continue
            what = f"matvec {shape} {row['bits']} bits{kind(row)}"
            better(f"{what}, times bf16", row["times_bf16"], row["kernel"])
            if bandwidth:
                share = row["codes_gb_per_s"] / bandwidth
                better(f"{what}, share of the fastest read", share, row["kernel"])
    for row in results.get("decode", {}).get("planes", []):
        if "error" not in row:
            better(
                f"decode {row['bits']} bits{kind(row)}, times bf16",
                row["times_bf16"],
                row["kernel"],
            )
    for what, entry in results.get("prefill", {}).items():
        if isinstance(entry, dict) and "share" in entry:
            best[f"prefill {what}, share of the product"] = {"value": entry["share"]}
    for code, found in results.get("quantize", {}).items():
        for what, value in found.items() if isinstance(found, dict) else []:
            if what.startswith("extrapolated") or what == "peak_device_gib":
                best[f"quantize {code}, {what}"] = {"value": value}
    return best


def machine(b: Bench) -> dict[str, Any]:
    """The device that is measured, and versions."""
    found = {"torch": torch.__version__, "device": str(b.device), "kernels": b.names}
    if b.cuda:
        found |= {"gpu": torch.cuda.get_device_name(b.device), "cuda": torch.version.cuda}
    return found


def plan(b: Bench, steps: list[str]) -> dict[str, Any]:
    """Steps, shapes and seconds foreseen; memory is that of the largest set of matrices."""
    s = b.sizes
    sizes = [2 * d_out * d_in for d_out, d_in in s.matvec]
    return {
        "machine": machine(b),
        "steps": steps,
        "foreseen_seconds": {name: SECONDS[name] for name in steps},
        "shapes": [f"{d_out}x{d_in}" for d_out, d_in in s.matvec],
        "codes": b.codes,
        "bits": list(s.bits),
        "matrices_of_a_shape_in_bf16": [b.copies(size) for size in sizes],
        "gib": max(b.copies(size) * size for size in sizes) / 2**30,
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--state", type=Path, help="file of finished steps, which are not repeated")
    parser.add_argument("--only", help="steps, comma separated [all that are not done]")
    parser.add_argument(
        "--minutes", type=float, default=9.5, help="begin nothing that takes longer"
    )
    parser.add_argument("--code", choices=KINDS, help="kind of planes [both]")
    parser.add_argument("--kernels", help="names of kernels, comma separated [all that there are]")
    parser.add_argument("--megabytes", type=float, default=256, help="least size of a graph")
    parser.add_argument("--model", default="smollm2", help="model of the last two steps")
    parser.add_argument("--text", type=Path, help="text to evaluate on [the reference of Python]")
    parser.add_argument("--work", type=Path, help="folder that keeps the checkpoints")
    parser.add_argument("--plan", action="store_true", help="print what would run, and stop")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    args = parser.parse_args(argv)
    args.named = args.only is not None
    args.steps = args.only.split(",") if args.named else list(STEPS)
    if unknown := set(args.steps) - set(STEPS):
        parser.error(f"no step {', '.join(sorted(unknown))}; choose of {', '.join(STEPS)}")
    if args.device.startswith("cuda") and not torch.cuda.is_available() and not args.plan:
        parser.error("no CUDA device was found; --plan and --smoke --device cpu need none")
    return args


class State:
    """Results so far, kept in a file where one was named."""

    def __init__(self, file: Path | None, found: dict[str, Any]) -> None:
        self.file, self.results = file, {"machine": found}
        if file is not None and file.is_file():
            self.results = json.loads(file.read_text())
            if self.results.get("machine") != found:
                raise SystemExit(f"{file} is from another machine or version; remove it")

    def open(self, name: str, named: bool) -> bool:
        """Whether a step is still to be done."""
        entry = self.results.get(name)
        return entry is None or "skipped" in entry or ("error" in entry and named)

    def note(self, name: str, entry: dict[str, Any], seconds: float) -> None:
        self.results[name] = entry
        self.results.setdefault("seconds", {})[name] = round(seconds, 1)
        if self.file is not None:
            part = self.file.with_name(f"{self.file.name}.part")
            part.write_text(json.dumps(self.results))
            part.replace(self.file)


def again(started: float) -> None:
    """Start the script anew: its device is lost. The failed step is on record."""
    os.environ[_STARTED] = str(started)
    os.execv(sys.executable, [sys.executable, *sys.argv])


def run_step(b: Bench, name: str, state: State, started: float) -> None:
    """One step, whatever happens in it."""
    begin = time.perf_counter()

    b.partial = {}

    def overdue() -> None:
        seconds = time.perf_counter() - begin
        state.note(name, b.partial | {"error": f"given up after {seconds:.0f} seconds"}, seconds)
        again(started)

    watch = threading.Timer(3 * SECONDS[name], overdue)
    watch.daemon = True
    if b.cuda and state.file is not None:
        watch.start()
    print(f"{name} ...", file=sys.stderr, flush=True)
    lost = False
    try:
        entry = STEPS[name](b)
    except Unavailable as reason:
        entry = {"skipped": str(reason)}
    except Exception as error:  # the other steps still count
        entry = b.partial | {"error": f"{type(error).__name__}: {error}"}
        if b.cuda:
            try:
                torch.cuda.synchronize()
            except Exception:
                lost = True
    watch.cancel()
    state.note(name, entry, time.perf_counter() - begin)
    if lost and state.file is not None:
        again(started)
    if b.cuda and not lost:
        torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    started = float(os.environ.pop(_STARTED, time.time()))
    b = ModelBench(args)
    if args.plan:
        print(json.dumps(result := plan(b, args.steps), indent=1))
        return result
    state = State(args.state, machine(b))
    for name in args.steps:
        if not state.open(name, args.named):
            continue
        left = 60 * args.minutes - (time.time() - started)
        if SECONDS[name] > left:
            why = f"takes some {SECONDS[name]} seconds, {left:.0f} are left; run again"
            state.note(name, {"skipped": why}, 0.0)
        else:
            run_step(b, name, state, started)
    results = state.results | {"targets": targets(state.results)}
    print(json.dumps(results))
    return results


if __name__ == "__main__":
    main()
