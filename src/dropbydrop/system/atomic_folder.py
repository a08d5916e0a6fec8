"""Files and folders that appear whole or not at all.

    AtomicFolder    many files; written into a hidden folder beside OUT, hashed and synced one by
                    one, then put in the place of OUT
    replacing       one file, or a new folder, written under a hidden name

Beside OUT lies `.OUT.partial` while a run works on it (`.OUT.resume` for a run that can be resumed,
checkpoint/journal.py), locked by its process. In it:

    checkpoint/     what becomes OUT
    untuned/        what tuning starts from, in a run that quantizes and tunes
    old/            an OUT that is being replaced, where folders cannot be exchanged (exchange.py)

A rename is atomic. Whatever goes wrong before it (an error, a signal, a full disk) leaves OUT as it
was, and OUT is never absent, since the new folder and the old one change places in one step. Where
the system cannot, there are two renames; a process that is killed between them leaves `old/`, which
the next run on the same OUT puts back. That run also removes what a killed one has left, and is
refused while the other is alive.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from .digest import FileEntry, FileHasher
from .errors import DropError
from .exchange import exchange
from .file_errors import file_errors
from .locks import is_locked, lock

_CHUNK = 8 << 20
_CHECKPOINT, _OLD = "checkpoint", "old"
_WORK = ("partial", "resume")  # .OUT.partial, .OUT.resume


def hidden(out: Path, kind: str) -> Path:
    """The folder beside OUT where a run of this kind works: "partial" or "resume"."""
    return out.parent / f".{out.name}.{kind}"


def claim(out: Path, kind: str) -> int:
    """Lock the work folder of OUT, bring back an OUT that was moved aside, remove dead leftovers.

    Returns:
        A descriptor that holds the lock.

    Raises:
        DropError: OUT is a symbolic link, its parent is no folder, or another process works on it.
    """
    if not out.parent.is_dir():
        raise DropError(f"{out.parent} is not a folder; create it first.")
    if out.is_symlink():
        raise DropError(
            f"{out} is a symbolic link, which is not replaced: name the folder that it points to, "
            f"{os.path.realpath(out)}."
        )
    work = hidden(out, kind)
    held = lock(work, _busy(out, work))
    try:
        if is_locked(out):
            raise _busy(out, out)
        for other in (hidden(out, name) for name in _WORK if name != kind):
            if is_locked(other):
                raise _busy(out, other)
            _settle(out, other)
            if other.name.endswith(_WORK[0]):
                remove(other)
        _settle(out, work)
        for rest in work.iterdir() if kind == _WORK[0] else ():
            remove(rest)
        sync_folder(out.parent)
    except BaseException:
        try:
            with suppress(OSError):
                work.rmdir()  # only if there is nothing in it
        finally:
            os.close(held)
        raise
    return held


def refuse_work_on(out: Path) -> None:
    """Raises DropError while a run works beside OUT, which will replace it in the end."""
    for work in (hidden(out, kind) for kind in _WORK):
        if is_locked(work):
            raise _busy(out, work)


def _busy(out: Path, held: Path) -> DropError:
    return DropError(
        f"another process is working on {out} (it holds {held}); wait for it, or choose another "
        "name."
    )


def _settle(out: Path, work: Path) -> None:
    """Put back an old OUT, and remove a new one that was not finished."""
    if (work / _OLD).exists() and not out.exists():
        os.rename(work / _OLD, out)
    for rest in (work / _CHECKPOINT, work / _OLD):
        remove(rest)


def remove(folder: Path) -> None:
    """Remove a folder and what is in it, as far as that is possible."""
    shutil.rmtree(folder, ignore_errors=True)


class AtomicFolder:
    """A folder in the making; leaving it as a context manager discards what was not published.

    Args:
        out: the folder to create; its parent must exist. An empty folder counts as absent.
        replace: called with an `out` that has files in it, before anything is written and again
            before the exchange; raises DropError if it may not be replaced. None: nothing is.
        work: the folder of a run that can be resumed, which is claimed already.

    Attributes:
        path: the hidden folder.
        files: name -> size and digests of what `write` wrote.

    Raises:
        DropError: `out` exists, its parent does not, another process works on it, or the disk is
            full or cannot be written to.
    """

    def __init__(
        self,
        out: Path,
        replace: Callable[[Path], None] | None = None,
        work: Path | None = None,
    ) -> None:
        self.out, self.replace, self.work = out, replace, work
        self.files: dict[str, FileEntry] = {}
        self.published = False
        self._held: int | None = None
        self._folder = work or hidden(out, _WORK[0])
        self.path = self._folder / _CHECKPOINT
        with file_errors(out):
            if work is None:
                self._held = claim(out, _WORK[0])
            try:
                remove(self.path)
                self._check_out()
                self.path.mkdir()
            except BaseException:
                self.discard()
                raise

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Write a file (mode 0666 less the umask) and record its size and digests."""
        hasher = FileHasher()
        with open(self.path / name, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
                hasher.update(chunk)
            sync(file)
        self.files[name] = hasher.entry()

    def copy(self, name: str, source: Path) -> None:
        """Write the file `source` as `name`."""
        with open(source, "rb") as file:
            self.write(name, iter(lambda: file.read(_CHUNK), b""))

    def publish(self) -> None:
        """Put the folder in the place of `out`; an old `out` is removed last."""
        sync_folder(self.path)
        self._check_out()
        old = self._folder / _OLD
        if not (self.out.exists() and any(self.out.iterdir())):
            os.rename(self.path, self.out)
        elif not exchange(self.path, self.out):
            try:
                os.rename(self.out, old)
                os.rename(self.path, self.out)
            except BaseException:
                if old.exists() and not self.out.exists():
                    os.rename(old, self.out)
                raise
        self.published = True
        sync_folder(self.out.parent)
        for rest in (self.path, old):
            remove(rest)

    def discard(self) -> None:
        """Remove what was not published, and let others work on `out`. Harmless when repeated."""
        held, self._held = self._held, None
        try:
            remove(self.path if held is None else self._folder)
        finally:  # a second Ctrl-C interrupts the cleaning up; the next run removes the rest
            if held is not None:
                os.close(held)

    def __enter__(self) -> AtomicFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.discard()

    @contextmanager
    def disk_errors(self) -> Iterator[None]:
        """Turn an OSError into an error that says what to do, after removing what was written."""
        advice = "Free some space."
        if self.work is None:
            advice = "What was written has been removed again. Free some space or choose another "
            advice += "folder."
        with file_errors(self.out, advice, self.discard):
            yield

    def _check_out(self) -> None:
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return
        if self.replace is None:
            raise DropError(f"{self.out} exists; choose another name, or ask to overwrite it.")
        self.replace(self.out)


@contextmanager
def replacing(path: Path, folder: bool = False) -> Iterator[Path]:
    """The hidden file (or folder) `.<name>.partial-<random>` to write to, made and locked; it
    becomes `path`, durably, when all went well, and is removed otherwise.

    What dead processes have left of `path` is removed first. The folder of `path` is created. A
    file replaces an old one (of a symbolic link the link itself), a folder only an empty one.

    Raises:
        OSError: as it comes; `file_errors` makes it one for users.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    partial = path.parent / f"{_partial(path)}{secrets.token_hex(8)}"
    held = lock(partial, _in_use(partial), folder=folder)
    try:
        yield partial
        for file in [partial] if partial.is_file() else partial.rglob("*"):
            if file.is_file():
                with open(file, "r+b") as opened:
                    sync(opened)
        os.replace(partial, path)
        sync_folder(path.parent)
    finally:
        try:
            remove(partial) if folder else partial.unlink(missing_ok=True)
        finally:
            os.close(held)


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file, whole or not at all (OSError)."""
    with replacing(path) as partial:
        partial.write_bytes(data)


def _partial(path: Path) -> str:
    return f".{path.name}.partial-"


def _in_use(partial: Path) -> DropError:
    return DropError(f"{partial} is in use by another process; run the command again.")


def is_partial(name: str) -> bool:
    """Whether a file of this name is one that `replacing` has not finished."""
    return name.startswith(".") and ".partial-" in name


def _sweep(path: Path) -> None:
    """Remove what processes that are dead have left of `path`."""
    for rest in [p for p in path.parent.iterdir() if p.name.startswith(_partial(path))]:
        with suppress(OSError, DropError):
            held = lock(rest, _in_use(rest), folder=rest.is_dir())
            remove(rest) if rest.is_dir() else rest.unlink(missing_ok=True)
            os.close(held)


def sync(file: IO[Any]) -> None:
    """Make what was written to an open file durable."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable (not every platform lets a folder be opened)."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
