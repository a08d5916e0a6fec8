"""Mutated GGUF headers: a model or one of our errors, and nothing left in the cache.

`python tests/fuzz/test_gguf.py 500` runs a campaign of so many.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from dropbydrop.models.sources import convert_gguf
from dropbydrop.system.errors import DropError
from tiny import write_gguf

_NUMBERS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)


def mutant(content: bytes, seed: int) -> bytes:
    """`content` with a fault in its header (magic, counts, keys, values, tensor list)."""
    draw = random.Random(seed)
    header = content.index(b"output_norm.weight") + 4096
    at = draw.randrange(4, min(header, len(content)))
    kind = draw.choice(("bit", "number", "bytes", "cut", "hole"))
    if kind == "bit":
        changed = content[at] ^ (1 << draw.randrange(8))
        return content[:at] + bytes([changed]) + content[at + 1 :]
    if kind == "number":
        at = draw.choice((8, 16, at))  # counts of tensors and of keys, or anything
        return content[:at] + draw.choice(_NUMBERS).to_bytes(8, "little") + content[at + 8 :]
    if kind == "bytes":
        return content[:at] + draw.randbytes(draw.randrange(1, 9)) + content[at + 8 :]
    return content[:at] if kind == "cut" else content[:at] + content[at + draw.randrange(1, 64) :]


def outcome(content: bytes, folder: Path, seed: int) -> str:
    """What becomes of a mutant; the cache has nothing half-written afterwards."""
    file, cache = folder / f"{seed}.gguf", Path(os.environ["DROPBYDROP_CACHE"])
    file.write_bytes(mutant(content, seed))
    try:
        made: Path | None = convert_gguf(file)
    except DropError:
        made = None
    finally:
        file.unlink()
    left = [path.name for path in cache.iterdir()] if cache.is_dir() else []
    assert all(not name.startswith(".") for name in left), left
    return "refused" if made is None else "read"


def test_mutated_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("DROPBYDROP_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "whole.gguf")
    content = (tmp_path / "whole.gguf").read_bytes()
    found = Counter(outcome(content, tmp_path, seed) for seed in range(20))
    assert found["refused"] >= 5


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        os.environ["DROPBYDROP_CACHE"] = f"{place}/cache"
        write_gguf(Path(place) / "whole.gguf")
        whole = (Path(place) / "whole.gguf").read_bytes()
        print(Counter(outcome(whole, Path(place), seed) for seed in range(int(sys.argv[1]))))
