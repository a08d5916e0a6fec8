"""Study `gaussian`: how Gaussian are a model's weights, before and after rotation?

The paper's premise (its Figures 3 and 9) is that layer weights are well fitted by a Gaussian.
Each matrix is fitted four times: as stored and rotated on its input side, each as a whole
(what the paper's histograms show) and with rows scaled to unit rms (what a quantizer with row
scales codes, and what the bound assumes). Statistics are those of `theory.gaussian`: effect sizes,
since at a million weights every p-value is zero.

Massive activations are listed beside it when Gram matrices are cached: they break the other
premise, a weighting H that measures more than one direction.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dropbydrop.coding.rotation import Rotation
from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.system.errors import FormatError
from dropbydrop_research.theory.gaussian import BINS, GaussianFit, fit_gaussian, massive_activations

from .data import GramFolder, Progress, finite, linear_modules, read_weight
from .style import BLACK, SKY, new_figure, series, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FITS = ("stored", "stored_rows", "rotated", "rotated_rows")
_MEASURES = ("kurtosis", "max_over_rms", "kolmogorov", "w2", "negentropy")


def run(
    folder: Path,
    *,
    modules: Sequence[str] | None = None,
    seed: int = 0,
    grams: GramFolder | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fit Gaussians to every weight matrix of the decoder blocks.

    Args:
        folder: the model, a local Hugging Face folder.
        modules: full names; default all.
        seed: of the rotation to compare with (`Rotation.make`).
        grams: cached statistics, for the list of massive activations.

    Returns:
        {"model", "rotation", "edges": [101] bin edges in standard deviations,
         "matrices": [{"module", "shape", "stored": fit, "stored_rows", "rotated",
         "rotated_rows"}], "skipped": [all-zero modules],
         "summary": {fit name: {measure: {"median", "worst", "module"}}},
         "massive_activations": [{"input_group", "tokens", "max_over_median", …}] or None}
        where a fit holds the fields of `theory.GaussianFit`.

    Raises:
        FormatError, UnsupportedModelError: as `BlockRunner.open`; a module the model lacks.
    """
    runner = BlockRunner.open(folder)
    names = linear_modules(runner) if modules is None else list(modules)
    matrices: list[dict[str, Any]] = []
    skipped: list[str] = []
    for i, name in enumerate(names):
        if progress:
            progress(i, len(names), name)
        weight = read_weight(runner, name)
        if bool(weight.min() == weight.max()):
            skipped.append(name)
            continue
        turn = Rotation.make(weight.shape[1], seed)
        entry: dict[str, Any] = {"module": name, "shape": list(weight.shape)}
        for label, matrix in (("stored", weight), ("rotated", turn.apply_weight(weight))):
            entry[label] = _json(fit_gaussian(matrix))
            entry[f"{label}_rows"] = _json(fit_gaussian(matrix, by_row=True))
        matrices.append(entry)
    if progress:
        progress(len(names), len(names), "")
    if not matrices:
        raise FormatError(
            f"{folder} has no weights to fit: {len(skipped)} matrices are one number each."
        )
    return {
        "model": folder.name,
        "rotation": {"kind": "full", "seed": seed},
        "edges": BINS.tolist(),
        "matrices": matrices,
        "skipped": skipped,
        "summary": {fit: _summary(matrices, fit) for fit in FITS},
        "massive_activations": None if grams is None else massive(grams),
    }


def massive(grams: GramFolder) -> list[dict[str, Any]]:
    """Massive activations of every input group with cached token energies, worst first."""
    found = []
    for group in grams:
        if group.energies is not None:
            report = asdict(massive_activations(group.energies))
            report["max_over_median"] = finite(report["max_over_median"])
            found.append({"input_group": group.name, **report})
    return sorted(found, key=lambda r: -(r["max_over_median"] or float("inf")))


def _json(fit: GaussianFit) -> dict[str, Any]:
    data = asdict(fit)
    data["histogram"] = [round(v, 7) for v in fit.histogram]
    return data


def _summary(matrices: list[dict[str, Any]], fit: str) -> dict[str, Any]:
    """Median and worst (largest) value of each measure, and where the worst is."""
    table = {}
    for measure in _MEASURES:
        worst = max(matrices, key=lambda m: m[fit][measure])
        table[measure] = {
            "median": statistics.median(m[fit][measure] for m in matrices),
            "worst": worst[fit][measure],
            "module": worst["module"],
        }
    return table


# ---- plots ------------------------------------------------------------------------------------


