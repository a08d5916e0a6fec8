"""`dropbydrop export`: one level as a plain dense Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import CheckpointFolder, Json, console, finish


def run(
    out: CheckpointFolder,
    dense: Annotated[Path, typer.Argument(help="Folder to create.")],
    bits: Annotated[int | None, typer.Option(help="Level [the highest].")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    as_json: Json = False,
) -> None:
    """Write one level of OUT as a plain folder that any runtime reads, without dropbydrop."""
    from dropbydrop.checkpoint.export import export

    result = export(out, dense, bits, dtype=dtype)
    console(as_json).print(
        f"{result['out']}: level {result['bits']} as {result['dtype']}, {result['tensors']} "
        f"tensors, {result['bytes'] / 1e6:.1f} MB"
    )
    finish(as_json, result)
