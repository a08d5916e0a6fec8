"""`dropbydrop tune`: fine-tune a quantized checkpoint into a new one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import Json, console, finish, parse_bits


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("tune")(run)


def run(
    out: Annotated[Path, typer.Argument(help="Checkpoint folder; it is only read.")],
    tuned: Annotated[Path, typer.Argument(help="Checkpoint folder to create.")],
    model: Annotated[
        str | None, typer.Option(help="The original model [the one that OUT names].")
    ] = None,
    method: Annotated[
        str, typer.Option(help="distill: the whole model end to end; blocks: one by one.")
    ] = "distill",
    calibration: Annotated[
        str,
        typer.Option(help="Text or .jsonl file, hub:DATASET[:SPLIT], or self: the model's own."),
    ] = "self",
    bits: Annotated[str | None, typer.Option(help="Levels to supervise [all of OUT].")] = None,
    train: Annotated[
        str, typer.Option(help="all, or scales: row scales and norms, no codebooks.")
    ] = "all",
    windows: Annotated[int, typer.Option(help="Tuning windows.")] = 64,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the windows [that of the method].")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Relative change a step [that of the method].")
    ] = None,
    together: Annotated[
        bool, typer.Option("--together", help="Every window at all levels, not at a drawn one.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of calibration, order and levels.")] = 0,
    device: Annotated[
        str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1.")
    ] = "auto",
    overwrite: Annotated[bool, typer.Option(help="Replace an existing checkpoint.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep finished work; go on after an interruption.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune the checkpoint OUT towards its original, and write the result as TUNED."""
    from dropbydrop.checkpoint import Checkpoint
    from dropbydrop.quantization.report import table
    from dropbydrop.tuning import tune

    try:
        report = tune(
            out,
            tuned,
            model=model,
            method=method,
            calibration=calibration,
            bits=None if bits is None else parse_bits(bits),
            train=train,
            windows=windows,
            seq_len=seq_len,
            epochs=epochs,
            learning_rate=learning_rate,
            together=together,
            seed=seed,
            device=device,
            overwrite=overwrite,
            resume=resume,
        )
    except KeyboardInterrupt as stop:
        sys.stderr.write(f"{stop}\n" if str(stop) else "")  # what --resume has kept
        raise
    checkpoint = Checkpoint.open(report.out)
    what = "KL" if method == "distill" else "error"
    shown = table(f"{tuned}: {method}", ("bits", "true bits", f"{what} before", f"{what} after"))
    levels = {str(p): {"true_bits": checkpoint.true_bits(p)} for p in checkpoint.levels}
    for p, (before, after) in report.loss.items():
        levels[str(p)] |= {"before": before, "after": after}
        shown.add_row(str(p), f"{levels[str(p)]['true_bits']:.3f}", f"{before:.4f}", f"{after:.4f}")
    to = console(as_json)
    to.print(shown)
    to.print(
        f"on windows not trained on; {report.trained:,} values, {report.steps} steps, "
        f"{report.seconds:.0f} s; peak memory {report.peak_gib:.2f} GiB"
    )
    worse = [str(p) for p, (before, after) in report.loss.items() if after > before]
    if worse:
        to.print(
            f"level {', '.join(worse)} became worse; a lower --learning-rate, or more --windows or "
            "--epochs, may mend it"
        )
    finish(as_json, report.to_dict() | {"bits": levels})
