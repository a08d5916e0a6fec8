"""Digests of files, of models and of the code that a result depends on.

Work that is resumed or taken from a cache is compared by SHA-256. `code_digest` covers the rooms
that it is given and no more, so that an edited help text does not invalidate a run of days.

A file of a checkpoint has two digests (`FileEntry`): SHA-256 of the whole, against whoever serves
another file, and XXH128 of each 4 MiB, against damage: cheap enough to be compared at every load,
and only where bytes are used. XXH128 is no cryptographic hash; docs/security.md says what follows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from .native_library import built_libraries

CODING_ROOMS = (  # what can change the codes, scales and rotations of a checkpoint
    "coding", "models", "data", "quantization", "checkpoint",
    "system/accelerator.py", "system/distributed.py", "system/native_library.py",
)  # fmt: skip
_SOURCES = (".py", ".cu", ".safetensors")
_MODEL_FILES = (".json", ".safetensors", ".model", ".txt", ".jinja")
_PACKAGE = Path(__file__).parents[1]


CHUNK = 4 << 20  # bytes of a file that one XXH128 covers


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and digests (hex) of a file; two are equal when size and SHA-256 are.

    Attributes:
        xxh128: one for each `CHUNK` bytes, the last may be shorter; None where they are not known.
    """

    size: int
    sha256: str
    xxh128: tuple[str, ...] | None = field(default=None, compare=False)


class FileHasher:
    """The `FileEntry` of bytes that pass by in pieces of any size."""

    def __init__(self) -> None:
        self._size, self._sha256 = 0, hashlib.sha256()
        self._done: list[str] = []
        self._chunk = xxhash.xxh3_128()

    def update(self, data: bytes | memoryview) -> None:
        """The next bytes."""
        self._sha256.update(data)
        view = memoryview(data)
        while len(view):
            part = view[: CHUNK - self._size % CHUNK]
            self._chunk.update(part)
            self._size += len(part)
            if self._size % CHUNK == 0:
                self._next_chunk()
            view = view[len(part) :]

    def _next_chunk(self) -> None:
        self._done.append(self._chunk.hexdigest())
        self._chunk.reset()

    def entry(self) -> FileEntry:
        """Of all bytes; nothing may follow."""
        if self._size % CHUNK:
            self._next_chunk()
        return FileEntry(self._size, self._sha256.hexdigest(), tuple(self._done))


def chunk_digest(data: bytes | memoryview) -> str:
    """XXH128 (hex) of one chunk."""
    return xxhash.xxh3_128_hexdigest(data)


def chunk_digests(path: Path) -> tuple[str, ...]:
    """XXH128 (hex) of each chunk of a file."""
    with open(path, "rb") as file:
        return tuple(map(chunk_digest, iter(lambda: file.read(CHUNK), b"")))


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
