"""Texts of a checkpoint on a terminal: shown, not obeyed."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from dropbydrop.checkpoint import Checkpoint
from dropbydrop.cli.info import describe
from dropbydrop.cli.main import main
from dropbydrop.cli.tables import print_info
from dropbydrop.system.console import printable
from tiny import sign, write_checkpoint

EVIL = "\x1b[2J\x1b]0;title\x07[red]x[/red]\r\ud800"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("evil") / "out")
    config = json.loads((folder / "config.json").read_text())
    made = {"base_model": EVIL, "preset": [EVIL], "tuning": [3, {"method": EVIL}]}
    config["quantization_config"]["provenance"] = made
    (folder / "config.json").write_text(json.dumps(config))
    sign(folder, "config.json")
    return folder


def test_printable() -> None:
    assert printable(EVIL) == r"\x1b[2J\x1b]0;title\x07[red]x[/red]\r\ud800"
    assert printable("größer, …") == "größer, …"


def test_info(out: Path) -> None:
    file = io.StringIO()
    print_info(describe(Checkpoint.open(out)), Console(file=file, width=400))
    text = file.getvalue()
    assert "\x1b" not in text
    assert r"from \x1b[2J\x1b]0;title\x07[red]x[/red]\r\ud800, preset" in text
    assert "; tuned: 3; tuned: " in text
    text.encode()


@pytest.mark.parametrize("tuning", [7, "x", {"a": 1}, None])
def test_provenance_of_any_kind(out: Path, tuning: object) -> None:
    shown = describe(Checkpoint.open(out))
    shown["provenance"] = {"tuning": tuning}
    print_info(shown, Console(file=io.StringIO()))


def test_errors(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((out / "config.json").read_text())
    config[EVIL] = {"attn_implementation": EVIL}
    (out / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(sys, "argv", ["dropbydrop", "info", str(out) + "/\x1b[2J"])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "\x1b" not in said
