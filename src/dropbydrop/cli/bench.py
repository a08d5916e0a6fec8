"""`dropbydrop bench`: speed and memory of a checkpoint's levels on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from dropbydrop.system.errors import DropError

from .options import Bits, CheckpointFolder, Json, console, finish, parse_bits

MOST_THREADS = 1024  # more end the process in the thread library


def run(
    out: CheckpointFolder,
    bits: Bits = "2,3,4",
    threads: Annotated[int | None, typer.Option(help="Number of threads [torch's].")] = None,
    prompt: Annotated[int, typer.Option(help="Tokens before decoding starts.")] = 16,
    tokens: Annotated[int, typer.Option(help="Tokens decoded in a round.")] = 32,
    prefill: Annotated[int, typer.Option(help="Tokens of the prefill; 0: no prefill.")] = 512,
    rounds: Annotated[int, typer.Option(help="Number of rounds; the best counts.")] = 5,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, ... [of the original model].")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tokens a second, share of the memory's bandwidth, and bytes of each level, on the CPU."""
    import torch

    from dropbydrop.evaluation.bench import bench
    from dropbydrop.runtime.load import load
    from dropbydrop.system.console import phase, quiet_transformers

    from .tables import print_bench

    levels = parse_bits(bits)
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise DropError(f"--threads {threads}: give 1 to {MOST_THREADS}.")
    if threads is not None:
        torch.set_num_threads(threads)
    with phase("loading"), quiet_transformers():
        model = load(out, max(levels), dtype=dtype)
    with quiet_transformers():  # and no bar: its thread would be measured too
        result = bench(model, levels, prompt=prompt, tokens=tokens, prefill=prefill, rounds=rounds)
    print_bench(result, console(as_json))
    finish(as_json, result)
