"""Files and folders that appear whole or not at all, and locks."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
from pathlib import Path

import pytest

from dropbydrop.system.atomic_folder import (
    AtomicFolder,
    full_disk,
    is_locked,
    lock,
    replacing,
    write_whole,
)
from dropbydrop.system.errors import DropError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with AtomicFolder(out) as folder:
        folder.write("a", [b"one", b"two"])
        assert not out.exists()
        folder.publish()
    assert (out / "a").read_bytes() == b"onetwo"
    assert folder.files["a"].size == 6
    assert folder.files["a"].sha256 == hashlib.sha256(b"onetwo").hexdigest()
    assert names(tmp_path) == ["out"]
    with pytest.raises(ZeroDivisionError), AtomicFolder(tmp_path / "other") as folder:
        folder.write("a", (bytes([1 // n]) for n in (1, 0)))
    assert names(tmp_path) == ["out"]


def test_what_may_be_replaced_is_asked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    AtomicFolder(out).discard()  # an empty folder counts as absent
    (out / "old").write_text("old")
    with pytest.raises(DropError, match="exists; choose another name"):
        AtomicFolder(out)

    def refuse(folder: Path) -> None:
        raise DropError(f"{folder} is precious")

    with pytest.raises(DropError, match="is precious"):
        AtomicFolder(out, refuse)
    with AtomicFolder(out, lambda folder: None) as folder:
        folder.write("new", [b"new"])
        assert names(out) == ["old"]
        folder.publish()
    assert names(out) == ["new"]
    assert names(tmp_path) == ["out"]


def test_an_old_folder_that_was_moved_aside_comes_back(tmp_path: Path) -> None:
    """A process was killed between the two renames."""
    work, out = tmp_path / "work", tmp_path / "out"
    (work / "old").mkdir(parents=True)
    (work / "old" / "file").touch()
    AtomicFolder(out, lambda folder: None, work).discard()
    assert names(out) == ["file"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_whole(path, b"first")
    write_whole(path, b"second")
    with pytest.raises(ZeroDivisionError), replacing(path) as partial:
        partial.write_bytes(bytes(1 // partial.write_bytes(b"")))
    assert path.read_bytes() == b"second"
    with pytest.raises(OSError, match="not empty"), replacing(path.parent) as partial:
        partial.mkdir()
    assert names(tmp_path) == ["new"]
    assert names(tmp_path / "new") == ["file"]


def test_a_full_disk_is_said_and_other_errors_pass(tmp_path: Path) -> None:
    cleaned = []
    with (
        pytest.raises(DropError, match=r"disk is full: .*out could not be .* GB are free in"),
        full_disk(tmp_path / "out", cleanup=lambda: cleaned.append(1)),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert cleaned == [1]
    with pytest.raises(PermissionError), full_disk(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "no")


def _hold(path: Path, folder: bool, connection: object) -> None:
    lock(path, DropError("busy"), folder=folder)
    connection.send("held")  # type: ignore[attr-defined]
    connection.recv()  # type: ignore[attr-defined]


@pytest.mark.parametrize("folder", [True, False])
def test_a_lock_holds_until_its_process_ends(tmp_path: Path, folder: bool) -> None:
    path = tmp_path / "place"
    assert not is_locked(path)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_hold, args=(path, folder, theirs))
    process.start()
    assert ours.recv() == "held"
    assert is_locked(path)
    with pytest.raises(DropError, match="busy"):
        lock(path, DropError("busy"), folder=folder)
    process.kill()
    process.join()
    assert not is_locked(path)
    os.close(lock(path, DropError("busy"), folder=folder))
    assert not is_locked(path)
