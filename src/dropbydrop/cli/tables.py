"""Every table that the commands print, for people; the same figures come as JSON with --json."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dropbydrop.system.console import printable

if TYPE_CHECKING:
    from dropbydrop.checkpoint import Checkpoint
    from dropbydrop.planning.sensitivity import Sensitivity
    from dropbydrop.quantization.log import Report
    from dropbydrop.tuning.pipeline import TuneReport


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]] = ()) -> Table:
    """Narrow enough for a terminal of 80 characters."""
    shown = Table(title=printable(title), box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in columns:
        shown.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(*map(printable, row))
    return shown


def sizes_of(checkpoint: Checkpoint, level: int) -> dict[str, Any]:
    """Bits a coded weight, bits a parameter of the whole model, and bytes of a level."""
    return {
        "true_bits": checkpoint.true_bits(level),
        "true_bits_whole": checkpoint.true_bits_whole(level),
        "bytes": checkpoint.bytes_at(level),
    }


def _cells(sizes: Mapping[str, Any]) -> tuple[str, str, str]:
    """`sizes_of` as three cells; bytes in MB."""
    return (
        f"{sizes['true_bits']:.3f}",
        f"{sizes['true_bits_whole']:.3f}",
        f"{sizes['bytes'] / 1e6:.1f}",
    )


def _number(value: float | None, form: str) -> str:
    """A formatted number; nothing where there is none."""
    return "" if value is None else format(value, form)


def print_report(report: Report, checkpoint: Checkpoint, console: Console) -> None:
    """Levels of a new checkpoint, what was left alone and why, and what the run took."""
    title = f"{report.out}: {report.matrices} matrices"
    columns = ("bits", "true bits", "whole model", "MB read", "mean rel. error")
    rows = (
        (str(p), *_cells(sizes_of(checkpoint, p)), f"{report.errors[p]:.5f}") for p in report.levels
    )
    console.print(table(title, columns, rows))
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in report.kept:
        groups.setdefault((_bits_of(entry["bits"]), entry["reason"]), []).append(entry)
    for (bits, reason), entries in groups.items():
        values = sum(e["values"] for e in entries)
        example = entries[0]["name"] + (f" and {len(entries) - 1} more" if entries[1:] else "")
        console.print(f"kept in {bits} bits: {example} ({values:,} values): {reason}")
    if report.unguided:
        console.print(f"tokens count alike: {report.unguided}")
    elif report.plain:
        more = f" and {len(report.plain) - 1} more" if report.plain[1:] else ""
        console.print(
            f"tokens count by gradients of the loss, except for {report.plain[0]}{more}, where "
            "they count alike: not every token passes them"
        )
    if report.untuned:
        console.print(f"not tuned: {report.untuned}")
    if report.starved:
        stacks, few = len(report.starved), sum(report.starved.values())
        console.print(
            f"experts: {few} in {stacks} blocks saw fewer tokens than they have neurons; longer "
            "calibration (--windows) gives them statistics of their own"
            if few
            else f"experts of {stacks} blocks: each saw at least as many tokens as it has neurons"
        )
    s = report.seconds
    console.print(
        f"{s['total']:.0f} s (calibration text {s['calibrate']:.0f}, gradients "
        f"{s['gradients']:.0f}, activations {s['activations']:.0f}, search {s['encode']:.0f} on "
        f"{report.backend}, writing {s['write']:.0f}); peak memory {report.peak_gib:.2f} GiB, "
        f"model in float32 {report.model_gib:.2f} GiB"
    )
    if report.tuning is not None:
        print_tuning(
            report.tuning, {str(p): sizes_of(checkpoint, p) for p in report.levels}, console
        )


def print_info(info: Mapping[str, Any], console: Console) -> None:
    """Levels, sets and provenance of a checkpoint (`info.describe`)."""
    columns = ("bits", "true bits", "whole model", "MB read", "planes here")
    levels = info["levels"].items()
    rows = ((p, *_cells(level), "yes" if level["loadable"] else "no") for p, level in levels)
    console.print(table(escape(info["path"]), columns, rows))
    made, sets = info["provenance"], info["codebook_sets"]
    tuning = made.get("tuning", ())  # provenance is free-form: whatever it holds is shown as text
    steps = tuning if isinstance(tuning, list) else []
    tuned = [step.get("method") if isinstance(step, dict) else step for step in steps]
    named = ", ".join(sets) if len(sets) <= 4 else f"{sets[0]}, … ({len(sets)})"
    planes = "+".join(map(str, info["plane_bits"]))
    text = (
        f"{info['kind']} planes of {planes} bits; {info['matrices']} matrices in "
        f"{info['input_groups']} input groups, codebook sets {named}; embeddings "
        f"{_bits_of(info['embeddings']['bits'])} bits; from "
        f"{made.get('base_model')}, preset {made.get('preset')}, seed {made.get('seed')}"
    )
    console.print(printable(text + "".join(f"; tuned: {d}" for d in tuned)), markup=False)


def _bits_of(bits: int | list[int]) -> str:
    """Bits of embedding and head: one number, or one for each level."""
    return "/".join(map(str, bits)) if isinstance(bits, list) else str(bits)


def print_evaluation(result: Mapping[str, Any], console: Console) -> None:
    """Perplexity, divergence and size of each precision."""
    shown = table(
        f"{result['text']}: {result['windows']} windows of {result['seq_len']} tokens",
        ("bits", "true bits", "whole", "MB", "ppl", "KL", "KL, 95 %", "excess nll"),
    )
    if result["reference"]:
        shown.add_row("original", "", "", "", f"{result['reference']['ppl']:.2f}", "", "", "")
    for name, row in result["bits"].items():
        interval = row.get("kl_interval")
        shown.add_row(
            name,
            *_cells(row),
            f"{row['ppl']:.2f}",
            _number(row.get("kl"), ".4f"),
            "" if not interval else f"{interval[0]:.4f}–{interval[1]:.4f}",
            _number(row.get("excess"), ".4f"),
        )
    console.print(shown)


def print_tasks(result: Mapping[str, Any], console: Console) -> None:
    """Accuracy in percent, ± one standard error; below it the paired difference."""
    limit = f", first {result['limit']} items" if result["limit"] else ""
    where = "the hub" if result["data"] == "hub" else "local files"
    shown = table(
        f"zero-shot accuracy in %, ± one standard error ({where}{limit}; lm-eval "
        f"{result['versions']['lm_eval']})",
        ("model", *result["names"], "mean acc"),
    )
    for name, found in result["models"].items():
        mean = found["mean"]
        cells = [_accuracy(found["tasks"].get(task, {})) for task in result["names"]]
        label = f"{name} bits" if name.isdigit() else name
        shown.add_row(label, *cells, _plus_minus(mean["acc"], mean["acc_stderr"]))
    console.print(shown)
    console.print("n: length-normalised; Δ: difference from the reference, paired by item")


def _accuracy(row: Mapping[str, Any]) -> str:
    kinds = (("acc", "", ""), ("acc_norm", "n ", ""), ("difference", "Δ ", "+"))
    lines = [
        mark + _plus_minus(row[kind], row[f"{kind}_stderr"], sign)
        for kind, mark, sign in kinds
        if kind in row
    ]
    return "\n".join(lines) or "no accuracy"


def _plus_minus(value: float | None, error: float | None, sign: str = "") -> str:
    if value is None:
        return ""
    return f"{100 * value:{sign}.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def print_bench(result: Mapping[str, Any], console: Console) -> None:
    """Speed and memory of each level, and the machine."""
    where = result["topology"]
    console.print(
        f"{where.get('processor', where['machine'])}; cores {where['cores']}; {where['caches']}; "
        f"torch {where['torch']}; {result['threads']} threads, {result['dtype']}; stream "
        f"{result['stream_bytes_per_second'] / 1e9:.1f} GB/s",
        highlight=False,
    )
    shown = table(
        f"decode {result['tokens']} tokens from position {result['prompt']}, prefill "
        f"{result['prefill']}; best of {result['rounds']}",
        ("bits", "true, whole", "decode/s", "prefill/s", "MB read", "of stream", "MB held"),
    )
    for p, row in result["bits"].items():
        shown.add_row(
            p,
            f"{row['true_bits_whole']:.2f}",
            f"{row['decode_tokens_per_second']:.1f}",
            _number(row["prefill_tokens_per_second"], ".0f"),
            f"{row['read_bytes'] / 1e6:.1f}",
            _number(row["of_stream"], ".0%"),
            f"{row['held_bytes'] / 1e6:.1f}",
        )
    console.print(shown)
    for text in sorted({row["decoding"] for row in result["bits"].values()}):
        console.print(f"kernel {result['kernel']}; decoding: {text}", highlight=False)


def print_plan(
    result: Mapping[str, Any], checkpoint: Checkpoint, known: Sensitivity, console: Console
) -> None:
    """The map of levels, a row a block, and the memory of every kind."""
    rows: dict[str, dict[str, str]] = {}
    for group in checkpoint.quantization.input_groups:
        match = re.fullmatch(r"(.*?\.\d+)\.(.+)", group.modules[0])
        block = match[1] if match else group.modules[0]
        column = "/".join(m.rpartition(".")[2].removesuffix("_proj") for m in group.modules)
        rows.setdefault(block, {})[column] = _level_cell(result["prefixes"][group.name])
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    title = f"level of each input group, {result['average_bits']:.3f} bits"
    if "table" in result:
        title += f"; embedding and head with {result['table']}"
    blocks = ((block, *(row.get(c, "") for c in columns)) for block, row in rows.items())
    console.print(table(title, ("block", *columns), blocks))
    kinds = ((k.replace("_", " "), f"{size / 1e6:.2f}") for k, size in result["memory"].items())
    console.print(table("memory", ("kind", "MB"), kinds))
    losses = {p: sum(row[p] for row in known.losses.values()) for p in checkpoint.levels}
    uniform = ", ".join(f"{p} bits {loss:.4f}" for p, loss in losses.items())
    unit = "nats a token" if known.kind == "measured" else "relative errors from the log"
    console.print(
        f"predicted loss {result['predicted_loss']:.4f} ({unit}); uniform levels: {uniform}"
    )


def _level_cell(level: int | Sequence[int]) -> str:
    """3, or of experts 2-4 with their mean."""
    if isinstance(level, int):
        return str(level)
    return f"{min(level)}-{max(level)}, {sum(level) / len(level):.2f}"


def print_tuning(
    report: TuneReport, levels: Mapping[str, Mapping[str, Any]], console: Console
) -> None:
    """Loss of each supervised level before and after tuning."""
    measure = "KL" if report.method == "distill" else "error"
    columns = ("bits", "true bits", f"{measure} before", f"{measure} after")
    rows = (
        (str(p), f"{levels[str(p)]['true_bits']:.3f}", f"{before:.4f}", f"{after:.4f}")
        for p, (before, after) in report.loss.items()
    )
    console.print(table(f"{report.out}: {report.method}", columns, rows))
    console.print(
        f"on windows not trained on; {report.trained:,} values, {report.steps} steps, "
        f"{report.seconds:.0f} s; peak memory {report.peak_gib:.2f} GiB"
    )
    worse = [str(p) for p, (before, after) in report.loss.items() if after > before]
    if worse:
        console.print(
            f"level {', '.join(worse)} became worse; a lower --learning-rate, or more --windows or "
            "--epochs, may mend it"
        )
