"""`dropbydrop compare`: quantizers side by side, on the same model, calibration and text."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dropbydrop.cli.options import Json, console, finish, with_settings
from dropbydrop_research.compare.config import CompareConfig

if TYPE_CHECKING:
    from rich.console import Console


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("compare")(run)


@with_settings(CompareConfig)
def run(
    model: Annotated[
        str, typer.Argument(help="Hugging Face folder, .gguf file, hub id, or smollm2.")
    ],
    text: Annotated[Path, typer.Option(help="Text, .raw or .jsonl file to evaluate on.")],
    config: CompareConfig,
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
    from dropbydrop_research.compare.job import prepare
    from dropbydrop_research.compare.run import compare
    from dropbydrop_research.study.style import require_matplotlib

    if out is not None:
        require_matplotlib()
    job = prepare(model, text, config)
    try:
        result = compare(job, out)
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
    for name, method in result["methods"].items():
        for p, row in method["bits"].items():
            if "kinds" in row:
                parts = ", ".join(f"{share:.0%} {kind}" for kind, share in row["kinds"].items())
                out.print(f"{name} at {p} bits: {parts}")
    for method, prices in (result["price_of_nesting"] or {}).items():
        for p, price in prices.items():
            bits = "" if price["bits"] is None else f", {price['bits']:.2f} bits"
            out.print(
                f"{method}: price of nesting at {p} bits: excess {price['excess']:.2f} times that "
                f"of a code for this level alone{_within(price['excess_interval'])}, KL "
                f"{price['kl']:.2f}{_within(price['kl_interval'])}{bits}"
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
