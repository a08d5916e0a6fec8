"""Commands of other distributions, by the entry point group `dropbydrop.commands`.

An entry point names a function `register(app)`, which adds commands to the typer application.
`compare` and `study` come from dropbydrop-research; where that is not installed they say which line
installs it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import entry_points

import typer

from dropbydrop.system.errors import DropError

GROUP = "dropbydrop.commands"
RESEARCH = ("compare", "study")
_INSTALL = "pip install ./research in a checkout"


def register(app: typer.Typer) -> None:
    """Add the commands of installed plug-ins, and a hint in the place of those that are not."""
    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    for name in sorted(found):
        try:
            found[name].load()(app)
        except Exception as error:  # one that is broken must not take `info` down with it
            _register_hint(app, name, "Cannot be loaded.", partial(_broken, name, repr(error)))
    for name in RESEARCH:
        if name not in found:
            about = "Part of dropbydrop-research, which is not installed."
            _register_hint(app, name, about, partial(_missing, name))


def _missing(name: str) -> None:
    raise DropError(f"`dropbydrop {name}` is part of dropbydrop-research: {_INSTALL}")


def _broken(name: str, error: str) -> None:
    raise DropError(f"`dropbydrop {name}` cannot be loaded ({error}). Mend what installed it.")


def _register_hint(app: typer.Typer, name: str, about: str, refuse: Callable[[], None]) -> None:
    """A command that says why it is not there."""

    def hint() -> None:
        refuse()

    app.command(
        name,
        help=about,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(hint)
