"""Plots of the `refinement` study: the paper's Figures 4, 10, 11 and 12."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .style import BLACK, SKY, new_figure, series, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHOWN = (0, 1, 3, 7, 15, 31, 63, 95, 127, 191, 255, 383, 511, 767, 1023)  # components with markers
_TITLES = {
    "square": "X square, invertible",
    "wide": "X wide, full row rank",
    "deficient": "X rank-deficient",
}


@styled
def plot_equivalence(result: dict[str, Any]) -> Figure:
    """Figure 4: the weighted MSE on W against the plain MSE on Y = W X, for every code."""
    figure, axes = new_figure(1, 1, 4.2, 3.6)
    ax = axes[0, 0]
    for i, case in enumerate(result["cases"]):
        on_w, on_y = zip(*case["equivalence"], strict=True)
        style = series(i, linestyle="none", markerfacecolor="none", markersize=7)
        ax.plot(on_w, on_y, label=_TITLES[case["case"]], **style)
    low, high = ax.get_xlim()
    low = max(low, 1e-6)
    ax.plot([low, high], [low, high], color=BLACK, linewidth=0.8, label="equal")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("weighted MSE on W, tr(E H Eᵀ)")
    ax.set_ylabel("plain MSE on Y = W X")
    ax.legend()
    return figure


@styled
def plot_water_filling(result: dict[str, Any]) -> Figure:
    """Figure 10: reverse water-filling over the eigenvalues of H; what nested codes do there."""
    figure, axes = new_figure(1, len(result["cases"]), 3.3 * len(result["cases"]), 3.2)
    for ax, case in zip(axes[0], result["cases"], strict=True):
        lam = case["components"]["spectrum"][: case["rank"]]
        index = range(1, len(lam) + 1)
        ax.fill_between(index, lam, 1e-30, color=SKY, alpha=0.3, label="variance")
        for i, level in enumerate(case["components"]["levels"]):
            style = series(i, marker="")
            filled = [min(v, level["level"]) for v in lam]
            ax.plot(index, filled, label=f"level at R = {level['bits']:.3g}", **style)
            if "nested" in level:
                every = [k for k in _SHOWN if k < len(lam)]
                points = [level["nested"][k] for k in every]
                ax.plot([k + 1 for k in every], points, **series(i, linestyle="none"))
        ax.set_xscale("log")
        ax.set_yscale("log")
        floor = min(level["level"] for level in case["components"]["levels"])
        ax.set_ylim(0.2 * min(floor, min(lam)), 2 * lam[0])
        ax.set_title(_TITLES[case["case"]])
        ax.set_xlabel("component of Y")
    axes[0, 0].set_ylabel("variance, distortion\n(markers: nested code)")
    _legend_above(figure, axes[0, 0])
    return figure


@styled
def plot_levels(result: dict[str, Any]) -> Figure:
    """Figure 11: how levels nest. Bits that each level adds to each component, stacked."""
    figure, axes = new_figure(1, len(result["cases"]), 3.3 * len(result["cases"]), 3.0)
    hatches = ("", "///", "...", "xxx", "\\\\\\", "+++")
    for ax, case in zip(axes[0], result["cases"], strict=True):
        index = range(1, len(case["components"]["spectrum"]) + 1)
        below = [0.0] * len(index)
        for i, level in enumerate(case["components"]["levels"]):
            above = [a + b for a, b in zip(below, level["increments"], strict=True)]
            ax.fill_between(
                index,
                below,
                above,
                step="mid",
                facecolor=series(i)["color"],
                alpha=0.55,
                hatch=hatches[i % len(hatches)],
                edgecolor="white",
                linewidth=0,
                label=f"up to R = {level['bits']:.3g}",
            )
            below = above
        ax.set_xscale("log")
        active = ", ".join(str(level["active"]) for level in case["components"]["levels"])
        ax.set_title(f"{_TITLES[case['case']]}\nactive: {active}")
        ax.set_xlabel("component of Y")
    axes[0, 0].set_ylabel("bits of the component")
    _legend_above(figure, axes[0, 0])
    return figure


@styled
def plot_rate_distortion(result: dict[str, Any]) -> Figure:
    """Figure 12: distortion against rate in the three cases: bound, ideal, single, nested, dropped.

    Hollow markers: prefixes that the code was not trained for.
    """
    figure, axes = new_figure(1, len(result["cases"]), 3.3 * len(result["cases"]), 3.4)
    kinds = (
        ("ideal", "successive refinement, ideal", 2),
        ("single", "single-level codes", 0),
        ("nested", "nested code", 1),
        ("dropped", "last level only, dropped", 3),
    )
    last = result["levels"][-1]
    for ax, case in zip(axes[0], result["cases"], strict=True):
        ax.plot(case["curve"]["bits"], case["curve"]["bound"], color=BLACK, label="bound")
        for kind, label, i in kinds:
            trained = {last} if kind == "dropped" else set(result["levels"])
            points = [
                (bits, value, p in trained or kind == "ideal")
                for bits, value, p in zip(
                    case["bits"], case["codes"][kind], case["levels"], strict=True
                )
                if value is not None
            ]
            line = series(
                i, marker="", linestyle="none" if kind == "ideal" else series(i)["linestyle"]
            )
            ax.plot([b for b, _, _ in points], [v for _, v, _ in points], **line)
            style = series(i, linestyle="none")
            for full in (True, False):
                chosen = [(b, v) for b, v, known in points if known is full]
                face = {} if full else {"markerfacecolor": "white"}
                ax.plot(*_columns(chosen), label=label if full else None, **style, **face)
        ax.set_yscale("log")
        ax.set_title(_TITLES[case["case"]])
        ax.set_xlabel("bits a weight")
    axes[0, 0].set_ylabel("distortion / power")
    _legend_above(figure, axes[0, 0])
    return figure


def _legend_above(figure: Figure, ax: Any) -> None:
    """One legend for all panels, from the entries of `ax`, above them."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [b for b, _ in points], [v for _, v in points]
