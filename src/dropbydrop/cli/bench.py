"""`dropbydrop bench`: speed and memory of a checkpoint's levels on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .options import Bits, Json, console, finish, parse_bits


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("bench")(run)


def run(
    out: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    bits: Bits = "2,3,4",
    threads: Annotated[int | None, typer.Option(help="Threads [torch's default].")] = None,
    prompt: Annotated[int, typer.Option(help="Tokens before decoding starts.")] = 16,
    tokens: Annotated[int, typer.Option(help="Tokens decoded in a round.")] = 32,
    prefill: Annotated[int, typer.Option(help="Prompt of the prefill; 0: none.")] = 512,
    rounds: Annotated[int, typer.Option(help="The best of so many counts.")] = 5,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, ... [of the original model].")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tokens a second, share of the memory's bandwidth, and bytes of each level, on the CPU."""
    import torch

    from dropbydrop import load
    from dropbydrop.evaluation.bench import bench
    from dropbydrop.system.console import quiet_transformers

    levels = parse_bits(bits)
    if threads is not None:
        torch.set_num_threads(threads)
    with quiet_transformers():
        model = load(out, bits=max(levels), dtype=dtype)
        result = bench(model, levels, prompt=prompt, tokens=tokens, prefill=prefill, rounds=rounds)
    print_bench(result, console(as_json))
    finish(as_json, result)


def print_bench(result: Mapping[str, Any], out: Console) -> None:
    """The dictionary of `bench.bench`, for people."""
    from dropbydrop.quantization.report import table

    where = result["topology"]
    out.print(
        f"{where.get('processor', where['machine'])}; cores {where['cores']}; {where['caches']}; "
        f"torch {where['torch']}; {result['threads']} threads, {result['dtype']}; stream "
        f"{result['stream_bytes_per_second'] / 1e9:.1f} GB/s",
        highlight=False,
    )
    shown = table(
        f"decode {result['tokens']} tokens from position {result['prompt']}, prefill "
        f"{result['prefill']}; best of {result['rounds']}",
        ("bits", "true, whole", "decode/s", "prefill/s", "MB read", "of stream", "MB held"),
    )
    for p, row in result["bits"].items():
        speed, share = row["prefill_tokens_per_second"], row["of_stream"]
        shown.add_row(
            p,
            f"{row['true_bits_whole']:.2f}",
            f"{row['decode_tokens_per_second']:.1f}",
            "" if speed is None else f"{speed:.0f}",
            f"{row['read_bytes'] / 1e6:.1f}",
            "" if share is None else f"{share:.0%}",
            f"{row['held_bytes'] / 1e6:.1f}",
        )
    out.print(shown)
    for text in sorted({f"{row['decoding']}" for row in result["bits"].values()}):
        out.print(f"kernel {result['kernel']}; decoding: {text}", highlight=False)
