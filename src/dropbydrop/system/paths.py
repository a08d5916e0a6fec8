"""Paths that somebody wrote: on the command line, in a Python call, in a description of a run.

One rule for all of them: `~` and `~user` in front mean what they mean to a shell, which expands
them in `OUT` but not in `--save=~/plan.json`; a `~` in front of no user's name is part of the name.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


def given(path: str | Path) -> Path:
    """The path that was meant."""
    return Path(os.path.expanduser(path))  # Path.expanduser raises where there is no such user


def absolute(path: str | Path) -> Path:
    """The same from the root of the file system, without `..`; symbolic links are kept."""
    return Path(os.path.abspath(given(path)))


def regular(path: str, flags: int) -> int:
    """`opener=` of `open` for what must be a file: a pipe would be waited for without end.

    Raises:
        OSError: it is none.
    """
    number = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError("it is no regular file")
    return number
