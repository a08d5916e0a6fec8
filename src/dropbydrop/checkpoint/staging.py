"""Append-only raw files of tensors: where a checkpoint's tensors wait until they are assembled.

A staging file holds the bytes of its tensors back to back, as they lie in memory; names, types,
shapes and offsets are in memory only. `commit` makes what was added durable and hands out its
entries, from which another process goes on after any kind of crash: bytes behind the last committed
entry are cut off, and those before it must have the SHA-256 that they were added with. They are
compared again when they are copied into a checkpoint, hours or days later.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dropbydrop.system.atomic_folder import sync
from dropbydrop.system.errors import FormatError

from .tensor_files import DTYPES, StreamedTensor, TensorInfo, raw_bytes

_CHUNK = 8 << 20


class DamagedWorkError(FormatError):
    """Kept work that is not what was written."""


@dataclass(frozen=True)
class StagedTensor:
    """A tensor in a raw file, and the SHA-256 of its bytes."""

    info: TensorInfo
    offset: int
    sha256: str


class StagingFile:
    """An append-only raw file of tensors: a new one, or as it was after the commits that returned
    `entries`.

    Raises:
        DamagedWorkError: the file is gone, shorter than `entries` say, or holds other bytes.
    """

    def __init__(self, path: Path, entries: Sequence[Sequence[Any]] = ()) -> None:
        self.path = path
        self.tensors = {
            name: StagedTensor(TensorInfo(dtype, tuple(shape)), offset, sha256)
            for name, dtype, shape, offset, sha256 in entries
        }
        self._committed = len(self.tensors)
        end = max((s.offset + s.info.nbytes for s in self.tensors.values()), default=0)
        size = path.stat().st_size if path.is_file() else 0
        if size < end:
            raise DamagedWorkError(
                f"{path} has {size} bytes, {end} are needed to go on: the folder {path.parent} is "
                "damaged. Remove it, and start again."
            )
        for name in self.tensors:
            for _ in self._copy(name):
                pass
        # it lives as long as the writer
        self.file: BinaryIO = open(path, "r+b" if entries else "wb")  # noqa: SIM115
        self.file.truncate(end)
        self.file.seek(end)

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor."""
        if name in self.tensors:
            raise ValueError(f"tensor {name} was added twice")
        data = raw_bytes(tensor)
        digest = hashlib.sha256(data).hexdigest()
        self.tensors[name] = StagedTensor(TensorInfo.of(tensor), self.file.tell(), digest)
        self.file.write(data)

    def commit(self) -> list[list[Any]]:
        """Make what was added durable; [name, dtype, shape, offset, SHA-256] of the new ones."""
        sync(self.file)
        new = list(self.tensors.items())[self._committed :]
        self._committed = len(self.tensors)
        return [[name, s.info.dtype, list(s.info.shape), s.offset, s.sha256] for name, s in new]

    def read(self, name: str) -> Tensor:
        """A tensor, read into memory of its own (DamagedWorkError)."""
        staged = self.tensors[name]
        tensor = torch.empty(staged.info.shape, dtype=DTYPES[staged.info.dtype])
        view, done = raw_bytes(tensor), 0
        for chunk in self._copy(name):
            view[done : done + len(chunk)] = chunk
            done += len(chunk)
        return tensor

    def __enter__(self) -> StagingFile:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):  # flushes, and fails, on a full disk
            self.file.close()

    def streamed(self, name: str) -> StreamedTensor:
        """A tensor to be copied from the file, which must be closed by then."""
        return StreamedTensor(name, self.tensors[name].info, partial(self._copy, name))

    def _copy(self, name: str) -> Iterator[bytes]:
        """The bytes of a tensor; DamagedWorkError at their end if they are not those of `add`."""
        staged = self.tensors[name]
        left, digest = staged.info.nbytes, hashlib.sha256()
        with open(self.path, "rb") as raw:
            raw.seek(staged.offset)
            while left and (chunk := raw.read(min(left, _CHUNK))):
                left -= len(chunk)
                digest.update(chunk)
                yield chunk
        if left or digest.hexdigest() != staged.sha256:
            raise DamagedWorkError(
                f"{name} in {self.path} is not what was written: damaged. Remove "
                f"{self.path.parent}, and start again."
            )
