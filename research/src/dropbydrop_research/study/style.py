"""How plots look: colours that colour-blind readers tell apart, each with its own marker and line.

Every plot function carries `@styled`. Colours are those of Okabe and Ito (2008); a series is never
told by colour alone. Figures are built without pyplot: no global state, no display. SVG output is
reproducible byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from dropbydrop.system.errors import DropError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

P = ParamSpec("P")
R = TypeVar("R")

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#777777"
BROWN = "#6B4226"  # for a ninth series; dark enough to be told from the others
OLIVE = "#6B7A00"
INDIGO = "#332288"
WINE, TEAL, ROSE, FOREST, SAND = "#882255", "#44AA99", "#CC6677", "#117733", "#A68A3C"

SERIES: tuple[dict[str, Any], ...] = (
    {"color": BLUE, "marker": "o", "linestyle": "-"},
    {"color": VERMILLION, "marker": "s", "linestyle": "--"},
    {"color": GREEN, "marker": "^", "linestyle": "-."},
    {"color": PURPLE, "marker": "D", "linestyle": ":"},
    {"color": ORANGE, "marker": "v", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
    {"color": SKY, "marker": "P", "linestyle": (0, (1, 2))},
    {"color": BLACK, "marker": "X", "linestyle": (0, (8, 3))},
    {"color": GREY, "marker": "*", "linestyle": "-"},
    {"color": BROWN, "marker": "h", "linestyle": "--"},
    {"color": OLIVE, "marker": "<", "linestyle": ":"},
    {"color": INDIGO, "marker": ">", "linestyle": "--"},
    {"color": WINE, "marker": "p", "linestyle": "-."},
    {"color": TEAL, "marker": "d", "linestyle": "--"},
    {"color": ROSE, "marker": "H", "linestyle": ":"},
    {"color": FOREST, "marker": "8", "linestyle": "-"},
    {"color": SAND, "marker": "1", "linestyle": "-."},
)
"""Keyword arguments of successive series; use `series(i)`."""

_SETTINGS: dict[Any, Any] = {
    "font.size": 9,
    "legend.fontsize": 7.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "lines.markersize": 4.5,
    "svg.hashsalt": "dropbydrop",
}


def series(i: int, **changes: Any) -> dict[str, Any]:
    """Colour, marker and line style of the i-th series, with `changes` on top."""
    return SERIES[i % len(SERIES)] | changes


def styled(plot: Callable[P, R]) -> Callable[P, R]:
    """Decorator of plot functions: one style for everything they draw.

    Raises (when the plot is drawn):
        DropError: matplotlib is not installed.
    """

    @wraps(plot)
    def draw(*args: P.args, **kwargs: P.kwargs) -> R:
        require_matplotlib()
        import matplotlib

        with matplotlib.rc_context(_SETTINGS):
            return plot(*args, **kwargs)

    return draw


def require_matplotlib() -> None:
    """Ask for matplotlib before long work, not after it.

    Raises:
        DropError: it is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise DropError(
            "plots need matplotlib, which is not installed; `pip install matplotlib` adds it. "
            "The numbers themselves are in the command's JSON without it."
        ) from error


def new_figure(
    rows: int, columns: int, width: float, height: float, share: bool = False
) -> tuple[Figure, Any]:
    """A figure of rows x columns axes (always a 2-d array), size in inches; `share` both axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share)


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem`.png and `stem`.svg; returns both paths."""
    import matplotlib

    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    with matplotlib.rc_context(_SETTINGS):
        figure.draw_without_rendering()  # lay out once, not once a file
        figure.set_layout_engine("none")
        figure.savefig(paths[0], dpi=150)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths
