"""Draw the picture of the README: KL over what is downloaded, ours and other quantizers.

    python scripts/draw_kl_over_bits.py [docs/images/kl-over-bits.svg]

The points come from docs/data/kl-over-bits.json, which names the commands that measured them. The
same points are tables in docs/results.md. Bits are those of the whole model: the true bits of the
matrices, and for embedding and head what the method has or, where the comparison left them alone,
the eight-bit rows of our checkpoints. Needs matplotlib (`pip install 'dropbydrop[plot]'`).
"""

import json
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

DATA = Path(__file__).parent.parent / "docs" / "data" / "kl-over-bits.json"
PICTURE = DATA.parent.parent / "images" / "kl-over-bits.svg"
STYLE = {"font.size": 10, "svg.hashsalt": "dropbydrop", "axes.spines.top": False}
SERIES = (  # colours of Okabe and Ito; no series is told from another by its colour alone
    {"color": "#000000", "marker": "P", "linestyle": "-", "linewidth": 2.4, "zorder": 4},
    {"color": "#0072B2", "marker": "o", "linestyle": "-", "linewidth": 2.4, "zorder": 3},
    {"color": "#56B4E9", "marker": "D", "linestyle": "-"},
    {"color": "#E69F00", "marker": "p", "linestyle": (0, (5, 1))},
    {"color": "#CC79A7", "marker": "X", "linestyle": (0, (1, 2))},
    {"color": "#009E73", "marker": "^", "linestyle": "-."},
    {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    {"color": "#777777", "marker": "v", "linestyle": ":"},
)
BITS = (2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6)
KL = (0.03, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


def whole_bits(found: dict, method: dict) -> list[float]:
    """Bits a parameter of the whole model at each point of a method."""
    model = found["model"]
    share = model["matrices"] / model["parameters"]
    rest = 8 * model["rest_bytes"] / model["parameters"]
    return method.get("whole_bits") or [rest + share * bits for bits in method["true_bits"]]


def draw(found: dict, picture: Path) -> None:
    """Write the picture of `found`, the object in docs/data/kl-over-bits.json."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 4.2), layout="constrained")
        axes = figure.subplots()
        for method, style in zip(found["methods"], SERIES, strict=True):
            bits = whole_bits(found, method)
            axes.plot(bits, method["kl"], label=method["name"], **style)
        axes.set_yscale("log")
        axes.spines["right"].set_visible(False)
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(FixedLocator(BITS))
        axes.yaxis.set_major_locator(FixedLocator(KL))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_yticklabels([f"{kl:g}" for kl in KL])
        axes.set(xlim=(2.3, 6.2), ylim=(0.025, 12))
        axes.set_xlabel("bits a parameter of the whole model: all that is downloaded")
        axes.set_ylabel("KL to the original, nats a token")
        figure.suptitle(
            f"{found['title']}; {found['text']}, {found['windows']} windows of "
            f"{found['context']:,} tokens; no method fine-tuned",
            fontsize=9.5,
        )
        figure.legend(loc="outside right center", frameon=False, fontsize=8.5)
        figure.savefig(picture, metadata={"Date": None} if picture.suffix == ".svg" else None)


if __name__ == "__main__":
    draw(json.loads(DATA.read_text()), Path(sys.argv[1]) if sys.argv[1:] else PICTURE)
