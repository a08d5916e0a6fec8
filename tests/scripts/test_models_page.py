"""docs/models.md says of some types what the checks say now; the script knows all others."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SAMPLE = ["bamba", "deepseek_v4", "falcon", "gemma3", "gemma3n_text", "gpt2", "llama", "zamba2"]


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    place = ROOT / "scripts" / "generate_models_page.py"
    spec = importlib.util.spec_from_file_location("generate_models_page", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_in_step(
    pages: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["", "--check", *SAMPLE])
    assert pages.main() == 0, capsys.readouterr().err
    results = dict(row.split(" | ")[::2] for row in capsys.readouterr().out.splitlines())
    kinds = {kind.strip("| `"): result.strip(" |") for kind, result in results.items()}
    assert {kind for kind, result in kinds.items() if result == "run"} == {
        "bamba", "gemma3", "gemma3n_text", "llama"
    }  # fmt: skip
    assert kinds["falcon"] == "fits"
    assert kinds["deepseek_v4"].startswith("refused: hyper-connections")
    assert "c_fc" in kinds["gpt2"]
    assert kinds["zamba2"] == "refused: weights shared between blocks"


def test_a_page_that_is_not_in_step_fails(
    pages: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = tmp_path / "models.md"
    page.write_text(pages.PAGE.read_text().replace("| LlamaForCausalLM | run |", "| fits |"))
    monkeypatch.setattr(pages, "PAGE", page)
    monkeypatch.setattr(sys, "argv", ["", "--check", "llama"])
    assert pages.main() == 1


def test_every_type_has_a_row_or_is_named(pages: ModuleType) -> None:
    text = pages.PAGE.read_text()
    rows, rest = text[text.index(pages.START) :].split("\n\nNot built")
    lost = [t for t in pages.types() if f"| `{t}` |" not in rows and f"`{t}`" not in rest]
    assert not lost, "run: python scripts/generate_models_page.py"
