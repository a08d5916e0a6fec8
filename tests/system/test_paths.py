"""`~` means the same wherever a path is given: commands, options, functions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from dropbydrop.checkpoint import Checkpoint
from dropbydrop.checkpoint.export import export
from dropbydrop.checkpoint.pull import pull
from dropbydrop.checkpoint.slice import slice_checkpoint
from dropbydrop.cli import main, options
from dropbydrop.cli.options import with_paths
from dropbydrop.planning.plan import Plan
from dropbydrop.system.errors import DropError
from dropbydrop.system.paths import absolute, given
from tiny import write_checkpoint


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home, and an empty working folder, in which a folder called `~` would show."""
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def test_the_rule(home: Path) -> None:
    assert given("~/a/../b") == home / "a/../b"
    assert absolute("~/a/../b") == home / "b"
    assert given("a~b/~") == Path("a~b/~")
    assert absolute(Path("x")) == Path.cwd() / "x"
    assert given("~no-such-user/x") == Path("~no-such-user/x")  # a name, and no traceback


def test_functions(home: Path) -> None:
    write_checkpoint(home / "out")
    assert slice_checkpoint("~/out", "~/sliced", 3).path == home / "sliced"
    assert pull("~/out", "~/pulled", 2, progress=False).path == home / "pulled"
    assert export("~/out", "~/dense", progress=False)["out"] == str(home / "dense")
    opened = Checkpoint.open("~/out")
    plan = Plan.uniform(opened, 3)
    plan.save("~/plan.json")
    assert Plan.load(Path("~/plan.json")).levels == plan.levels
    assert not list(Path.cwd().iterdir())
    assert {"sliced", "pulled", "dense", "plan.json"} <= {p.name for p in home.iterdir()}


def test_every_path_of_every_command(home: Path) -> None:
    """Arguments, options, lists of them, commands below commands."""
    app, inner, seen = typer.Typer(), typer.Typer(), list[object]()

    @app.command()
    def one(
        out: Path,
        name: str,
        save: Annotated[Path | None, typer.Option()] = None,
        plan: Annotated[list[Path] | None, typer.Option()] = None,
    ) -> None:
        seen.extend((out, name, save, plan))

    @inner.command()
    def two(out: Path) -> None:
        seen.append(out)

    @inner.command()
    def three() -> None: ...

    app.add_typer(inner, name="inner")
    with_paths(app)
    line = ["one", "~/a", "~/b", "--save=~/c", "--plan=~/d", "--plan", "~/e"]
    for arguments in (line, ["inner", "two", "~/f"]):
        assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    assert seen == [home / "a", "~/b", home / "c", [home / "d", home / "e"], home / "f"]


def test_the_commands_themselves(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(home / "out")

    def run(*line: str) -> int:
        monkeypatch.setattr(sys, "argv", ["dropbydrop", *line])
        try:
            main.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    assert run("slice", "~/out", "~/sliced", "--bits=3") == 0
    assert run("export", "~/out", "~/dense") == 0
    assert run("pull", "~/out", "~/pulled") == 0
    assert run("info", "~/sliced") == 0
    assert run("info", "~no-such-user/out") == 2
    assert not list(Path.cwd().iterdir())


def test_a_plan_as_draft(home: Path) -> None:
    opened = Checkpoint.open(write_checkpoint(home / "out"))
    Plan.uniform(opened, 3).save("~/plan.json")
    assert options.parse_precision("~/plan.json").plan is not None
    with pytest.raises(DropError, match="give a level"):
        options.parse_precision("~no-such-user/plan.json")
