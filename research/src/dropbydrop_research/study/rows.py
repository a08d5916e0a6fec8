"""Rows of the paper page's Figures 6 to 8, from saved JSON of `dropbydrop quantize` and `eval`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from dropbydrop.system.errors import FormatError

METHOD, ORIGINAL = "Drop-by-Drop", "full precision"


def read_results(files: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    """{"perplexity", "accuracy", "cost"} -> rows, as far as the files have them.

    A file holds the JSON object that a command prints with --json; anything above its last line is
    ignored. A field "method" in it names the method, so that results of other quantizers fit in.

    Raises:
        FormatError: a file that is not readable, or none of the two commands' results.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        try:
            lines = [line for line in file.read_text().splitlines() if line.strip()]
            found = _rows(json.loads(lines[-1]))
        except (
            OSError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError,
            RecursionError,
        ) as error:  # fmt: skip
            raise FormatError(
                f"{file} does not end with the JSON line of `dropbydrop quantize --json` or "
                f"`dropbydrop eval --json` ({type(error).__name__}: {error})."
            ) from error
        if not any(found.values()):
            raise FormatError(f"{file} holds no perplexity, no accuracy and no cost.")
        for name, more in found.items():
            fresh = [row for row in more if row not in rows.get(name, [])]
            if fresh:
                rows.setdefault(name, []).extend(fresh)
    return rows


def number(value: Any) -> int | float:
    """A finite number of a JSON file.

    Raises:
        ValueError: something else, which a page would carry along.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise ValueError(f"{value!r} is no finite number")
    return value


def _rows(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    method = str(result.get("method", METHOD))
    found: dict[str, list[dict[str, Any]]] = {"perplexity": [], "accuracy": [], "cost": []}
    levels = result.get("bits", {})
    for level, row in levels.items():
        if "ppl" in row:
            bits, ppl = number(row.get("true_bits", float(level))), number(row["ppl"])
            found["perplexity"].append({"method": method, "bits": bits, "ppl": ppl})
    if result.get("reference"):
        ppl = number(result["reference"]["ppl"])
        found["perplexity"].append({"method": ORIGINAL, "bits": None, "ppl": ppl})
    for name, model in result.get("tasks", {}).get("models", {}).items():
        mean, level = model["mean"], name.isdigit()
        found["accuracy"].append(
            {
                "method": method if level else ORIGINAL,
                "bits": number(model.get("true_bits", float(name))) if level else None,
                "accuracy": number(mean["acc"]),
                "stderr": number(mean["acc_stderr"]),
            }
        )
    if isinstance(result.get("seconds"), dict):
        size = max(number(row["bytes"]) for row in levels.values())
        seconds = number(result["seconds"]["total"])
        found["cost"].append({"method": method, "seconds": seconds, "bytes": size})
    return found
