"""`dropbydrop eval`: perplexity, divergence and zero-shot accuracy of a checkpoint's precisions."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dropbydrop.system.errors import CalibrationError, DropError, PrecisionError
from dropbydrop.system.settings import check_seed

from .options import Json, console, finish, parse_averages, parse_bits, parse_dtype

if TYPE_CHECKING:
    from dropbydrop.planning.precision import Precision


def run(
    out: Annotated[Path, typer.Argument(help="Checkpoint folder; for --tasks any model.")],
    text: Annotated[Path | None, typer.Option(help="Text, .raw or .jsonl file.")] = None,
    bits: Annotated[
        str | None, typer.Option(help="Levels, such as 2,3,4 [all that are here].")
    ] = None,
    avg_bits: Annotated[
        str | None, typer.Option(help="Averages of bits a weight, such as 2.5,2.75.")
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
    from dropbydrop.data.text_files import check_tokens, text_windows
    from dropbydrop.evaluation import perplexity, zeroshot
    from dropbydrop.models.embeddings import embedded_tokens
    from dropbydrop.models.sources import load_tokenizer, resolve
    from dropbydrop.system.console import phase, quiet_transformers

    from .tables import print_evaluation, print_tasks

    if text is None and tasks is None:
        raise DropError("name a --text to measure perplexity on, or zero-shot --tasks, or both.")
    kind, shown, chosen = parse_dtype(dtype), console(as_json), choose(bits, avg_bits, plan)
    names = [] if tasks is None else zeroshot.parse_tasks(tasks)
    if text is not None:
        check_window(out, seq_len)
        ids, result = text_windows(text, load_tokenizer(out), seq_len, windows)
    source = None if reference is None else resolve(reference)
    with phase("loading"), quiet_transformers():
        original = None if source is None else load_plain(source.folder, kind)
        folder, models, sizes = open_models(out, chosen, kind)
    if text is not None:
        check_tokens(ids, embedded_tokens(next(iter(models.values()))))
        found = perplexity.evaluate(models, original, ids, seed=check_seed(seed))
        for name, size in sizes.items():
            found["bits"][name] |= size
        result |= {"dtype": dtype, **found}
        print_evaluation(result, shown)
    else:
        result = {}
    if tasks is not None:
        first = {} if original is None else {"reference": original}
        found = zeroshot.run(
            first | models,
            load_tokenizer(folder),
            names,
            data=tasks_data,
            limit=limit,
            batch_size=batch_size,
            progress=sys.stderr.isatty(),
        )
        for name, size in sizes.items():
            found["models"][name]["true_bits"] = size["true_bits"]
        result["tasks"] = found | {"dtype": dtype}
        print_tasks(result["tasks"], shown)
    finish(as_json, result)


def choose(
    bits: str | None, avg_bits: str | None, plans: list[Path] | None
) -> dict[str, Precision] | None:
    """Name -> precision that the three options ask for; None without any."""
    from dropbydrop.planning.plan import Plan
    from dropbydrop.planning.precision import Precision

    chosen: dict[str, Precision] = {}
    if bits is not None:
        chosen |= {str(p): Precision(bits=p) for p in parse_bits(bits)}
    if avg_bits is not None:
        chosen |= {str(x): Precision(avg_bits=x) for x in parse_averages(avg_bits)}
    for path in plans or ():  # a file may be called "3"
        name = f"plan {path}" if str(path) in chosen else str(path)
        chosen[name] = Precision(plan=Plan.load(path))
    return chosen or None


def check_window(out: Path, seq_len: int) -> None:
    """Refuse a folder that is no checkpoint, and windows longer than its model's context.

    Raises:
        DropError: either of them.
    """
    from dropbydrop.checkpoint import Checkpoint
    from dropbydrop.models.model_config import context_length

    context = context_length(Checkpoint.open(out).config)
    if context is not None and seq_len > context:
        raise CalibrationError(
            f"--seq-len {seq_len} is longer than the model's context of {context} tokens."
        )


def open_models(
    out: Path, chosen: Mapping[str, Precision] | None, dtype: Any
) -> tuple[Path, dict[str, Any], dict[str, dict[str, Any]]]:
    """Precisions of a checkpoint, all on one storage, or a plain model, which is named "model".

    Args:
        chosen: name -> precision; by default all levels whose planes are here.

    Returns:
        The folder with the tokenizer; name -> model; name -> true bits and bytes of a precision.

    Raises:
        DropError: checkpoint, precisions or model are not usable.
    """
    from dropbydrop.checkpoint import Checkpoint
    from dropbydrop.checkpoint.files import is_checkpoint
    from dropbydrop.models.sources import resolve
    from dropbydrop.runtime.load import load_views

    if not is_checkpoint(out):
        if chosen is not None:
            raise PrecisionError(
                f"{out} is not a dropbydrop checkpoint and has no levels; leave out --bits, "
                "--avg-bits and --plan."
            )
        folder = resolve(out).folder
        return folder, {"model": load_plain(folder, dtype)}, {}
    checkpoint, models, sizes = Checkpoint.open(out), {}, {}
    for name, (plan, view) in load_views(checkpoint, chosen, dtype).items():
        size = plan.bytes_read(checkpoint)
        models[name] = view
        sizes[name] = {
            "true_bits": plan.true_bits(checkpoint),
            "true_bits_whole": 8 * size / checkpoint.manifest.total_parameters,
            "bytes": size,
        }
    return out, models, sizes


def load_plain(folder: Path, dtype: Any) -> Any:
    """A model that is not quantized."""
    from dropbydrop.models.pretrained import read_model

    return read_model(folder, dtype=dtype).eval()
