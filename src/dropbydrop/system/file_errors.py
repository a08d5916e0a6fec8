"""Every OSError becomes one error of ours here: the file, the reason, what to do.

An OSError says what the operating system refused, seldom what a user can do about it. It is raised
deep in a write or a read, so the place that knows the folder in question wraps its work in
`file_errors`; the command line wraps what is left (cli/main.py).
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import DropError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MENDS = {
    errno.EACCES: "Change its permissions, or choose another place.",
    errno.EPERM: "Change its permissions, or choose another place.",
    errno.EROFS: "This file system cannot be written to: choose another place.",
    errno.EIO: "The disk fails: copy what you need from it, and use another one.",
    errno.ENOENT: "It was removed or renamed meanwhile; run the command again.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.EMFILE: "Too many files are open: raise the limit (ulimit -n).",
    errno.ENFILE: "Too many files are open: close other programs.",
    errno.ENOTDIR: "A part of its path is a file: check the path.",
    errno.EISDIR: "It is a folder: name a file.",
    errno.ENOTEMPTY: "Another process writes there: run the command again.",
    errno.EBUSY: "It is in use, perhaps a mount point: name a folder inside of it.",
    errno.EXDEV: "It is a mount point: name a folder inside of it.",
    errno.ELOOP: "It is a symbolic link: name what it points to.",
}


def of_os_error(error: OSError, path: Path, advice: str = "") -> DropError:
    """The DropError that tells of an OSError.

    Args:
        path: the file or folder of the work, named where the error itself names none.
        advice: what else to do, or what was done.
    """
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in _FULL:
        place = next((p for p in (path, *path.parents) if p.is_dir()), Path("/"))
        free = shutil.disk_usage(place).free / 1e9
        return DropError(
            f"the disk is full: {path} could not be written ({reason}). {free:.2f} GB are free in "
            f"{place}. {advice or 'Free some space.'}"
        )
    named = error.filename if isinstance(error.filename, str | os.PathLike) else path
    mend = _MENDS.get(error.errno or 0, "Check the path and the disk, and run the command again.")
    mend = f"{mend} {advice}".rstrip()
    return DropError(f"{named} cannot be read or written ({reason}). {mend}")


@contextmanager
def file_errors(
    path: Path, advice: str = "", cleanup: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Turn an OSError into the DropError of `of_os_error`, after `cleanup`."""
    try:
        yield
    except OSError as error:
        cleanup()
        raise of_os_error(error, path, advice) from error
