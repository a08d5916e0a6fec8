"""Settings of a command: one frozen dataclass that checks itself.

A subclass of `Settings` declares each field once, with its help text: the command line derives an
option from it (cli/options.py), `to_dict` is what provenance keeps, `by_option` what `--resume`
compares, and the object is what the work passes on. Nothing here, nor in the modules that declare
settings, imports more than the standard library: `--help` needs them.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .errors import CalibrationError, DropError

_MOST_TOKENS = 1 << 30  # of calibration


def setting(
    default: Any, help: str, *, option: str | None = None, choices: Sequence[Any] = ()
) -> Any:
    """A field of a `Settings` class.

    Args:
        help: text for the command line.
        option: name of its option without the dashes; by default the field's, with dashes.
        choices: values that are allowed; by default all.
    """
    return field(
        default=default, metadata={"help": help, "option": option, "choices": tuple(choices)}
    )


def option_name(declared: Any) -> str:
    """The option of a dataclass field, without the leading dashes."""
    return declared.metadata["option"] or declared.name.replace("_", "-")


def whole_number(value: Any) -> int:
    """An integer of any library as one of Python; TypeError for anything else, and for a bool."""
    if isinstance(value, bool):
        raise TypeError(f"{value} is no number")
    return operator.index(value)


def check_windows(windows: int, seq_len: int, longest: int | None = None) -> None:
    """Whether so many windows of text can be had; `longest`: tokens of the longest.

    Raises:
        CalibrationError: none, of tokens that predict nothing, or more than anybody calibrates on.
    """
    most = min(longest or _MOST_TOKENS, _MOST_TOKENS // max(windows, 1))
    if windows < 1 or not 2 <= seq_len <= most:
        raise CalibrationError(
            f"{windows} windows of {seq_len} tokens: give 1 or more, of 2 to "
            f"{longest or _MOST_TOKENS:,} tokens, and in all at most {_MOST_TOKENS:,}."
        )


def check_seed(seed: Any) -> int:
    """A seed that every generator takes.

    Raises:
        DropError: not a whole number from 0 to 4,294,967,295.
    """
    with suppress(TypeError):
        if 0 <= (number := whole_number(seed)) < 1 << 32:
            return number
    raise DropError(f"--seed {seed!r}: give a whole number from 0 to {(1 << 32) - 1:,}.")


@dataclass(frozen=True)
class Settings:
    """Base of the settings of commands.

    Raises:
        DropError: a value that is not one of its field's choices.
    """

    def __post_init__(self) -> None:
        for declared in fields(self):
            value, choices = getattr(self, declared.name), declared.metadata["choices"]
            if declared.name == "seed":
                object.__setattr__(self, "seed", check_seed(value))
            elif str(declared.type) in ("int", "int | None") and value is not None:
                try:
                    object.__setattr__(self, declared.name, whole_number(value))
                except TypeError as error:
                    name = option_name(declared)
                    raise DropError(f"--{name} {value!r}: give a whole number.") from error
            if choices and value not in choices:
                known = ", ".join(map(str, choices))
                raise DropError(f"--{option_name(declared)} {value!r}: choose one of {known}.")

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, JSON-able."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def by_option(self) -> dict[str, Any]:
        """The fields by the names of their options, JSON-able."""
        return dict(zip(map(option_name, fields(self)), self.to_dict().values(), strict=True))
