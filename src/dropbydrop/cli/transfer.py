"""`dropbydrop slice` and `dropbydrop pull`: move what a precision needs, and no more."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import CheckpointFolder, Json, Overwrite, console, finish

if TYPE_CHECKING:
    from dropbydrop.checkpoint.slice import Transfer


def slice_(
    out: CheckpointFolder,
    dest: Annotated[Path, typer.Argument(help="Folder to create.")],
    bits: Annotated[int, typer.Option(help="Highest level that DEST can be loaded at.")],
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Copy what BITS need of OUT into the new folder DEST; every hash is compared."""
    from dropbydrop.checkpoint.slice import slice_checkpoint

    _report(slice_checkpoint(out, dest, bits, overwrite=overwrite), as_json)


def pull(
    source: Annotated[str, typer.Argument(help="http(s) address of a folder, folder, or hub id.")],
    dest: Annotated[Path, typer.Argument(help="Folder to fill; an earlier pull is continued.")],
    bits: Annotated[int | None, typer.Option(help="Level [the checkpoint's default].")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub repository.")] = None,
    as_json: Json = False,
) -> None:
    """Fetch what BITS need into DEST: missing files only, resumed and verified."""
    from dropbydrop.checkpoint.pull import pull as run

    _report(run(source, dest, bits, revision=revision), as_json)


def _report(done: Transfer, as_json: bool) -> None:
    out = console(as_json)
    resumed = f", {done.resumed / 1e6:.1f} MB were there from before" if done.resumed else ""
    out.print(
        f"{done.path}: {done.bits} bits; {len(done.fetched)} files fetched "
        f"({done.bytes / 1e6:.1f} MB{resumed}), {len(done.kept)} already here"
    )
    for name in done.edited:
        out.print(f"[yellow]{name} differs from the manifest: edited since publication[/yellow]")
    finish(as_json, asdict(done) | {"path": str(done.path)})
