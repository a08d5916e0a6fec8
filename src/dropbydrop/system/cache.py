"""Where results that are worth keeping between runs lie: converted GGUFs, trained codebooks."""

from __future__ import annotations

import os
from pathlib import Path

from .paths import given


def cache_dir() -> Path:
    """DROPBYDROP_CACHE, or `dropbydrop` in the user's cache folder. It may not exist yet."""
    if chosen := os.environ.get("DROPBYDROP_CACHE"):
        return given(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dropbydrop"
