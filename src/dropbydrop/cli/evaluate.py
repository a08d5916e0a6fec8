"""`dropbydrop eval`: perplexity, divergence and zero-shot accuracy of a checkpoint's precisions."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dropbydrop.errors import CalibrationError, DropError, PrecisionError

from .options import Json, console, finish, parse_averages, parse_bits, parse_dtype

if TYPE_CHECKING:
    from dropbydrop.planning.precision import Precision

Chosen = Mapping[str, "Precision"]


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("eval")(run)


def run(
    out: Annotated[Path, typer.Argument(help="Checkpoint folder; for --tasks any model.")],
    text: Annotated[Path | None, typer.Option(help="Text, .raw or .jsonl file.")] = None,
    bits: Annotated[
        str | None, typer.Option(help="Levels, such as 2,3,4 [all that are here].")
    ] = None,
    avg_bits: Annotated[
        str | None, typer.Option(help="Averages of planes a weight, such as 2.5,2.75.")
    ] = None,
    plan: Annotated[
        list[Path] | None,
        typer.Option(metavar="<path>", help="Plan file; may be given more than once."),
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    windows: Annotated[int | None, typer.Option(help="Number of windows [all].")] = None,
    reference: Annotated[
        str | None, typer.Option(help="Original model, for KL and excess loss.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    tasks: Annotated[
        str | None,
        typer.Option(help="Zero-shot tasks, such as piqa,arc_easy; all: the usual five."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Number of items of each task [all].")] = None,
    tasks_data: Annotated[
        Path | None,
        typer.Option(
            envvar="DROPBYDROP_DATA",
            help="Folder with the items, a folder a task (default: the hub).",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Requests of --tasks evaluated together.")] = 1,
    dtype: Annotated[str, typer.Option(help="Type to evaluate in.")] = "float32",
    as_json: Json = False,
) -> None:
    """Perplexity of each level, its divergence from the original model, zero-shot accuracy."""
    from .tables import print_evaluation, print_tasks

    if text is None and tasks is None:
        raise DropError("name a --text to measure perplexity on, or zero-shot --tasks, or both.")
    chosen, shown = choose(bits, avg_bits, plan), console(as_json)
    result: dict[str, Any] = {}
    if text is not None:
        result = evaluate_text(out, text, chosen, seq_len, windows, reference, seed, dtype)
        print_evaluation(result, shown)
    if tasks is not None:
        result["tasks"] = evaluate_tasks(
            out, tasks, chosen, reference, limit, tasks_data, dtype, batch_size
        )
        print_tasks(result["tasks"], shown)
    finish(as_json, result)


def choose(bits: str | None, avg_bits: str | None, plans: list[Path] | None) -> Chosen | None:
    """Name -> precision that the three options ask for; None without any."""
    from dropbydrop.planning.plan import Plan
    from dropbydrop.planning.precision import Precision

    chosen: dict[str, Precision] = {}
    if bits is not None:
        chosen |= {str(p): Precision(bits=p) for p in parse_bits(bits)}
    if avg_bits is not None:
        chosen |= {str(x): Precision(avg_bits=x) for x in parse_averages(avg_bits)}
    chosen |= {str(path): Precision(plan=Plan.load(path)) for path in plans or ()}
    return chosen or None


def evaluate_text(
    out: Path,
    text: Path,
    chosen: Chosen | None,
    seq_len: int,
    windows: int | None,
    reference: str | None,
    seed: int = 0,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Evaluate views of one loaded checkpoint; the JSON object of `dropbydrop eval`.

    Args:
        chosen: name -> precision; by default all levels whose planes are here.

    Raises:
        DropError: text, levels, checkpoint or reference are not usable.
    """
    from dropbydrop.checkpoint import Checkpoint
    from dropbydrop.data.text_files import text_windows
    from dropbydrop.evaluation.perplexity import evaluate
    from dropbydrop.models.model_config import context_length
    from dropbydrop.models.sources import load_tokenizer, resolve
    from dropbydrop.runtime.load import load_views
    from dropbydrop.system.console import phase, quiet_transformers

    checkpoint, kind = Checkpoint.open(out), parse_dtype(dtype)
    ids, described = text_windows(text, load_tokenizer(out), seq_len, windows)
    context = context_length(checkpoint.config)
    if context is not None and seq_len > context:
        raise CalibrationError(
            f"--seq-len {seq_len} is longer than the model's context of {context} tokens."
        )
    folder = None if reference is None else resolve(reference).folder
    with phase("loading"), quiet_transformers():
        loaded = load_views(checkpoint, chosen, kind)
        original = None if folder is None else _plain(folder, kind)
    views = {name: view for name, (_, view) in loaded.items()}
    result = evaluate(views, original, ids, seed=seed)
    for name, (plan, _) in loaded.items():
        size = plan.bytes_read(checkpoint)
        result["bits"][name] |= {
            "true_bits": plan.true_bits(checkpoint),
            "true_bits_whole": 8 * size / checkpoint.manifest.total_parameters,
            "bytes": size,
        }
    return {**described, "dtype": dtype, **result}


def evaluate_tasks(
    out: Path,
    tasks: str,
    chosen: Chosen | None = None,
    reference: str | None = None,
    limit: int | None = None,
    data: Path | None = None,
    dtype: str = "float32",
    batch_size: int = 1,
) -> dict[str, Any]:
    """Zero-shot accuracy of precisions of a checkpoint, or of a plain model.

    Args:
        chosen: name -> precision; by default all levels whose planes are here.

    Returns:
        See `zeroshot.run`; models are named as in `chosen`, "reference" and "model". Precisions
        also have "true_bits".

    Raises:
        DropError: model, levels, tasks or data are not usable.
    """
    from dropbydrop.checkpoint import Checkpoint
    from dropbydrop.checkpoint.config import is_checkpoint
    from dropbydrop.evaluation.zeroshot import parse_tasks, run
    from dropbydrop.models.sources import load_tokenizer, resolve
    from dropbydrop.runtime.load import load_views
    from dropbydrop.system.console import quiet_transformers

    names, kind = parse_tasks(tasks), parse_dtype(dtype)
    models: dict[str, Any] = {}
    true_bits: dict[str, float] = {}
    with quiet_transformers():
        if reference is not None:
            models["reference"] = _plain(resolve(reference).folder, kind)
        if is_checkpoint(out):
            folder, checkpoint = out, Checkpoint.open(out)
            for name, (plan, view) in load_views(checkpoint, chosen, kind).items():
                models[name], true_bits[name] = view, plan.true_bits(checkpoint)
        elif chosen is not None:
            raise PrecisionError(
                f"--bits given, but {out} is not a dropbydrop checkpoint and has no levels."
            )
        else:
            folder = resolve(out).folder
            models["model"] = _plain(folder, kind)
    result = run(
        models,
        load_tokenizer(folder),
        names,
        data=data,
        limit=limit,
        batch_size=batch_size,
        progress=sys.stderr.isatty(),
    )
    for name, bits in true_bits.items():
        result["models"][name]["true_bits"] = bits
    return result | {"dtype": dtype}


def _plain(folder: Path, dtype: Any) -> Any:
    """A model that is not quantized."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
