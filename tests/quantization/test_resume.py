"""Runs that are killed: at every file operation, at random moments, and by a full disk.

Killed runs are forked from a server process that has everything imported, so that one try costs
milliseconds. SIGKILL cannot be caught: whatever a killed run leaves is what a power cut leaves,
except for data that was not synced (not testable here).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dropbydrop.checkpoint import Checkpoint
from dropbydrop.checkpoint import journal as resume
from dropbydrop.checkpoint.staging import StagingFile
from dropbydrop.coding.encoder import Effort
from dropbydrop.quantization import fingerprint
from dropbydrop.quantization import job as jobs
from dropbydrop.quantization import pipeline as quantize
from dropbydrop.system import atomic_folder as folder_module
from dropbydrop.system.errors import DropError
from dropbydrop.system.file_errors import file_errors
from kills import OPERATIONS, SERVER, die_at, die_at_operation
from tiny import save_tiny

BLOCKS = 3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a text."""
    root = tmp_path_factory.mktemp("resume")
    save_tiny(root / "model", "qwen2", chat=True)
    (root / "text.txt").write_text(" ".join(str(i * 7919 % 1000) for i in range(1500)))
    return root


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> dict[str, str]:
    """Names and hashes of the files of a run without --resume."""
    return files(run_here(place, place / "undisturbed", resume=False).out)


