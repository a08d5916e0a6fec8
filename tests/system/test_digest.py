"""Digests of files and of code."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import dropbydrop
from dropbydrop.system import digest as module
from dropbydrop.system.digest import CODING_ROOMS, code_digest, digest, model_digest


def test_names_and_contents_count(tmp_path: Path) -> None:
    for name, text in (("a", "1"), ("b", "2"), ("c", "1")):
        (tmp_path / name).write_text(text)
    a, b, c = (tmp_path / name for name in "abc")
    assert len({digest(a), digest(b), digest(c), digest(a, b), digest(b, a)}) == 5
    with pytest.raises(FileNotFoundError):
        digest(a, tmp_path / "none")


def test_a_model_is_its_config_weights_and_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = model_digest(tmp_path)
    (tmp_path / "notes.md").write_text("anything")
    assert model_digest(tmp_path) == before
    (tmp_path / "model.safetensors").write_text("weights")
    assert model_digest(tmp_path) != before


def test_only_the_rooms_that_can_change_codes_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A help text in `cli` does not invalidate the work of days; a missing room is an error."""
    package = tmp_path / "dropbydrop"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(dropbydrop.__file__).parent, package, ignore=ignore)
    monkeypatch.setattr(module, "_PACKAGE", package)
    before = code_digest()
    for room, counts in (("cli", False), ("runtime", False), ("tuning", False), ("coding", True)):
        (package / room / "more.py").write_text("x = 1")
        assert (code_digest() != before) == counts, room
        assert code_digest(*CODING_ROOMS, "tuning") != before
        (package / room / "more.py").unlink()
    (package / "coding" / "encoder.py").rename(package / "coding" / "other.py")
    assert code_digest() != before
    shutil.rmtree(package / "data")
    with pytest.raises(FileNotFoundError, match="data is no folder and no file of dropbydrop"):
        code_digest()
