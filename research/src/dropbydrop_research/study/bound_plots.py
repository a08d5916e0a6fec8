"""Plots of the `bound` study."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .bound import structural_db
from .style import BLACK, GREY, SKY, new_figure, series, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def plot_gap(result: dict[str, Any]) -> Figure:
    """Left: relative error against true bits; right: each matrix's gap to its bound, sorted.

    The grey line is the bound plus what codes of this kind lose on a white source.
    """
    figure, axes = new_figure(1, 2, 9.5, 3.6)
    _plot_errors(axes[0, 0], result)
    ax = axes[0, 1]
    for i, level in enumerate(result["rates"]):
        gaps = [m["levels"][level]["gap_db"] for m in result["matrices"]]
        gaps = sorted((g for g in gaps if g is not None), reverse=True)
        if gaps:
            every = max(1, len(gaps) // 8)
            ax.plot(gaps, label=f"level {level}", markevery=every, **series(i))
        ax.axhline(
            structural_db(result["rates"][level], result["structural"]),
            color=series(i)["color"],
            linestyle=series(i)["linestyle"],
            linewidth=0.8,
            alpha=0.7,
        )
    ax.axhline(0, color=BLACK, linewidth=1)
    ax.set_xlabel("matrices, largest gap first")
    ax.set_ylabel("gap to the Gaussian bound (dB)")
    ax.set_title(f"thin lines: structural loss ({result['structural']})")
    if any(line.get_label()[0] != "_" for line in ax.lines):
        ax.legend()
    return figure


def _plot_errors(ax: Any, result: dict[str, Any]) -> None:
    """Geometric means of relative errors over matrices, against true bits."""
    levels = list(result["rates"])
    bits = [result["rates"][level] for level in levels]

    def mean(key: str) -> list[float | None]:
        table = []
        for level in levels:
            values = [m["levels"][level][key] for m in result["matrices"]]
            logs = [math.log(v) for v in values if v]
            table.append(math.exp(sum(logs) / len(logs)) if logs else None)
        return table

    bound, high, reached = mean("bound"), mean("bound_held_out"), mean("reached")
    loss = [10 ** (structural_db(r, result["structural"]) / 10) for r in bits]
    floor = [b and b * factor for b, factor in zip(bound, loss, strict=True)]
    ax.plot(bits, bound, color=BLACK, label="Gaussian bound")
    if all(high):
        ax.fill_between(
            bits, bound, high, color=SKY, alpha=0.5, label="up to its held-out estimate"
        )
    ax.plot(bits, floor, color=GREY, linestyle="--", label="bound + structural loss")
    if all(reached):
        ax.plot(bits, reached, label="checkpoint", **series(1))
    ax.set_yscale("log")
    ax.set_xlabel("bits a weight, everything counted")
    ax.set_ylabel("relative weighted error")
    ax.set_title("geometric mean over matrices")
    ax.legend()


@styled
def plot_matrices(result: dict[str, Any], level: str) -> Figure:
    """Bound, bound plus structural loss, and reached error of every matrix at one level."""
    figure, axes = new_figure(1, 1, 9.5, 3.2)
    ax, matrices = axes[0, 0], result["matrices"]
    index = range(len(matrices))
    bound = [m["levels"][level]["bound"] for m in matrices]
    loss = 10 ** (structural_db(result["rates"][level], result["structural"]) / 10)
    ax.fill_between(
        index,
        bound,
        [b * loss for b in bound],
        color=SKY,
        alpha=0.5,
        step="mid",
        label="bound to bound + structural loss",
    )
    points = [(i, m["levels"][level]["reached"]) for i, m in enumerate(matrices)]
    points = [(i, reached) for i, reached in points if reached is not None]
    if points:
        ax.plot(
            *zip(*points, strict=True),
            label="checkpoint",
            **series(1, linestyle="none", markersize=3),
        )
    failed = [i for i, m in enumerate(matrices) if m["premises"]]
    ax.plot(
        failed,
        [bound[i] for i in failed],
        label="bound where a premise fails",
        **series(6, linestyle="none", markersize=4),
    )
    ax.set_yscale("log")
    ax.set_xlabel("matrix, in the model's order")
    ax.set_ylabel(f"relative weighted error at level {level}")
    ax.legend(ncols=3, fontsize=7)
    return figure
