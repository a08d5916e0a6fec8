"""Precisions on the command line: a level is a whole number; the impossible costs no work."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from dropbydrop.cli.main import app
from dropbydrop.system.errors import DropError
from tiny import write_checkpoint


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, code: str) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("precisions") / "out", code=code)


def refusal(*argv: object) -> str:
    result = CliRunner().invoke(app, [str(part) for part in argv])
    assert isinstance(result.exception, DropError), result.output
    return str(result.exception)


def test_an_average_is_no_level(out: Path) -> None:
    assert "--avg-bits 2.5" in refusal("generate", out, "--prompt", "x", "--bits", "2.5")
    assert "give one level" in refusal("generate", out, "--prompt", "x", "--bits", "2,3")


def test_an_infeasible_average_is_refused_before_it_is_measured(out: Path) -> None:
    assert "the largest 4" in refusal("plan", out, "--avg-bits", "9")
    assert "neither sensitivity.json" not in refusal("plan", out, "--avg-bits", "1.5")
    assert not (out / "sensitivity.json").exists()
