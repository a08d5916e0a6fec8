"""Precisions on the command line: a level is a whole number; the impossible costs no work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dropbydrop.cli.main import app
from dropbydrop.system.errors import DropError
from tiny import write_checkpoint


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, code: str) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("precisions") / "out", code=code)


def test_info_says_what_the_planes_are(out: Path, code: str) -> None:
    result = CliRunner().invoke(app, ["info", str(out), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["kind"] == code
    assert found["plane_bits"] == {"bytes": [1, 1, 1, 1], "trellis": [2, 1, 1]}[code]
    assert found["planes_present"] == list(range(1, found["planes"] + 1))
    shown = " ".join(CliRunner().invoke(app, ["info", str(out)]).output.split())
    assert f"{code} planes of {'+'.join(map(str, found['plane_bits']))} bits" in shown


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
