"""`dropbydrop eval --tasks`: options, models to evaluate, and the table."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dropbydrop.errors import PrecisionError

from .options import parse_dtype

if TYPE_CHECKING:
    from dropbydrop.planning.precision import Precision

Tasks = Annotated[
    str | None,
    typer.Option(help="Zero-shot tasks, such as piqa,arc_easy; all: the usual five."),
]
Limit = Annotated[int | None, typer.Option(help="Only the first so many items of each task.")]
BatchSize = Annotated[int, typer.Option(help="Requests of --tasks evaluated together.")]
TasksData = Annotated[
    Path | None,
    typer.Option(
        envvar="DROPBYDROP_DATA", help="Folder with the items, a folder a task (default: the hub)."
    ),
]


def evaluate_tasks(
    out: Path,
    tasks: str,
    chosen: Mapping[str, Precision] | None,
    reference: str | None,
    limit: int | None,
    data: Path | None,
    console: Console,
    dtype: str = "float32",
    batch_size: int = 1,
) -> dict[str, Any]:
    """Accuracy of precisions of a checkpoint, or of a plain model; prints the table.

    Args:
        chosen: see `load.load_views`.

    Returns:
        See `zeroshot.run`; models are named as in `chosen`, "reference" and "model". Precisions
        also have "true_bits".

    Raises:
        DropError: model, levels, tasks or data are not usable.
    """
    from dropbydrop.checkpoint import Checkpoint
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
            folder = out
            checkpoint = Checkpoint.open(out)
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
    result["dtype"] = dtype
    print_tasks(result, console)
    return result


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder's config names our format."""
    try:
        config = json.loads((folder / "config.json").read_text())
        return bool(config["quantization_config"]["quant_method"] == "dropbydrop")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _plain(folder: Path, dtype: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def print_tasks(result: Mapping[str, Any], console: Console) -> None:
    """Accuracy in percent, ± one standard error; below it the paired difference."""
    limit = f", first {result['limit']} items" if result["limit"] else ""
    where = "the hub" if result["data"] == "hub" else "local files"
    table = Table(
        title=f"zero-shot accuracy in %, ± one standard error ({where}{limit}; lm-eval "
        f"{result['versions']['lm_eval']})"
    )
    table.add_column("model")
    for name in result["names"]:
        table.add_column(name, justify="right")
    table.add_column("mean acc", justify="right")
    for name, found in result["models"].items():
        mean = found["mean"]
        cells = [_cell(found["tasks"].get(task, {})) for task in result["names"]]
        label = f"{name} bits" if name.isdigit() else name
        table.add_row(label, *cells, _plus_minus(mean["acc"], mean["acc_stderr"]))
    console.print(table)
    console.print("n: length-normalised; Δ: difference from the reference, paired by item")


def _cell(row: Mapping[str, Any]) -> str:
    lines = []
    if "acc" in row:
        lines.append(_plus_minus(row["acc"], row["acc_stderr"]))
    if "acc_norm" in row:
        lines.append("n " + _plus_minus(row["acc_norm"], row["acc_norm_stderr"]))
    if "difference" in row:
        lines.append("Δ " + _plus_minus(row["difference"], row["difference_stderr"], sign="+"))
    return "\n".join(lines) or "no accuracy"


def _plus_minus(value: float | None, error: float | None, sign: str = "") -> str:
    if value is None:
        return ""
    return f"{100 * value:{sign}.1f}" + ("" if error is None else f" ± {100 * error:.1f}")
