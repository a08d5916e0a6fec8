"""Estimates before a run: the extrapolation under a clock that we set, sizes, and no traces."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dropbydrop.cli import main as cli
from dropbydrop.coding.codebook_set import CodebookSet
from dropbydrop.coding.encoder import Effort, encode_group
from dropbydrop.data.calibration import load_windows
from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.quantization import estimate as estimates
from dropbydrop.quantization import job as jobs
from dropbydrop.quantization import log as logs
from dropbydrop.quantization import pipeline
from dropbydrop.quantization.config import QuantizeConfig
from dropbydrop.quantization.estimate import estimate
from dropbydrop.system.errors import DropError
from dropbydrop.tuning import cost as costs
from dropbydrop.tuning import distill
from dropbydrop.tuning.config import TuneConfig
from dropbydrop.tuning.job import held_of
from dropbydrop.tuning.student import Student
from tiny import save_tiny


@pytest.fixture(scope="module", autouse=True)
def small_effort():
    """The presets' search effort is for real models."""
    patch = pytest.MonkeyPatch()
    patch.setattr(jobs, "EFFORTS", dict.fromkeys(jobs.EFFORTS, Effort(2, 1, 0)))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dry")
    save_tiny(root / "model", "llama-tied", num_hidden_layers=5, intermediate_size=400)
    save_tiny(root / "untied", "phi3")
    (root / "text.txt").write_text(" ".join(str(i * 7919 % 1000) for i in range(4500)))
    return root


def job(place: Path, name: str = "model", **changes: Any) -> jobs.Job:
    settings: dict[str, Any] = {
        "calibration": str(place / "text.txt"),
        "preset": "fast",
        "windows": 16,
        "seq_len": 64,
        "device": "cpu",
    }
    ready = changes.pop("ready", None)
    return jobs.prepare(place / name, QuantizeConfig(**{**settings, **changes}), ready=ready)


class Clock:
    """Time passes only where the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.parametrize("windows", [3, 4, 16, 18])
def test_extrapolation(place: Path, monkeypatch: pytest.MonkeyPatch, windows: int) -> None:
    """With known costs the estimate is what the whole run would add up to."""
    clock = Clock()
    monkeypatch.setattr(estimates, "time", clock)
    monkeypatch.setattr(estimates, "_ROWS", 8)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    per_group, per_row, per_block, per_window = 7.0, 0.25, 3.0, 0.5
    collect_statistics = BlockRunner.collect_statistics
    rows = []

    def timed_collect(self: BlockRunner, i: int, block: Any, hidden: Any, **kw: Any) -> Any:
        clock.now += per_block + per_window * hidden.shape[0]
        return collect_statistics(self, i, block, hidden, **kw)

    def timed_group(weights: dict[str, Any], *args: Any) -> Any:
        rows.append(len(weights["w"]))
        clock.now += per_group + per_row * len(weights["w"])
        return encode_group(weights, *args)

    monkeypatch.setattr(BlockRunner, "collect_statistics", timed_collect)
    monkeypatch.setattr(estimates, "encode_group", timed_group)
    asked = job(place, windows=windows)
    asked.runner.batch_tokens = 4 * 64  # four windows a batch
    try:
        found = estimate(asked, place / "out")
    finally:
        torch.set_num_threads(threads)
    heights = {"qkv": 64 + 32 + 32, "o": 48, "gate_up": 800, "down": 48}
    encode = 5 * sum(per_group + per_row * h for h in heights.values())
    assert found.seconds["encode"] == pytest.approx(encode)
    # the constant part of a capture cannot be told from one batch alone
    activations = 5 * (per_block + per_window * windows)
    exact = windows >= 8
    assert found.seconds["activations"] == pytest.approx(activations, rel=1e-6 if exact else 0.3)
    assert max(rows) <= 24  # it must not encode whole matrices of large models
    assert found.seconds["total"] == pytest.approx(sum(list(found.seconds.values())[:-1]))


@pytest.mark.parametrize("name", ["model", "untied"])
@pytest.mark.parametrize("head_bits", [5, 8, 16])
def test_bytes(place: Path, tmp_path: Path, name: str, head_bits: int) -> None:
    found = estimate(job(place, name, head_bits=head_bits, windows=3), tmp_path / "out")
    made = pipeline.quantize(
        place / name,
        tmp_path / "out",
        calibration=place / "text.txt",
        windows=3,
        seq_len=64,
        head_bits=head_bits,
        progress=False,
    )
    size = sum(p.stat().st_size for p in made.out.iterdir())
    assert found.bytes_out == pytest.approx(size, rel=0.15)  # tiny: headers are a third of it
    assert found.bytes_most > found.bytes_out
    kept = estimate(job(place, name, windows=3), tmp_path / "other", resume=True)
    assert kept.bytes_most >= 2 * kept.bytes_out
    assert 0.1 < found.peak_gib < 4


def test_memory_counts_what_the_timed_part_has_not(place: Path) -> None:
    asked = job(place, windows=2, seq_len=16)
    block = estimates.FirstBlock(asked)
    small = block.peak()
    block.job = replace(asked, config=replace(asked.config, windows=1_000_000))
    assert block.peak() - small == 4 * (1_000_000 - 2) * 16 * 48


def test_text_of_the_model_itself(place: Path, tmp_path: Path) -> None:
    found = estimate(job(place, calibration="self", windows=4), tmp_path / "out")
    assert found.seconds["calibrate"] > 0.01
    assert list(tmp_path.iterdir()) == []


def test_ready_windows_take_no_time(place: Path, tmp_path: Path) -> None:
    asked = job(place)
    text = load_windows(asked.config.calibration, asked.source.tokenizer(), 5, 48)
    ready = job(place, ready=text, windows=None)
    assert (ready.config.windows, ready.config.seq_len) == (5, 48)
    assert estimate(ready, tmp_path / "out").seconds["calibrate"] == 0


def test_training_of_a_set_that_does_not_ship(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is part of the search, in the estimate as in the run."""
    real, clock = jobs.universal_set, Clock()

    def slow(*which: Any) -> CodebookSet:
        clock.now += 50
        return real(*which)

    monkeypatch.setattr(jobs, "universal_set", slow)
    for module in (estimates, pipeline, logs):
        monkeypatch.setattr(module, "time", clock)
    expected = estimate(job(place, windows=3), tmp_path / "out")
    found = pipeline.quantize(
        place / "model", tmp_path / "out", calibration=place / "text.txt", windows=3, seq_len=64,
        progress=False,
    )  # fmt: skip
    assert found.seconds["encode"] == found.seconds["total"] == 50
    assert expected.seconds["encode"] >= 50


