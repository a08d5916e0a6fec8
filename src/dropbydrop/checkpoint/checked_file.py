"""A file that a manifest lists, compared with it before its bytes are used.

    size       when it is opened
    header     when it is first asked for (safetensors files)
    contents   chunk by chunk, each at most once: those that a tensor lies in when it is read, all
               of them before another library reads the file by its name (`check`)

What was compared is what is used: the file is mapped when it is opened and read from that mapping,
so a folder that is replaced or removed meanwhile changes nothing here. Others open it by its name;
`unchanged` says afterwards whether that still was this file. A manifest without XXH128 is served by
SHA-256 of the whole file.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import threading
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dropbydrop.system.digest import CHUNK, FileEntry, chunk_digest
from dropbydrop.system.errors import FormatError
from dropbydrop.system.paths import regular

from .tensor_files import DTYPES, Header, TensorInfo, read_header

_WHOLE = -1  # the number of the one "chunk" of a manifest without XXH128


class CheckedFile:
    """See the module's note. Safe to share between threads.

    Args:
        path: the file.
        entry: what the manifest says of it.
        verify: compare contents; size and header always are.

    Raises:
        FormatError: missing, unreadable, or of another size.
    """

    def __init__(self, path: Path, entry: FileEntry, verify: bool = True) -> None:
        self.path, self.entry, self.verify = path, entry, verify
        self._checked: set[int] = set()
        self._checking = threading.Lock()
        try:
            self._file = open(path, "rb", 0, opener=regular)  # noqa: SIM115 - as long as the mapping
            self._seen = os.fstat(self._file.fileno())
            if self._seen.st_size != entry.size:
                raise FormatError(
                    f"{path} has {self._seen.st_size} bytes, the manifest says {entry.size}: cut "
                    "off, edited, or from another checkpoint. Fetch it again."
                )
            # private, so that torch may have it; nobody writes to it
            self._bytes: mmap.mmap | bytes = b""
            if entry.size:
                self._bytes = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        except FileNotFoundError:
            raise FormatError(f"{path} is missing. Fetch it again.") from None
        except (OSError, ValueError) as error:
            raise FormatError(f"{path} cannot be read ({error}). Fetch it again.") from error

    @property
    def content(self) -> bytes:
        """All bytes."""
        return self._bytes[:]

    @cached_property
    def header(self) -> Header:
        """Of a safetensors file.

        Raises:
            FormatError: damaged, or of an unknown version.
        """
        found = read_header(self._bytes, str(self.path))
        try:  # whoever reads the file by its name does so with this library: it must agree
            with safe_open(self.path, framework="pt") as other:
                names = set(other.keys())
        except (SafetensorError, OSError, RuntimeError) as error:  # the last if it is another file
            self.unchanged()
            raise FormatError(
                f"{self.path}: the header is damaged ({error}). Fetch it again."
            ) from error
        if names != set(found.tensors):
            raise FormatError(f"{self.path}: the header is ambiguous. Fetch it again.")
        self.unchanged()
        return found

    def tensor(self, name: str, row: int | None = None) -> Tensor:
        """A tensor, on the mapping (KeyError if there is none of this name).

        Args:
            row: only this index of its first dimension; no other bytes are read, but for the rest
                of the chunks that it lies in, which are compared as a whole.

        Raises:
            FormatError: its bytes are not those of the manifest.
        """
        info, start = self.header.tensors[name], self.header.starts[name]
        if row is not None:
            info = TensorInfo(info.dtype, info.shape[1:])
            start += row * info.nbytes
        self.check(start, start + info.nbytes)
        if _identity(os.fstat(self._file.fileno())) != _identity(self._seen):
            raise self._changed()
        dtype = DTYPES[info.dtype]
        if not info.nbytes:
            return torch.empty(info.shape, dtype=dtype)
        raw = torch.frombuffer(self._bytes, dtype=torch.uint8, count=info.nbytes, offset=start)
        if start % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(info.shape)

    def check(self, start: int = 0, stop: int | None = None) -> None:
        """Compare the bytes start ... stop - 1, by default all, with the manifest.

        Raises:
            FormatError: they differ, or the file was written to since it was opened.
        """
        if not self.verify or not self.entry.size:
            return
        stop = self.entry.size if stop is None else stop
        chunks = range(start // CHUNK, math.ceil(stop / CHUNK))
        with self._checking:
            for number in chunks if self.entry.xxh128 is not None else (_WHOLE,):
                if number not in self._checked:
                    self._compare(number)
                    self._checked.add(number)

    def _compare(self, number: int) -> None:
        with memoryview(self._bytes) as whole:
            if number == _WHOLE or self.entry.xxh128 is None:
                name, found = "SHA-256", hashlib.sha256(whole).hexdigest()
                expected, place = self.entry.sha256, ""
            else:
                with whole[number * CHUNK : (number + 1) * CHUNK] as chunk:
                    name, found = "XXH128", chunk_digest(chunk)
                expected, place = self.entry.xxh128[number], f" from byte {number * CHUNK:,} on"
        if found != expected:
            raise FormatError(
                f"{self.path} is not what the manifest says: {name} {found[:16]}…{place}, expected "
                f"{expected[:16]}…. Damaged, or edited since it was written. Fetch it again."
            )

    def unchanged(self) -> None:
        """Raises FormatError unless `path` still names the file that was opened, not written to."""
        try:
            same = _identity(os.stat(self.path)) == _identity(self._seen)
        except OSError:
            same = False
        if not same:
            raise self._changed()

    def _changed(self) -> FormatError:
        return FormatError(
            f"{self.path} was replaced, removed or written to while it was in use, so what was "
            "read may be of two checkpoints. Load the folder again."
        )


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
