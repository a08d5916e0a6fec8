"""Study `paper`: one HTML page with the paper's figures as far as they were measured.

Takes the JSON results of the other commands, draws each figure, and writes beside the page every
figure as PNG and SVG and every result as JSON. The page embeds plots and JSON (each result once;
figures link to theirs), loads nothing from elsewhere and has no script; it can be mailed as one
file. Figures whose results are missing are named at the end with the command that produces them.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import bound_plots, gaussian, refinement_plots
from .style import new_figure, save, series, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class _Entry:
    """One figure: its name in files, heading, caption, which result it needs, how to draw it."""

    name: str
    title: str
    caption: str
    needs: str
    draw: Callable[[Any], Figure]


@styled
def plot_perplexity(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Figure 6. Rows {"method", "bits", "ppl"}; a row with bits None is the unquantized model."""
    return _by_method(rows, "ppl", "perplexity", logarithmic=True)


@styled
def plot_accuracy(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Figure 7. Rows {"method", "bits", "accuracy", "stderr" (may be absent)}, in [0, 1]."""
    return _by_method(rows, "accuracy", "mean zero-shot accuracy", logarithmic=False)


@styled
def plot_cost(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Figure 8. Rows {"method", "seconds", "bytes"}: to produce the whole suite of bitwidths."""
    figure, axes = new_figure(1, 2, 7.5, 0.5 * len(rows) + 1.4)
    panels = (("seconds", 60.0, "minutes to produce all levels"), ("bytes", 1e6, "MB on disk"))
    names = [str(row["method"]) for row in rows]
    for ax, (key, unit, label) in zip(axes[0], panels, strict=True):
        values = [row[key] / unit for row in rows]
        bars = ax.barh(names, values, color=[series(i)["color"] for i in range(len(rows))])
        ax.bar_label(bars, fmt="%.3g", padding=2, fontsize=7)
        ax.invert_yaxis()
        ax.set_xlabel(label)
    axes[0, 1].set_yticklabels([])
    return figure


def _by_method(
    rows: Sequence[Mapping[str, Any]], key: str, label: str, logarithmic: bool
) -> Figure:
    figure, axes = new_figure(1, 1, 5.2, 3.6)
    ax = axes[0, 0]
    methods = list(dict.fromkeys(row["method"] for row in rows if row["bits"] is not None))
    for i, method in enumerate(methods):
        points = sorted(
            (row["bits"], row[key], row.get("stderr") or 0.0)
            for row in rows
            if row["method"] == method and row["bits"] is not None
        )
        bits, values, errors = zip(*points, strict=True)
        error = errors if any(errors) else None
        ax.errorbar(bits, values, yerr=error, capsize=2, label=method, **series(i))
    for row in rows:
        if row["bits"] is None:
            ax.axhline(row[key], color="black", linewidth=0.8, label=str(row["method"]))
    if logarithmic:
        ax.set_yscale("log")
    ax.set_xlabel("bits a weight")
    ax.set_ylabel(label)
    ax.legend(fontsize=7)
    return figure


_FIGURES = (
    _Entry("3", "Figure 3: weights against fitted Gaussians", "Histograms of weights as stored, "
           "first, middle and last block, with the Gaussian of the same mean and variance.",
           "gaussian", gaussian.plot_histograms),
    _Entry("4", "Figure 4: distortion equivalence", "Every code's weighted MSE on W equals its "
           "plain MSE on Y = W X, in all three cases of Theorem 1.",
           "refinement", refinement_plots.plot_equivalence),
    _Entry("6", "Figure 6: perplexity per bitwidth", "One nested checkpoint against codes of their "
           "own for each bitwidth and against dropped codebooks.", "perplexity", plot_perplexity),
    _Entry("7", "Figure 7: zero-shot accuracy", "Mean over the tasks that were run; bars are "
           "standard errors.", "accuracy", plot_accuracy),
    _Entry("8", "Figure 8: cost of a suite of bitwidths", "Time and disk space to produce all "
           "levels.", "cost", plot_cost),
    _Entry("9", "Figure 9: weights after rotation", "The matrices of Figure 3, rotated on their "
           "input side, rows scaled to unit rms: what the quantizer codes.",
           "gaussian", lambda result: gaussian.plot_histograms(result, "rotated_rows")),
    _Entry("9b", "Non-normality of every matrix", "Rows scaled to unit rms, before and after "
           "rotation. W2² is comparable with a relative distortion, negentropy with a rate.",
           "gaussian", gaussian.plot_effects),
    _Entry("10", "Figure 10: reverse water-filling", "Variance of each component of Y, water "
           "levels of the bound, and the distortion that the nested code leaves (markers).",
           "refinement", refinement_plots.plot_water_filling),
    _Entry("11", "Figure 11: nested active sets", "Bits that each level adds to each component at "
           "the optimum; components only join, and no increment is negative.",
           "refinement", refinement_plots.plot_levels),
    _Entry("12", "Figure 12: successive refinement", "Distortion against rate: the bound, the "
           "theorem's ideal levels, codes of their own for each level, the nested code, and a code "
           "trained for the last level only. Hollow: prefixes without supervision.",
           "refinement", refinement_plots.plot_rate_distortion),
    _Entry("bound", "Distance of the model's matrices from their bound", "The bound is one for the "
           "Gaussian ensemble with each matrix's H and row variances, not for the one matrix.",
           "bound", bound_plots.plot_gap),
)  # fmt: skip

_COMMANDS = {
    "gaussian": "dropbydrop study gaussian",
    "bound": "dropbydrop study bound",
    "refinement": "dropbydrop study refinement",
    "perplexity": "dropbydrop eval",
    "accuracy": "dropbydrop eval --tasks",
    "cost": "dropbydrop quantize, and one run for each bitwidth",
}

_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem}
img{max-width:100%;height:auto}figure{margin:2rem 0}figcaption{color:#333}
footer,.missing{color:#555}"""


def run(results: Mapping[str, Any], out: Path, title: str = "Drop-by-Drop") -> dict[str, Any]:
    """Draw every figure whose result is at hand and write the page.

    Args:
        results: any of "gaussian", "bound", "refinement" (results of those studies), "perplexity",
            "accuracy", "cost" (rows, see `plot_perplexity`, `plot_accuracy`, `plot_cost`).
        out: folder; `index.html`, figure-<name>.{png,svg} and <result>.json are written into it.

    Returns:
        {"page", "figures": {name: [png, svg]}, "data": {result: json}, "missing": {name: command}}.

    Raises:
        DropError: matplotlib is not installed.
        ValueError: a result of an unknown name.
    """
    if unknown := set(results) - set(_COMMANDS):
        raise ValueError(f"results {sorted(unknown)} belong to no figure; know {list(_COMMANDS)}")
    out.mkdir(parents=True, exist_ok=True)
    sections: list[str] = []
    figures: dict[str, list[str]] = {}
    missing: dict[str, str] = {}
    for entry in _FIGURES:
        if not results.get(entry.needs):
            missing[entry.name] = _COMMANDS[entry.needs]
            continue
        paths = save(entry.draw(results[entry.needs]), out / f"figure-{entry.name}")
        figures[entry.name] = [str(p) for p in paths]
        sections.append(_section(entry, paths[1]))
    data: dict[str, str] = {}
    links: list[str] = []
    for name, result in results.items():
        text = json.dumps(result, allow_nan=False) + "\n"
        (out / f"{name}.json").write_text(text)
        data[name] = str(out / f"{name}.json")
        link = _data_uri("application/json", text.encode())
        links.append(
            f'<li id="data-{name}"><a download="{name}.json" href="{link}">{name}</a></li>'
        )
    page = out / "index.html"
    page.write_text(_page(title, sections, links, missing))
    return {"page": str(page), "figures": figures, "data": data, "missing": missing}


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _section(entry: _Entry, svg: Path) -> str:
    image = _data_uri("image/svg+xml", svg.read_bytes())
    title = html.escape(entry.title)
    return (
        f'<figure id="figure-{entry.name}"><h2>{title}</h2>\n<img alt="{title}" src="{image}">\n'
        f"<figcaption>{html.escape(entry.caption)} "
        f'<a href="#data-{entry.needs}">Data</a></figcaption></figure>'
    )


def _page(title: str, sections: list[str], links: list[str], missing: dict[str, str]) -> str:
    left = "".join(
        f"<li>{html.escape(name)}: <code>{html.escape(command)}</code></li>"
        for name, command in missing.items()
    )
    rest = f'<h2>Not measured here</h2><ul class="missing">{left}</ul>' if left else ""
    body = "\n".join(sections)
    data = f"<h2>Data behind the figures (JSON)</h2><ul>{''.join(links)}</ul>"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1>\n{body}\n{data}\n{rest}\n"
        "<footer>Figures are numbered as in Babaoglu, Chen, Khisti, Multi-Bitwidth Quantization "
        "for LLMs Using Additive Codebooks.</footer></body></html>\n"
    )
