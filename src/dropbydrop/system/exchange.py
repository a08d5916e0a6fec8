"""Two folders change places in one step, so that a name never stands for nothing.

    Linux    renameat2 with RENAME_EXCHANGE (kernel 3.15, glibc 2.28; ext4, xfs, btrfs, tmpfs, ...)
    macOS    renamex_np with RENAME_SWAP (APFS)

Elsewhere, and on file systems that refuse, `exchange` says so and the caller renames twice; between
the two the name is free, and who is killed there leaves the old folder to be put back.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

_AT_FDCWD = -100
_SWAP = 2  # RENAME_EXCHANGE and RENAME_SWAP alike
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


def exchange(one: Path, other: Path) -> bool:
    """Whether two existing paths have changed places; False: this system cannot, nothing was done.

    Raises:
        OSError: it can, but not these two (missing, permissions, different file systems).
    """
    try:
        library = ctypes.CDLL(None, use_errno=True)
        a, b = os.fsencode(one), os.fsencode(other)
        if sys.platform == "darwin":
            failed = library.renamex_np(a, b, ctypes.c_uint(_SWAP))
        else:
            failed = library.renameat2(_AT_FDCWD, a, _AT_FDCWD, b, ctypes.c_uint(_SWAP))
    except (OSError, TypeError, AttributeError):  # no such call in this system's C library
        return False
    if not failed:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(other))
