"""`dropbydrop plan`: a map of levels for any budget, and what it takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dropbydrop.system.errors import DropError
from dropbydrop.system.settings import check_seed, check_windows

from .options import CheckpointFolder, Json, console, finish

if TYPE_CHECKING:
    from dropbydrop.checkpoint import Checkpoint
    from dropbydrop.planning.sensitivity import Sensitivity


def run(
    out: CheckpointFolder,
    avg_bits: Annotated[float | None, typer.Option(help="Average bits a weight.")] = None,
    memory: Annotated[str | None, typer.Option(help="All memory, such as 1.5GiB.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of the cache [2048].")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Type of activations and cache [config].")
    ] = None,
    measure: Annotated[
        bool | None,
        typer.Option(help="Measure sensitivities again, or never [when there are none]."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text to measure on [written by the model].")
    ] = None,
    windows: Annotated[int, typer.Option(help="Number of windows to measure on.")] = 8,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of the measurement.")] = 0,
    save: Annotated[Path | None, typer.Option(help="File to write the plan to.")] = None,
    as_json: Json = False,
) -> None:
    """A level for every input group, of the least loss that fits the budget."""
    from dropbydrop.checkpoint import Checkpoint
    from dropbydrop.planning.memory import default_context
    from dropbydrop.planning.sensitivity import Sensitivity, known_sensitivity
    from dropbydrop.planning.solver import check_average, levels_here, make_plan

    from .tables import print_plan

    if (avg_bits is None) == (memory is None):
        raise DropError("give one budget: --avg-bits 2.6, or --memory 1.5GiB.")
    check_seed(seed)
    checkpoint = Checkpoint.open(out)
    if avg_bits is not None:  # before minutes of measuring
        check_average(avg_bits, levels_here(checkpoint), checkpoint.levels)
    known = None if measure else Sensitivity.load(checkpoint)
    if measure or (measure is None and known is None):
        known = run_measurement(checkpoint, text, windows, seq_len, seed)
    known = known or known_sensitivity(checkpoint)
    made = make_plan(checkpoint, avg_bits, memory, context=context, dtype=dtype, sensitivity=known)
    tokens = default_context(checkpoint, context)
    result: dict[str, Any] = {
        **made.to_dict(),
        "average_bits": made.average_bits(checkpoint),
        "memory": made.memory(checkpoint, dtype, tokens).to_dict(),
        "predicted_loss": known.predicted(made, checkpoint),
        "sensitivity": known.kind,
    }
    if save is not None:
        made.save(save)
    print_plan(result, checkpoint, known, console(as_json))
    finish(as_json, result)


def run_measurement(
    checkpoint: Checkpoint, text: Path | None, windows: int, seq_len: int, seed: int
) -> Sensitivity:
    """Measure sensitivities on a text (or on what the model writes) and write the sidecar.

    Raises:
        DropError: no room for windows in the text, planes absent, or a folder that is read-only.
    """
    import torch

    from dropbydrop.data.text_files import text_windows
    from dropbydrop.evaluation.sensitivity_probe import measure, self_windows
    from dropbydrop.models.model_config import context_length
    from dropbydrop.models.sources import load_tokenizer
    from dropbydrop.runtime.load import load
    from dropbydrop.system.console import quiet_transformers

    longest = context_length(checkpoint.config) or seq_len
    check_windows(windows, seq_len, longest)
    with quiet_transformers():
        model = load(checkpoint.path, checkpoint.levels[-1], dtype=torch.float32)
        if text is None:
            ids = self_windows(model, windows, seq_len, seed)
            about: dict[str, Any] = {"text": "self"}
        else:
            ids, about = text_windows(text, load_tokenizer(checkpoint.path), seq_len, windows)
        known = measure(model, ids, seed=seed, description=about)
    known.save(checkpoint.path)
    return known
