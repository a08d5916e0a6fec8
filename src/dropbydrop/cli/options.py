"""Options that commands share, options derived from settings, and the output of a command."""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_type_hints

import typer

from dropbydrop.system.errors import DropError, PrecisionError
from dropbydrop.system.paths import given
from dropbydrop.system.settings import Settings, option_name

if TYPE_CHECKING:
    from rich.console import Console

    from dropbydrop.planning.precision import Precision

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")
]
Bits = Annotated[str, typer.Option(help="Levels, such as 2,3,4.")]
CheckpointFolder = Annotated[Path, typer.Argument(help="Checkpoint folder.")]
PlanFile = Annotated[
    Path | None, typer.Option(help="Plan file, written by `dropbydrop plan --save`.")
]
Overwrite = Annotated[bool, typer.Option(help="Replace an existing checkpoint.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Keep finished work; go on after an interruption.")
]


def parse_bits(text: str) -> list[int]:
    """ "2,3,4" -> [2, 3, 4].

    Raises:
        PrecisionError: not integers separated by commas.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise PrecisionError(
            f"--bits {text!r}: give whole numbers, such as 2,3,4; an average is --avg-bits 2.5."
        ) from None


def parse_level(text: str | None) -> int | None:
    """ "3" -> 3.

    Raises:
        PrecisionError: not one integer.
    """
    levels = None if text is None else parse_bits(text)
    if levels is not None and len(levels) != 1:
        raise PrecisionError(f"--bits {text!r}: give one level, such as 3.")
    return None if levels is None else levels[0]


def parse_averages(text: str) -> list[float]:
    """ "2.5,2.75" -> [2.5, 2.75].

    Raises:
        PrecisionError: not numbers separated by commas.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise PrecisionError(f"--avg-bits {text!r}: give numbers, such as 2.5,2.75.") from None


def parse_precision(text: str) -> Precision:
    """ "3" is a level; "2.5" is an average; anything else is a plan file.

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
    if given(text).is_file():
        return Precision(plan=Plan.load(text))
    raise PrecisionError(
        f"--draft-bits {text!r}: give a level (3), an average (2.5), or the file of a plan that "
        "`dropbydrop plan OUT --save FILE` wrote."
    )


def parse_dtype(name: str) -> Any:
    """The torch type that --dtype names.

    Raises:
        DropError: another than these three.
    """
    from dropbydrop.checkpoint.tensor_files import FLOATS

    if name not in FLOATS:
        raise DropError(f"--dtype {name!r}: choose {', '.join(FLOATS)}.")
    return FLOATS[name]


# ---- options from settings -----------------------------------------------------------------


def with_settings(kind: type[Settings]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator for commands: one option for each field of `kind`, in the place of the parameter
    `config`, which the command gets as an object.

    Texts with commas stand for tuples; a field that is False by default becomes a flag.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters: list[inspect.Parameter] = []
        for known in inspect.signature(command, eval_str=True).parameters.values():
            keyword = known.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            parameters += options_of(kind) if known.name == "config" else [keyword]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            values = {declared.name: given.pop(declared.name) for declared in fields(kind)}
            command(config=_settings(kind, values), **given)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def _settings(kind: type[Settings], values: dict[str, Any]) -> Settings:
    """Settings from the values of options. Under torchrun all processes have the same ones, so the
    first one tells what is wrong."""
    try:
        for name, parse in _tuples(kind).items():
            if values[name] is not None:
                values[name] = tuple(parse(values[name]))
        return kind(**values)
    except DropError as error:
        from dropbydrop.system.distributed import PeerError, rank_of_process

        raise (PeerError(str(error)) if rank_of_process() else error) from None


def options_of(kind: type[Settings]) -> list[inspect.Parameter]:
    """The fields of settings as parameters that typer understands."""
    hints, options = get_type_hints(kind), []
    for declared in fields(kind):
        hint: Any = hints[declared.name]
        default, names = declared.default, []
        if declared.name in _tuples(kind):
            hint = str | None if default is None else str
            default = default and ",".join(map(str, cast(tuple[Any, ...], default)))
        if declared.metadata["option"] or hint is bool:
            names = [f"--{option_name(declared)}"]
        option = typer.Option(*names, help=declared.metadata["help"])
        parameter = inspect.Parameter(declared.name, inspect.Parameter.KEYWORD_ONLY)
        options.append(parameter.replace(default=default, annotation=Annotated[hint, option]))
    return options


def _tuples(kind: type[Settings]) -> dict[str, Callable[[str], list[Any]]]:
    """Fields that are tuples, and how their text is read."""
    hints = {name: str(hint) for name, hint in get_type_hints(kind).items()}
    return {
        name: _words if "tuple[str" in hint else parse_bits
        for name, hint in hints.items()
        if "tuple[" in hint
    }


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


# ---- paths ---------------------------------------------------------------------------------


def with_paths(app: typer.Typer) -> None:
    """In all commands of `app` and of applications below it, paths are what `system/paths` says."""
    for command in app.registered_commands:
        command.callback = command.callback and _takes_paths(command.callback)
    for group in app.registered_groups:
        if group.typer_instance is not None:
            with_paths(group.typer_instance)


def _takes_paths(command: Callable[..., Any]) -> Callable[..., Any]:
    def meant(value: Any) -> Any:
        if isinstance(value, list):
            return [meant(one) for one in value]
        return given(value) if isinstance(value, Path) else value

    @functools.wraps(command)
    def run(*args: Any, **values: Any) -> Any:
        return command(*args, **{name: meant(value) for name, value in values.items()})

    return run


# ---- output --------------------------------------------------------------------------------


def console(as_json: bool) -> Console:
    """Where tables go: stdout, or stderr when stdout is kept for JSON."""
    from dropbydrop.system.console import SafeConsole

    return SafeConsole(stderr=as_json)


@contextmanager
def kept_work() -> Iterator[None]:
    """On Ctrl-C, tell what --resume has kept: the text of the interrupt."""
    try:
        yield
    except KeyboardInterrupt as stop:
        sys.stderr.write(f"{stop}\n" if str(stop) else "")
        raise


def finish(as_json: bool, result: dict[str, Any]) -> None:
    """With --json, print `result` as the last line of stdout."""
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
