"""KL against average bits: plans, uniform levels, and the straight line between them.

    python research/experiments/plans.py OUT --text FILE --reference MODEL [--picture PATH]

OUT needs sensitivities (`dropbydrop plan OUT --avg-bits 2.5` measures them, on text that the model
writes itself unless another is named), or the log of its quantization serves. Everything is
evaluated on the same windows of FILE in one run. "line" is the KL on the straight line between the
neighbouring uniform levels: what mixing two checkpoints request by request would give. "saved" is
1 - KL / line, with a 95 % bootstrap interval over windows. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from dropbydrop.checkpoint import Checkpoint
from dropbydrop.data.text_files import text_windows
from dropbydrop.evaluation.perplexity import evaluate
from dropbydrop.models.sources import load_tokenizer, resolve
from dropbydrop.planning.plan import Plan
from dropbydrop.planning.precision import Precision
from dropbydrop.planning.sensitivity import known_sensitivity
from dropbydrop.runtime.load import load_views
from dropbydrop.system.console import quiet_transformers
from dropbydrop_research.study.style import new_figure, save, series, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def between(levels: Sequence[int], bits: float, kl: dict[int, torch.Tensor]) -> torch.Tensor:
    """KL of every window on the line between the levels around `bits`."""
    low = max(p for p in levels if p <= bits)
    high = min(p for p in levels if p >= bits)
    share = 0.0 if low == high else (bits - low) / (high - low)
    return (1 - share) * kl[low] + share * kl[high]


def saving(kl: torch.Tensor, line: torch.Tensor) -> tuple[float, list[float]]:
    """1 - mean(kl) / mean(line), and its 95 % interval by a paired bootstrap over windows."""
    index = torch.randint(0, len(kl), (2000, len(kl)), generator=torch.Generator().manual_seed(0))
    drawn = 1 - kl[index].mean(1) / line[index].mean(1)
    ends = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=drawn.dtype))
    return float(1 - kl.mean() / line.mean()), ends.tolist()


def figures_of(
    plan: Plan,
    checkpoint: Checkpoint,
    figures: dict[str, Any],
    kl: torch.Tensor,
    line: torch.Tensor,
) -> dict[str, Any]:
    """A plan's row: bits, KL and perplexity, and what it saves against the line.

    Args:
        figures: of `evaluate`; kl: KL of every window; line: the same on the line.
    """
    saved, interval = saving(kl, line)
    return {
        "bits": plan.average_bits(checkpoint),
        "true_bits": plan.true_bits(checkpoint),
        "kl": float(kl.mean()),
        "kl_interval": figures["kl_interval"],
        "ppl": figures["ppl"],
        "line": float(line.mean()),
        "saved": saved,
        "saved_interval": interval,
    }


@styled
def plot(rows: list[dict[str, Any]]) -> Figure:
    """KL over average bits, logarithmic."""
    figure, axes = new_figure(1, 1, 5.2, 3.4)
    axis = axes[0, 0]
    uniform = [row for row in rows if row["uniform"]]
    axis.plot([r["bits"] for r in rows], [r["line"] for r in rows], label="straight line",
              **series(1, marker=""))  # fmt: skip
    axis.plot([r["bits"] for r in rows], [r["kl"] for r in rows], label="plan", **series(0))
    axis.plot([r["bits"] for r in uniform], [r["kl"] for r in uniform], label="uniform level",
              **series(2, linestyle="", markersize=8, markerfacecolor="none"))  # fmt: skip
    axis.set(xlabel="average planes a weight", ylabel="KL to the original, nats a token",
             yscale="log")  # fmt: skip
    axis.legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--reference", required=True)
    parser.add_argument("--averages", default="2.25,2.5,2.75,3.25,3.5,3.75")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--picture", type=Path, help="stem of a PNG and an SVG")
    args = parser.parse_args()
    checkpoint = Checkpoint.open(args.out)
    known = known_sensitivity(checkpoint)
    wanted = sorted({*map(float, checkpoint.levels), *map(float, args.averages.split(","))})
    chosen = {
        f"{b:g}": Precision(int(b)) if b.is_integer() else Precision(avg_bits=b) for b in wanted
    }
    ids, described = text_windows(args.text, load_tokenizer(args.out), args.seq_len, args.windows)
    started = time.perf_counter()
    with quiet_transformers():
        loaded = load_views(checkpoint, chosen, torch.float32)
        folder = resolve(args.reference).folder
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    figures = evaluate({name: view for name, (_, view) in loaded.items()}, reference, ids)
    kls = {
        name: torch.tensor(row["per_window"]["kl"], dtype=torch.float64)
        for name, row in figures["bits"].items()
    }
    at_levels = {p: kls[str(p)] for p in checkpoint.levels}
    rows = []
    print(f"{'bits':>6}{'true bits':>11}{'KL':>9}{'line':>9}{'saved':>8}  95 %")
    for name, (plan, _) in loaded.items():
        line = between(checkpoint.levels, plan.average_bits(checkpoint), at_levels)
        row = figures_of(plan, checkpoint, figures["bits"][name], kls[name], line)
        row["uniform"] = chosen[name].bits is not None
        row["predicted_to_highest"] = known.predicted(plan, checkpoint)
        rows.append(row)
        low, high = row["saved_interval"]
        shown = "" if row["uniform"] else f"{row['saved']:8.1%}  {low:.1%} to {high:.1%}"
        print(
            f"{row['bits']:6.3f}{row['true_bits']:11.3f}{row['kl']:9.4f}{row['line']:9.4f}{shown}"
        )
    if args.picture:
        save(plot(rows), args.picture)
    result = {
        "benchmark": "plans",
        "checkpoint": args.out.name,
        "sensitivity": {"kind": known.kind, **known.description},
        **described,
        "windows": figures["windows"],
        "seq_len": figures["seq_len"],
        "seconds": time.perf_counter() - started,
        "rows": rows,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
