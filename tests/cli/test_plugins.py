"""`compare` and `study`: commands of dropbydrop-research, or the line that installs it."""

from __future__ import annotations

from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from dropbydrop.cli import plugins
from dropbydrop.system.errors import DropError


class Entry:
    """An installed entry point that registers a command of its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def load(self) -> Any:
        def register(app: typer.Typer) -> None:
            app.command(self.name)(lambda: typer.echo(f"{self.name} runs"))

        return register


def app_with(monkeypatch: pytest.MonkeyPatch, *names: str) -> typer.Typer:
    """An application with these commands installed as plug-ins."""
    monkeypatch.setattr(plugins, "entry_points", lambda group: [Entry(name) for name in names])
    app = typer.Typer()
    plugins.register(app)
    return app


@pytest.mark.parametrize("name", plugins.RESEARCH)
@pytest.mark.parametrize("rest", [[], ["model", "--text", "file"], ["--help"]])
def test_commands_that_are_missing_say_which_line_installs_them(
    name: str, rest: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = CliRunner().invoke(app_with(monkeypatch), [name, *rest])
    assert isinstance(result.exception, DropError)
    assert f"`dropbydrop {name}` is part of dropbydrop-research" in str(result.exception)
    assert "pip install ./research" in str(result.exception)


def test_commands_that_are_installed_run(monkeypatch: pytest.MonkeyPatch) -> None:
    app = app_with(monkeypatch, "compare", "study", "more")
    for name in ("compare", "study", "more"):  # also one that this package has never heard of
        result = CliRunner().invoke(app, [name])
        assert result.output == f"{name} runs\n"
    listed = CliRunner().invoke(app, ["--help"]).output
    assert "not installed" not in listed


def test_one_of_them_alone_leaves_the_hint_for_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    app = app_with(monkeypatch, "compare")
    assert CliRunner().invoke(app, ["compare"]).output == "compare runs\n"
    assert isinstance(CliRunner().invoke(app, ["study"]).exception, DropError)
    assert "which is not installed" in CliRunner().invoke(app, ["--help"]).output


def test_a_broken_plug_in_takes_no_other_command_down(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Entry):
        def load(self) -> Any:
            raise ImportError("no module named gone")

    monkeypatch.setattr(plugins, "entry_points", lambda group: [Broken("more"), Entry("study")])
    app = typer.Typer()
    plugins.register(app)
    assert CliRunner().invoke(app, ["study"]).output == "study runs\n"
    assert "no module named gone" in str(CliRunner().invoke(app, ["more"]).exception)
