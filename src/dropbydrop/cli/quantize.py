"""`dropbydrop quantize`: a model into one checkpoint of all levels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dropbydrop.quantization.config import QuantizeConfig

from .options import Json, Overwrite, Resume, console, finish, kept_work, with_settings


@with_settings(QuantizeConfig)
def run(
    model: Annotated[
        str, typer.Argument(help="Hugging Face folder, .gguf file, hub id, or smollm2.")
    ],
    out: Annotated[Path, typer.Argument(help="Checkpoint folder to create.")],
    config: QuantizeConfig,
    overwrite: Overwrite = False,
    resume: Resume = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only estimate time, peak memory and disk.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Quantize MODEL once for all levels, and write the checkpoint folder OUT."""
    from dropbydrop.checkpoint import Checkpoint
    from dropbydrop.quantization.pipeline import quantize
    from dropbydrop.system.distributed import rank_of_process

    from .tables import print_report, sizes_of

    if dry_run:
        from dropbydrop.quantization.estimate import estimate
        from dropbydrop.quantization.job import prepare

        expected = estimate(prepare(model, config), out, overwrite=overwrite, resume=resume)
        console(as_json).print(str(expected))
        return finish(as_json, expected.to_dict())
    with kept_work():
        report = quantize(
            model,
            out,
            config=config,
            overwrite=overwrite,
            resume=resume,
            progress=rank_of_process() == 0,
        )
    if rank_of_process():  # under torchrun the first process speaks for all
        return
    checkpoint = Checkpoint.open(report.out)
    print_report(report, checkpoint, console(as_json))
    levels = {str(p): sizes_of(checkpoint, p) for p in report.levels}
    finish(as_json, report.to_dict() | {"bits": levels})
