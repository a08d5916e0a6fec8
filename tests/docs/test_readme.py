"""The commands of the README, run on a tiny model, so that an option that is renamed fails here.

The blocks are taken from README.md as they are. What a tiny model on a small machine needs is put
in by the three tables below, which hold every change that is made to a line.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tiny import save_tiny

README = Path(__file__).parents[2] / "README.md"

WORDS = {"smollm2": "tiny"}
"""Words of a command that are replaced: the model, by a folder that the test writes."""

ADDED = {
    "quantize": "--calibration text.txt --windows 3 --seq-len 32 --preset fast",
    "eval": "--windows 3 --seq-len 32",
    "plan": "--text text.txt --windows 1 --seq-len 32",
    "generate": "--max-new-tokens 4",
}
"""Options that are added to a command, to make it small."""

PYTHON = {
    '"smollm2", "out"': (
        '"tiny", "out", calibration="text.txt", windows=3, seq_len=32, preset="fast"'
    ),
}
"""Texts of the Python block that are replaced."""


def block(language: str) -> str:
    """The first block of README.md in this language."""
    found = re.search(rf"^```{language}\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"README.md has no block of {language}"
    return found[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "tiny")
    (tmp_path / "text.txt").write_text(" ".join(str(i * 7919 % 1000) for i in range(1500)))
    return tmp_path


def run(folder: Path, *words: str) -> str:
    """A Python process in the folder; its stdout, after it ended well."""
    environment = os.environ | {"DROPBYDROP_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_shell_block(folder: Path) -> None:
    lines = [shlex.split(line, comments=True) for line in block("sh").splitlines()]
    commands = [words[1:] for words in lines if words]
    assert {words[0] for words in lines if words} == {"dropbydrop"}
    assert {"quantize", "eval", "generate"} <= {words[0] for words in commands}
    for words in commands:
        small = shlex.split(ADDED.get(words[0], ""))
        run(folder, "-m", "dropbydrop", *[WORDS.get(word, word) for word in words], *small)
    assert (folder / "plan.json").is_file()
    assert (folder / "small" / "plane-2.safetensors").is_file()
    assert not (folder / "small" / "plane-3.safetensors").exists()


@pytest.mark.slow
def test_python_block(folder: Path) -> None:
    code = block("python")
    for old, new in PYTHON.items():
        assert old in code
        code = code.replace(old, new)
    code += "\nprint(dropbydrop.precision(model), dropbydrop.precision(two))\n"
    assert run(folder, "-c", code).split() == ["3", "2"]


def test_the_commands_of_the_first_screen_are_targets_of_the_makefile() -> None:
    made = re.findall(r"^make (\w+)", README.read_text(), re.MULTILINE)
    makefile = (README.parent / "Makefile").read_text()
    assert {"demo", "test"} <= set(made)
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in made)


def test_continuous_integration_runs_the_command_of_the_readme() -> None:
    assert "make test" in (README.parent / ".ci" / "run").read_text().splitlines()
