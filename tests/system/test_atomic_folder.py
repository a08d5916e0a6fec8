"""Files and folders that appear whole or not at all, and locks."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
from pathlib import Path

import pytest

from dropbydrop.system import atomic_folder
from dropbydrop.system.atomic_folder import AtomicFolder, hidden, replacing, write_whole
from dropbydrop.system.errors import DropError
from dropbydrop.system.exchange import exchange
from dropbydrop.system.file_errors import file_errors
from dropbydrop.system.locks import is_locked, lock


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


@pytest.mark.parametrize("kind", ["partial", "resume"])
def test_an_old_folder_that_was_moved_aside_comes_back(tmp_path: Path, kind: str) -> None:
    """A process was killed between two renames, with either kind of work folder; any run mends."""
    work, out = tmp_path / f".out.{kind}", tmp_path / "out"
    (work / "old").mkdir(parents=True)
    (work / "old" / "file").touch()
    (work / "checkpoint").mkdir()
    AtomicFolder(out, lambda folder: None).discard()
    assert names(out) == ["file"]
    assert names(tmp_path) == ([".out.resume"] if kind == "resume" else []) + ["out"]


@pytest.mark.parametrize("can", [True, False])
def test_replacing_never_leaves_a_moment_without_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can: bool
) -> None:
    """At every step of `publish` OUT is the old or the new folder; without exchange, all but one.
    An interrupt there puts the old one back."""
    out, seen = tmp_path / "out", []
    real = os.rename

    def watched(a: Path, b: Path) -> None:
        real(a, b)
        seen.append(names(out) if out.exists() else None)
        if seen[-1] is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", watched)
    if not can:
        monkeypatch.setattr(atomic_folder, "exchange", lambda one, other: False)
    out.mkdir()
    (out / "old").touch()
    with AtomicFolder(out, lambda folder: None) as folder:
        folder.write("new", [b"new"])
        if can:
            folder.publish()
        else:
            with pytest.raises(KeyboardInterrupt):
                folder.publish()
    assert seen == ([] if can else [None, ["old"]])
    assert names(out) == (["new"] if can else ["old"])
    assert names(tmp_path) == ["out"]


def test_exchange(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange folders")
    assert names(tmp_path / "a") == ["b"]
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "c")
    assert names(tmp_path) == ["a", "b"]


def test_a_symbolic_link_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to("elsewhere")
    with pytest.raises(DropError, match=r"out is a symbolic link.*elsewhere"):
        AtomicFolder(tmp_path / "out", lambda folder: None)
    assert names(tmp_path) == ["elsewhere", "out"]


@pytest.mark.parametrize("held", ["partial", "resume", None])
def test_two_writers_on_one_folder(tmp_path: Path, held: str | None) -> None:
    """The second is refused at once, whichever kind of run the first one is, and drops nothing."""
    out = tmp_path / "out"
    out.mkdir()
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    place = hidden(out, held) if held else out
    process = context.Process(target=_hold, args=(place, True, theirs))
    process.start()
    assert ours.recv() == "held"
    before = names(tmp_path)
    with pytest.raises(DropError, match="another process is working on"):
        AtomicFolder(out, lambda folder: None)
    assert names(tmp_path) == before
    process.kill()
    process.join()
    AtomicFolder(out, lambda folder: None).discard()


def test_what_a_dead_process_left_is_removed(tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "file"
    (hidden(out, "partial") / "checkpoint").mkdir(parents=True)
    (tmp_path / ".file.partial-00").touch()
    AtomicFolder(out).discard()
    with replacing(file) as partial:
        write_whole(file, b"of another process")  # leaves alone what a living one writes
        assert partial.exists()
        partial.write_bytes(b"new")
    assert names(tmp_path) == ["file"]
    assert file.read_bytes() == b"new"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_whole(path, b"first")
    write_whole(path, b"second")
    with pytest.raises(ZeroDivisionError), replacing(path) as partial:
        partial.write_bytes(bytes(1 // partial.write_bytes(b"")))
    assert path.read_bytes() == b"second"
    with pytest.raises(OSError, match="not empty"), replacing(path.parent, folder=True):
        pass
    assert names(tmp_path) == ["new"]
    assert names(tmp_path / "new") == ["file"]


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, r"the disk is full: .*out could not be .* GB are free in"),
        (errno.EACCES, r"out cannot be read or written \(Permission denied\)\. Change its perm"),
        (errno.EROFS, r"cannot be written to: choose another place\. Or later\."),
        (errno.EIO, r"The disk fails: copy"),
        (errno.ENXIO, r"Check the path and the disk"),
    ],
)
def test_every_os_error_says_what_to_do(tmp_path: Path, number: int, says: str) -> None:
    cleaned = []
    with (
        pytest.raises(DropError, match=says),
        file_errors(tmp_path / "out", "Or later.", lambda: cleaned.append(1)),
    ):
        raise OSError(number, os.strerror(number))
    assert cleaned == [1]
    with (
        pytest.raises(DropError, match=r"lacking cannot be read .*removed or renamed"),
        file_errors(tmp_path / "out"),
    ):
        (tmp_path / "lacking").read_bytes()


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
