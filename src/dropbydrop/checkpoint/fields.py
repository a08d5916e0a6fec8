"""Strict parsing of JSON that others wrote: typed values, nothing left over, plain names.

An unknown version, an unknown key or a wrong type raises `FormatError`. A reader that guesses would
decode wrong weights without a sign of it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dropbydrop.system.errors import FormatError

FORMAT_VERSION = 1  # of everything: config, manifest, safetensors metadata

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")


def parse_json(raw: bytes, where: str) -> Any:
    """JSON as every parser reads it: UTF-8, no key twice, no NaN, no number that becomes infinite
    (1e999, which could not be written again), nesting that Python's parser follows.

    Raises:
        FormatError: it is not.
    """
    try:
        return json.loads(
            raw.decode(),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} cannot be read as JSON ({error}). Fetch it again.") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} appears twice")
        found[key] = value
    return found


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:40]} is more than a number can be")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


class Fields:
    """Takes typed values out of a JSON object and refuses what is left over."""

    def __init__(self, data: object, where: str) -> None:
        if not isinstance(data, Mapping):
            raise FormatError(f"{where} is {type(data).__name__}, not a JSON object: damaged file.")
        self.data, self.where = dict(data), where

    def take(self, key: str, kind: type, **default: Any) -> Any:
        """The value of `key`, which must have type `kind`; `default=` makes it optional."""
        if key not in self.data:
            if "default" in default:
                return default["default"]
            raise FormatError(f"{self.where} lacks {key!r}: damaged, or not one of ours.")
        value = self.data.pop(key)
        # JSON true is an int in Python; never let it pass as a number.
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise FormatError(f"{self.where}: {key!r} is {value!r}; expected {kind.__name__}.")
        return value

    def exactly(self, **kinds: type) -> dict[str, Any]:
        """The values of these keys, of these types, when there are no others."""
        values = {key: self.take(key, kind) for key, kind in kinds.items()}
        self.done()
        return values

    def done(self) -> None:
        """Every key must have been taken."""
        if self.data:
            raise FormatError(
                f"{self.where} has unknown keys {sorted(self.data)}; they may change what "
                "the codes mean. Written by a newer version? Upgrade dropbydrop."
            )


def module_names(values: Sequence[Any], where: str) -> tuple[str, ...]:
    """The values, all of which must be names of modules or of codebook sets (FormatError)."""
    for value in values:
        if not isinstance(value, str) or not _TENSOR_NAME.fullmatch(value):
            raise FormatError(f"{where}: {value!r} is not a module name. The config is damaged.")
    return tuple(values)


def check_version(version: object, where: str) -> None:
    """Raises FormatError unless `version` is the one that this package reads."""
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise FormatError(
            f"{where} has format_version {version!r}; this dropbydrop reads version "
            f"{FORMAT_VERSION}. Upgrade dropbydrop, or fetch a checkpoint of that version."
        )


def plain_name(name: object, where: str) -> str:
    """A file name without any path in it.

    Raises:
        FormatError: it could leave the folder, or is no name at all.
    """
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name) or ".." in name:
        raise FormatError(
            f"{where} names the file {name!r}; only plain file names are allowed (letters, digits, "
            "'.', '_', '-'), because a path could leave the folder. Do not use this checkpoint."
        )
    return name
