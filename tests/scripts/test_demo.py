"""`make demo` on a tiny model: to its end, interrupted, and without matplotlib."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import typer

import tiny

DEMO = Path(__file__).parents[2] / "scripts" / "demo.py"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script as a module, in a folder of its own."""
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    return module


@pytest.mark.slow
def test_the_demo_runs_to_its_end(tmp_path: Path) -> None:
    tiny.save_tiny(tmp_path / "tiny", chat=True)
    (tmp_path / "text.txt").write_text("the river runs past the old mill by the sea\n" * 100)
    options = "--model tiny --text text.txt --calibration-windows 2 --windows 2 --seq-len 32"
    done = subprocess.run(
        [sys.executable, str(DEMO), *options.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "80"},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    steps = [line.split()[2] for line in lines if line.startswith("$ ")]
    assert steps == ["quantize", "info", "generate", "generate", "generate", "eval"]
    assert "evaluate 8/8, 100 %" in done.stderr

    figures = json.loads((tmp_path / "demo" / "figures.json").read_text())
    kinds = {"bfloat16": "multiplies it", "float32": "has no products in bfloat16"}
    assert f"in {figures['dtype']}: this processor {kinds[figures['dtype']]}" in done.stdout
    assert figures["seq_len"] == 32
    assert sorted(figures["bits"]) == ["2", "3", "4"]
    for row in figures["bits"].values():
        assert f"{row['kl']:.4f} at {row['true_bits']:.2f} bits" in done.stdout
    assert (tmp_path / "demo" / "kl-over-bits.png").read_bytes().startswith(b"\x89PNG")
    assert "picture: demo/kl-over-bits.png" in lines
    assert lines[-4].startswith("done after 0:")
    assert [shlex.split(line)[1] for line in lines[-3:]] == ["generate", "bench", "quantize"]


def test_it_serves_instead(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(demo, "command", lambda *words, to=None: ran.append([*map(str, words)]))
    monkeypatch.setattr(sys, "argv", ["demo.py", "--serve", "8001"])
    demo.main()
    assert [words[0] for words in ran] == ["quantize", "serve"]
    name, *arguments = ran[1]
    assert arguments[0] == ran[0][2]  # what was quantized
    serve = typer.main.get_command(demo.cli.app).commands[name]
    assert serve.make_context(name, arguments).params["port"] == 8001


def test_what_it_proposes_are_commands(demo: ModuleType) -> None:
    commands = typer.main.get_command(demo.cli.app).commands
    proposed = demo.next_commands(Path("demo/smollm2-fast"))
    assert len(proposed) == 3
    for name, *arguments in proposed:
        commands[name].make_context(name, arguments)


def test_interrupted_it_says_that_it_goes_on(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def interrupted() -> None:
        ran.extend(sys.argv)
        sys.exit(130)

    monkeypatch.setattr(demo.cli, "main", interrupted)
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    with pytest.raises(SystemExit) as stop:
        demo.main()
    assert stop.value.code == 130
    assert "stopped; the same command goes on from there" in capfd.readouterr().err
    assert "--resume" in ran


def test_an_error_ends_it(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["demo.py", "--model", "nowhere"])
    with pytest.raises(SystemExit) as stop:
        demo.main()
    assert stop.value.code == 2


def test_without_matplotlib_it_says_what_to_install(
    demo: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    figures = {"bits": {"2": {"true_bits": 2.03, "kl": 0.25, "bytes": 1}}}
    demo.draw(figures, tmp_path / "picture.png", "tiny")
    out = capfd.readouterr().out
    assert "0.2500 at 2.03 bits" in out
    assert "pip install 'matplotlib>=3.8'" in out
    assert not (tmp_path / "picture.png").exists()
