"""Every command on a checkpoint whose embedding and head are in planes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dropbydrop.cli.main import app
from dropbydrop.coding.encoder import Effort
from dropbydrop.quantization import job as jobs
from tiny import save_tiny


def said(*order: object) -> str:
    result = CliRunner().invoke(app, [*map(str, order)])
    assert result.exit_code == 0, (result.output, result.exception)
    return " ".join(result.output.split())


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "EFFORTS", dict.fromkeys(jobs.EFFORTS, Effort(2, 1, 0)))
    model, out, text = save_tiny(tmp_path / "model", "llama-tied"), tmp_path / "out", "text.txt"
    monkeypatch.chdir(tmp_path)
    Path(text).write_text(" ".join(str(i * 7919 % 1000) for i in range(3000)))
    few = ("--windows", "2", "--seq-len", "32")
    dry = said("quantize", model, out, "--calibration", text, *few, "--head-bits", 5, "--dry-run")
    assert "head" in dry or "MB" in dry
    made = said("quantize", model, out, "--calibration", text, *few, "--head-bits", 5)
    assert "kept in 4/5/5 bits: model.embed_tokens" in made
    assert "embeddings 4/5/5 bits" in said("info", out)
    planned = said("plan", out, "--avg-bits", "2.5", "--text", text, *few, "--save", "plan.json")
    table = json.loads(Path("plan.json").read_text())["table"]
    assert f"embedding and head with {table}" in planned
    said("eval", out, "--text", text, "--reference", model, "--avg-bits", "2.5", *few)
    said("eval", out, "--text", text, "--plan", "plan.json", *few)
    said("generate", out, "--plan", "plan.json", "--prompt", "1 2", "--max-new-tokens", 2)
    said("slice", out, "small", "--bits", 2)
    said("generate", "small", "--bits", 2, "--prompt", "1 2", "--max-new-tokens", 2)
    said("export", out, "dense", "--bits", 3)
    said("tune", out, "tuned", "--model", model, "--calibration", text, *few)
    said("bench", out, "--tokens", 4)
