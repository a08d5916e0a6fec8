"""Append-only raw files of tensors: where a checkpoint's tensors wait until they are assembled.

A staging file holds the bytes of its tensors back to back, as they lie in memory; names, types,
shapes and offsets are in memory only. `commit` makes what was added durable and hands out its
entries, from which another process goes on after any kind of crash: bytes behind the last committed
entry are cut off.
"""

from __future__ import annotations

import errno
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


@dataclass(frozen=True)
class StagedTensor:
    """A tensor in a raw file."""

    info: TensorInfo
    offset: int


class StagingFile:
    """An append-only raw file of tensors: a new one, or as it was after the commits that returned
    `entries`.

    Raises:
        FormatError: the file is gone or shorter than `entries` say.
    """

    def __init__(self, path: Path, entries: Sequence[Sequence[Any]] = ()) -> None:
        self.path = path
        self.tensors = {
            name: StagedTensor(TensorInfo(dtype, tuple(shape)), offset)
            for name, dtype, shape, offset in entries
        }
        self._committed = len(self.tensors)
        end = max((s.offset + s.info.nbytes for s in self.tensors.values()), default=0)
        size = path.stat().st_size if path.is_file() else 0
        if size < end:
            raise FormatError(
                f"{path} has {size} bytes, {end} are needed to go on: the folder {path.parent} is "
                "damaged. Remove it, and start again."
            )
        # it lives as long as the writer
        self.file: BinaryIO = open(path, "r+b" if entries else "wb")  # noqa: SIM115
        self.file.truncate(end)
        self.file.seek(end)

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor."""
        if name in self.tensors:
            raise ValueError(f"tensor {name} was added twice")
        self.tensors[name] = StagedTensor(TensorInfo.of(tensor), self.file.tell())
        self.file.write(raw_bytes(tensor))

    def commit(self) -> list[list[Any]]:
        """Make what was added durable; [name, dtype, shape, offset] of what is new since then."""
        sync(self.file)
        new = list(self.tensors.items())[self._committed :]
        self._committed = len(self.tensors)
        return [[name, s.info.dtype, list(s.info.shape), s.offset] for name, s in new]

    def read(self, name: str) -> Tensor:
        """A tensor, read into memory of its own (FormatError: the file is too short)."""
        staged = self.tensors[name]
        tensor = torch.empty(staged.info.shape, dtype=DTYPES[staged.info.dtype])
        view, done = raw_bytes(tensor), 0
        with open(self.path, "rb", buffering=0) as raw:
            raw.seek(staged.offset)
            while done < len(view) and (count := raw.readinto(view[done : done + _CHUNK])):
                done += count
        if done < len(view):
            raise FormatError(
                f"{self.path} ends within {name}: damaged. Remove the folder, and start again."
            )
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
        staged = self.tensors[name]
        left = staged.info.nbytes
        with open(self.path, "rb") as raw:
            raw.seek(staged.offset)
            while left:
                chunk = raw.read(min(left, _CHUNK))
                if not chunk:
                    raise OSError(errno.EIO, "a raw file is shorter than what was written to it")
                left -= len(chunk)
                yield chunk
