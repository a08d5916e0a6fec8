"""Rows of the paper page's Figures 6 to 8, from saved JSON of `dropbydrop quantize` and `eval`."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
            OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError
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


def _rows(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    method = str(result.get("method", METHOD))
    found: dict[str, list[dict[str, Any]]] = {"perplexity": [], "accuracy": [], "cost": []}
    levels = result.get("bits", {})
    for level, row in levels.items():
        if "ppl" in row:
            bits = float(row.get("true_bits", level))
            found["perplexity"].append({"method": method, "bits": bits, "ppl": row["ppl"]})
    if result.get("reference"):
        ppl = result["reference"]["ppl"]
        found["perplexity"].append({"method": ORIGINAL, "bits": None, "ppl": ppl})
    for name, model in result.get("tasks", {}).get("models", {}).items():
        mean, level = model["mean"], name.isdigit()
        found["accuracy"].append(
            {
                "method": method if level else ORIGINAL,
                "bits": float(model.get("true_bits", name)) if level else None,
                "accuracy": mean["acc"],
                "stderr": mean["acc_stderr"],
            }
        )
    if isinstance(result.get("seconds"), dict):
        size = max(row["bytes"] for row in levels.values())
        found["cost"].append(
            {"method": method, "seconds": result["seconds"]["total"], "bytes": size}
        )
    return found
