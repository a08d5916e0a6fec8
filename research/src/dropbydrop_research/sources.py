"""Which files of dropbydrop and of this package a result depends on."""

from __future__ import annotations

from pathlib import Path

import dropbydrop
from dropbydrop.system.errors import DropError

_OURS = Path(__file__).parent
_CORE = Path(dropbydrop.__file__).parent


def files_of(*names: str) -> list[Path]:
    """Files by their path in either package, folders walked, sorted.

    Raises:
        DropError: a name that neither package has: a file was renamed, and results that were made
            with it would be taken for current ones.
    """
    found: set[Path] = set()
    for name in names:
        path = next((root / name for root in (_OURS, _CORE) if (root / name).exists()), None)
        if path is None:
            raise DropError(f"{name} is in neither dropbydrop nor dropbydrop_research.")
        found |= {path} if path.is_file() else {p for p in path.rglob("*") if p.is_file()}
    return sorted(p for p in found if p.suffix != ".pyc")