@styled
def plot_histograms(
    result: dict[str, Any], fit: str = "stored", modules: Sequence[str] | None = None
) -> Figure:
    """Figures 3 and 9: histograms of weights with the fitted Gaussian, logarithmic density.

    A logarithmic axis, because a linear one hides the tails, which decide what quantizers lose.
    Default: the matrices of the first, middle and last block (at most 21).
    """
    chosen = [m for m in result["matrices"] if modules is None or m["module"] in modules]
    chosen = _spread(chosen) if modules is None else chosen
    columns = min(7, len(chosen))
    rows = -(-len(chosen) // columns)
    figure, axes = new_figure(rows, columns, 1.4 * columns + 0.6, 1.4 * rows + 0.6, share=True)
    edges = torch.tensor(result["edges"])
    centres, width = (edges[1:] + edges[:-1]) / 2, float(edges[1] - edges[0])
    normal = torch.exp(-centres.square() / 2) / (2 * torch.pi) ** 0.5
    for ax, matrix in zip(axes.flat, chosen, strict=False):
        data = matrix[fit]
        density = [v / width for v in data["histogram"]]
        ax.stairs(density, edges.tolist(), fill=True, color=SKY, label="weights")
        ax.plot(centres, normal, color=BLACK, linestyle="--", linewidth=1, label="Gaussian")
        ax.set_title(_short(matrix["module"]), fontsize=7)
        ax.text(
            0.5,
            0.04,
            f"kurtosis {data['kurtosis']:.2f}\nmax {data['max_over_rms']:.0f} rms",
            transform=ax.transAxes,
            fontsize=6,
            ha="center",
        )
        ax.tick_params(labelsize=6)
    # few fixed ticks: locating logarithmic ones in every panel takes most of the drawing time
    axes[0, 0].set_yscale("log")
    axes[0, 0].set_ylim(1e-6, 1)
    axes[0, 0].set_yticks([1e-6, 1e-4, 1e-2, 1])
    axes[0, 0].set_xticks([-4, 0, 4])
    for ax in axes.flat:
        ax.minorticks_off()
    for ax in list(axes.flat)[len(chosen) :]:
        ax.set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2)
    figure.supxlabel("weight / standard deviation", fontsize=8)
    figure.supylabel("density", fontsize=8)
    return figure


@styled
def plot_effects(result: dict[str, Any]) -> Figure:
    """Non-normality of every matrix before and after rotation, rows scaled; smaller is better."""
    figure, axes = new_figure(1, 3, 9.5, 3.1)
    matrices = result["matrices"]
    panels = (
        ("max_over_rms", "largest |weight| / rms", 1.0),
        ("w2", "W2² / variance", 1e-6),
        ("negentropy", "negentropy (bits a weight)", 1e-5),
    )
    for ax, (measure, title, floor) in zip(axes[0], panels, strict=True):
        for i, fit, label in ((1, "stored_rows", "as stored"), (0, "rotated_rows", "rotated")):
            values = [max(m[fit][measure], floor) for m in matrices]
            ax.plot(values, label=label, **series(i, linestyle="none", markersize=3))
        if measure == "max_over_rms":
            expected = [m["stored_rows"]["expected_max_over_rms"] for m in matrices]
            ax.axhspan(min(expected), max(expected), color=BLACK, alpha=0.35, label="Gaussian")
        ax.set_yscale("log")
        ax.set_title(title)
        ax.set_xlabel("matrix, in the model's order")
    axes[0, 0].set_yticks([4, 6, 10, 20, 30], ["4", "6", "10", "20", "30"])
    axes[0, 0].minorticks_off()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=3)
    return figure


def _spread(matrices: list[dict[str, Any]], limit: int = 21) -> list[dict[str, Any]]:
    """Matrices of the first, middle and last block; evenly spaced ones if blocks are unclear."""
    blocks: dict[str, list[dict[str, Any]]] = {}
    for matrix in matrices:
        number = next((p for p in matrix["module"].split(".") if p.isdigit()), "")
        blocks.setdefault(number, []).append(matrix)
    keys = list(blocks)
    picks = sorted({0, len(keys) // 2, len(keys) - 1})
    return [m for i in picks for m in blocks[keys[i]]][:limit]


def _short(module: str) -> str:
    """ "model.layers.3.mlp.down_proj" -> "3 mlp.down"."""
    parts = module.split(".")
    at = next((i for i, p in enumerate(parts) if p.isdigit()), -1)
    return f"{parts[at]} {'.'.join(parts[at + 1 :])}".replace("_proj", "").replace("self_", "")
