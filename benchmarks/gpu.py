"""Everything the GPU path promises, measured in one run of under ten minutes; prints JSON.

    python benchmarks/gpu.py --state gpu.json       # all steps; run again to go on after a break
    python benchmarks/gpu.py --plan                 # what would be measured, and how much memory
    python benchmarks/gpu.py --only matvec,prefill
    python benchmarks/gpu.py --smoke --device cpu   # tiny shapes, any device: that it runs at all

Steps, each written to the state file when it is done and not repeated:
    copy       bytes read and written by a copy of 1 GiB, a second: the ceiling all shares refer to
    matvec     one row of x times W under a CUDA graph: rotation and product from P planes, against
               torch's bfloat16 product of the same shape in the same run
    prefill    decoding to a dense matrix, against a product of 2,048 rows with it
    decode     a token of a 7B-shaped decoder (own minimal blocks, all of them, random weights)
               under a CUDA graph, from planes and in bfloat16
    generate   the same through transformers' static cache and compile path, with few blocks; time a
               block is the difference between two depths, and the model's is EXTRAPOLATED from it
    quantize   chain, H and search of one 7B-shaped block with 64 windows of 1,024 tokens; the time
               for 32 blocks is EXTRAPOLATED. Memory is the peak of the device

Every product reads memory that is in no cache: the matrices of a graph total more than --megabytes
(256; 60 is the last cache of an H200), each used once a replay. Times are medians of replays by
device events. A step that fails is recorded with its error and does not stop the others.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_timing import REAL, SMOKE, Bench
from torch import Tensor, nn
from torch.nn import functional as F

from dropbydrop import kernels
from dropbydrop.kernels import gpu
from dropbydrop.universal import universal_set


def copy(b: Bench) -> dict[str, Any]:
    """Gigabytes a second of a copy, reads and writes counted."""
    count = (1 << 30) if b.cuda else (1 << 20)
    source = torch.empty(count, dtype=torch.uint8, device=b.device)
    target = torch.empty_like(source)
    return {"gb_per_s": 2 * count / b.seconds([lambda: target.copy_(source)] * 4) / 1e9}


def matvec(b: Bench) -> dict[str, Any]:
    """Microseconds of one product, its ratio to bfloat16, and gigabytes of codes a second."""
    out = {}
    for d_out, d_in in b.sizes.matvec:
        x = torch.randn(1, d_in, dtype=torch.bfloat16, device=b.device)
        size = 2 * d_out * d_in
        dense = [
            torch.randn(d_out, d_in, dtype=torch.bfloat16, device=b.device)
            for _ in range(b.copies(size))
        ]
        plain = b.seconds([partial(F.linear, x, w) for w in dense])
        del dense
        rows: list[dict[str, Any]] = []
        for prefix in b.sizes.prefixes:
            for name in b.names:
                size = prefix * d_out * d_in // 8
                products = [b.product(d_out, d_in, prefix, name) for _ in range(b.copies(size))]
                spent = b.seconds([partial(p, x) for p in products])
                rows.append(
                    {
                        "kernel": name,
                        "bits": prefix,
                        "us": spent * 1e6,
                        "times_bf16": plain / spent,
                        "codes_gb_per_s": size / spent / 1e9,
                    }
                )
        out[f"{d_out}x{d_in}"] = {
            "bf16_us": plain * 1e6,
            "bf16_gb_per_s": 2 * d_out * d_in / plain / 1e9,
            "planes": rows,
        }
    return out


def prefill(b: Bench) -> dict[str, Any]:
    """Decoding to bfloat16 as a share of a product of many rows."""
    out = {}
    for d_out, d_in in b.sizes.matvec:
        x = torch.randn(b.sizes.prefill, d_in, dtype=torch.bfloat16, device=b.device)
        weight = torch.randn(d_out, d_in, dtype=torch.bfloat16, device=b.device)
        whole = b.seconds([partial(F.linear, x, weight)])
        scales = torch.ones(d_out, dtype=torch.float16, device=b.device)
        books = kernels.prepare_codebooks(b.tables, True)
        for name in b.names:
            if name == "cuda-i8":
                continue  # decodes with the same kernel as triton
            prefix = b.sizes.prefixes[-1]
            packed = b.codes(d_out, d_in, prefix)
            if name == "triton":
                tables = gpu.device_tables(b.tables[:prefix], b.device)
                operator = torch.ops.dropbydrop.gpu_decode
                run = partial(operator, list(packed.planes), tables, scales, torch.bfloat16)
            else:
                reference = kernels.decode_dense
                run = partial(reference, packed, books, scales, prefix, torch.bfloat16, name)
            spent = b.seconds([run])
            out[f"{d_out}x{d_in} {name} {prefix} bits"] = {
                "decode_us": spent * 1e6,
                "product_us": whole * 1e6,
                "share": spent / whole,
            }
    return out


class Block(nn.Module):
    """One Llama block for one token; its key/value cache is full and not written."""

    def __init__(self, b: Bench, make: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        s = b.sizes
        self.heads = s.heads
        self.q, self.k, self.v, self.o = (make(s.hidden, s.hidden) for _ in range(4))
        self.gate, self.up = make(s.inner, s.hidden), make(s.inner, s.hidden)
        self.down = make(s.hidden, s.inner)
        shape = (1, s.heads, s.context, s.hidden // s.heads)
        self.cache = [torch.randn(shape, dtype=torch.bfloat16, device=b.device) for _ in range(2)]
        self.norms = [torch.ones(s.hidden, dtype=torch.bfloat16, device=b.device) for _ in range(2)]

    def forward(self, x: Tensor) -> Tensor:
        """x [1, d] -> [1, d]."""
        y = F.rms_norm(x, x.shape[-1:], self.norms[0])
        q, k, v = (part(y).view(1, self.heads, 1, -1) for part in (self.q, self.k, self.v))
        keys = self.cache[0] + 0 * k  # as a cache would be read after being written
        attended = F.scaled_dot_product_attention(q, keys, self.cache[1] + 0 * v)
        x = x + self.o(attended.reshape(1, -1))
        y = F.rms_norm(x, x.shape[-1:], self.norms[1])
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def dense_linear(b: Bench) -> Callable[[int, int], nn.Module]:
    def make(d_out: int, d_in: int) -> nn.Module:
        layer = nn.Linear(d_in, d_out, bias=False, dtype=torch.bfloat16, device=b.device)
        return layer.requires_grad_(False)

    return make


@torch.no_grad()
def decode(b: Bench) -> dict[str, Any]:
    """Milliseconds a token of a whole decoder, head included, and the ratio to bfloat16."""
    s = b.sizes
    x = torch.randn(1, s.hidden, dtype=torch.bfloat16, device=b.device)
    head = torch.randn(s.vocab, s.hidden, dtype=torch.bfloat16, device=b.device)

    def token(make: Callable[[int, int], nn.Module]) -> float:
        blocks = [Block(b, make) for _ in range(s.blocks)]

        def run() -> Tensor:
            y = x
            for block in blocks:
                y = block(y)
            return F.linear(y, head)

        return b.seconds([run])

    plain = token(dense_linear(b))
    out: dict[str, Any] = {"blocks": s.blocks, "bf16_ms": plain * 1e3, "planes": []}
    for name in b.names:
        if name == "torch":
            continue  # decodes a dense matrix for every token
        for prefix in sorted({min(2, s.prefixes[-1]), s.prefixes[-1]}):

            def make(d_out: int, d_in: int, name: str = name, prefix: int = prefix) -> nn.Module:
                return b.product(d_out, d_in, prefix, name)

            spent = token(make)
            record = {"kernel": name, "bits": prefix, "ms": spent * 1e3}
            out["planes"].append(record | {"times_bf16": plain / spent})
    return out


def llama(b: Bench, blocks: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A transformers Llama of the run's shape with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    s = b.sizes
    config = LlamaConfig(
        vocab_size=s.vocab,
        hidden_size=s.hidden,
        intermediate_size=s.inner,
        num_hidden_layers=blocks,
        num_attention_heads=s.heads,
        num_key_value_heads=s.heads,
        max_position_embeddings=4096,
    )
    with torch.device(b.device):
        return LlamaForCausalLM(config).to(dtype).eval()


@torch.no_grad()
def generate(b: Bench) -> dict[str, Any]:
    """Milliseconds a token through `generate` with a static cache, which compiles on a GPU."""
    ids = torch.randint(0, b.sizes.vocab, (1, 8), device=b.device)
    short, long = (8, 72) if b.cuda else (2, 4)

    def token(blocks: int, kernel: str | None, prefix: int) -> float:
        model = llama(b, blocks)
        for name, module in list(model.model.named_modules()):
            if kernel and isinstance(module, nn.Linear):
                shape = module.out_features, module.in_features
                model.model.set_submodule(name, b.product(*shape, prefix, kernel))
        spent = {}
        for count in (long, short, long):  # the first compiles
            start = time.perf_counter()
            model.generate(
                ids,
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                cache_implementation="static",
            )
            if b.cuda:
                torch.cuda.synchronize()
            spent[count] = time.perf_counter() - start
        return (spent[long] - spent[short]) / (long - short)

    out: dict[str, Any] = {}
    few, more = (2, 4) if b.cuda else (1, 2)
    for label, kernel, prefix in (("bf16", None, 0), ("triton 2 bits", "triton", 2)):
        if kernel and kernel not in b.names:
            continue
        one, two = token(few, kernel, prefix), token(more, kernel, prefix)
        block = (two - one) / (more - few)
        total = two + block * (b.sizes.blocks - more)
        out[label] = {
            "ms_a_block": block * 1e3,
            f"extrapolated_ms_for_{b.sizes.blocks}_blocks": total * 1e3,
        }
    return out


class Measured(Exception):
    """Leaves a checkpoint that is only written to be timed."""


@torch.no_grad()
def quantize(b: Bench) -> dict[str, Any]:
    """Seconds of one block through chain, H and search; extrapolated to the model."""
    from dropbydrop.checkpoint import CheckpointWriter
    from dropbydrop.encoder import EFFORTS
    from dropbydrop.run import Run
    from dropbydrop.walk import Walk

    s, levels = b.sizes, (2, 3, 4)
    with tempfile.TemporaryDirectory() as folder:
        llama(b, 1).cpu().save_pretrained(Path(folder) / "model")
        if b.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        walk = Walk.open(Path(folder) / "model", device=b.device)
        ids = torch.randint(0, s.vocab, (s.windows, s.seq_len), device=b.device)
        hidden = walk.embed(ids)
        codebooks = universal_set(levels)
        marks = [time.perf_counter()]
        with suppress(Measured), CheckpointWriter(Path(folder) / "out") as writer:
            writer.add_codebook_set("universal", list(codebooks))
            run = Run(walk, writer, levels, codebooks, EFFORTS["balanced"], 0, None)
            block = walk.block(0)
            captured = walk.capture(0, block, hidden, out=hidden)
            if b.cuda:
                torch.cuda.synchronize()
            marks.append(time.perf_counter())
            run.encode_block(0, block, captured)
            if b.cuda:
                torch.cuda.synchronize()
            marks.append(time.perf_counter())
            raise Measured
    chain, encode = marks[1] - marks[0], marks[2] - marks[1]
    return {
        "chain_s_a_block": chain,
        "encode_s_a_block": encode,
        "mean_relative_error": run.tally.mean_errors(),
        "peak_device_gib": torch.cuda.max_memory_allocated() / 2**30 if b.cuda else None,
        f"extrapolated_minutes_for_{s.blocks}_blocks": (chain + encode) * s.blocks / 60,
    }


STEPS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    step.__name__: step for step in (copy, matvec, prefill, decode, generate, quantize)
}


def targets(results: dict[str, Any]) -> dict[str, Any]:
    """What the results say about the project's targets, the best kernel at each."""
    best: dict[str, Any] = {}

    def better(key: str, value: float, kernel: str) -> None:
        if value > best.get(key, {"value": 0})["value"]:
            best[key] = {"value": value, "kernel": kernel}

    bandwidth = results.get("copy", {}).get("gb_per_s")
    for shape, entry in results.get("matvec", {}).items():
        for row in entry["planes"] if isinstance(entry, dict) else []:
            what = f"matvec {shape} {row['bits']} bits"
            better(f"{what}, times bf16", row["times_bf16"], row["kernel"])
            if bandwidth:
                share = row["codes_gb_per_s"] / bandwidth
                better(f"{what}, share of the copy bandwidth", share, row["kernel"])
    for row in results.get("decode", {}).get("planes", []):
        better(f"decode {row['bits']} bits, times bf16", row["times_bf16"], row["kernel"])
    for what, entry in results.get("prefill", {}).items():
        if isinstance(entry, dict):
            best[f"prefill {what}, share of the product"] = {"value": entry["share"]}
    return best


