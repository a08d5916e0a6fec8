"""Text for people: the model card of a checkpoint and the tables that the commands print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from dropbydrop.checkpoint import Checkpoint, QuantizationConfig

if TYPE_CHECKING:
    from .pipeline import Report


def model_card(base: str, quantization: QuantizationConfig, errors: Mapping[int, float]) -> str:
    """README.md of a checkpoint: how it was made and how to load it. Deterministic."""
    levels = ", ".join(map(str, quantization.levels))
    low = quantization.levels[0]
    calibration = quantization.provenance.get("calibration", {})
    source = "text the model wrote itself"
    if calibration.get("kind") == "text":
        source = f"`{calibration['text']}` (SHA-256 {calibration['sha256'][:16]}…)"
    rows = "\n".join(f"| {p} | {e:.4f} |" for p, e in errors.items())
    # Only an id of the form owner/name is one that the Hub accepts as a base model.
    parts = base.split("/")
    is_id = len(parts) == 2 and all(parts) and not base.startswith((".", "~"))
    front = f"base_model: {base}\nbase_model_relation: quantized\n" if is_id else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{front}tags:
- dropbydrop
- quantized
---
# {base} at {levels} bits, one checkpoint

Made by [dropbydrop](https://pypi.org/project/dropbydrop/) \
{quantization.provenance.get("version", "")}: additive codebooks ordered so that any supervised \
prefix is a model of its own. Plane m is `plane-m.safetensors`; a device needs planes 1..P for P \
bits a weight, and `model.safetensors`.

```python
import dropbydrop                              # registers the format with transformers

model = dropbydrop.load("this-folder", bits={low})   # reads {low} planes
```

Stock transformers cannot read the codes and stops with a size mismatch; import `dropbydrop` first.

- preset `{quantization.provenance.get("preset")}`, seed {quantization.provenance.get("seed")}
- calibration: {source}, {calibration.get("windows")} windows of {calibration.get("seq_len")} tokens
- embeddings and head: {quantization.embeddings.bits} bits

| bits | mean relative weighted error of a matrix |
|---|---|
{rows}
"""


def table(title: str, columns: Sequence[str]) -> Table:
    """Narrow enough for a terminal of 80 characters."""
    empty = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in columns:
        empty.add_column(column, justify="right", no_wrap=True)
    return empty


def print_report(report: Report, checkpoint: Checkpoint, console: Console) -> None:
    """Table of levels, what was left alone and why, and what the run took."""
    shown = table(
        f"{report.out}: {report.matrices} matrices",
        ("bits", "true bits", "whole model", "MB read", "mean rel. error"),
    )
    for p in report.levels:
        shown.add_row(
            str(p),
            f"{checkpoint.true_bits(p):.3f}",
            f"{checkpoint.true_bits_whole(p):.3f}",
            f"{checkpoint.bytes_at(p) / 1e6:.1f}",
            f"{report.errors[p]:.5f}",
        )
    console.print(shown)
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for entry in report.kept:
        groups.setdefault((entry["bits"], entry["reason"]), []).append(entry)
    for (bits, reason), entries in groups.items():
        values = sum(e["values"] for e in entries)
        example = entries[0]["name"] + (f" and {len(entries) - 1} more" if entries[1:] else "")
        console.print(f"kept in {bits} bits: {example} ({values:,} values): {reason}")
    s = report.seconds
    console.print(
        f"{s['total']:.0f} s (calibration text {s['calibrate']:.0f}, activations "
        f"{s['activations']:.0f}, search {s['encode']:.0f} on {report.backend}, writing "
        f"{s['write']:.0f}); peak memory {report.peak_gib:.2f} GiB, model in float32 "
        f"{report.model_gib:.2f} GiB"
    )


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `info` tells: levels, bytes, true bits, planes present, where it came from."""
    q = checkpoint.quantization
    present = checkpoint.planes_present()
    return {
        "path": str(checkpoint.path),
        "levels": {
            str(p): {
                "true_bits": checkpoint.true_bits(p),
                "true_bits_whole": checkpoint.true_bits_whole(p),
                "bytes": checkpoint.bytes_at(p),
                "loadable": all(m in present for m in range(1, p + 1)),
            }
            for p in q.levels
        },
        "planes": len(q.planes),
        "planes_present": list(present),
        "matrices": len(q.modules),
        "sites": len(q.input_groups),
        "codebook_sets": list(q.sets),
        "embeddings": q.embeddings.to_dict(),
        "provenance": dict(q.provenance),
    }


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{names[0]}, … ({len(names)})"


def print_info(info: Mapping[str, Any], console: Console) -> None:
    """The dictionary of `describe`, for people."""
    shown = table(info["path"], ("bits", "true bits", "whole model", "MB read", "planes here"))
    for p, level in info["levels"].items():
        shown.add_row(
            p,
            f"{level['true_bits']:.3f}",
            f"{level['true_bits_whole']:.3f}",
            f"{level['bytes'] / 1e6:.1f}",
            "yes" if level["loadable"] else "no",
        )
    console.print(shown)
    made = info["provenance"]
    console.print(
        f"{info['matrices']} matrices in {info['sites']} input groups, codebook sets "
        f"{_few(info['codebook_sets'])}; embeddings {info['embeddings']['bits']} bits; from "
        f"{made.get('base_model')}, preset {made.get('preset')}, seed {made.get('seed')}"
        + "".join(f"; tuned: {done.get('method')}" for done in made.get("tuning", ()))
    )


def print_evaluation(result: Mapping[str, Any], console: Console) -> None:
    """Perplexity, divergence and size of each level."""
    shown = table(
        f"{result['text']}: {result['windows']} windows of {result['seq_len']} tokens",
        ("bits", "true bits", "whole", "MB", "ppl", "KL", "KL, 95 %", "excess nll"),
    )
    if result["reference"]:
        shown.add_row("original", "", "", "", f"{result['reference']['ppl']:.2f}", "", "", "")
    for p, row in result["bits"].items():
        interval = row.get("kl_interval")
        shown.add_row(
            p,
            f"{row['true_bits']:.3f}",
            f"{row['true_bits_whole']:.3f}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['ppl']:.2f}",
            "" if row.get("kl") is None else f"{row['kl']:.4f}",
            "" if not interval else f"{interval[0]:.4f}–{interval[1]:.4f}",
            "" if row.get("excess") is None else f"{row['excess']:.4f}",
        )
    console.print(shown)
