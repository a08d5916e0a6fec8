"""What users and scripts see: help texts and the keys of --json, compared with snapshots.

After a change that is meant: `UPDATE_SNAPSHOTS=1 pytest tests/cli` writes them anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dropbydrop.cli import main as cli
from dropbydrop.coding.encoder import Effort
from dropbydrop.quantization import job as jobs
from tiny import save_tiny

SNAPSHOTS = Path(__file__).parent / "snapshots"


def check(name: str, text: str) -> None:
    """Compare with a snapshot, or write it."""
    if "UPDATE_SNAPSHOTS" in os.environ:
        (SNAPSHOTS / name).write_text(text)
    assert text == (SNAPSHOTS / name).read_text()


def help_text(*command: str) -> str:
    """What --help prints on a terminal of 100 columns, commands of other distributions left out."""
    result = CliRunner().invoke(
        cli.app, [*command, "--help"], env={"COLUMNS": "100"}, prog_name="dropbydrop"
    )
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    return "\n".join(x for x in lines if not x.startswith(("  compare", "  study"))) + "\n"


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help(command: str) -> None:
    check(f"help-{command}.txt" if command else "help.txt", help_text(*command.split()))


def test_help_is_quick() -> None:
    """It imports what declares options, and nothing that computes."""
    code = (
        "import sys; from dropbydrop.cli import main as cli\n"
        "sys.argv[1:] = ['--help']; cli.main()\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors', 'matplotlib', 'rich'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY []"
    assert "quantize" in done.stdout


def keys(value: Any, prefix: str = "") -> list[str]:
    """Paths to all keys; names of levels, matrices and machines are one and the same."""
    if not isinstance(value, dict):
        return [prefix] if prefix else []
    found: set[str] = set()
    for key, inner in value.items():
        word = "LEVEL" if key.isdigit() else key
        free = prefix.split(".")[-1] in ("topology", "caches", "calibration")
        found |= {prefix} if free else set(keys(inner, f"{prefix}.{word}" if prefix else word))
    return sorted(found)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Command -> its JSON on a tiny model."""
    root, found = tmp_path_factory.mktemp("keys"), {}
    save_tiny(root / "model", "llama-tied")
    text = root / "text.txt"
    text.write_text(" ".join(str(i * 7919 % 1000) for i in range(3000)))
    windows = ["--windows", "2", "--seq-len", "32"]
    orders = {
        "quantize": [root / "model", root / "out", "--calibration", text, *windows],
        "info": [root / "out"],
        "eval": [root / "out", "--text", text, "--reference", root / "model", *windows],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "EFFORTS", dict.fromkeys(jobs.EFFORTS, Effort(2, 1, 0)))
        for name, order in orders.items():
            result = CliRunner().invoke(cli.app, [name, *map(str, order), "--json"])
            assert result.exit_code == 0, result.output
            found[name] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("command", ["quantize", "info", "eval"])
def test_keys_of_json(results: dict[str, Any], command: str) -> None:
    check(f"json-{command}.txt", "".join(f"{key}\n" for key in keys(results[command])))