def machine(b: Bench) -> dict[str, Any]:
    """What was measured on."""
    found = {"torch": torch.__version__, "device": str(b.device), "kernels": b.names}
    if b.cuda:
        found |= {"gpu": torch.cuda.get_device_name(b.device), "cuda": torch.version.cuda}
    return found


def plan(b: Bench, steps: list[str]) -> dict[str, Any]:
    """What would run; memory is that of the largest set of matrices."""
    s = b.sizes
    sizes = [2 * d_out * d_in for d_out, d_in in s.matvec]
    return {
        "machine": machine(b),
        "steps": steps,
        "shapes": [f"{d_out}x{d_in}" for d_out, d_in in s.matvec],
        "bits": list(s.prefixes),
        "matrices_of_a_shape_in_bf16": [b.copies(size) for size in sizes],
        "gib": max(b.copies(size) * size for size in sizes) / 2**30,
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--state", type=Path, help="finished steps are kept here and not repeated")
    parser.add_argument("--only", default=",".join(STEPS), help="steps, comma separated")
    parser.add_argument("--megabytes", type=float, default=256, help="read by a graph, at least")
    parser.add_argument("--plan", action="store_true", help="only print what would run")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    args = parser.parse_args(argv)
    steps = args.only.split(",")
    if unknown := set(steps) - set(STEPS):
        parser.error(f"no step {', '.join(sorted(unknown))}; choose of {', '.join(STEPS)}")
    if args.device.startswith("cuda") and not torch.cuda.is_available() and not args.plan:
        parser.error("no CUDA device was found; --plan and --smoke --device cpu need none")
    megabytes = 0.01 if args.smoke else args.megabytes
    b = Bench(args.device, SMOKE if args.smoke else REAL, megabytes)
    if args.plan:
        print(json.dumps(result := plan(b, steps), indent=1))
        return result
    results: dict[str, Any] = {}
    if args.state and args.state.is_file():
        results = json.loads(args.state.read_text())
        if results.get("machine") != machine(b):
            parser.error(f"{args.state} is from another machine or version; remove it")
    results["machine"] = machine(b)
    for name in steps:
        if "error" not in results.get(name, {"error": None}):
            continue
        start = time.perf_counter()
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            results[name] = STEPS[name](b)
        except Exception as error:  # the other steps still count
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        results.setdefault("seconds", {})[name] = round(time.perf_counter() - start, 1)
        if b.cuda:
            torch.cuda.empty_cache()
        if args.state:
            args.state.write_text(json.dumps(results))
    results["targets"] = targets(results)
    print(json.dumps(results))
    return results


if __name__ == "__main__":
    main()
