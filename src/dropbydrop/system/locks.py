"""The lock of a folder or file: one process at a time, and a dead process holds none.

Locks are those of flock(2): they belong to an open file and vanish with its last process, so that
whoever gets a lock knows that its last owner is dead or done. File systems without such locks (some
network ones) and platforms without fcntl have no protection against two processes.
"""

from __future__ import annotations

import errno
import os
import time
from contextlib import suppress
from pathlib import Path

from .errors import DropError

_NO_LOCKS = (errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def lock(path: Path, busy: DropError, *, folder: bool = True) -> int:
    """Lock a folder, or a file, for this process; it is created if there is none.

    Returns:
        A descriptor: the lock is held until it is closed, or the process ends however it ends.

    Raises:
        busy: another process holds it.
        OSError: it cannot be created or opened; ELOOP for a symbolic link.
    """
    while True:
        if folder:
            path.mkdir(exist_ok=True)
        flags = os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT
        descriptor = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
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
    except ImportError:
        return True
    for _ in range(1 if shared else 5):  # whoever only asks holds the lock for an instant
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0 if shared else 0.02)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return True
            raise
    return False
