"""Plots of a comparison: loss over true bits, time and disk (the paper's Figures 6 and 8)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropbydrop_research.study.paper import plot_cost
from dropbydrop_research.study.style import new_figure, save, series, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def plot_loss(result: Mapping[str, Any]) -> Figure:
    """Excess loss, with its 95 % interval, and perplexity over the true bits of the decoder."""
    figure, axes = new_figure(1, 2, 9.0, 4.2)
    loss, perplexity = axes[0]
    for i, method in enumerate(result["methods"].values()):
        rows = sorted(method["bits"].values(), key=lambda row: row["true_bits"])
        bits = [row["true_bits"] for row in rows]
        excess = [row["excess"] for row in rows]
        errors = None
        if all(row["excess_interval"] for row in rows):
            low = [max(0.0, row["excess"] - row["excess_interval"][0]) for row in rows]
            high = [max(0.0, row["excess_interval"][1] - row["excess"]) for row in rows]
            errors = [low, high]
        loss.errorbar(bits, excess, yerr=errors, capsize=2, label=method["title"], **series(i))
        perplexity.plot(bits, [row["ppl"] for row in rows], label=method["title"], **series(i))
    every = [row["excess"] for m in result["methods"].values() for row in m["bits"].values()]
    if min(every) > 0:
        loss.set_yscale("log")
    loss.set_ylabel("excess loss, nats a token")
    perplexity.set_yscale("log")
    perplexity.axhline(result["reference"]["ppl"], color="black", linewidth=0.8, label="original")
    perplexity.set_ylabel(f"perplexity, {result['text']}")
    for ax in axes[0]:
        ax.set_xlabel("true bits a weight of the decoder")
    perplexity.legend()
    return figure


def draw(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write loss.{png,svg} and cost.{png,svg} into `folder`.

    Raises:
        DropError: matplotlib is not installed.
    """
    rows = [
        {"method": m["title"], "seconds": m["seconds"], "bytes": m["disk_bytes"]}
        for m in result["methods"].values()
    ]
    return [*save(plot_loss(result), folder / "loss"), *save(plot_cost(rows), folder / "cost")]
