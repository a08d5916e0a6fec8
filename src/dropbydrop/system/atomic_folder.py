"""Files and folders that appear whole or not at all, the lock of a folder, the full disk.

    AtomicFolder    many files; written into a hidden folder beside OUT, hashed and synced one by
                    one, then renamed to OUT
    replacing       one file (or a folder that nobody replaces), written under a hidden name
    lock            one process at a time
    full_disk       the OSError of a full disk becomes an error that says so

A rename is atomic. Whatever goes wrong before it (an error, Ctrl-C, a full disk) leaves OUT as it
was. With a work folder (runs that can be resumed) everything lies inside of it, also an old OUT
that is being replaced. A process that is killed between the two renames leaves no OUT; the next one
to open the same work folder puts the old OUT back first.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from .digest import FileEntry
from .errors import DropError

_CHUNK = 8 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class AtomicFolder:
    """The hidden folder `.<name>.partial-<pid>-<random>` beside `out`; leaving it as a context
    manager discards what was not published.

    Args:
        out: the folder to create; its parent must exist. An empty folder counts as absent.
        replace: called with an `out` that has files in it, before anything is written and again
            before the renames; raises DropError if it may not be replaced. None: nothing is.
        work: the folder of a run that can be resumed; the hidden folder is `checkpoint` in it.

    Attributes:
        path: the hidden folder.
        files: name -> size and SHA-256 of what `write` wrote.

    Raises:
        DropError: `out` exists, its parent does not, or the disk is full.
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
        if work is None:
            token = f"{os.getpid()}-{secrets.token_hex(4)}"
            self.path = out.parent / f".{out.name}.partial-{token}"
            self._old = out.parent / f".{out.name}.old-{token}"
        else:
            self.path, self._old = work / "checkpoint", work / "old"
            if self._old.exists() and not out.exists():
                os.rename(self._old, out)
            for rest in (self.path, self._old):
                shutil.rmtree(rest, ignore_errors=True)
        self._check_out()
        with self.disk_errors():
            self.path.mkdir()

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Write a file (mode 0666 less the umask) and record its size and SHA-256."""
        digest, size = hashlib.sha256(), 0
        with open(self.path / name, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
            sync(file)
        self.files[name] = FileEntry(size, digest.hexdigest())

    def copy(self, name: str, source: Path) -> None:
        """Write the file `source` as `name`."""
        with open(source, "rb") as file:
            self.write(name, iter(lambda: file.read(_CHUNK), b""))

    def publish(self) -> None:
        """Rename to `out`. An old `out` is moved aside first and removed last."""
        sync_folder(self.path)
        self._check_out()
        old = None
        if self.out.exists() and any(self.out.iterdir()):
            old = self._old
            os.rename(self.out, old)
        try:
            os.rename(self.path, self.out)
        except BaseException:
            if old is not None:
                os.rename(old, self.out)
            raise
        self.published = True
        sync_folder(self.out.parent)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)

    def discard(self) -> None:
        """Remove what was written; does nothing once published."""
        if not self.published:
            shutil.rmtree(self.path, ignore_errors=True)

    def __enter__(self) -> AtomicFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.discard()

    @contextmanager
    def disk_errors(self) -> Iterator[None]:
        """Turn a full disk into an error that says so, after removing what was written."""
        advice = "Free some space."
        if self.work is None:
            advice = "What was written has been removed again. Free some space or choose another "
            advice += "folder."
        with full_disk(self.out, advice, self.discard):
            yield

    def _check_out(self) -> None:
        if not self.out.parent.is_dir():
            raise DropError(f"{self.out.parent} is not a folder; create it first.")
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return
        if self.replace is None:
            raise DropError(f"{self.out} exists; choose another name, or ask to overwrite it.")
        self.replace(self.out)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The hidden name `.<name>.partial-<pid>-<random>` to write to; what is there becomes `path`
    when all went well, and is removed otherwise.

    The folder of `path` is created. A file replaces an old one; a folder replaces only an empty
    one (OSError).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        yield partial
        if partial.is_file():
            with open(partial, "r+b") as file:
                sync(file)
        os.replace(partial, path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        partial.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file, whole or not at all."""
    with replacing(path) as partial:
        partial.write_bytes(data)


@contextmanager
def full_disk(
    out: Path, advice: str = "Free some space.", cleanup: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Turn the OSError of a full disk into a DropError that ends with `advice`, after `cleanup`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        cleanup()
        free = shutil.disk_usage(out.parent).free / 1e9
        raise DropError(
            f"the disk is full: {out} could not be written ({os.strerror(error.errno)}). "
            f"{free:.2f} GB are free in {out.parent}. {advice}"
        ) from error


def lock(path: Path, busy: DropError, *, folder: bool = True) -> int:
    """Lock a folder, or a file, for this process; it is created if there is none.

    Returns:
        A descriptor: the lock is held until it is closed, or the process ends however it ends.

    Raises:
        busy: another process holds it.
    """
    while True:
        if folder:
            path.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT, 0o666)
        if not _try_lock(descriptor, shared=False):
            os.close(descriptor)
            raise busy
        # A run that finished meanwhile has removed what was just locked.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether another process holds the lock of this folder or file at the moment."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _try_lock(descriptor, shared=True)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, *, shared: bool) -> bool:
    try:
        import fcntl
    except ImportError:  # no such locks on this platform: that the path exists says it is held
        return not shared
    for _ in range(1 if shared else 5):  # whoever only asks holds the lock for an instant
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0 if shared else 0.02)
    return False


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
