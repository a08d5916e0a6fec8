"""Tuning that is killed, stopped or out of disk, and goes on to the same bytes."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from dropbydrop.checkpoint import journal as resume
from dropbydrop.coding.encoder import Effort
from dropbydrop.quantization import job as jobs
from dropbydrop.quantization import pipeline as quantize
from dropbydrop.system.errors import DropError
from dropbydrop.tuning import distill, job, pipeline
from dropbydrop.tuning.pipeline import tune
from dropbydrop.tuning.report import TuneReport
from kills import SERVER, die_at_operation
from tiny import save_tiny

METHODS = ["blocks", "distill"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, and a checkpoint."""
    root = tmp_path_factory.mktemp("tune-resume")
    (root / "text.txt").write_text(" ".join(str(i * 7919 % 1000) for i in range(1500)))
    save_tiny(root / "model", "qwen2")
    before = jobs.EFFORTS
    jobs.EFFORTS = dict.fromkeys(before, Effort(2, 1, 1))
    quantize.quantize(
        root / "model",
        root / "quantized",
        (2, 3),
        calibration=root / "text.txt",
        windows=3,
        seq_len=32,
        progress=False,
    )
    jobs.EFFORTS = before
    return root


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> dict[str, dict[str, str]]:
    """Names and hashes of the files of runs without `resume`."""
    return {m: files(run_here(place, place / f"{m}-whole", m, resume=False).out) for m in METHODS}


def files(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def run_here(place: Path, out: Path, method: str, **changes: Any) -> TuneReport:
    """A run in this process, of 5 steps or 3 blocks; a state is kept every 2 steps."""
    settings: dict[str, Any] = {
        "model": place / "model",
        "method": method,
        "calibration": place / "text.txt",
        "windows": 5,
        "seq_len": 32,
        "epochs": 5 if method == "distill" else 1,
        "resume": True,
        "progress": False,
        "device": "cpu",
    }
    before, threads = distill.KEEP, torch.get_num_threads()
    distill.KEEP = 2
    torch.set_num_threads(1)
    try:
        return tune(place / "quantized", out, **{**settings, **changes})
    finally:
        distill.KEEP = before
        torch.set_num_threads(threads)


def child(place: Path, out: Path, method: str, kill: int) -> None:
    """A run that is killed right before its `kill`-th file operation; 0 lets it live."""
    job.code_digest = lambda *rooms: "the same code"  # others may be editing it
    die_at_operation(kill)
    run_here(place, out, method)


def attempt(place: Path, out: Path, method: str, kill: int) -> bool:
    """Whether a run that was to be killed finished before that."""
    process = SERVER.Process(target=child, args=(place, out, method, kill))
    process.start()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


def leftovers(out: Path) -> list[str]:
    return [p.name for p in out.parent.iterdir() if p.name.startswith(f".{out.name}.")]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_again_and_again(
    place: Path, undisturbed: dict[str, dict[str, str]], method: str
) -> None:
    """Every attempt is killed a little later and starts from what the last one left."""
    out, kill, steps = place / f"{method}-killed", 0, set()
    while True:
        kill += 6
        done = attempt(place, out, method, kill)
        journal = resume.work_folder(out) / resume.JOURNAL
        if out.exists():  # whole or not at all
            assert files(out) == undisturbed[method]
        if done:
            break
        steps.add(journal.read_bytes().count(b"\n") if journal.exists() else 0)
    assert len(steps) > 3
    assert files(out) == undisturbed[method]
    assert leftovers(out) == []


class Stop(Exception):
    pass


def stop_after(monkeypatch: pytest.MonkeyPatch, commits: int, error: BaseException) -> None:
    """Fail instead of keeping another state after so many."""
    real, left = resume.Journal.commit, [commits]

    def counted(self: resume.Journal, *args: Any) -> None:
        if left[0] == 0:
            raise error
        left[0] -= 1
        real(self, *args)

    monkeypatch.setattr(resume.Journal, "commit", counted)


@pytest.mark.parametrize(
    ("method", "commits", "resumed", "says"),
    [
        ("blocks", 1, 0, "the calibration"),
        ("blocks", 3, 2, "2 finished blocks"),
        ("distill", 1, 0, "the calibration"),
        ("distill", 3, 4, "4 finished steps"),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_bytes(
    place: Path,
    tmp_path: Path,
    undisturbed: dict[str, dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    commits: int,
    resumed: int,
    says: str,
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, commits, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt, match=rf"\.out\.resume: {says}.*--resume"):
            run_here(place, out, method)
    assert not out.exists()
    report = run_here(place, out, method)
    assert report.resumed == resumed
    assert files(out) == undisturbed[method]
    assert leftovers(out) == []


@pytest.mark.parametrize("method", METHODS)
def test_a_full_disk_loses_nothing_that_was_finished(
    place: Path,
    tmp_path: Path,
    undisturbed: dict[str, dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    from dropbydrop.system import atomic_folder as folder_module

    write = folder_module.AtomicFolder.write

    def full(self: Any, name: str, chunks: Any) -> None:
        write(self, name, chunks)
        if name == "model.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(folder_module.AtomicFolder, "write", full)
        with pytest.raises(DropError, match=r"disk is full.* finished (steps|blocks).*--resume"):
            run_here(place, out, method)
    assert run_here(place, out, method).resumed == (5 if method == "distill" else 3)
    assert files(out) == undisturbed[method]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"learning_rate": 0.01}, r"learning-rate \(0\.\d+ then, 0.01 now\)"),
        ({"epochs": 4}, "epochs"),
        ({"seed": 1}, r"seed \(0 then, 1 now\)"),
        ({"train": "scales"}, "train"),
        ({"method": "blocks"}, "method"),
        ({"together": True}, "together"),
        ({"bits": [2]}, "bits"),
        ({"seq_len": 16}, "seq-len"),
    ],
)
def test_other_orders_are_refused(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    says: str,
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 2, Stop())
        with pytest.raises(Stop):
            run_here(place, out, "distill")
    with pytest.raises(DropError, match=says):
        run_here(place, out, **{"method": "distill", **changes})


def test_without_resume_nothing_is_kept(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any) -> None:
        raise Stop

    monkeypatch.setattr(pipeline, "write_tuned", failing)
    with pytest.raises(Stop):
        run_here(place, tmp_path / "out", "distill", resume=False)
    assert list(tmp_path.iterdir()) == []
