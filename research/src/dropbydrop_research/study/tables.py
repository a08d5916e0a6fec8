"""The studies' results as tables for people."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

_FITS = {
    "stored": "as stored",
    "stored_rows": "as stored, rows scaled",
    "rotated": "rotated",
    "rotated_rows": "rotated, rows scaled",
}
_MEASURES = {
    "kurtosis": ("kurtosis (3)", ".2f"),
    "max_over_rms": ("largest / rms", ".1f"),
    "kolmogorov": ("Kolmogorov (0)", ".4f"),
    "w2": ("W2²/variance (0)", ".5f"),
    "negentropy": ("negentropy, bits (0)", ".5f"),
}
_CASES = {"square": "square, invertible", "wide": "wide", "deficient": "rank-deficient"}


def print_gaussian(result: dict[str, Any], console: Console, top: int = 10) -> None:
    """Median and worst of each measure, the matrices furthest from Gaussian, the worst tokens."""
    table = _table(
        f"{result['model']}: {len(result['matrices'])} matrices, median (worst); Gaussian in ()",
        ["weights", *(title for title, _ in _MEASURES.values())],
    )
    for fit, label in _FITS.items():
        summary = result["summary"][fit]
        cells = [
            f"{summary[key]['median']:{form}} ({summary[key]['worst']:{form}})"
            for key, (_, form) in _MEASURES.items()
        ]
        table.add_row(label, *cells)
    console.print(table)
    worst = sorted(result["matrices"], key=lambda m: -m["stored_rows"]["negentropy"])[:top]
    table = _table(
        f"the {len(worst)} matrices furthest from Gaussian (rows scaled), before → after rotation",
        ["matrix", "largest / rms", "Gaussian's", "kurtosis", "negentropy"],
    )
    for m in worst:
        before, after = m["stored_rows"], m["rotated_rows"]
        pairs = [
            f"{before[key]:{form}} → {after[key]:{form}}"
            for key, form in (("max_over_rms", ".1f"), ("kurtosis", ".2f"), ("negentropy", ".5f"))
        ]
        expected = f"{before['expected_max_over_rms']:.1f}"
        table.add_row(_short(m["module"]), pairs[0], expected, pairs[1], pairs[2])
    console.print(table)
    if result["skipped"]:
        console.print(f"all zero, left out: {', '.join(result['skipped'])}")
    massive = result["massive_activations"]
    if massive is None:
        console.print("massive activations: no cached statistics; name a --calibration to measure")
        return
    table = _table(
        "massive activations: token energy over the median token's",
        ["input of", "largest", "tokens over 100", "their energy", "at position 0"],
    )
    for row in massive[:top]:
        peak = row["max_over_median"]
        table.add_row(
            _short(row["input_group"]),
            "infinite" if peak is None else f"{peak:,.0f}",
            f"{row['count']} of {row['tokens']}",
            f"{row['share']:.1%}",
            f"{row['first_token_share']:.0%}",
        )
    console.print(table)


def print_bound(result: dict[str, Any], console: Console, top: int = 10) -> None:
    """Means a level, what is left to gain at each level, and which premises fail how often."""
    table = _table(
        f"{result['model']}: relative weighted error, mean over {len(result['matrices'])} matrices",
        ["level", "true bits", "bound", "held out", "reached", "held out", "gap dB", "gap bits",
         "floor dB"],
    )  # fmt: skip
    for level, bits in result["rates"].items():
        s = result["summary"][level]
        table.add_row(
            level,
            f"{bits:.3f}",
            *(_num(s[key], ".5f") for key in ("bound", "bound_held_out", "reached")),
            _num(s["reached_held_out"], ".5f"),
            _num(s["gap_db"], ".2f"),
            _num(s["gap_bits"], ".3f"),
            f"{s['structural_db']:.2f}",
        )
    console.print(table)
    console.print(
        "The bound holds for the Gaussian ensemble with each matrix's H and row variances, not for "
        "the one matrix: where a premise fails, a code may get below it. Floor: what such codes "
        f"({result['structural']}) lose even on a white Gaussian; of 8-dimensional vectors "
        f"{result['high_rate_floor_db']:.2f} dB at high rate for any of them."
    )
    for level in result["rates"]:
        _print_ranking(result, level, console, top)
    _print_premises(result, console)
    if result["skipped"]:
        console.print(f"all zero, left out: {', '.join(result['skipped'])}")


def _print_ranking(result: dict[str, Any], level: str, console: Console, top: int) -> None:
    ranking = result["ranking"][level]
    if not ranking:
        matrices = sorted(result["matrices"], key=lambda m: -m["levels"][level]["bound"])[:top]
        table = _table(
            f"level {level}: hardest matrices (largest bound)",
            ["matrix", "bound", "held out", "active", "next bit buys dB"],
        )
        for m in matrices:
            data = m["levels"][level]
            table.add_row(
                _short(m["module"]),
                f"{data['bound']:.5f}",
                _num(data["bound_held_out"], ".5f"),
                f"{data['active']} of {m['shape'][1]}",
                f"{data['next_bit_db']:.2f}",
            )
        console.print(table)
        return
    table = _table(
        f"level {level}: most left to gain (relative weighted error)",
        ["matrix", "reached", "above bound", "attainable", "one more bit", "gap dB", "gap bits"],
    )
    for row in ranking[:top]:
        table.add_row(
            _short(row["module"]),
            *(f"{row[key]:.5f}" for key in ("reached", "excess", "attainable", "next_bit")),
            _num(row["gap_db"], ".2f"),
            _num(row["gap_bits"], ".3f"),
        )
    console.print(table)


def _print_premises(result: dict[str, Any], console: Console) -> None:
    failed: dict[str, list[tuple[str, str]]] = {}
    for m in result["matrices"]:
        for p in m["premises"]:
            failed.setdefault(p["premise"], []).append((_short(m["module"]), p["found"]))
    if not failed:
        console.print("no premise of the bound fails for any matrix")
        return
    table = _table("premises of the bound that fail", ["premise", "matrices", "for example"])
    for premise, found in sorted(failed.items(), key=lambda item: -len(item[1])):
        table.add_row(premise, str(len(found)), f"{found[0][0]}: {found[0][1]}")
    console.print(table)


def print_refinement(result: dict[str, Any], console: Console) -> None:
    """Error of every kind of code at every prefix, with the gap to the bound in dB."""
    kinds = ("ideal", "single", "nested", "dropped")
    for case in result["cases"]:
        title = _CASES.get(case["case"], case["case"])
        table = _table(
            f"{title}: X {case['shape'][0]} x {case['shape'][1]}, rank {case['rank']}; error over "
            "power (dB above the bound)",
            ["prefix", "bits", "bound", *kinds],
        )
        for i, p in enumerate(case["levels"]):
            cells = []
            for kind in kinds:
                value, gap = case["codes"][kind][i], case["gaps"][kind][i]
                beyond = "" if gap is None else f" ({gap['db']:.2f})"
                cells.append("" if value is None else f"{value:.5f}{beyond}")
            mark = "" if p in result["levels"] else " (not supervised)"
            table.add_row(f"{p}{mark}", f"{case['bits'][i]:.3f}", f"{case['bound'][i]:.5f}", *cells)
        console.print(table)
    console.print(
        "ideal: drawn from the law that meets the bound; single: a code of its own for each level; "
        "nested: one code, its prefixes; dropped: trained for the last level only. The nested "
        "code's error falls at every supervised level."
    )


def _table(title: str, columns: list[str]) -> Table:
    """Narrow enough for 80 characters: values are never folded, titles of columns may be."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        width = max(map(len, column.replace("/", " ").split()))
        text = not i or column == "for example"
        table.add_column(
            column,
            justify="left" if text else "right",
            min_width=width,
            overflow="fold",
            no_wrap=not text,
        )
    return table


def _short(module: str) -> str:
    """A module's name without what every name of a model begins with."""
    short = module.removeprefix("model.").removeprefix("layers.")
    return short.replace(".self_attn.", ".").replace(".mlp.", ".")


def _num(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"