def test_refusals_come_first_and_nothing_is_left(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(DropError, match="exists"):
        estimate(job(place), tmp_path / "out")
    with pytest.raises(DropError, match="tokens"):
        estimate(job(place, windows=9999), tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_small_disk_is_said(place: Path, tmp_path: Path) -> None:
    found = estimate(job(place, windows=3), tmp_path / "out")
    assert "too small" not in str(found)
    assert "busy" not in str(replace(found, load=0.1))
    assert "busy (load 3.0 for each" in str(replace(found, load=3.0))
    assert "too small" in str(replace(found, bytes_free=10))


def test_the_command(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["dropbydrop", "quantize", place / "model", tmp_path / "out", "--calibration",
            place / "text.txt", "--windows", 3, "--seq-len", 64, "--dry-run", "--json"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(a) for a in argv])
    cli.main()
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert result["dry_run"] is True
    phases = {"calibrate", "gradients", "activations", "encode", "write", "total"}
    assert set(result["seconds"]) == phases
    assert result["bytes_out"] > 0
    assert "free" in captured.err
    assert list(tmp_path.iterdir()) == []


def test_gradients_are_counted(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time of the pass, and disk for the inputs of all blocks."""
    plain = estimate(job(place), tmp_path / "out")
    monkeypatch.setattr(jobs, "EFFORTS", {"fast": Effort(2, 1, 0, guided=True)})
    guided = estimate(job(place), tmp_path / "out")
    assert guided.seconds["gradients"] > plain.seconds["gradients"] == 0
    states = 16 * 64 * 48 * 5  # windows, tokens, values of a state, blocks
    assert guided.bytes_most > max(2 * states, plain.bytes_most)
    assert "gradients" in str(guided)


@pytest.mark.slow
def test_what_then_happens(tmp_path: Path) -> None:
    """In fresh processes, as from the command line: memory and disk.

    Not time: the machine may do something else in one of the two runs (see test_extrapolation).
    """
    model = save_tiny(
        tmp_path / "model",
        num_hidden_layers=4,
        hidden_size=512,
        intermediate_size=1408,
        num_attention_heads=8,
        head_dim=64,
    )
    (tmp_path / "text.txt").write_text(" ".join(str(i * 7919 % 1000) for i in range(3000)))
    command = [sys.executable, "-m", "dropbydrop", "quantize", model, tmp_path / "out", "--json",
               "--calibration", tmp_path / "text.txt", "--windows", "8", "--seq-len", "128",
               "--preset", "fast"]  # fmt: skip

    def run(*more: str) -> dict[str, Any]:
        done = subprocess.run(
            [*map(str, command), *more], capture_output=True, text=True, timeout=1800
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    expected, found = run("--dry-run"), run()
    assert expected["peak_gib"] == pytest.approx(found["peak_gib"], rel=0.3)
    size = sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    assert expected["bytes_out"] == pytest.approx(size, rel=0.05)
    assert expected["seconds"].keys() == found["seconds"].keys()


def test_tuning_is_counted_where_it_follows(place: Path, tmp_path: Path, code: str) -> None:
    plain = estimate(job(place, code=code), tmp_path / "out")
    assert (plain.tuning, plain.untuned) == (0, "")
    assert "tune" not in plain.seconds
    tuned = estimate(job(place, code=code, tune=True, seq_len=32), tmp_path / "out", resume=True)
    assert tuned.seconds["tune"] == tuned.tuning > 0
    assert ", tuning " in str(tuned)
    assert tuned.peak_gib >= tuned.tuning_gib > 0.1
    assert tuned.bytes_out > plain.bytes_out  # a set for each input group
    states = 64 * 64 * 48 * 4  # kept of the original: windows, tokens, values, bytes
    assert tuned.bytes_most > 2 * tuned.bytes_out + states
    left = estimate(job(place, code=code, preset="best", windows=2), tmp_path / "out")
    assert left.tuning > 0
    assert "tune" not in left.seconds
    assert "--tune would take about" in str(left)
    said = estimate(job(place, code=code, preset="best", windows=2, tune=False), tmp_path / "out")
    assert said.tuning == 0
    assert "uning" not in str(said)
    assert "Without tuning: experts" in str(replace(said, untuned="experts."))
    assert list(tmp_path.iterdir()) == []


def test_extrapolation_of_tuning(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With known costs of a block and of the head, what the whole run adds up to."""
    clock = Clock()
    monkeypatch.setattr(costs, "time", clock)
    windows = 6
    config = TuneConfig(windows=windows, seq_len=32, device="cpu")
    real, head = Student.block, distill.head_loss

    def block(self: Any, i: int, hidden: Any, leaves: Any, levels: Any) -> Any:
        grad = torch.is_grad_enabled()
        clock.now += sum(
            (3 if grad else 1) * level * x.shape[0] for x, level in zip(hidden, levels, strict=True)
        )
        return real(self, i, hidden, leaves, levels)

    def head_loss(student: Any, teacher: Any, leaves: Any, last: Any, *more: Any) -> Any:
        clock.now += (5 if more[-1] else 2) * last.shape[0]
        return head(student, teacher, leaves, last, *more)

    def forward_block(self: Any, i: int, block: Any, hidden: Any, out: Any = None) -> Any:
        clock.now += 0.5 * hidden.shape[0]
        return hidden

    monkeypatch.setattr(Student, "block", block)
    monkeypatch.setattr(distill, "head_loss", head_loss)
    monkeypatch.setattr(costs, "head_loss", head_loss)
    asked = job(place, tune=True)
    first = estimates.FirstBlock(asked)
    monkeypatch.setattr(BlockRunner, "forward_block", forward_block)
    found = costs.cost(
        asked.runner, config, first.input_groups, asked.universal(), (2, 3, 4), first.like_it
    )
    # the same, step by step, in a run of which the blocks' own work is left out
    clock.now = 0.0
    student = costs.Trial(asked.runner, first.input_groups, asked.universal(), (2, 3, 4))
    values = student.values()
    ids = torch.zeros(windows, 32, dtype=torch.int64)
    text = distill.Windows(ids, distill.last_hidden(asked.runner, ids, False), held_of(windows))
    monkeypatch.setattr(
        Student,
        "block",
        lambda self, i, hidden, leaves, levels: block(self, 0, hidden, leaves, levels),
    )
    before = distill.measure(student, asked.runner, values.leaves, text)
    for step in distill.schedule(text.training, 2, (2, 3, 4), False, 0):
        distill._add_gradients(student, asked.runner, values, text, before, step)
    distill.measure(student, asked.runner, values.leaves, text)
    assert found.seconds == pytest.approx(clock.now, rel=1e-6)
