"""A folder that appears whole or not at all.

Files are written into a hidden folder beside OUT, hashed and synced one by one; `publish` renames
the hidden folder to OUT, which is atomic. Whatever goes wrong before (an error, Ctrl-C, a full
disk), `discard` removes the hidden folder and OUT is as it was.

With a work folder (runs that can be resumed) everything lies inside of it, also an old OUT that is
being replaced. A process that is killed between the two renames leaves no OUT; the next one to
open the same work folder puts the old OUT back first.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dropbydrop.errors import DropError, FormatError

from .config import FORMAT, MANIFEST_FILE
from .files import FileEntry, read_json

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class AtomicFolder:
    """The hidden folder `.<name>.partial-<pid>-<random>` beside `out`.

    Args:
        out: the folder to create; its parent must exist. An empty folder counts as absent.
        overwrite: replace an existing checkpoint when publishing. Anything that is not a
            dropbydrop checkpoint is never replaced.
        work: the folder of a run that can be resumed; the hidden folder is `checkpoint` in it.

    Raises:
        DropError: `out` exists, its parent does not, or the disk is full.
    """

    def __init__(self, out: Path, overwrite: bool = False, work: Path | None = None) -> None:
        self.out, self.overwrite, self.work = out, overwrite, work
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

    def write(self, name: str, chunks: Iterable[bytes]) -> None:
        """Write a file (mode 0666 less the umask) and record its size and SHA-256."""
        digest, size = hashlib.sha256(), 0
        with open(self.path / name, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
            file.flush()
            os.fsync(file.fileno())
        self.files[name] = FileEntry(size, digest.hexdigest())

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

    @contextmanager
    def disk_errors(self) -> Iterator[None]:
        """Turn a full disk into an error that says so, after removing what was written."""
        advice = "What was written has been removed again; {free} in {parent}. "
        advice += "Free some space or choose another folder."
        if self.work is not None:
            advice = "{free} in {parent}. Free some space."
        with full_disk(self.out, advice, self.discard):
            yield

    def _check_out(self) -> None:
        if not self.out.parent.is_dir():
            raise DropError(f"{self.out.parent} is not a folder; create it first.")
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return
        if not self.overwrite:
            raise DropError(f"{self.out} exists; choose another name, or ask to overwrite it.")
        try:
            ours = read_json(self.out / MANIFEST_FILE).get("format") == FORMAT
        except (FormatError, AttributeError):
            ours = False
        if not ours:
            raise DropError(
                f"{self.out} exists and is not a dropbydrop checkpoint, so it is not overwritten. "
                "Choose another name, or remove it yourself."
            )


@contextmanager
def full_disk(out: Path, advice: str, cleanup: Callable[[], None]) -> Iterator[None]:
    """Turn the OSError of a full disk into a DropError, after `cleanup`.

    `advice` may use {free} ("1.23 GB are free") and {parent}, the folder that holds `out`.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        cleanup()
        free = f"{shutil.disk_usage(out.parent).free / 1e9:.2f} GB are free"
        raise DropError(
            f"the disk is full: {out} could not be written ({os.strerror(error.errno)}). "
            + advice.format(free=free, parent=out.parent)
        ) from error


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable (not every platform lets a folder be opened)."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
