"""What a checkpoint reaches on this machine, and how near that is to what its memory allows.

    decode      greedy tokens of one sequence after a short prompt, through the model's forward
    prefill     one forward pass over a longer prompt, logits of its last token
    read        bytes that a token must read: planes of the level, scales, norms, head. The input
                embedding is left out unless the head shares it.
    of stream   read / time of a token, over a plain sequential read of other memory by the same
                threads
    held        unique tensor bytes of the level in memory

Everything is measured in short rounds, one of each in turn, so that a busy machine slows all of
them alike; the figure is the best round. A share of the stream above 1 means that part of the model
stays in the processor's caches between tokens: compare `read` with the last cache.
"""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import StaticCache

from dropbydrop import kernels
from dropbydrop.models.model_config import context_length
from dropbydrop.planning.memory import held_bytes
from dropbydrop.runtime import fused_decode
from dropbydrop.runtime.views import store_of, view
from dropbydrop.system.errors import DropError
from dropbydrop.system.native_library import library

_STREAM_BYTES = 256 << 20  # more than the last cache of most machines


def topology() -> dict[str, str]:
    """Processor, cores as the system presents them, which share a physical core, and caches."""
    info = {"machine": platform.machine(), "torch": str(torch.__version__)}
    cpuinfo = Path("/proc/cpuinfo")
    named = (
        re.search(r"^model name\s*:(.*)", cpuinfo.read_text(), re.M) if cpuinfo.exists() else None
    )
    if named:
        info["processor"] = named[1].strip()
    system = Path("/sys/devices/system/cpu")
    siblings = sorted(system.glob("cpu[0-9]*/topology/thread_siblings_list"))
    # Virtual machines may say nothing here: two virtual cores may be one physical.
    info["cores"] = "; ".join(sorted({path.read_text().strip() for path in siblings}))
    info["caches"] = ", ".join(
        f"L{(index / 'level').read_text().strip()} {(index / 'size').read_text().strip()}"
        for index in sorted((system / "cpu0/cache").glob("index*"))
        if (index / "type").read_text().strip() != "Instruction"
    )
    return info


def stream(threads: int) -> Callable[[], float]:
    """A function that reads some memory once and returns bytes a second (0 without the library)."""
    lib = library()
    if lib is None:
        return lambda: 0.0
    memory = torch.ones(_STREAM_BYTES, dtype=torch.uint8)
    best = kernels.available()[0].index

    def read() -> float:
        start = time.perf_counter()
        lib.drop_stream_read(best, memory.data_ptr(), memory.numel(), threads)
        return memory.numel() / (time.perf_counter() - start)

    return read


def _prompt(model: Any, count: int) -> torch.Tensor:
    return torch.arange(1, count + 1)[None] % model.get_input_embeddings().num_embeddings


@torch.inference_mode()
def decode_seconds(model: Any, prompt: int, tokens: int) -> float:
    """Mean seconds of a greedy token, at positions prompt .. prompt + tokens - 1."""
    cache = None  # transformers' choice
    if fused_decode.native(model):  # which writes a cache of fixed size in place
        cache = StaticCache(config=model.config, max_cache_len=prompt + tokens + 1)
    ids = _prompt(model, prompt)
    out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    start = time.perf_counter()
    for _ in range(tokens):
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    return (time.perf_counter() - start) / tokens


@torch.inference_mode()
def prefill_seconds(model: Any, tokens: int) -> float:
    """Seconds of one forward pass over a prompt."""
    ids = _prompt(model, tokens)
    start = time.perf_counter()
    model(input_ids=ids, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start


def read_bytes(model: Any) -> int:
    """Bytes of a model that a token reads: all, but an input embedding of its own."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    mine = {t.data_ptr(): t.nbytes for t in (*embedding.parameters(), *embedding.buffers())}
    if head is not None:
        shared = {t.data_ptr() for t in (*head.parameters(), *head.buffers())}
        mine = {} if shared & mine.keys() else mine
    return held_bytes(model) - sum(mine.values())


def bench(
    model: Any,
    levels: Sequence[int],
    *,
    prompt: int = 16,
    tokens: int = 32,
    prefill: int = 512,
    rounds: int = 5,
) -> dict[str, Any]:
    """Measure views of a loaded model; the JSON object of `dropbydrop bench`.

    Args:
        model: loaded at the highest of `levels` or more, on the CPU.
        prompt, tokens: where decoding starts, and how many tokens a round has.
        prefill: tokens of the prompt of a prefill; 0 leaves it out.
        rounds: how often everything is measured; torch's number of threads is used.

    Raises:
        DropError: nothing to measure.
        PrecisionError, MissingPlaneError: levels that cannot be served.
    """
    if min(prompt, tokens, rounds) < 1 or prefill < 0 or not levels:
        raise DropError(
            f"prompt {prompt}, tokens {tokens}, rounds {rounds}, prefill {prefill}, "
            f"{len(levels)} levels: give at least one of each (prefill may be 0)."
        )
    longest = context_length(model.config) or 1 << 30
    if prompt + tokens > longest:
        raise DropError(
            f"prompt {prompt} and {tokens} tokens are more than the {longest:,} that this model "
            "takes; ask for fewer."
        )
    prefill = min(prefill, longest)
    checkpoint, threads = store_of(model).checkpoint, torch.get_num_threads()
    views = {str(p): view(model, p) for p in sorted(levels)}
    read, speeds = stream(threads), []
    times: dict[str, dict[str, list[float]]] = {p: {"decode": [], "prefill": []} for p in views}
    for _ in range(rounds):
        for p, model_at in views.items():
            speeds.append(read())
            times[p]["decode"].append(decode_seconds(model_at, prompt, tokens))
            if prefill:
                times[p]["prefill"].append(prefill_seconds(model_at, prefill))
    result: dict[str, Any] = {
        "topology": topology(),
        "threads": threads,
        "kernel": kernels.select().name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "stream_bytes_per_second": max(speeds),
        "prompt": prompt,
        "tokens": tokens,
        "prefill": prefill,
        "rounds": rounds,
        "bits": {},
    }
    for p, model_at in views.items():
        seconds, size = min(times[p]["decode"]), read_bytes(model_at)
        result["bits"][p] = {
            "decoding": fused_decode.how(model_at),
            "true_bits": checkpoint.true_bits(int(p)),
            "true_bits_whole": checkpoint.true_bits_whole(int(p)),
            "decode_tokens_per_second": 1 / seconds,
            "prefill_tokens_per_second": prefill / min(times[p]["prefill"]) if prefill else None,
            "read_bytes": size,
            "of_stream": size / seconds / max(speeds) if max(speeds) else None,
            "held_bytes": held_bytes(model_at),
            "seconds": times[p],
        }
    return result
