"""Calibration text from a dataset of the Hugging Face hub, through the `datasets` library.

    hub:NAME[:SPLIT]           hub:Salesforce/wikitext needs its configuration, as many do:
    hub:NAME:CONFIG:SPLIT      hub:Salesforce/wikitext:wikitext-2-raw-v1:train

The rows are streamed and only the beginning that is needed is read, so a dataset may be larger than
the disk. They are joined by a blank line (text_files.py): WikiText's rows give the usual recipe.
Offline (HF_HUB_OFFLINE=1) the library's own cache is used. Rows need a column "text"; datasets that
run code to load are refused by the library itself.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from dropbydrop.system.errors import CalibrationError

from .text_files import join_documents

PREFIX = "hub:"
COLUMN = "text"
SPLIT = "train"


def is_hub_text(spec: object) -> bool:
    """Whether a calibration is named "hub:…"."""
    return str(spec).startswith(PREFIX)


def parse(spec: str) -> tuple[str, str | None, str]:
    """ "hub:NAME[[:CONFIG]:SPLIT]" -> (name, configuration or None, split).

    Raises:
        CalibrationError: not of this form.
    """
    name, *rest = spec.removeprefix(PREFIX).split(":")
    if not name or len(rest) > 2 or not all(rest):
        raise CalibrationError(
            f"{spec!r} does not name a dataset: write hub:NAME, hub:NAME:SPLIT or "
            "hub:NAME:CONFIG:SPLIT, such as hub:Salesforce/wikitext:wikitext-2-raw-v1:train."
        )
    return name, rest[0] if len(rest) == 2 else None, rest[-1] if rest else SPLIT


def read_hub_text(spec: str, max_chars: int) -> str:
    """The first `max_chars` characters of a hub dataset's rows.

    Raises:
        CalibrationError: the library is missing, the dataset cannot be loaded, it has no column
            "text" of strings, or no text in it.
    """
    name, config, split = parse(spec)
    if importlib.util.find_spec("datasets") is None:
        raise CalibrationError(
            f"{spec} needs the datasets package: pip install datasets. Or download the text "
            "yourself and give the file."
        )
    with _quiet():
        try:
            text = join_documents(_texts(name, config, split), max_chars)
        except CalibrationError:
            raise
        except Exception as error:  # those of the library, the hub and the network share no base
            lines = str(error).strip().splitlines() or [""]
            raise CalibrationError(
                f"cannot read {spec} ({type(error).__name__}: {' '.join(lines[:2])}). Check name, "
                "configuration and split (hub:NAME:CONFIG:SPLIT) and the network, or give a file."
            ) from error
    if not text.strip():
        raise CalibrationError(f"{spec} holds no text in its column {COLUMN!r}.")
    return text


def _texts(name: str, config: str | None, split: str) -> Iterator[str]:
    import datasets

    for row in datasets.load_dataset(name, config, split=split, streaming=True):
        if not isinstance(row.get(COLUMN), str):
            found = ", ".join(f"{key} ({type(value).__name__})" for key, value in row.items())
            raise CalibrationError(
                f"rows of this dataset have no string {COLUMN!r}, they have: {found}. Give a "
                "dataset of plain text, or write its text to a file."
            )
        yield row[COLUMN]


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings and bars of the library: what it found in its cache is what was asked for."""
    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
