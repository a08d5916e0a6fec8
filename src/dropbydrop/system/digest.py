"""SHA-256 of files, of models and of the code that a result depends on.

Work that is resumed or taken from a cache is compared by these digests. `code_digest` covers the
rooms that it is given and no more, so that an edited help text does not invalidate a run of days.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .native_library import built_libraries

CODING_ROOMS = (  # what can change the codes, scales and rotations of a checkpoint
    "coding", "models", "data", "quantization", "checkpoint",
    "system/accelerator.py", "system/distributed.py", "system/native_library.py",
)  # fmt: skip
_SOURCES = (".py", ".cu", ".safetensors")
_MODEL_FILES = (".json", ".safetensors", ".model", ".txt", ".jinja")
_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 (hex) of a file."""

    size: int
    sha256: str


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(*paths: Path) -> str:
    """SHA-256 over names and contents of files.

    Raises:
        FileNotFoundError: one of them is missing.
    """
    total = hashlib.sha256()
    for path in paths:
        total.update(f"{path.name} {file_digest(path)}\n".encode())
    return total.hexdigest()


def model_digest(folder: Path) -> str:
    """SHA-256 over config, weights and tokenizer of a Hugging Face folder."""
    return digest(*sorted(p for p in folder.iterdir() if p.suffix in _MODEL_FILES and p.is_file()))


def code_digest(*rooms: str) -> str:
    """SHA-256 over sources of this package, shipped codebooks and native libraries.

    Args:
        rooms: folders or files of the package, relative to it; by default `CODING_ROOMS`.

    Raises:
        FileNotFoundError: no such room. A file that was renamed must not drop out silently.
    """
    total = hashlib.sha256()
    for name, path in sorted(_sources(rooms or CODING_ROOMS)):
        total.update(f"{name} {file_digest(path)}\n".encode())
    return total.hexdigest()


def _sources(rooms: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """Name and path of every file that belongs to the rooms, and of the native libraries."""
    for room in rooms:
        root = _PACKAGE / room
        if not root.exists():
            raise FileNotFoundError(f"{room} is no folder and no file of dropbydrop.")
        for path in [root] if root.is_file() else root.rglob("*"):
            if path.suffix in _SOURCES and path.is_file():
                yield path.relative_to(_PACKAGE).as_posix(), path
    for path in built_libraries():
        yield path.name, path
