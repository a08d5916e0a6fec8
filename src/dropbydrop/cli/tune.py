"""`dropbydrop tune`: fine-tune a quantized checkpoint into a new one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dropbydrop.tuning.config import TuneConfig

from .options import Json, Overwrite, Resume, console, finish, kept_work, with_settings


@with_settings(TuneConfig)
def run(
    out: Annotated[Path, typer.Argument(help="Checkpoint folder; it is only read.")],
    tuned: Annotated[Path, typer.Argument(help="Checkpoint folder to create.")],
    config: TuneConfig,
    overwrite: Overwrite = False,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Fine-tune the checkpoint OUT towards its original, and write the result as TUNED."""
    from dropbydrop.checkpoint import Checkpoint
    from dropbydrop.tuning.pipeline import tune

    from .tables import print_tuning

    with kept_work():
        report = tune(out, tuned, config=config, overwrite=overwrite, resume=resume)
    checkpoint = Checkpoint.open(report.out)
    levels = {str(p): {"true_bits": checkpoint.true_bits(p)} for p in checkpoint.levels}
    for p, (before, after) in report.loss.items():
        levels[str(p)] |= {"before": before, "after": after}
    print_tuning(report, levels, console(as_json))
    finish(as_json, report.to_dict() | {"bits": levels})
