"""Tokens a second of one sequence, at every level, against named baselines of the same run.

    python benchmarks/decode.py                         # a random Llama of 1 GB in bfloat16
    python benchmarks/decode.py --size smollm2          # the shapes of SmolLM2-135M, random
    python benchmarks/decode.py --model OUT             # a checkpoint
    python benchmarks/decode.py --llama q4_0=model-q4_0.gguf --llama q2_k=model-q2_k.gguf

Random models have random codes, eight-bit embeddings and head: the time of a token does not depend
on the values. Measured after a short prompt, greedily, --tokens tokens from position --prompt on;
best of --rounds. Rows:

    step        the native decode step with a static cache (kernels/step.py)
    eager       the same modules through transformers, a static cache, no step
    torch T     the dense model in type T through transformers, a static cache
    NAME        llama.cpp (llama-cpp-python) on a GGUF file of the same architecture

"true bits" are all bytes read for a token (codes, scales, head, norms) times 8 over parameters, as
stored; for GGUF files, file bytes without the embedding rows that a token does not read.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matvec import topology
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from dropbydrop import kernels
from dropbydrop.code import codebook_table
from dropbydrop.kernels import Bound, Matrix, Packed
from dropbydrop.kernels.step import DecodeStep
from dropbydrop.rotation import Rotation

SIZES = {
    "1gb": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 10,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
            "tie_word_embeddings": False},
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
                "tie_word_embeddings": True},
}  # fmt: skip


class Coded(nn.Module):
    """A linear layer that runs from packed planes."""

    def __init__(self, bound: Bound) -> None:
        super().__init__()
        self.bound = bound

    def forward(self, x: Tensor) -> Tensor:
        return self.bound(x)[0]


class Rows(nn.Module):
    """Eight-bit rows as embedding and head."""

    def __init__(self, count: int, d: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.randint(-127, 128, (count, d), dtype=torch.int8))
        self.register_buffer("row_scales", (torch.rand(count) / 2000 + 1e-4).half())

    def embed(self, ids: Tensor) -> Tensor:
        return self.rows[ids].float() * self.row_scales[ids][..., None].float()

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rows_linear(x, self.rows, self.row_scales)


class Embedding(nn.Module):
    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.of = [rows]

    def forward(self, ids: Tensor) -> Tensor:
        return self.of[0].embed(ids)


def random_coded(config: LlamaConfig, planes: int) -> tuple[Any, Callable[[int], None]]:
    """A model of random codes, and the function that sets its precision."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    stored = [torch.randn(128, 8) * 0.5**m for m in range(planes)]
    books = kernels.prepare_codebooks([codebook_table(s) for s in stored], symmetric=True)
    rotations: dict[int, Rotation] = {}
    made: list[tuple[nn.Module, str, Matrix, Rotation]] = []
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, linear in list(part.named_children()):
                if not isinstance(linear, nn.Linear):
                    continue
                rows, d = linear.weight.shape
                rotation = rotations.setdefault(d, Rotation.make(d))
                size = -(-rows // 64) * 64 * (d // 8)
                codes = [torch.randint(0, 256, (size,), dtype=torch.uint8) for _ in range(planes)]
                scales = (torch.rand(rows) * 0.3 / d**0.5).half()
                packed = Packed(tuple(codes), rows, d // 8, True)
                made.append((part, name, Matrix(packed, scales), rotation))
    head = Rows(config.vocab_size, config.hidden_size)
    rows = head if config.tie_word_embeddings else Rows(config.vocab_size, config.hidden_size)
    model.lm_head, model.model.embed_tokens = head, Embedding(rows)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.weight = nn.Parameter(torch.ones(module.weight.shape), requires_grad=False)

    def at(prefix: int) -> None:
        for part, name, matrix, rotation in made:
            setattr(part, name, Coded(Bound([matrix], books, rotation, prefix)))

    return model.eval(), at


def bits_of(config: LlamaConfig, prefix: int) -> float:
    """8 * bytes read for a token / parameters used for a token (blocks and head)."""
    h, i = config.hidden_size, config.intermediate_size
    head = h // config.num_attention_heads
    kv = config.num_key_value_heads * head
    shapes = [(h, h), (kv, h), (kv, h), (h, h), (i, h), (i, h), (h, i)]
    blocks = sum(r * d for r, d in shapes) * config.num_hidden_layers
    scales = sum(2 * r for r, _ in shapes) * config.num_hidden_layers
    top = config.vocab_size * (h + 2)
    return 8 * (blocks * prefix / 8 + scales + top) / (blocks + config.vocab_size * h)


@torch.inference_mode()
def seconds_per_token(model: Any, args: argparse.Namespace) -> float:
    """Best over rounds of the mean time of a greedy token."""
    best = float("inf")
    prompt = torch.arange(1, args.prompt + 1)[None]
    for _ in range(args.rounds):
        cache = StaticCache(config=model.config, max_cache_len=args.prompt + args.tokens + 1)
        out = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        for _ in range(args.tokens):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
        best = min(best, (time.perf_counter() - start) / args.tokens)
    return best


def seconds_of_llama(path: str, args: argparse.Namespace) -> float:
    """The same with llama.cpp."""
    from llama_cpp import Llama  # optional; built from source for a fair comparison

    llama = Llama(path, n_ctx=args.prompt + args.tokens + 8, n_threads=args.threads,
                  n_threads_batch=args.threads, verbose=False)  # fmt: skip
    best = float("inf")
    for _ in range(args.rounds):
        llama.reset()
        llama.eval(list(range(1, args.prompt + 1)))
        start = time.perf_counter()
        for _ in range(args.tokens):
            llama.eval([llama.sample(temp=0.0)])
        best = min(best, (time.perf_counter() - start) / args.tokens)
    return best


def measure(args: argparse.Namespace) -> list[dict]:
    results: list[dict] = []

    def row(name: str, seconds: float, bits: float | None) -> None:
        results.append({"name": name, "tokens_per_second": round(1 / seconds, 2),
                        "milliseconds": round(seconds * 1e3, 3), "true_bits": bits})  # fmt: skip
        shown = "" if bits is None else f"{bits:8.2f}"
        print(f"{name:24}{1 / seconds:10.1f}{seconds * 1e3:10.2f}{shown}", flush=True)

    print(f"{'':24}{'tokens/s':>10}{'ms':>10}{'true bits':>10}")
    levels = [int(b) for b in args.bits.split(",")]
    if args.model:
        from dropbydrop import at, linear, load

        top = load(args.model, bits=max(levels), dtype=torch.float32)
        for bits in levels:
            model = at(top, bits)
            with DecodeStep(model, lambda module: linear._bound(module, tiled=True)):
                row(f"step, {bits} bits", seconds_per_token(model, args), None)
            row(f"eager, {bits} bits", seconds_per_token(model, args), None)
        config = top.config
    else:
        config = LlamaConfig(**SIZES[args.size], max_position_embeddings=4096, bos_token_id=1)
        config._attn_implementation = "sdpa"
        model, set_level = random_coded(config, max(levels))
        for bits in levels:
            set_level(bits)
            with DecodeStep(model, lambda module: module.bound):
                row(f"step, {bits} bits", seconds_per_token(model, args), bits_of(config, bits))
            row(f"eager, {bits} bits", seconds_per_token(model, args), bits_of(config, bits))
        del model
    for name in args.torch.split(",") if args.torch else []:
        dtype = getattr(torch, name)
        dense = LlamaForCausalLM(config).to(dtype).eval()
        row(f"torch {name}", seconds_per_token(dense, args), 8.0 * dtype.itemsize)
        del dense
    for pair in args.llama:
        name, path = pair.split("=", 1)
        row(name, seconds_of_llama(path, args), None)
        results[-1]["file_bytes"] = Path(path).stat().st_size
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="1gb", help="shapes of the random model")
    parser.add_argument("--model", type=Path, help="a checkpoint folder instead of a random model")
    parser.add_argument("--bits", default="2,3,4")
    parser.add_argument("--torch", default="bfloat16,float32", help="types of the dense baselines")
    parser.add_argument("--llama", action="append", default=[], metavar="NAME=GGUF")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    where = topology() | {"kernel": kernels.select().name, "threads": str(args.threads)}
    for key, value in where.items():
        print(f"{key}: {value}")
    results = measure(args)
    print(json.dumps({"benchmark": "decode", "topology": where, "results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
