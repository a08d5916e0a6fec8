"""Tokens a second of one sequence, at every level, against named baselines of the same run.

    python benchmarks/cpu/decode.py                       # a random Llama of 1 GB in bfloat16
    python benchmarks/cpu/decode.py --size smollm2        # the shapes of SmolLM2-135M, random
    python benchmarks/cpu/decode.py --code bytes,trellis  # both kinds of planes in turn
    python benchmarks/cpu/decode.py --model OUT [--model OTHER]     # checkpoints
    python benchmarks/cpu/decode.py --llama Q4_0,Q2_K     # llama.cpp quantizes that shape
    python benchmarks/cpu/decode.py --gguf Q4_1=FILE      # llama.cpp on a file

Random models have random codes or weights (random_model.py): speed does not depend on them;
embedding and head are eight-bit rows. Greedy, --tokens tokens from position --prompt on. All rows
are measured in turn, --rounds times, so that a busy machine slows them alike; figures are the best
round. On a machine that is shared take many short rounds (--tokens 8 --rounds 60). Rows:

    P bits       `dropbydrop.load`, a static cache, the native step; with the kind of the planes
                 when there are several checkpoints
    P bits, eager       the same modules one by one
    torch T      the dense model in type T through transformers, a static cache
    NAME         llama.cpp (llama-cpp-python, built from source)

Ours run in --dtype, which decides how prompts are multiplied; the native step is float32 inside.
Columns: "MB" are bytes read for a token, "bits" the same times 8 over the parameters of blocks and
head; for GGUF files, file bytes without embedding rows that a token does not read. "prefill" are
tokens a second of a prompt of --prefill tokens. "stream" is a plain sequential read, GB/s. With
llama.cpp in the run, "times" is the speed of decoding over that of its first row: of the best
rounds, and behind it the median over the rounds, each against the same round.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from llama_cpp_peer import Counts, LlamaCpp, quantized_gguf, random_gguf

import dropbydrop
from dropbydrop import kernels
from dropbydrop.checkpoint import Checkpoint
from dropbydrop.evaluation import bench
from dropbydrop.runtime import fused_decode
from dropbydrop.runtime.fused_decode import decoder_of

sys.path.append(str(Path(__file__).parents[1]))  # a script sees the modules of its folder alone
import random_model


@dataclass
class Row:
    """One way of running a model, and its times in seconds."""

    name: str
    decode: Callable[[], float]  # seconds of a token
    prefill: Callable[[], float] | None  # seconds of the whole prompt
    read: int = 0
    peer: bool = False  # another program, to compare with
    tokens: list[float] = field(default_factory=list)
    prompts: list[float] = field(default_factory=list)

    def record(self, prefill: int, weights: int, stream: float) -> dict[str, Any]:
        best = min(self.tokens)
        return {
            "name": self.name,
            "tokens_per_second": round(1 / best, 2),
            "prefill_per_second": round(prefill / min(self.prompts), 1) if self.prompts else None,
            "megabytes": round(self.read / 1e6, 1),
            "true_bits": round(8 * self.read / weights, 2),
            "of_stream": round(self.read / best / stream, 3),
            "seconds": self.tokens,
            "prefill_seconds": self.prompts,
        }


class Eager:
    """The model without its native step, for the time of a call."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, measure: Callable[[], float]) -> float:
        inner = decoder_of(self.model)
        step = inner.__dict__.pop("forward", None)
        try:
            return measure()
        finally:
            if step is not None:
                inner.forward = step


def our_rows(args: argparse.Namespace, path: Path, label: str) -> list[Row]:
    levels = [int(b) for b in args.bits.split(",")]
    top = dropbydrop.load(path, bits=max(levels), dtype=getattr(torch, args.dtype))
    rows = []
    for bits in levels:
        view = dropbydrop.view(top, bits)
        name = f"{label}{bits} bits"
        print(f"{name}: {fused_decode.how(view)}")
        decode = lambda v=view: bench.decode_seconds(v, args.prompt, args.tokens)  # noqa: E731
        prefill = lambda v=view: bench.prefill_seconds(v, args.prefill)  # noqa: E731
        rows.append(Row(name, decode, prefill, bench.read_bytes(view)))
        if args.eager:
            eager = Eager(dropbydrop.view(top, bits))
            call = lambda e=eager, d=decode: e(  # noqa: E731
                lambda: bench.decode_seconds(e.model, args.prompt, args.tokens)
            )
            rows.append(Row(f"{name}, eager", call, None, bench.read_bytes(view)))
    return rows


def dense_rows(args: argparse.Namespace) -> list[Row]:
    from transformers import StaticCache

    @torch.inference_mode()
    def decode(model: Any) -> float:
        cache = StaticCache(config=model.config, max_cache_len=args.prompt + args.tokens + 1)
        ids = torch.arange(1, args.prompt + 1)[None]
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        for _ in range(args.tokens):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
        return (time.perf_counter() - start) / args.tokens

    rows = []
    for name in filter(None, args.torch.split(",")):
        config = random_model.llama_config(args.size)
        model = random_model.random_llama(config, getattr(torch, name))
        rows.append(
            Row(
                f"torch {name}",
                lambda m=model: decode(m),
                lambda m=model: bench.prefill_seconds(m, args.prefill),
                bench.read_bytes(model),
            )
        )
    return rows


