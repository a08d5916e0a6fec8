"""`dropbydrop compare`: quantizers side by side, on the same model, calibration and text."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dropbydrop.cli.options import Bits, Json, console, finish, parse_bits

if TYPE_CHECKING:
    from rich.console import Console

ALL = "drop,dedicated,paper-weights,paper,aqlm,aqlm-drop,gptq,rtn,any-precision,matryoshka"


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("compare")(run)


def run(
    model: Annotated[
        str, typer.Argument(help="Hugging Face folder, .gguf file, hub id, or smollm2.")
    ],
    text: Annotated[Path, typer.Option(help="Text, .raw or .jsonl file to evaluate on.")],
    methods: Annotated[str, typer.Option(help="Which, in which order.")] = ALL,
    bits: Bits = "2,3,4",
    calibration: Annotated[
        str,
        typer.Option(help="Text or .jsonl file, hub:DATASET[:SPLIT], or self: the model's own."),
    ] = "self",
    calibration_windows: Annotated[
        int, typer.Option(help="Calibration windows of 1,024 tokens.")
    ] = 64,
    blocks: Annotated[
        int | None, typer.Option(help="Quantize only so many of the first blocks [all].")
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window of --text.")] = 2048,
    windows: Annotated[int | None, typer.Option(help="How many windows of --text [all].")] = None,
    preset: Annotated[
        str, typer.Option(help="Effort of drop and dedicated: fast, balanced or best.")
    ] = "balanced",
    seed: Annotated[int, typer.Option(help="Of calibration and of what methods draw.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for finished work, to go on from, and for the plots."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Loss, true bits, disk, time and memory of quantizers, none of them fine-tuned.

    With --out, finished blocks and methods are kept in that folder and not done again; the decoded
    weights there take 2 bytes a weight, level and method.
    """
    from dropbydrop_research.compare.figures import draw
    from dropbydrop_research.compare.run import compare, prepare
    from dropbydrop_research.study.style import require_matplotlib

    if out is not None:
        require_matplotlib()
    order = prepare(
        model,
        [name.strip() for name in methods.split(",")],
        parse_bits(bits),
        text,
        calibration=calibration,
        calibration_windows=calibration_windows,
        blocks=blocks,
        windows=windows,
        seq_len=seq_len,
        preset=preset,
        seed=seed,
        device=device,
    )
    try:
        result = compare(order, out)
    except KeyboardInterrupt:
        if out is not None:
            sys.stderr.write(f"what is finished is kept in {out}; give the same command again.\n")
        raise
    print_comparison(result, console(as_json))
    if out is not None:
        paths = draw(result, out)
        console(as_json).print(f"plots: {', '.join(str(path) for path in paths)}")
    finish(as_json, result)


def print_comparison(result: Mapping[str, Any], out: Console) -> None:
    """The table: a row for each method and level, then what each suite of levels costs."""
    from dropbydrop.cli.tables import table

    quality = table(
        f"{result['model']}, {result['blocks']} of {result['of_blocks']} blocks; {result['text']}: "
        f"{result['windows']} windows of {result['seq_len']}",
        ("method", "bits", "true", "whole", "ppl", "KL", "95 %", "excess", "95 %"),
    )
    quality.add_row("original", "", "", "", f"{result['reference']['ppl']:.2f}", *[""] * 4)
    for name, method in result["methods"].items():
        for p in result["bits"]:
            row = method["bits"].get(str(p))
            if row is None:
                quality.add_row(name, str(p), "none", *[""] * 6)
                continue
            quality.add_row(
                name, str(p), f"{row['true_bits']:.3f}", f"{row['true_bits_whole']:.3f}",
                f"{row['ppl']:.2f}" if row["ppl"] < 1e5 else f"{row['ppl']:.1e}",
                short(row["kl"]), interval(row["kl_interval"]),
                short(row["excess"]), interval(row["excess_interval"]),
            )  # fmt: skip
    out.print(quality)
    cost = table(
        "the whole suite of levels",
        ("method", "checkpoints", "MB on disk", "seconds", "peak GiB", "levels it lacks"),
    )
    for name, method in result["methods"].items():
        cost.add_row(
            name,
            str(method["checkpoints"]),
            f"{method['disk_bytes'] / 1e6:.1f}",
            f"{method['seconds']:.1f}",
            f"{method['peak_gib']:.2f}",
            ", ".join(map(str, method["lacks"])) or "none",
        )
    out.print(cost)
    for p, price in (result["price_of_nesting"] or {}).items():
        bits = "" if price["bits"] is None else f", {price['bits']:.2f} bits"
        out.print(
            f"price of nesting at {p} bits: excess {price['excess']:.2f} times that of a code for "
            f"this level alone{_within(price['excess_interval'])}, KL {price['kl']:.2f}"
            f"{_within(price['kl_interval'])}{bits}"
        )
    out.print(
        f"{result['calibration_seconds']:.0f} s of calibration pass are shared by all; "
        f"{result['threads']} threads. KL and excess loss in nats a token; no method is fine-tuned."
    )


def short(value: float | None) -> str:
    """Three decimals, without a leading zero."""
    if value is None:
        return ""
    text = f"{value:.3f}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def _within(ends: list[float] | None) -> str:
    return "" if ends is None else f" ({ends[0]:.2f} to {ends[1]:.2f})"


def interval(ends: list[float] | None) -> str:
    """ "low–high"; nothing for one window."""
    return "" if ends is None else f"{short(ends[0])}–{short(ends[1])}"
