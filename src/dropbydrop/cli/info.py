"""`dropbydrop info`: what a checkpoint holds, and the kernels of this machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dropbydrop.system.errors import DropError

from .options import Json, console, finish

if TYPE_CHECKING:
    from rich.console import Console

    from dropbydrop.checkpoint import Checkpoint


def run(
    out: Annotated[Path | None, typer.Argument(help="Checkpoint folder.")] = None,
    verify: Annotated[bool, typer.Option(help="Read everything and compare the hashes.")] = True,
    kernels: Annotated[bool, typer.Option("--kernels", help="Kernels of this machine.")] = False,
    as_json: Json = False,
) -> None:
    """Levels, true bits, bytes and integrity of a checkpoint; or the kernels of this machine."""
    from dropbydrop.checkpoint import Checkpoint

    from .tables import print_info

    shown = console(as_json)
    result: dict[str, Any] = {}
    if kernels:
        result = describe_machine(out, shown)
    if out is None:
        if not kernels:
            raise DropError("name a checkpoint folder, or ask for --kernels.")
        return finish(as_json, result)
    checkpoint = Checkpoint.open(out, verify=False)  # `verify` finds all, not the first
    result |= describe(checkpoint)
    print_info(result, shown)
    findings = checkpoint.verify(hashes=verify)
    result["findings"] = [str(finding) for finding in findings]
    for finding in findings:
        shown.print(str(finding), style="red", markup=False, highlight=False)
    if not findings:
        shown.print("all files present are intact" if verify else "sizes and headers are right")
    finish(as_json, result)
    if findings:
        raise typer.Exit(2)


def describe_machine(out: Path | None, shown: Console) -> dict[str, Any]:
    """Search backends, inference kernels and the way of decoding, printed and as a dictionary."""
    from dropbydrop.checkpoint import Checkpoint
    from dropbydrop.coding.search import backends
    from dropbydrop.kernels import describe as describe_kernels
    from dropbydrop.kernels import table
    from dropbydrop.runtime.fused_decode import how_config

    search = backends()
    shown.print(f"search backends, best first: {', '.join(search)}")
    shown.print("inference kernels (* is in use):")
    for line in describe_kernels():
        shown.print(line, markup=False, highlight=False)
    decoding = how_config(Checkpoint.open(out, verify=False).config if out else None)
    shown.print(f"decoding: {decoding}", markup=False, highlight=False)
    return {
        "search": search,
        "kernels": [asdict(kernel) for kernel in table()],
        "decoding": decoding,
    }


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Levels, bytes, true bits, planes present, provenance of a checkpoint."""
    from .tables import sizes_of

    q = checkpoint.quantization
    present = checkpoint.planes_present()
    return {
        "path": str(checkpoint.path),
        "levels": {
            str(p): sizes_of(checkpoint, p)
            | {"loadable": all(m in present for m in range(1, q.prefix_of(p) + 1))}
            for p in q.levels
        },
        "kind": q.kind,
        "planes": len(q.planes),
        "plane_bits": [plane.bits for plane in q.planes],
        "planes_present": list(present),
        "matrices": len(q.modules),
        "input_groups": len(q.input_groups),
        "codebook_sets": list(q.sets),
        "embeddings": q.embeddings.to_dict(),
        "provenance": dict(q.provenance),
    }
