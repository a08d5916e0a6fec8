"""What all commands share: the --json and --bits options, output, parsing of levels."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from dropbydrop.errors import DropError, PrecisionError

if TYPE_CHECKING:
    from dropbydrop.planning.precision import Precision

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")
]
Bits = Annotated[str, typer.Option(help="Levels, such as 2,3,4.")]


def parse_bits(text: str) -> list[int]:
    """ "2,3,4" -> [2, 3, 4].

    Raises:
        PrecisionError: not integers separated by commas.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise PrecisionError(f"--bits {text!r}: give whole numbers, such as 2,3,4.") from None


def parse_precision(text: str) -> Precision:
    """ "3" is a level; "2.5" is an average; anything else is the file of a plan.

    Raises:
        PrecisionError: no number, and no such file.
        FormatError: the file is no plan.
    """
    from dropbydrop.planning.plan import Plan
    from dropbydrop.planning.precision import Precision

    with suppress(ValueError):
        return Precision(bits=int(text))
    with suppress(ValueError):
        return Precision(avg_bits=float(text))
    if Path(text).is_file():
        return Precision(plan=Plan.load(text))
    raise PrecisionError(
        f"--bits {text!r}: give a level (3), an average (2.5), or the file of a plan that "
        "`dropbydrop plan OUT --save FILE` wrote."
    )


def parse_dtype(name: str) -> Any:
    """The torch type that --dtype names.

    Raises:
        DropError: another than these three.
    """
    import torch

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in kinds:
        raise DropError(f"--dtype {name!r}: choose {', '.join(kinds)}.")
    return kinds[name]


def console(as_json: bool) -> Console:
    """Where tables go: stdout, or stderr when stdout is kept for JSON."""
    return Console(stderr=as_json)


def finish(as_json: bool, result: dict[str, Any]) -> None:
    """With --json, print `result` as the last line of stdout."""
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
