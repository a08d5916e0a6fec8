"""Commands of other distributions, by the entry point group `dropbydrop.commands`.

An entry point names a function `register(app)`, which adds commands to the typer application.
`compare` and `study` come from dropbydrop-research; where that is not installed they say which line
installs it.
"""

from __future__ import annotations

from importlib.metadata import entry_points

import typer

from dropbydrop.errors import DropError

GROUP = "dropbydrop.commands"
RESEARCH = ("compare", "study")
_INSTALL = "pip install dropbydrop-research   (in a checkout: pip install ./research)"


def register(app: typer.Typer) -> None:
    """Add the commands of installed plug-ins, and a hint in the place of those that are not."""
    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    for name in sorted(found):
        found[name].load()(app)
    for name in RESEARCH:
        if name not in found:
            _register_hint(app, name)


def _register_hint(app: typer.Typer, name: str) -> None:
    def hint() -> None:
        raise DropError(f"`dropbydrop {name}` is part of dropbydrop-research: {_INSTALL}")

    app.command(
        name,
        help="Part of dropbydrop-research, which is not installed.",
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(hint)
