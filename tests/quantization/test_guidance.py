"""Tokens weighted by gradients, through a whole run: resumed, refused, and where it cannot be."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from dropbydrop.checkpoint import Checkpoint
from dropbydrop.checkpoint.config import LOG_FILE
from dropbydrop.cli.tables import print_report
from dropbydrop.coding.encoder import EFFORTS, Effort
from dropbydrop.models.token_gradients import TokenGradients
from dropbydrop.quantization import job as jobs
from dropbydrop.quantization.guidance import Guidance, LocalStore, normalised
from dropbydrop.quantization.log import Report
from dropbydrop.quantization.pipeline import quantize
from tiny import save_tiny


@pytest.fixture(scope="module", autouse=True)
def small_effort() -> Iterator[None]:
    """The presets' search effort is for real models."""
    patch = pytest.MonkeyPatch()
    efforts = {name: Effort(2, 1, 1, guided=EFFORTS[name].guided) for name in EFFORTS}
    patch.setattr(jobs, "EFFORTS", efforts)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("guided")
    save_tiny(root / "model", "qwen2", chat=True)
    (root / "text.txt").write_text(" ".join(str(i * 7919 % 1000) for i in range(1500)))
    return root


def run(place: Path, out: str, name: str = "model", **changes: Any) -> Report:
    settings: dict[str, Any] = {"windows": 3, "seq_len": 32, "progress": False}
    text = place / "text.txt"
    return quantize(place / name, place / out, calibration=text, **{**settings, **changes})


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def printed(report: Report) -> str:
    console = Console(file=io.StringIO(), width=200)
    print_report(report, Checkpoint.open(report.out), console)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def guided(place: Path) -> Report:
    return run(place, "guided")


def test_presets(place: Path, guided: Report) -> None:
    """`fast` does without, and every report says which it was."""
    plain = run(place, "plain", preset="fast")
    assert (guided.unguided, guided.plain) == ("", [])
    assert guided.seconds["gradients"] > plain.seconds["gradients"] == 0
    assert plain.unguided == "preset fast"
    assert hashes(plain.out)["plane-1.safetensors"] != hashes(guided.out)["plane-1.safetensors"]
    assert "tokens count alike: preset fast" in printed(plain)
    assert guided.to_dict()["token_weights"] == "gradients"
    log = [json.loads(line) for line in (guided.out / LOG_FILE).read_text().splitlines()]
    assert all(line["guided"] for line in log)


@pytest.mark.parametrize(("where", "block"), [("_forward", 1), ("_backward", 2), ("_backward", 0)])
def test_resumed_runs_have_the_same_bytes(
    place: Path, guided: Report, where: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int]] = []
    for name in ("_forward", "_backward"):
        real = getattr(Guidance, name)

        def at(self: Guidance, i: int, x: Any, name: str = name, real: Any = real) -> Any:
            seen.append((name, i))
            if (name, i) == (where, block) and seen.count((name, i)) == 1:
                raise KeyboardInterrupt
            return real(self, i, x)

        monkeypatch.setattr(Guidance, name, at)
    out = f"resumed{where}{block}"
    with pytest.raises(KeyboardInterrupt):
        run(place, out, resume=True)
    done = len(seen)
    report = run(place, out, resume=True)
    assert hashes(report.out) == hashes(guided.out)
    # the step that failed, those after it, and a forward step if its output was not kept
    assert len(seen) - done == 2 * 3 - (done - 1) + (done <= 3 + 1)
    assert not [p.name for p in place.iterdir() if p.name.startswith(f".{out}.")]


def test_a_model_without_a_backward_pass_is_said(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> Any:
        raise RuntimeError("no derivative of scan")

    monkeypatch.setattr(TokenGradients, "block", refuse)
    report = run(place, "refused")
    assert "no derivative of scan" in report.unguided
    assert "tokens count alike: Qwen2ForCausalLM has no backward pass" in printed(report)
    provenance = Checkpoint.open(report.out).quantization.provenance
    assert provenance["token_weights"] == report.unguided


def test_experts_are_named(place: Path) -> None:
    """Their tokens count alike, those of attention do not, and the report says so."""
    save_tiny(place / "experts", "qwen3-moe")
    report = run(place, "routed", "experts")
    assert report.unguided == ""
    assert report.plain
    assert all("experts" in name for name in report.plain)
    assert f"except for {report.plain[0]}" in printed(report)


def test_normalised() -> None:
    weights = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    assert normalised(weights).tolist() == [[0.5, 1.5], [1.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_local_store_is_a_stack_that_shrinks(tmp_path: Path, dtype: torch.dtype) -> None:
    store = LocalStore(tmp_path / "out")
    states = [torch.randn(2, 3, 4).to(dtype) for _ in range(3)]
    for i, state in enumerate(states):
        store.push(str(i), state)
    assert list(tmp_path.iterdir()) == []  # nothing that a crash could leave behind
    for i in reversed(range(3)):
        assert torch.equal(store.pop(str(i)), states[i])
        assert store._file.seek(0, io.SEEK_END) == i * 24 * dtype.itemsize