def files(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def run_here(place: Path, out: Path, **changes: Any) -> quantize.Report:
    """A run in this process; the presets' search effort is for real models."""
    settings: dict[str, Any] = {
        "calibration": place / "text.txt",
        "windows": 3,
        "seq_len": 32,
        "resume": True,
        "progress": False,
    }
    before, threads = jobs.EFFORTS, torch.get_num_threads()
    jobs.EFFORTS = dict.fromkeys(before, Effort(2, 1, 1))
    torch.set_num_threads(1)
    try:
        return quantize.quantize(place / "model", out, **{**settings, **changes})
    finally:
        jobs.EFFORTS = before
        torch.set_num_threads(threads)


# ------------------------------------------------------------------ runs in other processes


def child(place: Path, out: Path, kill: int, changes: dict[str, Any]) -> None:
    fingerprint.code_digest = lambda *rooms: "the same code"  # others may be editing it
    if kill:
        die_at_operation(kill)
    run_here(place, out, **changes)


def start(place: Path, out: Path, kill: int = 0, **changes: Any) -> Any:
    process = SERVER.Process(target=child, args=(place, out, kill, changes))
    process.start()
    return process


def finish(place: Path, out: Path, **changes: Any) -> None:
    process = start(place, out, **changes)
    process.join(60)
    assert process.exitcode == 0


def complete(out: Path) -> bool:
    """Killed after everything was done, at most before an empty folder was removed."""
    return out.exists() and not (resume.work_folder(out) / resume.JOURNAL).exists()


def leftovers(parent: Path, name: str) -> list[str]:
    return [p.name for p in parent.iterdir() if p.name.startswith(f".{name}.")]


def test_uninterrupted_with_resume_gives_the_same_bytes(
    place: Path, undisturbed: dict[str, str]
) -> None:
    report = run_here(place, place / "plain")
    assert files(report.out) == undisturbed
    assert report.resumed == 0
    assert leftovers(place, "plain") == []
    assert Checkpoint.open(report.out).verify() == []


@pytest.mark.slow
def test_killed_again_and_again(place: Path, undisturbed: dict[str, str]) -> None:
    """Every attempt is killed two operations later and starts from what the last one left."""
    out = place / "operations"
    kill, seen = -1, set()
    while True:
        kill += 2
        process = start(place, out, kill)
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        work = resume.work_folder(out)
        journal = work / resume.JOURNAL
        steps = journal.read_bytes().count(b"\n") if journal.exists() else 0
        seen.add(steps)
        if out.exists():  # whole or not at all
            assert files(out) == undisturbed
        if complete(out):
            break
    assert seen >= set(range(BLOCKS + 2))  # killed in each step, and in the final write
    assert files(out) == undisturbed
    assert leftovers(place, "operations") == []


@pytest.mark.slow
def test_killed_before_every_operation_from_the_start(
    place: Path, undisturbed: dict[str, str]
) -> None:
    """A fresh run is killed before its k-th operation; one more run finishes it."""
    out = place / "fresh"
    chosen = random.Random(0).sample(range(1, 60), 3)
    for kill in chosen:
        process = start(place, out, kill)
        process.join(60)
        if process.exitcode:
            assert process.exitcode == -signal.SIGKILL
            if not complete(out):
                finish(place, out)
                assert leftovers(place, "fresh") == []
        assert files(out) == undisturbed
        out.rename(place / f"fresh-{kill}")


def test_killed_at_random_moments(place: Path, undisturbed: dict[str, str]) -> None:
    finish(place, place / "warm")  # starts the server
    mark = time.perf_counter()
    finish(place, place / "timed")
    whole = time.perf_counter() - mark
    moments = random.Random(1)
    out = place / "random"
    for _ in range(15):
        process = start(place, out)
        process.join(moments.uniform(0.3, 1.05) * whole)
        process.kill()
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        if complete(out):
            break
    else:
        finish(place, out)
    assert files(out) == undisturbed


@pytest.fixture(scope="module")
def older(place: Path) -> Path:
    """A checkpoint that is going to be replaced."""
    return run_here(place, place / "older", resume=False, seed=1).out


@pytest.mark.parametrize("kill", [1, 2, 3, 4, 5, 7])
def test_overwriting_keeps_the_old_checkpoint_until_the_end(
    place: Path, undisturbed: dict[str, str], older: Path, kill: int
) -> None:
    """Killed around the exchange of the folders: the old one or the new one, never a mixture."""
    out = place / f"overwritten{kill}"
    shutil.copytree(older, out)
    process = SERVER.Process(target=exchange_child, args=(place, out, kill))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    if out.exists():
        assert files(out) in (files(older), undisturbed)
    finish(place, out, overwrite=True)
    assert files(out) == undisturbed
    assert leftovers(place, out.name) == []


def exchange_child(place: Path, out: Path, kill: int) -> None:
    """Killed at the `kill`-th operation after the assembled folder is announced."""
    fingerprint.code_digest = lambda *rooms: "the same code"
    announce = resume.Journal.publishing

    def announced(self: resume.Journal, record: Any) -> None:
        announce(self, record)
        die_at(kill, *((os, name) for name in OPERATIONS if name != "mkdir"))

    resume.Journal.publishing = announced  # type: ignore[method-assign]
    run_here(place, out, overwrite=True)


# ------------------------------------------------------------------------ disks and signals


def stop_at_block(monkeypatch: pytest.MonkeyPatch, block: int, error: BaseException) -> None:
    real = quantize.BlockEncoder.encode_block

    def failing(self: Any, i: int, *args: Any) -> None:
        if i == block:
            raise error
        real(self, i, *args)

    monkeypatch.setattr(quantize.BlockEncoder, "encode_block", failing)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_at(monkeypatch: pytest.MonkeyPatch, what: str, count: int) -> None:
    """The disk is full at the count-th write of a kind, after half of the bytes went through."""
    left = [count]

    def due() -> bool:
        left[0] -= 1
        return left[0] == 0

    if what == "spill":
        add = StagingFile.add

        def failing_add(self: StagingFile, name: str, tensor: torch.Tensor) -> None:
            if due():
                self.file.write(b"x" * 1000)
                self.file.flush()
                raise FULL
            add(self, name, tensor)

        monkeypatch.setattr(StagingFile, "add", failing_add)
    elif what == "hidden":
        add_hidden = StagingFile.add

        def failing_hidden(self: StagingFile, name: str, tensor: torch.Tensor) -> None:
            if name != "hidden":
                return add_hidden(self, name, tensor)
            add_hidden(self, name, tensor[: len(tensor) // 2] if left[0] == 1 else tensor)
            if due():
                raise FULL

        monkeypatch.setattr(StagingFile, "add", failing_hidden)
    elif what == "journal":
        dumps = json.dumps

        class Torn(bytes):
            pass

        def torn(file: Any, data: bytes) -> None:
            file.write(data[: len(data) // 2])
            file.flush()
            raise FULL

        append = resume.Journal._append

        def failing_append(self: resume.Journal, record: Any) -> None:
            if not due():
                return append(self, record)
            with (
                file_errors(self.out),
                open(self._journal, "ab") as file,
            ):
                torn(file, dumps(record).encode())

        monkeypatch.setattr(resume.Journal, "_append", failing_append)
    else:
        write_file = folder_module.AtomicFolder.write

        def failing_file(self: Any, name: str, chunks: Any) -> None:
            write_file(self, name, chunks)
            if due():
                raise FULL

        monkeypatch.setattr(folder_module.AtomicFolder, "write", failing_file)


@pytest.mark.parametrize(
    ("what", "count", "blocks"),
    [
        ("spill", 80, 1),
        ("spill", 120, 2),
        ("hidden", 3, 1),
        ("journal", 4, 1),
        ("journal", 5, 2),
        ("final", 1, 3),
        ("final", 4, 3),
    ],
)
def test_a_full_disk_loses_no_finished_block(
    place: Path,
    undisturbed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    count: int,
    blocks: int,
) -> None:
    out = place / f"full-{what}-{count}"
    with monkeypatch.context() as patch:
        full_at(patch, what, count)
        with pytest.raises(DropError, match=rf"disk is full.* {blocks} finished blocks.*--resume"):
            run_here(place, out)
    assert not out.exists()
    assert not (resume.work_folder(out) / "checkpoint").exists()  # frees what it can
    report = run_here(place, out)
    assert report.resumed == blocks
    assert files(out) == undisturbed
    assert leftovers(place, out.name) == []


def test_ctrl_c_keeps_the_work_and_says_so(
    place: Path, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = place / "ctrl-c"
    with monkeypatch.context() as patch:
        stop_at_block(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt, match=r"\.ctrl-c\.resume: 2 finished blocks"):
            run_here(place, out)
    assert leftovers(place, "ctrl-c") == [".ctrl-c.resume"]
    with monkeypatch.context() as patch:  # a bug is not hidden, and keeps its traceback
        stop_at_block(patch, 2, ZeroDivisionError())
        with pytest.raises(ZeroDivisionError) as caught:
            run_here(place, out)
        assert "2 finished blocks" in caught.value.__notes__[0]
    report = run_here(place, out)
    assert report.resumed == 2
    assert report.matrices == 3 * 7
    assert files(out) == undisturbed


def test_sets_of_finished_sites_are_kept(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_here(place, place / "learned", codebooks="learned", resume=False)
    out = place / "learned-again"
    with monkeypatch.context() as patch:
        stop_at_block(patch, 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run_here(place, out, codebooks="learned")
    assert run_here(place, out, codebooks="learned").resumed == 1
    assert files(out) == files(whole.out)


def test_the_command_says_how_to_go_on(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dropbydrop.cli import main as cli

    monkeypatch.setattr(jobs, "EFFORTS", {"fast": Effort(2, 1, 1)})
    argv = ["dropbydrop", "quantize", place / "model", place / "cli", "--preset", "fast",
            "--calibration", place / "text.txt", "--windows", 3, "--seq-len", 32, "--resume",
            "--json"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(a) for a in argv])
    with monkeypatch.context() as patch:
        stop_at_block(patch, 1, KeyboardInterrupt())
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert stop.value.code == 130
    assert "1 finished blocks. Give the same command again" in capsys.readouterr().err
    cli.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["resumed_blocks"] == 1


def test_without_resume_nothing_is_kept(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at_block(monkeypatch, 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run_here(place, place / "nothing", resume=False)
    assert leftovers(place, "nothing") == []


# ----------------------------------------------------------------------------------- guards


@pytest.fixture
def half(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """OUT of a run that was interrupted in its third block."""
    with monkeypatch.context() as patch:
        stop_at_block(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run_here(place, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 1}, r"seed \(0 then, 1 now\)"),
        ({"bits": (2, 3)}, "bits"),
        ({"head_bits": 16}, "head-bits"),
        ({"windows": 4}, r"windows \(3 then, 4 now\)"),
        ({"seq_len": 16}, "seq-len"),
        ({"preset": "fast"}, "preset"),
        ({"codebooks": "learned"}, r'codebooks \("universal" then, "learned" now\)'),
        ({"backend": "torch"}, "backend"),
    ],
)
def test_other_options_are_refused(
    place: Path,
    half: Path,
    changes: dict[str, Any],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(DropError, match=says):
        run_here(place, half, **changes)
    stop_at_block(monkeypatch, 2, ValueError())  # still there, and still good
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        run_here(place, half)
    assert "2 finished blocks" in caught.value.__notes__[0]


def test_other_files_are_refused(
    place: Path, half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "place"
    save_tiny(other / "model", "qwen2", seed=1, chat=True)
    (other / "text.txt").write_text((place / "text.txt").read_text())
    text = place / "text.txt"
    with pytest.raises(DropError, match=r"what differs: model \("):
        run_here(other, half, calibration=text)
    (other / "text.txt").write_text("something else")
    with pytest.raises(DropError, match=r"what differs: calibration \("):
        run_here(place, half, calibration=other / "text.txt")
    monkeypatch.setattr(fingerprint, "code_digest", lambda *rooms: "edited")
    with pytest.raises(DropError, match=r"what differs: dropbydrop \("):
        run_here(place, half)


def test_damaged_work_is_refused(place: Path, half: Path) -> None:
    work = resume.work_folder(half)
    for name in ("plane-2.raw", "hidden-2.raw"):
        content = (work / name).read_bytes()
        (work / name).write_bytes(content[:-1])
        with pytest.raises(DropError, match=rf"{name} .* damaged. Remove it"):
            run_here(place, half)
        (work / name).write_bytes(content + b"what a killed run wrote later")
    for name in ("plane-1.raw", "rest.raw", "hidden-2.raw"):
        content = (work / name).read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        (work / name).write_bytes(flipped)
        with pytest.raises(DropError, match=rf"in .*{name} is not what was written: damaged"):
            run_here(place, half)
        (work / name).write_bytes(content)
    assert run_here(place, half).resumed == 2


def test_torn_and_zeroed_journals(place: Path, half: Path, undisturbed: dict[str, str]) -> None:
    """A power cut may leave zeros where data was to come; a step back is always possible."""
    journal = resume.work_folder(half) / resume.JOURNAL
    journal.write_bytes(journal.read_bytes() + b'{"block": 2, "wri' + bytes(100))
    assert run_here(place, half).resumed == 2
    assert files(half) == undisturbed


def test_two_runs_do_not_share_a_folder(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with resume.Journal(out, {}) as work:
        work.steps.append({})
        with pytest.raises(DropError, match="another process is working"):
            run_here(place, out)
    assert list(tmp_path.iterdir()) == []


def test_bad_input_leaves_nothing_even_with_resume(place: Path, tmp_path: Path) -> None:
    with pytest.raises(DropError, match=r"none\.txt"):
        run_here(place, tmp_path / "out", calibration=tmp_path / "none.txt")
    with pytest.raises(DropError, match="create it first"):
        run_here(place, tmp_path / "no" / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(DropError, match="exists"):
        run_here(place, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
