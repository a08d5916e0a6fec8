"""Every file operation of some work fails in turn, and the disk afterwards is what it would be.

`Watch` stands between this process and the operations that change files: creating and opening for
writing, write, truncate, fsync, rename, exchange, mkdir, unlink, rmdir. Before each it calls a hook
with its number. From this come

    states(work)         what is on the disk when the process dies: killed before each operation,
                         killed in the middle of each write, and after a power cut. No process is
                         started: the work runs once, and the tree is copied at each moment
    disturbed(work, k, …) the work with an OSError, or a signal, at operation k

The power cut is the worst that POSIX allows: a file has what its last fsync saw, and a folder has
the names that its own last fsync saw. (Real file systems keep more, and in order.) A file whose
name is durable and whose content never was is empty. What libraries write in C or Rust is seen as
one operation where it is renamed, and its content counts as durable only after our own fsync.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import signal
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dropbydrop.system import atomic_folder


@dataclass(frozen=True)
class Half:
    """The first half of a write that is about to happen."""

    path: Path
    offset: int
    data: bytes

    def write(self, path: Path | None = None) -> None:
        """Carry it out, by default in the file itself."""
        descriptor = os.open(path or self.path, os.O_WRONLY)
        os.pwrite(descriptor, self.data, self.offset)
        os.close(descriptor)


Hook = Callable[[int, str, "Half | None"], None]
ERRORS = ("EIO", "ENOSPC", "EROFS")
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


class Watch:
    """Counts what changes files, and calls `hook(number, operation, half)` before each."""

    def __init__(self, hook: Hook) -> None:
        self.hook, self.number, self.quiet = hook, 0, False
        self.on_sync: Callable[[int], None] = lambda descriptor: None

    def step(self, operation: str, half: Half | None = None) -> None:
        if not self.quiet:  # the harness itself writes files, too
            self.number += 1
            self.quiet = True
            try:
                self.hook(self.number, operation, half)
            finally:
                self.quiet = False

    @contextmanager
    def __call__(self) -> Iterator[Watch]:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("rename", "replace", "mkdir", "unlink", "rmdir"):
                patch.setattr(os, name, self._counted(name, getattr(os, name)))
            patch.setattr(
                atomic_folder, "exchange", self._counted("exchange", atomic_folder.exchange)
            )
            patch.setattr(os, "fsync", self._synced())
            opener = self._opened(builtins.open)
            patch.setattr(builtins, "open", opener)
            patch.setattr(io, "open", opener)
            yield self

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.step(name)
            return real(*args, **kwargs)

        return counted

    def _synced(self) -> Callable[[int], None]:
        def fsync(descriptor: int) -> None:
            self.step("fsync")
            os.fstat(descriptor)  # an OSError where there is no such file
            self.on_sync(descriptor)  # no disk is waited for: what is durable is kept here

        return fsync

    def _opened(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            writes = any(letter in mode for letter in "wax+") and not isinstance(file, int)
            if not writes:
                return real(file, mode, *args, **kwargs)
            self.step("open")
            return _File(self, real(file, mode, *args, **kwargs))

        return opened


class _File:
    """A file whose writes are counted and reach the operating system at once."""

    def __init__(self, watch: Watch, file: Any) -> None:
        self._watch, self._file = watch, file

    def write(self, data: Any) -> int:
        raw = data.encode() if isinstance(data, str) else bytes(data)
        offset = os.lseek(self._file.fileno(), 0, os.SEEK_CUR)
        self._watch.step("write", Half(Path(self._file.name), offset, raw[: len(raw) // 2]))
        count = self._file.write(data)
        self._file.flush()
        return int(count)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def truncate(self, size: int | None = None) -> int:
        self._watch.step("truncate")
        return int(self._file.truncate(size))

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Durable:
    """What a power cut leaves of a tree; see the module's note."""

    def __init__(self, root: Path) -> None:
        self.names: dict[int, dict[str, int]] = {}  # folder -> its durable names
        self.content: dict[int, bytes] = {}
        self._kept: list[int] = []  # open, so that no inode number is used again
        self.root = root.stat().st_ino
        for path in (root, *root.rglob("*")):
            self.sync(os.open(path, os.O_RDONLY))

    def sync(self, descriptor: int) -> None:
        descriptor = os.dup(descriptor)
        self._kept.append(descriptor)
        inode = os.fstat(descriptor).st_ino
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            self.names[inode] = {}
            for entry in os.scandir(f"/proc/self/fd/{descriptor}"):
                self._kept.append(os.open(entry.path, os.O_RDONLY))
                self.names[inode][entry.name] = os.fstat(self._kept[-1]).st_ino
                if entry.is_dir():
                    self.names.setdefault(os.fstat(self._kept[-1]).st_ino, {})
        else:
            self.content[inode] = Path(f"/proc/self/fd/{descriptor}").read_bytes()

    def write(self, target: Path, folder: int | None = None) -> None:
        """Lay the tree down."""
        target.mkdir()
        for name, inode in self.names[self.root if folder is None else folder].items():
            if inode in self.names:
                self.write(target / name, inode)
            else:
                (target / name).write_bytes(self.content.get(inode, b""))

    def close(self) -> None:
        for descriptor in self._kept:
            os.close(descriptor)


@dataclass(frozen=True)
class State:
    """The tree that a dead process left."""

    number: int
    operation: str
    kind: str  # "kill", "torn" or "power cut"
    root: Path


def states(
    root: Path, work: Callable[[Path], object], into: Path, at: Collection[int] | None = None
) -> list[State]:
    """Run `work(root)` once; the trees of the moments at which it may have died, below `into`.

    Args:
        at: numbers of operations; by default all.
    """
    found: list[State] = []
    durable = Durable(root)

    def hook(number: int, operation: str, half: Half | None) -> None:
        if at is not None and number not in at:
            return
        for kind in ("kill", "power cut", *(["torn"] if half else [])):
            place = into / f"{number}-{kind}"
            if kind == "power cut":
                durable.write(place)
            else:
                shutil.copytree(root, place, symlinks=True)
            if kind == "torn" and half:
                half.write(place / half.path.relative_to(root))
            found.append(State(number, operation, kind, place))

    watch = Watch(hook)
    watch.on_sync = durable.sync
    into.mkdir()
    with watch():
        work(root)
    durable.close()
    return found


def disturbed(
    root: Path, work: Callable[[Path], object], number: int, fault: str
) -> BaseException | None:
    """`work(root)` with a fault at its operation `number`; what it raised.

    Args:
        fault: name of an errno, or of a signal; the command line's handler is in place.
    """
    from dropbydrop.cli.main import _terminated

    def hook(at: int, operation: str, half: Half | None) -> None:
        if at != number:
            return
        if fault in SIGNALS:
            signal.raise_signal(getattr(signal, fault))
            return
        if half is not None:
            half.write()
        code = getattr(errno, fault)
        raise OSError(code, os.strerror(code))

    before = {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS}
    for name in SIGNALS:
        signal.signal(getattr(signal, name), _terminated)
    try:
        with Watch(hook)():
            work(root)
    except (Exception, KeyboardInterrupt) as error:
        return error
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
    return None


def operations(root: Path, work: Callable[[Path], object]) -> list[str]:
    """The operations of `work(root)`, in order."""
    seen: list[str] = []
    with Watch(lambda number, operation, half: seen.append(operation))():
        work(root)
    return seen
