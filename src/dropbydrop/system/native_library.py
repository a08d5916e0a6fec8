"""Where the compiled libraries are.

In a wheel they lie beside the sources, in `_native/`. An editable install keeps the sources in the
checkout and puts what it built into input group-packages; the package's `__path__` then has both
folders.
"""

from __future__ import annotations

import sys
from pathlib import Path

_SUFFIX = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")


def library_path(stem: str) -> Path:
    """The library `lib<stem>`: the first that is there, else where it was expected."""
    folders = [Path(folder) for folder in sys.modules["dropbydrop"].__path__]
    paths = [folder / "_native" / f"lib{stem}.{_SUFFIX}" for folder in folders]
    return next((path for path in paths if path.is_file()), paths[0])


def built_libraries() -> list[Path]:
    """The libraries that are there: what results may depend on beside the sources."""
    paths = [library_path(stem) for stem in ("drop_kernels", "drop_search")]
    return [path for path in paths if path.is_file()]