def llama_rows(args: argparse.Namespace, folder: Path) -> list[Row]:
    files = {}
    for kind in filter(None, args.llama.split(",")):
        config = random_model.llama_config(args.size)
        source = random_gguf(folder / f"{args.size}-f16.gguf", config)
        files[f"llama.cpp {kind}"] = quantized_gguf(source, kind)
    files |= {name: Path(path) for name, path in (pair.split("=", 1) for pair in args.gguf)}
    counts = Counts(args.prompt, args.tokens, args.prefill, args.threads)
    rows = []
    for name, path in files.items():
        llama = LlamaCpp(path, counts)
        llama.read -= unread_bytes(path)
        rows.append(Row(name, llama.decode, llama.prefill, llama.read, peer=True))
    return rows


def unread_bytes(path: Path) -> int:
    """Bytes of the input embedding of a GGUF file with an output matrix of its own."""
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}
    return int(tensors["token_embd.weight"].n_bytes) if "output.weight" in tensors else 0


def weights_of(size: str, models: list[Path]) -> int:
    """Parameters of blocks and head."""
    if models:
        checkpoint = Checkpoint.open(models[0])
        blocks = sum(d_out * d_in for d_out, d_in in checkpoint.shapes.values())
        head = checkpoint.config["vocab_size"] * checkpoint.config["hidden_size"]
        return blocks + int(head)
    config = random_model.llama_config(size)
    dense = random_model.llama_shape(config)
    blocks = sum(p.numel() for p in dense.model.layers.parameters() if p.dim() == 2)
    return blocks + config.vocab_size * config.hidden_size


def random_folder(folder: Path, size: str, code: str) -> Path:
    """A random checkpoint, written now unless it is there."""
    name = f"random-{size}" if code == "bytes" else f"random-{size}-{code}"
    return random_model.sized_checkpoint(folder / name, size, code)


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    paths = args.model or [random_folder(folder, args.size, c) for c in args.code.split(",")]
    rows = []
    for path in paths:
        kind = Checkpoint.open(path).quantization.kind
        rows += our_rows(args, path, f"{kind} " if len(paths) > 1 else "")
    rows += dense_rows(args) + llama_rows(args, folder)
    read, speeds = bench.stream(args.threads), []
    for number in range(args.rounds):
        speeds.append(read())
        for row in rows:
            row.tokens.append(row.decode())
            if args.prefill and row.prefill and number < args.prefill_rounds:
                row.prompts.append(row.prefill())
    weights, speed = weights_of(args.size, args.model), max(speeds)
    print(f"stream {speed / 1e9:.1f} GB/s; prompt {args.prompt}, {args.tokens} tokens")
    print(f"{'':24}{'tokens/s':>10}{'MB':>9}{'bits':>7}{'stream':>8}{'prefill':>9}{'times':>12}")
    results = [row.record(args.prefill, weights, speed) for row in rows]
    add_ratios(results, next((row.name for row in rows if row.peer), None))
    for row in results:
        prompt = "" if row["prefill_per_second"] is None else f"{row['prefill_per_second']:.0f}"
        print(
            f"{row['name']:24}{row['tokens_per_second']:10.1f}{row['megabytes']:9.1f}"
            f"{row['true_bits']:7.2f}{row['of_stream']:8.0%}{prompt:>9}{ratios(row):>12}"
        )
    return results


def add_ratios(results: list[dict[str, Any]], peer: str | None) -> None:
    """Give each row its speed over that of the row called `peer`, of the same run."""
    for row in results if peer else []:
        other = next(r for r in results if r["name"] == peer)["seconds"]
        each = [b / a for a, b in zip(row["seconds"], other, strict=True)]
        row["times"] = {
            "of": peer,
            "best": min(other) / min(row["seconds"]),
            "median": median(each),
        }


def ratios(row: dict[str, Any]) -> str:
    """ "best (median)"; nothing without a peer."""
    times = row.get("times")
    return f"{times['best']:.2f} ({times['median']:.2f})" if times else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=random_model.SIZES, default="1gb", help="shape")
    parser.add_argument(
        "--code", default="bytes", help="kinds of planes of random ones: bytes,trellis"
    )
    parser.add_argument(
        "--model", type=Path, action="append", default=[], help="a checkpoint, not a random one"
    )
    parser.add_argument("--bits", default="2,3,4")
    parser.add_argument("--dtype", default="bfloat16", help="type of our activations")
    parser.add_argument("--eager", action="store_true", help="also without the native step")
    parser.add_argument("--torch", default="bfloat16,float32", help="types of dense baselines")
    parser.add_argument("--llama", default="", help="kinds that llama.cpp quantizes to: Q4_0,Q2_K")
    parser.add_argument("--gguf", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--folder", type=Path, help="keeps the random models [a temporary one]")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prefill", type=int, default=512, help="0: none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefill-rounds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    where = bench.topology() | {"kernel": kernels.select().name, "threads": str(args.threads)}
    for key, value in where.items():
        print(f"{key}: {value}")
    with tempfile.TemporaryDirectory() as temporary:
        results = measure(args, args.folder or Path(temporary))
    print(json.dumps({"benchmark": "decode", "topology": where, "results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
